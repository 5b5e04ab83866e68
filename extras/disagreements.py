"""Where the paper's and the flexible rules read a completion differently.

python evaluate.py show FILE --disagree [--limit 5]
"""

from __future__ import annotations

import evaluate
from completions import read_completions
from evaluate import GradedRow

KINDS = {  # (right by the paper's rules, by the flexible rules): what to call it
    (False, True): "right by the flexible rules alone",
    (True, False): "right by the paper's rules alone",
    (False, False): "wrong by both, with different answers",
}


def is_other_answer(a: object, b: object) -> bool:
    """Tell whether two predictions differ in more than how they are written: '18.00' and 18."""
    if a in (None, "") or b in (None, ""):
        return a not in (None, "") or b not in (None, "")
    try:
        return float(str(a)) != float(str(b))
    except ValueError:
        return str(a).lower() != str(b).lower()


def show_disagreements(*, file: str, limit: int) -> None:
    """Print the completions of a file on which the two sets of rules differ, `limit` of a kind."""
    graded = evaluate.grade_rows(*read_completions(file), "paper")
    found = {kind: [] for kind in KINDS}
    for one in graded:
        paper = one.verdicts["paper"]
        flexible = one.verdicts["flexible"]
        kind = paper.correct, flexible.correct
        if kind in KINDS and (any(kind) or is_other_answer(paper.prediction, flexible.prediction)):
            found[kind].append(one)
    for kind, name in KINDS.items():
        print_some(name, found[kind], len(graded), limit)


def print_some(name: str, rows: list[GradedRow], total: int, limit: int) -> None:
    """Say how many completions of a file are of a kind, and print the first of them."""
    shown = ""
    if len(rows) > limit:
        shown = f"; the first {limit}:"
    print(f"\n{len(rows)} of {total} are {name}{shown}")
    for one in rows[:limit]:
        evaluate.print_completion(name, one.row, one.verdicts)
