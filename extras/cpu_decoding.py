"""Decode faster on a CPU, with the same texts: a paged KV cache, whose rows may enter late.

decode() stands for decoding.decode, with three changes.  The KV cache lies in pages, so that no row
is padded to the longest: 1.4 x as fast.  Waiting rows enter when others have ended: up to 1.15 x.
And weights are prepacked, see extras/cpu_linears.py.  Measurements: LOG.md.

Shapes: B rows that are decoded side by side; P pages of all rows; H heads of keys and values, H' of
queries, a multiple of H; D width of a head; T tokens of the longest row.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import decoding
from decoding import Finished, Rehearsal, Row, Sampling, State
from distributed import print_on_rank0
from extras.cpu_linears import layers_that_run, prepacked_linears
from storage import is_out_of_memory

# ---------------- The loop


def decode(
    model: Model,
    tokenizer: Tokenizer,
    rows: list[Row],
    sampling: Sampling,
    batch_size: int | None,
    rehearsal: Rehearsal,
) -> Iterator[Finished]:
    """Yield each row as it ends; of short prompts up to twice batch_size are decoded at once.

    What gives this model other logits than the plain loop is left out: pages, or prepacking too.
    """
    layers = layers_that_run(model, lambda: decoding.prefill(model, [rows[0].ids[:1]]))
    with prepacked_linears(model, layers):
        with paged_attention(model):
            _, probe = decoding.prefill(model, [rows[0].ids[:1]])
            if supports_paged_cache(model, probe, rehearsal):
                budget = cache_token_budget(model, probe, rows, batch_size)
                cache = PagedCache(probe["past_key_values"], budget)
                max_rows = 2 * (batch_size or decoding.CPU_ROWS)
                yield from decode_paged(model, tokenizer, rows, sampling, max_rows, budget, cache)
                return
        if agrees(rehearsal, lambda: decoding.rehearsed_logits(model, *rehearsal[:2])):
            yield from decoding.decode(model, tokenizer, rows, sampling, batch_size)
            return
    kind = model.config.model_type
    print_on_rank0(
        f"prepacked weights give models of type {kind} other logits, so the plain path decodes"
    )
    yield from decoding.decode(model, tokenizer, rows, sampling, batch_size)


def agrees(rehearsal: Rehearsal, compute_logits: Callable[[], Tensor]) -> bool:
    """Tell whether a path gives the logits of the plain loop."""
    try:
        return rehearsal.agrees_with(compute_logits())
    except decoding.MODEL_ERRORS as e:
        if is_out_of_memory(e):
            raise
        return False


def paged_logits(model: Model, rehearsal: Rehearsal) -> Tensor:
    """Return the logits of the rehearsal's tokens, with a cache in pages."""
    logits, read = decoding.prefill(model, rehearsal.prompts)
    _, probe = decoding.prefill(model, [rehearsal.prompts[0][:1]])
    cache = PagedCache(probe["past_key_values"], planned_tokens=2 * PAGE)
    cache.append_rows(read, list(range(len(logits))))
    steps = [logits]
    for tokens in rehearsal.tokens[:, :-1].t():
        steps.append(decode_step(model, tokens, cache))
    return torch.stack(steps, 1)


def decode_paged(
    model: Model,
    tokenizer: Tokenizer,
    waiting: list[Row],
    sampling: Sampling,
    max_rows: int,
    token_budget: int,
    cache: PagedCache,
) -> Iterator[Finished]:
    """Yield each row as it ends; waiting rows enter where max_rows and token_budget have room."""
    eos = decoding.eos_token_ids(model, tokenizer)
    active: list[Row] = []
    logits = torch.empty(0)
    while active or waiting:
        count = count_entering(active, waiting, max_rows, token_budget)
        for chunk in split_for_prefill(waiting[:count]):
            prompts = {row.index: row.ids for row in chunk}  # read once for all samples of one
            read_logits, read = decoding.prefill(model, list(prompts.values()))
            places = {index: place for place, index in enumerate(prompts)}
            entering = [places[row.index] for row in chunk]
            cache.append_rows(read, entering)
            logits = torch.cat([logits, read_logits[entering]]) if active else read_logits[entering]
            active = active + chunk
        waiting = waiting[count:]
        tokens = decoding.next_tokens(logits, active, sampling)
        ended, going = decoding.append_tokens(tokenizer, eos, active, tokens, sampling.stop)
        yield from ended
        if ended:
            active = [active[place] for place in going]
            tokens = tokens[going]
            cache.retain_rows(going)
        if active:
            logits = decode_step(model, tokens, cache)


def decode_step(model: Model, tokens: Tensor, cache: PagedCache) -> Tensor:
    """Append a token (B,) to each row; return the logits (B, V) of the next one."""
    inputs = {"past_key_values": cache.cache, "use_cache": True}
    if model.config.is_encoder_decoder:
        # what the encoder read is in the cache; of its output the shape is looked at
        shape = len(tokens), 1, model.config.hidden_size
        inputs["encoder_outputs"] = (torch.zeros(1, dtype=model.dtype).expand(shape),)
        inputs["decoder_input_ids"] = tokens[:, None]
    else:
        inputs["input_ids"] = tokens[:, None]
        inputs["position_ids"] = torch.tensor(cache.lengths())[:, None]
    cache.reserve_next_token()
    return model(**inputs).logits[:, -1]


def reserved_tokens(row: Row) -> int:
    """Return the tokens of the cache that are planned for a row."""
    planned = min(decoding.RESERVED_TOKENS, row.max_new_tokens)
    return len(row.ids) + max(len(row.new_ids), planned)


def cache_token_budget(model: Model, probe: State, rows: list[Row], batch_size: int | None) -> int:
    """Return how many tokens the cache is planned for: those of the longest batch_size rows.

    By default of CPU_ROWS rows, but at most what decoding.cpu_cache_bytes allows.
    probe: the state after a prefill of one token.
    """
    planned = sorted(map(reserved_tokens, rows), reverse=True)
    if batch_size:
        return sum(planned[:batch_size])
    fp32 = 4 // model.dtype.itemsize  # pages are in fp32
    token_bytes = fp32 * decoding.cache_bytes_per_token(probe)
    allowed = decoding.cpu_cache_bytes(model) // max(1, token_bytes)
    return max(planned[0], min(sum(planned[: decoding.CPU_ROWS]), allowed))


def count_entering(active: list[Row], waiting: list[Row], max_rows: int, token_budget: int) -> int:
    """Return how many waiting rows fit beside the active ones.

    None while 7/8 of the budget is used: to read few rows at a time is slow.
    """
    room = token_budget - sum(map(reserved_tokens, active))
    if active and room < token_budget // 8:
        return 0
    count = 0
    for row in waiting[: max_rows - len(active)]:
        room -= reserved_tokens(row)
        if room < 0:
            break
        count += 1
    return count


PREFILL_TOKENS = 512  # that are read at once: prompts of like lengths, small buffers


def split_for_prefill(rows: list[Row]) -> list[list[Row]]:
    """Split rows, the longest first, into chunks of at most PREFILL_TOKENS, or of one prompt.

    A prompt counts once, however many samples of it there are.
    """
    chunks: list[list[Row]] = []
    prompts: set[int] = set()
    for row in rows:
        count = len(prompts | {row.index})
        if not chunks or (
            row.index not in prompts and count * len(chunks[-1][0].ids) > PREFILL_TOKENS
        ):
            chunks.append([])
            prompts = set()
        chunks[-1].append(row)
        prompts.add(row.index)
    return chunks


# ---------------- Pages

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
        first = len(self.rows)
        for length in lengths:
            self.rows.append([self.allocate_page() for _ in range(0, length, PAGE)])
        self.lengths = self.lengths + lengths
        self.is_current = False
        return [page for pages in self.rows[first:] for page in pages]

    def allocate_page(self) -> int:
        """Return a page that no row has."""
        if self.free:
            return self.free.pop()
        self.count += 1
        return self.count - 1

    def retain_rows(self, places: list[int]) -> None:
        """Go on with the rows at these places."""
        for place in set(range(len(self.rows))) - set(places):
            self.free += self.rows[place]
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
        counts = [len(pages) for pages in self.rows]
        lengths = torch.tensor(self.lengths)
        # (B, pages of the longest row), filled up with the row's first page
        filled = [pages + pages[:1] * (max(counts) - len(pages)) for pages in self.rows]
        self.table = torch.tensor(filled)
        self.last_page = torch.tensor([pages[-1] for pages in self.rows])  # (B,)
        self.last_column = (lengths - 1) % PAGE  # (B,) of the last token in it
        # (P,) the rows' pages one after another, and (B,) where each row's begin
        self.page_ids = torch.tensor([page for pages in self.rows for page in pages])
        self.row_offsets = torch.tensor([0, *counts[:-1]]).cumsum(0)
        row_of_listed = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        self.page_to_row = torch.empty(self.count, dtype=torch.long)  # (P,)
        self.page_to_row[self.page_ids] = row_of_listed
        first_token = torch.empty_like(self.page_to_row)  # (P,) of a page, counted in its row
        first_token[self.page_ids] = PAGE * (
            torch.arange(self.count) - self.row_offsets[row_of_listed]
        )
        columns = first_token[:, None] + torch.arange(PAGE)  # (P, PAGE)
        length = lengths[self.page_to_row, None]
        self.mask = torch.where(columns < length, 0.0, -torch.inf)[:, None, None]
        if self.grows:  # a bias counts from the last token
            columns = columns + lengths.max() - length
        self.bias_columns = columns.clamp(max=max(self.lengths) - 1)
        self.last_bias: Tensor | None = None
        self.is_current = True

    def mask_and_bias(self, bias: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        """Return what is added to scores of this shape, (P, H, H' / H, PAGE).

        bias: over the tokens of the longest row, (1, H', 1, T); T5's is the same in every layer.
        """
        if bias is None:
            return self.mask
        if self.last_bias is not bias:
            of_pages = bias[0, :, 0][:, self.bias_columns].transpose(0, 1)
            self.last_bias = bias
            self.biased_mask = self.mask + of_pages.reshape(shape)
        return self.biased_mask


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
        missing = count - self.storage.shape[1]
        if missing > 0:
            more = self.storage.new_empty(2, missing + count // 4, *self.storage.shape[2:])
            self.storage = torch.cat([self.storage, more], 1)
        self.storage[:, self.written : count] = 0
        self.written = max(self.written, count)
        self.page_keys = self.storage[0].unflatten(2, (PAGE, self.width))
        self.page_values = self.storage[1].unflatten(2, (self.width, PAGE))

    def append_rows(
        self, read: DynamicLayer, spans: list[tuple[int, int, int]], pages: list[int]
    ) -> None:
        """Write to these pages what a layer has read of rows: (row, first token, end)."""
        self.reserve_pages()
        values = self.page_values.transpose(2, 3)
        for target, source in ((self.page_keys, read.keys), (values, read.values)):
            filled = []
            for row, first, end in spans:
                padding = (0, 0, 0, (first - end) % PAGE)
                tokens = torch.nn.functional.pad(source[row, :, first:end], padding)
                filled.append(tokens.unflatten(1, (-1, PAGE)).transpose(0, 1))
            target[pages] = torch.cat(filled).float()

    def apply_page_moves(self, moves: list[tuple[int, int]]) -> None:
        """Follow PageTable.reserve_next_token."""
        self.reserve_pages()
        if moves:
            sources, targets = torch.tensor(moves).t()
            self.storage[:, targets] = self.storage[:, sources]
        self.make_kv_placeholder(max(self.pages.lengths) - self.pages.grows)

    def make_kv_placeholder(self, tokens: int) -> None:
        """Make what stands for keys and values (B, H, tokens, D)."""
        shape = len(self.pages.rows), self.heads, tokens, self.width
        self.keys = self.values = torch.full((), torch.nan, dtype=self.dtype).expand(shape)
        self.keys.layer = weakref.proxy(self)  # a cycle would be freed late

    def update(
        self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the tokens (B, H, 1, D) there is room for; return the placeholders."""
        page, column = self.pages.last_page, self.pages.last_column
        self.page_keys[page, :, column] = keys[:, :, 0].float()
        self.page_values[page, :, :, column] = values[:, :, 0].float()
        self.make_kv_placeholder(max(self.pages.lengths))
        return self.keys, self.values

    def attend(self, query: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
        """Return attention (B, H', 1, D) of one query a row, (B, H', 1, D).

        bias, (1, H', 1, T), is added to scores.  Each page is multiplied alone; a row's softmax and
        the sum of its values are put together from those of its pages.
        """
        pages = self.pages
        shape = (pages.count, self.heads, query.shape[1] // self.heads, PAGE)
        keys = self.page_keys[: pages.count].flatten(0, 1)
        values = self.page_values[: pages.count].flatten(0, 1)
        query = (query.float() * scaling).flatten(1).index_select(0, pages.page_to_row)
        scores = torch.bmm(query.view(len(keys), -1, self.width), keys.transpose(1, 2)).view(shape)
        scores += pages.mask_and_bias(bias, shape)
        largest = scores.amax(-1).flatten(1)[pages.table].amax(1)  # (B, H')
        largest_of_page = largest.index_select(0, pages.page_to_row).view(*shape[:3], 1)
        weights = scores.sub_(largest_of_page).exp_()
        outputs = torch.bmm(weights.view(len(keys), -1, PAGE), values.transpose(1, 2))
        output = self.sum_of_rows(outputs.view(pages.count, -1)).view(*largest.shape, 1, -1)
        total = self.sum_of_rows(weights.sum(-1).flatten(1))[..., None, None]
        return (output / total).to(self.dtype)

    def sum_of_rows(self, of_pages: Tensor) -> Tensor:
        """Sum (P, n) over the pages of each row: (B, n).  A NaN stays with its row."""
        pages = self.pages
        return torch.nn.functional.embedding_bag(
            pages.page_ids, of_pages, pages.row_offsets, mode="sum"
        )


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
        mask = read["attention_mask"]
        masks = [mask]
        if len(self.groups) == 2:  # of an encoder-decoder: its start token, then the prompt
            masks = [torch.ones_like(mask[:, :1]), mask]
        groups = zip(self.groups, layer_groups(read["past_key_values"]), masks, strict=True)
        for (pages, layers), (_, read_layers), mask in groups:
            firsts = mask.argmax(1).tolist()
            lengths = mask.sum(1).tolist()
            spans = [(i, firsts[i], firsts[i] + lengths[i]) for i in places]
            new_pages = pages.append_rows([lengths[i] for i in places])
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


def layer_groups(cache: Cache) -> list[tuple[bool, list]]:
    """Return (whether tokens are appended, layers): of self-attention, then of cross-attention."""
    if hasattr(cache, "cross_attention_cache"):
        self_attention = cache.self_attention_cache.layers
        return [(True, self_attention), (False, cache.cross_attention_cache.layers)]
    return [(True, cache.layers)]


def supports_paged_cache(model: Model, probe: State, rehearsal: Rehearsal) -> bool:
    """Return whether the cache may be paged and rows may enter late.  probe: after a prefill.

    Not where a layer does not keep the keys and values of all tokens (sliding windows, linear
    attention), or where attention is given something else than what the cache holds; and not where
    an encoder-decoder counts positions from the first column (BART): T5's are relative.
    """
    if model.config.is_encoder_decoder and not hasattr(
        model.config, "relative_attention_num_buckets"
    ):
        return False
    if "past_key_values" not in probe:
        return False
    for _, layers in layer_groups(probe["past_key_values"]):
        for layer in layers:
            if type(layer) is not DynamicLayer or not hasattr(layer.keys, "is_attended"):
                return False
            if layer.keys.shape != layer.values.shape:
                return False
    if agrees(rehearsal, lambda: paged_logits(model, rehearsal)):
        return True
    kind = model.config.model_type
    print_on_rank0(
        f"pages give models of type {kind} other logits, so their cache is Hugging Face's"
    )
    return False


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
            model.set_attn_implementation("paged")
        yield
    finally:
        if is_sdpa:
            model.set_attn_implementation("sdpa")
