"""The vocabulary projection of greedy decoding in bf16, with the same largest logit as in fp32.

Where a CPU multiplies in bf16, that takes half the time and half the packed copy (LOG.md).  How far
its rounding can put a logit off is known, so the few words that could have the largest one are
computed again in fp32.

Shapes: B rows, K width of the hidden state, V words.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel as Model

import decoding
from extras.cpu_linears import linear_prepacked, mmapped_weight_ranges, release_mmapped_pages

BF16_ROUNDING = 2**-8  # the largest relative error of a number in bf16
FP32_ROUNDING = 2**-24
GROUP = 64  # words that are looked at together first; the last is repeated to fill a group
CANDIDATES = 32  # a row, on average: of more words a product in fp32 is faster


def greedy_head(model: Model, layers: list[torch.nn.Module]) -> torch.nn.Linear | None:
    """Return the layer that may be computed in bf16, or None; layers: those that are packable.

    Its output has to be the logits: what is added afterwards could change which is the largest.
    """
    head = model.get_output_embeddings()
    units = torch.cpu.get_capabilities()
    if not (units.get("avx512_bf16") or units.get("amx_bf16")):
        return None
    if type(head) is not torch.nn.Linear or head not in layers:
        return None
    if head.bias is not None or head.weight.dtype != torch.float32:
        return None
    outputs = []

    def keep(layer: torch.nn.Module, inputs: tuple, output: Tensor) -> None:
        outputs.append(output.clone())

    hook = head.register_forward_hook(keep)
    try:
        logits, _ = decoding.prefill(model, [[0]])
    finally:
        hook.remove()
    if len(outputs) != 1:
        return None
    last = outputs[0][:, -1]
    if not torch.equal(last, logits):
        return None
    return head


@contextlib.contextmanager
def head_in_bf16(head: torch.nn.Linear | None) -> Iterator[None]:
    """Within this the layer gives logits of which the largest of each row is exact."""
    if head is None:
        yield
        return
    head.forward = Bf16Head(head.weight.detach())
    try:
        yield
    finally:
        del head.forward


class Bf16Head:
    """Logits by a weight (V, K): in fp32 those that could be the largest, in bf16 the others."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        norms = []
        lost = []  # norms of what rounding took
        for words in weight.split(1024):
            difference = words - words.bfloat16()
            norms.append(words.norm(dim=1).max())
            lost.append(difference.norm(dim=1).max())
        self.norm = torch.stack(norms).max()
        self.lost = torch.stack(lost).max()
        rounded = weight.bfloat16()
        missing = -len(weight) % GROUP
        padding = rounded[-1:].expand(missing, -1)
        padded = torch.cat([rounded, padding])
        self.padded_words = len(padded)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(padded, 64)
        release_mmapped_pages(weight, mmapped_weight_ranges())

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return logits (.., V) of hidden states (.., K)."""
        rows = hidden.flatten(0, -2)
        rounded = rows.bfloat16()
        product = linear_prepacked(self.packed, None, self.padded_words, rounded)
        logits = product.float()
        groups = logits.unflatten(1, (-1, GROUP))
        largest_of_group = groups.amax(2)
        largest = largest_of_group.amax(1)
        least = self.least_candidate(rows, rounded, largest)
        row, word = words_from(groups, largest_of_group, least)
        most_words = CANDIDATES * len(rows)
        if len(word) > most_words or not least.isfinite().all():
            return torch.nn.functional.linear(hidden, self.weight)
        count = len(self.weight)
        weights = self.weight[word.clamp(max=count - 1)]  # the last word's where it is repeated
        exact = rows[row] * weights
        logits[row, word] = exact.sum(1)
        return logits[:, :count].unflatten(0, hidden.shape[:-1])

    def least_candidate(self, rows: Tensor, rounded: Tensor, largest: Tensor) -> Tensor:
        """Return (B,) what a logit in bf16 is at least if it is the largest one in fp32.

        A product of two vectors is off by the norms of what rounding took from them, times those
        of the vectors (Cauchy-Schwarz), and sums by their rounding.  The largest and another may
        both be off, and both are rounded to bf16; 2.1 instead of 2 is for this sum's own rounding.
        """
        size = rows.norm(dim=1)
        difference = rows - rounded
        error = difference.norm(dim=1) * self.norm
        error += size * self.lost
        rounding = 2 * FP32_ROUNDING * rows.shape[1]  # of a sum, relative
        error += rounding * size * self.norm
        error += BF16_ROUNDING * largest.abs()
        return largest - 2.1 * error


def words_from(groups: Tensor, largest: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Return (row, word) of each logit that is at least the least (B,) of its row.

    groups: logits (B, V / GROUP, GROUP), which are looked at where the largest of a group is.
    """
    is_near = largest >= least[:, None]
    row, group = is_near.nonzero(as_tuple=True)
    near = groups[row, group]
    is_candidate = near >= least[row, None]
    place, column = is_candidate.nonzero(as_tuple=True)
    return row[place], GROUP * group[place] + column
