"""Figures of the studies: accuracy against degree, training questions, size, teacher or epoch.

    python evaluate.py plot degree --out degree.png [--task multiarith svamp] [--paper curie]

One panel a task; ours in black with the 95% interval (of several seeds: mean and standard
deviation), the paper's values in grey with hollow marks, a random guess dotted.  Line styles and
marks differ, so that it can be read without colour.  Needs matplotlib.
"""

from __future__ import annotations

import argparse
import io
import math
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import tasks
from extras import paper, report
from storage import UserError, write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "pdf", "svg")


class Kind(NamedTuple):
    """What a figure shows."""

    axis: str  # what of a run stands on the x axis
    title: str  # of that axis
    column: str = ""  # of paper_results.csv: what stands on the x axis
    table: str = " "  # of paper_results.csv: what the names of its tables begin with
    follows: str = ""  # the flag that changes with what stands on the x axis


KINDS = {
    "degree": Kind("degree", "D, rationales a question", "degree", "figure_diverse", "temperature"),
    "train_size": Kind(
        "questions", "training questions", "train_size", "figure_train_size", "split"
    ),
    "student": Kind("parameters", "parameters of the student"),
    "teacher": Kind("teacher", "teacher", "teacher", "figure_teachers"),
    "curves": Kind("epoch", "epoch"),
}
METHOD_NAMES = {name: method for method, name in paper.METHODS.items()}
LINES = ("-", "--", "-.", ":")
MARKS = "osD^v"
Band = tuple[float, float, float]  # middle, low, high of a point, in %


class Series(NamedTuple):
    """A line of a figure; the x None is of a run that has no x (ft has no degree)."""

    is_ours: bool
    points: dict[Any, Band]


Panels = dict[str, dict[str, Series]]  # {task: {name: series}}


# ---------------- What is drawn


def model_series(model: str) -> str:
    """gpt2-large, google_flan-t5-base -> gpt2, flan_t5: what sizes of a model have in common"""
    size = r"_(small|medium|base|large|xl|xxl|[\d.]+[mb])(_instruct)?$"
    return re.sub(size, "", paper.model_name(model).lower())


def run_flags(scored: report.ScoredFile, kind: str) -> report.Record:
    """Return what is known of a run, by which series are told apart."""
    key = scored.key
    model = key.model
    if kind == "student":
        model = model_series(model)
    known = {"model": model, "method": key.method, **scored.score["run"]}
    return known | {"split": key.split, "epoch": scored.score["epoch"]}


def series_name(run: report.Record, others: list[report.Record], kind: str) -> str:
    """'gpt2 ft_cot, lr 0.001': model, method, and the flags in which the runs of a task differ."""
    axis = KINDS[kind].axis
    ignored = {"model", "method", "seed", "epochs", "questions", "parameters", "epoch", axis}
    if run.get(axis) is not None:
        ignored.add(KINDS[kind].follows)
    parts = [f"{run['model']} {run['method']}"]
    for flag in run:
        values = {str(other[flag]) for other in others if flag in other}
        if flag not in ignored and len(values) > 1:
            parts.append(f"{flag} {run[flag]}")
    return ", ".join(parts)


def band(scores: list[report.Record]) -> Band:
    """Return the 95% interval of one score, or mean and standard deviation of several seeds."""
    accuracies = [score["accuracy"] for score in scores]
    middle = statistics.mean(accuracies)
    if len(scores) == 1:
        return middle, scores[0]["low"], scores[0]["high"]
    spread = statistics.stdev(accuracies)
    return middle, max(0, middle - spread), min(100, middle + spread)


def our_series(files: list[report.ScoredFile], kind: str) -> Panels:
    """Return the runs as series: runs that differ in x are points of one, in seed one point."""
    runs = defaultdict(list)
    for scored in files:
        runs[scored.score["task"]].append((run_flags(scored, kind), scored.score))
    panels = {}
    for task, some in runs.items():
        points = defaultdict(lambda: defaultdict(list))
        for run, score in some:
            name = series_name(run, [other for other, _ in some], kind)
            points[name][run.get(KINDS[kind].axis)].append(score)
        panels[task] = {}
        for name, scores in points.items():
            panels[task][name] = Series(True, {x: band(many) for x, many in scores.items()})
    return panels


def paper_point(row: dict[str, str], kind: str) -> tuple[str, Any]:
    """Return (what the paper's series is called, x) of a row of paper_results.csv; x may be ""."""
    if kind == "student" and row["table"].endswith("_students"):
        return row["table"].removesuffix("_students"), 1e6 * paper.SIZES.get(row["model"], 0)
    if not row["table"].startswith(KINDS[kind].table):
        return "", ""
    x = row[KINDS[kind].column]
    if x and kind != "teacher":
        return row["model"], float(x)
    return row["model"], x


def paper_series(kind: str, models: set[str]) -> Panels:
    """Return the values of the paper's tables and figures for these students as series."""
    panels = defaultdict(dict)
    for row in paper.read_rows():
        if row["model"] not in models or row["method"] not in METHOD_NAMES:
            continue
        model, x = paper_point(row, kind)
        if x:
            name = f"paper: {model} {METHOD_NAMES[row['method']]}"
            accuracy = float(row["accuracy"])
            series = panels[row["dataset"]].setdefault(name, Series(False, {}))
            series.points[x] = (accuracy, accuracy, accuracy)
    return dict(panels)


# ---------------- Drawing


def draw_points(
    panel: Axes, name: str, series: Series, at: dict[Any, float], style: tuple, shade: float
) -> None:
    """Draw marks, the line through them (if any) and the band; at: {x: where it stands}."""
    line, mark = style
    xs = list(at.values())
    middle, low, high = zip(*(series.points[x] for x in at), strict=True)
    colors = {"color": "0.5", "markerfacecolor": "white"}
    if series.is_ours:
        colors = {"color": "black", "markerfacecolor": "black"}
    panel.plot(
        xs, middle, linestyle=line, marker=mark, markersize=5, linewidth=1.2, label=name, **colors
    )
    if series.is_ours:
        below = [m - end for m, end in zip(middle, low, strict=True)]
        above = [end - m for m, end in zip(middle, high, strict=True)]
        bars = {"fmt": "none", "ecolor": "black", "elinewidth": 0.7, "capsize": 2}
        panel.errorbar(xs, middle, yerr=[below, above], **bars)
        if line != "none":
            panel.fill_between(xs, low, high, color="black", alpha=shade, linewidth=0)


def draw_series(panel: Axes, lines: dict[str, Series], styles: dict, names: list[str]) -> None:
    """Draw the series of one task: what has no x as a level line and its band.

    Where x is one of names it is no scale: marks stand side by side and are not joined.
    """
    shade = 0.36 / max(3, len(lines))
    for i, (name, series) in enumerate(lines.items()):
        line, mark = styles[name]
        if None in series.points:
            middle, low, high = series.points[None]
            panel.axhline(middle, linestyle=line, color="black", linewidth=0.8, label=name)
            panel.axhspan(low, high, color="black", alpha=shade, linewidth=0)
            continue
        at = {x: x for x in sorted(series.points)}
        if names:
            shift = 0.1 * (i - (len(lines) - 1) / 2)
            at = {x: names.index(x) + shift for x in at}
            line = "none"
        draw_points(panel, name, series, at, (line, mark), shade)


def size_name(parameters: float) -> str:
    """124e6 -> '124M', 6.7e9 -> '6.7B', 1000 -> '0.001M'"""
    if parameters >= 1e9:
        return f"{parameters / 1e9:.3g}B"
    return f"{parameters / 1e6:.3g}M"


def set_x_axis(panel: Axes, kind: str, xs: list, names: list[str]) -> None:
    """Put ticks at xs, the x of a task's points, or at names."""
    panel.set_xlabel(KINDS[kind].title)
    if names or not xs:
        panel.set_xticks(range(len(names)), names, rotation=20, ha="right", fontsize=8)
        panel.set_xlim(-0.5, max(1, len(names)) - 0.5)
    elif kind == "curves":
        panel.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        panel.set_xlim(xs[0] - 0.3, xs[-1] + 0.3)
    else:
        base = 10
        if kind == "degree":
            base = 2
        labels = [f"{x:g}" for x in xs]
        if kind == "student":
            labels = [size_name(x) for x in xs]
        panel.set_xscale("log", base=base)
        panel.set_xticks(xs, labels)
        panel.minorticks_off()


def draw_panel(
    panel: Axes, task: str, kind: str, lines: dict[str, Series], styles: dict, names: list[str]
) -> None:
    """Draw one task.  styles: {series: (line, mark)} and names are those of the whole figure."""
    draw_series(panel, lines, styles, names)
    random = tasks.TASKS[task].random
    if random:
        dotted = {"linestyle": (0, (1, 3)), "color": "0.4", "linewidth": 1}
        panel.axhline(random, label="random guess", **dotted)
    xs = set().union(*(series.points for series in lines.values())) - {None}
    set_x_axis(panel, kind, sorted(xs), names)
    top = min(103, 1.04 * panel.get_ylim()[1])
    panel.set_ylim(-top / 50, top)
    panel.set_title(tasks.TASKS[task].name, fontsize=10)
    panel.set_ylabel("test accuracy, %")
    panel.grid(alpha=0.25)


def add_legend(figure: Figure, has_ours: bool, columns: int) -> None:
    """Put one legend of all panels below them."""
    title = None
    if has_ours:
        title = "bars, bands: 95% interval, or the standard deviation of several seeds"
    legend = {}
    for panel in figure.axes:
        for mark, label in zip(*panel.get_legend_handles_labels(), strict=True):
            legend[label] = mark
    sizes = {"fontsize": 8, "title_fontsize": 8, "handlelength": 3.5, "ncols": columns}
    place = "outside lower center"
    figure.legend(legend.values(), legend.keys(), loc=place, title=title, **sizes)


def import_pyplot() -> ModuleType:
    """Import pyplot, to write files.  Raises UserError where there is no matplotlib."""
    try:
        import matplotlib
    except ImportError:
        remedy = "python -m pip install matplotlib"
        message = f"figures need matplotlib, which nothing else here does: {remedy}"
        raise UserError(message) from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def draw_figure(pyplot: ModuleType, panels: Panels, kind: str, form: str) -> bytes:
    """Draw a figure of one panel a task; return the image file."""
    drawn = [(name, series) for lines in panels.values() for name, series in lines.items()]
    styles = {}
    for i, name in enumerate(dict.fromkeys(name for name, _ in drawn)):
        styles[name] = (LINES[i % len(LINES)], MARKS[i % len(MARKS)])
    names = []
    if kind == "teacher":
        names = sorted(set().union(*(series.points for _, series in drawn)) - {None})
    height = math.ceil(len(panels) / 3)
    if len(panels) == 4:
        height = 2
    width = math.ceil(len(panels) / height)
    size = (max(5, 4 * width), 3.4 * height + 0.2 * len(styles))
    figure, grid = pyplot.subplots(height, width, figsize=size, squeeze=False, layout="constrained")
    for panel in grid.flat[len(panels) :]:
        panel.axis("off")
    for panel, (task, lines) in zip(grid.flat, panels.items(), strict=False):
        draw_panel(panel, task, kind, lines, styles, names)
    add_legend(figure, any(series.is_ours for _, series in drawn), min(width, 2))
    image = io.BytesIO()
    figure.savefig(image, format=form, dpi=150)
    pyplot.close(figure)
    return image.getvalue()


# ---------------- The command


def plotted_files(kind: str, runs: report.Runs) -> list[report.ScoredFile]:
    """Return the greedy answers of students: every epoch for the curves, else the last."""
    first = -1
    if kind == "curves":
        first = 0
    files = [scored for epochs in runs.values() for scored in epochs[first:]]
    return [scored for scored in files if scored.score["run"] and not scored.votes]


def choose_panels(
    kind: str, files: list[report.ScoredFile], wanted: list[str] | None, students: list[str]
) -> Panels:
    """Return the panels in the order of TASKS.

    wanted: tasks, or None for those with a run, or for all where students are named;
    students: those of the paper to draw; [] for those of the runs.
    """
    ours = our_series(files, kind)
    models = set(students) or {paper.model_name(scored.key.model) for scored in files}
    theirs = paper_series(kind, models)
    panels = {}
    for task in tasks.TASKS:
        lines = ours.get(task, {}) | theirs.get(task, {})
        is_wanted = task in ours or students
        if wanted:
            is_wanted = task in wanted
        if lines and is_wanted:
            panels[task] = lines
    return panels


def plot(
    *,
    kind: str,
    out: str,
    task: list[str] | None,
    paper: list[str],
    saved: str,
    data: str,
    rules: str,
    allow_partial: bool,
) -> None:
    """Draw one of KINDS.  Raises UserError where there is nothing to draw, or no matplotlib."""
    form = Path(out).suffix.lower().removeprefix(".")
    if form not in FORMATS:
        raise UserError(f"--out {out}: the name of a figure ends in .{', .'.join(FORMATS)}")
    pyplot = import_pyplot()
    runs, skipped = report.scored_runs(report.saved_files(saved), data, rules, allow_partial)
    for message in skipped:
        print(f"not in the figure: {message}", file=sys.stderr)
    panels = choose_panels(kind, plotted_files(kind, runs), task, paper)
    if not panels:
        raise UserError(
            f"there is no student in {saved}/completion_data to draw "
            "(--paper MODEL draws the paper's values alone)"
        )
    write_atomic(out, draw_figure(pyplot, panels, kind, form))
    print(f"plot: {', '.join(panels)} -> {out}")


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add plot to the command line of evaluate.py."""
    text = "a figure (needs matplotlib): accuracy against what a study varied"
    parser = commands.add_parser("plot", help=text)
    parser.set_defaults(run=plot)
    parser.add_argument("kind", choices=KINDS, help="what stands on the x axis")
    parser.add_argument("--out", required=True, help="file to write: .png, .pdf or .svg")
    parser.add_argument("--task", nargs="+", help="default: all that there is something of")
    text = (
        "draw the paper's values of these students too (curie, gpt2_large, ...; "
        "default: of those that we have)"
    )
    parser.add_argument("--paper", nargs="*", default=[], metavar="MODEL", help=text)
    report.add_saved_flags(parser)
