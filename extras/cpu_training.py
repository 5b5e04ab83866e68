"""Faster training on CPUs; changes rounding and the draws of dropout, nothing else.

train_loop.py opens `cpu_training_patches` around an epoch; outside it the student's modules are
Hugging Face's own.  What each part gains is in LOG.md.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from train_loop import TrainSetup

Linear = Callable[[Tensor, Tensor], Tensor]

M_TRIM_THRESHOLD = -1  # glibc's mallopt
M_MMAP_MAX = -4


@contextmanager
def cpu_training_patches(setup: TrainSetup) -> Iterator[None]:
    """Keep freed memory; inside the block, patch the student's embedding, dropout and head.

    Sharded and compiled students keep theirs.
    """
    model = setup.state.model
    if not model.config.is_encoder_decoder:  # T5 gains nothing (LOG.md)
        keep_freed_memory()
    config = setup.config
    with ExitStack() as stack:
        if config.shard == "no" and not config.compile:
            patch_tied_embeddings(model, stack)
            patch_dropout(model, stack)
            if config.precision == "fp32" and setup.ranks.world_size == 1:
                patch_head(model, stack)
        yield


def patch_tied_embeddings(model: PreTrainedModel, stack: ExitStack) -> None:
    """Let an embedding's gradient be the few rows it is, where it is added to the head's.

    As large as the vocabulary, it would take memory and time (LOG.md).
    """
    head = model.get_output_embeddings()
    for module in model.modules():
        if not isinstance(module, nn.Embedding):
            continue
        if module.weight is head.weight:
            stack.callback(setattr, module, "sparse", module.sparse)
            module.sparse = True


def patch_dropout(model: PreTrainedModel, stack: ExitStack) -> None:
    """Draw the masks of dropout layers faster."""
    for module in model.modules():
        if type(module) is nn.Dropout and 0 < module.p < 1:
            module.forward = partial(fast_dropout, module)
            stack.callback(delattr, module, "forward")


def fast_dropout(module: nn.Dropout, x: Tensor) -> Tensor:
    """Apply a dropout layer with 16 random bits a number, four of which come in one draw.

    So p is rounded to 1/65536, and what is kept is scaled by just that.  The mask takes one byte a
    number.
    """
    if not module.training:
        return x
    n_dropped = round(module.p * 65536)
    n_kept = 65536 - n_dropped
    size = x.numel()
    n_draws = ceil(size / 4)
    draws = torch.empty(n_draws, dtype=torch.int64)
    draws.random_(-(2**63), None)
    bits = draws.view(torch.int16)[:size]
    is_kept = bits >= n_dropped - 32768
    mask = is_kept.view(torch.uint8).view(x.shape)
    return x * mask * (65536 / n_kept)


def patch_head(model: PreTrainedModel, stack: ExitStack) -> None:
    """Compute a decoder's logits by oneDNN, and any head's gradient where it is to be.

    oneDNN: the other layers gain nothing; T5 loses time, and memory for a copy of the weight
    (LOG.md).  Not under DDP, which waits to be handed the gradient.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        return
    if not head.weight.requires_grad:
        return
    linear = F.linear
    if has_onednn() and not model.config.is_encoder_decoder:
        linear = onednn_linear
    head.forward = partial(head_forward, head, linear)
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


# ---------------- The vocabulary projection


def has_onednn() -> bool:
    """Tell whether this build of torch has the private operator that onednn_linear calls."""
    if not torch.backends.mkldnn.is_available():
        return False
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x (N, in) times weight (out, in)."""
    no_bias = None
    no_activation = ("none", [], "")
    return torch.ops.mkldnn._linear_pointwise(x, weight, no_bias, *no_activation)


class HeadLinear(torch.autograd.Function):
    """x (N, in) times weight (out, in) in fp32; the weight's gradient is added to weight.grad.

    Handed to autograd, it would be there a second time: as much as the whole vocabulary.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, linear: Linear) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        return linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of x."""
        (x,) = ctx.saved_tensors
        weight = ctx.weight
        transposed = grad.t()
        if weight.grad is None:
            weight.grad = transposed @ x
        else:
            weight.grad.addmm_(transposed, x)
        x_grad = grad @ weight
        return x_grad, None, None


def head_forward(head: nn.Linear, linear: Linear, x: Tensor) -> Tensor:
    """Apply the head to x (..., in)."""
    rows = x.flatten(0, -2)
    logits = HeadLinear.apply(rows, head.weight, linear)
    return logits.unflatten(0, x.shape[:-1])
