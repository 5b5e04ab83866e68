"""Decode faster on a CPU, with the same texts: a paged KV cache, whose rows may enter late.

decode() stands for decoding.decode, with three changes.  The KV cache lies in pages, see
extras/cpu_pages.py.  Waiting rows enter when others have ended: up to 1.15 x as fast.  And weights
are prepacked, see extras/cpu_linears.py.  Measurements: LOG.md.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.cache_utils import DynamicLayer

import decoding
from decoding import Finished, Rehearsal, Row, Sampling, State
from distributed import print_on_rank0
from extras.cpu_head import greedy_head, head_in_bf16
from extras.cpu_linears import layers_that_run, prepacked_linears
from extras.cpu_pages import PAGE, PagedCache, layer_groups, paged_attention
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
    head = None
    if sampling.temperature == 0:
        head = greedy_head(model, layers)
        layers = [layer for layer in layers if layer is not head]
    with prepacked_linears(model, layers):
        with paged_attention(model):
            _, probe = decoding.prefill(model, [rows[0].ids[:1]])
            if supports_paged_cache(model, probe, rehearsal):
                budget = cache_token_budget(model, probe, rows, batch_size)
                cache = PagedCache(probe["past_key_values"], budget)
                max_rows = 2 * (batch_size or decoding.CPU_ROWS)
                with head_in_bf16(head):
                    yield from decode_paged(
                        model, tokenizer, rows, sampling, max_rows, budget, cache
                    )
                return
        if agrees(rehearsal, lambda: decoding.rehearsed_logits(model, *rehearsal[:2])):
            with head_in_bf16(head):
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
    first_prompt = rehearsal.prompts[0]
    _, probe = decoding.prefill(model, [first_prompt[:1]])
    cache = PagedCache(probe["past_key_values"], planned_tokens=2 * PAGE)
    places = list(range(len(logits)))
    cache.append_rows(read, places)
    steps = [logits]
    appended = rehearsal.tokens[:, :-1]
    for tokens in appended.t():
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
    tokens = torch.empty(0, dtype=torch.long)  # the next one of each active row
    while active or waiting:
        count = count_entering(active, waiting, max_rows, token_budget)
        for chunk in split_for_prefill(waiting[:count]):
            logits = read_rows(model, chunk, cache)
            tokens = torch.cat([tokens, decoding.next_tokens(logits, chunk, sampling)])
            active = active + chunk
            release_freed_memory()
        waiting = waiting[count:]
        ended, going = decoding.append_tokens(tokenizer, eos, active, tokens, sampling.stop)
        yield from ended
        if ended:
            active = [active[place] for place in going]
            tokens = tokens[going]
            cache.retain_rows(going)
        if active:
            logits = decode_step(model, tokens, cache)
            tokens = decoding.next_tokens(logits, active, sampling)


def release_freed_memory() -> None:
    """Give memory that was freed back: to read prompts takes far more than a step (LOG.md)."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(0)


def read_rows(model: Model, rows: list[Row], cache: PagedCache) -> Tensor:
    """Add rows to the cache; return the logits (B, V) of their first new tokens.

    A prompt is read once, however many of its samples there are.
    """
    prompts, places = decoding.distinct_prompts(rows)
    logits, read = decoding.prefill(model, prompts)
    cache.append_rows(read, places)
    return logits[places]


def decode_step(model: Model, tokens: Tensor, cache: PagedCache) -> Tensor:
    """Append a token (B,) to each row; return the logits (B, V) of the next one."""
    inputs = {"past_key_values": cache.cache, "use_cache": True}
    if model.config.is_encoder_decoder:
        # what the encoder read is in the cache; of its output the shape is looked at
        shape = len(tokens), 1, model.config.hidden_size
        zero = torch.zeros(1, dtype=model.dtype)
        inputs["encoder_outputs"] = (zero.expand(shape),)
        inputs["decoder_input_ids"] = tokens[:, None]
    else:
        positions = torch.tensor(cache.lengths())
        inputs["input_ids"] = tokens[:, None]
        inputs["position_ids"] = positions[:, None]
    cache.reserve_next_token()
    output = model(**inputs)
    return output.logits[:, -1]


def reserved_tokens(row: Row) -> int:
    """Return the tokens of the cache that are planned for a row."""
    planned = min(decoding.RESERVED_TOKENS, row.max_new_tokens)
    new = max(planned, len(row.new_ids))
    return len(row.ids) + new


def cache_token_budget(model: Model, probe: State, rows: list[Row], batch_size: int | None) -> int:
    """Return how many tokens the cache is planned for: those of the longest batch_size rows.

    By default of CPU_ROWS rows, but at most what decoding.cpu_cache_bytes allows.
    probe: the state after a prefill of one token.
    """
    planned = sorted(map(reserved_tokens, rows), reverse=True)
    if batch_size:
        return sum(planned[:batch_size])
    token_bytes = decoding.cache_bytes_per_token(probe)
    token_bytes *= 4 // model.dtype.itemsize  # pages are in fp32
    allowed = decoding.cpu_cache_bytes(model) // max(1, token_bytes)
    wanted = sum(planned[: decoding.CPU_ROWS])
    longest = planned[0]
    return max(longest, min(wanted, allowed))


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
    longest = 0  # tokens of a chunk's first prompt
    for row in rows:
        is_new = row.index not in prompts
        padded_tokens = (len(prompts) + 1) * longest
        if not chunks or (is_new and padded_tokens > PREFILL_TOKENS):
            chunks.append([])
            prompts = set()
            longest = len(row.ids)
        chunks[-1].append(row)
        prompts.add(row.index)
    return chunks


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
