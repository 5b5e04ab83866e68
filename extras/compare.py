"""Single files and pairs of them: majority votes, McNemar's test, completions to read.

    python evaluate.py show FILE         # wrong, right and unreadable completions
    python evaluate.py diff FILE FILE    # where two runs differ, and McNemar's test

All of it is about the questions that a file is judged by: those of its --validation share, which
choose an epoch, are left out.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter, defaultdict
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import completions
import evaluate
from completions import Completion
from evaluate import GradedRow
from extras import disagreements
from storage import UserError

Record = dict[str, Any]  # a JSON object


# ---------------- Several answers to a question: majority vote (self-consistency) and pass@k


class Answer(NamedTuple):
    """One answer to a question."""

    prediction: object
    is_right: bool


Answers = list[Answer]  # of one question


def majority(answers: Answers) -> bool:
    """Tell whether the most frequent answer is right.

    Unreadable answers have no vote; of equally frequent ones the first wins:
    [("7", True), ("8", False)] -> True.
    """
    counts = Counter()
    is_right = {}
    for prediction, right in answers:
        if prediction in (None, ""):
            continue
        counts[prediction] += 1
        is_right[prediction] = right
    if not counts:
        return False
    [(winner, _)] = counts.most_common(1)
    return is_right[winner]


def pass_at_k(n: int, correct: int, k: int) -> Fraction:
    """Return the probability that k of n answers, drawn without replacement, hold a right one.

    1 - C(n - correct, k) / C(n, k), the unbiased estimate of Chen et al. (2021).
    """
    all_draws = math.comb(n, k)
    wrong_draws = math.comb(n - correct, k)
    return 1 - Fraction(wrong_draws, all_draws)


def answers_by_question(graded: list[GradedRow], rules: str) -> dict[int, Answers]:
    """Return the answers to each sample_index, in order of completion."""
    questions = defaultdict(list)
    for row, outcome, verdicts in graded:
        prediction = verdicts[rules].prediction
        is_right = outcome == "right"
        answer = Answer(prediction, is_right)
        questions[row["sample_index"]].append(answer)
    return dict(questions)


def mean_pass_at_k(questions: list[Answers], k: int) -> float:
    """Return pass@k over questions, in %, rounded as an accuracy is: pass@1 is the accuracy."""
    total = Fraction(0)
    for answers in questions:
        n = len(answers)
        correct = sum(answer.is_right for answer in answers)
        total += pass_at_k(n, correct, k)
    mean = 100 * total / len(questions)
    return round(float(mean), 2)


class Ballot(NamedTuple):
    """The majority of each question's first k answers; k: as many as every question has."""

    k: int
    is_right: dict[int, bool]  # {sample_index: whether the majority is right}


def hold_vote(graded: list[GradedRow], rules: str) -> Ballot:
    """Vote on every question of a file: the one count that tables, scores and tests share."""
    questions = answers_by_question(graded, rules)
    k = min(map(len, questions.values()))
    is_right = {}
    for i, answers in questions.items():
        first_k = answers[:k]
        is_right[i] = majority(first_k)
    return Ballot(k, is_right)


def votes(graded: list[GradedRow], rules: str) -> Record | None:
    """Count majority and pass@k of graded completions; None where a question has one answer.

    k: answers that every question has at least; maj: % of the questions whose majority is right,
    maj_low and maj_high: its 95% interval; pass: {size: % of draws of so many with a right one}.
    """
    k, is_right = hold_vote(graded, rules)
    if k < 2:
        return None
    by_index = answers_by_question(graded, rules)
    questions = list(by_index.values())
    n = len(questions)
    agreed = sum(is_right.values())
    low, high = evaluate.wilson_interval(agreed, n)
    passed = {}
    for size in (1, 2, 4, 8, 16, 32, 64, 128):
        if size < k:
            passed[size] = mean_pass_at_k(questions, size)
    passed[k] = mean_pass_at_k(questions, k)
    return {
        "k": k,
        "questions": n,
        "maj": round(100 * agreed / n, 2),
        "maj_low": round(low, 2),
        "maj_high": round(high, 2),
        "pass": passed,
    }


def score_with_votes(
    path: Path, part: str, split: str | None, data_dir: str, rules: str, allow_partial: bool
) -> evaluate.Score:
    """Return evaluate.score of a file, with "votes" where every question has several answers."""
    file = completions.read_completions(path)
    score, graded = evaluate.score_rows(path, *file, part, split, data_dir, rules, allow_partial)
    counted = votes(graded, rules)
    if counted is None:
        return score
    return score | {"votes": counted}


def describe_votes(score: evaluate.Score, data_dir: str = "data") -> str:
    """Write the votes of a score as one line; count them first where it has none."""
    if "votes" not in score:
        score = score_with_votes(
            score["file"],
            score["part"],
            score["split"],
            data_dir,
            score["rules"],
            allow_partial=False,
        )
    counted = score["votes"]
    low = counted["maj_low"]
    high = counted["maj_high"]
    vote = f"maj@{counted['k']} {counted['maj']:.2f}% [{low:.1f}, {high:.1f}]"
    parts = []
    for k, share in counted["pass"].items():
        parts.append(f"pass@{k} {share:.2f}%")
    passed = ", ".join(parts)
    return f"{vote} of {counted['questions']} questions; {passed}"


# ---------------- Two runs on the same questions


def mcnemar(first: int, second: int) -> float:
    """Return p of the exact McNemar test (two-sided binomial test with 1/2).

    first, second: questions on which one of the two runs alone is right.  p is the probability of
    a split at least as uneven where both runs are equally good: mcnemar(1, 5) == 14 / 64.
    """
    n = first + second
    smaller = min(first, second)
    tail = 0
    for i in range(smaller + 1):
        tail += math.comb(n, i)
    p = 2 * tail / 2**n
    return min(1.0, p)


def place(row: Completion) -> tuple[int, int]:
    """Return what names a completion in every file of a task."""
    return row["sample_index"], row["completion_index"]


def is_same_sample(a: Completion, b: Completion) -> bool:
    """Tell whether two completions are of the same question with the same gold answer."""
    for name in ("question", "answer"):
        if a[name].strip() != b[name].strip():
            return False
    return True


def pair_completions(
    first: list[GradedRow], second: list[GradedRow]
) -> list[tuple[GradedRow, GradedRow]]:
    """Pair the completions that both files have; [] where a question or gold answer differs."""
    others = {}
    for graded in second:
        others[place(graded.row)] = graded
    pairs = []
    for one in first:
        other = others.get(place(one.row))
        if other is None:
            continue
        if not is_same_sample(one.row, other.row):
            return []
        pairs.append((one, other))
    return pairs


class Counts(NamedTuple):
    """How often two runs are right on the same things."""

    both: int
    first: int  # alone
    second: int  # alone
    neither: int


def count_right(pairs: list[tuple[bool, bool]]) -> Counts:
    """Count the pairs that are right in both, in the first alone, the second alone, in neither."""
    counts = Counter(pairs)
    return Counts(
        both=counts[True, True],
        first=counts[True, False],
        second=counts[False, True],
        neither=counts[False, False],
    )


def print_mcnemar(a: list[GradedRow], b: list[GradedRow], rules: str) -> None:
    """Print the test over questions, by majority where they have several answers."""
    ballot_a = hold_vote(a, rules)
    ballot_b = hold_vote(b, rules)
    pairs = []
    for i, in_a in ballot_a.is_right.items():
        in_b = ballot_b.is_right.get(i)
        if in_b is not None:
            pairs.append((in_a, in_b))
    n = len(pairs)
    counts = count_right(pairs)
    share_a = 100 * (counts.both + counts.first) / n
    share_b = 100 * (counts.both + counts.second) / n
    p = mcnemar(counts.first, counts.second)
    how = "right"
    if max(ballot_a.k, ballot_b.k) > 1:
        how = f"right by the majority of {ballot_a.k} and {ballot_b.k} answers"
    print(
        f"{n} questions: {share_a:.2f}% and {share_b:.2f}% {how}; exact McNemar test: "
        f"{counts.first} against {counts.second}, p = {p:.3g}"
    )


def grade_judged(path: str, rules: str) -> list[GradedRow]:
    """Read and grade a file without the questions of its validation share; say how many."""
    metadata, rows = completions.read_completions(path)
    aside = set(metadata.get("validation") or [])
    judged = [row for row in rows if row["sample_index"] not in aside]
    if len(judged) < len(rows):
        print(f"{path}: its {len(aside)} validation questions are left out")
    return evaluate.grade_rows(metadata, judged, rules)


def print_difference(path: str, graded: GradedRow) -> None:
    """Print a completion that the other file has otherwise."""
    title = graded.outcome.replace("unreadable", "wrong")
    evaluate.print_completion(f"{title} in {path}", graded.row, graded.verdicts)


def diff(*, a: str, b: str, rules: str, limit: int) -> None:
    """Print the completions on which one file is right and the other is not, counts and a test.

    Raises UserError where the files share no completion or differ in a question or gold answer.
    """
    first = grade_judged(a, rules)
    second = grade_judged(b, rules)
    pairs = pair_completions(first, second)
    if not pairs:
        raise UserError(
            f"{a} and {b} hold no completions of the same questions and gold answers: "
            "compare two files of one task"
        )
    right = []
    unlike = []
    for one, other in pairs:
        is_first = one.outcome == "right"
        is_second = other.outcome == "right"
        right.append((is_first, is_second))
        if is_first != is_second:
            unlike.append((one, other))
    for one, other in unlike[:limit]:
        print_difference(a, one)
        print_difference(b, other)
    if len(unlike) > limit:
        print(f"\n... and {len(unlike) - limit} more (--limit)")
    counts = count_right(right)
    print(
        f"\n{len(pairs)} completions in both files: {counts.both} right in both, "
        f"{counts.first} in the first alone, {counts.second} in the second alone, "
        f"{counts.neither} in neither"
    )
    print_mcnemar(first, second, rules)


# ---------------- Completions to read


def show(*, file: str, rules: str, limit: int, disagree: bool) -> None:
    """Print some wrong, right and unreadable completions of a file, or where the rules differ."""
    if disagree:
        disagreements.show_disagreements(file=file, limit=limit)
        return
    graded = grade_judged(file, rules)
    for kind in ("wrong", "right", "unreadable"):
        found = [one for one in graded if one.outcome == kind]
        disagreements.print_some(kind, found, len(graded), limit)


# ---------------- Commands of evaluate.py

RULES_FLAG = {
    "choices": ["paper", "flexible"],
    "default": "paper",
    "help": "answer cleansing that decides (default paper)",
}


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add show and diff to the command line of evaluate.py."""
    text = "read wrong, right and unreadable completions of a file"
    parser = commands.add_parser("show", help=text)
    parser.add_argument("file", help="completion file")
    parser.add_argument("--limit", type=int, default=5, help="completions of each kind (default 5)")
    parser.add_argument("--rules", **RULES_FLAG)
    text = "instead, those that the two sets of rules read differently"
    parser.add_argument("--disagree", action="store_true", help=text)
    parser.set_defaults(run=show)
    text = "the questions on which two completion files differ, and the exact McNemar test"
    parser = commands.add_parser("diff", help=text)
    parser.add_argument("a", help="completion file")
    parser.add_argument("b", help="another, of the same task")
    parser.add_argument("--limit", type=int, default=20, help="completions to print (default 20)")
    parser.add_argument("--rules", **RULES_FLAG)
    parser.set_defaults(run=diff)
