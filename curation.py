"""Curation: keep the rationales whose answer is right, as samples the student will read (paper §3).

    ft      {question} ### ->  {gold answer}                  every training question
    ft_cot  {question} ### ->  {rationale} --> {gold answer}  the correct rationales of the teacher

One fine-tuning file a method.  Beside it, in <name>.made_from.json, stands what it was made from,
the code that chose its samples included (provenance.py), so that a changed split, template, filter
or teacher never reuses a stale file.
"""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import replies
import storage
import tasks
from answers import PREDICTIONS
from completions import Completion, check_rows
from storage import UserError
from tasks import API_FAMILIES, PROMPTED, Benchmark, Verdict

Graded = list[tuple[Completion, Verdict]]


class CurationPlan(NamedTuple):
    """What a fine-tuning file is to be made from; every input has been read once."""

    path: Path  # of the fine-tuning file
    settings: dict  # stand beside it
    benchmark: Benchmark
    source: Path | None = None  # the teacher's completion file; None for ft
    completions: list[Completion] = []  # in it, of all questions
    template: str | None = None  # that the teacher was prompted with
    filters: Any = None  # a FilterConfig of extras/filters.py, beyond the paper's rule
    taught: dict = {}  # what the teacher's file says of how it was asked, for those who compare


def filter_config(options: dict, seed: int) -> Any:
    """Return the filters beyond the paper's rule, a filters.FilterConfig, or None.

    options: the flags of curation that differ from the paper.
    """
    if options:
        from extras import filters

        return filters.FilterConfig(**options, seed=seed)
    return None


class Choice(NamedTuple):
    """What a student learns from: rows and their rationales (of ft "")."""

    rows: list
    rationales: list[str]
    total: int  # rows that were looked at


def curate(plan: CurationPlan, redo: bool = False) -> str:
    """Write a fine-tuning file, unless it is there; return its SHA-256.  redo: even then.

    Raises UserError where no rationale is left, or where the teacher's file changes meanwhile.
    """
    if not redo and is_curated(plan):
        return storage.file_sha256(plan.path)
    choice = choose_samples(plan)
    if plan.source:
        if storage.file_sha256(plan.source) != plan.settings["source"]:
            raise UserError(
                f"{plan.source} was replaced by another run while it was read: start the same "
                "command again"
            )
    kept = len(choice.rows)
    text = finetune_text(plan.settings, choice.rows, choice.rationales)
    sha256 = write_curated(plan, text, kept, choice.total)
    print(f"{describe_kept(plan, kept, choice.total)}\n    -> {plan.path}")
    return sha256


def describe_kept(plan: CurationPlan, kept: int, total: int) -> str:
    """Say what the student will learn from, and how often its teacher is right."""
    if plan.source is None:
        return f"2/4 curate: taking the {kept:,} training questions with their answers alone"
    counts = f"2/4 curate: keeping the {kept:,} of {total:,} rationales"
    if plan.filters:
        return f"{counts} that the filters let through ({100 * kept / total:.1f}%)"
    return f"{counts} whose answer is right (the teacher's own accuracy: {100 * kept / total:.1f}%)"


def count_steps(paths: list[Path], epochs: int, batch_size: int) -> int:
    """Return the optimizer steps of training on each of these files that are there."""
    steps = 0
    for path in paths:
        if path.exists():
            samples = len(storage.read_finetune_data(path)["input"])
            steps += epochs * math.ceil(samples / batch_size)
    return steps


def choose_samples(plan: CurationPlan) -> Choice:
    """Choose what is learnt from: of ft every training question, of ft_cot the right rationales."""
    if plan.source is None:
        samples = [plan.benchmark.samples[i] for i in plan.benchmark.train]
        return Choice(samples, [""] * len(samples), len(samples))
    rows = choose_texts(training_rows(plan), plan.settings.get("rationale", "content"))
    kept = correct_rationales(plan, rows)
    return Choice(kept, [tasks.rationale_of(row) for row in kept], len(rows))


def correct_rationales(plan: CurationPlan, rows: list[Completion]) -> list[Completion]:
    """Return the rationales to learn from, of the completions of the training questions.

    The paper keeps those whose answer is right; --filter and its neighbours choose otherwise.
    """
    grader = tasks.make_grader(plan.benchmark.task, plan.template, plan.settings["rules"])
    graded = [(row, grader(row["completion"], row["answer"])) for row in rows]
    usable = [(row, verdict) for row, verdict in graded if has_rationale(row)]
    print_kept_by_rules(plan, usable)
    if plan.filters:
        from extras import filters

        kept = filters.choose_rationales(plan.filters, usable)
    else:
        kept = [row for row, verdict in usable if verdict.correct]
    if not kept:
        raise nothing_left(plan, graded, usable)
    return kept


def print_kept_by_rules(plan: CurationPlan, usable: Graded) -> None:
    """Print how many rationales each set of answer rules calls right."""
    counts = []
    for rules in PREDICTIONS:
        grader = tasks.make_grader(plan.benchmark.task, plan.template, rules)
        right = sum(grader(row["completion"], row["answer"]).correct for row, _ in usable)
        counts.append(f"{right} by the {rules} rules")
    used = plan.settings["rules"]
    print(f"curate: right are {', '.join(counts)}, of {len(usable)} ({used} rules are used)")


def training_rows(plan: CurationPlan) -> list[Completion]:
    """Return the first completions, as many as the degree, of each training question.

    A file may have gaps in completion_index, where an answer is missing: of 0, 5 and 6 the first
    two are 0 and 5.  Prints how many are missing.
    """
    check_rows(plan.source, plan.completions, plan.benchmark.task, plan.benchmark.samples)
    degree = plan.settings["degree"]
    found = {i: [] for i in plan.benchmark.train}
    for row in plan.completions:  # in order
        of_question = found.get(row["sample_index"])
        if of_question is not None and len(of_question) < degree:
            of_question.append(row)
    rows = [row for i in sorted(found) for row in found[i]]
    expected = len(found) * degree
    if len(rows) < expected:
        print(
            f"curate: {plan.source} has {len(rows)} of the {expected} rationales of {len(found)} "
            f"questions x {degree}"
        )
    return rows


def choose_texts(rows: list[Completion], which: str) -> list[Completion]:
    """Return rows whose rationale is what a teacher said (content), its reasoning, or both.

    Prints how many have reasoning of their own, and how many were cut.
    """
    thinking = sum(bool(row.get("reasoning")) for row in rows)
    if thinking or which != "content":
        cut = sum("api" in row and is_cut(row) for row in rows)
        print(f"curate: {thinking} of {len(rows)} have reasoning of their own, {cut} were cut")
    if which == "content":
        return rows
    chosen = []
    for row in rows:
        text = row.get("reasoning", "")
        if which == "both":
            text = f"{text}\n\n{tasks.rationale_of(row)}".strip()
        chosen.append(row | {"reasoning_completion": text})
    return chosen


def is_cut(row: Completion) -> bool:
    """Tell whether the token limit cut one of a row's texts."""
    reasons = (row.get("reasoning_finish_reason"), row.get("finish_reason"))
    return "length" in map(replies.finish_kind, reasons)


def has_rationale(row: Completion) -> bool:
    """Tell whether a completion explains anything and, of an API, came to its end.

    A null finish_reason is an end where there is a text; step 2 without one was never asked.
    """
    if "api" in row:
        reasons = (row.get("reasoning_finish_reason"), row.get("finish_reason"))
        said = (row["completion"] or "").strip()
        if not said or not all(map(replies.has_ended, reasons)):
            return False
    return bool(tasks.rationale_of(row).strip())


def nothing_left(plan: CurationPlan, graded: Graded, usable: Graded) -> UserError:
    """Return an error that says where the rationales were lost."""
    task = plan.benchmark.task
    rules = plan.settings["rules"]
    right = sum(verdict.correct for _, verdict in graded)
    wanted = "correct rationale"
    if plan.filters and plan.filters.filter != "right":
        wanted = "rationale"
    cut = sum("api" in row and is_cut(row) for row, _ in graded)
    limit = ""
    if cut:
        limit = f"a larger --teacher_max_new_tokens ({cut} were cut), "
    other_rules = "--rules flexible, "
    if rules == "flexible":
        other_rules = ""
    return UserError(
        f"no {wanted} is left for {task}: of the {len(graded)} completions of "
        f"{len(plan.benchmark.train)} training samples in {plan.source}, {right} are right by the "
        f"{rules} rules and {len(usable)} explain anything; try {limit}{other_rules}another "
        "--teacher or a larger --degree"
    )


def finetune_text(settings: dict, rows: list, rationales: list[str]) -> str:
    """Return a fine-tuning file: JSON columns of prompts and labels, or an API's JSON lines.

    The label carries the *gold* answer, whatever the teacher wrote behind its rationale.
    """
    template = settings["template"]
    family = settings["family"]
    pairs = [
        tasks.format_sample(template, family, row["question"], rationale, row["answer"])
        for row, rationale in zip(rows, rationales, strict=True)
    ]
    if family in API_FAMILIES.values():
        from extras import batch_api

        return batch_api.finetune_job_text(family, pairs)
    columns = {
        "sample_index": [row["sample_index"] for row in rows],
        "input": [prompt for prompt, _ in pairs],
        "label": [label for _, label in pairs],
    }
    return json.dumps(columns, indent=4)


# ---------------- A fine-tuning file and what it was made from


def read_note(path: Path) -> dict:
    """Return what stands beside a fine-tuning file; {} where there is none or it was edited."""
    note_path = path.with_suffix(".made_from.json")
    if not path.exists() or not note_path.exists():
        return {}
    note = storage.read_json(note_path)
    if note.get("sha256") != storage.file_sha256(path):
        return {}
    return note


def is_curated(plan: CurationPlan) -> bool:
    """Tell whether the file is there and was made with these settings; print which changed."""
    note = read_note(plan.path)
    if not note:
        return False
    return storage.settings_match("curate", plan.path, note.get("settings"), plan.settings)


def check_curated(plan: CurationPlan) -> None:
    """Raise UserError where the fine-tuning file is not what these settings would make."""
    if not is_curated(plan):
        raise UserError(
            f"the fine-tuning file {plan.path} is missing or was made with other settings: make it "
            "with --stage curate"
        )


def write_curated(plan: CurationPlan, text: str, kept: int, total: int) -> str:
    """Write the file and its note; a file that is not ours, or was edited, is kept aside."""
    path = plan.path
    note_path = path.with_suffix(".made_from.json")
    if path.exists() and not read_note(path) and path.read_bytes() != text.encode():
        storage.move_to_backup(path)
    note_path.unlink(missing_ok=True)  # first, so that no kill leaves a new file with an old note
    storage.write_atomic(path, text)
    sha256 = storage.file_sha256(path)
    note = {"settings": plan.settings, "kept": kept, "total": total, "sha256": sha256}
    if plan.taught:
        note["taught"] = plan.taught
    storage.write_json(note_path, note)
    return sha256


def student_family(student: str, family: str | None, label_style: str) -> str:
    """Return what a student reads: decoder, encoder_decoder, openai or chat samples.

    A folder's config tells; of a hub name, which need not be downloaded for curation, the name.
    """
    if label_style in API_FAMILIES:
        return API_FAMILIES[label_style]
    if family:
        return family
    config = Path(student) / "config.json"
    if config.is_file():
        is_encoder_decoder = storage.read_json(config).get("is_encoder_decoder")
    else:
        is_encoder_decoder = re.search(r"t5|bart|pegasus", student.lower())
    if is_encoder_decoder:
        return "encoder_decoder"
    return "decoder"


def student_template(method: str, label_style: str) -> str:
    """Return a method's template in a label style, or in `token` where it has none of that."""
    if method in PROMPTED:
        return method
    name = f"{method}_{label_style}"
    if name in tasks.TEMPLATES:
        return name
    return f"{method}_token"


def describe_fallback(method: str, label_style: str) -> str:
    """Say that a method that is fine-tuned has no template of the --label_style; "" where it has.

    The styles of an API's files are `token` for every method.
    """
    template = student_template(method, label_style)
    wanted = f"{method}_{label_style}"
    if template == wanted or label_style in API_FAMILIES:
        return ""
    return (
        f"--label_style {label_style}: there is no template {wanted}, so {method} is trained and "
        f"asked with {template}, under another prompt than the methods that have one"
    )


def check_family(path: Path, family: str, student: str) -> None:
    """Raise UserError for a fine-tuning file of the other family (saved/finetune_data/P_...)."""
    other = "encoder_decoder"
    if family == "encoder_decoder":
        other = "decoder"
    if f"P_{other}" in path.parts:
        raise UserError(
            f"{path} is not for {family} students like {student}: curate again with --family "
            f"{family}"
        )
