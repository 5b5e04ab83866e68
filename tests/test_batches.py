"""Samples -> tokens -> batches -> tensors.   python -m pytest tests/test_batches.py"""

import pytest
from conftest import tiny_tokenizer

import batches
from batches import TrainSample
from storage import UserError


def test_tokenize_ends_labels_with_eos_and_not_prompts():
    tokenizer = tiny_tokenizer()
    data = {"sample_index": [4], "input": ["ab ###"], "label": [" c"]}
    [sample], dropped = batches.tokenize(tokenizer, "decoder", data, 512)
    assert sample.label[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in sample.prompt
    assert not dropped
    assert tokenizer.decode(sample.prompt) == "ab ###"
    assert tokenizer.decode(sample.label[:-1]) == " c"


def test_tokenize_drops_what_is_too_long():
    """A sample that is too long is dropped and never cut."""
    data = {
        "sample_index": [1, 2, 3, 4],
        "input": ["short", "x" * 30, "short", "twenty characters ok"],
        "label": ["a", "a", "y" * 30, "twenty characters ok"],
    }
    samples, dropped = batches.tokenize(tiny_tokenizer(), "decoder", data, 25)
    assert [s.sample_index for s in samples] == [1, 4]
    assert dropped == [2, 3]
    _, dropped = batches.tokenize(tiny_tokenizer(), "decoder", data, 25, max_positions=40)
    assert dropped == [2, 3, 4]  # 20 + 20 + EOS do not fit 40 positions


def test_tokenize_drops_a_sample_without_a_prompt():
    """Nothing would predict the first label token of a decoder."""
    data = {"sample_index": [1, 2], "input": ["", "a"], "label": ["b", "b"]}
    assert batches.tokenize(tiny_tokenizer(), "decoder", data, 25)[1] == [1]


def test_tokenize_refuses_data_without_a_usable_sample():
    data = {"sample_index": [1, 2], "input": ["long", "long"], "label": ["b", "b"]}
    with pytest.raises(UserError, match="no sample is left to train on: all 2 exceed 3 tokens"):
        batches.tokenize(tiny_tokenizer(), "decoder", data, 3)


def test_global_batches_hold_every_sample_once():
    """And depend on seed and epoch alone."""
    made = batches.global_batches(21, 8, seed=3, epoch=2)
    assert [len(batch) for batch in made] == [8, 8, 5]
    assert sorted(sum(made, [])) == list(range(21))
    assert made == batches.global_batches(21, 8, seed=3, epoch=2)
    assert made != batches.global_batches(21, 8, seed=3, epoch=3)
    assert made != batches.global_batches(21, 8, seed=4, epoch=2)


BOUNDS = [  # world_size, max_samples, max_tokens
    (1, 8, 0),
    (1, None, 0),
    (1, 3, 0),
    (2, 2, 0),
    (3, 1, 0),
    (4, 4, 0),
    (1, 8, 9),
    (2, 8, 1),
]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("n", [1, 2, 5, 8])
@pytest.mark.parametrize("world_size, max_samples, max_tokens", BOUNDS)
def test_micro_batches_partition_the_batch_within_bounds(
    n, world_size, max_samples, max_tokens, packing
):
    """And there are equally many for each rank."""
    batch = [TrainSample(i, [1] * (i * 7 % 5 + 1), [0]) for i in range(n)]
    groups = batches.micro_batches(batch, max_samples, max_tokens, packing, world_size)
    assert len(groups) % world_size == 0
    assert max(map(len, groups)) <= (max_samples or n)
    assert sorted(s.sample_index for group in groups for s in group) == list(range(n))
    for group in groups:
        lengths = [len(s.prompt) + 1 for s in group]
        size = sum(lengths) if packing else len(lengths) * max(lengths, default=0)
        assert len(group) <= 1 or size <= (max_tokens or 99)


def test_micro_batches_are_as_few_as_the_bounds_allow():
    batch = [TrainSample(i, [1] * 4, [0]) for i in range(8)]
    assert len(batches.micro_batches(batch, None, 0, True)) == 1
    assert len(batches.micro_batches(batch, 3, 0, True)) == 3
    assert len(batches.micro_batches(batch, None, 20, True)) == 2
    assert len(batches.micro_batches(batch, None, 0, True, world_size=2)) == 2


PAIR = [TrainSample(0, [5, 6], [7, 0]), TrainSample(1, [8], [9, 10, 4, 0])]


def test_collate_marks_the_label_tokens_of_a_decoder():
    """Labels stand at the positions that predict them, -100 at all others."""
    batch = batches.collate(PAIR, None, packing=False)
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7, 0], [8, 9, 10, 4]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.targets.tolist() == [[-100, 7, 0, -100], [9, 10, 4, 0]]
    assert batch.n_tokens == 10  # of either sample EOS too


def test_collate_shifts_the_labels_of_an_encoder_decoder_right():
    batch = batches.collate(PAIR, 2, packing=False)
    assert batch.inputs["input_ids"].tolist() == [[5, 6], [8, 0]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch.inputs["decoder_input_ids"].tolist() == [[2, 7, 0, 0], [2, 9, 10, 4]]
    assert batch.targets.tolist() == [[7, 0, -100, -100], [9, 10, 4, 0]]
    assert batch.n_tokens == 12


def test_collate_packs_a_decoder_end_to_end():
    """Positions restart at each sample, and nothing is padding."""
    batch = batches.collate(PAIR, None, packing=True)
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 4]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert batch.inputs["packed_lengths"] == batches.PackedLengths([3, 4], [])
    assert batch.targets.tolist() == [[-100, 7, 0, 9, 10, 4, 0]]
    assert "attention_mask" not in batch.inputs
    assert batch.n_tokens == sum(sample.length for sample in PAIR)


def test_collate_packs_an_encoder_decoder_end_to_end():
    batch = batches.collate(PAIR, 2, packing=True)
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 8]]
    assert batch.inputs["decoder_input_ids"].tolist() == [[2, 7, 2, 9, 10, 4]]
    assert batch.inputs["packed_lengths"] == batches.PackedLengths([2, 1], [2, 4])
    assert batch.targets.tolist() == [[7, 0, 9, 10, 4, 0]]
    assert batch.n_tokens == sum(sample.length for sample in PAIR)
