"""What decides a text besides the weights: what ends it, generation_config.json, random streams."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import distributed
import storage

if TYPE_CHECKING:
    from transformers import PreTrainedModel as Model
    from transformers import PreTrainedTokenizerBase as Tokenizer

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
