"""Tables beside the paper's values.

    python evaluate.py table [--format markdown]     # methods x tasks, from everything in saved/
    python evaluate.py table --task svamp --method ft ft_cot --format csv

A row is a run (extras/runs.py), or the mean over runs that differ in nothing but the seed, in
whose place it stands; --each shows these too.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import evaluate
import tasks
from extras import paper, runs
from extras.compare import RULES_FLAG
from extras.runs import (
    EVERYTHING,
    RunKey,
    ScoredFile,
    Wanted,
    row_labels,
    run_name,
    saved_files,
    scored_runs,
)
from storage import UserError, default_folder
from terminal import one_of

# ---------------- The table: methods x tasks


class Cell(NamedTuple):
    """An accuracy in %, with its 95% interval or its standard deviation over seeds."""

    accuracy: float
    low: float | None = None
    high: float | None = None
    spread: float | None = None
    no_answer: int | None = None  # answers that could not be read; None of a vote: not counted
    n: int = 0  # answers or, of a vote, questions


Record = dict[str, Any]  # a JSON object
Table = dict[RunKey, dict[str, Cell]]  # {row: {task: cell}}


def last_epoch_name(last: ScoredFile) -> str:
    """Return what the last evaluated epoch of a run is called; "" where there are no epochs."""
    epoch = last.score["epoch"]
    if epoch is None:
        return ""
    flags = dict(last.key.flags)
    planned = flags.get("epochs", str(epoch))
    if str(epoch) != planned:
        return f"epoch {epoch} of {planned}"
    return "last epoch"


def chosen_epochs(epochs: list[ScoredFile]) -> dict[str, ScoredFile]:
    """Return {how it was chosen: epoch}: the last, the best on test, the best on validation."""
    last = epochs[-1]
    name = last_epoch_name(last)
    chosen = {name: last}
    if len(epochs) > 1:
        best = max(epochs, key=lambda scored: scored.score["accuracy"])
        chosen["best test epoch (the paper's protocol)"] = best
    if None not in [scored.validation for scored in epochs]:
        best = max(epochs, key=lambda scored: scored.validation)
        chosen["epoch chosen on validation"] = best
    return chosen


def row_cells(key: RunKey, scored: ScoredFile) -> Iterator[tuple[RunKey, Cell]]:
    """Yield the rows of one file: its accuracy and, of several answers, majority and pass@k."""
    score = scored.score
    whole = {name: score[name] for name in ("accuracy", "low", "high", "no_answer", "n")}
    yield key, Cell(**whole)
    counted = scored.votes
    if not counted:
        return
    k = counted["k"]
    n = counted["questions"]
    agreed = key._replace(vote=f"maj@{k}")
    yield agreed, Cell(counted["maj"], counted["maj_low"], counted["maj_high"], n=n)
    accuracy = counted["pass"][k]
    right = accuracy / 100 * n
    low, high = evaluate.wilson_interval(right, n)
    passed = key._replace(vote=f"pass@{k}")
    yield passed, Cell(accuracy, low, high, n=n)


def mean_cell(cells: Iterable[Cell]) -> Cell:
    """Return mean and standard deviation over seeds, and their answers together."""
    accuracies = []
    unread = []
    n = 0
    for cell in cells:
        accuracies.append(cell.accuracy)
        unread.append(cell.no_answer)
        n += cell.n
    mean = statistics.mean(accuracies)
    spread = statistics.stdev(accuracies)
    no_answer = None
    if None not in unread:
        no_answer = sum(unread)
    return Cell(mean, spread=spread, no_answer=no_answer, n=n)


def add_mean(table: Table, group: tuple, of_seeds: list[tuple[RunKey, Cell]], each: bool) -> None:
    """Put the mean of a group of seeds into the table: in their place or, with each, beside them.

    group: what these have in common (runs.seed_group).  A seed that is there twice has no mean.
    """
    rows, cells = zip(*of_seeds, strict=True)
    seeds = {row.seed for row in rows}
    if len(rows) == 1 or len(seeds) < len(rows):
        return
    common, task, *_ = group
    in_order = sorted(seeds)
    mean = common._replace(seeds=tuple(in_order))
    table[mean][task] = mean_cell(cells)
    if not each:
        for row in rows:
            del table[row][task]


def collect(
    paths: Iterable[Path],
    data_dir: str,
    rules: str = "paper",
    allow_partial: bool = False,
    wanted: Wanted = EVERYTHING,
    each: bool = False,
) -> tuple[Table, list[str]]:
    """Score completion files into a table; return it, and sentences about what is left out.

    Runs that agree in everything but the seed are one row, their mean; with each, rows beside it.
    """
    found, skipped = scored_runs(paths, data_dir, rules, allow_partial, wanted)
    table = defaultdict(dict)
    groups = defaultdict(list)  # {what seeds have in common: (row, cell)}
    for (key, task), epochs in found.items():
        for choice, scored in chosen_epochs(epochs).items():
            chosen = key._replace(epoch=choice)
            for row, cell in row_cells(chosen, scored):
                table[row][task] = cell
                group = runs.seed_group(row, epochs)
                groups[group].append((row, cell))
    for group, of_seeds in groups.items():
        add_mean(table, group, of_seeds, each)
    rows = {key: cells for key, cells in table.items() if cells}
    messages = [f"not in the table: {message}" for message in skipped]
    messages += runs.describe_unknown(found)
    return rows, messages


# ---------------- The table as text


def paper_value(results: paper.Results, key: RunKey, task: str) -> float | None:
    """Return the published accuracy of the same model, method and task, or None.

    None of another split, learning rate or seed, or of a vote: not the paper's cell.  A mean over
    seeds has one: it stands in the place of the run that has the paper's settings.
    """
    if key.split != "default" or key.vote:
        return None
    return paper.accuracy(results, key.model, key.method, key.train_key, task)


Line = list[str]
Lines = list[Line]
KEY_COLUMN = "key"  # what the files of a run are called
TEXT_COLUMNS = ("model", "method", KEY_COLUMN)  # all others hold numbers


def row_order(key: RunKey, label: str) -> tuple:
    """Put teachers first, then sort by model, method and label, D = 2 before D = 16."""
    place = -1
    methods = list(paper.METHODS)
    if key.method in methods:
        place = methods.index(key.method)
    natural = ""
    for part in re.split(r"(\d+)", label):
        width = 0
        if part.isdigit():
            width = 9
        natural += part.zfill(width)
    is_student = key.part != "all"
    return (is_student, key.model, place, natural)


def in_order(table: Table) -> list[tuple[RunKey, str]]:
    """Return the rows and their labels, in the order of the table."""
    labels = row_labels(table)
    rows = labels.items()
    return sorted(rows, key=lambda row: row_order(*row))


def table_line(
    model: str, name: str, columns: Iterable[str], values: dict[str, str], files: str = ""
) -> Line:
    """Put the values of tasks into their columns, and what the files are called at the end."""
    shown = [values.get(task, "-") for task in columns]
    return [model, name, *shown, files]


def row_lines(
    key: RunKey, label: str, columns: list[str], cells: dict[str, Cell], published: dict[str, float]
) -> Lines:
    """Return a row's accuracies and, below them, what is known of each: indented lines."""
    accuracies = {}
    below = {}
    unread = {}
    for task, cell in cells.items():
        accuracies[task] = f"{cell.accuracy:.2f}"
        if key.seeds:
            below[task] = f"{cell.spread:.2f}"
        else:
            below[task] = f"[{cell.low:.1f}, {cell.high:.1f}]"
        if cell.no_answer:
            unread[task] = f"{cell.no_answer}/{cell.n}"
    name = "  95% interval"
    if key.seeds:
        name = "  standard deviation"
    lines = [
        table_line(key.model, label, columns, accuracies, run_name(key)),
        table_line("", name, columns, below),
    ]
    if unread:
        lines.append(table_line("", "  without an answer", columns, unread))
    if published:
        values = {task: f"{value:.2f}" for task, value in published.items()}
        lines.append(table_line("", "  paper", columns, values))
    return lines


def published_values(results: paper.Results, key: RunKey, names: Iterable[str]) -> dict[str, float]:
    """Return {task: the paper's value} of those of these tasks that have one."""
    published = {}
    for task in names:
        value = paper_value(results, key, task)
        if value is not None:
            published[task] = value
    return published


def table_lines(table: Table, results: paper.Results) -> Lines:
    """Return a head, a random guess, and of each row accuracies, intervals, the paper's values.

    Columns are the tasks in the paper's order and, where any has a name of its own, what the files
    of a run are called; a row without published values has no such line, nor one whose answers
    could all be read a line of those that could not.
    """
    seen = set().union(*table.values())
    columns = [task for task in tasks.TASKS if task in seen]
    names = {}
    guesses = {}
    for task in columns:
        row = tasks.TASKS[task]
        names[task] = row.name
        guesses[task] = f"{row.random:.2f}"
    lines = [
        table_line("model", "method", columns, names, KEY_COLUMN),
        table_line("", "random guess", columns, guesses),
    ]
    for key, label in in_order(table):
        cells = table[key]
        published = published_values(results, key, cells)
        lines += row_lines(key, label, columns, cells, published)
    file_names = [line[-1] for line in lines[1:]]
    if any(file_names):
        return lines
    return [line[:-1] for line in lines]


def terminal(lines: Lines) -> list[str]:
    """Align columns: names to the left, numbers to the right."""
    columns = []
    for column in zip(*lines, strict=True):
        widths = map(len, column)
        width = max(widths)
        align = str.rjust
        if column[0] in TEXT_COLUMNS:
            align = str.ljust
        columns.append([align(cell, width) for cell in column])
    aligned = []
    for cells in zip(*columns, strict=True):
        row = "  ".join(cells)
        aligned.append(row.rstrip())
    return aligned


def alignments(lines: Lines, left: str, right: str) -> str:
    """Return `left` for every column of text, `right` for every column of numbers."""
    columns = ""
    for head in lines[0]:
        if head in TEXT_COLUMNS:
            columns += left
        else:
            columns += right
    return columns


def markdown(lines: Lines) -> list[str]:
    """Write a table of GitHub's Markdown."""
    rows = []
    for line in lines:
        cells = [text.strip() for text in line]
        row = " | ".join(cells)
        rows.append(f"| {row} |")
    rule = alignments(lines, "---|", "--:|")
    rows.insert(1, f"|{rule}")
    return rows


def latex(lines: Lines) -> list[str]:
    """Write a booktabs tabular: '  95% interval' -> '\\quad 95\\% interval'"""
    rows = []
    for line in lines:
        cells = []
        for text in line:
            escaped = re.sub(r"([&%#_])", r"\\\1", text)
            indented = re.sub(r"^  ", r"\\quad ", escaped)
            cells.append(indented)
        row = " & ".join(cells)
        rows.append(row + r" \\")
    columns = alignments(lines, "l", "r")
    head = r"\begin{tabular}{" + columns + "}"
    return [head, r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule", r"\end{tabular}"]


# ---------------- The table for other programs: a record a (run, task)


def round_or_none(value: float | None) -> float | None:
    """Round a share to the 0.01% of the table."""
    if value is None:
        return None
    return round(value, 2)


def make_record(key: RunKey, label: str, task: str, cell: Cell, value: float | None) -> Record:
    """Return what is known of a cell, shares in %.  value: the paper's.  None: there is none.

    Of a mean over seeds there is a standard deviation and no interval.
    """
    seeds = key.seeds or (key.seed,)
    if key.part == "all":
        seeds = ()  # a teacher's key has none
    return {
        "model": key.model,
        "run": label,
        "key": run_name(key),
        "method": key.method,
        "task": task,
        "split": key.split,
        "seeds": " ".join(seeds),
        "epoch": key.epoch,
        "vote": key.vote,
        "accuracy": round_or_none(cell.accuracy),
        "low": round_or_none(cell.low),
        "high": round_or_none(cell.high),
        "standard_deviation": round_or_none(cell.spread),
        "n": cell.n,
        "no_answer": cell.no_answer,
        "paper": value,
        "flags": dict(key.flags),
    }


def records(table: Table, results: paper.Results) -> list[Record]:
    """Return the cells of a table, row by row, tasks in the paper's order."""
    found = []
    for key, label in in_order(table):
        cells = table[key]
        for task in tasks.TASKS:
            if task not in cells:
                continue
            value = paper_value(results, key, task)
            record = make_record(key, label, task, cells[task], value)
            found.append(record)
    return found


def as_json(found: list[Record]) -> str:
    """Write a list of objects; "flags" has all that is recorded of how a run was made."""
    return json.dumps(found, indent=1)


def as_csv(found: list[Record]) -> str:
    """Write comma-separated values with a head; what is not there is empty."""
    columns = list(found[0])
    columns.remove("flags")
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return file.getvalue().removesuffix("\n")


TEXT_FORMATS = {"terminal": terminal, "markdown": markdown, "latex": latex}
RECORD_FORMATS = {"csv": as_csv, "json": as_json}
FORMATS = (*TEXT_FORMATS, *RECORD_FORMATS)


def print_table(table: Table, messages: list[str], format: str = "terminal") -> None:
    """Print a table in one of FORMATS; what is left out or unknown is named on stderr."""
    results = paper.read_results()
    if format in RECORD_FORMATS:
        write = RECORD_FORMATS[format]
        text = write(records(table, results))
    else:
        write = TEXT_FORMATS[format]
        lines = table_lines(table, results)
        text = "\n".join(write(lines))
    print(text)
    for message in messages:
        print(message, file=sys.stderr)


# ---------------- Commands of evaluate.py


def table(
    *,
    saved: str,
    data: str,
    rules: str,
    allow_partial: bool,
    task: Sequence[str],
    student: Sequence[str],
    method: Sequence[str],
    each: bool,
    format: str,
) -> None:
    """Print methods x tasks, beside the paper's values.  Raises UserError where there are none."""
    wanted = Wanted(task, student, method)
    paths = saved_files(saved)
    rows, messages = collect(paths, data, rules, allow_partial, wanted, each)
    if not rows:
        reason = ""
        if messages:
            reason = f": {messages[0]}"
        asked = runs.describe_wanted(wanted)
        raise UserError(f"there is nothing{asked} to show under {saved}/completion_data{reason}")
    print_table(rows, messages, format)


def add_filter_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose among the runs in --saved: of table and plot."""
    add = parser.add_argument
    names = {"nargs": "+", "metavar": "NAME", "default": ()}
    task = one_of(list(tasks.TASKS))
    add("--task", type=task, help="only these tasks (default all)", **names)
    add("--student", help="only these models (default all)", **names)
    method = one_of([*tasks.PROMPTED, *tasks.FINE_TUNED])
    add("--method", type=method, help="only these methods (default all)", **names)


def add_saved_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of what reads everything in --saved: table and plot."""
    add = parser.add_argument
    saved = default_folder("saved")
    add("--saved", default=saved, help="folder that runs write to (default the project's saved)")
    parser.add_argument("--rules", **RULES_FLAG)
    data = default_folder("data")
    add("--data", default=data, help="folder of the prepared benchmarks (default the project's)")
    add("--allow_partial", action="store_true", help="score files that lack samples of the part")


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add table to the command line of evaluate.py."""
    parser = commands.add_parser("table", help="methods x tasks, beside the paper's values")
    text = "default terminal; csv, json: a row a run and task, for other programs"
    parser.add_argument("--format", choices=FORMATS, default="terminal", help=text)
    text = "show every seed, too, not only mean and standard deviation over seeds"
    parser.add_argument("--each", action="store_true", help=text)
    add_filter_flags(parser)
    add_saved_flags(parser)
    parser.set_defaults(run=table)
