"""Faster training on CPUs; changes rounding and the draws of dropout, nothing else.

train_loop.py opens `cpu_training_patches` around an epoch; outside it the student's modules are
Hugging Face's own.  What each part gains is in LOG.md.
"""

import contextlib
import ctypes
import functools
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from train_loop import TrainSetup

M_TRIM_THRESHOLD = -1  # glibc's mallopt
M_MMAP_MAX = -4


@contextlib.contextmanager
def cpu_training_patches(setup: TrainSetup) -> Iterator[None]:
    """Keep freed memory; inside the block, patch the student's embedding, dropout and head.

    Sharded and compiled students keep theirs.
    """
    model = setup.state.model
    if not model.config.is_encoder_decoder:  # T5 gains nothing (LOG.md)
        keep_freed_memory()
    config = setup.config
    with contextlib.ExitStack() as stack:
        if config.shard == "no" and not config.compile:
            patch_tied_embeddings(model, stack)
            patch_dropout(model, stack)
            if config.precision == "fp32" and not model.config.is_encoder_decoder:
                patch_head(model, stack)
        yield


def patch_tied_embeddings(model: PreTrainedModel, stack: contextlib.ExitStack) -> None:
    """Let an embedding's gradient be the few rows it is, where it is added to the head's.

    As large as the vocabulary, it would take memory and time (LOG.md).
    """
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight is head.weight:
            stack.callback(setattr, module, "sparse", module.sparse)
            module.sparse = True


def patch_dropout(model: PreTrainedModel, stack: contextlib.ExitStack) -> None:
    """Draw the masks of dropout layers faster."""
    for module in model.modules():
        if type(module) is nn.Dropout and 0 < module.p < 1:
            module.forward = functools.partial(fast_dropout, module)
            stack.callback(delattr, module, "forward")


def fast_dropout(module: nn.Dropout, x: Tensor) -> Tensor:
    """Apply a dropout layer with 16 random bits a number, four of which come in one draw.

    So p is rounded to 1/65536, and what is kept is scaled by just that.  The mask takes one byte a
    number.
    """
    if not module.training:
        return x
    n_dropped = round(module.p * 65536)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = draws.view(torch.int16)[: x.numel()].view(x.shape)
    mask = (bits >= n_dropped - 32768).view(torch.uint8)
    return x * mask * (65536 / (65536 - n_dropped))


def patch_head(model: PreTrainedModel, stack: contextlib.ExitStack) -> None:
    """Compute the logits of a decoder by oneDNN.

    The other layers gain nothing; T5 loses time, and memory for a copy of the weight (LOG.md).
    """
    head = model.get_output_embeddings()
    if type(head) is nn.Linear and head.bias is None and has_onednn():
        head.forward = functools.partial(head_forward, head)
        stack.callback(delattr, head, "forward")


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks, whatever their size, for as long as the process lives.

    What it gives back to the kernel is zeroed page by page when it is taken again (LOG.md).
    """
    libc = None
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


# ---------------- The vocabulary projection by oneDNN


def has_onednn() -> bool:
    """Tell whether this build of torch has the private operator that OneDnnLinear calls."""
    is_available = torch.backends.mkldnn.is_available()
    return is_available and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class OneDnnLinear(torch.autograd.Function):
    """x (N, in) times weight (out, in) in fp32; the gradients are torch's own matmuls."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of x and weight."""
        x, weight = ctx.saved_tensors
        x_grad = None
        weight_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = grad @ weight
        if ctx.needs_input_grad[1]:
            weight_grad = grad.t() @ x
        return x_grad, weight_grad


def head_forward(head: nn.Linear, x: Tensor) -> Tensor:
    """Apply the head to x (..., in)."""
    logits = OneDnnLinear.apply(x.reshape(-1, x.shape[-1]), head.weight)
    return logits.view(*x.shape[:-1], -1)
