"""What figures show: runs as points of series, ours and the paper's, one panel a task.

Runs of a series agree in all that is recorded of them but what stands on the x axis and the seed.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from extras import page, paper, runs, training_data
from extras.labels import in_words, is_usual
from extras.runs import NOT_RECORDED, ScoredFile


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


class Series(NamedTuple):
    """A line of a figure; the x None is of a run that has no x (ft has no degree)."""

    is_ours: bool
    points: dict[Any, Band]


Panels = dict[str, dict[str, Series]]  # {task: {name: series}}


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
    axis = KINDS[kind].axis
    model = key.model
    if kind == "student":
        model = model_series(model)
    run = dict(scored.score["run"])
    run["epoch"] = scored.score["epoch"]
    known = {"model": model, "method": key.method}
    known |= dict(key.flags)
    known["split"] = key.split
    known["epoch"] = str(scored.epoch)
    known.pop(axis, None)
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
        group = runs.seed_group(scored.key, [scored])
        groups.add(group)
        seeds.add(scored.key.seed)
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
    text = f"{model} {method}"
    for flag in varied:
        value = known.get(flag, NOT_RECORDED)
        if is_usual(flag, value):
            continue
        words = in_words(flag, value)
        text += f", {words}"
    return text


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
        varied = runs.varied_names([point.known for point in group])
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
    low = middle - spread
    high = middle + spread
    return middle, max(0, low), min(highest, high)


def band(points: Points) -> Band:
    """Return the 95% interval of one score, or mean and standard deviation of several seeds."""
    accuracies = []
    for point in points:
        score = point.scored.score
        accuracies.append(score["accuracy"])
    if len(points) == 1:
        return score["accuracy"], score["low"], score["high"]
    return spread_band(accuracies, 100)


def points_of_series(files: Files, kind: str) -> dict[str, Named]:
    """Return {task: {name of a series: its points}}."""
    by_task = defaultdict(list)
    for scored in files:
        point = make_point(scored, kind)
        by_task[scored.task].append(point)
    named = {}
    for task, points in by_task.items():
        shown = drop_followers(points, kind)
        named[task] = series_names(shown)
    return named


def accuracy_by_x(points: Points) -> dict[Any, Band]:
    """Return {x: accuracy} of the points of a series: seeds are one point."""
    by_x = points_by_x(points)
    return {x: band(of_x) for x, of_x in by_x.items()}


def our_series(files: Files, kind: str) -> Panels:
    """Return the runs as series: runs that differ in x are points of one, in seed one point."""
    panels = defaultdict(dict)
    by_task = points_of_series(files, kind)
    for task, named in by_task.items():
        for name, points in named.items():
            bands = accuracy_by_x(points)
            panels[task][name] = Series(True, bands)
    return dict(panels)


def is_log_of(student: Path, scored: ScoredFile) -> bool:
    """Tell whether a student's folder is of the run that a file is of, not of one made since."""
    known = dict(scored.key.flags)
    known |= dict(scored.data)
    known["seed"] = scored.key.seed
    settings = training_data.read_settings(student)
    settings.pop("student", None)  # there a hash, in a completion file the flag
    for name, value in settings.items():
        text = str(value)[:16]  # of a hash that is what a completion file has
        if known.get(name, text) != text:
            return False
    return True


def logged_losses(scored: ScoredFile) -> dict[int, float]:
    """Return {epoch: training loss} of the run that a file is of; {} where its log is gone."""
    key = scored.key
    metadata = {"dataset_key": scored.task}
    metadata["base_model"] = key.model
    metadata["train_key"] = key.train_key
    path = Path(scored.score["file"])
    beside = training_data.run_files(path, metadata, str(path.parent))
    student = beside.student
    if student is None or not is_log_of(student, scored):
        return {}
    _, losses = page.read_log(student)
    return dict(losses)


def mean_losses(points: Points) -> dict[int, Band]:
    """Return {epoch: loss} of the runs of a series, which are seeds of one another."""
    runs_of_series = {}
    for point in points:
        name = point.scored.key.train_key
        runs_of_series[name] = point.scored
    by_epoch = defaultdict(list)
    for scored in runs_of_series.values():
        losses = logged_losses(scored)
        for epoch, loss in losses.items():
            by_epoch[epoch].append(loss)
    means = {}
    for epoch, losses in by_epoch.items():
        means[epoch] = spread_band(losses, math.inf)
    return means


def loss_series(files: Files) -> Panels:
    """Return the training losses in log.jsonl, by epoch, under the names of our_series."""
    panels = defaultdict(dict)
    by_task = points_of_series(files, "curves")
    for task, named in by_task.items():
        for name, points in named.items():
            losses = mean_losses(points)
            if losses:
                panels[task][name] = Series(True, losses)
    return dict(panels)


def paper_point(row: dict[str, str], kind: str) -> tuple[str, Any]:
    """Return (what the paper's series is called, x) of a row of paper_results.csv; x may be ""."""
    table = row["table"]
    model = row["model"]
    if kind == "student" and table.endswith("_students"):
        millions = paper.SIZES.get(model, 0)
        return table.removesuffix("_students"), 1e6 * millions
    figure = KINDS[kind]
    if not table.startswith(figure.table):
        return "", ""
    x = row[figure.column]
    if x and kind != "teacher":
        return model, float(x)
    return model, x


def paper_series(kind: str, models: set[str], methods: Iterable[str] = ()) -> Panels:
    """Return the values of the paper's tables and figures for these students as series.

    methods: those asked for; empty: all.
    """
    panels = defaultdict(dict)
    for row in paper.read_rows():
        if row["model"] not in models or row["method"] not in METHOD_NAMES:
            continue
        model, x = paper_point(row, kind)
        if not x:
            continue
        method = METHOD_NAMES[row["method"]]
        plain, _, _ = method.partition(" ")  # ft_cot of "ft_cot diverse"
        if methods and plain not in methods:
            continue
        name = f"paper: {model} {method}"
        lines = panels[row["dataset"]]
        series = lines.setdefault(name, Series(False, {}))
        accuracy = float(row["accuracy"])
        series.points[x] = (accuracy, accuracy, accuracy)
    return dict(panels)
