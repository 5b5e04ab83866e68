"""Single files and pairs of them: majority votes, McNemar's test, completions to read.

    python evaluate.py show FILE         # wrong, right and unreadable completions; --disagree:
                                         # those that the paper's and the flexible rules read apart
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
    wrong = n - correct
    all_draws = math.comb(n, k)
    wrong_draws = math.comb(wrong, k)
    return 1 - Fraction(wrong_draws, all_draws)


def answers_by_question(graded: list[GradedRow], rules: str) -> dict[int, Answers]:
    """Return the answers to each sample_index, in order of completion."""
    questions = defaultdict(list)
    for row, outcome, verdicts in graded:
        verdict = verdicts[rules]
        is_right = outcome == "right"
        answer = Answer(verdict.prediction, is_right)
        index = row["sample_index"]
        questions[index].append(answer)
    return dict(questions)


def mean_pass_at_k(questions: list[Answers], k: int) -> float:
    """Return pass@k over questions, in %, rounded as an accuracy is: pass@1 is the accuracy."""
    total = Fraction(0)
    for answers in questions:
        n = len(answers)
        right = [answer for answer in answers if answer.is_right]
        correct = len(right)
        total += pass_at_k(n, correct, k)
    mean = 100 * total / len(questions)
    return round(float(mean), 2)


class Ballot(NamedTuple):
    """The majority of each question's first k answers; k: as many as every question has."""

    k: int
    is_right: dict[int, bool]  # {sample_index: whether the majority is right}


def hold_vote(questions: dict[int, Answers]) -> Ballot:
    """Vote on every question of a file: the one count that tables, scores and tests share."""
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
    by_index = answers_by_question(graded, rules)
    k, is_right = hold_vote(by_index)
    if k < 2:
        return None
    questions = list(by_index.values())
    n = len(questions)
    agreed = sum(is_right.values())
    low, high = evaluate.wilson_interval(agreed, n)
    passed = {}
    size = 1
    while size < k:
        passed[size] = mean_pass_at_k(questions, size)
        size *= 2
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
        in_a = a[name].strip()
        in_b = b[name].strip()
        if in_a != in_b:
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
    answers_a = answers_by_question(a, rules)
    answers_b = answers_by_question(b, rules)
    k_a, right_a = hold_vote(answers_a)
    k_b, right_b = hold_vote(answers_b)
    pairs = []
    for i, is_right in right_a.items():
        if i in right_b:
            pairs.append((is_right, right_b[i]))
    n = len(pairs)
    both, first, second, _ = count_right(pairs)
    n_a = both + first
    n_b = both + second
    p = mcnemar(first, second)
    how = "right"
    if max(k_a, k_b) > 1:
        how = f"right by the majority of {k_a} and {k_b} answers"
    shares = f"{100 * n_a / n:.2f}% and {100 * n_b / n:.2f}%"
    test = f"{first} against {second}, p = {p:.3g}"
    print(f"{n} questions: {shares} {how}; exact McNemar test: {test}")


def grade_judged(path: str, rules: str) -> list[GradedRow]:
    """Read and grade a file without the questions of its validation share; say how many."""
    metadata, rows = completions.read_completions(path)
    aside = set(metadata.get("validation") or [])
    judged = []
    for row in rows:
        if row["sample_index"] not in aside:
            judged.append(row)
    if len(judged) < len(rows):
        print(f"{path}: its {len(aside)} validation questions are left out")
    return evaluate.grade_rows(metadata, judged, rules)


def print_difference(path: str, graded: GradedRow) -> None:
    """Print a completion that the other file has otherwise."""
    row, outcome, verdicts = graded
    if outcome == "unreadable":
        outcome = "wrong"
    evaluate.print_completion(f"{outcome} in {path}", row, verdicts)


def diff(*, a: str, b: str, rules: str, limit: int) -> None:
    """Print the completions on which one file is right and the other is not, counts and a test.

    Raises UserError where the files share no completion or differ in a question or gold answer.
    """
    graded_a = grade_judged(a, rules)
    graded_b = grade_judged(b, rules)
    pairs = pair_completions(graded_a, graded_b)
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
    more = len(unlike) - limit
    if more > 0:
        print(f"\n... and {more} more (--limit)")
    both, first, second, neither = count_right(right)
    print(
        f"\n{len(pairs)} completions in both files: {both} right in both, {first} in the first "
        f"alone, {second} in the second alone, {neither} in neither"
    )
    print_mcnemar(graded_a, graded_b, rules)


# ---------------- Completions to read


def print_some(name: str, rows: list[GradedRow], total: int, limit: int) -> None:
    """Say how many completions of a file are of a kind, and print the first of them."""
    n = len(rows)
    shown = ""
    if n > limit:
        shown = f"; the first {limit}:"
    print(f"\n{n} of {total} are {name}{shown}")
    for row, _, verdicts in rows[:limit]:
        evaluate.print_completion(name, row, verdicts)


def print_outcomes(graded: list[GradedRow], limit: int) -> None:
    """Print the first `limit` wrong, right and unreadable completions."""
    by_outcome = defaultdict(list)
    for one in graded:
        by_outcome[one.outcome].append(one)
    for kind in ("wrong", "right", "unreadable"):
        found = by_outcome[kind]
        print_some(kind, found, len(graded), limit)


DISAGREEMENTS = {  # (right by the paper's rules, by the flexible rules): what to call it
    (False, True): "right by the flexible rules alone",
    (True, False): "right by the paper's rules alone",
    (False, False): "wrong by both, with different answers",
}


def is_other_answer(a: object, b: object) -> bool:
    """Tell whether two predictions differ in more than how they are written: '18.00' and 18."""
    if a in (None, ""):
        return b not in (None, "")
    if b in (None, ""):
        return True
    first = str(a)
    second = str(b)
    try:
        return float(first) != float(second)
    except ValueError:
        return first.lower() != second.lower()


def print_disagreements(graded: list[GradedRow], limit: int) -> None:
    """Print the first `limit` completions of each kind on which the two sets of rules differ."""
    found = {kind: [] for kind in DISAGREEMENTS}
    for one in graded:
        paper = one.verdicts["paper"]
        flexible = one.verdicts["flexible"]
        kind = (paper.correct, flexible.correct)
        if kind not in found:
            continue
        if any(kind) or is_other_answer(paper.prediction, flexible.prediction):
            found[kind].append(one)
    for kind, name in DISAGREEMENTS.items():
        print_some(name, found[kind], len(graded), limit)


def show(*, file: str, rules: str, limit: int, disagree: bool) -> None:
    """Print some wrong, right and unreadable completions of a file, or where the rules differ."""
    graded = grade_judged(file, rules)
    if disagree:
        print_disagreements(graded, limit)
    else:
        print_outcomes(graded, limit)


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
