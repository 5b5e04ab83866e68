"""Figures of the studies from what lies in saved/: accuracy against degree, training questions, student size, teacher or epoch.

    python evaluate.py plot degree --out degree.png [--task multiarith svamp] [--paper curie]

One panel a task; ours in black with the 95% interval (of several seeds: mean and standard deviation), the paper's values in grey with
hollow marks, a random guess dotted.  Line styles and marks differ, so that it can be read without colour.  Needs matplotlib.
"""

import csv
import io
import re
import statistics
import sys
from pathlib import Path

import tasks
from extras import report as look
from storage import UserError, write_atomic

KINDS = {  # figure: (what of a run stands on the x axis, its title, whether its scale is logarithmic)
    "degree": ("degree", "D, rationales a question", True),
    "train_size": ("questions", "training questions", True),
    "student": ("parameters", "parameters of the student", True),
    "teacher": ("teacher", "teacher", False),
    "curves": ("epoch", "epoch", False),
}
FORMATS = ("png", "pdf", "svg")
COLUMNS = {
    "degree": "degree",
    "train_size": "train_size",
    "teacher": "teacher",
}  # of paper_results.csv
TABLES = {
    "degree": "figure_diverse",
    "train_size": "figure_train_size",
    "teacher": "figure_teachers",
}
SIZES = {  # parameters of the paper's students, in millions; of GPT-3's as the paper gives them
    "ada": 300,
    "babbage": 1300,
    "curie": 6700,
    "t5_small": 60,
    "t5_base": 220,
    "t5_large": 700,
    "flan_t5_small": 60,
    "flan_t5_base": 220,
    "flan_t5_large": 700,
    "gpt2": 124,
    "gpt2_medium": 355,
    "gpt2_large": 774,
}
METHOD_NAMES = {
    "fine_tune": "ft",
    "fine_tune_cot": "ft_cot",
    "fine_tune_cot_diverse": "ft_cot diverse",
    "zero_shot": "zs",
    "few_shot_cot": "fs_cot",
}
STYLES = [(("-", "--", "-.", ":")[i % 4], "osD^v"[i % 5]) for i in range(20)]


def add_flags(parser):
    parser.add_argument("kind", choices=KINDS, help="what stands on the x axis")
    parser.add_argument("--out", required=True, help="file to write: .png, .pdf or .svg")
    parser.add_argument("--task", nargs="+", help="default: all that there is something of")
    parser.add_argument(
        "--paper",
        nargs="*",
        default=[],
        metavar="MODEL",
        help="draw the paper's values of these students too (curie, gpt2_large, ...; default: of those that we have)",
    )


# ---------------- What is drawn: {task: {series: {x: [score or accuracy, ...]}}}


def family(model):
    """gpt2-large, google_flan-t5-base -> gpt2, flan_t5: what students of several sizes have in common"""
    return re.sub(
        r"_(small|medium|base|large|xl|xxl|[\d.]+[mb])(_instruct)?$",
        "",
        look.paper_model(model).lower(),
    )


IN_COMMON = {"degree": {"temperature"}, "train_size": {"split"}}  # what changes with x


def ours(scores, kind):
    """-> {task: {series: {x: [score of each seed]}}}.  A series is what runs have in common; x None: it knows no x (ft has no degree)."""
    axis = KINDS[kind][0]
    aside = {"seed", "epochs", "questions", "parameters", "epoch"} | IN_COMMON.get(kind, set())
    figure = {}
    flags = [
        {
            "model": family(s["model"]) if kind == "student" else s["model"],
            "method": s["method"],
            **s["run"],
            "epoch": s["epoch"],
        }
        for s in scores
    ]
    for s, run in zip(scores, flags):
        others = [other for one, other in zip(scores, flags) if one["task"] == s["task"]]
        varied = [
            k
            for k in run
            if k not in {"model", "method", axis, *aside}
            and len({str(other[k]) for other in others if k in other}) > 1
        ]
        name = ", ".join([f"{run['model']} {run['method']}", *(f"{k} {run[k]}" for k in varied)])
        figure.setdefault(s["task"], {}).setdefault(name, {}).setdefault(run.get(axis), []).append(
            s
        )
    return figure


def published(kind, models):
    """-> {task: {series: {x: accuracy}}} of the paper's tables and figures, for these students."""
    figure = {}
    with open(Path(__file__).parent.parent / "data" / "paper_results.csv", newline="") as f:
        for r in csv.DictReader(f):
            model = r["model"]
            x = r[COLUMNS[kind]] if kind in COLUMNS else ""
            there = (
                model in models
                and r["method"] in METHOD_NAMES
                and r["table"].startswith(TABLES.get(kind, " "))
            )
            if kind == "student":
                there = (
                    model in models
                    and r["method"] in METHOD_NAMES
                    and r["table"].endswith("_students")
                )
                x = SIZES.get(model, 0) * 1e6
                model = r["table"].removesuffix("_students")
            if there and x:
                name = f"paper: {model} {METHOD_NAMES[r['method']]}"
                x = x if kind == "teacher" else float(x)
                figure.setdefault(r["dataset"], {}).setdefault(name, {})[x] = float(r["accuracy"])
    return figure


def band(scores):
    """-> (middle, low, high) of a point: one seed's 95% interval, or mean and standard deviation of several."""
    if len(scores) == 1:
        return scores[0]["accuracy"], scores[0]["low"], scores[0]["high"]
    accuracies = [s["accuracy"] for s in scores]
    middle = statistics.mean(accuracies)
    spread = statistics.stdev(accuracies)
    return middle, max(0, middle - spread), min(100, middle + spread)


# ---------------- Drawing


def draw_line(panel, name, points, style, places, shift, shade):
    """One series: marks, line and band; what knows no x is a level line.  places: {x: where}, of names; these are no scale, so
    their marks are not joined, and stand `shift` aside.  shade: of a band."""
    line, mark = style
    ours = isinstance(next(iter(points.values())), list)
    if None in points:
        middle, low, high = band(points[None])
        panel.axhline(middle, linestyle=line, color="black", linewidth=0.8, label=name)
        return panel.axhspan(low, high, color="black", alpha=shade, linewidth=0)
    xs = sorted(points, key=lambda x: places.get(x, x))
    middle, low, high = zip(*(band(points[x]) if ours else (points[x],) * 3 for x in xs))
    at = [places[x] + shift if places else x for x in xs]
    panel.plot(
        at,
        middle,
        linestyle="none" if places else line,
        marker=mark,
        markersize=5,
        linewidth=1.2,
        label=name,
        color="black" if ours else "0.5",
        markerfacecolor="black" if ours else "white",
    )
    if ours:
        sides = [[abs(m - end) for m, end in zip(middle, ends)] for ends in (low, high)]
        panel.errorbar(
            at, middle, yerr=sides, fmt="none", ecolor="black", elinewidth=0.7, capsize=2
        )
        if not places:
            panel.fill_between(at, low, high, color="black", alpha=shade, linewidth=0)


def size_name(parameters):
    """124e6 -> '124M', 6.7e9 -> '6.7B', 1000 -> '0.001M'"""
    return f"{parameters / 1e9:.3g}B" if parameters >= 1e9 else f"{parameters / 1e6:.3g}M"


def draw_panel(panel, task, kind, series, styles, names):
    """One task.  series: {name: points}, styles: {name: (line, mark)}, names: what stands on the x axis where it is no number;
    both of the whole figure."""
    _, title, logarithmic = KINDS[kind]
    places = {x: i for i, x in enumerate(names)}
    for i, (name, points) in enumerate(series.items()):
        draw_line(
            panel,
            name,
            points,
            styles[name],
            places,
            0.1 * (i - (len(series) - 1) / 2),
            0.36 / max(3, len(series)),
        )
    if tasks.TASKS[task].random:
        panel.axhline(
            tasks.TASKS[task].random,
            linestyle=(0, (1, 3)),
            color="0.4",
            linewidth=1,
            label="random guess",
        )
    xs = sorted({x for points in series.values() for x in points if x is not None})
    if places or not xs:
        panel.set_xticks(list(places.values()), names, rotation=20, ha="right", fontsize=8)
        panel.set_xlim(-0.5, max(1, len(names)) - 0.5)
    elif logarithmic:
        panel.set_xscale("log", base=2 if kind == "degree" else 10)
        panel.set_xticks(xs, [size_name(x) if kind == "student" else f"{x:g}" for x in xs])
        panel.minorticks_off()
    else:  # epochs
        panel.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        panel.set_xlim(xs[0] - 0.3, xs[-1] + 0.3)
    top = min(103, 1.04 * panel.get_ylim()[1])
    panel.set_ylim(-top / 50, top)
    panel.set_title(tasks.TASKS[task].name, fontsize=10)
    panel.set_xlabel(title)
    panel.set_ylabel("test accuracy, %")
    panel.grid(alpha=0.25)


def plot(args):
    """Draw one of KINDS.  Raises UserError where there is nothing to draw, or no matplotlib to draw with."""
    form = Path(args.out).suffix.lower().removeprefix(".")
    if form not in FORMATS:
        raise UserError(f"--out {args.out}: the name of a figure ends in .{', .'.join(FORMATS)}")
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            "figures need matplotlib, which nothing else here does: python -m pip install matplotlib"
        ) from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    runs, skipped = look.scored_runs(
        look.saved_files(args.saved), args.data, args.rules, args.allow_partial
    )
    for message in skipped:
        print(f"not in the figure: {message}", file=sys.stderr)
    epochs = [sorted(many, key=lambda s: s["epoch"] or 0) for many in runs.values()]
    scores = [
        s
        for many in epochs
        for s in (many if args.kind == "curves" else many[-1:])
        if s["run"] and "votes" not in s
    ]
    mine = ours(scores, args.kind)
    paper = published(args.kind, {*args.paper} or {look.paper_model(s["model"]) for s in scores})
    there = mine.keys() | paper.keys()
    wanted = args.task or (there if args.paper else mine)
    panels = {
        task: mine.get(task, {}) | paper.get(task, {})
        for task in tasks.TASKS
        if task in wanted and task in there
    }
    if not panels:
        raise UserError(
            f"there is no student in {args.saved}/completion_data to draw (--paper MODEL draws the paper's values alone)"
        )
    styles = {
        name: STYLES[i % len(STYLES)]
        for i, name in enumerate(
            dict.fromkeys(name for series in panels.values() for name in series)
        )
    }
    xs = {x for series in panels.values() for points in series.values() for x in points} - {None}
    names = sorted(xs) if args.kind == "teacher" else []
    height = 1 if len(panels) < 4 else -(-len(panels) // 3) if len(panels) > 4 else 2
    width = -(-len(panels) // height)
    size = max(5, 4 * width), 3.4 * height + 0.2 * len(styles)
    figure, grid = pyplot.subplots(height, width, figsize=size, squeeze=False, layout="constrained")
    for panel in grid.flat[len(panels) :]:
        panel.axis("off")
    for panel, (task, series) in zip(grid.flat, panels.items()):
        draw_panel(panel, task, args.kind, series, styles, names)
    legend = {
        label: mark
        for panel in grid.flat
        for mark, label in zip(*panel.get_legend_handles_labels())
    }
    figure.legend(
        legend.values(),
        legend.keys(),
        loc="outside lower center",
        ncols=2 if width > 1 else 1,
        fontsize=8,
        handlelength=3.5,
        title="bars, bands: 95% interval, or the standard deviation of several seeds"
        if mine
        else None,
        title_fontsize=8,
    )
    image = io.BytesIO()
    figure.savefig(image, format=form, dpi=150)
    pyplot.close(figure)
    write_atomic(args.out, image.getvalue())
    print(f"plot: {', '.join(panels)} -> {args.out}")
