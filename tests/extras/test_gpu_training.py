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


def test_padded_places_lead_to_padded_rows_and_back():
    to_padded, to_row, is_real = gpu_training.padded_places((2, 3), torch.device("cpu"))
    assert to_padded.tolist() == [[0, 1, 0], [2, 3, 4]]
    assert to_row.tolist() == [0, 1, 3, 4, 5]
    assert is_real.tolist() == [[True, True, False], [True, True, True]]


CHANGES = [{}, {"micro_batch_size": 3}, {"gradient_checkpointing": True}]


@pytest.mark.parametrize("changes", CHANGES, ids=["whole", "micro-batches", "recomputed"])
@pytest.mark.parametrize("kind", KINDS)
def test_padded_attention_equals_hugging_face(kind, changes, monkeypatch):
    """Loss and gradients are Hugging Face's own on the padded batch."""
    calls = []
    pad_samples = gpu_training.pad_samples

    def counted(x, to_padded):
        calls.append(x.shape)
        return pad_samples(x, to_padded)

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
