"""Decoding with a static cache, on the CPU.   python -m pytest tests/extras/test_gpu_decoding.py"""

import pytest
import torch
from conftest import PROMPTS, replay_graphs_on_the_cpu, tiny_family, tiny_tokenizer

import decoding
import models
from extras import cpu_decoding, gpu_decoding, gpu_graphs
from storage import UserError

LIMITS = [3, 50, 7, 1, 30, 12, 5, 40, 2, 9, 45, 4, 33, 21, 6, 2, 35, 10, 8, 40, 3]


@pytest.fixture
def load(model_folder):
    """-> function: kind -> (model, tokenizer, family)."""
    return lambda kind: models.load_model(str(model_folder(kind)))


@pytest.fixture
def static(monkeypatch):
    """-> the sizes (rows, columns) that were decoded; what is fast on a CPU is the GPU's path."""
    sizes = []
    run = gpu_decoding.Graphs.run

    def counted(self, key, work):
        sizes.append(key[:2])
        return run(self, key, work)

    monkeypatch.setattr(gpu_decoding.Graphs, "run", counted)
    monkeypatch.setattr(cpu_decoding, "decode", gpu_decoding.decode)
    return sizes


RUNS = [
    ("gpt2", {"batch_size": 6}),
    ("gpt2", {"temperature": 0.9, "n": 2, "seed": 3}),
    ("llama", {"stop": ["a", "7"]}),
    ("t5", {"batch_size": 6}),
    ("flan-t5", {"temperature": 1.2, "top_p": 0.8}),
]


@pytest.mark.parametrize("kind, options", RUNS, ids=str)
def test_decode_gives_the_texts_of_the_plain_loop(kind, options, load, static, monkeypatch):
    """Greedily and sampled, with rows that leave early and late, twice with the same graphs."""
    replay_graphs_on_the_cpu(monkeypatch, gpu_graphs.Graphs)
    prompts = (PROMPTS * 5)[: len(LIMITS)]
    arguments = (*load(kind), prompts, LIMITS)
    expected = decoding.generate(*arguments, plain=True, **options)
    assert not static
    assert decoding.generate(*arguments, **options) == expected
    kept = gpu_decoding.KEPT[arguments[0]]
    assert any(kept.graphs.graphs.values())
    assert decoding.generate(*arguments, **options) == expected
    assert gpu_decoding.KEPT[arguments[0]] is kept
    assert static


def test_decode_goes_on_with_fewer_rows(load, static, monkeypatch):
    """Rows that ended leave where 60% or fewer are left; what is read grows by 128 columns."""
    model, tokenizer, family = load("gpt2")
    monkeypatch.setattr(decoding, "eos_token_ids", lambda *_: set())  # limits end the rows
    decoding.generate(model, tokenizer, family, PROMPTS[:1] * 8, [10] * 4 + [150] * 4)
    assert [rows for rows, _ in static][:: len(static) - 1] == [8, 4]
    widths = [columns for _, columns in static]
    assert widths == sorted(widths)
    assert set(widths) <= {128, 256}


def test_decode_names_logits_that_are_not_finite(load, static):
    """In the sentence of the plain loop."""
    model, tokenizer, family = load("gpt2")
    table = model.transformer.wpe.weight
    ids = len(tokenizer(PROMPTS[0]).input_ids)
    with torch.no_grad():
        table[ids + 8] = torch.nan
    messages = []
    for plain in (True, False):
        with pytest.raises(UserError) as error:
            decoding.generate(model, tokenizer, family, PROMPTS[:1], 60, plain=plain)
        messages.append(str(error.value))
    assert static
    assert messages[0] == messages[1]
    assert model not in gpu_decoding.KEPT


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_decode_stays_in_the_context_window(kind, load, static, monkeypatch):
    """A row that ended is decoded on beside others, at its last position."""
    model, tokenizer, family = load(kind)
    positions = []
    forward = type(model).forward

    def spied(self, *args, **options):
        if "position_ids" in options:
            positions.append(int(options["position_ids"].max()))
        return forward(self, *args, **options)

    long = "x" * 250
    monkeypatch.setattr(type(model), "forward", spied)
    decoding.generate(model, tokenizer, family, [long, "y"], [2, 40])
    assert static
    assert max(positions, default=0) < 256


def test_decode_leaves_out_what_gives_other_logits(load, static, monkeypatch, capsys):
    arguments = (*load("gpt2"), PROMPTS, 12)
    expected = decoding.generate(*arguments, plain=True)
    forward = gpu_decoding.StaticCache.forward
    monkeypatch.setattr(gpu_decoding.StaticCache, "forward", lambda *a: forward(*a) + 1)
    assert decoding.generate(*arguments) == expected
    assert not static
    assert "a static cache gives models of type gpt2 other logits" in capsys.readouterr().out


def test_decode_leaves_out_caches_of_other_kinds(static, capsys):
    """Such as one that forgets what is far behind."""
    model = tiny_family("mistral", sliding_window=8)
    arguments = (model, tiny_tokenizer(), "decoder", PROMPTS, 12)
    expected = decoding.generate(*arguments, plain=True)
    assert decoding.generate(*arguments) == expected
    assert not static


def test_decode_keeps_no_cache_of_other_weights(load, static):
    """Graphs read weights where they lay."""
    model, tokenizer, family = load("gpt2")
    decoding.generate(model, tokenizer, family, PROMPTS, 12)
    kept = gpu_decoding.KEPT[model]
    model.double().float()
    decoding.generate(model, tokenizer, family, PROMPTS, 12)
    assert gpu_decoding.KEPT[model] is not kept


@pytest.mark.parametrize("count, rounded", [(1, 1), (6, 6), (9, 10), (107, 112), (180, 192)])
def test_round_rows(count, rounded):
    assert gpu_decoding.round_rows(count) == rounded
