"""Generate with a local model: load it, sample tokens, decode, and what surrounds the loop.

The plain loop is short: prompts are read side by side, the longest first; each step appends a token
to every row; rows that end leave.  On a CPU extras/cpu_decoding.py does the same faster, unless it
is missing or --plain is given; both give greedily what model.generate gives one prompt at a time.

Shapes: B rows that are decoded side by side, T tokens of the longest, V tokens in the vocabulary.
torch is imported in functions, so that `finetune_cot.py --help` does not wait for it.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import storage
import tasks
from storage import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel as Model
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from storage import Journal

StrPath = str | Path


def has_extra(name: str) -> bool:
    """Return whether extras/<name>.py is there; nothing in this folder needs it."""
    return Path(__file__).with_name("extras").joinpath(f"{name}.py").exists()


# ---------------- Load a model

TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json vocab.json spiece.model tokenizer.model".split()
)


class LoadedModel(NamedTuple):
    model: Model
    tokenizer: Tokenizer
    family: str  # decoder or encoder_decoder


def load_model(name: str, dtype: str = "float32") -> LoadedModel:
    """Load a Hugging Face folder or hub name; no code that comes with it is run.

    Raises UserError where it cannot be loaded, could not start a text, or could not stop.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "64")  # of the default 1024 entries each may take 1 MB
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    what = "is neither a folder here nor a model that could be downloaded"
    if Path(name).is_dir():
        check_model_folder(Path(name))
        what = "could not be loaded"
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        auto = transformers.AutoModelForCausalLM
        if config.is_encoder_decoder:
            auto = transformers.AutoModelForSeq2SeqLM
        model = auto.from_pretrained(name, dtype=dtype, trust_remote_code=False, weights_only=True)
    except (OSError, SafetensorError, StrictDataclassError, *storage.UNREADABLE) as e:
        reason = " ".join(str(e).split())[:160]
        raise UserError(f"the model {name} {what} ({reason})") from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {name} has no end-of-sequence token, so a student could never stop: "
            "set eos_token"
        )
    fuse_gelu(model)
    if not config.is_encoder_decoder:
        return LoadedModel(model, tokenizer, "decoder")
    if getattr(config, "decoder_start_token_id", None) is None:
        raise UserError(
            f"the config of {name} has no decoder_start_token_id, so its decoder has no first "
            "token: set it"
        )
    return LoadedModel(model, tokenizer, "encoder_decoder")


def check_model_folder(folder: Path) -> None:
    """Raise UserError where a folder lacks a config or a tokenizer."""
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is not a model folder: it has no config.json")
    if not any((folder / file).exists() for file in TOKENIZER_FILES):
        raise UserError(
            f"{folder} has no tokenizer: save one beside the model with "
            f"tokenizer.save_pretrained({str(folder)!r})"
        )


def fuse_gelu(model: Model) -> None:
    """Replace GPT-2's GELU, eight operations, by torch's one: time and memory (LOG.md)."""
    from transformers.activations import GELUTanh, NewGELUActivation

    for module in list(model.modules()):
        for name, layer in module.named_children():
            if type(layer) is NewGELUActivation:
                setattr(module, name, GELUTanh())


def select_device(name: str | None) -> torch.device:
    """Return a device: the one named, else a GPU if there is one; under torchrun each rank's own.

    Raises UserError where it cannot be used.
    """
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    gpus = torch.cuda.device_count()
    if name.startswith("cuda") and rank and rank >= gpus:
        raise UserError(
            f"rank {rank} has no GPU of its own, there are {gpus}: start as many ranks with "
            "torchrun, or add --device cpu"
        )
    try:
        device = torch.device(name)
        if "RANK" in os.environ and device.type == "cuda":
            device = torch.device("cuda", rank)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:  # torch's for a name or a device that is not there
        reason = str(e).splitlines()[0][:120]
        raise UserError(f"--device {name} cannot be used here: {reason}") from None
    return device


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
    ids: list[int]  # tokens of the prompt
    max_new_tokens: int
    generator: torch.Generator  # its own random stream
    new_ids: list[int] = field(default_factory=list)  # tokens generated so far


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
    state["past_key_values"] = getattr(output, "past_key_values", None)
    if state["past_key_values"] is None:
        raise UserError(
            f"models of type {model.config.model_type} keep no key-value cache, so they cannot be "
            "decoded here"
        )
    return output.logits[:, -1], state


def decode_step(model: Model, tokens: Tensor, state: State) -> Tensor:
    """Append a token (B,) to each row; return the logits (B, V) of the next one.  Extends state."""
    import torch

    ids = tokens[:, None]
    if model.config.is_encoder_decoder:
        output = model(decoder_input_ids=ids, **state, use_cache=True)
    else:
        state["attention_mask"] = torch.cat([state["attention_mask"], torch.ones_like(ids)], 1)
        positions = state["attention_mask"].sum(-1, keepdim=True) - 1
        output = model(input_ids=ids, position_ids=positions, **state, use_cache=True)
    state["past_key_values"] = output.past_key_values
    return output.logits[:, -1]


def select_rows(state: State, places: list[int]) -> None:
    """Go on with the rows at these places, each as often as it is named."""
    index = state["attention_mask"].new_tensor(places)
    state["attention_mask"] = state["attention_mask"][index]
    state["past_key_values"].reorder_cache(index)  # every kind of cache layer has this one
    if "encoder_outputs" in state:
        state["encoder_outputs"] = (state["encoder_outputs"][0][index],)


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


def eos_token_ids(model: Model, tokenizer: Tokenizer) -> set[int]:
    """Return the tokens that end a text: the tokenizer's and those of the generation config."""
    configured = model.generation_config.eos_token_id
    if isinstance(configured, list):
        return {tokenizer.eos_token_id, *configured}
    return {tokenizer.eos_token_id, configured}


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
        if stop or is_full or token in eos:
            text = tokenizer.decode(row.new_ids, skip_special_tokens=True)
        cuts = [text.find(string) for string in stop or () if string in text]
        if cuts or token in eos:
            finished.append((row, text[: min(cuts, default=None)], "stop"))
        elif is_full:
            finished.append((row, text, "length"))
        else:
            unfinished.append(place)
    return finished, unfinished


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
    cache = state["past_key_values"]
    layers = getattr(cache, "self_attention_cache", cache).layers
    keys = [getattr(layer, "keys", None) for layer in layers]
    return sum(2 * key.nbytes for key in keys if key is not None)


def cpu_cache_bytes(model: Model) -> int:
    """Return the bytes that the KV cache may take by default on a CPU."""
    return max(6 * 10**8, sum(weight.nbytes for weight in model.parameters()) // 2)


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
) -> list[list[dict[str, str]]]:
    """Complete each prompt n times; return {"completion", "finish_reason"} of each, in order.

    max_new_tokens: of all prompts, or of each.  overflow: see fit_context_window.  Under torchrun
    each rank decodes its share and all return everything.  Beside `journal`, the caller's output
    file, completions are kept as rows end, and a killed run continues.  plain: no fast path.
    """
    sampling = Sampling(temperature, top_p, stop)
    fitted = fit_context_window(model, tokenizer, family, prompts, max_new_tokens, overflow)
    settings = [*sampling, seed]
    if journal:
        settings += weight_checksums(model)  # what other weights gave is not taken over
    settings_key = storage.fingerprint(settings)
    keys = []
    for i, (ids, limit) in enumerate(fitted):
        keys.append([storage.fingerprint([settings_key, i, k, ids, limit]) for k in range(n)])
    journals, done = open_journals(journal)
    rows = missing_rows(prompts, fitted, keys, done, seed)
    with evaluation_mode(model):
        if model.device.type == "cpu" and not plain and has_extra("cpu_decoding"):
            from extras import cpu_decoding

            ended = cpu_decoding.decode(model, tokenizer, rows, sampling, batch_size)
        else:
            ended = decode(model, tokenizer, rows, sampling, batch_size)
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


def fit_context_window(
    model: Model,
    tokenizer: Tokenizer,
    family: str,
    prompts: list[str],
    max_new_tokens: int | list[int],
    overflow: str,
) -> list[tuple[list[int], int]]:
    """Return (token ids, limit of new tokens) of each prompt, within the positions the model has.

    overflow says what becomes of a prompt that leaves no position for a new token: "error" raises
    UserError; "truncate_left" drops its first tokens (few-shot examples, not the question); "skip"
    gives it the limit 0.  With 256 positions and 20 new tokens: 250 tokens -> 250 and the limit 6;
    300 tokens, "truncate_left" -> the last 236 and the limit 20.
    """
    limits = max_new_tokens
    if isinstance(limits, int):
        limits = [limits] * len(prompts)
    positions = sys.maxsize
    if family == "decoder" and (getattr(model.config, "max_position_embeddings", None) or 0) > 0:
        positions = model.config.max_position_embeddings
    fitted = []
    for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        ids = tasks.encode_prompt(tokenizer, family, prompt)
        if len(ids) >= positions and overflow == "truncate_left":
            ids = ids[min(limit, positions // 2) - positions :]
        if not ids or (len(ids) >= positions and overflow == "error"):
            raise UserError(
                f"prompt {i} has {len(ids)} tokens: it needs at least 1 and, in this model, fewer "
                f"than {positions}"
            )
        fitted.append((ids, min(limit, max(0, positions - len(ids)))))
    shorter = sum(new < limit for (_, new), limit in zip(fitted, limits, strict=True))
    if shorter and rank_and_world_size()[0] == 0:
        print(
            f"the model has {positions} positions: {shorter} of {len(prompts)} prompts get fewer "
            f"new tokens than asked, {sum(new == 0 for _, new in fitted)} none"
        )
    return fitted


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
    prompts: list[str], fitted: list, keys: list[list[str]], done: dict[str, dict], seed: int
) -> list[Row]:
    """Return this rank's share of the rows that are not done, the longest prompts first."""
    import torch

    rank, world_size = rank_and_world_size()
    missing = [i for i, (_, limit) in enumerate(fitted) if limit and not done.keys() >= {*keys[i]}]
    missing.sort(key=lambda i: -len(fitted[i][0]))
    rows = []
    for i in missing[rank::world_size]:
        for k, key in enumerate(keys[i]):
            if key not in done:
                stream = int(storage.fingerprint([seed, prompts[i], k]), 16) % 2**63
                rows.append(Row(i, key, *fitted[i], torch.Generator().manual_seed(stream)))
    return rows


def collect(ended: Iterator[Finished], journals: list[Journal], total: int) -> dict[str, dict]:
    """Put each row into this rank's journal when it ends; return {key: row}."""
    finished = {}
    is_rank0 = rank_and_world_size()[0] == 0
    with contextlib.closing(ended):
        for row, text, reason in storage.progress(ended, "decoding", is_rank0, total):
            finished[row.key] = {"key": row.key, "completion": text, "finish_reason": reason}
            if journals:
                journals[0].append([finished[row.key]])
    for journal in journals:
        journal.close()
    return finished


def rank_and_world_size() -> tuple[int, int]:
    import torch.distributed as dist

    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_gather(value: Any) -> list:
    """Return the value of each rank; every rank must call it."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
