"""Curation: keep the rationales whose answer is right, as samples the student will read (paper §3).

    ft      {question} ### ->  {gold answer}                  every training question
    ft_cot  {question} ### ->  {rationale} --> {gold answer}  the correct rationales of the teacher

One fine-tuning file a method.  Beside it, in <name>.made_from.json, stands what it was made from,
the code that chose its samples included (provenance.py), so that a changed split, template, filter
or teacher never reuses a stale file.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import provenance
import replies
import storage
import tasks
from answers import PREDICTIONS
from completions import Completion, check_rows
from storage import UserError
from tasks import API_FAMILIES, PROMPTED, Benchmark, Verdict


class CurationPlan(NamedTuple):
    """What a fine-tuning file is to be made from; every input has been read once."""

    path: Path  # of the fine-tuning file
    settings: dict  # stand beside it
    benchmark: Benchmark
    source: Path | None = None  # the teacher's completion file; None for ft
    completions: list[Completion] = []  # in it, of all questions
    template: str | None = None  # that the teacher was prompted with
    filters: dict = {}  # those of extras/filters.py, beyond the paper's rule
    taught: dict = {}  # what the teacher's file says of how it was asked, for those who compare


class Choice(NamedTuple):
    """What a student learns from: rows and their rationales (of ft "")."""

    rows: list
    rationales: list[str]
    total: int  # rows that were looked at
    note: str = ""  # how many are right by which rules, where that is not the number of rows


def curate(plan: CurationPlan, redo: bool = False) -> str:
    """Write a fine-tuning file, unless it is there; return its SHA-256.  redo: even then.

    Raises UserError where no rationale is left, or where the teacher's file changes meanwhile.
    """
    if not redo and is_curated(plan):
        return storage.file_sha256(plan.path)
    choice = choose_samples(plan)
    settings = plan.settings
    if plan.source and storage.file_sha256(plan.source) != settings["source"]:
        what = "was replaced by another run while it was read: start the same command again"
        raise UserError(f"{plan.source} {what}")
    rows = choice.rows
    text = finetune_text(settings, rows, choice.rationales)
    sha256 = write_curated(plan, text, len(rows), choice.total)
    print(describe_kept(plan, choice))
    print(f"    -> {plan.path}")
    return sha256


def describe_kept(plan: CurationPlan, choice: Choice) -> str:
    """Say what the student will learn from, and how often its teacher is right."""
    kept = len(choice.rows)
    if plan.source is None:
        return f"2/4 curate: taking the {kept:,} training questions with their answers alone"
    counts = f"2/4 curate: keeping the {kept:,} of {choice.total:,} rationales"
    percent = 100 * kept / choice.total
    share = f"{percent:.1f}%{choice.note}"
    if plan.filters:
        return f"{counts} that the filters let through ({share})"
    return f"{counts} whose answer is right (the teacher's own accuracy: {share})"


def count_steps(paths: list[Path], epochs: int, batch_size: int) -> int:
    """Return the optimizer steps of training on each of these files that are there."""
    steps = 0
    for path in paths:
        if path.exists():
            data = storage.read_finetune_data(path)
            samples = len(data["input"])
            steps_an_epoch = math.ceil(samples / batch_size)
            steps += epochs * steps_an_epoch
    return steps


def choose_samples(plan: CurationPlan) -> Choice:
    """Choose what is learnt from: of ft every training question, of ft_cot the right rationales."""
    if plan.source is None:
        benchmark = plan.benchmark
        samples = [benchmark.samples[i] for i in benchmark.train]
        total = len(samples)
        rationales = [""] * total
        return Choice(samples, rationales, total)
    rows = training_rows(plan)
    which = plan.settings.get("rationale", "content")
    rows = choose_texts(rows, which)
    return correct_rationales(plan, rows)


def correct_rationales(plan: CurationPlan, rows: list[Completion]) -> Choice:
    """Choose the rationales to learn from, of the completions of the training questions.

    The paper keeps those whose answer is right; --filter and its neighbours choose otherwise.
    """
    usable = list(filter(has_rationale, rows))
    verdicts = {rules: grade_rows(plan, usable, rules) for rules in PREDICTIONS}
    rules = plan.settings["rules"]
    graded = list(zip(usable, verdicts[rules], strict=True))
    if plan.filters:
        from extras import filters

        seed = plan.settings.get("data_seed", 0)
        config = filters.FilterConfig(**plan.filters, seed=seed)
        kept = filters.choose_rationales(config, graded)
    else:
        kept = [row for row, verdict in graded if verdict.correct]
    if not kept:
        raise nothing_left(plan, rows, usable)
    rationales = list(map(tasks.rationale_of, kept))
    note = describe_right(verdicts, len(kept))
    total = len(rows)
    return Choice(kept, rationales, total, note)


def count_right(verdicts: list[Verdict]) -> int:
    return sum(verdict.correct for verdict in verdicts)


def grade_rows(plan: CurationPlan, rows: list[Completion], rules: str) -> list[Verdict]:
    """Return the verdict of each completion by a set of answer rules."""
    task = plan.benchmark.task
    grader = tasks.make_grader(task, plan.template, rules)
    verdicts = []
    for row in rows:
        verdict = grader(row["completion"], row["answer"])
        verdicts.append(verdict)
    return verdicts


def describe_right(verdicts: dict[str, list[Verdict]], kept: int) -> str:
    """Say how many rationales each set of answer rules calls right; "" where all say `kept`."""
    counts = set()
    phrases = []
    for rules, of_rules in verdicts.items():
        count = count_right(of_rules)
        counts.add(count)
        phrases.append(f"{count:,} by the {rules} rules")
    if counts == {kept}:
        return ""
    listed = ", ".join(phrases)
    return f"; right are {listed}"


def training_rows(plan: CurationPlan) -> list[Completion]:
    """Return the first completions, as many as the degree, of each training question.

    A file may have gaps in completion_index, where an answer is missing: of 0, 5 and 6 the first
    two are 0 and 5.  Prints how many are missing.
    """
    benchmark = plan.benchmark
    check_rows(plan.source, plan.completions, benchmark.task, benchmark.samples)
    degree = plan.settings["degree"]
    missing = dict.fromkeys(benchmark.train, degree)
    rows = []
    for row in plan.completions:  # in order
        i = row["sample_index"]
        if missing.get(i):
            missing[i] -= 1
            rows.append(row)
    questions = len(missing)
    found = len(rows)
    expected = questions * degree
    if found < expected:
        asked = f"{questions} questions x {degree}"
        has = f"has {found} of the {expected} rationales"
        print(f"curate: {plan.source} {has} of {asked}")
    return rows


def choose_texts(rows: list[Completion], which: str) -> list[Completion]:
    """Return rows whose rationale is what a teacher said (content), its reasoning, or both.

    Prints how many have reasoning of their own, and how many were cut.
    """
    thinking = sum(bool(row.get("reasoning")) for row in rows)
    if thinking or which != "content":
        cut = count_cut(rows)
        total = len(rows)
        print(f"curate: {thinking} of {total} have reasoning of their own, {cut} were cut")
    if which == "content":
        return rows
    chosen = []
    for row in rows:
        text = row.get("reasoning", "")
        if which == "both":
            said = tasks.rationale_of(row)
            text = f"{text}\n\n{said}".strip()
        chosen.append(row | {"reasoning_completion": text})
    return chosen


def finish_reasons(row: Completion) -> list[str | None]:
    """Return why the texts of both steps ended."""
    first = row.get("reasoning_finish_reason")
    second = row.get("finish_reason")
    return [first, second]


def is_cut(row: Completion) -> bool:
    """Tell whether the token limit cut one of the texts of an API's row."""
    kinds = map(replies.finish_kind, finish_reasons(row))
    return "api" in row and "length" in kinds


def count_cut(rows: list[Completion]) -> int:
    return sum(map(is_cut, rows))


def has_rationale(row: Completion) -> bool:
    """Tell whether a completion explains anything and, of an API, came to its end.

    A null finish_reason is an end where there is a text; step 2 without one was never asked.
    """
    if "api" in row:
        said = (row["completion"] or "").strip()
        reasons = finish_reasons(row)
        has_ended = all(map(replies.has_ended, reasons))
        if not said or not has_ended:
            return False
    rationale = tasks.rationale_of(row)
    return bool(rationale.strip())


def nothing_left(plan: CurationPlan, rows: list[Completion], usable: list[Completion]) -> UserError:
    """Return an error that says where the rationales were lost."""
    task = plan.benchmark.task
    total = len(rows)
    rules = plan.settings["rules"]
    verdicts = grade_rows(plan, rows, rules)
    right = count_right(verdicts)
    if plan.filters.get("filter", "right") != "right":
        return UserError(
            f"no rationale is left for {task}: of the {total} completions in {plan.source}, "
            f"{len(usable)} explain anything, but in none of them can an answer be read; try "
            "another --teacher"
        )
    cut = count_cut(rows)
    limit = ""
    if cut:
        limit = f"a larger --teacher_max_new_tokens ({cut} were cut), "
    other_rules = "--rules flexible, "
    if rules == "flexible":
        other_rules = ""
    return UserError(
        f"no correct rationale is left for {task}: of the {total} completions of "
        f"{len(plan.benchmark.train)} training samples in {plan.source}, {right} are right by the "
        f"{rules} rules and {len(usable)} explain anything; try {limit}{other_rules}another "
        "--teacher or a larger --degree"
    )


def finetune_text(settings: dict, rows: list, rationales: list[str]) -> str:
    """Return a fine-tuning file: JSON columns of prompts and labels, or an API's JSON lines.

    The label carries the *gold* answer, whatever the teacher wrote behind its rationale; only what
    --filter lets through with a wrong answer keeps that one.
    """
    template = settings["template"]
    family = settings["family"]
    pairs = [
        tasks.format_sample(template, family, row["question"], rationale, row["answer"])
        for row, rationale in zip(rows, rationales, strict=True)
    ]
    if family in API_FAMILIES.values():
        from extras import finetune_jobs

        return finetune_jobs.finetune_job_text(family, pairs)
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
    made_from = note.get("settings")
    return storage.settings_match("curate", plan.path, made_from, plan.settings)


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
    is_ours = not path.exists() or read_note(path)
    if not is_ours and path.read_bytes() != text.encode():
        storage.move_to_backup(path)
    note_path.unlink(missing_ok=True)  # first, so that no kill leaves a new file with an old note
    storage.write_atomic(path, text)
    sha256 = storage.file_sha256(path)
    note = {"settings": plan.settings, "kept": kept, "total": total, "sha256": sha256}
    if plan.taught:
        note["taught"] = plan.taught
    storage.write_json(note_path, note)
    return sha256


def benchmark_settings(benchmark: Benchmark, split: str, template: str, family: str) -> dict:
    """Return what a fine-tuning file of every method is made from."""
    samples = storage.fingerprint(benchmark.samples)
    return {
        "source": samples,
        "samples": samples,
        "split": split,
        "train": storage.fingerprint(benchmark.train),
        "template": template,
        "family": family,
        "texts": tasks.template_fingerprint(template, family),
        "code": provenance.code_fingerprint(benchmark.task),
    }


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
        remedy = f"curate again with --family {family}"
        raise UserError(f"{path} is not for {family} students like {student}: {remedy}")
