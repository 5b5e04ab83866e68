"""Curation beyond the paper's rule, which keeps the rationales whose answer is right.

All of it is off by default.  Each flag drops some rationales and says how many.  A new filter is a
function in FILTERS, a field of FilterConfig and a flag.
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import storage
import tasks
from storage import UserError

Row = dict[str, Any]  # a completion


class FilterConfig(NamedTuple):
    """Which rationales a student learns from; the defaults are the paper's."""

    filter: str = "right"  # of right, wrong, all; random: as many as are right, of all
    max_rationale_words: int = 0  # 0: no limit
    max_per_question: int = 0  # 0: no limit
    max_similarity: float = 1.0  # share of word trigrams that two of a question may have in common
    drop_unfinished: bool = False  # those that the teacher's token limit cut off
    drop_duplicates: bool = False  # within a question
    seed: int = 0  # of filter "random"


# ---------------- Which rationales: the right ones, or, for studies, others


def with_own_answer(row: Row, verdict: tasks.Verdict) -> Row:
    """Return the row with the answer that its rationale gives, so that label and rationale agree.

    A number is written as people do: 43.0 -> "43".
    """
    if verdict.correct:
        return row
    answer = verdict.prediction
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    return row | {"answer": str(answer)}


def select_rationales(config: FilterConfig, graded: list[tuple[Row, tasks.Verdict]]) -> list[Row]:
    """Return the rows that config.filter names.

    Wrong ones keep their teacher's answer; one without a readable answer cannot be a sample.
    """
    right = [row for row, verdict in graded if verdict.correct]
    if config.filter == "right":
        return right
    readable = [pair for pair in graded if pair[1].prediction not in (None, "")]
    wrong = [pair for pair in readable if not pair[1].correct]
    print(
        f"curate: --filter {config.filter}: {len(right)} of {len(graded)} rationales are right, "
        f"{len(wrong)} wrong, {len(graded) - len(readable)} have no readable answer"
    )
    selected = readable
    if config.filter == "wrong":
        selected = wrong
    elif config.filter == "random":
        drawn = random.Random(config.seed).sample(range(len(readable)), len(right))
        selected = [readable[i] for i in sorted(drawn)]
    return [with_own_answer(*pair) for pair in selected]


# ---------------- Which of those to drop


def word_trigrams(text: str) -> set:
    """'a b c d' -> {('a', 'b', 'c'), ('b', 'c', 'd')}; of fewer than three words the words."""
    words = text.lower().split()
    return {*zip(words, words[1:], words[2:], strict=False)} or {*words}


def similarity(a: str, b: str) -> float:
    """Return the share of all word trigrams of two texts that both have (Jaccard)."""
    trigrams_a = word_trigrams(a)
    trigrams_b = word_trigrams(b)
    return len(trigrams_a & trigrams_b) / max(1, len(trigrams_a | trigrams_b))


def is_unfinished(config: FilterConfig, row: Row, text: str, kept: list[str]) -> bool:
    """Tell whether the teacher's token limit cut the rationale off."""
    reason = row.get("reasoning_finish_reason") or row.get("finish_reason")
    return config.drop_unfinished and reason == "length"


def is_too_long(config: FilterConfig, row: Row, text: str, kept: list[str]) -> bool:
    """Tell whether the rationale has more than --max_rationale_words."""
    return 0 < config.max_rationale_words < len(text.split())


def is_duplicate(config: FilterConfig, row: Row, text: str, kept: list[str]) -> bool:
    """Tell whether the question has the same rationale already."""
    return config.drop_duplicates and text in kept


def is_similar(config: FilterConfig, row: Row, text: str, kept: list[str]) -> bool:
    """Tell whether the rationale is too similar to an earlier one of its question."""
    limit = config.max_similarity
    return limit < 1 and any(similarity(text, other) > limit for other in kept)


def is_surplus(config: FilterConfig, row: Row, text: str, kept: list[str]) -> bool:
    """Tell whether the question has --max_per_question rationales already."""
    return 0 < config.max_per_question <= len(kept)


Filter = Callable[[FilterConfig, Row, str, list[str]], bool]  # kept: texts of the question so far
FILTERS: dict[str, Filter] = {  # reason to drop a rationale, in the order of asking
    "unfinished": is_unfinished,
    "too long": is_too_long,
    "a duplicate": is_duplicate,
    "similar to another": is_similar,
    "one too many of its question": is_surplus,
}


def apply_filters(config: FilterConfig, rows: list[Row]) -> list[Row]:
    """Return the rows for which no filter gives a reason; print how many each dropped.

    Raises UserError where none is left.
    """
    kept_rows = []
    kept_texts = defaultdict(list)  # {sample_index: texts}
    dropped = Counter()
    for row in rows:
        text = tasks.rationale_of(row).strip()
        kept = kept_texts[row["sample_index"]]
        reasons = (reason for reason, drops in FILTERS.items() if drops(config, row, text, kept))
        reason = next(reasons, None)
        if reason:
            dropped[reason] += 1
        else:
            kept.append(text)
            kept_rows.append(row)
    for reason, count in dropped.items():
        print(f"curate: dropped {count} of {len(rows)} rationales: {reason}")
    if rows and not kept_rows:
        counts = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise UserError(
            f"none of {len(rows)} rationales is left ({counts}): loosen the flags of curation"
        )
    return kept_rows


# ---------------- To be read


def show_samples(path: Path, count: int) -> None:
    """Print `count` samples of a fine-tuning file, evenly spaced, as the student reads them."""
    if path.suffix == ".jsonl":
        samples = [json.dumps(row, indent=2) for row in storage.read_jsonl(path)]
    else:
        columns = storage.read_finetune_data(path).values()
        text = "sample {}\n  input: {!r}\n  label: {!r}"
        samples = [text.format(*sample) for sample in zip(*columns, strict=True)]
    count = min(count, len(samples))
    for i in range(count):
        print(f"\n{samples[i * len(samples) // count]}")
