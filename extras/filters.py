"""Curation beyond the paper's rule, which keeps the rationales whose answer is right: all of it is off by default.

Each flag drops some rationales and says how many.  A new filter is one line in REASONS, and its flag.
"""

import json
import random
from collections import Counter, defaultdict

import tasks
import storage
from storage import UserError


def rationale_of(row):
    """The reasoning of a completion: step 1 of Zero-shot-CoT, or what stands before the sentence that states the answer."""
    if "reasoning_completion" in row:
        return row["reasoning_completion"] or ""
    return row["completion"].rpartition(tasks.PREFIXES["fs_cot"])[0]


# ---------------- Which rationales: the right ones, or, for studies, others


def answer_text(prediction):
    """A number that was read by value as it would be written: 43.0 -> '43'."""
    return (
        str(int(prediction))
        if isinstance(prediction, float) and prediction.is_integer()
        else str(prediction)
    )


def choose(args, judged):
    """-> rows by --filter, of [(row, Verdict)].  What is wrong keeps its teacher's answer, so that label and rationale agree; what has
    no readable answer cannot be a sample."""
    right = [row for row, verdict in judged if verdict.correct]
    if args.filter == "right":
        return right
    readable = [
        (
            row if verdict.correct else row | {"answer": answer_text(verdict.prediction)},
            verdict.correct,
        )
        for row, verdict in judged
        if verdict.prediction not in (None, "")
    ]
    wrong = [row for row, correct in readable if not correct]
    print(
        f"curate: --filter {args.filter}: {len(right)} of {len(judged)} rationales are right, {len(wrong)} wrong, "
        f"{len(judged) - len(readable)} have no readable answer"
    )
    if args.filter == "random":
        readable = [
            readable[i]
            for i in sorted(random.Random(args.data_seed).sample(range(len(readable)), len(right)))
        ]
    return wrong if args.filter == "wrong" else [row for row, _ in readable]


# ---------------- Which of those to leave out


def triples(text):
    """'a b c d' -> {('a', 'b', 'c'), ('b', 'c', 'd')}; of fewer than three words the words."""
    words = text.lower().split()
    return {*zip(words, words[1:], words[2:])} or {*words}


def similarity(a, b):
    """Of all word triples of two texts the share that both have (Jaccard)."""
    a = triples(a)
    b = triples(b)
    return len(a & b) / max(1, len(a | b))


def is_unfinished(row):
    return (row.get("reasoning_finish_reason") or row.get("finish_reason")) == "length"


REASONS = {  # why a rationale is left out: (flags, row, its text, the texts kept of its question so far) -> whether
    "unfinished": lambda args, row, text, kept: args.drop_unfinished and is_unfinished(row),
    "too long": lambda args, row, text, kept: 0 < args.max_rationale_words < len(text.split()),
    "a duplicate": lambda args, row, text, kept: args.drop_duplicates and text in kept,
    "similar to another": lambda args, row, text, kept: (
        args.max_similarity < 1
        and any(similarity(text, other) > args.max_similarity for other in kept)
    ),
    "one too many of its question": lambda args, row, text, kept: (
        0 < args.max_per_question <= len(kept)
    ),
}


def leave_out(args, rows):
    """-> the rows for which none of REASONS holds; says how many each dropped."""
    kept_rows = []
    texts = defaultdict(list)
    dropped = Counter()
    for row in rows:
        text = rationale_of(row).strip()
        kept = texts[row["sample_index"]]
        reason = next(
            (reason for reason, holds in REASONS.items() if holds(args, row, text, kept)), None
        )
        if reason:
            dropped[reason] += 1
        else:
            kept.append(text)
            kept_rows.append(row)
    for reason, count in dropped.items():
        print(f"curate: dropped {count} of {len(rows)} rationales: {reason}")
    if rows and not kept_rows:
        raise UserError(
            f"none of {len(rows)} rationales is left ({', '.join(f'{n} {reason}' for reason, n in dropped.items())}): "
            "loosen the flags of curation"
        )
    return kept_rows


# ---------------- For a human eye


def show(path, count):
    """Print `count` samples of a fine-tuning file, evenly spaced, as the student reads them."""
    if path.suffix == ".jsonl":
        samples = [json.dumps(row, indent=2) for row in storage.read_jsonl(path)]
    else:
        data = storage.read_finetune_data(path)
        samples = [
            f"sample {i}\n  input: {text!r}\n  label: {label!r}"
            for i, text, label in zip(*data.values())
        ]
    count = min(count, len(samples))
    for i in range(count):
        print(f"\n{samples[i * len(samples) // count]}")
