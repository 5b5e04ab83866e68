"""Figures of the studies: accuracy against degree, training questions, size, teacher or epoch.

    python evaluate.py plot degree --out degree.png [--task multiarith svamp] [--paper curie]

One panel a task, with its legend; ours in black with the 95% interval (of several seeds: mean and
standard deviation), the paper's values in grey with hollow marks, a random guess dotted.  Line
styles and marks differ, so that it can be read without colour.  Curves have the training loss
beside the accuracy; the toy has a figure of its own.  Needs matplotlib.
"""

from __future__ import annotations

import argparse
import io
import itertools
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import tasks
from extras import figure, paper, report, runs
from extras.series import (
    KINDS,
    Band,
    Lines,
    Panels,
    Series,
    all_xs,
    loss_series,
    our_series,
    paper_series,
)
from storage import UserError, write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = ("png", "pdf", "svg")


LINES = ("-", "--", "-.", ":")
MARKS = "osD^v"
BARS = "bars, bands: 95% interval, or the standard deviation of several seeds"
LEGEND_WIDTH = 58  # characters in the width of a panel
TOY = "toy"
Look = dict[str, str]  # options of matplotlib: label, linestyle, marker
Styles = dict[str, Look]  # {name of a series: its look}


class Panel(NamedTuple):
    """What one pair of axes shows."""

    task: str
    lines: Lines
    xs: list[Any]  # what the x axis has to hold
    is_loss: bool = False


Rows = list[list[Panel]]


# ---------------- Drawing


def draw_points(
    panel: Axes, series: Series, at: dict[Any, float], look: Look, shade: float
) -> None:
    """Draw marks, the line through them (if any) and the band; at: {x: where it stands}."""
    xs = list(at.values())
    points = series.points
    bands = [points[x] for x in at]
    middle, low, high = zip(*bands, strict=True)
    color = "black"
    if not series.is_ours:
        color = "0.5"
        look = look | {"markerfacecolor": "white"}
    panel.plot(xs, middle, color=color, markersize=5, linewidth=1.2, **look)
    if not series.is_ours:
        return
    panel.vlines(xs, low, high, color=color, linewidth=0.7)
    if look["linestyle"] != "none":
        panel.fill_between(xs, low, high, color=color, alpha=shade, linewidth=0)


def side_by_side(n: int) -> list[float]:
    """Return where n marks of one x stand around it: 3 -> [-0.1, 0, 0.1], within 0.45 of it."""
    step = min(0.1, 0.9 / n)
    middle = (n - 1) / 2
    return [step * (i - middle) for i in range(n)]


def draw_series(panel: Axes, lines: Lines, styles: Styles, names: list[str]) -> None:
    """Draw the series of one task: what has no x as a level line and its band.

    Where x is one of names it is no scale: marks stand side by side and are not joined.
    """
    n = len(lines)
    shade = 0.36 / max(3, n)
    shifts = iter(side_by_side(n))
    for name, series in lines.items():
        look = styles[name]
        shift = next(shifts)
        points = series.points
        if None in points:
            draw_level(panel, points[None], look, shade)
        elif names:
            at = {x: names.index(x) + shift for x in points}
            marks = look | {"linestyle": "none"}
            draw_points(panel, series, at, marks, shade)
        else:
            at = {x: x for x in sorted(points)}
            draw_points(panel, series, at, look, shade)


def draw_level(panel: Axes, band: Band, look: Look, shade: float) -> None:
    """Draw a line from side to side, and its band."""
    middle, low, high = band
    level = {"linestyle": look["linestyle"], "label": look["label"]}
    panel.axhline(middle, color="black", linewidth=0.8, **level)
    panel.axhspan(low, high, color="black", alpha=shade, linewidth=0)


def size_name(parameters: float) -> str:
    """124e6 -> '124M', 6.7e9 -> '6.7B', 1000 -> '0.001M'"""
    if parameters >= 1e9:
        return f"{parameters / 1e9:.3g}B"
    return f"{parameters / 1e6:.3g}M"


def set_x_axis(axes: Axes, kind: str, xs: list) -> None:
    """Put ticks at xs, the x of a panel's points."""
    title = KINDS[kind].title
    axes.set_xlabel(title)
    if kind == "teacher":
        n = len(xs)
        axes.set_xticks(range(n), xs, rotation=20, ha="right", fontsize=8)
        axes.set_xlim(-0.5, n - 0.5)
        return
    if kind == "curves":
        locator = axes.xaxis.get_major_locator()
        locator.set_params(integer=True, min_n_ticks=1)
        left = xs[0] - 0.3
        right = xs[-1] + 0.3
        axes.set_xlim(left, right)
        return
    axes.set_xscale("log")
    if kind == "student":
        sizes = list(map(size_name, xs))
        axes.set_xticks(xs, sizes, rotation=90, fontsize=8)  # they may be near one another
    else:
        numbers = [f"{x:g}" for x in xs]
        axes.set_xticks(xs, numbers)
    axes.minorticks_off()


def set_y_axis(axes: Axes, is_loss: bool) -> None:
    """Begin at 0, and end a little above what is drawn."""
    label = "test accuracy, %"
    _, highest = axes.get_ylim()
    top = min(103, 1.04 * highest)
    if is_loss:
        label = "training loss"
        top = 1.04 * highest
    axes.set_ylim(-top / 50, top)
    axes.set_ylabel(label)


def wrap(name: str) -> list[str]:
    """Break the name of a series into lines as wide as a panel."""
    return textwrap.wrap(name, width=LEGEND_WIDTH, break_on_hyphens=False)


def add_legend(axes: Axes, kind: str) -> None:
    """Put the legend of a panel below its axis, as wide as the panel."""
    from matplotlib.transforms import ScaledTranslation

    inches = 0.55
    if kind in ("teacher", "student"):
        inches = 0.85  # names below the ticks are turned
    below = ScaledTranslation(0, -inches, axes.figure.dpi_scale_trans)
    place = axes.transAxes + below
    marks, names = axes.get_legend_handles_labels()
    labels = []
    for name in names:
        lines = wrap(name)
        labels.append("\n".join(lines))
    where = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "bbox_transform": place}
    axes.legend(marks, labels, fontsize=8, handlelength=3.5, **where)


def draw_panel(axes: Axes, panel: Panel, kind: str, styles: Styles) -> None:
    """Draw one task and, below it, its legend."""
    names = []
    if kind == "teacher":
        names = panel.xs
    draw_series(axes, panel.lines, styles, names)
    task = tasks.TASKS[panel.task]
    if task.random and not panel.is_loss:
        dots = (0, (1, 3))
        options = {"linestyle": dots, "color": "0.4", "linewidth": 1}
        axes.axhline(task.random, label="random guess", **options)
    set_x_axis(axes, kind, panel.xs)
    set_y_axis(axes, panel.is_loss)
    axes.set_title(task.name, fontsize=10)
    axes.grid(alpha=0.25)
    add_legend(axes, kind)


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


def series_styles(panels: Iterable[Panel]) -> Styles:
    """Return the look of each series by its name: the same in all panels that it is in."""
    names = {}
    for panel in panels:
        names |= dict.fromkeys(panel.lines)
    lines = itertools.cycle(LINES)
    marks = itertools.cycle(MARKS)
    styles = {}
    for name in names:
        styles[name] = {"label": name, "linestyle": next(lines), "marker": next(marks)}
    return styles


def panel_rows(panels: Panels, losses: Panels) -> Rows:
    """Return the rows of a figure: up to three tasks, or a task's accuracy and its loss."""
    rows = []
    for task, lines in panels.items():
        of_loss = losses.get(task, {})
        series = [*lines.values(), *of_loss.values()]
        xs = all_xs(series)
        accuracy = Panel(task, lines, xs)
        row = [accuracy]
        if of_loss:
            loss = Panel(task, of_loss, xs, is_loss=True)
            row.append(loss)
        rows.append(row)
    if panels.keys() & losses.keys():
        return rows
    width = 3
    if len(rows) == 4:
        width = 2
    shown = [row[0] for row in rows]
    starts = range(0, len(shown), width)
    return [shown[start : start + width] for start in starts]


def row_inches(row: list[Panel]) -> float:
    """Return how high a row is: its axes, and the longest of its legends."""
    longest = 0
    for panel in row:
        wrapped = map(wrap, panel.lines)
        heights = map(len, wrapped)
        longest = max(longest, sum(heights))
    return 3.3 + 0.17 * longest


def draw_figure(pyplot: ModuleType, rows: Rows, kind: str, form: str) -> bytes:
    """Draw a figure of these rows of panels; return the image file."""
    panels = list(itertools.chain(*rows))
    styles = series_styles(panels)
    n_columns = max(map(len, rows))
    width = max(5, 4.4 * n_columns)
    height = sum(map(row_inches, rows))
    options = {"figsize": (width, height), "squeeze": False, "layout": "constrained"}
    whole, grid = pyplot.subplots(len(rows), n_columns, **options)
    for of_row, row in zip(grid, rows, strict=True):
        for axes, panel in itertools.zip_longest(of_row, row):
            if panel is None:
                axes.remove()
            else:
                draw_panel(axes, panel, kind, styles)
    for panel in panels:
        for series in panel.lines.values():
            if series.is_ours:
                whole.supxlabel(BARS, fontsize=8)
    image = io.BytesIO()
    whole.savefig(image, format=form, dpi=150)
    pyplot.close(whole)
    return image.getvalue()


# ---------------- The command


def plotted_files(kind: str, found: runs.Runs) -> list[runs.ScoredFile]:
    """Return the greedy answers of students: every epoch for the curves, else the last."""
    files = []
    for epochs in found.values():
        shown = epochs[-1:]
        if kind == "curves":
            shown = epochs
        for scored in shown:
            if scored.score["run"] and not scored.votes:
                files.append(scored)
    return files


def choose_panels(
    kind: str, files: list[runs.ScoredFile], wanted: runs.Wanted, students: list[str]
) -> Panels:
    """Return the panels in the order of TASKS.

    wanted: tasks, by default those with a run, or all where students are named; and methods;
    students: those of the paper to draw; [] for those of the runs.
    """
    ours = our_series(files, kind)
    models = set(students)
    shown = wanted.tasks
    if not students:
        for scored in files:
            name = paper.model_name(scored.key.model)
            models.add(name)
        shown = shown or ours.keys()
    theirs = paper_series(kind, models, wanted.methods)
    panels = {}
    for task in tasks.TASKS:
        lines = ours.get(task, {})
        lines |= theirs.get(task, {})
        if lines and (not shown or task in shown):
            panels[task] = lines
    return panels


def drop_empty_axes(panels: Panels, kind: str) -> tuple[Panels, list[str]]:
    """Drop tasks without anything on the x axis; return the rest, and a sentence for each."""
    kept = {}
    messages = []
    for task, lines in panels.items():
        if all_xs(lines.values()):
            kept[task] = lines
            continue
        title = KINDS[kind].title
        message = f"not in the figure: {task}, where no run has a value of {title!r}"
        messages.append(message)
    return kept, messages


def separate_figures(panels: Panels, out: str, asked: bool) -> dict[str, Panels]:
    """Return {file: panels}: beside real tasks the toy has a file of its own, FILE_toy.

    asked: tasks were named, and all of them go into one figure.
    """
    real = dict(panels)
    of_toy = real.pop(TOY, None)
    if asked:
        return {out: panels}
    if not of_toy or not real:
        return {out: panels}
    path = Path(out)
    name = f"{path.stem}_{TOY}"
    apart = path.with_stem(name)
    return {out: real, str(apart): {TOY: of_toy}}


def plot(
    *,
    kind: str,
    out: str,
    task: Sequence[str],
    student: Sequence[str],
    method: Sequence[str],
    paper: list[str],
    saved: str,
    data: str,
    rules: str,
    allow_partial: bool,
) -> None:
    """Draw one of KINDS.  Raises UserError where there is nothing to draw, or no matplotlib."""
    if kind == "method":
        figure.plot_method(out, saved, data, [*task, TOY][0])
        return
    form = Path(out).suffix.lower().removeprefix(".")
    if form not in FORMATS:
        raise UserError(f"--out {out}: the name of a figure ends in .{', .'.join(FORMATS)}")
    pyplot = import_pyplot()
    wanted = runs.Wanted(task, student, method)
    paths = runs.saved_files(saved)
    found, skipped = runs.scored_runs(paths, data, rules, allow_partial, wanted)
    messages = [f"not in the figure: {message}" for message in skipped]
    messages += runs.describe_unknown(found)
    files = plotted_files(kind, found)
    chosen = choose_panels(kind, files, wanted, paper)
    panels, empty = drop_empty_axes(chosen, kind)
    for message in messages + empty:
        print(message, file=sys.stderr)
    if not panels:
        asked = runs.describe_wanted(wanted)
        raise UserError(
            f"there is no student{asked} in {saved}/completion_data to draw "
            "(--paper MODEL draws the paper's values alone)"
        )
    losses = {}
    if kind == "curves":
        losses = loss_series(files)
    for path, shown in separate_figures(panels, out, bool(task)).items():
        rows = panel_rows(shown, losses)
        image = draw_figure(pyplot, rows, kind, form)
        write_atomic(path, image)
        print(f"plot: {', '.join(shown)} -> {path}")


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add plot to the command line of evaluate.py."""
    text = "a figure (needs matplotlib): accuracy against what a study varied"
    parser = commands.add_parser("plot", help=text)
    parser.set_defaults(run=plot)
    parser.add_argument(
        "kind", choices=[*KINDS, "method"], help="what stands on the x axis, or method"
    )
    parser.add_argument("--out", required=True, help="file to write: .png, .pdf or .svg")
    report.add_filter_flags(parser)
    text = (
        "draw the paper's values of these students too (curie, gpt2_large, ...; "
        "default: of those that we have)"
    )
    parser.add_argument("--paper", nargs="*", default=[], metavar="MODEL", help=text)
    report.add_saved_flags(parser)
