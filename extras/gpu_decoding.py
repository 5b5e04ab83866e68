"""Decode on a GPU, with the same texts: a KV cache that stays in its place, tokens by CUDA graphs.

decode() stands for decoding.decode.  Prompts are read by the plain loop's prefill.  Then the GPU
reads its own tokens; the host looks at BLOCK of them at a time.  Rows that ended leave when few are
left.  On a CPU, where the tests run it, there are no graphs.

Shapes: B rows that are decoded side by side, T columns of the cache, V tokens in the vocabulary.
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

import decoding
from decoding import REHEARSED_TOKENS, Rehearsal, State, cache_of, prefill
from distributed import print_on_rank0
from extras.cpu_decoding import agrees
from extras.gpu_graphs import Graphs
from extras.gpu_step import round_up
from sampling import Finished, Row, Sampling, append_tokens, tokens_at

BLOCK = 16  # tokens of a row that the host looks at together
COLUMNS = 128  # attention reads a multiple of these
FEW = 0.6  # of the rows: when no more are left, the others leave the batch

# ---------------- The loop


def decode(
    model: Model,
    tokenizer: Tokenizer,
    rows: list[Row],
    sampling: Sampling,
    batch_size: int | None,
    rehearsal: Rehearsal,
) -> Iterator[Finished]:
    """Yield each row as it ends, by the plain loop where the static cache gives other logits."""
    if not agrees(rehearsal, functools.partial(static_logits, model, rehearsal)):
        kind = model.config.model_type
        print_on_rank0(f"a static cache gives models of type {kind} other logits: it is left out")
        yield from decoding.decode(model, tokenizer, rows, sampling, batch_size)
        return
    eos = decoding.eos_token_ids(model, tokenizer)
    while rows:
        size = batch_size
        if not size:  # the prefill's cache lies beside this one, which is rounded up
            size = max(1, decoding.default_batch_size(model, rows[0]) * 2 // 3)
        batch, rows = rows[:size], rows[size:]
        yield from decode_batch(model, tokenizer, eos, batch, sampling)


def decode_batch(
    model: Model, tokenizer: Tokenizer, eos: set[int], rows: list[Row], sampling: Sampling
) -> Iterator[Finished]:
    """Yield each row of a batch as it ends."""
    prompts = {row.index: row.ids for row in rows}  # read once for all samples of a prompt
    logits, state = prefill(model, list(prompts.values()))
    most_new = 0
    window = 0
    for row in rows:
        most_new = max(most_new, row.max_new_tokens)
        window = max(window, len(row.ids) + row.max_new_tokens)
    shape = shape_needed(state, len(rows), most_new)
    cache = open_cache(model, shape, state)
    order = list(prompts)
    places = [order.index(row.index) for row in rows]
    cache.load(state, logits, places, window)
    del logits, state
    places = list(range(len(rows)))
    while rows:
        lacking = max(row.max_new_tokens - len(row.new_ids) for row in rows)
        if sampling.temperature:
            cache.draw(rows, places)
        block = cache.next_block(model, min(BLOCK, lacking), sampling)
        for column in block.t():
            tokens = column[places]
            check_is_finite(rows, tokens)
            ended, going = append_tokens(tokenizer, eos, rows, tokens, sampling.stop)
            yield from ended
            rows = [rows[place] for place in going]
            places = [places[place] for place in going]
            if not rows:
                break
        if rows and len(rows) <= FEW * cache.n_rows:
            cache.select_rows(places)
            places = list(range(len(rows)))
    keep_cache(model, cache)


NOT_FINITE = -1  # the token of logits that are NaN or infinite


def check_is_finite(rows: list[Row], tokens: Tensor) -> None:
    """Raise UserError at such a token, as the plain loop does at such logits."""
    is_damaged = tokens == NOT_FINITE
    if is_damaged.any():
        logits = torch.zeros(len(rows), 1)
        logits[is_damaged] = torch.nan
        decoding.next_tokens(logits, rows, Sampling(0, 1, None))


def static_logits(model: Model, rehearsal: Rehearsal) -> Tensor:
    """Return the logits of the rehearsal's tokens; rows change places after each step."""
    logits, state = prefill(model, rehearsal.prompts)
    reverse = list(reversed(range(len(logits))))
    order = reverse
    shape = shape_needed(state, len(logits), REHEARSED_TOKENS)
    cache = StaticCache(model, shape, state)
    window = REHEARSED_TOKENS + max(map(len, rehearsal.prompts))
    cache.load(state, logits, order, window)
    steps = [logits]
    for tokens in rehearsal.tokens.t()[:-1]:
        cache.rows.last[:, 0] = tokens[order]
        logits = cache.forward(model)
        steps.append(logits[order])  # either order undoes itself
        cache.select_rows(reverse)
        order = [order[place] for place in reverse]
    return torch.stack(steps, 1)


# ---------------- Caches that stay, with their graphs, from one evaluation to the next

KEPT: weakref.WeakKeyDictionary[Model, StaticCache] = weakref.WeakKeyDictionary()
Shape = tuple[int, int, int]  # rows, columns, columns of cross-attention


def open_cache(model: Model, shape: Shape, state: State) -> StaticCache:
    """Return a cache with room for a prefill's state: the one that was kept, or another."""
    cache = KEPT.pop(model, None)
    if cache and cache.weights == addresses_of_weights(model):
        if all(map(operator.le, shape, cache.shape)):
            return cache
    cache = None  # its memory first
    return StaticCache(model, shape, state)


def keep_cache(model: Model, cache: StaticCache) -> None:
    """Keep a cache that leaves room for training: an eighth of the GPU at most."""
    if cache.graphs.is_used:
        n_bytes = 0
        for layer in cache.layers + cache.across:
            n_bytes += layer.all_keys.nbytes + layer.all_values.nbytes
        _, total = torch.cuda.mem_get_info(model.device)
        if n_bytes > total // 8:
            return
    KEPT[model] = cache


def addresses_of_weights(model: Model) -> list[int]:
    """Return what graphs read the weights from."""
    return [weight.data_ptr() for weight in model.parameters()]


def shape_needed(state: State, n_rows: int, n_new: int) -> Shape:
    """Return the shape of a cache for a prefill's rows, rounded up so that few come up.

    Rows to a multiple of a quarter to an eighth of them: 107 -> 112, 6 -> 6.
    """
    read, read_across = layers_of(state)
    n_columns = round_up(read[0].get_seq_length() + n_new, COLUMNS)
    n_across = 0
    if read_across:
        n_across = round_up(read_across[0].get_seq_length(), COLUMNS)
    return round_rows(n_rows), n_columns, n_across


def round_rows(count: int) -> int:
    eighth = 2 ** (count.bit_length() - 3)
    return round_up(count, max(1, int(eighth)))


def layers_of(state: State) -> tuple[list[DynamicLayer], list[DynamicLayer]]:
    """Return the layers of self-attention, and those of cross-attention or none."""
    cache = cache_of(state)
    if isinstance(cache, EncoderDecoderCache):
        return cache.self_attention_cache.layers, cache.cross_attention_cache.layers
    return cache.layers, []


# ---------------- The cache


class StaticLayer(DynamicLayer):
    """Keys and values (B, heads, T, head_dim), written at the column that all rows share."""

    def __init__(
        self, like: DynamicLayer, n_rows: int, n_columns: int, column: Tensor | int
    ) -> None:
        super().__init__()
        if type(like) is not DynamicLayer:
            raise TypeError(f"{type(like).__name__} has another order of columns")
        self.lazy_initialization(like.keys, like.values)
        self.all_keys = self.make_room(like.keys, n_rows, n_columns)
        self.all_values = self.make_room(like.values, n_rows, n_columns)
        self.column = column

    def make_room(self, like: Tensor, n_rows: int, n_columns: int) -> Tensor:
        _, heads, _, width = like.shape
        return like.new_zeros(n_rows, heads, n_columns, width)

    def show(self, n_rows: int, n_columns: int) -> None:
        """Let the model see these rows and columns alone."""
        self.keys = self.all_keys[:n_rows, :, :n_columns]
        self.values = self.all_values[:n_rows, :, :n_columns]

    def load(self, read: DynamicLayer, index: Tensor) -> None:
        """Take over rows that a prefill has read."""
        self.show(len(index), read.get_seq_length())
        self.keys.copy_(read.keys[index])
        self.values.copy_(read.values[index])

    def select_rows(self, index: Tensor) -> None:
        n_rows = len(index)
        self.keys[:n_rows] = self.keys[index]
        self.values[:n_rows] = self.values[index]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **options: object
    ) -> tuple[Tensor, Tensor]:
        """Write a token; return all that is shown."""
        self.keys.index_copy_(2, self.column, key_states)
        self.values.index_copy_(2, self.column, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> Tensor | int:
        return self.column


class RowTensors(NamedTuple):
    """What a row has beside its keys and values; each a line of these."""

    tokens: Tensor  # (B, BLOCK) chosen since the host looked
    draws: Tensor  # (B, BLOCK) from 0 to 1, to sample them by
    last: Tensor  # (B, 1) the token that is read next
    position: Tensor  # (B, 1) of it
    mask: Tensor  # (B, 1, 1, T) columns that are its own
    across: Tensor  # (B, 1, 1, columns of cross-attention)

    def first(self, count: int) -> RowTensors:
        """Return views of the first rows."""
        return RowTensors(*[tensor[:count] for tensor in self])


class StaticCache:
    """What the decoding of a batch reads and writes, always at the same addresses.

    The rows beyond a batch are decoded too, and nobody looks at them.
    """

    def __init__(self, model: Model, shape: Shape, state: State) -> None:
        self.shape = shape
        self.weights = addresses_of_weights(model)
        kind = model.config.model_type
        self.graphs = Graphs(model.device, f"decoding of models of type {kind}")
        n_rows, n_columns, n_across = shape
        integers = functools.partial(torch.zeros, dtype=torch.long, device=model.device)
        self.column = integers(1)  # that is written next
        self.slot = integers(1)  # in the block, of the next token
        self.last_position = integers(1)  # rows that ended go no further
        tokens = integers(n_rows, BLOCK)
        last = integers(n_rows, 1)
        mask = integers(n_rows, 1, 1, n_columns)
        across = integers(n_rows, 1, 1, n_across)
        draws = tokens.double()
        position = last.clone()
        self.room = RowTensors(tokens, draws, last, position, mask.bool(), across.bool())
        read, read_across = layers_of(state)
        self.layers = []
        self.across = []
        for like in read:
            layer = StaticLayer(like, n_rows, n_columns, self.column)
            self.layers.append(layer)
        for like in read_across:
            layer = StaticLayer(like, n_rows, n_across, n_across)
            self.across.append(layer)
        self.cache = Cache(layers=self.layers)
        if self.across:
            self.cache = EncoderDecoderCache(self.cache, Cache(layers=self.across))

    def enter(self, places: list[int]) -> Tensor:
        """Set how many rows there are, rounded up; return the places, filled up with the first."""
        self.n_rows = round_rows(len(places))
        self.rows = self.room.first(self.n_rows)
        index = torch.full((self.n_rows,), places[0])
        index[: len(places)] = torch.tensor(places)
        return index.to(self.column.device)

    def load(self, state: State, logits: Tensor, places: list[int], window: int) -> None:
        """Take over the rows at these places of a prefill; none gets beyond window tokens."""
        with self.graphs.on_stream():
            index = self.enter(places)
            read, read_across = layers_of(state)
            layers = self.layers + self.across
            for layer, one in zip(layers, read + read_across, strict=True):
                layer.load(one, index)
            self.n_written = read[0].get_seq_length()  # columns
            self.column.fill_(self.n_written)
            self.last_position.fill_(window - 1)
            mask = state["attention_mask"][index]
            self.rows.position.copy_(mask.sum(1, keepdim=True))
            mask = mask[:, None, None].bool()
            width = mask.shape[3]
            self.rows.mask.zero_()
            self.rows.across.zero_()
            if self.across:
                self.rows.mask[..., : self.n_written] = True
                self.rows.across[..., :width] = mask
            else:
                self.rows.mask[..., :width] = mask
            self.logits = logits[index]
            self.show(self.n_written)

    def show(self, n_columns: int) -> None:
        """Let the model see this many columns, rounded up."""
        self.n_shown = round_up(n_columns, COLUMNS)
        for layer in self.layers:
            layer.show(self.n_rows, self.n_shown)
        for layer in self.across:
            layer.show(self.n_rows, self.shape[2])

    def select_rows(self, places: list[int]) -> None:
        """Go on with the rows at these places."""
        with self.graphs.on_stream():
            index = self.enter(places)
            for layer in self.layers + self.across:
                layer.select_rows(index)
            for tensor in self.room:
                tensor[: self.n_rows] = tensor[index]
            self.show(self.n_shown)

    def draw(self, rows: list[Row], places: list[int]) -> None:
        """Draw the numbers to sample a block by, each row's from its own stream."""
        draws = torch.zeros(self.room.draws.shape, dtype=torch.float64)
        for row, place in zip(rows, places, strict=True):
            torch.rand(BLOCK, out=draws[place], generator=row.generator)
        with self.graphs.on_stream():
            self.graphs.copy_in(self.room.draws, draws)

    def next_block(self, model: Model, count: int, sampling: Sampling) -> Tensor:
        """Return the next tokens (B, count)."""
        with self.graphs.on_stream():
            self.slot.zero_()
            self.show(self.n_written + count)
            n_steps = count
            if self.logits is not None:  # of the prefill
                self.choose(self.logits, sampling)
                self.logits = None
                n_steps -= 1
            key = self.n_rows, self.n_shown, sampling.temperature, sampling.top_p
            work = functools.partial(self.step, model, sampling)
            for _ in range(n_steps):
                self.graphs.run(key, work)
            self.n_written += n_steps
            chosen = self.rows.tokens[:, :count]
            return chosen.cpu()  # here alone the host waits

    def step(self, model: Model, sampling: Sampling) -> None:
        """Read each row's last token, choose the next: what a graph repeats."""
        logits = self.forward(model)
        self.choose(logits, sampling)

    def forward(self, model: Model) -> Tensor:
        """Read each row's last token; return the logits (B, V) of the next."""
        rows = self.rows
        rows.mask.index_fill_(3, self.column, True)
        mask = rows.mask[..., : self.n_shown]
        inputs: State = {"past_key_values": self.cache, "use_cache": True}
        if self.across:
            encoded = torch.zeros(1, dtype=model.dtype, device=mask.device)
            encoded = encoded.expand(self.n_rows, 1, model.config.hidden_size)
            inputs["encoder_outputs"] = (encoded,)  # whose shape alone is looked at
            inputs["attention_mask"] = rows.across
            inputs["decoder_input_ids"] = rows.last
            inputs["decoder_attention_mask"] = mask
        else:
            inputs["input_ids"] = rows.last
            inputs["attention_mask"] = mask
            inputs["position_ids"] = rows.position
        logits = model(**inputs).logits
        self.column.add_(1)
        next_position = torch.minimum(rows.position + 1, self.last_position)
        rows.position.copy_(next_position)
        return logits[:, -1]

    def choose(self, logits: Tensor, sampling: Sampling) -> None:
        """Choose each row's next token, and write it down."""
        rows = self.rows
        tokens = logits.argmax(-1, keepdim=True)  # a NaN is the largest
        largest = logits.gather(1, tokens)
        is_damaged = ~largest.isfinite()
        if sampling.temperature:
            draws = rows.draws.index_select(1, self.slot)
            logits = logits.float()
            drawn = tokens_at(draws, logits, sampling.temperature, sampling.top_p)
            tokens = drawn[:, None]
        rows.last.copy_(tokens)
        written = tokens.masked_fill(is_damaged, NOT_FINITE)
        rows.tokens.index_copy_(1, self.slot, written)
        self.slot.add_(1)
