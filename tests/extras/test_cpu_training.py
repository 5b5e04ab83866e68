"""The faster operations of training against torch's own.   python -m pytest tests/test_kernels.py"""

import copy

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from conftest import tiny_model, tiny_tokenizer
from extras import cpu_training as kernels
from test_train_loop import plain_loss_and_gradients, samples_for, step_loss_and_gradients


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_the_share_it_is_asked_for_at_every_place_and_scales_it(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(1000, 1003, dtype=dtype, requires_grad=True)
    y = kernels.drop(x, p)
    y.sum().backward()
    kept = y != 0
    assert set(y.unique().tolist()) == {0.0, y.max().item()}
    assert y.max().item() == pytest.approx(
        1 / (1 - p), rel=1e-2 if dtype is torch.bfloat16 else 1e-4
    )
    assert torch.equal(x.grad, y)  # of a sum: what each number was multiplied by
    deviation = (p * (1 - p) / len(x)) ** 0.5
    assert kept.float().mean().item() == pytest.approx(1 - p, abs=5 * deviation / x.shape[1] ** 0.5)
    assert (kept.float().mean(0) - (1 - p)).abs().max() < 5 * deviation  # and in each column
    for shift in (
        1,
        2,
        3,
        4,
    ):  # four numbers come of one draw: their masks know nothing of each other
        both = (kept.flatten()[:-shift] & kept.flatten()[shift:]).float().mean().item()
        assert both == pytest.approx((1 - p) ** 2, abs=5 / len(y.flatten()) ** 0.5)


def test_dropout_follows_torchs_seed_and_is_nothing_where_nothing_is_dropped():
    x = torch.randn(3, 5)
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(kernels.drop(x, 0.5))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert torch.equal(kernels.drop(x, 0.0), x)
    module = torch.nn.Dropout(0.5).eval()
    assert kernels.dropout_of(module, x) is x


@pytest.mark.parametrize("kind", ["gpt2", "t5", "flan-t5"])
def test_attention_with_dropout_is_that_without_where_dropout_is_too_small_to_drop(kind):
    model = tiny_model(kind)
    samples = samples_for(model, tiny_tokenizer())[:8]
    expected, expected_gradients = plain_loss_and_gradients(model, samples)
    loss, gradients = step_loss_and_gradients(tiny_model(kind, dropout=1e-6), samples)
    assert loss == pytest.approx(expected, rel=1e-6)
    scale = max(g.abs().max() for g in expected_gradients.values())
    for name, gradient in gradients.items():
        assert (gradient - expected_gradients[name]).abs().max() < 2e-6 * scale, name


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "flan-t5"])
@pytest.mark.parametrize(
    "flags",
    [{}, {"micro_batch_size": 3}, {"gradient_checkpointing": True}],
    ids=["", "micro-batches", "checkpointing"],
)
def test_attention_in_one_call_as_on_a_gpu_changes_neither_loss_nor_gradients(
    monkeypatch, kind, flags
):
    calls = []
    once = kernels.attend_padded
    monkeypatch.setattr(kernels, "in_one_call", lambda x: True)
    monkeypatch.setattr(
        kernels, "attend_padded", lambda *args, **more: calls.append(1) or once(*args, **more)
    )
    model = tiny_model(kind)
    samples = samples_for(model, tiny_tokenizer())[:8]
    expected, expected_gradients = plain_loss_and_gradients(model, samples)
    assert not calls
    loss, gradients = step_loss_and_gradients(model, samples, **flags)
    assert calls
    assert loss == pytest.approx(expected, rel=1e-6)
    scale = max(g.abs().max() for g in expected_gradients.values())
    for name, gradient in gradients.items():
        assert (gradient - expected_gradients[name]).abs().max() < 2e-6 * scale, name


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_recomputing_draws_the_same_dropout_again(kind):
    model = tiny_model(kind, dropout=0.2)
    samples = samples_for(model, tiny_tokenizer())[:8]
    loss, gradients = step_loss_and_gradients(copy.deepcopy(model), samples)
    again, recomputed = step_loss_and_gradients(model, samples, gradient_checkpointing=True)
    assert again == pytest.approx(loss, rel=1e-6)
    assert all(
        torch.allclose(gradients[name], recomputed[name], rtol=1e-4, atol=1e-6)
        for name in gradients
    )


def test_dropout_in_attention_leaves_its_mean_as_it_is():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 7, 4)
    exact = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True
    ).transpose(1, 2)
    draws = torch.stack(
        [kernels.attend(query, key, value, None, True, None, 0.3) for _ in range(4000)]
    )
    assert (draws.mean(0) - exact).abs().max() < 5 * draws.std(0).max() / 4000**0.5
    assert draws.std(0).max() > 0.1


@pytest.mark.parametrize(
    "layer",
    [torch.nn.Linear(24, 40), torch.nn.Linear(24, 40, bias=False), Conv1D(40, 24)],
    ids=["bias", "no bias", "Conv1D"],
)
def test_a_product_and_its_gradients_are_those_of_the_layer(layer):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 24)
    grad = torch.randn(2, 5, 40)
    results = []
    for forward in (layer.forward, lambda x: kernels.product_of(layer, x)):
        layer.zero_grad()
        inputs = x.clone().requires_grad_()
        output = forward(inputs)
        output.backward(grad)
        results.append([output, inputs.grad, *(p.grad for p in layer.parameters())])
    assert all(
        torch.allclose(a, b, rtol=1e-5, atol=1e-5) and a.shape == b.shape for a, b in zip(*results)
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_after_training_the_student_is_hugging_faces_own_again(kind):
    model = tiny_model(kind, dropout=0.1)
    hooks_of = lambda: [p for p in model.parameters() if p._post_accumulate_grad_hooks]
    before = [dict(vars(module)) for module in model.modules()]
    with (
        pytest.raises(ZeroDivisionError),
        kernels.training_kernels(model, packing=True, products=True),
    ):
        assert [dict(vars(module)) for module in model.modules()] != before
        assert model.config._attn_implementation == "per_sample"
        assert len(hooks_of()) == (kind != "llama")  # whose embedding is not the head's
        raise ZeroDivisionError
    assert [dict(vars(module)) for module in model.modules()] == before
    assert model.config._attn_implementation == "sdpa"
    assert not hooks_of()
