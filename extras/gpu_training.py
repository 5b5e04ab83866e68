"""Packed attention in one call; on GPUs many small calls cost more than padding (LOG.md).

train_loop.py opens `gpu_training_patches` around an epoch.

Shapes: T tokens of the packed row, B samples in it, n tokens of the longest.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from batches import PackedLengths, lengths_of_layer
from train_loop import TrainSetup


@contextlib.contextmanager
def gpu_training_patches(setup: TrainSetup) -> Iterator[None]:
    """Let a packed student attend on padded samples inside the block."""
    model = setup.state.model
    with contextlib.ExitStack() as stack:
        if setup.packing:
            model.set_attn_implementation("packed_in_one_call")
            stack.callback(model.set_attn_implementation, "packed")
        yield


class PaddedPlaces(NamedTuple):
    """How samples that lie end to end in a row go to padded rows, and back."""

    to_padded: Tensor  # (B, n): the place in the row of each token; of padding any
    to_row: Tensor  # (T,): the place in the padded rows, flat, of each token
    is_real: Tensor  # (B, n): whether it is no padding


@functools.lru_cache(maxsize=8)  # once for all layers
def padded_places(lengths: tuple[int, ...], device: torch.device) -> PaddedPlaces:
    """Compute the places for samples of these lengths.

    Lengths 2 and 3: to_padded is [[0, 1, 0], [2, 3, 4]], to_row [0, 1, 3, 4, 5].
    """
    counts = torch.tensor(lengths)[:, None]
    columns = torch.arange(max(lengths))
    is_real = columns < counts
    to_padded = (counts.cumsum(0) - counts + columns) * is_real
    to_row = is_real.flatten().nonzero()[:, 0]
    return PaddedPlaces(to_padded.to(device), to_row.to(device), is_real.to(device))


def pad_samples(x: Tensor, to_padded: Tensor) -> Tensor:
    """(1, heads, T, head_dim) -> (B, heads, n, head_dim)"""
    padded = x[0].index_select(1, to_padded.flatten())
    return padded.unflatten(1, to_padded.shape).transpose(0, 1)


def padded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    packed_lengths: PackedLengths,
    **options: Any,
) -> tuple[Tensor, None]:
    """As batches.packed_attention, in one call on samples padded on the right."""
    query_lengths, key_lengths = lengths_of_layer(module, packed_lengths)
    queries = padded_places(tuple(query_lengths), query.device)
    keys = padded_places(tuple(key_lengths), query.device)
    mask = None
    if not module.is_causal:  # causal: padding lies ahead of all that counts
        mask = keys.is_real[:, None, None]
    output, _ = sdpa_attention_forward(
        module,
        pad_samples(query, queries.to_padded),
        pad_samples(key, keys.to_padded),
        pad_samples(value, keys.to_padded),
        mask,
        **options,
    )  # (B, n, heads, head_dim)
    return output.flatten(0, 1).index_select(0, queries.to_row)[None], None


AttentionInterface.register("packed_in_one_call", torch.compiler.disable(padded_attention))
