"""Generate with a local model: the loop that decodes, and what surrounds it.

The plain loop is short: prompts are read side by side, the longest first; each step appends a token
to every row; rows that end leave.  sampling.py chooses the tokens.  On a CPU
extras/cpu_decoding.py does the same faster, unless it is missing or --plain is given; on a GPU,
with --cuda_graphs, extras/gpu_decoding.py does.  Greedily all give what model.generate gives one
prompt at a time.

Shapes: B rows that are decoded side by side, T tokens of the longest, V tokens in the vocabulary.
torch is imported in functions, so that `finetune_cot.py --help` does not wait for it.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import models
import storage
import terminal
from distributed import all_gather, print_on_rank0, rank_and_world_size
from models import eos_token_ids, stream_seeds
from sampling import Finished, Row, Sampling, append_tokens, next_tokens
from storage import UserError, is_out_of_memory

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel as Model
    from transformers import PreTrainedTokenizerBase as Tokenizer
    from transformers.cache_utils import Cache
    from transformers.utils import ModelOutput

    from storage import Journal

StrPath = str | Path


def has_extra(name: str) -> bool:
    """Return whether extras/<name>.py is there; nothing in this folder needs it."""
    return Path(__file__).with_name("extras").joinpath(f"{name}.py").exists()


# ---------------- The plain decoding loop

CPU_ROWS = 96  # rows decoded at once by default (LOG.md)
GPU_ROWS = 512
RESERVED_TOKENS = 64  # new tokens that a row is expected to need, in the memory plan of a CPU

State = dict[str, Any]  # keyword arguments of model(...) from step to step, with the KV cache


def decode(
    model: Model, tokenizer: Tokenizer, rows: list[Row], sampling: Sampling, batch_size: int | None
) -> Iterator[Finished]:
    """Yield each row as it ends; rows: the longest prompts first.

    Batches of batch_size rows (None: see default_batch_size); rows that end leave their batch.
    """
    eos = eos_token_ids(model, tokenizer)
    while rows:
        size = batch_size or default_batch_size(model, rows[0])
        batch, rows = rows[:size], rows[size:]
        prompts, places = distinct_prompts(batch)
        logits, state = prefill(model, prompts)
        if len(prompts) < len(batch):
            logits = logits[places]
            select_rows(state, places)
        while batch:
            tokens = next_tokens(logits, batch, sampling)
            finished, unfinished = append_tokens(tokenizer, eos, batch, tokens, sampling.stop)
            yield from finished
            if finished:
                batch = [batch[place] for place in unfinished]
                tokens = tokens[unfinished]
                select_rows(state, unfinished)
            if batch:
                logits = decode_step(model, tokens, state)


def distinct_prompts(rows: list[Row]) -> tuple[list[models.Ids], list[int]]:
    """Return the prompts of rows, each once however often it is sampled, and the place of each row.

    Rows of prompts 4, 4, 7 -> (ids of 4 and 7, [0, 0, 1]).
    """
    prompts = []
    places: dict[int, int] = {}
    for row in rows:
        if row.index not in places:
            places[row.index] = len(prompts)
            prompts.append(row.ids)
    return prompts, [places[row.index] for row in rows]


def pad(prompts: list[models.Ids], on_left: bool) -> tuple[Tensor, Tensor]:
    """Return the token ids of prompts and the mask of what is no padding, both (B, T).

    [[5, 6, 7], [8]] on the left -> ids [[5, 6, 7], [0, 0, 8]], mask [[1, 1, 1], [0, 0, 1]].
    """
    import torch

    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)  # padding is masked: any token serves
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        first = 0
        if on_left:
            first = width - len(prompt)
        columns = slice(first, first + len(prompt))
        ids[row, columns] = torch.tensor(prompt)
        mask[row, columns] = 1
    return ids, mask


def prefill(model: Model, prompts: list[models.Ids]) -> tuple[Tensor, State]:
    """Read prompts (token ids); return the logits (B, V) of the first new token, and the state.

    Decoders are padded on the left, so that all rows continue in one column; positions start at 0
    after the padding.  Encoder-decoders are padded on the right.
    """
    import torch

    config = model.config
    ids, mask = pad(prompts, on_left=not config.is_encoder_decoder)
    ids = ids.to(model.device)
    mask = mask.to(model.device)
    state: State = {"attention_mask": mask}
    if config.is_encoder_decoder:
        encoder = model.get_encoder()
        state["encoder_outputs"] = encoder(input_ids=ids, attention_mask=mask)
        start = torch.full_like(ids[:, :1], config.decoder_start_token_id)
        output = model(decoder_input_ids=start, **state, use_cache=True)
    else:
        positions = mask.cumsum(-1) - 1
        inputs = {"position_ids": positions.clamp(min=0)}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            inputs["logits_to_keep"] = 1
        output = model(input_ids=ids, **inputs, **state, use_cache=True)
    keep_cache(model, output, state)
    return output.logits[:, -1], state


def keep_cache(model: Model, output: ModelOutput, state: State) -> None:
    """Put the cache into the state, under the name that the model has for it.

    Raises UserError where there is none whose rows can be selected.
    """
    for name in ("past_key_values", "cache_params"):  # the second is Mamba's
        cache = getattr(output, name, None)
        if hasattr(cache, "reorder_cache"):
            state[name] = cache
            return
    raise UserError(
        f"models of type {model.config.model_type} keep no key-value cache, so they cannot be "
        "decoded here"
    )


def cache_of(state: State) -> Cache:
    """Return the key-value cache, or the states that Mamba keeps instead."""
    if "past_key_values" in state:
        return state["past_key_values"]
    return state["cache_params"]


def decode_step(model: Model, tokens: Tensor, state: State) -> Tensor:
    """Append a token (B,) to each row; return the logits (B, V) of the next one.  Extends state."""
    import torch

    ids = tokens[:, None]
    if model.config.is_encoder_decoder:
        output = model(decoder_input_ids=ids, **state, use_cache=True)
    else:
        mask = torch.cat([state["attention_mask"], torch.ones_like(ids)], 1)
        positions = mask.sum(-1, keepdim=True) - 1
        state["attention_mask"] = mask
        inputs = dict(state)
        if "cache_params" in state:  # Mamba would multiply the new token by the whole mask
            del inputs["attention_mask"]
        output = model(input_ids=ids, position_ids=positions, **inputs, use_cache=True)
    keep_cache(model, output, state)
    return output.logits[:, -1]


def select_rows(state: State, places: list[int]) -> None:
    """Go on with the rows at these places, each as often as it is named."""
    mask = state["attention_mask"]
    index = mask.new_tensor(places)
    state["attention_mask"] = mask[index]
    cache = cache_of(state)
    cache.reorder_cache(index)  # every kind of cache layer has this one
    encoded = state.get("encoder_outputs", {})
    for name, value in encoded.items():
        if hasattr(value, "shape"):  # mixtures of experts add tuples, of which nothing is read
            encoded[name] = value[index]


def default_batch_size(model: Model, longest: Row) -> int:
    """Return how many rows to decode at once where no --batch_size is given, by their KV cache.

    On a CPU it takes at most half of what the weights take, or 0.6 GB; on a GPU half of what is
    free.
    """
    import torch

    device = model.device
    new_tokens = longest.max_new_tokens
    if device.type == "cuda":
        most_rows = GPU_ROWS
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device)
        free -= torch.cuda.memory_allocated(device)
        allowed = free // 2
    else:
        most_rows = CPU_ROWS
        allowed = cpu_cache_bytes(model)
        new_tokens = min(new_tokens, RESERVED_TOKENS)
    _, state = prefill(model, [longest.ids[:1]])
    token_bytes = cache_bytes_per_token(state)
    row_bytes = token_bytes * (len(longest.ids) + new_tokens)
    rows = allowed // max(1, row_bytes)
    return max(1, min(rows, most_rows))


def cache_bytes_per_token(state: State) -> int:
    """Return the bytes of keys and values in a cache of one token."""
    cache = cache_of(state)
    total = 0
    for layer in getattr(cache, "self_attention_cache", cache).layers:
        keys = getattr(layer, "keys", None)
        if keys is not None:
            total += 2 * keys.nbytes
    return total


def cpu_cache_bytes(model: Model) -> int:
    """Return the bytes that the KV cache may take by default on a CPU."""
    weight_bytes = sum(weight.nbytes for weight in model.parameters())
    return max(600_000_000, weight_bytes // 2)


# ---------------- Rehearse: batches and fast paths are trusted when they give the same logits

MODEL_ERRORS = (  # what Hugging Face's models raise where they cannot do what they are asked for
    *(AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError),
    ValueError,
)
REHEARSED_TOKENS = 3


class Rehearsal(NamedTuple):
    """Two short prompts, and what the plain loop makes of each alone."""

    prompts: list[list[int]]
    tokens: Tensor  # (P, REHEARSED_TOKENS) chosen greedily
    logits: Tensor  # (P, REHEARSED_TOKENS, V) of these tokens

    def agrees_with(self, logits: Tensor) -> bool:
        """Tell whether logits are these but for rounding."""
        import torch

        if not self.logits.isfinite().all():
            return True  # the loop will name the prompt
        dtype = logits.dtype
        if torch.get_float32_matmul_precision() != "highest":  # --precision tf32
            dtype = torch.bfloat16
        bound = torch.finfo(dtype).eps ** 0.5 * self.logits.abs().max()
        return bool((logits - self.logits).abs().max() <= bound)


def rehearse(model: Model, rows: list[Row]) -> Rehearsal:
    """Decode the beginnings of two prompts of different length, one at a time.

    Raises UserError where the model cannot.
    """
    import torch

    prompts = [rows[0].ids[:32]]  # more than a page of extras/cpu_decoding.py
    if len(prompts[0]) > 1:
        prompts.append(rows[-1].ids[: min(7, len(prompts[0]) - 1)])
    try:
        logits = [rehearsed_logits(model, [prompt]) for prompt in prompts]
    except MODEL_ERRORS as e:
        if is_out_of_memory(e):
            raise
        raise UserError(
            f"models of type {model.config.model_type} cannot be decoded here "
            f"({type(e).__name__}: {storage.one_line(e)})"
        ) from None
    together = torch.cat(logits)
    return Rehearsal(prompts, together.argmax(-1), together)


def rehearsed_logits(
    model: Model, prompts: list[list[int]], tokens: Tensor | None = None
) -> Tensor:
    """Return the logits (P, REHEARSED_TOKENS, V) of the plain loop, greedily or for these tokens.

    Several rows change places after the first step, as they do when others leave.
    """
    import torch

    logits, state = prefill(model, prompts)
    steps = [logits]
    order = list(reversed(range(len(prompts))))
    for k in range(REHEARSED_TOKENS - 1):
        chosen = steps[-1].argmax(-1)
        if tokens is not None:
            chosen = tokens[:, k]
        select_rows(state, order)
        steps.append(decode_step(model, chosen[order], state)[order])
        select_rows(state, order)
    return torch.stack(steps, 1)


def decode_rehearsed(
    model: Model,
    tokenizer: Tokenizer,
    rows: list[Row],
    sampling: Sampling,
    batch_size: int | None,
    plain: bool,
    cuda_graphs: bool,
) -> Iterator[Finished]:
    """Yield each row as it ends, by the fastest loop that gives this model's own logits.

    Rows are decoded one by one where those of a batch get other logits than alone (MiniMax).
    """
    if not rows:
        return
    arguments = (model, tokenizer, rows, sampling)
    rehearsal = rehearse(model, rows)
    if batch_size != 1 and len(rows) > 1:
        logits = rehearsed_logits(model, rehearsal.prompts, rehearsal.tokens)
        if not rehearsal.agrees_with(logits):
            print_on_rank0(
                f"models of type {model.config.model_type} give a row of a batch other logits than "
                "alone, so prompts are decoded one by one"
            )
            yield from decode(*arguments, 1)
            return
    if model.device.type == "cpu" and not plain and has_extra("cpu_decoding"):
        from extras import cpu_decoding

        yield from cpu_decoding.decode(*arguments, batch_size, rehearsal)
    elif model.device.type == "cuda" and cuda_graphs and not plain:
        from extras import gpu_decoding

        yield from gpu_decoding.decode(*arguments, batch_size, rehearsal)
    else:
        yield from decode(*arguments, batch_size)


# ---------------- Generate: the context window, journals and ranks around the loop


def generate(
    model: Model,
    tokenizer: Tokenizer,
    family: str,
    prompts: list[str],
    max_new_tokens: int | list[int],
    temperature: float = 0.0,
    n: int = 1,
    stop: list[str] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    overflow: str = "error",
    top_p: float = 1.0,
    journal: StrPath | None = None,
    plain: bool = False,
    cuda_graphs: bool = False,
    first: int = 0,
) -> list[list[dict[str, str]]]:
    """Complete each prompt n times; return {"completion", "finish_reason"} of each, in order.

    max_new_tokens: of all prompts, or of each; overflow: see models.fit_context_window; first:
    number of the first of the n; plain: no fast path.  Under torchrun each rank decodes its share
    and all return everything.  Beside `journal`, the caller's output file, completions are kept as
    rows end, and a killed run continues.
    """
    sampling = Sampling(temperature, top_p, stop)
    fitted = models.fit_context_window(model, tokenizer, family, prompts, max_new_tokens, overflow)
    settings = [*sampling, seed]
    if journal:
        settings += weight_checksums(model)  # what other weights gave is not taken over
    settings_key = storage.fingerprint(settings)
    ks = range(first, first + n)
    keys = []
    for i, (ids, limit) in enumerate(fitted):
        prompt = ids.tolist()
        keys.append([storage.fingerprint([settings_key, i, k, prompt, limit]) for k in ks])
    journals, done = open_journals(journal)
    rows = missing_rows(fitted, keys, stream_seeds(seed, prompts, ks), done)
    if family == "decoder":
        for row in rows:
            row.before = row.ids[-1:].tolist()
    with evaluation_mode(model):
        ended = decode_rehearsed(model, tokenizer, rows, sampling, batch_size, plain, cuda_graphs)
        finished = collect(ended, journals, len(rows))
    for share in all_gather(finished):
        done |= share
    results = []
    for keys_of_prompt in keys:
        results.append([completion_of(done.get(key)) for key in keys_of_prompt])
    return results


def completion_of(row: dict[str, str] | None) -> dict[str, str]:
    """Return the completion in a journal's row; that of a skipped prompt (None) is empty."""
    if row is None:
        return {"completion": "", "finish_reason": "length"}
    return {name: row[name] for name in ("completion", "finish_reason")}


@contextlib.contextmanager
def evaluation_mode(model: Model) -> Iterator[None]:
    """Decode without gradients and dropout; where memory runs out, name the flag to lower."""
    import torch

    was_training = model.training
    advice = ": lower --eval_batch_size (evaluate.py generate: --batch_size)"
    model.eval()
    try:
        with torch.inference_mode(), storage.out_of_memory_hint(advice):
            yield
    finally:
        model.train(was_training)


def weight_checksums(model: Model) -> list[float]:
    """Return a sum of each weight, in parts: torch makes doubles of all that it sums."""
    import torch

    sums = []
    for weight in model.parameters():
        parts = weight.detach().flatten().split(2**22)
        sums.append(sum(part.sum(dtype=torch.float64).item() for part in parts))
    return sums


def open_journals(path: StrPath | None) -> tuple[list[Journal], dict[str, dict]]:
    """Return this rank's journals, its own first, and {key: row} of what a killed run finished.

    That run may have had more ranks: the ranks of this one share its journals.
    """
    if not path:
        return [], {}
    rank, world_size = rank_and_world_size()
    numbers = sorted({rank, *storage.journal_paths(path)})
    own = [number for number in numbers if number % world_size == rank]
    journals = [storage.Journal(f"{path}.journal-{number}") for number in own]
    own_rows = {}
    for journal in journals:
        own_rows |= journal.rows
    done = {}
    for rows in all_gather(own_rows):
        for key, row in rows.items():
            if "finish_reason" in row:
                done[key] = row
    return journals, done


def missing_rows(
    fitted: list, keys: list[list[str]], streams: list[list[int]], done: dict[str, dict]
) -> list[Row]:
    """Return this rank's share of the rows that are not done, the longest prompts first."""
    missing = []  # the rows of each prompt that has some
    for i, (ids, limit) in enumerate(fitted):
        rows = []
        for key, stream in zip(keys[i], streams[i], strict=True):
            if limit and key not in done:
                rows.append(Row(i, key, ids, limit, stream))
        if rows:
            missing.append(rows)
    missing.sort(key=lambda rows: len(rows[0].ids), reverse=True)
    rank, world_size = rank_and_world_size()
    share = missing[rank::world_size]
    return list(itertools.chain.from_iterable(share))


def collect(ended: Iterator[Finished], journals: list[Journal], total: int) -> dict[str, dict]:
    """Put each row into this rank's journal when it ends; return {key: row}."""
    finished = {}
    rank, _ = rank_and_world_size()
    with contextlib.closing(ended):
        for row, text, reason in terminal.progress(ended, "decoding", rank == 0, total):
            done = {"key": row.key, "completion": text, "finish_reason": reason}
            finished[row.key] = done
            row.new_ids.clear()  # the rows of all prompts stay
            if journals:
                journals[0].append([done])
    for journal in journals:
        journal.close()
    return finished
