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

    filter: str = "right"  # right, wrong, all; random: as many of all as are right
    max_rationale_words: int = 0  # 0: no limit
    max_per_question: int = 0  # 0: no limit
    max_similarity: float = 1.0  # share of word trigrams that two of a question may have in common
    drop_unfinished: bool = False  # those that the teacher's token limit cut off
    drop_duplicates: bool = False  # within a question
    seed: int = 0  # of filter "random"


# ---------------- Which rationales: the right ones, or, for studies, others


GradedRows = list[tuple[Row, tasks.Verdict]]


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


def choose_rationales(config: FilterConfig, graded: GradedRows) -> list[Row]:
    """Return the rows to learn from: what config.filter names, less what the other flags drop.

    Wrong ones keep their teacher's answer; one without a readable answer cannot be a sample.
    random: as many as are right, drawn among all; both are counted after the other flags, so that
    a student of it sees as many rationales as one of the right ones.
    """
    right = []
    wrong = []
    readable = []  # both, in the order of the file
    for row, verdict in graded:
        if verdict.prediction in (None, ""):
            continue
        own = with_own_answer(row, verdict)
        readable.append(own)
        if verdict.correct:
            right.append(own)
        else:
            wrong.append(own)
    if config.filter == "right":
        return apply_filters(config, right)
    total = len(graded)
    unread = total - len(readable)
    print(
        f"curate: --filter {config.filter}: {len(right)} of {total} rationales are right, "
        f"{len(wrong)} wrong, {unread} have no readable answer"
    )
    if config.filter == "wrong":
        return apply_filters(config, wrong)
    rows = apply_filters(config, readable)
    if config.filter == "random":
        wanted = len(split_by_filters(config, right).kept)
        return draw_rows(rows, wanted, config.seed)
    return rows


def draw_rows(rows: list[Row], wanted: int, seed: int) -> list[Row]:
    """Draw as many rows as wanted, in their order; all where there are fewer, and say so."""
    n = len(rows)
    if n < wanted:
        print(f"curate: --filter random: {n} are left, fewer than the {wanted} right ones")
        return rows
    rng = random.Random(seed)
    drawn = rng.sample(range(n), wanted)
    drawn.sort()
    print(f"curate: --filter random: drew {wanted} of {n}, as many as are right")
    return [rows[i] for i in drawn]


# ---------------- Which of those to drop


def word_trigrams(text: str) -> set:
    """'a b c d' -> {('a', 'b', 'c'), ('b', 'c', 'd')}; of fewer than three words the words."""
    words = text.lower().split()
    trigrams = zip(words, words[1:], words[2:], strict=False)
    return set(trigrams) or set(words)


def similarity(a: str, b: str) -> float:
    """Return the share of all word trigrams of two texts that both have (Jaccard)."""
    trigrams_a = word_trigrams(a)
    trigrams_b = word_trigrams(b)
    shared = trigrams_a & trigrams_b
    union = trigrams_a | trigrams_b
    return len(shared) / max(1, len(union))


def is_unfinished(config: FilterConfig, row: Row, text: str, kept: list[str]) -> bool:
    """Tell whether the teacher's token limit cut the rationale off."""
    reason = row.get("reasoning_finish_reason")
    if not reason:
        reason = row.get("finish_reason")
    is_cut = reason == "length"
    return config.drop_unfinished and is_cut


def is_too_long(config: FilterConfig, row: Row, text: str, kept: list[str]) -> bool:
    """Tell whether the rationale has more than --max_rationale_words."""
    limit = config.max_rationale_words
    words = text.split()
    return 0 < limit < len(words)


def is_duplicate(config: FilterConfig, row: Row, text: str, kept: list[str]) -> bool:
    """Tell whether the question has the same rationale already."""
    if not config.drop_duplicates:
        return False
    return text in kept


def is_similar(config: FilterConfig, row: Row, text: str, kept: list[str]) -> bool:
    """Tell whether the rationale is too similar to an earlier one of its question."""
    limit = config.max_similarity
    if limit == 1:
        return False
    for other in kept:
        if similarity(text, other) > limit:
            return True
    return False


def is_surplus(config: FilterConfig, row: Row, text: str, kept: list[str]) -> bool:
    """Tell whether the question has --max_per_question rationales already."""
    limit = config.max_per_question
    if limit == 0:
        return False
    return len(kept) >= limit


Filter = Callable[[FilterConfig, Row, str, list[str]], bool]  # kept: texts of the question so far
FILTERS: dict[str, Filter] = {  # reason to drop a rationale, in the order of asking
    "unfinished": is_unfinished,
    "too long": is_too_long,
    "a duplicate": is_duplicate,
    "similar to another": is_similar,
    "one too many of its question": is_surplus,
}


class Filtered(NamedTuple):
    """What filters made of some rationales."""

    kept: list[Row]
    dropped: Counter[str]  # by the reason


def split_by_filters(config: FilterConfig, rows: list[Row]) -> Filtered:
    """Drop the rows for which a filter gives a reason, the first that does."""
    result = Filtered([], Counter())
    kept_texts = defaultdict(list)  # {sample_index: texts}
    for row in rows:
        text = tasks.rationale_of(row).strip()
        kept = kept_texts[row["sample_index"]]
        reason = first_reason(config, row, text, kept)
        if reason:
            result.dropped[reason] += 1
        else:
            kept.append(text)
            result.kept.append(row)
    return result


def first_reason(config: FilterConfig, row: Row, text: str, kept: list[str]) -> str | None:
    """Return why a rationale is dropped; None: it is kept."""
    for reason, drops in FILTERS.items():
        if drops(config, row, text, kept):
            return reason
    return None


def apply_filters(config: FilterConfig, rows: list[Row]) -> list[Row]:
    """Return the rows that no filter drops; print how many each dropped.

    Raises UserError where none is left.
    """
    n = len(rows)
    kept, dropped = split_by_filters(config, rows)
    counts = []
    for reason, count in dropped.items():
        print(f"curate: dropped {count} of {n} rationales: {reason}")
        counts.append(f"{count} {reason}")
    if rows and not kept:
        why = ", ".join(counts)
        raise UserError(f"none of {n} rationales is left ({why}): loosen the flags of curation")
    return kept


# ---------------- To be read


def show_samples(path: Path, count: int) -> None:
    """Print `count` samples of a fine-tuning file, evenly spaced, as the student reads them."""
    samples = []
    if path.suffix == ".jsonl":
        for row in storage.read_jsonl(path):
            text = json.dumps(row, indent=2)
            samples.append(text)
    else:
        columns = storage.read_finetune_data(path).values()
        for index, prompt, label in zip(*columns, strict=True):
            samples.append(f"sample {index}\n  input: {prompt!r}\n  label: {label!r}")
    total = len(samples)
    count = min(count, total)
    for i in range(count):
        place = i * total // count
        print(f"\n{samples[place]}")
