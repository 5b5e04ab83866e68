"""What runs left in saved/, to look at: the table beside the paper's values, the report of a run, single completions.

    python evaluate.py score FILE ... | table | show FILE | diff FILE FILE
"""
import csv
import functools
import json
import re
import sys
from pathlib import Path

import evaluate
import tasks
from data import files
from data.files import UserError


def print_scores(scores):
    """One aligned line per file."""
    print("accuracy  95% interval      paper flexible contains  format complete no answer      n  file")
    for s in scores:
        interval = f"[{s['low']:.2f}, {s['high']:.2f}]"
        measures = " ".join(f"{s[k]:8.2f}" for k in ("paper", "flexible", "contains_answer", "correct_format", "complete"))
        print(f"{s['accuracy']:8.2f}  {interval:<14} {measures[1:]} {s['no_answer']:9d} {s['n']:6d}  {s['file']} ({s['part']})")


def score(args):
    """One line, or one JSON object, for each completion file."""
    what = {"part": args.part, "split": args.split, "data_dir": args.data, "rules": args.rules, "allow_partial": args.allow_partial}
    scores = files.over_cores(functools.partial(evaluate.score, **what), args.files)
    if not args.json:
        return print_scores(scores)
    for s in scores:
        print(json.dumps(s))


# ---------------- The table: methods x tasks, from what lies in saved/

def read_paper_results():
    """-> {(model, method, task): the accuracy that the paper prints}"""
    with open(Path(__file__).parent / "paper_results.csv", newline="") as f:
        return {(r["model"], r["method"], r["dataset"]): float(r["accuracy"]) for r in reversed(list(csv.DictReader(f)))
                if r["kind"] == "printed" and not r["train_size"]}


def paper_value(results, score):
    """-> the published accuracy of the same model, method and task, or None."""
    key, model, method = score["train_key"] or "", re.sub(r"^google[_/]", "", score["model"] or ""), score["method"]
    if score["split"] != "default" or not re.fullmatch(r"((ft|ft_cot)(_\d+aug)?)?", key):
        return None  # another split, template, seed: not the paper's cell
    is_teacher = model.startswith("text-davinci")
    names = {"zs": "zero_shot", "zs_cot": "teacher_zero_shot_cot" if is_teacher else "zero_shot_cot", "fs_cot": "few_shot_cot",
             "ft": "fine_tune", "ft_cot": "fine_tune_cot_diverse" if "aug" in key else "fine_tune_cot"}
    return results.get((model if is_teacher else model.replace("-", "_"), names.get(method, method), score["task"]))


def collect(saved, data_dir, rules="paper", allow_partial=False):
    """-> {(model, label): {task: score}} over every completion file below saved/, and the files that could not be scored.

    Teachers are scored on all samples and all repeats, as in the paper, students on the test part.  Of several epochs the
    last stands in one row, the best on the test set in another, as is the paper's protocol, and the one that is best on
    the validation share, if there is one, in a third."""
    table, skipped, ranks = {}, [], {}
    for path in sorted(Path(saved, "completion_data").glob("B_*/*.json")):
        try:
            metadata, _ = evaluate.read_completions(path)
            is_student = metadata.get("train_key") or metadata.get("finetune_key") or metadata.get("part") == "test"
            where = metadata.get("split") or "default", data_dir, rules, allow_partial
            s = evaluate.score(path, "test" if is_student else "all", *where)
            label, epoch = s["train_key"] or s["method"] or "?", s["epoch"]
            measures = {label: epoch or 0}
            if epoch is not None:
                measures[f"{label}, best test epoch (the paper's protocol)"] = s["accuracy"]
            if metadata.get("validation"):
                measures[f"{label}, epoch chosen on validation"] = evaluate.score(path, "validation", *where)["accuracy"]
        except UserError as e:
            skipped.append(str(e))
            continue
        for row, measure in measures.items():
            cell = s["model"] or "?", row, s["task"]
            if cell not in ranks or measure > ranks[cell]:
                ranks[cell] = measure
                table.setdefault(cell[:2], {})[s["task"]] = s
    return table, skipped


def print_table(table, skipped, results):
    """Rows: model and method; columns: tasks; cells: accuracy [95% interval] (the paper's value)."""
    columns = [key for key in tasks.TASKS if any(key in row for row in table.values())]
    def cell(s):
        paper = paper_value(results, s)
        return f"{s['accuracy']:.2f} [{s['low']:.1f}, {s['high']:.1f}]" + (f" (paper {paper:.2f})" if paper is not None else "")
    lines = [["model", "method", *(tasks.TASKS[key].name for key in columns)],
             ["", "random", *(f"{tasks.TASKS[key].random:.2f}" for key in columns)]]
    lines += [[*names, *(cell(row[key]) if key in row else "-" for key in columns)] for names, row in sorted(table.items())]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())
    for message in skipped:
        print(f"not in the table: {message}", file=sys.stderr)


def table(args):
    """Methods x tasks, beside the paper's values."""
    cells, skipped = collect(args.saved, args.data, args.rules, args.allow_partial)
    if not cells:
        raise UserError(f"there is nothing to show under {args.saved}/completion_data{': ' + skipped[0] if skipped else ''}")
    print_table(cells, skipped, read_paper_results())


# ---------------- What one looks at: single completions

def show(args):
    """Print some wrong, right and unreadable completions of a file."""
    judged = evaluate.judge_rows(*evaluate.read_completions(args.file), args.rules)
    for kind in ("wrong", "right", "unreadable"):
        found = [(row, verdicts) for row, outcome, verdicts in judged if outcome == kind]
        print(f"\n{len(found)} of {len(judged)} are {kind}" + (f"; the first {args.limit}:" if len(found) > args.limit else ""))
        for row, verdicts in found[:args.limit]:
            evaluate.print_completion(kind, row, verdicts)


def diff(args):
    """Print the questions on which one file is right and the other is not, and how many there are of each."""
    a, b = ({(row["sample_index"], row["completion_index"]): (row, outcome == "right", verdicts)
             for row, outcome, verdicts in evaluate.judge_rows(*evaluate.read_completions(path), args.rules)} for path in (args.a, args.b))
    both = sorted(a.keys() & b.keys())
    if not both or any(a[key][0]["question"].strip() != b[key][0]["question"].strip() for key in both):
        raise UserError(f"{args.a} and {args.b} hold no completions of the same questions: compare two files of one task")
    for key in (key for key in both if a[key][1] != b[key][1]):
        for path, (row, right, verdicts) in ((args.a, a[key]), (args.b, b[key])):
            evaluate.print_completion(f"{'right' if right else 'wrong'} in {path}", row, verdicts)
    counts = [sum((a[key][1], b[key][1]) == pair for key in both) for pair in ((True, True), (True, False), (False, True), (False, False))]
    print("\n{} completions in both files: {} right in both, {} in the first alone, {} in the second alone, {} in neither"
          .format(len(both), *counts))


# ---------------- Command line: the part of evaluate.py's that looks

def add_commands(commands):
    """Add score, table, show and diff to the command line of evaluate.py."""
    s = commands.add_parser("score", help="score completion files")
    s.add_argument("files", nargs="+", help="completion files")
    s.add_argument("--part", choices=["train", "validation", "test", "all"], default="test",
                   help="samples to score (default test; the paper's Teacher rows: all)")
    s.add_argument("--split", default="default", help="default, template, few_shot_8, ... (default: default)")
    s.add_argument("--json", action="store_true", help="one JSON object a file instead of a table")
    t = commands.add_parser("table", help="methods x tasks, beside the paper's values")
    t.add_argument("--saved", default="saved", help="folder that runs write to (default saved)")
    r = commands.add_parser("show", help="read wrong, right and unreadable completions of a file")
    r.add_argument("file", help="completion file")
    r.add_argument("--limit", type=int, default=5, help="completions of each kind (default 5)")
    d = commands.add_parser("diff", help="the questions on which two completion files differ")
    d.add_argument("a", help="completion file")
    d.add_argument("b", help="another, of the same task")
    for p in (s, t, r, d):
        p.add_argument("--rules", choices=["paper", "flexible"], default="paper", help="answer cleansing that decides (default paper)")
    for p in (s, t):
        p.add_argument("--data", default="data", help="folder of the prepared benchmarks (default data)")
        p.add_argument("--allow_partial", action="store_true", help="score files that lack samples of the part")
    for p, run in ((s, score), (t, table), (r, show), (d, diff)):
        p.set_defaults(run=run)
