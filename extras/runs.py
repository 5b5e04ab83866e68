"""The runs in saved/, each known by what made it, not by its name.

A completion file says in its metadata what it was made with (provenance.py): flags, hashes of the
model, of what it learnt and of the questions.  Files that agree in all of it but the number of the
epoch are the epochs of one run; runs that agree in all of it but the seed are its seeds.  What a
file of an earlier version does not record is a value of its own, "not recorded".
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import completions
import evaluate
import provenance
import storage
from extras import compare, paper
from storage import UserError

Record = dict[str, Any]  # a JSON object
CompletionFile = tuple[Record, list[completions.Completion]]
Pairs = tuple[tuple[str, str], ...]  # (name, value) of what is recorded, sorted
NOT_RECORDED = "not recorded"
IN_THE_KEY = {"task", "method", "split", "seed", "epoch"}  # fields of RunKey, or of a table
OF_A_TASK = {  # differ from task to task within a row: hashes of data, and their sizes
    "samples",
    "examples",
    "finetune_data",
    "model",
    "missing",
    "questions",
    "parameters",
}
OF_STUDENTS = {  # names in a student's settings -> those of the flags
    "samples_a_question": "eval_samples",
    "degree": "eval_samples",  # of students behind an API
    "temperature": "eval_temperature",
}
# flags that have no effect in some runs, or that published files cannot know
NOT_ALWAYS_RECORDED = {"eval_temperature", "seed", "data_seed", *provenance.UNSURE}


class RunKey(NamedTuple):
    """All that is known of a run but its task and the number of its epoch: a row of a table."""

    model: str
    method: str
    train_key: str | None  # None: prompted, not fine-tuned
    part: str  # what is scored: "test" of students, "all" of teachers, as in the paper
    split: str
    flags: Pairs = ()  # whatever else is recorded of how it was made
    samples: int = 1  # answers of a student to a question
    seed: str = "0"
    data: Pairs = ()  # where two runs of a task agree in all of that: in what they still differ
    epoch: str = ""  # how it was chosen
    vote: str = ""  # "maj@4", "pass@4": of several answers to a question
    seeds: tuple[str, ...] = ()  # of a row that is the mean over them


class ScoredFile(NamedTuple):
    """A completion file: what run it is of, and how good."""

    key: RunKey
    score: evaluate.Score
    data: Pairs  # hashes of what it was made from
    validation: float | None  # accuracy on the validation share, %
    votes: Record | None

    @property
    def task(self) -> str:
        return self.score["task"]

    @property
    def epoch(self) -> int:
        return self.score["epoch"] or 0


Runs = dict[tuple[RunKey, str], list[ScoredFile]]  # {(run, task): its epochs in order}


# ---------------- What made a file


def as_pairs(values: Record) -> Pairs:
    """{"lr": 0.001, "degree": 8} -> (("degree", "8"), ("lr", "0.001"))"""
    return tuple(sorted((name, str(value)) for name, value in values.items()))


def recorded(metadata: Record, is_student: bool) -> Record:
    """Return everything that a file records of how it was made, by the names of the flags."""
    settings = metadata.get("settings") or {}
    if not is_student:
        return settings
    known = {}
    for name, value in settings.items():
        known[OF_STUDENTS.get(name, name)] = value
    run = metadata.get("run") or {}
    return known | run


def is_student_file(metadata: Record) -> bool:
    """Tell whether the completions are a student's, which is judged by the test part."""
    if metadata.get("train_key") or metadata.get("finetune_key"):
        return True
    return metadata.get("part") == "test"


def run_seed(path: Path, known: Record) -> str:
    """Return the seed of a run; of earlier untrained toy students the name alone has it.

    D_toy__S_default_s1.json -> 1
    """
    in_name = re.search(r"__S_.*_s(\d+)(?:__K_|$)", path.stem)
    if in_name:
        return in_name[1]
    return str(known.get("seed") or 0)


def run_key(path: Path, metadata: Record) -> RunKey:
    """Return what run a completion file is of."""
    is_student = is_student_file(metadata)
    known = recorded(metadata, is_student)
    named = IN_THE_KEY | OF_A_TASK
    flags = {name: value for name, value in known.items() if name not in named}
    part = "all"
    seed = "0"
    if is_student:
        part = "test"
        seed = run_seed(path, known)
    return RunKey(
        model=metadata.get("base_model") or "?",
        method=metadata.get("completion_key") or "?",
        train_key=metadata.get("train_key"),
        part=part,
        split=metadata.get("split") or "default",
        flags=as_pairs(flags),
        seed=seed,
    )


def run_data(metadata: Record) -> Pairs:
    """Return the hashes of what a file was made from."""
    known = recorded(metadata, is_student_file(metadata))
    return as_pairs({name: value for name, value in known.items() if name in OF_A_TASK})


def not_recorded(scored: ScoredFile) -> list[str]:
    """Return the flags that changed a student's result and that its file does not name."""
    known = {*dict(scored.key.flags), *dict(scored.data), *IN_THE_KEY}
    if scored.key.part == "all":
        return []
    expected = provenance.flags_of(scored.key.method)
    return [name for name in expected if name not in known and name not in NOT_ALWAYS_RECORDED]


def varied_names(known: list[dict[str, str]]) -> list[str]:
    """Return the names in which not all of these agree; one that is not there is a value, too."""
    names = {}
    for values in known:
        names |= dict.fromkeys(values)
    varied = []
    for name in names:
        if len({values.get(name) for values in known}) > 1:
            varied.append(name)
    return varied


# ---------------- Score files, and sort them into runs


class Wanted(NamedTuple):
    """What is asked for of a folder: empty, everything."""

    tasks: tuple[str, ...] = ()
    students: tuple[str, ...] = ()  # as the paper, the hub or a folder calls them
    methods: tuple[str, ...] = ()


EVERYTHING = Wanted()


def model_names(students: Iterable[str]) -> set[str]:
    """Return what --student names are called in files: google/flan-t5-base -> flan_t5_base."""
    return {paper.model_name(storage.model_key(name)) for name in students}


def asked_method(metadata: Record) -> str:
    """Return the method of a file; of a teacher's the completion key adds temperature and seed."""
    key = metadata.get("completion_key") or "?"
    return re.sub(r"_t\d+(_s\d+)?$", "", key)


def is_wanted(metadata: Record, wanted: Wanted) -> bool:
    """Tell whether a file is of a task, student and method that are asked for."""
    if wanted.tasks and metadata["dataset_key"] not in wanted.tasks:
        return False
    model = paper.model_name(metadata.get("base_model") or "?")
    if wanted.students and model not in model_names(wanted.students):
        return False
    return not wanted.methods or asked_method(metadata) in wanted.methods


def describe_wanted(wanted: Wanted) -> str:
    """Return ' of --task svamp --method ft'; '' where everything is asked for."""
    flags = {"task": wanted.tasks, "student": wanted.students, "method": wanted.methods}
    text = ""
    for flag, values in flags.items():
        if values:
            names = " ".join(values)
            text += f" --{flag} {names}"
    if not text:
        return ""
    return f" of{text}"


def score_file(
    path: Path, file: CompletionFile, data_dir: str, rules: str, allow_partial: bool
) -> ScoredFile:
    """Score a file on the part that its run is judged by, and on its validation share.

    file: its metadata and rows.  Raises UserError where it lacks samples of the part.
    """
    metadata = file[0]
    key = run_key(path, metadata)
    how = (key.split, data_dir, rules, allow_partial)
    score, graded = evaluate.score_rows(path, *file, key.part, *how)
    validation = None
    if metadata.get("validation"):
        on_validation, _ = evaluate.score_rows(path, *file, "validation", *how)
        validation = on_validation["accuracy"]
    counted = compare.votes(graded, rules)
    if counted and key.part == "test":
        key = key._replace(samples=counted["k"])
    return ScoredFile(key, score, run_data(metadata), validation, counted)


def difference(data: Pairs, others: Iterable[Pairs]) -> Pairs:
    """Return the pairs of data that not all others have."""
    shared = set(data).intersection(*map(set, others))
    return tuple(pair for pair in data if pair not in shared)


def split_equal_epochs(files: list[ScoredFile]) -> list[list[ScoredFile]]:
    """Sort the files of a run by epoch; of one epoch that is there twice each is a run itself."""
    files = sorted(files, key=lambda scored: scored.epoch)
    epochs = {scored.epoch for scored in files}
    if len(epochs) == len(files):
        return [files]
    return [[scored] for scored in files]


def group_runs(files: list[ScoredFile]) -> Runs:
    """Sort files into runs; where a row would hold several, their keys say what differs."""
    rows = defaultdict(list)
    for scored in files:
        rows[scored.key, scored.task].append(scored)
    runs = {}
    for (key, task), of_row in rows.items():
        by_data = defaultdict(list)
        for scored in of_row:
            by_data[scored.data].append(scored)
        for data, of_run in by_data.items():
            own = key._replace(data=difference(data, by_data))
            parts = split_equal_epochs(of_run)
            for part in parts:
                one = own
                if len(parts) > 1:
                    name = Path(part[0].score["file"]).stem
                    one = own._replace(data=(*own.data, ("file", name)))
                runs[one, task] = part
    return runs


def scored_runs(
    paths: Iterable[Path],
    data_dir: str,
    rules: str = "paper",
    allow_partial: bool = False,
    wanted: Wanted = EVERYTHING,
) -> tuple[Runs, list[str]]:
    """Score the wanted files; return their runs, and a sentence for each without a score.

    Files that are not wanted are not scored, which is what takes the time.
    """
    files = []
    skipped = []
    for path in paths:
        try:
            file = completions.read_completions(path)
            if is_wanted(file[0], wanted):
                scored = score_file(path, file, data_dir, rules, allow_partial)
                files.append(scored)
        except UserError as error:
            skipped.append(str(error))
    return group_runs(files), skipped


def describe_unknown(runs: Runs) -> list[str]:
    """Say, in one sentence or none, what files of an earlier version do not record."""
    names = {}
    total = 0
    count = 0
    for epochs in runs.values():
        total += len(epochs)
        for scored in epochs:
            missing = not_recorded(scored)
            names |= dict.fromkeys(missing)
            if missing:
                count += 1
    if not count:
        return []
    what = ", ".join(names)
    return [
        f"{count} of {total} files are of an earlier version and do not record {what}: in these "
        "they are taken to agree with each other, and with no other file"
    ]


def saved_files(saved: str) -> list[Path]:
    """Return every completion file in the folder `saved`."""
    return sorted(Path(saved, "completion_data").glob("B_*/*.json"))


# ---------------- Seeds


def without_seed(key: RunKey) -> RunKey:
    """ft_cot_s1 of seed 1 -> ft_cot: what runs with other seeds have in common."""
    train_key = key.train_key
    if train_key:
        train_key = train_key.removesuffix(f"_s{key.seed}")
    return key._replace(train_key=train_key, seed="0", data=())


def seed_group(key: RunKey, epochs: list[ScoredFile]) -> tuple:
    """Return what two runs must agree in to be seeds of one another.

    Everything but the seed and what follows from it, the hash of the student; and the epochs that
    were evaluated, since the last or the best of others is no repetition.
    """
    data = [pair for pair in epochs[-1].data if pair[0] != "model"]
    numbers = [scored.epoch for scored in epochs]
    return without_seed(key), epochs[-1].task, tuple(data), tuple(numbers)
