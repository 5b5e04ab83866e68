"""Tables beside the paper's values, majority votes, paired comparisons, single completions.

python evaluate.py table [--format markdown]     # methods x tasks, from everything in saved/
python evaluate.py show FILE                     # wrong, right and unreadable completions
python evaluate.py diff FILE FILE                # where two runs differ, and McNemar's test
"""

from __future__ import annotations

import argparse
import json
import math
import operator
import re
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import evaluate
import tasks
from completions import read_completions
from extras import paper
from storage import UserError

# ---------------- Several answers to a question: majority vote (self-consistency) and pass@k

Record = dict[str, Any]  # a JSON object
Graded = list[tuple]  # what evaluate.grade_rows gives: (row, outcome, {rules: Verdict})
Answers = list[tuple[object, bool]]  # of one question: (prediction, is right)


def majority(answers: Answers) -> bool:
    """Tell whether the most frequent answer is right.

    Unreadable answers have no vote; of equally frequent ones the first wins:
    [("7", True), ("8", False)] -> True.
    """
    cast = [answer for answer in answers if answer[0] not in (None, "")]
    if not cast:
        return False
    [(winner, _)] = Counter(prediction for prediction, _ in cast).most_common(1)
    return dict(cast)[winner]


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Return the probability that k of n answers, drawn without replacement, hold a right one.

    1 - C(n - correct, k) / C(n, k), the unbiased estimate of Chen et al. (2021).
    """
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def answers_by_question(graded: Graded, rules: str) -> dict[int, Answers]:
    """Return the answers to each sample_index, in order of completion."""
    questions = defaultdict(list)
    for row, outcome, verdicts in graded:
        answer = (verdicts[rules].prediction, outcome == "right")
        questions[row["sample_index"]].append(answer)
    return dict(questions)


def mean_pass_at_k(questions: list[Answers], k: int) -> float:
    """Return pass@k over questions, in %."""
    total = 0.0
    for answers in questions:
        correct = sum(is_right for _, is_right in answers)
        total += pass_at_k(len(answers), correct, k)
    return round(100 * (total / len(questions)), 2)


def votes(graded: Graded, rules: str) -> Record | None:
    """Count majority and pass@k of graded completions; None where a question has one answer.

    k: answers that every question has at least; maj: % of the questions whose majority is right,
    maj_low and maj_high: its 95% interval; pass: {size: % of draws of so many with a right one}.
    """
    questions = list(answers_by_question(graded, rules).values())
    n = len(questions)
    k = min(map(len, questions))
    if k < 2:
        return None
    agreed = sum(majority(answers[:k]) for answers in questions)
    low, high = evaluate.wilson_interval(agreed, n)
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64, 128) if size < k]
    return {
        "k": k,
        "questions": n,
        "maj": round(100 * agreed / n, 2),
        "maj_low": round(low, 2),
        "maj_high": round(high, 2),
        "pass": {size: mean_pass_at_k(questions, size) for size in [*sizes, k]},
    }


def score_with_votes(
    path: Path, part: str, split: str, data_dir: str, rules: str, allow_partial: bool
) -> evaluate.Score:
    """Return evaluate.score of a file, with "votes" where every question has several answers."""
    file = read_completions(path)
    score, graded = evaluate.score_rows(path, *file, part, split, data_dir, rules, allow_partial)
    counted = votes(graded, rules)
    if counted is None:
        return score
    return score | {"votes": counted}


def describe_votes(score: evaluate.Score, data_dir: str = "data") -> str:
    """Write the votes of a score as one line; count them first where it has none."""
    if "votes" not in score:
        file, part, split, rules = (score[name] for name in ("file", "part", "split", "rules"))
        score = score_with_votes(file, part, split, data_dir, rules, allow_partial=False)
    counted = score["votes"]
    passed = ", ".join(f"pass@{k} {share:.2f}%" for k, share in counted["pass"].items())
    text = "maj@{k} {maj:.2f}% [{maj_low:.1f}, {maj_high:.1f}] of {questions} questions; "
    return text.format(**counted) + passed


# ---------------- Two runs on the same questions


def mcnemar(first: int, second: int) -> float:
    """Return p of the exact McNemar test (two-sided binomial test with 1/2).

    first, second: questions on which one of the two runs alone is right.  p is the probability of
    a split at least as uneven where both runs are equally good: mcnemar(1, 5) == 14 / 64.
    """
    n = first + second
    tail = sum(math.comb(n, i) for i in range(min(first, second) + 1))
    return min(1.0, 2 * tail / 2**n)


PLACE = operator.itemgetter("sample_index", "completion_index")


def pair_completions(first: Graded, second: Graded) -> list[tuple[tuple, tuple]]:
    """Pair graded completions by PLACE; [] where a question or gold answer of two differs."""
    others = {PLACE(row): (row, *grades) for row, *grades in second}
    pairs = [(one, others[PLACE(one[0])]) for one in first if PLACE(one[0]) in others]
    for (row, *_), (other, *_) in pairs:
        if any(row[name].strip() != other[name].strip() for name in ("question", "answer")):
            return []
    return pairs


def count_right(pairs: list[tuple[bool, bool]]) -> tuple[int, int, int, int]:
    """Count the pairs that are right in both, in the first alone, the second alone, in neither."""
    counts = Counter(pairs)
    return counts[True, True], counts[True, False], counts[False, True], counts[False, False]


def print_mcnemar(a: Graded, b: Graded, rules: str) -> None:
    """Print the test over questions, by majority where they have several answers."""
    first = answers_by_question(a, rules)
    second = answers_by_question(b, rules)
    pairs = [(majority(first[i]), majority(second[i])) for i in first if i in second]
    n = len(pairs)
    both, only_first, only_second, _ = count_right(pairs)
    shares = (100 * (both + only_first) / n, 100 * (both + only_second) / n)
    p = mcnemar(only_first, only_second)
    text = "{} questions: {:.2f}% and {:.2f}% right; exact McNemar test: {} against {}, p = {:.3g}"
    print(text.format(n, *shares, only_first, only_second, p))


def diff(*, a: str, b: str, rules: str, limit: int) -> None:
    """Print the completions on which one file is right and the other is not, counts and a test.

    Raises UserError where the files share no completion or differ in a question or gold answer.
    """
    first = evaluate.grade_rows(*read_completions(a), rules)
    second = evaluate.grade_rows(*read_completions(b), rules)
    pairs = pair_completions(first, second)
    if not pairs:
        raise UserError(
            f"{a} and {b} hold no completions of the same questions and gold answers: "
            "compare two files of one task"
        )
    right = [(one[1] == "right", other[1] == "right") for one, other in pairs]
    unlike = [pair for pair, (one, other) in zip(pairs, right, strict=True) if one != other]
    for pair in unlike[:limit]:
        for path, (row, outcome, verdicts) in zip((a, b), pair, strict=True):
            title = outcome.replace("unreadable", "wrong")
            evaluate.print_completion(f"{title} in {path}", row, verdicts)
    if len(unlike) > limit:
        print(f"\n... and {len(unlike) - limit} more (--limit)")
    text = (
        "\n{} completions in both files: {} right in both, {} in the first alone, "
        "{} in the second alone, {} in neither"
    )
    print(text.format(len(pairs), *count_right(right)))
    print_mcnemar(first, second, rules)


# ---------------- The runs in saved/, each known by what made it


class RunKey(NamedTuple):
    """What a table's row is: all that is known of a run but its task and the number of its epoch.

    Runs that differ in one field are two rows; the text of a row is made when it is printed.
    """

    model: str
    method: str
    train_key: str | None  # None: prompted, not fine-tuned
    part: str  # what is scored: "test" of students, "all" of teachers, as in the paper
    split: str
    samples: int = 1  # answers of a student to a question
    temperature: str = "0"  # of these, as recorded
    seed: str = "0"
    epoch: str = ""  # how it was chosen
    vote: str = ""  # "maj@4", "pass@4": of several answers to a question
    seeds: tuple[str, ...] = ()  # of a row that is the mean over them


class ScoredFile(NamedTuple):
    """A completion file: what run it is of, and how good."""

    key: RunKey
    score: evaluate.Score
    made_with: str  # the recorded settings but the seed and the epoch, as JSON
    validation: float | None  # accuracy on the validation share, %
    votes: Record | None


class Cell(NamedTuple):
    """An accuracy in %, with its 95% interval or its standard deviation over seeds."""

    accuracy: float
    low: float = 0.0
    high: float = 0.0
    spread: float = 0.0


Runs = dict[tuple[RunKey, str], list[ScoredFile]]  # {(run, task): its epochs in order}
Table = dict[RunKey, dict[str, Cell]]  # {row: {task: cell}}


def run_key(path: Path, metadata: Record, settings: Record) -> RunKey:
    """Return what a completion file is of; of an untrained toy student the name has the seed.

    D_toy__S_default_s1.json -> seed 1
    """
    model, method = (metadata.get(name) or "?" for name in ("base_model", "completion_key"))
    split = metadata.get("split") or "default"
    train_key = metadata.get("train_key")
    if not (train_key or metadata.get("finetune_key") or metadata.get("part") == "test"):
        return RunKey(model, method, train_key, "all", split)
    seed = settings.get("seed") or 0
    in_name = re.search(r"__S_.*_s(\d+)(?:__K_|$)", path.stem)
    if in_name:
        seed = in_name[1]
    temperature = (metadata.get("settings") or {}).get("temperature") or 0
    key = RunKey(model, method, train_key, "test", split)
    return key._replace(temperature=str(temperature), seed=str(seed))


def score_file(path: Path, data_dir: str, rules: str, allow_partial: bool) -> ScoredFile:
    """Score a file on the part that its run is judged by, and on its validation share.

    Raises UserError where it cannot be read or lacks samples of the part.
    """
    file = read_completions(path)
    metadata = file[0]
    settings = (metadata.get("run") or {}) | (metadata.get("settings") or {})
    key = run_key(path, metadata, settings)
    how = (key.split, data_dir, rules, allow_partial)
    score, graded = evaluate.score_rows(path, *file, key.part, *how)
    validation = None
    if metadata.get("validation"):
        validation = evaluate.score_rows(path, *file, "validation", *how)[0]["accuracy"]
    counted = votes(graded, rules)
    if counted and key.part == "test":
        key = key._replace(samples=counted["k"])
    for name in ("seed", "epoch", "model"):  # "model" is a hash of the seed, too
        settings.pop(name, None)
    return ScoredFile(key, score, json.dumps(settings, sort_keys=True), validation, counted)


def scored_runs(
    paths: Iterable[Path], data_dir: str, rules: str = "paper", allow_partial: bool = False
) -> tuple[Runs, list[str]]:
    """Score completion files; return their runs, and a sentence for each file without a score."""
    runs = defaultdict(list)
    skipped = []
    for path in paths:
        try:
            scored = score_file(path, data_dir, rules, allow_partial)
        except UserError as error:
            skipped.append(str(error))
        else:
            runs[scored.key, scored.score["task"]].append(scored)
    for epochs in runs.values():
        epochs.sort(key=lambda scored: scored.score["epoch"] or 0)
    return dict(runs), skipped


def saved_files(saved: str) -> list[Path]:
    """Return every completion file in the folder `saved`."""
    return sorted(Path(saved, "completion_data").glob("B_*/*.json"))


# ---------------- The table: methods x tasks


def chosen_epochs(epochs: list[ScoredFile]) -> dict[str, ScoredFile]:
    """Return {how it was chosen: epoch}: the last, the best on test, the best on validation."""
    last = epochs[-1]
    name = "last epoch"
    if last.score["epoch"] is None:
        name = ""
    chosen = {name: last}
    if len(epochs) > 1:
        best = max(epochs, key=lambda scored: scored.score["accuracy"])
        chosen["best test epoch (the paper's protocol)"] = best
    if all(scored.validation is not None for scored in epochs):
        chosen["epoch chosen on validation"] = max(epochs, key=lambda scored: scored.validation)
    return chosen


def row_cells(key: RunKey, scored: ScoredFile) -> Iterator[tuple[RunKey, Cell]]:
    """Yield the rows of one file: its accuracy and, of several answers, majority and pass@k."""
    score = scored.score
    yield key, Cell(score["accuracy"], score["low"], score["high"])
    counted = scored.votes
    if counted:
        k = counted["k"]
        agreed = Cell(counted["maj"], counted["maj_low"], counted["maj_high"])
        yield key._replace(vote=f"maj@{k}"), agreed
        n = counted["questions"]
        passed = counted["pass"][k]
        interval = evaluate.wilson_interval(passed / 100 * n, n)
        yield key._replace(vote=f"pass@{k}"), Cell(passed, *interval)


def without_seed(key: RunKey) -> RunKey:
    """ft_cot_s1 of seed 1 -> ft_cot: what runs with other seeds have in common."""
    train_key = key.train_key
    if train_key:
        train_key = train_key.removesuffix(f"_s{key.seed}")
    return key._replace(train_key=train_key, seed="0")


def collect(
    paths: Iterable[Path], data_dir: str, rules: str = "paper", allow_partial: bool = False
) -> tuple[Table, list[str]]:
    """Score completion files into a table; return it, and a sentence for each file left out.

    Rows whose keys and recorded settings differ in nothing but the seed have a mean beside them.
    """
    runs, skipped = scored_runs(paths, data_dir, rules, allow_partial)
    table = defaultdict(dict)
    groups = defaultdict(dict)  # {(key without seed, task, settings): {seed: accuracy}}
    for (key, task), epochs in runs.items():
        for choice, scored in chosen_epochs(epochs).items():
            for row, cell in row_cells(key._replace(epoch=choice), scored):
                table[row][task] = cell
                groups[without_seed(row), task, scored.made_with][row.seed] = cell.accuracy
    for (key, task, _), by_seed in groups.items():
        if len(by_seed) > 1:
            row = key._replace(seeds=tuple(sorted(by_seed)))
            accuracies = by_seed.values()
            spread = statistics.stdev(accuracies)
            table[row][task] = Cell(statistics.mean(accuracies), spread=spread)
    return dict(table), skipped


def row_label(key: RunKey) -> str:
    """'ft_cot, last epoch', 'zs_cot, all questions': what a row is called where that is enough."""
    parts = [key.train_key or key.method]
    if key.part == "all":
        parts.append("all questions")
    if key.samples > 1:
        parts.append(f"{key.samples} samples a question")
    parts += filter(None, (key.epoch, key.vote))
    if key.seeds:
        parts.append(f"mean of {len(key.seeds)} seeds")
    return ", ".join(parts)


def row_labels(keys: Iterable[RunKey]) -> dict[RunKey, str]:
    """Label rows; of rows of a model that would read the same, name the fields that differ.

    zs on two splits -> 'zs, split default' and 'zs, split template'
    """
    namesakes = defaultdict(list)
    for key in keys:
        namesakes[key.model, row_label(key)].append(key)
    labels = {}
    for (_, label), same in namesakes.items():
        columns = zip(RunKey._fields, zip(*same, strict=True), strict=True)
        varied = [name for name, values in columns if len(set(values)) > 1]
        for key in same:
            labels[key] = ", ".join([label, *(f"{name} {getattr(key, name)}" for name in varied)])
    return labels


# ---------------- The table as text


def paper_value(results: paper.Results, key: RunKey, task: str) -> float | None:
    """Return the published accuracy of the same model, method and task, or None.

    None of another split, learning rate or seed, of a vote or a mean: not the paper's cell.
    """
    if key.split != "default" or key.vote or key.seeds:
        return None
    return paper.accuracy(results, key.model, key.method, key.train_key, task)


Lines = list[list[str]]


def row_order(key: RunKey, label: str) -> tuple:
    """Put teachers first, then sort by model, method and label, 2aug before 16aug."""
    place = -1
    if key.method in paper.METHODS:
        place = list(paper.METHODS).index(key.method)
    natural = re.sub(r"[0-9]+", lambda digits: digits[0].zfill(9), label)
    return (key.part != "all", key.model, place, natural)


def table_lines(table: Table, results: paper.Results) -> Lines:
    """Return a head, a random guess, and of each row accuracies, intervals, the paper's values.

    Columns are the tasks in the paper's order; a row without published values has no such line.
    """
    seen = set().union(*table.values())
    columns = {key: row for key, row in tasks.TASKS.items() if key in seen}

    def line(model: str, name: str, form: str, cells: Record) -> list[str]:
        """Write cells into their columns, each in the given form."""
        values = [form.format(cells[task]) if task in cells else "-" for task in columns]
        return [model, name, *values]

    lines = [
        line("model", "method", "{0.name}", columns),
        line("", "random guess", "{0.random:.2f}", columns),
    ]
    labels = row_labels(table)
    for key in sorted(table, key=lambda key: row_order(key, labels[key])):
        cells = table[key]
        lines.append(line(key.model, labels[key], "{0.accuracy:.2f}", cells))
        if key.seeds:
            lines.append(line("", "  standard deviation", "{0.spread:.2f}", cells))
        else:
            lines.append(line("", "  95% interval", "[{0.low:.1f}, {0.high:.1f}]", cells))
        published = {task: paper_value(results, key, task) for task in cells}
        known = {task: value for task, value in published.items() if value is not None}
        if known:
            lines.append(line("", "  paper", "{:.2f}", known))
    return lines


def terminal(lines: Lines) -> list[str]:
    """Align columns: names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    form = "{:<%d}  {:<%d}" + "  {:>%d}" * (len(widths) - 2)
    return [(form % tuple(widths)).format(*line).rstrip() for line in lines]


def markdown(lines: Lines) -> list[str]:
    """Write a table of GitHub's Markdown."""
    rows = [f"| {' | '.join(map(str.strip, line))} |" for line in lines]
    return [rows[0], "|---|---|" + "--:|" * (len(lines[0]) - 2), *rows[1:]]


def latex(lines: Lines) -> list[str]:
    """Write a booktabs tabular: '  95% interval' -> '\\quad 95\\% interval'"""
    rows = []
    for line in lines:
        escaped = [re.sub(r"([&%#_])", r"\\\1", text) for text in line]
        indented = [re.sub(r"^  ", r"\\quad ", text) for text in escaped]
        rows.append(" & ".join(indented) + r" \\")
    head = r"\begin{tabular}{ll" + "r" * (len(lines[0]) - 2) + "}"
    return [head, r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule", r"\end{tabular}"]


FORMATS = {"terminal": terminal, "markdown": markdown, "latex": latex}


def print_table(table: Table, skipped: list[str], format: str = "terminal") -> None:
    """Print a table in one of FORMATS; what has no score is named on stderr."""
    print("\n".join(FORMATS[format](table_lines(table, paper.read_results()))))
    for message in skipped:
        print(f"not in the table: {message}", file=sys.stderr)


# ---------------- Commands of evaluate.py


def table(*, saved: str, data: str, rules: str, allow_partial: bool, format: str) -> None:
    """Print methods x tasks, beside the paper's values.  Raises UserError where there are none."""
    rows, skipped = collect(saved_files(saved), data, rules, allow_partial)
    if not rows:
        reason = "".join(f": {message}" for message in skipped[:1])
        raise UserError(f"there is nothing to show under {saved}/completion_data{reason}")
    print_table(rows, skipped, format)


def show(*, file: str, rules: str, limit: int) -> None:
    """Print some wrong, right and unreadable completions of a file."""
    graded = evaluate.grade_rows(*read_completions(file), rules)
    for kind in ("wrong", "right", "unreadable"):
        found = [(row, verdicts) for row, outcome, verdicts in graded if outcome == kind]
        shown = ""
        if len(found) > limit:
            shown = f"; the first {limit}:"
        print(f"\n{len(found)} of {len(graded)} are {kind}{shown}")
        for row, verdicts in found[:limit]:
            evaluate.print_completion(kind, row, verdicts)


RULES_FLAG = {
    "choices": ["paper", "flexible"],
    "default": "paper",
    "help": "answer cleansing that decides (default paper)",
}


def add_saved_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of what reads everything in --saved: table and plot."""
    add = parser.add_argument
    add("--saved", default="saved", help="folder that runs write to (default saved)")
    parser.add_argument("--rules", **RULES_FLAG)
    add("--data", default="data", help="folder of the prepared benchmarks (default data)")
    add("--allow_partial", action="store_true", help="score files that lack samples of the part")


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add table, show and diff to the command line of evaluate.py."""
    parser = commands.add_parser("table", help="methods x tasks, beside the paper's values")
    parser.add_argument("--format", choices=FORMATS, default="terminal", help="default terminal")
    add_saved_flags(parser)
    parser.set_defaults(run=table)
    text = "read wrong, right and unreadable completions of a file"
    parser = commands.add_parser("show", help=text)
    parser.add_argument("file", help="completion file")
    parser.add_argument("--limit", type=int, default=5, help="completions of each kind (default 5)")
    parser.add_argument("--rules", **RULES_FLAG)
    parser.set_defaults(run=show)
    text = "the questions on which two completion files differ, and the exact McNemar test"
    parser = commands.add_parser("diff", help=text)
    parser.add_argument("a", help="completion file")
    parser.add_argument("b", help="another, of the same task")
    parser.add_argument("--limit", type=int, default=20, help="completions to print (default 20)")
    parser.add_argument("--rules", **RULES_FLAG)
    parser.set_defaults(run=diff)
