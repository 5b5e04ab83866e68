"""Choose the next token of each row, and tell when its completion ends.

Shapes: B rows that are decoded side by side, V tokens in the vocabulary.  torch is imported in
functions, so that `finetune_cot.py --help` does not wait for it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import models
from storage import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase as Tokenizer


class Sampling(NamedTuple):
    """How tokens are chosen, and what ends a completion."""

    temperature: float  # 0: greedy
    top_p: float  # sample from the most probable tokens that reach this share together; 1: all
    stop: list[str] | None  # strings that end a completion and are cut off


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


def sample_tokens(
    logits: Tensor, temperature: float, generators: list[torch.Generator], top_p: float = 1.0
) -> Tensor:
    """Draw the next token (B,) of each row, from a stream of its own: no row depends on others."""
    import torch

    draws = []
    for generator in generators:
        draws.append(torch.rand(1, dtype=torch.float64, generator=generator))
    uniform = torch.stack(draws).to(logits.device)
    return tokens_at(uniform, logits, temperature, top_p)


def tokens_at(draws: Tensor, logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Return the tokens (B,) at draws (B, 1) from 0 to 1, of rows of logits (B, V).

    Of the fewest most probable tokens that reach top_p together (Holtzman et al. 2020).
    """
    import torch

    scaled = logits.double() / temperature
    probs = torch.softmax(scaled, -1)
    if top_p < 1:
        ranked, order = probs.sort(-1, descending=True)
        share_of_likelier = ranked.cumsum(-1) - ranked
        ranked = ranked.masked_fill(share_of_likelier >= top_p, 0)
        probs = probs.scatter(-1, order, ranked)
    cumulative = probs.cumsum(-1)
    thresholds = draws * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, thresholds, right=True)
    last_token = logits.shape[-1] - 1
    return tokens[:, 0].clamp(max=last_token)


def next_tokens(logits: Tensor, rows: list[Row], sampling: Sampling) -> Tensor:
    """Choose each row's next token (B,).  Raises UserError where logits are NaN or infinite."""
    tokens = logits.argmax(-1)  # a NaN is the largest
    largest = logits.gather(1, tokens[:, None])[:, 0]
    is_finite = largest.isfinite()
    if not is_finite.all():
        row = rows[is_finite.tolist().index(False)]
        number = len(row.new_ids) + 1
        raise UserError(
            f"prompt {row.index}: the model's logits are NaN or infinite at new token "
            f"{number}: its weights are damaged, or too large for this --precision"
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
    for place, token in enumerate(tokens.tolist()):
        row = rows[place]
        row.new_ids.append(token)
        is_full = len(row.new_ids) >= row.max_new_tokens
        is_ended = token in eos
        if not (is_full or is_ended or shows_stop(tokenizer, row.new_ids, stop)):
            unfinished.append(place)
            continue
        text = text_after(tokenizer, row.before, row.new_ids)
        cuts = [text.find(string) for string in stop or () if string in text]
        if cuts or is_ended:
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
    most_bytes = max(len(string.encode()) for string in stop)
    last = ids[-most_bytes - 1 :]
    tail = tokenizer.decode(last, skip_special_tokens=True)
    return any(string in tail for string in stop)


def text_after(tokenizer: Tokenizer, before: list[int], ids: list[int]) -> str:
    """Return the text of ids after the tokens before: Llama's tokenizers drop a text's first space.

    So `step by step.` goes on with ` First`, not with `First`.
    """
    text = tokenizer.decode(ids, skip_special_tokens=True)
    head = tokenizer.decode(before, skip_special_tokens=True)
    whole = tokenizer.decode(before + ids, skip_special_tokens=True)
    spaced = f" {text}"
    if whole == head + spaced:
        return spaced
    return text
