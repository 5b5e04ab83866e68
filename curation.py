"""Curation: keep the rationales whose answer is right, as samples the student will read (paper §3).

    ft      {question} ### ->  {gold answer}                  every training question
    ft_cot  {question} ### ->  {rationale} --> {gold answer}  the correct rationales of the teacher

One fine-tuning file a method.  Beside it, in <name>.made_from.json, stands what it was made from,
so that a changed split, template, filter or teacher never reuses a stale file.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import storage
import tasks
from completions import Completion, check_rows
from storage import UserError
from tasks import API_FAMILIES, Benchmark, Verdict

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


def curate(plan: CurationPlan) -> str:
    """Write a fine-tuning file, unless it is there; return its SHA-256.

    Raises UserError where no rationale is left, or where the teacher's file changes meanwhile.
    """
    if is_curated(plan):
        return storage.file_sha256(plan.path)
    if plan.source is None:
        kept = total = [plan.benchmark.samples[i] for i in plan.benchmark.train]
        rationales = [""] * len(kept)
        what = "samples"
    else:
        kept, total = correct_rationales(plan)
        rationales = [tasks.rationale_of(row) for row in kept]
        what = "rationales"
        if storage.file_sha256(plan.source) != plan.settings["source"]:
            raise UserError(
                f"{plan.source} was replaced by another run while it was read: start the same "
                "command again"
            )
    text = finetune_text(plan.settings, kept, rationales)
    sha256 = write_curated(plan, text, len(kept), len(total))
    share = 100 * len(kept) / len(total)
    print(f"curate: kept {len(kept)} of {len(total)} {what} ({share:.1f}%) -> {plan.path}")
    return sha256


def correct_rationales(plan: CurationPlan) -> tuple[list[Completion], list[Completion]]:
    """Return the rationales to learn from, and the completions that were looked at.

    Those are completions 0 .. degree - 1 of the training questions.  Of them the paper keeps the
    ones whose answer is right; --filter and its neighbours choose otherwise.
    """
    rows = training_rows(plan)
    task = plan.benchmark.task
    grader = tasks.make_grader(task, plan.template, plan.settings["rules"])
    graded = [(row, grader(row["completion"], row["answer"])) for row in rows]
    usable = [(row, verdict) for row, verdict in graded if has_rationale(row)]
    if plan.filters:
        from extras import filters

        kept = filters.select_rationales(plan.filters, usable)
    else:
        kept = [row for row, verdict in usable if verdict.correct]
    if not kept:
        raise nothing_left(plan, graded, usable)
    if plan.filters:
        kept = filters.apply_filters(plan.filters, kept)
    return kept, rows


def training_rows(plan: CurationPlan) -> list[Completion]:
    """Return the completions of the training questions up to the degree; say what is missing."""
    check_rows(plan.source, plan.completions, plan.benchmark.task, plan.benchmark.samples)
    degree = plan.settings["degree"]
    train = set(plan.benchmark.train)
    rows = [row for row in plan.completions if row["sample_index"] in train]
    rows = [row for row in rows if row["completion_index"] < degree]
    expected = len(train) * degree
    if len(rows) < expected:
        print(
            f"curate: {plan.source} has {len(rows)} of the {expected} rationales of {len(train)} "
            f"questions x {degree}"
        )
    return rows


def has_rationale(row: Completion) -> bool:
    """Tell whether a completion explains anything and was not cut by an API's token limit."""
    is_whole = "api" not in row or row.get("finish_reason") == "stop"
    return is_whole and bool(tasks.rationale_of(row).strip())


def nothing_left(plan: CurationPlan, graded: Graded, usable: Graded) -> UserError:
    """Return an error that says where the rationales were lost."""
    task = plan.benchmark.task
    rules = plan.settings["rules"]
    right = sum(verdict.correct for _, verdict in graded)
    wanted = "rationale" if plan.filters and plan.filters.filter != "right" else "correct rationale"
    other_rules = "" if rules == "flexible" else "--rules flexible, "
    return UserError(
        f"no {wanted} is left for {task}: of the {len(graded)} completions of "
        f"{len(plan.benchmark.train)} training samples in {plan.source}, {right} are right by the "
        f"{rules} rules and {len(usable)} explain anything; try {other_rules}another --teacher or "
        "a larger --degree"
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
    return note if note.get("sha256") == storage.file_sha256(path) else {}


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
    storage.write_json(note_path, note)
    return sha256


def check_family(path: Path, family: str, student: str) -> None:
    """Raise UserError for a fine-tuning file of the other family (saved/finetune_data/P_...)."""
    other = "decoder" if family == "encoder_decoder" else "encoder_decoder"
    if f"P_{other}" in path.parts:
        raise UserError(
            f"{path} is not for {family} students like {student}: curate again with --family "
            f"{family}"
        )
