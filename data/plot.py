"""Figures of the studies from what lies in saved/: accuracy against degree, training questions, student size, teacher or epoch.

    python evaluate.py plot degree --out degree.png [--task multiarith svamp] [--paper curie]

One panel a task; ours in black with the 95% interval (of several seeds: mean and standard deviation), the paper's values in grey with
hollow marks, a random guess dotted.  Line styles and marks differ, so that it can be read without colour.  Needs matplotlib.
"""
import csv
import statistics
import sys
from pathlib import Path

import tasks
from data import look
from data.files import UserError

KINDS = {  # figure: (what of a run stands on the x axis, its title, whether its scale is logarithmic)
    "degree": ("degree", "D, rationales a question", True),
    "train_size": ("questions", "training questions", True),
    "student": ("parameters", "parameters of the student", True),
    "teacher": ("teacher", "teacher", False),
    "curves": ("epoch", "epoch", False),
}
COLUMNS = {"degree": "degree", "train_size": "train_size", "teacher": "teacher"}  # of paper_results.csv
SIZES = {  # parameters of the paper's students, in millions; of GPT-3's as the paper gives them
    "ada": 300, "babbage": 1300, "curie": 6700, "t5_small": 60, "t5_base": 220, "t5_large": 700, "flan_t5_small": 60, "flan_t5_base": 220,
    "flan_t5_large": 700, "gpt2": 124, "gpt2_medium": 355, "gpt2_large": 774}
METHOD_NAMES = {"fine_tune": "ft", "fine_tune_cot": "ft_cot", "fine_tune_cot_diverse": "ft_cot diverse", "zero_shot": "zs",
                "few_shot_cot": "fs_cot"}
STYLES = [(line, mark) for line in ("-", "--", "-.", ":") for mark in "osD^v"]


def add_flags(parser):
    parser.add_argument("kind", choices=KINDS, help="what stands on the x axis")
    parser.add_argument("--out", required=True, help="file to write: .png, .pdf or .svg")
    parser.add_argument("--task", nargs="+", help="default: all that there is something of")
    parser.add_argument("--paper", nargs="*", default=[], metavar="MODEL", help="draw the paper's values of these students too (curie, gpt2, "
                        "flan_t5_base, ...; default: of those that we have)")


# ---------------- What is drawn: {task: {series: {x: [score or accuracy, ...]}}}

def ours(scores, kind):
    """-> {task: {series: {x: [score of each seed]}}}.  A series is what the runs have in common; x None: it knows no x (ft, no degree)."""
    axis = KINDS[kind][0]
    seen = {}
    for s in scores:
        run = {"model": s["model"], "method": s["method"], **s["run"], "epoch": s["epoch"]}
        run = {k: v for k, v in run.items() if k not in ("seed", "epochs", *(("model",) if kind == "student" else ("parameters",)))
               and (k == axis or k not in ("epoch", "questions") or kind == "curves" and k == "questions")}
        x = run.pop(axis, None)
        if kind == "train_size":
            run.pop("split", None)
        if kind == "degree":
            run.pop("temperature", None)
        seen.setdefault(s["task"], []).append((run, x, s))
    figure = {}
    for task, runs in seen.items():
        varied = [k for k in dict.fromkeys(k for run, _, _ in runs for k in run) if k in ("model", "method")
                  or len({str(run[k]) for run, _, _ in runs if k in run}) > 1]
        for run, x, s in runs:
            name = " ".join(str(run[k]) if k in ("model", "method") else f"{k} {run[k]}" for k in varied if k in run)
            figure.setdefault(task, {}).setdefault(name, {}).setdefault(x, []).append(s)
    return figure


def published(kind, models):
    """-> {task: {series: {x: accuracy}}} of the paper's tables and figures."""
    figure = {}
    with open(Path(__file__).parent / "paper_results.csv", newline="") as f:
        for r in csv.DictReader(f):
            if kind == "student":
                there = r["table"].endswith("_students") and r["method"] in METHOD_NAMES and r["model"] in models
                x, model = SIZES.get(r["model"], 0) * 1e6, r["table"].removesuffix("_students")
            else:
                there = r["model"] in models and r["table"].startswith(f"figure_{ {'degree': 'diverse', 'teacher': 'teachers'}.get(kind, kind)}")
                x, model = r[COLUMNS[kind]] if kind in COLUMNS else "", r["model"]
                x = x if kind == "teacher" else float(x or 0)
            if there and x:
                name = f"paper: {model} {METHOD_NAMES.get(r['method'], r['method'])}"
                figure.setdefault(r["dataset"], {}).setdefault(name, {})[x] = float(r["accuracy"])
    return figure


def band(scores):
    """-> (middle, low, high) of a point: one seed's 95% interval, or mean and standard deviation of several."""
    if len(scores) == 1:
        return scores[0]["accuracy"], scores[0]["low"], scores[0]["high"]
    accuracies = [s["accuracy"] for s in scores]
    middle, spread = statistics.mean(accuracies), statistics.stdev(accuracies)
    return middle, max(0, middle - spread), min(100, middle + spread)


# ---------------- Drawing

def draw_line(panel, name, points, style, colour, places):
    """One series: marks, line and band; what knows no x is a level line."""
    line, mark = style
    if None in points:
        middle, low, high = band(points[None])
        panel.axhline(middle, linestyle=line, color=colour, linewidth=1, label=name)
        return panel.axhspan(low, high, color=colour, alpha=0.08, linewidth=0)
    xs = sorted(points, key=lambda x: places.get(x, x))
    values = [band(points[x]) for x in xs] if isinstance(points[xs[0]], list) else [(points[x], points[x], points[x]) for x in xs]
    middle, low, high = zip(*values)
    at = [places.get(x, x) for x in xs]
    panel.plot(at, middle, linestyle=line, marker=mark, markersize=5, color=colour, linewidth=1.2, label=name,
               markerfacecolor="white" if colour != "black" else "black")
    if colour == "black":
        panel.fill_between(at, low, high, color="black", alpha=0.12, linewidth=0)
        panel.errorbar(at, middle, yerr=[[m - a for m, a in zip(middle, low)], [b - m for m, b in zip(middle, high)]], fmt="none",
                       ecolor="black", elinewidth=0.7, capsize=2)


def draw_panel(panel, task, kind, mine, paper):
    """One task."""
    _, title, logarithmic = KINDS[kind]
    xs = dict.fromkeys(x for points in [*mine.values(), *paper.values()] for x in points if x is not None)
    places = {x: i for i, x in enumerate(xs)} if kind == "teacher" else {}
    for i, (name, points) in enumerate(mine.items()):
        draw_line(panel, name, points, STYLES[i % len(STYLES)], "black", places)
    for i, (name, points) in enumerate(paper.items()):
        draw_line(panel, name, points, STYLES[i % len(STYLES)], "0.55", places)
    if tasks.TASKS[task].random:
        panel.axhline(tasks.TASKS[task].random, linestyle=(0, (1, 3)), color="0.4", linewidth=1, label="random guess")
    if logarithmic:
        panel.set_xscale("log", base=2 if kind == "degree" else 10)
    if places:
        panel.set_xticks(list(places.values()), list(places), rotation=20, ha="right", fontsize=8)
    elif kind in ("degree", "train_size"):
        panel.set_xticks(sorted(xs), [f"{x:g}" for x in sorted(xs)])
        panel.minorticks_off()
    panel.set_title(tasks.TASKS[task].name, fontsize=10)
    panel.set_xlabel(title)
    panel.set_ylabel("accuracy on the test part, %")
    panel.grid(alpha=0.25)
    panel.legend(fontsize=7, framealpha=0.9)


def plot(args):
    """Draw one of KINDS.  Raises UserError where there is nothing to draw, or no matplotlib to draw with."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("figures need matplotlib, which nothing else here does: python -m pip install matplotlib") from None
    matplotlib.use("agg")
    from matplotlib import pyplot
    runs, skipped = look.scored_runs(look.saved_files(args.saved), args.data, args.rules, args.allow_partial)
    for message in skipped:
        print(f"not in the figure: {message}", file=sys.stderr)
    epochs = [sorted(many, key=lambda s: s["epoch"] or 0) for many in runs.values()]
    scores = [s for many in epochs for s in (many if args.kind == "curves" else many[-1:]) if s["run"] and "votes" not in s]
    mine = ours(scores, args.kind)
    paper = published(args.kind, {*args.paper} or {look.paper_model(s["model"]) for s in scores})
    chosen = [task for task in tasks.TASKS if task in (args.task or mine or (paper if args.paper else ())) and (task in mine or task in paper)]
    if not chosen:
        raise UserError(f"there are no students in {args.saved}/completion_data to draw {args.kind} of (--paper MODEL: the paper's values alone)")
    rows = -(-len(chosen) // 2) if len(chosen) > 3 else 1
    figure, panels = pyplot.subplots(rows, -(-len(chosen) // rows), figsize=(4.8 * -(-len(chosen) // rows), 3.6 * rows), squeeze=False)
    for panel in panels.flat[len(chosen):]:
        panel.axis("off")
    for panel, task in zip(panels.flat, chosen):
        draw_panel(panel, task, args.kind, mine.get(task, {}), paper.get(task, {}))
    figure.tight_layout()
    figure.savefig(args.out, dpi=150)
    print(f"plot: {', '.join(chosen)} -> {args.out}")
