"""The vocabulary projection in bf16: the largest logit is that of fp32, also where others are near.

python -m pytest tests/extras/test_cpu_head.py
"""

import pytest
import torch
from conftest import PROMPTS, tiny_family

import decoding
import models
from extras import cpu_head, cpu_linears
from extras.cpu_head import Bf16Head
from storage import UserError

pytestmark = pytest.mark.skipif(
    not cpu_linears.packable_layers(tiny_family("gpt2")), reason="needs oneDNN"
)


@pytest.fixture
def with_units(monkeypatch):
    """Let this CPU count as one that multiplies in bf16."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})


def largest(weight: torch.Tensor, hidden: torch.Tensor) -> list[int]:
    """Return the words (B,) that the head finds; their logits have to be those of fp32."""
    logits = Bf16Head(weight)(hidden)
    expected = torch.nn.functional.linear(hidden, weight)
    assert logits.shape == expected.shape
    torch.testing.assert_close(logits.amax(-1), expected.amax(-1), rtol=1e-5, atol=1e-5)
    return logits.argmax(-1).tolist()


@pytest.mark.parametrize("scale", [1e-30, 1, 1e15])
@pytest.mark.parametrize("words", [1, 63, 64, 1000])
def test_bf16_head_is_argmax(words, scale):
    """Random weights, and hidden states that a few large numbers rule."""
    torch.manual_seed(0)
    weight = torch.randn(words, 40) + 1
    hidden = torch.randn(50, 40) * scale
    hidden[:, 3] *= 100
    assert largest(weight, hidden) == (hidden @ weight.t()).argmax(1).tolist()


def test_bf16_head_all_logits_negative():
    """The words that fill a group up are never the largest."""
    weight = torch.ones(65, 8)
    weight[7] = 0.5
    assert largest(weight, -torch.ones(2, 8)) == [7, 7]


@pytest.mark.parametrize("word", [0, 70, 129])
def test_bf16_head_near_tie(word):
    """A logit that is larger by one unit in the last place wins; of equals the first."""
    weight = torch.zeros(130, 8)
    weight[:, 0] = 1
    assert largest(weight, torch.eye(8)[:3]) == [0, 0, 0]
    weight[word, 0] += torch.finfo(torch.float32).eps
    assert largest(weight, torch.eye(8)[:1]) == [word]


def test_bf16_head_few_candidates():
    """Only words that are near the largest are computed in fp32, so all others stay in bf16."""
    torch.manual_seed(0)
    weight = torch.randn(5000, 64)
    hidden = torch.randn(20, 64)
    logits = Bf16Head(weight)(hidden)
    is_bf16 = logits == logits.bfloat16()
    assert is_bf16.sum() > 0.99 * is_bf16.numel()


def test_bf16_head_bound_holds():
    """No product in bf16 is further off than the bound says, with the worst of weights as well."""
    torch.manual_seed(0)
    hidden = torch.randn(30, 96)
    for weight in (torch.randn(200, 96), hidden.repeat(7, 1), hidden.sign()):
        head = Bf16Head(weight)
        rounded = hidden.bfloat16()
        rough = cpu_linears.linear_prepacked(head.packed, None, head.padded_words, rounded)
        rough = rough[:, : len(weight)].float()
        exact = hidden.double() @ weight.double().t()
        least = head.least_candidate(hidden, rounded, rough.amax(1))
        best = exact.argmax(1, keepdim=True)
        assert (rough.gather(1, best)[:, 0] >= least).all()
        assert ((exact - rough).abs().amax(1) <= rough.amax(1) - least).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_bf16_head_not_finite(value):
    """A row that is no number, or too large for bf16, gives fp32's logits and harms no other."""
    torch.manual_seed(0)
    weight = torch.randn(200, 16)
    hidden = torch.randn(3, 16)
    hidden[1] = value
    logits = Bf16Head(weight)(hidden)
    expected = torch.nn.functional.linear(hidden, weight)
    torch.testing.assert_close(logits, expected, equal_nan=True)


def test_generate_reports_nan(model_folder, with_units):
    """A NaN in the vocabulary projection is reported, not chosen."""
    loaded = models.load_model(str(model_folder("gpt2")))
    with torch.no_grad():
        loaded.model.lm_head.weight[50] = torch.nan
    with pytest.raises(UserError, match="NaN or infinite at new token 1"):
        decoding.generate(*loaded, PROMPTS, 3)


@pytest.mark.parametrize(
    ("kind", "temperature", "used"), [("gpt2", 0.0, True), ("t5", 0.0, True), ("gpt2", 0.7, False)]
)
def test_generate_greedy_uses_bf16_head(
    kind, temperature, used, model_folder, with_units, monkeypatch
):
    """Greedy decoding alone uses it, with the plain path's texts; the layer comes back."""
    loaded = models.load_model(str(model_folder(kind)))
    calls = []
    call = Bf16Head.__call__
    monkeypatch.setattr(Bf16Head, "__call__", lambda *a: calls.append(a) or call(*a))
    fast = decoding.generate(*loaded, PROMPTS, 12, temperature)
    assert bool(calls) == used
    assert fast == decoding.generate(*loaded, PROMPTS, 12, temperature, plain=True)
    assert "forward" not in vars(loaded.model.get_output_embeddings())


@pytest.mark.parametrize(("kind", "is_usable"), [("gpt2", True), ("cohere", False)])
def test_greedy_head_changed_afterwards(kind, is_usable, with_units):
    """Logits that a model changes after its head, as Cohere scales them, are those of fp32."""
    model = tiny_family(kind)
    layers = cpu_linears.layers_that_run(model, lambda: decoding.prefill(model, [[5]]))
    head = cpu_head.greedy_head(model, layers)
    assert (head is model.lm_head) == is_usable
    assert not model.lm_head._forward_hooks


def test_greedy_head_without_units(monkeypatch):
    """A CPU that does not multiply in bf16 gains nothing from it."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
    model = tiny_family("gpt2")
    assert cpu_head.greedy_head(model, cpu_linears.packable_layers(model)) is None
