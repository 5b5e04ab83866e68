"""A page to look through: completions, verdicts, training samples, curves, settings in one file.

    python evaluate.py page --out page.html                  # the last epoch of every run in saved/
    python evaluate.py page --out page.html FILE [FILE ...]  # of these completion files

The page is extras/page.html with a JSON object in it; it asks no network for anything.  What the
object holds is what this module gathers; what it looks like is in page.html alone.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import candidates
import evaluate
import storage
import tasks
from completions import Completion, read_completions
from extras import paper, report, runs, training_data
from extras.training_data import RunFiles
from storage import UserError

TEMPLATE = Path(__file__).parent / "page.html"
PLACEHOLDER = "{{data}}"  # in TEMPLATE, where the JSON object goes
OUTCOMES = ["right", "wrong", "unreadable"]
Record = dict[str, Any]  # a JSON object


# ---------------- Where in a text the answer was read


NUMBER = re.compile(r"[-\u2212]?[\d,]*\.?\d+(?:e[+-]?\d{1,3})?")
Span = tuple[int, int]  # start, end


def number_spans(text: str, number: float) -> list[Span]:
    """Return the places of all numbers of this value: ('2 + 3 = 5.0', 5) -> [(8, 11)]"""
    spans = []
    for match in NUMBER.finditer(text):
        try:
            value = candidates.parse_number(match[0])
        except ValueError:
            continue
        start, end = match.span()
        if abs(value - number) < 1e-6:
            spans.append((start, end))
        elif abs(value + number) < 1e-6:  # of '5-3' NUMBER takes -3, and 3 was read
            spans.append((start + 1, end))
    return spans


def answer_spans(text: str, prediction: Any) -> list[Span]:
    """Return the places in a text that read as the prediction.

    Whole words go first: of 'no, not now' with "no" it is [(0, 2)].  Letters may stand apart, as in
    "y a j o"; numbers are found by their value.
    """
    if prediction in (None, ""):
        return []
    if isinstance(prediction, float):
        return number_spans(text, prediction)
    written = str(prediction)
    word = re.escape(written)
    letters = map(re.escape, written[:60])
    apart = r"[\s.,\"'-]{0,4}".join(letters)
    patterns = (
        rf"(?<!\w){word}(?!\w)",
        rf"(?i:(?<!\w){word}(?!\w))",
        word,
        f"(?i:{apart})",
    )
    for pattern in patterns:
        found = re.finditer(pattern, text)
        spans = [match.span() for match in found]
        if spans:
            return spans
    return []


def find_answer(text: str, verdict: tasks.Verdict, rules: str) -> Span | None:
    """Return the place in a text where a verdict's prediction was read, or None.

    It is the last that reads so, but the paper's rules, where a template's prefix is there or none
    is expected, read the first of the candidates behind it: of '5*5 = 25' the first 5.
    """
    prediction = verdict.prediction
    spans = answer_spans(text, prediction)
    if not spans:
        return None
    from_end = 1
    if rules == "paper" and verdict.correct_format:
        from_end = verdict.candidates.count(prediction)
    n = len(spans)
    return spans[-min(from_end, n)]


def verdict_cell(text: str, verdict: tasks.Verdict, rules: str) -> list:
    """Return [what was read, 1 if it is right, start, end in the text or -1, -1]."""
    place = find_answer(text, verdict, rules) or (-1, -1)
    prediction = verdict.prediction
    if isinstance(prediction, float):
        prediction = f"{prediction:.10g}"
    is_right = int(verdict.correct)
    return [prediction, is_right, *place]


# ---------------- A run: a completion file, and what is known of how it was made


class Part(NamedTuple):
    """Where runs lie, and how their files are scored; the same for all files of a page."""

    saved: str
    data: str
    rules: str
    allow_partial: bool


def score_file(path: Path, how: Part) -> tuple[Record, evaluate.Score, list[evaluate.GradedRow]]:
    """Return metadata, score and graded rows of the part that a file's run is judged by."""
    metadata, rows = read_completions(path)
    part = runs.judged_part(metadata)
    choice = (part, None, how.data, how.rules, how.allow_partial)
    score, graded = evaluate.score_rows(path, metadata, rows, *choice)
    return metadata, score, graded


def accuracy_by_epoch(path: Path, how: Part) -> list[list[float]]:
    """Return [epoch, accuracy, low, high] of each evaluated epoch of a run."""
    points = []
    for file in runs.epoch_files(path):
        try:
            _, score, _ = score_file(file, how)
        except UserError:
            continue  # an epoch that cannot be scored is no point
        if score["epoch"]:
            point = [score[name] for name in ("epoch", "accuracy", "low", "high")]
            points.append(point)
    return sorted(points)


def read_log(student: Path | None) -> tuple[Record, list[list[float]]]:
    """Return the first line of a student's log.jsonl, and [epoch, loss] of each epoch."""
    header = {}
    losses = []
    if student is None:
        return header, losses
    path = student / "log.jsonl"
    if not path.exists():
        return header, losses
    text = storage.read_text(path)
    for line in text.split("\n"):
        if not line.endswith("}"):  # a kill may have torn the last line
            continue
        row = storage.parse_json(line, path)
        if "arguments" in row:
            header = row
        elif "epoch_loss" in row:
            losses.append([row["epoch"], row["epoch_loss"]])
    return header, losses


def describe_settings(metadata: Record, log: Record, files: RunFiles) -> list[list]:
    """Return [group, name, value] of everything that is recorded of a run."""
    made_with = {}
    for name in ("torch", "transformers", "device", "ranks", "commit"):
        if name in log:
            made_with[name] = log[name]
    if "command" in log:
        words = map(str, log["command"])
        made_with["command"] = " ".join(words)
    places = {}
    if files.student:
        places["student"] = str(files.student)
    if files.finetune_data:
        places["fine-tuning file"] = str(files.finetune_data)
    groups = {
        "run": metadata.get("run"),
        "decoding": metadata.get("settings"),
        "training": log.get("settings"),
        "flags": log.get("arguments"),
        "made with": made_with,
        "files": places,
    }
    rows = []
    for group, values in groups.items():
        for name, value in (values or {}).items():
            rows.append([group, name, value])
    return rows


def answer_row(one: evaluate.GradedRow) -> list:
    """Return [index, k, completion, rationale, finish, outcome, paper verdict, flexible verdict].

    rationale: step 1 of Zero-shot-CoT, else None; outcome: a position in OUTCOMES.
    """
    row = one.row
    text = row["completion"] or ""
    return [
        row["sample_index"],
        row["completion_index"],
        text,
        row.get("reasoning_completion"),
        row.get("finish_reason"),
        OUTCOMES.index(one.outcome),
        verdict_cell(text, one.verdicts["paper"], "paper"),
        verdict_cell(text, one.verdicts["flexible"], "flexible"),
    ]


def describe_run(path: Path, how: Part) -> Record:
    """Return what the page shows of one completion file.  Raises UserError."""
    metadata, score, graded = score_file(path, how)
    files = training_data.run_files(path, metadata, how.saved)
    log, losses = read_log(files.student)
    outcomes = [one.outcome for one in graded]
    questions = {}
    for one in graded:
        i = one.row["sample_index"]
        questions[i] = question_of(one.row)
    return score | {
        "name": score["train_key"] or score["method"] or "?",
        "counts": list(map(outcomes.count, OUTCOMES)),
        "published": published_accuracy(score),
        "accuracies": accuracy_by_epoch(path, how),
        "losses": losses,
        "settings": describe_settings(metadata, log, files),
        "rows": list(map(answer_row, graded)),
        "questions_of": questions,
        "validation": metadata.get("validation") or [],
        "metadata": metadata,
        "training": None,
    }


def published_accuracy(score: evaluate.Score) -> float | None:
    """Return the paper's accuracy of the same cell; None of a split, or of several answers."""
    if score["split"] != "default":
        return None
    if score["n"] > score["questions"]:
        return None
    results = paper.read_results()
    model = score["model"] or "?"
    method = score["method"] or "?"
    return paper.accuracy(results, model, method, score["train_key"], score["task"])


def question_of(row: Completion) -> list[str]:
    """Return question and gold answer."""
    question = row["question"].strip()
    answer = row["answer"].strip()
    return [question, answer]


# ---------------- What the teacher said, and what became of it


ByIndex = dict[int, list]  # {sample_index: what is known of that question}


class Texts(NamedTuple):
    """What runs of one page share."""

    questions: dict[str, ByIndex]  # {task: {sample_index: [question, gold answer]}}
    teachers: dict[str, ByIndex]  # {file: {sample_index: [[rationale, answer], ...]}}


def describe_training(run: Record, files: RunFiles, how: Part, limit: int, texts: Texts) -> Record:
    """Return what a run learnt from; add its questions and the teacher's texts to `texts`."""
    task = run["task"]
    curated = training_data.read_curated(files.finetune_data, task, files.saved)
    validation = set(run["validation"])
    in_split, _ = tasks.load_split(task, run["split"], how.data)
    train = set(in_split) - validation
    judged = training_data.judge_rationales(curated, task, train, validation)
    indices = curated.data["sample_index"]
    learnable = train.intersection([*judged, *indices])
    order = sorted(learnable)[: limit or None]
    samples = tasks.load(task, how.data)
    for i in order:
        texts.questions[task][i] = question_of(samples[i])
    shown = {row[0] for row in run["rows"]}
    shown.update(order)
    positions = training_data.positions_of(indices)
    of_question = select(positions, shown)
    kept = 0
    dropped = 0
    for marks in judged.values():
        outcomes = [mark[0] for mark in marks]
        kept += outcomes.count(1)
        dropped += outcomes.count(0)
    return {
        "file": str(files.finetune_data),
        "teacher": share_teacher(curated, shown, texts),
        "needs_teacher": "teacher" in curated.settings,
        "order": order,
        "total": len(learnable),
        "kept": kept,
        "rationales": kept + dropped,
        "size": len(indices),
        "judged": select(judged, shown),
        "of_question": of_question,
        **training_data.tokenize_samples(curated, of_question, files),
    }


def select(known: ByIndex, shown: set[int]) -> ByIndex:
    """Return what is known of the questions that are shown."""
    return {i: value for i, value in known.items() if i in shown}


def share_teacher(curated: training_data.Curated, shown: set[int], texts: Texts) -> str | None:
    """Add what a teacher said of these questions to `texts`; return the name of its file."""
    if curated.teacher is None:
        return None
    name = str(curated.teacher)
    said = texts.teachers.setdefault(name, defaultdict(list))
    added = shown - said.keys()
    for row in curated.rows:
        i = row["sample_index"]
        if i in added:
            rationale = tasks.rationale_of(row)
            answer = row["completion"] or ""
            said[i].append([rationale, answer])
    return name


# ---------------- The page


def gather(paths: list[Path], how: Part, limit: int) -> tuple[Record, list[str]]:
    """Return what the page shows, and a sentence for each file that is left out of it.

    limit: training questions a run; 0: all.
    """
    shown = []
    skipped = []
    training = {}
    texts = Texts(questions=defaultdict(dict), teachers={})
    for path in paths:
        try:
            run = describe_run(path, how)
            share_questions(run, texts)
        except UserError as error:
            skipped.append(str(error))
            continue
        shown.append(run)
        metadata = run.pop("metadata")
        files = training_data.run_files(path, metadata, how.saved)
        if not files.finetune_data:
            continue
        key = f"{files.finetune_data} {run['model']}"
        try:
            if key not in training:
                training[key] = describe_training(run, files, how, limit, texts)
            run["training"] = key
        except UserError as error:
            skipped.append(f"training of {path}: {error}")
    about = {}
    for key in texts.questions:
        task = tasks.TASKS[key]
        about[key] = {"name": task.name, "random": task.random}
    page = {"runs": shown, "tasks": about, "training": training}
    return page | texts._asdict(), skipped


def share_questions(run: Record, texts: Texts) -> None:
    """Move a run's questions to `texts`.  Raises UserError where another run's are different."""
    task = run["task"]
    known = texts.questions[task]
    own = run.pop("questions_of")
    for i, question in own.items():
        if known.get(i, question) != question:
            raise UserError(f"{run['file']} has other questions than the files before it")
    known.update(own)


def embed(data: Record) -> str:
    """Return TEMPLATE with the data in it: < is escaped, so no text can end the script element."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    escaped = text.replace("<", r"\u003c")
    valid = storage.replace_lone_surrogates(escaped)
    template = storage.read_text(TEMPLATE)
    return template.replace(PLACEHOLDER, valid)


def last_epochs(saved: str) -> list[Path]:
    """Return the last epoch of every run in the folder `saved`, teachers last."""
    last = {}
    teachers = {}
    for path in runs.saved_files(saved):  # the digits of the epoch stand last
        stem = runs.run_stem(path)
        found = teachers
        if "__" in stem:  # D_toy__T_ft, not D_toy
            found = last
        found[path.parent, stem] = path
    return [*last.values(), *teachers.values()]


def write_page(
    *,
    files: list[str],
    out: str,
    limit: int,
    saved: str,
    data: str,
    rules: str,
    allow_partial: bool,
) -> None:
    """Write the page.  Raises UserError where there is nothing to show."""
    how = Part(saved, data, rules, allow_partial)
    paths = list(map(Path, files)) or last_epochs(saved)
    page, skipped = gather(paths, how, limit)
    for message in skipped:
        print(f"not on the page: {message}", file=sys.stderr)
    shown = page["runs"]
    if not shown:
        reason = ": ".join(["", *skipped[:1]])
        raise UserError(f"there is no completion file to show in {saved}/completion_data{reason}")
    text = embed(page)
    storage.write_atomic(out, text)
    n = sum(len(run["rows"]) for run in shown)
    size = len(text) / 1e6
    print(f"page: {n} completions of {len(shown)} runs, {size:.1f} MB -> {out}")


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add page to the command line of evaluate.py."""
    text = "one HTML file to look through: completions, verdicts, training samples, curves"
    parser = commands.add_parser("page", help=text)
    parser.set_defaults(run=write_page)
    add = parser.add_argument
    text = "completion files (default: the last epoch of every run in --saved)"
    add("files", nargs="*", metavar="FILE", help=text)
    add("--out", required=True, metavar="FILE", help="HTML file to write")
    text = "training questions shown of a run, the first; 0: all (default 2000)"
    add("--limit", type=int, default=2000, metavar="N", help=text)
    report.add_saved_flags(parser)
