"""Training patches for CPUs against torch.   python -m pytest tests/extras/test_cpu_training.py

The whole step with these patches is compared with Hugging Face's in tests/test_train_loop.py.
"""

import contextlib

import pytest
import torch
from conftest import prepare_training, samples_for, tiny_model, tiny_tokenizer, train_config

import train_loop
from extras import cpu_training


def prepared(kind, **changes):
    model = tiny_model(kind, dropout=0.1)
    samples = samples_for(model, tiny_tokenizer())
    config = train_config(**changes)
    return prepare_training(model, samples, config)


def test_choose_layout_leaves_out_a_fast_path_that_differs(monkeypatch, capsys):
    """Fast paths are tried on the student before they are trusted."""

    @contextlib.contextmanager
    def wrong_patches(setup):
        head = setup.state.model.get_output_embeddings()
        hook = head.register_forward_hook(lambda module, inputs, logits: logits * 1.001)
        yield
        hook.remove()

    monkeypatch.setattr(train_loop, "open_fast_paths", wrong_patches)
    setup = prepared("gpt2", plain=False)
    assert setup.packing
    assert setup.config.plain
    assert "other gradients on the fast path: it is left out" in capsys.readouterr().out


def output_and_gradients(forward, layer, x, grad):
    layer.zero_grad()
    inputs = x.clone().requires_grad_()
    output = forward(inputs)
    output.backward(grad)
    return output, inputs.grad, layer.weight.grad


LINEARS = [torch.nn.functional.linear, cpu_training.onednn_linear]


@pytest.mark.parametrize("linear", LINEARS)
def test_head_forward_equals_the_layer(linear):
    """So do its gradients."""
    if linear is cpu_training.onednn_linear and not cpu_training.has_onednn():
        pytest.skip("this torch has no oneDNN")
    torch.manual_seed(0)
    layer = torch.nn.Linear(24, 40, bias=False)
    x = torch.randn(2, 5, 24)
    grad = torch.randn(2, 5, 40)
    expected = output_and_gradients(layer.forward, layer, x, grad)

    def forward(inputs):
        return cpu_training.head_forward(layer, linear, inputs)

    for a, b in zip(output_and_gradients(forward, layer, x, grad), expected, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_head_forward_adds_to_the_gradient_in_its_place():
    layer = torch.nn.Linear(3, 4, bias=False)
    x = torch.randn(5, 3)
    layer(x).sum().backward()
    gradient = layer.weight.grad
    once = gradient.clone()
    cpu_training.head_forward(layer, torch.nn.functional.linear, x).sum().backward()
    assert layer.weight.grad is gradient
    assert torch.allclose(gradient, 2 * once)


CASES = {  # kind, precision: whether the head is patched, how many embeddings are sparse
    ("gpt2", "fp32"): (True, 1),
    ("gpt2", "bf16"): (False, 1),
    ("llama", "fp32"): (True, 0),  # whose embedding is not the head's
    ("t5", "fp32"): (True, 3),  # shared, of the encoder, of the decoder
    ("flan-t5", "fp32"): (True, 3),
}


@pytest.mark.parametrize("kind, precision", CASES)
def test_cpu_training_patches_are_gone_after_the_block(kind, precision):
    """Even after an error the student is Hugging Face's own again."""
    setup = prepared(kind, precision=precision)
    model = setup.state.model
    head = model.get_output_embeddings()
    embeddings = {m for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(ZeroDivisionError), cpu_training.cpu_training_patches(setup):
        is_patched = "forward" in vars(head)
        assert (is_patched, sum(m.sparse for m in embeddings)) == CASES[kind, precision]
        raise ZeroDivisionError
    assert [dict(vars(module)) for module in model.modules()] == before


def test_cpu_training_patches_leave_a_compiled_student_alone():
    setup = prepared("gpt2")
    setup = setup._replace(config=train_config(compile=True))
    before = [dict(vars(module)) for module in setup.state.model.modules()]
    with cpu_training.cpu_training_patches(setup):
        assert [dict(vars(module)) for module in setup.state.model.modules()] == before


def test_cpu_training_patches_do_without_the_operator(monkeypatch):
    """Another version of torch may lack it."""
    monkeypatch.setattr(cpu_training, "has_onednn", lambda: False)
    setup = prepared("gpt2")
    with cpu_training.cpu_training_patches(setup):
        _, linear = setup.state.model.get_output_embeddings().forward.args
        assert linear is torch.nn.functional.linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_fast_dropout_keeps_the_share_it_is_asked_for(p, dtype):
    """It keeps 1 - p overall and in each column, scales what is kept, and draws independently."""
    torch.manual_seed(0)
    x = torch.ones(1000, 1003, dtype=dtype, requires_grad=True)
    y = cpu_training.fast_dropout(torch.nn.Dropout(p), x)
    y.sum().backward()
    kept = y != 0
    deviation = (p * (1 - p) / len(x)) ** 0.5
    assert y.unique().numel() == 2
    assert y.max().item() == pytest.approx(
        1 / (1 - p), rel=1e-2 if dtype is torch.bfloat16 else 1e-4
    )
    assert torch.equal(x.grad, y)  # of a sum: what each number was multiplied by
    assert kept.float().mean().item() == pytest.approx(1 - p, abs=5 * deviation / 1003**0.5)
    assert (kept.float().mean(0) - (1 - p)).abs().max() < 5 * deviation
    for shift in (1, 2, 3, 4):  # four numbers come of one draw
        both = (kept.flatten()[:-shift] & kept.flatten()[shift:]).float().mean().item()
        assert both == pytest.approx((1 - p) ** 2, abs=5 / y.numel() ** 0.5)


def test_fast_dropout_follows_the_seed():
    """The same seed gives the same mask, as a resumed run needs."""
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(cpu_training.fast_dropout(torch.nn.Dropout(0.5), torch.ones(50)))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_fast_dropout_does_nothing_in_evaluation():
    """In evaluation nothing is dropped."""
    x = torch.randn(3)
    assert cpu_training.fast_dropout(torch.nn.Dropout(0.5).eval(), x) is x
