"""Load a student: a Hugging Face folder or hub name, and the device it runs on.

What could not be trained or decoded is refused here, in one sentence, before anything is computed.
torch is imported in functions, so that `finetune_cot.py --help` does not wait for it.
"""

from __future__ import annotations

import difflib
import functools
import os
import queue
import socket
import sys
import threading
from array import array
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import distributed
import storage
import tasks
from storage import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig
    from transformers import PreTrainedModel as Model
    from transformers import PreTrainedTokenizerBase as Tokenizer


Ids = array  # of token ids, four bytes each


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
        os.environ.setdefault(cache, "16")  # of the default 1024 entries each may take 1 MB or more
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    what = "is neither a folder here nor a model that could be downloaded"
    offline = True
    if Path(name).is_dir():
        check_model_folder(Path(name))
        what = "could not be loaded"
    else:
        offline = use_cache_alone(name)
    where = {"local_files_only": offline}
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **where)
        check_weights_are_plain(name, config)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            name, trust_remote_code=False, **where
        )
        auto = transformers.AutoModelForCausalLM
        if config.is_encoder_decoder:
            auto = transformers.AutoModelForSeq2SeqLM
        where |= {"dtype": dtype, "weights_only": True}
        model = auto.from_pretrained(name, trust_remote_code=False, **where)
    except (OSError, SafetensorError, StrictDataclassError, *storage.UNREADABLE) as e:
        reason = " ".join(str(e).split())[:160]
        raise UserError(f"the model {name} {what} ({reason})") from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {name} has no end-of-sequence token, so a student could never stop: "
            "set eos_token"
        )
    fuse_gelu(model)
    report_ignored(model, name)
    if not config.is_encoder_decoder:
        return LoadedModel(model, tokenizer, "decoder")
    if getattr(config, "decoder_start_token_id", None) is None:
        raise UserError(
            f"the config of {name} has no decoder_start_token_id, so its decoder has no first "
            "token: set it"
        )
    return LoadedModel(model, tokenizer, "encoder_decoder")


def check_weights_are_plain(name: str, config: PretrainedConfig) -> None:
    """Raise UserError where weights are quantized, or would have to be added to others first."""
    from transformers.utils.peft_utils import find_adapter_config_file

    if find_adapter_config_file(name):
        raise UserError(
            f"{name} holds an adapter (adapter_config.json), not a model of its own: merge it with "
            "peft's merge_and_unload() and save model and tokenizer with save_pretrained"
        )
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = dict(quantization).get("quant_method", "of an unknown kind")
        raise UserError(
            f"the weights of {name} are quantized ({method}), so they can be neither trained nor "
            "decoded here: take the unquantized model, or serve it and use --base_url"
        )


def fuse_gelu(model: Model) -> None:
    """Replace GPT-2's GELU, eight operations, by torch's one: time and memory (LOG.md)."""
    from transformers.activations import GELUTanh, NewGELUActivation

    for module in list(model.modules()):
        for name, layer in module.named_children():
            if type(layer) is NewGELUActivation:
                setattr(module, name, GELUTanh())


def set_attention(model: Model, name: str) -> None:
    """Have every part of a model attend by transformers' implementation of that name.

    In transformers 5.17 the model's own method passes over T5's stacks.
    """
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.set_attn_implementation(name)


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


# ---------------- What a model has room for


class Positions(NamedTuple):
    """The most tokens that a model has positions for; sys.maxsize: no bound is known."""

    prompt: int = sys.maxsize  # of an encoder-decoder's encoder
    label: int = sys.maxsize  # of its decoder
    total: int = sys.maxsize  # of a decoder, which reads prompt and label

    @property
    def longest_prompt(self) -> int:
        """Return how long a prompt may be that leaves a position for a new token."""
        return min(self.prompt, self.total - 1)


def count_positions(config: PretrainedConfig) -> Positions:
    """Return the positions that a config names; T5's are relative and have no end."""
    text_config = config.get_text_config()
    found = []
    for name in ("max_position_embeddings", "max_encoder_position_embeddings"):
        found.append(getattr(text_config, name, None) or 0)
    positions = max(found)
    if positions <= 0:  # XLNet says -1
        return Positions()
    if not config.is_encoder_decoder:
        return Positions(total=positions)
    of_decoder = getattr(config, "max_decoder_position_embeddings", positions)  # LED's are fewer
    return Positions(prompt=positions, label=of_decoder)


def check_token_ids(model: Model, ids: list[int], what: str) -> None:
    """Raise UserError where a token has no embedding; `what` names whose ids they are."""
    count = len(model.get_input_embeddings().weight)
    largest = max(ids)
    if largest >= count:
        raise UserError(
            f"{what} holds token {largest}, but the model has {count} embeddings: tokens were "
            "added to the tokenizer without model.resize_token_embeddings(len(tokenizer))"
        )


def fit_context_window(
    model: Model,
    tokenizer: Tokenizer,
    family: str,
    prompts: list[str],
    max_new_tokens: int | list[int],
    overflow: str,
) -> list[tuple[Ids, int]]:
    """Return (token ids, limit of new tokens) of each prompt, within the positions the model has.

    overflow says what becomes of a prompt that leaves no position for a new token: "error" raises
    UserError; "truncate_left" drops its first tokens (few-shot examples, not the question); "skip"
    gives it the limit 0.  With 256 positions and 20 new tokens: 250 tokens -> 250 and the limit 6;
    300 tokens, "truncate_left" -> the last 236 and the limit 20.
    """
    limits = max_new_tokens
    if isinstance(limits, int):
        limits = [limits] * len(prompts)
    positions = count_positions(model.config)
    longest = positions.longest_prompt
    fitted = []
    for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        ids = tasks.encode_prompt(tokenizer, family, prompt)
        if len(ids) > longest and overflow == "truncate_left":
            reserved = 0
            if family == "decoder":
                reserved = min(limit, positions.total // 2) - 1
            ids = ids[reserved - longest :]
        if not ids or (len(ids) > longest and overflow == "error"):
            raise UserError(
                f"prompt {i} has {len(ids)} tokens: it needs at least 1 and, in this model, at "
                f"most {longest}"
            )
        check_token_ids(model, ids, f"prompt {i}")
        room = min(positions.label, positions.total - len(ids))
        if len(ids) > longest:
            room = 0
        fitted.append((array("i", ids), min(limit, room)))  # a list takes ten times the memory
    shorter = sum(new < limit for (_, new), limit in zip(fitted, limits, strict=True))
    if shorter:
        distributed.print_on_rank0(
            f"the model reads {min(positions)} tokens at most: completions of {shorter} of "
            f"{len(prompts)} prompts may be cut, {sum(new == 0 for _, new in fitted)} get no room"
        )
    return fitted


# ---------------- Where a model comes from: a folder with all it needs, the cache, or the hub

CONNECT_SECONDS = 2.5  # to reach the hub
TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json vocab.json spiece.model tokenizer.model".split()
)


def use_cache_alone(name: str) -> bool:
    """Tell whether a model by this hub name must come from the cache, as the hub is out of reach.

    Raises UserError, with the nearest folder that holds a model, where it is not in the cache.
    """
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False  # no hub name: what loads it says so
    if not constants.HF_HUB_OFFLINE and can_connect(constants.ENDPOINT):
        return False
    if cached:
        return True
    near = nearest_model_folder(name)
    hint = ""
    if near:
        hint = f" (did you mean {near}?)"
    raise UserError(
        f"the model {name} is neither a folder here{hint} nor in the cache, and "
        f"{constants.ENDPOINT} cannot be reached: give the path of a folder with the model, or "
        "download it where there is a network and set HF_HUB_OFFLINE=1"
    )


def can_connect(url: str, seconds: float = CONNECT_SECONDS) -> bool:
    """Tell whether the host of a URL accepts a connection in time; true behind a proxy."""
    from urllib.request import getproxies  # slow to import, and --help needs none of it

    address = urlsplit(url)
    if address.scheme in getproxies():
        return True
    port = address.port or {"http": 80}.get(address.scheme, 443)
    answers = queue.SimpleQueue()

    def connect() -> None:
        """Put the outcome into the queue."""
        try:
            socket.create_connection((address.hostname, port), seconds).close()
            answers.put(True)
        except OSError:
            answers.put(False)

    threading.Thread(target=connect, daemon=True).start()  # looking up a name knows no timeout
    try:
        return answers.get(timeout=seconds)
    except queue.Empty:
        return False


def nearest_model_folder(name: str) -> str | None:
    """Return the folder with a model, here or in the project, whose name is nearest to `name`."""
    folders = {}
    for root in {Path.cwd(), storage.ROOT}:
        for pattern in ("*/config.json", "*/*/config.json", "saved/models/*/*/config.json"):
            folders |= {path.parent.name.lower(): path.parent for path in root.glob(pattern)}
    close = difflib.get_close_matches(name.rpartition("/")[2].lower(), folders, 1)
    if not close:
        return None
    return str(folders[close[0]].resolve())


def check_model_folder(folder: Path) -> None:
    """Raise UserError where a folder lacks a config or a tokenizer."""
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is not a model folder: it has no config.json")
    if not any((folder / file).exists() for file in TOKENIZER_FILES):
        raise UserError(
            f"{folder} has no tokenizer: save one beside the model with "
            f"tokenizer.save_pretrained({str(folder)!r})"
        )


# ---------------- What decides a text besides the weights: its end, its settings, random streams

# Special tokens count here as they do in model.generate; length and sampling are the caller's.
COUNTED = set(
    "bos_token_id eos_token_id pad_token_id decoder_start_token_id max_length max_new_tokens "
    "do_sample temperature top_p top_k transformers_version use_cache cache_implementation "
    "return_dict_in_generate output_scores output_logits output_attentions output_hidden_states "
    "remove_invalid_values early_stopping length_penalty is_assistant".split()  # two: of beams
)
NEUTRAL = {  # values that change nothing
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "diversity_penalty": 0.0,
    "min_length": 0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "guidance_scale": 1.0,
}


def eos_token_ids(model: Model, tokenizer: Tokenizer) -> set[int]:
    """Return the tokens that end a text: the tokenizer's and those of the generation config."""
    configured = model.generation_config.eos_token_id
    if isinstance(configured, list):
        return {tokenizer.eos_token_id, *configured}
    return {tokenizer.eos_token_id, configured}


def ignored_settings(model: Model) -> dict[str, Any]:
    """Return the settings that would change what model.generate writes and do not count here.

    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3}
    """
    ignored = {}
    for name, value in model.generation_config.to_diff_dict().items():
        is_set = value is not None and value is not False and value != NEUTRAL.get(name)
        if is_set and name not in COUNTED and not name.startswith("_"):
            ignored[name] = value
    return ignored


def report_ignored(model: Model, name: str) -> None:
    """Name, once for each model, what of its generation config does not count."""
    ignored = ignored_settings(model)
    if ignored:
        named = ", ".join(f"{key} {value}" for key, value in ignored.items())
        print_once(
            f"the generation_config.json of {name} sets {named}: that does not count here, so "
            "texts differ from those of model.generate"
        )


@functools.cache
def print_once(text: str) -> None:
    """Print a line, the first time it is asked for."""
    distributed.print_on_rank0(text)


def stream_seeds(seed: int, prompts: list[str], ks: Iterable[int]) -> list[list[int]]:
    """Return a seed for each prompt and each k of ks: no row's random stream depends on others.

    A prompt that is there again gets other ones, by how often it was there before, so that equal
    lines of a file have texts of their own.
    """
    seen = Counter()
    seeds = []
    for prompt in prompts:
        repetition = []
        if seen[prompt]:
            repetition = [seen[prompt]]
        origins = [[seed, prompt, k, *repetition] for k in ks]
        seeds.append([int(storage.fingerprint(origin), 16) % 2**63 for origin in origins])
        seen[prompt] += 1
    return seeds
