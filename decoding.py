"""Generate with a local model: sample tokens, decode, and what surrounds the loop.

The plain loop is short: prompts are read side by side, the longest first; each step appends a token
to every row; rows that end leave.  On a CPU extras/cpu_decoding.py does the same faster, unless it
is missing or --plain is given; both give greedily what model.generate gives one prompt at a time.

Shapes: B rows that are decoded side by side, T tokens of the longest, V tokens in the vocabulary.
torch is imported in functions, so that `finetune_cot.py --help` does not wait for it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import models
import storage
import terminal
from distributed import all_gather, print_on_rank0, rank_and_world_size
from models import eos_token_ids, stream_seeds
from storage import UserError, is_out_of_memory

if TYPE_CHECKING:
    import torch
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


# ---------------- Sample tokens


class Sampling(NamedTuple):
    """How tokens are chosen, and what ends a completion."""

    temperature: float  # 0: greedy
    top_p: float  # sample from the most probable tokens that reach this share together; 1: all
    stop: list[str] | None  # strings that end a completion and are cut off


def sample_tokens(
    logits: Tensor, temperature: float, generators: list[torch.Generator], top_p: float = 1.0
) -> Tensor:
    """Draw the next token (B,) of each row of logits (B, V).

    From a random stream of the row's own, so that no row depends on the others; of the fewest most
    probable tokens that reach top_p together (Holtzman et al. 2020).
    """
    import torch

    probs = torch.softmax(logits.double() / temperature, -1)
    if top_p < 1:
        ranked, order = probs.sort(-1, descending=True)
        ranked[ranked.cumsum(-1) - ranked >= top_p] = 0
        probs = probs.scatter(-1, order, ranked)
    cumulative = probs.cumsum(-1)
    draws = [torch.rand(1, dtype=torch.float64, generator=generator) for generator in generators]
    thresholds = torch.stack(draws).to(logits.device) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, thresholds, right=True).squeeze(1)
    return tokens.clamp(max=logits.shape[-1] - 1)


# ---------------- The plain decoding loop

CPU_ROWS = 96  # rows decoded at once by default (LOG.md)
GPU_ROWS = 512
RESERVED_TOKENS = 64  # new tokens that a row is expected to need, in the memory plan of a CPU


@dataclass
class Row:
    """One completion while it is decoded."""

    index: int  # of its prompt
    key: str  # in the journal
    ids: models.Ids  # tokens of the prompt
    max_new_tokens: int
    seed: int  # of its own random stream
    before: list[int] = field(default_factory=list)  # a decoder's last token of the prompt
    new_ids: list[int] = field(default_factory=list)  # tokens generated so far

    @functools.cached_property
    def generator(self) -> torch.Generator:
        """The row's random stream; greedy decoding makes none."""
        import torch

        return torch.Generator().manual_seed(self.seed)


Finished = tuple[Row, str, str]  # (row, text, "stop": end of sequence or a stop string | "length")
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
        prompts = {row.index: row.ids for row in batch}  # read once for all samples of a prompt
        logits, state = prefill(model, list(prompts.values()))
        if len(prompts) < len(batch):
            places = {index: place for place, index in enumerate(prompts)}
            logits = logits[[places[row.index] for row in batch]]
            select_rows(state, [places[row.index] for row in batch])
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


def prefill(model: Model, prompts: list[list[int]]) -> tuple[Tensor, State]:
    """Read prompts (token ids); return the logits (B, V) of the first new token, and the state.

    Decoders are padded on the left, so that all rows continue in one column, and their positions
    start at 0 after the padding: [[5, 6, 7], [8]] -> ids [[5, 6, 7], [0, 0, 8]], mask [[1, 1, 1],
    [0, 0, 1]], positions [[0, 1, 2], [0, 0, 0]].  Encoder-decoders are padded on the right.
    """
    import torch

    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)  # padding is masked: any token serves
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        columns = slice(0, len(prompt))
        if not model.config.is_encoder_decoder:
            columns = slice(width - len(prompt), width)
        ids[row, columns] = torch.tensor(prompt)
        mask[row, columns] = 1
    ids = ids.to(model.device)
    state: State = {"attention_mask": mask.to(model.device)}
    if model.config.is_encoder_decoder:
        state["encoder_outputs"] = model.get_encoder()(input_ids=ids, **state)
        start = torch.full_like(ids[:, :1], model.config.decoder_start_token_id)
        output = model(decoder_input_ids=start, **state, use_cache=True)
    else:
        inputs = {"position_ids": (state["attention_mask"].cumsum(-1) - 1).clamp(min=0)}
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
        state["attention_mask"] = torch.cat([state["attention_mask"], torch.ones_like(ids)], 1)
        positions = state["attention_mask"].sum(-1, keepdim=True) - 1
        inputs = dict(state)
        if "cache_params" in state:  # Mamba would multiply the new token by the whole mask
            del inputs["attention_mask"]
        output = model(input_ids=ids, position_ids=positions, **inputs, use_cache=True)
    keep_cache(model, output, state)
    return output.logits[:, -1]


def select_rows(state: State, places: list[int]) -> None:
    """Go on with the rows at these places, each as often as it is named."""
    index = state["attention_mask"].new_tensor(places)
    state["attention_mask"] = state["attention_mask"][index]
    cache_of(state).reorder_cache(index)  # every kind of cache layer has this one
    for name, value in state.get("encoder_outputs", {}).items():
        if hasattr(value, "shape"):  # mixtures of experts add tuples, of which nothing is read
            state["encoder_outputs"][name] = value[index]


def next_tokens(logits: Tensor, rows: list[Row], sampling: Sampling) -> Tensor:
    """Choose each row's next token (B,).  Raises UserError where logits are NaN or infinite."""
    tokens = logits.argmax(-1)  # a NaN is the largest
    is_finite = logits.gather(1, tokens[:, None])[:, 0].isfinite()
    if not is_finite.all():
        row = rows[is_finite.tolist().index(False)]
        raise UserError(
            f"prompt {row.index}: the model's logits are NaN or infinite at new token "
            f"{len(row.new_ids) + 1}: its weights are damaged, or too large for this --precision"
        )
    if sampling.temperature == 0:
        return tokens
    generators = [row.generator for row in rows]
    return sample_tokens(logits.float(), sampling.temperature, generators, sampling.top_p)


def append_tokens(
    tokenizer: Tokenizer, eos: set[int], rows: list[Row], tokens: Tensor, stop: list[str] | None
) -> tuple[list[Finished], list[int]]:
    """Append its token to each row; return the rows that ended, and the places of the others."""
    finished = []
    unfinished = []
    for place, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
        row.new_ids.append(token)
        is_full = len(row.new_ids) >= row.max_new_tokens
        text = ""
        if is_full or token in eos or shows_stop(tokenizer, row.new_ids, stop):
            text = text_after(tokenizer, row.before, row.new_ids)
        cuts = [text.find(string) for string in stop or () if string in text]
        if cuts or token in eos:
            finished.append((row, text[: min(cuts, default=None)], "stop"))
        elif is_full:
            finished.append((row, text, "length"))
        else:
            unfinished.append(place)
    return finished, unfinished


def shows_stop(tokenizer: Tokenizer, ids: list[int], stop: list[str] | None) -> bool:
    """Tell whether the last tokens show a stop string, a byte of which may be a token."""
    if not stop:
        return False
    most_tokens = 1 + max(len(string.encode()) for string in stop)
    tail = tokenizer.decode(ids[-most_tokens:], skip_special_tokens=True)
    return any(string in tail for string in stop)


def text_after(tokenizer: Tokenizer, before: list[int], ids: list[int]) -> str:
    """Return the text of ids after the tokens before: Llama's tokenizers drop a text's first space.

    So `step by step.` goes on with ` First`, not with `First`.
    """
    text = tokenizer.decode(ids, skip_special_tokens=True)
    head = tokenizer.decode(before, skip_special_tokens=True)
    whole = tokenizer.decode(before + ids, skip_special_tokens=True)
    return whole[len(head) :] if whole == f"{head} {text}" else text


def default_batch_size(model: Model, longest: Row) -> int:
    """Return how many rows to decode at once where no --batch_size is given, by their KV cache.

    On a CPU it takes at most half of what the weights take, or 0.6 GB; on a GPU half of what is
    free.
    """
    import torch

    token_bytes = cache_bytes_per_token(prefill(model, [longest.ids[:1]])[1])
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
        free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
        row_bytes = token_bytes * (len(longest.ids) + longest.max_new_tokens)
        return max(1, min(GPU_ROWS, free // 2 // max(1, row_bytes)))
    row_bytes = token_bytes * (len(longest.ids) + min(longest.max_new_tokens, RESERVED_TOKENS))
    return max(1, min(CPU_ROWS, cpu_cache_bytes(model) // max(1, row_bytes)))


def cache_bytes_per_token(state: State) -> int:
    """Return the bytes of keys and values in a cache of one token."""
    cache = cache_of(state)
    layers = getattr(cache, "self_attention_cache", cache).layers
    keys = [getattr(layer, "keys", None) for layer in layers]
    return sum(2 * key.nbytes for key in keys if key is not None)


def cpu_cache_bytes(model: Model) -> int:
    """Return the bytes that the KV cache may take by default on a CPU."""
    return max(6 * 10**8, sum(weight.nbytes for weight in model.parameters()) // 2)


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
) -> Iterator[Finished]:
    """Yield each row as it ends, by the fastest loop that gives this model's own logits.

    Rows are decoded one by one where those of a batch get other logits than alone (MiniMax).
    """
    if not rows:
        return
    arguments = (model, tokenizer, rows, sampling)
    rehearsal = rehearse(model, rows)
    is_alone = batch_size == 1 or len(rows) == 1
    if not is_alone:
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
        ended = decode_rehearsed(model, tokenizer, rows, sampling, batch_size, plain)
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
    return {"completion": row["completion"], "finish_reason": row["finish_reason"]}


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
    done = {}
    for rows_of_journals in all_gather([journal.rows for journal in journals]):
        for rows in rows_of_journals:
            done |= rows
    return journals, {key: row for key, row in done.items() if "finish_reason" in row}


def missing_rows(
    fitted: list, keys: list[list[str]], streams: list[list[int]], done: dict[str, dict]
) -> list[Row]:
    """Return this rank's share of the rows that are not done, the longest prompts first."""
    rank, world_size = rank_and_world_size()
    missing = [i for i, (_, limit) in enumerate(fitted) if limit and not done.keys() >= {*keys[i]}]
    missing.sort(key=lambda i: -len(fitted[i][0]))
    rows = []
    for i in missing[rank::world_size]:
        for key, stream in zip(keys[i], streams[i], strict=True):
            if key not in done:
                rows.append(Row(i, key, *fitted[i], stream))
    return rows


def collect(ended: Iterator[Finished], journals: list[Journal], total: int) -> dict[str, dict]:
    """Put each row into this rank's journal when it ends; return {key: row}."""
    finished = {}
    is_rank0 = rank_and_world_size()[0] == 0
    with contextlib.closing(ended):
        for row, text, reason in terminal.progress(ended, "decoding", is_rank0, total):
            finished[row.key] = {"key": row.key, "completion": text, "finish_reason": reason}
            row.new_ids.clear()  # the rows of all prompts stay
            if journals:
                journals[0].append([finished[row.key]])
    for journal in journals:
        journal.close()
    return finished
