"""Packed attention in one call; on GPUs many small calls cost more than padding (LOG.md).

train_loop.py opens `gpu_training_patches` around an epoch; extras/gpu_step.py takes the steps.

Shapes: T tokens of the packed row, B samples in it, n tokens of a padded row.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.t5.modeling_t5 import T5LayerNorm

from batches import PackedLengths, lengths_of_layer
from models import set_attention
from train_loop import TrainSetup


@contextlib.contextmanager
def gpu_training_patches(setup: TrainSetup) -> Iterator[None]:
    """Inside the block a packed student attends on padded samples, and T5 normalizes in one call.

    F.rms_norm computes T5LayerNorm's function; on a GPU, in one kernel, the last bit may differ.
    """
    model = setup.state.model
    with contextlib.ExitStack() as stack:
        if setup.packing:
            set_attention(model, "packed_in_one_call")
            stack.callback(set_attention, model, "packed")
        for module in model.modules():
            if setup.packing and hasattr(module, "compute_bias"):
                hook = functools.partial(module.register_forward_pre_hook, with_kwargs=True)
                stack.callback(hook(set_mask, prepend=True).remove)  # before batches.py's hook
            if type(module) is T5LayerNorm:
                module.forward = functools.partial(rms_norm, module)
                stack.callback(delattr, module, "forward")
        yield


def rms_norm(module: T5LayerNorm, x: Tensor) -> Tensor:
    weight = module.weight
    return F.rms_norm(x, weight.shape, weight, module.variance_epsilon)


# ---------------- Where the tokens of a packed row go


class Places(NamedTuple):
    """How samples that lie end to end in a row go to padded rows, and back.

    The packed row ends with a dummy token, and each padded row with padding, which is the dummy's
    copy.  Nothing that counts attends to it, so that its gradient is zero in all its places.
    """

    to_padded: Tensor  # (B, n): the place in the row of each token; of padding T - 1
    to_row: Tensor  # (T,): the place in the padded rows, flat, of each token; of dummies n - 1

    def is_token(self) -> Tensor:
        """Return what may be attended to, (B, 1, 1, n)."""
        is_token = self.to_padded < len(self.to_row) - 1
        return is_token[:, None, None]


def compute_places(lengths: Sequence[int], size: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return to_padded and to_row of samples of these lengths; size is T, width n.

    Lengths 2 and 1, T = 4, n = 3: [[0, 1, 3], [2, 3, 3]] and [0, 1, 3, 2].
    """
    counts = np.array(lengths)[:, None]
    columns = np.arange(width)
    is_token = columns < counts
    starts = counts.cumsum()[:, None] - counts
    to_padded = np.where(is_token, starts + columns, size - 1)
    to_row = np.full(size, width - 1)
    to_row[: counts.sum()] = is_token.ravel().nonzero()[0]
    return to_padded, to_row


@functools.lru_cache(maxsize=8)  # once for all layers
def exact_places(lengths: tuple[int, ...], device: torch.device) -> Places:
    """Compute the places for a row without a dummy, which padded_attention appends."""
    size = sum(lengths) + 1
    width = max(lengths) + 1
    to_padded, to_row = map(torch.from_numpy, compute_places(lengths, size, width))
    return Places(to_padded.to(device), to_row.to(device))


def places_of_layer(
    module: nn.Module, lengths: PackedLengths, device: torch.device
) -> tuple[Places, Places]:
    """Return the places of an attention layer's queries and of its keys.

    extras/gpu_step.py hands over Places in the place of the lengths.
    """
    queries, keys = lengths_of_layer(module, lengths)
    if isinstance(queries, Places):
        return queries, keys
    return exact_places(tuple(queries), device), exact_places(tuple(keys), device)


class Gather(torch.autograd.Function):
    """x[there], whose gradient is grad[back]: no sum over all that is there twice (the dummy).

    That sum is of zeros, and would be hundreds of atomic additions to one token.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return grad.index_select(0, back), None, None


# ---------------- Attention


def pad_samples(x: Tensor, places: Places) -> Tensor:
    """(1, heads, T, head_dim) -> (B, heads, n, head_dim)"""
    row = x[0].transpose(0, 1)
    lacking = len(places.to_row) - len(row)
    if lacking:
        row = F.pad(row, (0, 0, 0, 0, 0, lacking))
    padded = Gather.apply(row, places.to_padded.flatten(), places.to_row)
    return padded.unflatten(0, places.to_padded.shape).transpose(1, 2)


def padded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    packed_lengths: PackedLengths,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As batches.packed_attention, in one call on samples padded on the right.

    position_bias: T5's, see set_mask.
    """
    queries, keys = places_of_layer(module, packed_lengths, query.device)
    mask = position_bias
    if mask is None and not module.is_causal:  # causal: padding lies ahead of all that counts
        mask = keys.is_token()
    output, _ = sdpa_attention_forward(
        module,
        pad_samples(query, queries),
        pad_samples(key, keys),
        pad_samples(value, keys),
        mask,
        **options,
    )  # (B, n, heads, head_dim)
    row = Gather.apply(output.flatten(0, 1), queries.to_row, queries.to_padded.flatten())
    return row[None, : query.shape[2]], None


AttentionInterface.register("packed_in_one_call", torch.compiler.disable(padded_attention))


def set_mask(
    module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give T5's first layers position bias and mask in one, (1 or B, heads or 1, n, n).

    A forward pre-hook.  Layers hand it on as their position bias, so that it is made once.
    """
    if options.get("position_bias") is None:
        device = inputs[0].device
        queries, keys = places_of_layer(module, options["packed_lengths"], device)
        widths = [places.to_padded.shape[1] for places in (queries, keys)]
        mask = keys.is_token()
        if module.is_causal:
            mask = torch.ones(widths, dtype=torch.bool, device=device).tril()
        if module.has_relative_attention_bias:
            bias = module.compute_bias(*widths, device=device)
            mask = bias.masked_fill(~mask, -torch.inf)
        options["position_bias"] = mask
    return inputs, options
