"""Samples -> batches -> tensors.   python -m pytest tests/test_batches.py"""

import itertools
import random
import time

import pytest

import batches
from tokens import TrainSample


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


def tokens_of(group, packing):
    lengths = [sample.length for sample in group]
    return sum(lengths) if packing else len(group) * max(lengths, default=0)


def group_naively(batch, max_samples, max_tokens, packing, world_size):
    """The definition: one group more until all are within the bounds; each sum anew."""
    longest_first = sorted(batch, key=lambda sample: (-sample.length, sample.sample_index))
    for n in itertools.count(world_size, world_size):
        groups = [[] for _ in range(n)]
        for i, sample in enumerate(longest_first):
            place = next(g for g in range(n) if i < (g + 1) * len(batch) // n)
            if packing:
                place = min(range(n), key=lambda g: (tokens_of(groups[g], True), len(groups[g])))
            groups[place].append(sample)
        several = [group for group in groups if len(group) > 1]
        few = all(len(group) <= (max_samples or len(batch)) for group in groups)
        if few and all(tokens_of(g, packing) <= (max_tokens or 10**9) for g in several):
            return groups


def random_batch(rng, n):
    """Samples of 2 to 309 tokens."""
    sizes = [(rng.randrange(1, 160), rng.randrange(1, 150)) for _ in range(n)]
    return [TrainSample(i, [1] * p, [2] * q) for i, (p, q) in enumerate(sizes)]


def test_micro_batches_are_those_of_the_definition():
    rng = random.Random(0)
    for _ in range(100):
        batch = random_batch(rng, rng.randrange(1, 24))
        bounds = rng.choice([None, 1, 3, 8]), rng.choice([0, 50, 300, 1024])
        layout = rng.random() < 0.5, rng.choice([1, 2, 3])
        expected = group_naively(batch, *bounds, *layout)
        assert batches.micro_batches(batch, *bounds, *layout) == expected


def test_micro_batches_balance_the_tokens_of_the_ranks():
    """Packed, the shares of ranks differ by no more than a sample a micro-batch."""
    batch = random_batch(random.Random(2), 64)
    longest = max(sample.length for sample in batch)
    groups = batches.micro_batches(batch, None, 1024, packing=True, world_size=4)
    shares = [sum(tokens_of(group, True) for group in groups[rank::4]) for rank in range(4)]
    assert max(shares) - min(shares) <= longest * len(groups) / 4
    assert max(shares) < 1.02 * sum(shares) / 4


@pytest.mark.parametrize("packing", [True, False])
def test_micro_batches_of_a_large_batch_take_milliseconds(packing):
    """512 samples took 1.6 s when every sum was made anew."""
    batch = random_batch(random.Random(1), 512)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        batches.micro_batches(batch, None, 1024, packing)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.02


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
