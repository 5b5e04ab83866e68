"""Packed attention in one call, on the CPU.   python -m pytest tests/extras/test_gpu_training.py"""

import pytest
import torch
from conftest import (
    KINDS,
    assert_gradients_equal,
    hugging_face_loss_and_gradients,
    samples_for,
    step_loss_and_gradients,
    tiny_model,
    tiny_tokenizer,
)

from extras import gpu_training


def test_compute_places_lead_to_padded_rows_and_back():
    """Padding is the dummy at the end of the row, which finds itself in the first padding."""
    to_padded, to_row = gpu_training.compute_places([2, 3], size=7, width=4)
    assert to_padded.tolist() == [[0, 1, 6, 6], [2, 3, 4, 6]]
    assert to_row.tolist() == [0, 1, 4, 5, 6, 3, 3]


def test_gather_adds_nothing_up():
    """The gradient of a dummy is that of one of its copies; all others are index_select's."""
    to_padded, to_row = gpu_training.compute_places([2, 3], size=7, width=4)
    there = torch.from_numpy(to_padded).flatten()
    back = torch.from_numpy(to_row)
    x = torch.arange(7.0, requires_grad=True)
    y = gpu_training.Gather.apply(x, there, back)
    assert y.tolist() == [0, 1, 6, 6, 2, 3, 4, 6]
    y.backward(torch.arange(8.0))
    assert x.grad.tolist() == [0, 1, 4, 5, 6, 3, 3]


CHANGES = [{}, {"micro_batch_size": 3}, {"gradient_checkpointing": True}]


@pytest.mark.parametrize("changes", CHANGES, ids=["whole", "micro-batches", "recomputed"])
@pytest.mark.parametrize("kind", KINDS)
def test_padded_attention_equals_hugging_face(kind, changes, monkeypatch):
    """Loss and gradients are Hugging Face's own on the padded batch."""
    calls = []
    pad_samples = gpu_training.pad_samples

    def counted(x, places):
        calls.append(x.shape)
        return pad_samples(x, places)

    monkeypatch.setattr(gpu_training, "pad_samples", counted)
    model = tiny_model(kind)
    samples = samples_for(model, tiny_tokenizer())[:8]
    expected, expected_gradients = hugging_face_loss_and_gradients(model, samples)
    patches = gpu_training.gpu_training_patches
    loss, gradients = step_loss_and_gradients(model, samples, patches, plain=True, **changes)
    assert calls
    assert loss == pytest.approx(expected, rel=1e-6)
    assert_gradients_equal(gradients, expected_gradients)
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks for module in model.modules())
