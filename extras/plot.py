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
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import tasks
from extras import figure, paper, report, runs
from extras.series import KINDS, Panels, Series, all_xs, loss_series, our_series, paper_series
from storage import UserError, write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = ("png", "pdf", "svg")


LINES = ("-", "--", "-.", ":")
MARKS = "osD^v"
BARS = "bars, bands: 95% interval, or the standard deviation of several seeds"
LEGEND_WIDTH = 58  # characters in the width of a panel
TOY = "toy"
Styles = dict[str, tuple[str, str]]  # {name of a series: its line and mark}


class Panel(NamedTuple):
    """What one pair of axes shows."""

    task: str
    lines: dict[str, Series]
    xs: list[Any]  # what the x axis has to hold
    is_loss: bool = False


# ---------------- Drawing


def draw_points(
    panel: Axes, name: str, series: Series, at: dict[Any, float], style: tuple, shade: float
) -> None:
    """Draw marks, the line through them (if any) and the band; at: {x: where it stands}."""
    line, mark = style
    xs = list(at.values())
    bands = [series.points[x] for x in at]
    middle, low, high = zip(*bands, strict=True)
    colors = {"color": "0.5", "markerfacecolor": "white"}
    if series.is_ours:
        colors = {"color": "black", "markerfacecolor": "black"}
    panel.plot(
        xs, middle, linestyle=line, marker=mark, markersize=5, linewidth=1.2, label=name, **colors
    )
    if not series.is_ours:
        return
    below = []
    above = []
    for center, bottom, top in bands:
        below.append(center - bottom)
        above.append(top - center)
    bars = {"fmt": "none", "ecolor": "black", "elinewidth": 0.7, "capsize": 2}
    panel.errorbar(xs, middle, yerr=[below, above], **bars)
    if line != "none":
        panel.fill_between(xs, low, high, color="black", alpha=shade, linewidth=0)


def draw_series(panel: Axes, lines: dict[str, Series], styles: Styles, names: list[str]) -> None:
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
        xs = sorted(series.points)
        at = {x: x for x in xs}
        if names:
            middle_line = (len(lines) - 1) / 2
            shift = 0.1 * (i - middle_line)
            at = {x: names.index(x) + shift for x in xs}
            line = "none"
        draw_points(panel, name, series, at, (line, mark), shade)


def size_name(parameters: float) -> str:
    """124e6 -> '124M', 6.7e9 -> '6.7B', 1000 -> '0.001M'"""
    if parameters >= 1e9:
        return f"{parameters / 1e9:.3g}B"
    return f"{parameters / 1e6:.3g}M"


def set_x_axis(axes: Axes, kind: str, xs: list) -> None:
    """Put ticks at xs, the x of a panel's points."""
    axes.set_xlabel(KINDS[kind].title)
    slanted = {"rotation": 20, "ha": "right", "fontsize": 8}
    upright = {"rotation": 90, "fontsize": 8}  # sizes may be near one another
    if kind == "teacher":
        axes.set_xticks(range(len(xs)), xs, **slanted)
        axes.set_xlim(-0.5, len(xs) - 0.5)
    elif kind == "curves":
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.set_xlim(xs[0] - 0.3, xs[-1] + 0.3)
    elif kind == "student":
        axes.set_xscale("log")
        axes.set_xticks(xs, list(map(size_name, xs)), **upright)
        axes.minorticks_off()
    else:
        base = 10
        if kind == "degree":
            base = 2
        axes.set_xscale("log", base=base)
        axes.set_xticks(xs, [f"{x:g}" for x in xs])
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
    return textwrap.wrap(name, LEGEND_WIDTH, break_on_hyphens=False)


def add_legend(axes: Axes, kind: str) -> None:
    """Put the legend of a panel below its axis, as wide as the panel."""
    from matplotlib.transforms import ScaledTranslation

    inches = 0.55
    if kind in ("teacher", "student"):
        inches = 0.85  # names below the ticks are turned
    below = ScaledTranslation(0, -inches, axes.figure.dpi_scale_trans)
    place = axes.transAxes + below
    marks, labels = axes.get_legend_handles_labels()
    wrapped = ["\n".join(wrap(label)) for label in labels]
    options = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "bbox_transform": place}
    axes.legend(marks, wrapped, fontsize=8, handlelength=3.5, **options)


def draw_panel(axes: Axes, panel: Panel, kind: str, styles: Styles) -> None:
    """Draw one task and, below it, its legend."""
    names = []
    if kind == "teacher":
        names = panel.xs
    draw_series(axes, panel.lines, styles, names)
    task = tasks.TASKS[panel.task]
    if task.random and not panel.is_loss:
        dotted = {"linestyle": (0, (1, 3)), "color": "0.4", "linewidth": 1}
        axes.axhline(task.random, label="random guess", **dotted)
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
    """Return {name: (line, mark)}; a series of several panels looks the same in all of them."""
    names = {}
    for panel in panels:
        names |= dict.fromkeys(panel.lines)
    styles = {}
    for i, name in enumerate(names):
        line = LINES[i % len(LINES)]
        mark = MARKS[i % len(MARKS)]
        styles[name] = (line, mark)
    return styles


def panel_rows(panels: Panels, losses: Panels) -> list[list[Panel]]:
    """Return the rows of a figure: up to three tasks, or a task's accuracy and its loss."""
    rows = []
    if panels.keys() & losses.keys():
        for task, lines in panels.items():
            of_loss = losses.get(task, {})
            xs = all_xs([*lines.values(), *of_loss.values()])
            row = [Panel(task, lines, xs)]
            if of_loss:
                row.append(Panel(task, of_loss, xs, is_loss=True))
            rows.append(row)
        return rows
    shown = []
    for task, lines in panels.items():
        xs = all_xs(lines.values())
        panel = Panel(task, lines, xs)
        shown.append(panel)
    width = 3
    if len(shown) == 4:
        width = 2
    for start in range(0, len(shown), width):
        row = shown[start : start + width]
        rows.append(row)
    return rows


def row_inches(row: list[Panel]) -> float:
    """Return how high a row is: its axes, and the longest of its legends."""
    longest = 0
    for panel in row:
        wrapped = map(wrap, panel.lines)
        lines = sum(map(len, wrapped))
        longest = max(longest, lines)
    return 3.3 + 0.17 * longest


def draw_figure(pyplot: ModuleType, rows: list[list[Panel]], kind: str, form: str) -> bytes:
    """Draw a figure of these rows of panels; return the image file."""
    panels = [panel for row in rows for panel in row]
    styles = series_styles(panels)
    width = max(map(len, rows))
    heights = list(map(row_inches, rows))
    size = (max(5, 4.4 * width), sum(heights))
    options = {"figsize": size, "squeeze": False, "layout": "constrained"}
    whole, grid = pyplot.subplots(len(rows), width, **options)
    for of_row, row in zip(grid, rows, strict=True):
        for axes in of_row[len(row) :]:
            axes.remove()
        for axes, panel in zip(of_row, row, strict=False):
            draw_panel(axes, panel, kind, styles)
    series = [one for panel in panels for one in panel.lines.values()]
    if any(one.is_ours for one in series):
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
    if not students:
        for scored in files:
            name = paper.model_name(scored.key.model)
            models.add(name)
    theirs = paper_series(kind, models, wanted.methods)
    panels = {}
    for task in tasks.TASKS:
        lines = ours.get(task, {})
        lines |= theirs.get(task, {})
        is_wanted = task in ours or students
        if wanted.tasks:
            is_wanted = task in wanted.tasks
        if lines and is_wanted:
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
        messages.append(f"not in the figure: {task}, where no run has a value of {title!r}")
    return kept, messages


def separate_figures(panels: Panels, out: str, asked: bool) -> dict[str, Panels]:
    """Return {file: panels}: beside real tasks the toy has a file of its own, FILE_toy.

    asked: tasks were named, and all of them go into one figure.
    """
    if asked or TOY not in panels or len(panels) == 1:
        return {out: panels}
    real = dict(panels)
    of_toy = {TOY: real.pop(TOY)}
    path = Path(out)
    apart = path.with_stem(f"{path.stem}_{TOY}")
    return {out: real, str(apart): of_toy}


def plot(
    *,
    kind: str,
    out: str,
    task: list[str] | None,
    student: list[str] | None,
    method: list[str] | None,
    paper: list[str],
    saved: str,
    data: str,
    rules: str,
    allow_partial: bool,
) -> None:
    """Draw one of KINDS.  Raises UserError where there is nothing to draw, or no matplotlib."""
    if kind == "method":
        figure.plot_method(out, saved, data, (task or [TOY])[0])
        return
    form = Path(out).suffix.lower().removeprefix(".")
    if form not in FORMATS:
        raise UserError(f"--out {out}: the name of a figure ends in .{', .'.join(FORMATS)}")
    pyplot = import_pyplot()
    wanted = report.read_wanted(task, student, method)
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
        write_atomic(path, draw_figure(pyplot, rows, kind, form))
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
