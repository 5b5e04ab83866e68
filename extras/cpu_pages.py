"""A paged key-value cache on a CPU, and attention to it: no row is padded to the longest.

1.4 x as fast as a cache with padding (LOG.md).  extras/cpu_decoding.py decodes with it.

Shapes: B rows that are decoded side by side; P pages of all rows; H heads of keys and values, H' of
queries, a multiple of H; D width of a head; T tokens of the longest row.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers import PreTrainedModel as Model
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import models
from decoding import State

PAGE = 16  # tokens: of smaller pages there are more to sum up, of larger ones the last is emptier


class PageTable:
    """Which pages hold the tokens of which row; the same in every layer (Kwon et al. 2023).

    No row is padded and none moves as it grows.  The pages of rows that ended are taken by rows
    that grow, and then by the last pages: attention multiplies all pages, so all are some row's.
    """

    def __init__(self, grows: bool) -> None:
        self.grows = grows  # self-attention; cross-attention's tokens stay those of the prompt
        self.rows: list[list[int]] = []  # pages of each row
        self.lengths: list[int] = []  # tokens of each row
        self.count = 0
        self.free: list[int] = []

    def append_rows(self, lengths: list[int]) -> list[int]:
        """Add rows of these lengths; return their pages, end to end."""
        added = []
        for length in lengths:
            pages = [self.allocate_page() for _ in range(0, length, PAGE)]
            self.rows.append(pages)
            added += pages
        self.lengths += lengths
        self.is_current = False
        return added

    def allocate_page(self) -> int:
        """Return a page that no row has."""
        if self.free:
            return self.free.pop()
        self.count += 1
        return self.count - 1

    def retain_rows(self, places: list[int]) -> None:
        """Go on with the rows at these places."""
        for place, pages in enumerate(self.rows):
            if place not in places:
                self.free += pages
        self.rows = [self.rows[place] for place in places]
        self.lengths = [self.lengths[place] for place in places]
        self.is_current = False

    def reserve_next_token(self) -> list[tuple[int, int]]:
        """Make room for a token in each row that grows; return the moves (from, to) of pages."""
        if self.grows:
            for pages, length in zip(self.rows, self.lengths, strict=True):
                if length % PAGE == 0:
                    pages.append(self.allocate_page())
            self.lengths = [length + 1 for length in self.lengths]
        moves = self.close_gaps()
        if self.grows or not self.is_current:
            self.rebuild()
        return moves

    def close_gaps(self) -> list[tuple[int, int]]:
        """Let the last pages take the places of free ones; return the moves (from, to)."""
        self.count -= len(self.free)
        gaps = [page for page in self.free if page < self.count]
        self.free = []
        moves = []
        for pages in self.rows:
            for i, page in enumerate(pages):
                if page >= self.count:
                    pages[i] = gaps.pop()
                    moves.append((page, pages[i]))
        return moves

    def rebuild(self) -> None:
        """Make the tensors that attention looks rows and pages up in."""
        page_ids = []  # the rows' pages one after another
        row_offsets = []  # where each row's begin
        page_to_row = [0] * self.count
        first_tokens = [0] * self.count  # of each page, counted in its row
        for row, pages in enumerate(self.rows):
            row_offsets.append(len(page_ids))
            page_ids += pages
            for number, page in enumerate(pages):
                page_to_row[page] = row
                first_tokens[page] = PAGE * number
        self.page_ids = torch.tensor(page_ids)
        self.row_offsets = torch.tensor(row_offsets)
        self.page_to_row = torch.tensor(page_to_row)
        lengths = torch.tensor(self.lengths)
        self.last_page = torch.tensor([pages[-1] for pages in self.rows])  # (B,)
        self.last_column = (lengths - 1) % PAGE  # (B,) of the last token in it
        first_column = torch.tensor(first_tokens)[:, None]
        columns = first_column + torch.arange(PAGE)  # (P, PAGE)
        length = lengths[self.page_to_row, None]
        mask = torch.where(columns < length, 0.0, -torch.inf)
        self.mask = mask[:, None, None]
        longest = max(self.lengths)
        if self.grows:  # a bias counts from the last token
            columns += longest - length
        self.bias_columns = columns.clamp(max=longest - 1)
        self.last_bias: Tensor | None = None
        self.is_current = True

    def mask_and_bias(self, bias: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        """Return what is added to scores of this shape, (P, H, H' / H, PAGE).

        bias: over the tokens of the longest row, (1, H', 1, T); T5's is the same in every layer.
        """
        if bias is None:
            return self.mask
        if self.last_bias is not bias:
            of_heads = bias[0, :, 0]
            of_pages = of_heads[:, self.bias_columns].transpose(0, 1)
            self.biased_mask = self.mask + of_pages.reshape(shape)
            self.last_bias = bias
        return self.biased_mask

    def reduce_by_row(self, of_pages: Tensor, mode: str) -> Tensor:
        """Reduce (P, n) to (B, n), the "sum" or "max" of each row's pages.

        A NaN stays with its row.
        """
        return torch.nn.functional.embedding_bag(
            self.page_ids, of_pages, self.row_offsets, mode=mode
        )


class PagedLayer(DynamicLayer):
    """Keys (P, H, PAGE, D) and values (P, H, D, PAGE) of a layer: both matmuls sum along a line.

    In fp32, which on a CPU is as fast as bf16.  What a model gets as its keys and values is a
    placeholder without numbers, but of the right shape, that leads paged_attend here.
    """

    def __init__(self, pages: PageTable, like: Tensor, planned_pages: int) -> None:
        """like: keys (b, H, T, D) as rows will bring; what is never written takes no memory."""
        super().__init__()
        self.lazy_initialization(like, like)
        self.pages = pages
        self.heads = like.shape[1]
        self.width = like.shape[3]
        self.storage = torch.empty(2, planned_pages, self.heads, PAGE * self.width)
        self.written = 0

    def reserve_pages(self) -> None:
        """Have room for all pages, filled with zeros: what is masked is multiplied too."""
        count = self.pages.count
        _, room, *shape = self.storage.shape
        if count > room:
            spare = count // 4
            more = self.storage.new_empty(2, count - room + spare, *shape)
            self.storage = torch.cat([self.storage, more], 1)
        self.storage[:, self.written : count] = 0
        self.written = max(self.written, count)
        keys, values = self.storage
        self.page_keys = keys.unflatten(2, (PAGE, self.width))
        self.page_values = values.unflatten(2, (self.width, PAGE))

    def append_rows(self, read: DynamicLayer, spans: list[list[int]], pages: list[int]) -> None:
        """Write to these pages what a layer has read of rows: [row, first token, end]."""
        self.reserve_pages()
        values = self.page_values.transpose(2, 3)
        self.page_keys[pages] = split_into_pages(read.keys, spans)
        values[pages] = split_into_pages(read.values, spans)

    def apply_page_moves(self, moves: list[tuple[int, int]]) -> None:
        """Follow PageTable.reserve_next_token."""
        self.reserve_pages()
        if moves:
            sources, targets = torch.tensor(moves).t()
            self.storage[:, targets] = self.storage[:, sources]
        tokens = max(self.pages.lengths)
        if self.pages.grows:
            tokens -= 1
        self.make_kv_placeholder(tokens)

    def make_kv_placeholder(self, tokens: int) -> None:
        """Make what stands for keys and values (B, H, tokens, D)."""
        shape = len(self.pages.rows), self.heads, tokens, self.width
        nan = torch.full((), torch.nan, dtype=self.dtype)
        self.keys = nan.expand(shape)
        self.keys.layer = weakref.proxy(self)  # a cycle would be freed late
        self.values = self.keys

    def update(
        self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the tokens (B, H, 1, D) there is room for; return the placeholders."""
        pages = self.pages
        page = pages.last_page
        column = pages.last_column
        self.page_keys[page, :, column] = keys[:, :, 0].float()
        self.page_values[page, :, :, column] = values[:, :, 0].float()
        self.make_kv_placeholder(max(pages.lengths))
        return self.keys, self.values

    def attend(self, query: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
        """Return attention (B, H', 1, D) of one query a row, (B, H', 1, D).

        bias, (1, H', 1, T), is added to scores.  Each page is multiplied alone; a row's softmax and
        the sum of its values are put together from those of its pages.
        """
        pages = self.pages
        count = pages.count
        keys = self.page_keys[:count]
        values = self.page_values[:count]
        query_of_row = (query.float() * scaling).flatten(1)
        query_of_page = query_of_row.index_select(0, pages.page_to_row)
        queries = query_of_page.view(count, self.heads, -1, self.width)
        scores = queries @ keys.transpose(2, 3)  # (P, H, H' / H, PAGE)
        scores += pages.mask_and_bias(bias, scores.shape)
        largest_of_page = scores.amax(3).flatten(1)
        largest = pages.reduce_by_row(largest_of_page, "max")  # (B, H')
        subtracted = largest.index_select(0, pages.page_to_row)
        scores -= subtracted.view(count, self.heads, -1, 1)
        weights = scores.exp_()
        outputs = weights @ values.transpose(2, 3)  # (P, H, H' / H, D)
        output = pages.reduce_by_row(outputs.flatten(1), "sum")
        totals = weights.sum(3).flatten(1)
        total = pages.reduce_by_row(totals, "sum")
        output = output.view(query.shape) / total[:, :, None, None]
        return output.to(self.dtype)


def split_into_pages(states: Tensor, spans: list[list[int]]) -> Tensor:
    """Return what spans, [row, first token, end], hold of keys or values (b, H, T, D), in pages.

    Those are (P, H, PAGE, D), end to end, the last of a span filled up with zeros.
    """
    pages = []
    for row, first, end in spans:
        tokens = states[row, :, first:end]
        missing = (first - end) % PAGE
        filled = torch.nn.functional.pad(tokens, (0, 0, 0, missing))
        pages += filled.split(PAGE, 1)
    return torch.stack(pages).float()


class PagedCache:
    """A Hugging Face cache whose layers are paged, for the rows that are decoded side by side."""

    def __init__(self, cache: Cache, planned_tokens: int) -> None:
        """Replace the layers of a cache by paged ones without rows."""
        planned_pages = 5 * planned_tokens // (4 * PAGE)
        self.cache = cache
        self.groups: list[tuple[PageTable, list[PagedLayer]]] = []
        for grows, layers in layer_groups(cache):
            pages = PageTable(grows)
            layers[:] = [PagedLayer(pages, layer.keys, planned_pages) for layer in layers]
            self.groups.append((pages, layers))

    def lengths(self) -> list[int]:
        """Return how many tokens each row has."""
        return self.groups[0][0].lengths

    def append_rows(self, read: State, places: list[int]) -> None:
        """Add rows from the state after a prefill: those at these places, as often as named."""
        masks = [read["attention_mask"]]
        if len(self.groups) == 2:  # of an encoder-decoder: its start token, then the prompt
            start = torch.ones_like(masks[0][:, :1])
            masks = [start, *masks]
        read_groups = layer_groups(read["past_key_values"])
        for group, read_group, mask in zip(self.groups, read_groups, masks, strict=True):
            pages, layers = group
            _, read_layers = read_group
            spans = token_spans(mask, places)
            new_pages = pages.append_rows([end - first for _, first, end in spans])
            for layer, read_layer in zip(layers, read_layers, strict=True):
                layer.append_rows(read_layer, spans, new_pages)

    def retain_rows(self, places: list[int]) -> None:
        """Go on with the rows at these places."""
        for pages, _ in self.groups:
            pages.retain_rows(places)

    def reserve_next_token(self) -> None:
        """Make room for a token in each row."""
        for pages, layers in self.groups:
            moves = pages.reserve_next_token()
            for layer in layers:
                layer.apply_page_moves(moves)


def token_spans(mask: Tensor, places: list[int]) -> list[list[int]]:
    """Return [row, first token, end] of the rows of a mask (b, T) at these places."""
    rows = torch.tensor(places)
    first = mask.argmax(1)
    end = first + mask.sum(1)
    spans = torch.stack([rows, first[rows], end[rows]], 1)
    return spans.tolist()


def layer_groups(cache: Cache) -> list[tuple[bool, list]]:
    """Return (whether tokens are appended, layers): of self-attention, then of cross-attention."""
    if hasattr(cache, "cross_attention_cache"):
        self_attention = cache.self_attention_cache.layers
        return [(True, self_attention), (False, cache.cross_attention_cache.layers)]
    return [(True, cache.layers)]


def paged_attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend, (B, H', T, D) -> (B, T, H', D): registered as the attention implementation "paged".

    With a placeholder for keys, in the pages of its layer; else as Hugging Face does, which marks
    the keys: where those in the cache have the mark, attention gets them as they are.
    """
    if hasattr(key, "layer"):
        if scaling is None:
            scaling = query.shape[-1] ** -0.5
        return key.layer.attend(query, position_bias, scaling).transpose(1, 2), None
    key.is_attended = True
    biases = {"scaling": scaling, "position_bias": position_bias}
    return sdpa_attention_forward(module, query, key, value, attention_mask, **biases, **kwargs)


AttentionInterface.register("paged", paged_attend)
AttentionMaskInterface.register("paged", sdpa_mask)


@contextlib.contextmanager
def paged_attention(model: Model) -> Iterator[None]:
    """Within this the model attends by paged_attend, if it does by torch's sdpa otherwise."""
    is_sdpa = model.config._attn_implementation == "sdpa" and not model._compiled_call_impl
    try:
        if is_sdpa:
            models.set_attention(model, "paged")
        yield
    finally:
        if is_sdpa:
            models.set_attention(model, "sdpa")
