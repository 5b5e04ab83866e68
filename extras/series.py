"""What figures show: runs as points of series, ours and the paper's, one panel a task.

Runs of a series agree in all that is recorded of them but what stands on the x axis and the seed.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from extras import page, paper, runs, training_data
from extras.runs import NOT_RECORDED, ScoredFile, is_usual, words_of


class Kind(NamedTuple):
    """What a figure shows."""

    axis: str  # what of a run stands on the x axis
    title: str  # of that axis
    column: str = ""  # of paper_results.csv: what stands on the x axis
    table: str = " "  # of paper_results.csv: what the names of its tables begin with
    follows: tuple[str, ...] = ()  # flags that may change with what stands on the x axis


KINDS = {
    "degree": Kind(
        "degree", "D, rationales a question", "degree", "figure_diverse", ("temperature",)
    ),
    "train_size": Kind(
        "questions", "training questions", "train_size", "figure_train_size", ("split",)
    ),
    "student": Kind("parameters", "parameters of the student", follows=("student", "family")),
    "teacher": Kind("teacher", "teacher", "teacher", "figure_teachers", ("rules", "api")),
    "curves": Kind("epoch", "epoch"),
}
METHOD_NAMES = {name: method for method, name in paper.METHODS.items()}
Band = tuple[float, float, float]  # middle, low, high of a point, in %
Bands = dict[Any, Band]  # {x: band}


class Series(NamedTuple):
    """A line of a figure; the x None is of a run that has no x (ft has no degree)."""

    is_ours: bool
    points: Bands


Lines = dict[str, Series]  # by name
Panels = dict[str, Lines]  # by task


def all_xs(lines: Iterable[Series]) -> list[Any]:
    """Return where any of these lines has a point, in order."""
    xs = set()
    for series in lines:
        xs |= set(series.points)
    return sorted(xs - {None})


# ---------------- What is drawn


Known = dict[str, str]  # {flag or name: value}


class Point(NamedTuple):
    """A run and where it stands; runs of one x are one point where all but the seed agrees."""

    x: Any  # None: the run has none
    known: Known  # what the run was made with, but x and the seed
    scored: ScoredFile


Points = list[Point]
Named = dict[str, Points]  # {name of a series: its points}
Files = list[ScoredFile]


def model_series(model: str) -> str:
    """gpt2-large, google_flan-t5-base -> gpt2, flan_t5: what sizes of a model have in common"""
    size = r"_(small|medium|base|large|xl|xxl|[\d.]+[mb])(_instruct)?$"
    name = paper.model_name(model)
    return re.sub(size, "", name.lower())


def make_point(scored: ScoredFile, kind: str) -> Point:
    """Return a run as a point of a figure."""
    key = scored.key
    model = key.model
    if kind == "student":
        model = model_series(model)
    known = {"model": model, "method": key.method}
    known |= dict(key.flags)
    known["split"] = key.split
    known["epoch"] = str(scored.epoch)
    axis = KINDS[kind].axis
    known.pop(axis, None)
    if axis == "epoch":
        x = scored.score["epoch"]
    else:
        run = scored.score["run"]
        x = run.get(axis)
    return Point(x, known, scored)


def follows_x(points: Points, name: str) -> bool:
    """Tell whether a flag has one value for each x, so that it is no difference between series."""
    values = defaultdict(set)
    for point in points:
        if point.x is None:
            return False
        value = point.known.get(name)
        values[point.x].add(value)
    counts = set(map(len, values.values()))
    return counts == {1}


def without(known: Known, names: Iterable[str]) -> Known:
    """Return a copy that lacks some names."""
    kept = dict(known)
    for name in names:
        kept.pop(name, None)
    return kept


def drop_followers(points: Points, kind: str) -> Points:
    """Drop the flags that change with x alone, of runs that agree in all others."""
    followers = KINDS[kind].follows
    alike = defaultdict(list)
    for point in points:
        rest = without(point.known, followers)
        pairs = runs.as_pairs(rest)
        alike[pairs].append(point)
    result = []
    for group in alike.values():
        dropped = [name for name in followers if follows_x(group, name)]
        for point in group:
            kept = without(point.known, dropped)
            shown = point._replace(known=kept)
            result.append(shown)
    return result


def are_seeds(points: Points) -> bool:
    """Tell whether the points of one x are runs that differ in nothing but the seed."""
    groups = set()
    seeds = set()
    for point in points:
        scored = point.scored
        key = scored.key
        group = runs.seed_group(key, [scored])
        groups.add(group)
        seeds.add(key.seed)
    return len(groups) == 1 and len(seeds) == len(points)


def points_by_x(points: Points) -> dict[Any, Points]:
    """Return {x: points}."""
    by_x = defaultdict(list)
    for point in points:
        by_x[point.x].append(point)
    return by_x


def split_series(points: Points) -> Named:
    """Return {what is added to the name: points} of runs that agree in all that is recorded.

    Where two runs of one x are not seeds of one another, by their files' names.
    """
    by_x = points_by_x(points)
    if all(map(are_seeds, by_x.values())):
        return {"": points}
    parts = {}
    for point in points:
        file = point.scored.score["file"]
        path = Path(file)
        more = f", {path.stem}"
        parts[more] = [point]
    return parts


def series_name(known: Known, varied: list[str]) -> str:
    """Return 'gpt2 ft_cot, lr 0.001': model, method, and the flags that vary and are not usual."""
    model = known["model"]
    method = known["method"]
    names = []
    for flag in varied:
        value = known.get(flag, NOT_RECORDED)
        if not is_usual(flag, value):
            names.append(flag)
    return f"{model} {method}{words_of(known, names)}"


def series_names(points: Points) -> Named:
    """Sort the runs of a task into series.

    A series is named by model, method, and the flags in which runs of these two differ.
    """
    methods = defaultdict(list)
    for point in points:
        name = series_name(point.known, [])
        methods[name].append(point)
    named = defaultdict(list)
    for group in methods.values():
        known = [point.known for point in group]
        varied = runs.varied_names(known)
        for point in group:
            name = series_name(point.known, varied)
            named[name].append(point)
    series = {}
    for name, of_series in named.items():
        parts = split_series(of_series)
        for more, part in parts.items():
            series[name + more] = part
    return series


def spread_band(values: list[float], highest: float) -> Band:
    """Return mean and standard deviation of a value of several seeds, within 0 and highest."""
    middle = statistics.mean(values)
    spread = 0.0
    if len(values) > 1:
        spread = statistics.stdev(values)
    low = max(0, middle - spread)
    high = min(highest, middle + spread)
    return middle, low, high


def band(points: Points) -> Band:
    """Return the 95% interval of one score, or mean and standard deviation of several seeds."""
    accuracies = []
    for point in points:
        score = point.scored.score
        accuracies.append(score["accuracy"])
    if len(accuracies) > 1:
        return spread_band(accuracies, 100)
    return score["accuracy"], score["low"], score["high"]


def accuracy_by_x(points: Points) -> Bands:
    """Return {x: accuracy} of the points of a series: seeds are one point."""
    by_x = points_by_x(points)
    bands = {}
    for x, of_x in by_x.items():
        bands[x] = band(of_x)
    return bands


def make_series(files: Files, kind: str, bands_of: Callable[[Points], Bands]) -> Panels:
    """Return the runs as series of these bands; a series that has none is left out."""
    by_task = defaultdict(list)
    for scored in files:
        point = make_point(scored, kind)
        by_task[scored.task].append(point)
    panels = defaultdict(dict)
    for task, points in by_task.items():
        shown = drop_followers(points, kind)
        named = series_names(shown)
        for name, of_series in named.items():
            bands = bands_of(of_series)
            if bands:
                panels[task][name] = Series(True, bands)
    return dict(panels)


def our_series(files: Files, kind: str) -> Panels:
    """Return the runs as series: runs that differ in x are points of one, in seed one point."""
    return make_series(files, kind, accuracy_by_x)


def is_log_of(student: Path, scored: ScoredFile) -> bool:
    """Tell whether a student's folder is of the run that a file is of, not of one made since."""
    key = scored.key
    known = dict(key.flags)
    known |= dict(scored.data)
    known["seed"] = key.seed
    settings = training_data.read_settings(student)
    settings.pop("student", None)  # there a hash, in a completion file the flag
    for name, value in settings.items():
        text = str(value)
        start = text[:16]  # of a hash that is what a completion file has
        if known.get(name, start) != start:
            return False
    return True


def logged_losses(scored: ScoredFile) -> dict[int, float]:
    """Return {epoch: training loss} of the run that a file is of; {} where its log is gone."""
    key = scored.key
    metadata = {
        "dataset_key": scored.task,
        "base_model": key.model,
        "train_key": key.train_key,
    }
    path = Path(scored.score["file"])
    files = training_data.run_files(path, metadata, str(path.parent))
    if files.student is None or not is_log_of(files.student, scored):
        return {}
    _, losses = page.read_log(files.student)
    return dict(losses)


def mean_losses(points: Points) -> Bands:
    """Return {epoch: loss} of the runs of a series, which are seeds of one another."""
    by_run = {}
    for point in points:
        name = point.scored.key.train_key
        by_run[name] = point.scored
    by_epoch = defaultdict(list)
    for scored in by_run.values():
        losses = logged_losses(scored)
        for epoch, loss in losses.items():
            by_epoch[epoch].append(loss)
    means = {}
    for epoch, losses in by_epoch.items():
        means[epoch] = spread_band(losses, math.inf)
    return means


def loss_series(files: Files) -> Panels:
    """Return the training losses in log.jsonl, by epoch, under the names of our_series."""
    return make_series(files, "curves", mean_losses)


def paper_point(row: dict[str, str], kind: str) -> tuple[str, Any]:
    """Return (what the paper's series is called, x) of a row of paper_results.csv; x may be ""."""
    table = row["table"]
    model = row["model"]
    if kind == "student" and table.endswith("_students"):
        family = table.removesuffix("_students")
        millions = paper.SIZES.get(model, 0)
        return family, 1e6 * millions
    figure = KINDS[kind]
    if not table.startswith(figure.table):
        return "", ""
    x = row[figure.column]
    if x and kind != "teacher":
        x = float(x)
    return model, x


def paper_series(kind: str, models: set[str], methods: Iterable[str] = ()) -> Panels:
    """Return the values of the paper's tables and figures for these students as series.

    methods: those asked for; empty: all.
    """
    panels = defaultdict(dict)
    for row in paper.read_rows():
        method = METHOD_NAMES.get(row["method"])
        if method is None:
            continue
        if row["model"] not in models:
            continue
        plain, _, _ = method.partition(" ")  # ft_cot of "ft_cot diverse"
        if methods and plain not in methods:
            continue
        model, x = paper_point(row, kind)
        if not x:
            continue
        name = f"paper: {model} {method}"
        task = row["dataset"]
        empty = Series(False, {})
        series = panels[task].setdefault(name, empty)
        accuracy = float(row["accuracy"])
        no_spread = (accuracy, accuracy, accuracy)
        series.points[x] = no_spread
    return dict(panels)
