"""A fine-tuning file -> token ids.   python -m pytest tests/test_tokens.py"""

import pytest
import torch
from conftest import one_rank, tiny_model, tiny_tokenizer, tokenized, toy_data

import storage
import tasks
import tokens
from models import LoadedModel, Positions
from storage import UserError


def test_tokenize_ends_labels_with_eos_and_not_prompts():
    tokenizer = tiny_tokenizer()
    data = {"sample_index": [4], "input": ["ab ###"], "label": [" c"]}
    [sample], dropped = tokens.tokenize(tokenizer, "decoder", data, 512)
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
    samples, dropped = tokens.tokenize(tiny_tokenizer(), "decoder", data, 25)
    assert [s.sample_index for s in samples] == [1, 4]
    assert dropped == [2, 3]
    _, dropped = tokens.tokenize(tiny_tokenizer(), "decoder", data, 25, Positions(total=40))
    assert dropped == [2, 3, 4]  # 20 + 20 + EOS do not fit 40 positions


def test_tokenize_drops_a_sample_without_a_prompt():
    """Nothing would predict the first label token of a decoder."""
    data = {"sample_index": [1, 2], "input": ["", "a"], "label": ["b", "b"]}
    assert tokens.tokenize(tiny_tokenizer(), "decoder", data, 25)[1] == [1]


def test_tokenize_refuses_data_without_a_usable_sample():
    data = {"sample_index": [1, 2], "input": ["long", "long"], "label": ["b", "b"]}
    with pytest.raises(UserError, match="no sample is left to train on: all 2 exceed 3 tokens"):
        tokens.tokenize(tiny_tokenizer(), "decoder", data, 3)


def test_tokenize_gives_what_one_call_a_text_gives(monkeypatch):
    """Chunks of rows, and prompts that several rows share, change nothing."""
    monkeypatch.setattr(tokens, "CHUNK", 7)
    tokenizer = tiny_tokenizer()
    data = toy_data(20)
    data["input"][3:6] = data["input"][:1] * 3
    samples, _ = tokens.tokenize(tokenizer, "decoder", data, 512)
    for i, sample in enumerate(samples):
        prompt = tasks.encode_prompt(tokenizer, "decoder", data["input"][i])
        label = tokenizer(data["label"][i])["input_ids"] + [tokenizer.eos_token_id]
        assert sample == tokens.TrainSample(i, prompt, label)


def test_tokenize_keeps_a_text_of_several_samples_once():
    data = {"sample_index": [1, 1, 2], "input": ["ab", "ab", "c"], "label": ["d", "e", "d"]}
    samples, _ = tokens.tokenize(tiny_tokenizer(), "decoder", data, 512)
    assert samples.rows.tolist() == [[1, 0, 2], [1, 0, 3], [2, 1, 2]]
    assert samples[0].prompt == samples[1].prompt
    assert samples[0].label == samples[2].label


@pytest.mark.parametrize("is_special", [True, False])
def test_encode_gives_what_the_tokenizers_own_call_gives(is_special):
    """With what a tokenizer's file says of padding and of truncation overridden."""
    tokenizer = tiny_tokenizer(bos=True)
    texts = ["ab c", "", "a longer text"]
    expected = [tokenizer(text, add_special_tokens=is_special)["input_ids"] for text in texts]
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    assert tokens.encode(tokenizer, texts, is_special) == expected


def test_tokenized_samples_are_a_sequence():
    samples, _ = tokens.tokenize(tiny_tokenizer(), "decoder", toy_data(20), 512)
    assert len(samples) == 20
    assert samples[-1] == list(samples)[19]
    assert samples[3:5] == [samples[3], samples[4]]
    lengths = [sample.length for sample in samples]
    assert [lengths[i] for i in samples.shortest_first] == sorted(lengths)
    with pytest.raises(IndexError):
        samples[20]


@pytest.mark.parametrize("largest, dtype", [(2**16 - 1, torch.uint16), (2**16, torch.int32)])
def test_tokenized_samples_take_two_bytes_a_token_where_they_fit(largest, dtype):
    sample = tokens.TrainSample(3, [5, largest], [0])
    samples = tokenized([sample])
    assert samples.token_ids.dtype == dtype
    assert samples.largest_id == largest
    assert list(samples) == [sample]


def load(tmp_path, max_length=512, tokenizer=None):
    student = LoadedModel(tiny_model("gpt2"), tokenizer or tiny_tokenizer(), "decoder")
    data_file = tmp_path / "data.json"
    return tokens.load_or_tokenize(student, data_file, tmp_path, max_length, one_rank())


def test_load_or_tokenize_reads_texts_once(tmp_path, monkeypatch, capsys):
    """A second start maps what the first wrote, and says the same."""
    storage.write_json(tmp_path / "data.json", toy_data(20))
    samples = load(tmp_path, max_length=30)
    said = capsys.readouterr().out
    monkeypatch.setattr(storage, "read_finetune_data", None)
    assert list(load(tmp_path, max_length=30)) == list(samples)
    assert capsys.readouterr().out == said
    assert said.startswith("dropped")


def test_load_or_tokenize_makes_anew_what_was_made_from_something_else(tmp_path):
    """Another file, bound or tokenizer."""
    data = toy_data(20)
    storage.write_json(tmp_path / "data.json", data)
    samples = load(tmp_path)
    assert len(load(tmp_path, max_length=30)) < len(samples)
    with_bos = load(tmp_path, tokenizer=tiny_tokenizer(bos=True))
    assert with_bos[0].prompt == [2, *samples[0].prompt]
    data["label"][0] = "another"
    storage.write_json(tmp_path / "data.json", data)
    assert load(tmp_path)[0].label != samples[0].label


def test_read_tokens_names_a_damaged_file(tmp_path):
    storage.write_json(tmp_path / "data.json", toy_data(3))
    load(tmp_path)
    [path] = tmp_path.glob("*.tokens")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="is damaged .*: delete it"):
        load(tmp_path)
