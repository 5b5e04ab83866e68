"""What runs left in saved/, to look at: tables beside the paper's values, majority votes, paired comparisons, single completions.

python evaluate.py score FILE ... | table [--format markdown] | show FILE | diff FILE FILE        (figures: extras/plot.py)
"""

import csv
import json
import math
import re
import statistics
import sys
from collections import Counter
from pathlib import Path

import evaluate
import tasks
from storage import UserError


def print_scores(scores):
    """One aligned line per file."""
    print(
        "accuracy  95% interval      paper flexible contains  format complete no answer      n  file"
    )
    for s in scores:
        interval = f"[{s['low']:.2f}, {s['high']:.2f}]"
        measures = " ".join(
            f"{s[k]:8.2f}"
            for k in ("paper", "flexible", "contains_answer", "correct_format", "complete")
        )
        print(
            f"{s['accuracy']:8.2f}  {interval:<14} {measures[1:]} {s['no_answer']:9d} {s['n']:6d}  {s['file']} ({s['part']})"
        )
        if "votes" in s:
            print(f"{'':10}{describe(s['votes'])}")


def score_with_votes(path, **what):
    """evaluate.score, with "votes" where questions were answered several times."""
    s, judged = evaluate.score_rows(path, *evaluate.read_completions(path), **what)
    several = s["n"] >= 2 * s["questions"] and votes(judged, s["rules"])
    return s | ({"votes": several} if several else {})


def score(args):
    """One line, or one JSON object, for each completion file."""
    what = {
        "part": args.part,
        "split": args.split,
        "data_dir": args.data,
        "rules": args.rules,
        "allow_partial": args.allow_partial,
    }
    scores = [score_with_votes(path, **what) for path in args.files]
    if not args.json:
        return print_scores(scores)
    for s in scores:
        print(json.dumps(s))


# ---------------- Several answers to a question: majority vote (self-consistency) and pass@k


def majority(outcomes):
    """-> whether the answer given most often is right, of [(prediction, right)]; what cannot be read has no vote, and of equally
    frequent answers the one given first wins."""
    cast = [(prediction, right) for prediction, right in outcomes if prediction not in (None, "")]
    return (
        bool(cast)
        and dict(cast)[Counter(prediction for prediction, _ in cast).most_common(1)[0][0]]
    )


def pass_at_k(n, correct, k):
    """The chance that k of n answers, drawn without putting back, hold one of the `correct` right ones: 1 - C(n-c, k) / C(n, k)."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def by_question(judged, rules):
    """-> {sample_index: [(prediction, right), ...] in order of completion}, of what evaluate.grade_rows gives"""
    questions = {}
    for row, outcome, verdicts in judged:
        questions.setdefault(row["sample_index"], []).append(
            (verdicts[rules].prediction, outcome == "right")
        )
    return questions


def votes(judged, rules):
    """-> {"k", "questions", "maj", "maj_low", "maj_high", "pass": {k: %}} of judged completions, k the answers that every question
    has at least; None where some question has one."""
    questions = list(by_question(judged, rules).values())
    k = min(map(len, questions))
    n = len(questions)
    if k < 2:
        return None
    agreed = sum(majority(many[:k]) for many in questions)
    low, high = evaluate.wilson(agreed, n)
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64, 128) if size < k] + [k]
    passed = {
        size: sum(pass_at_k(len(many), sum(right for _, right in many), size) for many in questions)
        / n
        for size in sizes
    }
    return {
        "k": k,
        "questions": n,
        "maj": round(100 * agreed / n, 2),
        "maj_low": round(low, 2),
        "maj_high": round(high, 2),
        "pass": {size: round(100 * share, 2) for size, share in passed.items()},
    }


def describe(v):
    return (
        f"maj@{v['k']} {v['maj']:.2f}% [{v['maj_low']:.1f}, {v['maj_high']:.1f}] of {v['questions']} questions; "
        + ", ".join(f"pass@{k} {share:.2f}%" for k, share in v["pass"].items())
    )


def describe_votes(s, data_dir):
    """-> what votes says of a scored file, in one line."""
    return describe(
        score_with_votes(
            s["file"],
            part=s["part"],
            split=s["split"],
            data_dir=data_dir,
            rules=s["rules"],
            allow_partial=False,
        )["votes"]
    )


# ---------------- Two runs on the same questions


def mcnemar(first, second):
    """-> p of the exact McNemar test: how likely a split of the questions on which one of two runs alone is right is, at least as
    uneven as first : second, where both runs are equally good (two-sided binomial test with 1/2)."""
    n = first + second
    less = min(first, second)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(less + 1)) / 2**n)


def diff(args):
    """Print the completions on which one file is right and the other is not, how many there are of each, and, over questions (by
    majority where they have several answers), the exact McNemar test."""
    files = [
        evaluate.grade_rows(*evaluate.read_completions(path), args.rules)
        for path in (args.a, args.b)
    ]
    a, b = (
        {
            (row["sample_index"], row["completion_index"]): (row, outcome == "right", verdicts)
            for row, outcome, verdicts in judged
        }
        for judged in files
    )
    both = sorted(a.keys() & b.keys())
    if not both or any(
        a[key][0][k].strip() != b[key][0][k].strip() for key in both for k in ("question", "answer")
    ):
        raise UserError(
            f"{args.a} and {args.b} hold no completions of the same questions and gold answers: compare two files of one task"
        )
    unlike = [key for key in both if a[key][1] != b[key][1]]
    for key in unlike[: args.limit]:
        for path, (row, right, verdicts) in ((args.a, a[key]), (args.b, b[key])):
            print_completion(f"{'right' if right else 'wrong'} in {path}", row, verdicts)
    if len(unlike) > args.limit:
        print(f"\n... and {len(unlike) - args.limit} more (--limit)")

    def counts(pairs):
        return [
            pairs.count(pair)
            for pair in ((True, True), (True, False), (False, True), (False, False))
        ]

    print(
        "\n{} completions in both files: {} right in both, {} in the first alone, {} in the second alone, {} in neither".format(
            len(both), *counts([(a[key][1], b[key][1]) for key in both])
        )
    )
    qa, qb = (by_question(judged, args.rules) for judged in files)
    pairs = [(majority(qa[i]), majority(qb[i])) for i in sorted(qa.keys() & qb.keys())]
    _, first, second, _ = counts(pairs)
    shares = [100 * sum(column) / len(pairs) for column in zip(*pairs)]
    print(
        f"{len(pairs)} questions: {shares[0]:.2f}% and {shares[1]:.2f}% right; exact McNemar test: {first} against {second}, "
        f"p = {mcnemar(first, second):.3g}"
    )


# ---------------- The table: methods x tasks, from what lies in saved/


def read_paper_results():
    """-> {(model, method, task): the accuracy that the paper prints}"""
    with open(Path(__file__).parent.parent / "data" / "paper_results.csv", newline="") as f:
        return {
            (r["model"], r["method"], r["dataset"]): float(r["accuracy"])
            for r in reversed(list(csv.DictReader(f)))
            if r["kind"] == "printed" and not r["train_size"]
        }


def paper_model(name):
    """google/flan-t5-base, google_flan-t5-base, google-t5_t5-base -> the name in paper_results.csv: flan_t5_base, t5_base"""
    name = re.sub(r"^(google|google-t5|openai-community)[_/]", "", name or "")
    return name if name.startswith("text-davinci") else name.replace("-", "_")


def paper_value(results, s):
    """-> the published accuracy of the same model, method and task, or None."""
    key = s["train_key"] or ""
    model = paper_model(s["model"])
    method = s["method"]
    if (
        s["split"] != "default"
        or not re.fullmatch(r"((ft|ft_cot)(_\d+aug)?)?", key)
        or s.get("measure")
    ):
        return None  # another split, template, learning rate, seed, a vote: not the paper's cell
    if "aug" in key and key != f"ft_cot_{64 if s['task'] in ('multiarith', 'svamp') else 8}aug":
        return None  # the paper's tables have D = 64 for these two, 8 elsewhere
    is_teacher = model.startswith("text-davinci")
    names = {
        "zs": "zero_shot",
        "zs_cot": "teacher_zero_shot_cot" if is_teacher else "zero_shot_cot",
        "fs_cot": "few_shot_cot",
        "ft": "fine_tune",
        "ft_cot": "fine_tune_cot_diverse" if "aug" in key else "fine_tune_cot",
    }
    return results.get((model, names.get(method, method), s["task"]))


def score_run(path, data_dir, rules, allow_partial):
    """-> (score of a file, its row's name).  Teachers are scored on all samples and all repeats, as in the paper, students on the
    test part; "validation": on the share that was set aside, if there is one; "votes": where questions have several answers."""
    metadata, rows = evaluate.read_completions(path)
    is_student = (
        metadata.get("train_key") or metadata.get("finetune_key") or metadata.get("part") == "test"
    )
    where = metadata.get("split") or "default", data_dir, rules, allow_partial
    s, judged = evaluate.score_rows(path, metadata, rows, "test" if is_student else "all", *where)
    label = s["train_key"] or s["method"] or "?"
    if metadata.get("validation"):
        s["validation"] = evaluate.score_rows(path, metadata, rows, "validation", *where)[0][
            "accuracy"
        ]
    if s["n"] >= 2 * s["questions"] and (v := votes(judged, rules)):
        s["votes"] = v
        label += f", {v['k']} samples a question" if is_student else ""
    return s, label if is_student else f"{label}, all questions"


def chosen_epochs(epochs):
    """-> {what the row's name ends with: the score of one of a run's epochs}.  Each row says how its epoch was chosen: the last; the
    best on the test set, as is the paper's protocol; the one that is best on the validation share."""
    epochs = sorted(epochs, key=lambda s: s["epoch"] or 0)
    rows = {"" if epochs[-1]["epoch"] is None else ", last epoch": epochs[-1]}
    if len(epochs) > 1:
        rows[", best test epoch (the paper's protocol)"] = max(epochs, key=lambda s: s["accuracy"])
    if all("validation" in s for s in epochs):
        rows[", epoch chosen on validation"] = max(epochs, key=lambda s: s["validation"])
    return rows


def vote_rows(s):
    """-> {what the row's name ends with: score}: of several answers a question the mean, the majority's and pass@k."""
    if not (v := s.get("votes")):
        return {"": s}
    low, high = evaluate.wilson(v["pass"][v["k"]] / 100 * v["questions"], v["questions"])
    return {
        "": s,
        f", maj@{v['k']}": s
        | {"accuracy": v["maj"], "low": v["maj_low"], "high": v["maj_high"], "measure": "maj"},
        f", pass@{v['k']}": s
        | {"accuracy": v["pass"][v["k"]], "low": low, "high": high, "measure": "pass"},
    }


def scored_runs(paths, data_dir, rules="paper", allow_partial=False):
    """-> ({(model, label, task): [score of each epoch]} of completion files, the sentences about those that could not be scored)."""
    runs = {}
    skipped = []
    for path in paths:
        try:
            s, label = score_run(path, data_dir, rules, allow_partial)
        except UserError as e:
            skipped.append(str(e))
            continue
        runs.setdefault((s["model"] or "?", label, s["task"]), []).append(s)
    return runs, skipped


def collect(paths, data_dir, rules="paper", allow_partial=False):
    """-> ({(model, row): {task: score}}, the sentences about files that could not be scored): the table, one score a cell."""
    runs, skipped = scored_runs(paths, data_dir, rules, allow_partial)
    table = {}
    for (model, label, task), epochs in runs.items():
        for choice, one in chosen_epochs(epochs).items():
            for vote, s in vote_rows(one).items():
                table.setdefault((model, label + choice + vote), {})[task] = s
    return table | over_seeds(table), skipped


def over_seeds(table):
    """-> {(model, row): {task: score}} of the rows that differ in nothing but the seed: their mean and standard deviation."""
    groups = {}
    means = {}
    for (model, row), cells in table.items():
        for task, s in cells.items():
            if (seed := (s.get("run") or {}).get("seed")) is not None:
                key = s["train_key"]
                groups.setdefault(
                    (model, row.replace(key, key.removesuffix(f"_s{seed}"), 1), task), []
                ).append(s)
    for (model, row, task), many in groups.items():
        if len(many) > 1:
            accuracies = [s["accuracy"] for s in many]
            means.setdefault((model, f"{row}, mean of {len(many)} seeds"), {})[task] = many[0] | {
                "accuracy": statistics.mean(accuracies),
                "spread": statistics.stdev(accuracies),
                "measure": "mean",
            }
    return means


# ---------------- The table as text

METHODS = ("zs", "zs_cot", "fs_cot", "ft", "ft_cot")  # in the paper's order


def table_lines(table, results):
    """-> [[cell, ...], ...]: a head; the random baseline; for each row accuracies, their intervals and, where it has any, the paper's
    values.  Teachers come first; columns are the tasks in the paper's order."""
    columns = [key for key in tasks.TASKS if any(key in row for row in table.values())]
    lines = [
        ["model", "method", *(tasks.TASKS[key].name for key in columns)],
        ["", "random guess", *(f"{tasks.TASKS[key].random:.2f}" for key in columns)],
    ]

    def order(item):
        (model, row), cells = item
        one = next(iter(cells.values()))
        natural = [
            int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", row)
        ]  # 2aug before 16aug
        return (
            one["part"] != "all",
            model,
            METHODS.index(one["method"]) if one["method"] in METHODS else -1,
            natural,
        )

    for (model, row), cells in sorted(table.items(), key=order):

        def line(head, text):
            return [*head, *(text(cells[key]) if key in cells else "-" for key in columns)]

        lines.append(line((model, row), lambda s: f"{s['accuracy']:.2f}"))
        if all("spread" in s for s in cells.values()):
            lines.append(line(("", "  standard deviation"), lambda s: f"{s['spread']:.2f}"))
        else:
            lines.append(
                line(("", "  95% interval"), lambda s: f"[{s['low']:.1f}, {s['high']:.1f}]")
            )
        if any(paper_value(results, s) is not None for s in cells.values()):
            lines.append(
                line(
                    ("", "  paper"),
                    lambda s: "-" if (value := paper_value(results, s)) is None else f"{value:.2f}",
                )
            )
    return lines


def terminal(lines):
    forms = [
        f"{'<' if i < 2 else '>'}{max(map(len, column))}" for i, column in enumerate(zip(*lines))
    ]  # names left, numbers right
    return [
        "  ".join(f"{text:{form}}" for text, form in zip(line, forms)).rstrip() for line in lines
    ]


def markdown(lines):
    rows = ["| " + " | ".join(text.strip() for text in line) + " |" for line in lines]
    return [rows[0], "|---|---|" + "--:|" * (len(lines[0]) - 2), *rows[1:]]


def latex(lines):
    """A booktabs tabular."""

    def cell(text):
        return r"\quad " * text.startswith("  ") + re.sub(r"([&%#_])", r"\\\1", text.strip())

    rows = [" & ".join(map(cell, line)) + r" \\" for line in lines]
    head = r"\begin{tabular}{ll" + "r" * (len(lines[0]) - 2) + "}"
    return [head, r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule", r"\end{tabular}"]


FORMATS = {"terminal": terminal, "markdown": markdown, "latex": latex}


def print_table(table, skipped, results, form="terminal"):
    """Print it in one of FORMATS; what could not be scored goes to stderr."""
    print("\n".join(FORMATS[form](table_lines(table, results))))
    for message in skipped:
        print(f"not in the table: {message}", file=sys.stderr)


def table(args):
    """Methods x tasks, beside the paper's values."""
    cells, skipped = collect(saved_files(args.saved), args.data, args.rules, args.allow_partial)
    if not cells:
        raise UserError(
            f"there is nothing to show under {args.saved}/completion_data{': ' + skipped[0] if skipped else ''}"
        )
    print_table(cells, skipped, read_paper_results(), args.format)


def saved_files(saved):
    """-> every completion file that runs left below saved/."""
    return sorted(Path(saved, "completion_data").glob("B_*/*.json"))


# ---------------- What one looks at: single completions


def print_completion(title, row, verdicts):
    """Print question, rationale, completion, gold answer, and what each set of rules makes of it."""
    print(
        f"\n{title} (sample {row['sample_index']}, completion {row['completion_index']})\n  question:   {row['question'].strip()}"
    )
    if "reasoning_completion" in row:
        print(f"  rationale:  {(row['reasoning_completion'] or '').strip()}")
    print(f"  completion: {(row['completion'] or '').strip()}\n  gold:       {row['answer']}")
    for rules, v in verdicts.items():
        print(
            f"  {rules + ':':<11} {v.prediction} is {'right' if v.correct else 'wrong'}, of {v.candidates}"
        )


def show(args):
    """Print some wrong, right and unreadable completions of a file."""
    judged = evaluate.grade_rows(*evaluate.read_completions(args.file), args.rules)
    for kind in ("wrong", "right", "unreadable"):
        found = [(row, verdicts) for row, outcome, verdicts in judged if outcome == kind]
        print(
            f"\n{len(found)} of {len(judged)} are {kind}"
            + (f"; the first {args.limit}:" if len(found) > args.limit else "")
        )
        for row, verdicts in found[: args.limit]:
            print_completion(kind, row, verdicts)


# ---------------- What the user sees at the end of a run


def report(results, student, seed, saved):
    """The table of this run, with a right and a wrong completion to read."""
    task = tasks.TASKS[results[-1]["task"]]
    print(
        f"\n{task.name}, {results[-1]['n']} test questions, student {student}, seed {seed} (a random guess: {task.random}%)\n"
    )
    print(f"{'method':<22} {'accuracy':>8}  {'95% interval':<15} {'correct':>9}  {'no answer':>9}")
    for r in results:
        label = {"ft": "ft (answers alone)", "ft_cot": "ft_cot (rationales)"}.get(
            r["method"], r["method"]
        )
        interval = f"[{r['low']:.1f}, {r['high']:.1f}]"
        print(
            f"{label:<22} {r['accuracy']:7.1f}%  {interval:<15} {r['correct']:>5}/{r['n']}  {r['no_answer']:>9}"
        )
    judged = []
    for r in reversed(results):
        metadata, rows = evaluate.read_completions(r["file"])
        rows = [
            row for row in rows if row["sample_index"] not in (metadata.get("validation") or [])
        ]
        judged += [(r["method"], *one) for one in evaluate.grade_rows(metadata, rows, "paper")]
    for outcome in ("right", "wrong"):
        for method, row, _, verdicts in [one for one in judged if one[2] == outcome][:1]:
            print_completion(f"A {outcome} completion of {method}:", row, verdicts)
    print(
        f"\nEverything is under {saved}/: completion_data (texts), finetune_data (curated), models (students, log.jsonl).  "
        f"Compare runs: python evaluate.py table --saved {saved}"
    )


# ---------------- Command line: the part of evaluate.py's that looks


def add_commands(commands):
    """Add score, table, plot, show and diff to the command line of evaluate.py."""
    from extras import plot

    s = commands.add_parser("score", help="score completion files")
    s.add_argument("files", nargs="+", help="completion files")
    s.add_argument(
        "--part",
        choices=["train", "validation", "test", "all"],
        default="test",
        help="samples to score (default test; the paper's Teacher rows: all)",
    )
    s.add_argument(
        "--split", default="default", help="default, template, few_shot_8, ... (default: default)"
    )
    s.add_argument("--json", action="store_true", help="one JSON object a file instead of a table")
    t = commands.add_parser("table", help="methods x tasks, beside the paper's values")
    t.add_argument("--format", choices=FORMATS, default="terminal", help="default terminal")
    f = commands.add_parser(
        "plot", help="a figure (needs matplotlib): accuracy against what a study varied"
    )
    plot.add_flags(f)
    r = commands.add_parser("show", help="read wrong, right and unreadable completions of a file")
    r.add_argument("file", help="completion file")
    r.add_argument("--limit", type=int, default=5, help="completions of each kind (default 5)")
    d = commands.add_parser(
        "diff",
        help="the questions on which two completion files differ, and the exact McNemar test",
    )
    d.add_argument("a", help="completion file")
    d.add_argument("b", help="another, of the same task")
    d.add_argument("--limit", type=int, default=20, help="completions to print (default 20)")
    for p in (t, f):
        p.add_argument("--saved", default="saved", help="folder that runs write to (default saved)")
    for p in (s, t, f, r, d):
        p.add_argument(
            "--rules",
            choices=["paper", "flexible"],
            default="paper",
            help="answer cleansing that decides (default paper)",
        )
    for p in (s, t, f):
        p.add_argument(
            "--data", default="data", help="folder of the prepared benchmarks (default data)"
        )
        p.add_argument(
            "--allow_partial", action="store_true", help="score files that lack samples of the part"
        )
    for p, run in ((s, score), (t, table), (f, plot.plot), (r, show), (d, diff)):
        p.set_defaults(run=run)
