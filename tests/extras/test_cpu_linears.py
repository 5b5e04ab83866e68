"""Prepacked linears: the same sums, and weights that come back as they were.

python -m pytest tests/extras/test_cpu_linears.py
"""

from pathlib import Path

import pytest
import torch
import transformers
from conftest import PROMPTS, tiny_family

import decoding
import models
from extras import cpu_decoding, cpu_linears


@pytest.fixture
def load(model_folder):
    """-> function: kind -> (model, tokenizer, family)."""
    return lambda kind: models.load_model(str(model_folder(kind)))


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
@pytest.mark.parametrize("fails", [False, True])
def test_prepacked_linears_restore_weights(kind, fails, load, monkeypatch):
    """Weights are the same bits, in the same parameters, after decoding, even where it fails."""
    model, tokenizer, family = load(kind)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    parameters = list(map(id, model.parameters()))
    if fails:
        monkeypatch.setattr(cpu_decoding, "decode_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            decoding.generate(model, tokenizer, family, PROMPTS, 3)
    else:
        decoding.generate(model, tokenizer, family, PROMPTS, 3)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])
    assert list(map(id, model.parameters())) == parameters
    assert not any("forward" in vars(module) for module in model.modules())


def test_prepacked_linears_leave_trainable_weights(load):
    """A model can be trained on after decoding."""
    model, tokenizer, family = load("gpt2")
    decoding.generate(model, tokenizer, family, PROMPTS, 3)
    for weight in model.parameters():
        assert weight.requires_grad
        assert not weight.is_inference()


def test_prepacked_linears_interrupted(load):
    """Where the consumer of rows stops, weights are put back at once."""
    model, tokenizer, family = load("gpt2")
    layers = cpu_linears.packable_layers(model)
    with pytest.raises(ZeroDivisionError), cpu_linears.prepacked_linears(model, layers):
        assert not model.transformer.h[0].mlp.c_fc.weight.numel()
        raise ZeroDivisionError
    assert model.transformer.h[0].mlp.c_fc.weight.numel()


def test_layers_that_run_without_weights_that_the_model_reads():
    """Mamba multiplies by the weight of dt_proj itself, so it must not be emptied."""
    model = tiny_family("mamba")
    prompt = torch.tensor([[5, 6, 7]])
    layers = cpu_linears.layers_that_run(model, lambda: model(prompt))
    mixer = model.backbone.layers[0].mixer
    assert mixer.in_proj in layers
    assert mixer.dt_proj not in layers
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_linear_prepacked_is_linear():
    """The sums are those of a linear layer and of GPT-2's Conv1D."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(24, 40), transformers.pytorch_utils.Conv1D(40, 24)]
    x = torch.randn(2, 5, 24)
    for layer in layers:
        packed = torch.ops.mkldnn._reorder_linear_weight(cpu_linears.out_by_in(layer), 64)
        output = cpu_linears.linear_prepacked(packed, layer.bias, 40, x)
        torch.testing.assert_close(output, layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_release_mmapped_pages(load):
    """Numbers of a weight file come back from there, and no other memory is touched."""
    model, *_ = load("gpt2")
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    mapped = cpu_linears.mmapped_weight_ranges()
    address = model.lm_head.weight.data_ptr()
    assert any(start <= address < end for start, end in mapped)
    ones = torch.ones(50_000)
    for weight in [*model.parameters(), ones]:
        cpu_linears.release_mmapped_pages(weight, mapped)
    assert ones.sum() == 50_000
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name])


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_mmapped_weight_ranges_written_to(load):
    """A weight file that was written to in memory is not one whose pages may go."""
    model, *_ = load("gpt2")
    with torch.no_grad():
        model.lm_head.weight[3, 3] += 1
    address = model.lm_head.weight.data_ptr()
    mapped = cpu_linears.mmapped_weight_ranges()
    assert not any(start <= address < end for start, end in mapped)
