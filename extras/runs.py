"""The runs in saved/, each known by what made it, not by its name.

A completion file says in its metadata what it was made with (provenance.py): flags, hashes of the
model, of what it learnt and of the questions.  Files that agree in all of it but the number of the
epoch are the epochs of one run; runs that agree in all of it but the seed are its seeds.  What a
file of an earlier version does not record is a value of its own, "not recorded".
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import completions
import evaluate
import provenance
import storage
import tasks
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
    texts = {name: str(value) for name, value in values.items()}
    pairs = sorted(texts.items())
    return tuple(pairs)


def judged_part(metadata: Record) -> str:
    """Return the part that a file is judged by: "test" of a student's, "all" of a teacher's."""
    is_trained = metadata.get("train_key") or metadata.get("finetune_key")
    if is_trained or metadata.get("part") == "test":
        return "test"
    return "all"


def recorded(metadata: Record) -> Record:
    """Return everything that a file records of how it was made, by the names of the flags."""
    settings = metadata.get("settings") or {}
    if judged_part(metadata) == "all":
        return settings
    known = {}
    for name, value in settings.items():
        flag = OF_STUDENTS.get(name, name)
        known[flag] = value
    run = metadata.get("run") or {}
    return known | run


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
    known = recorded(metadata)
    flags = {}
    for name, value in known.items():
        if name not in IN_THE_KEY and name not in OF_A_TASK:
            flags[name] = value
    part = judged_part(metadata)
    seed = "0"
    if part == "test":
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
    known = recorded(metadata)
    return as_pairs({name: known[name] for name in OF_A_TASK & known.keys()})


def not_recorded(scored: ScoredFile) -> list[str]:
    """Return the flags that changed a student's result and that its file does not name."""
    key = scored.key
    if key.part == "all":
        return []
    known = dict(key.flags + scored.data)
    missing = []
    for name in provenance.flags_of(key.method):
        if name in known or name in IN_THE_KEY or name in NOT_ALWAYS_RECORDED:
            continue
        missing.append(name)
    return missing


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

    tasks: Sequence[str] = ()
    students: Sequence[str] = ()  # as the paper, the hub or a folder calls them
    methods: Sequence[str] = ()


EVERYTHING = Wanted()


def model_names(students: Iterable[str]) -> set[str]:
    """Return what --student names are called in files: google/flan-t5-base -> flan_t5_base."""
    keys = map(storage.model_key, students)
    return set(map(paper.model_name, keys))


def asked_method(metadata: Record) -> str:
    """Return the method of a file; of a teacher's the completion key adds temperature and seed."""
    key = metadata.get("completion_key") or "?"
    return re.sub(r"_t\d+(_s\d+)?$", "", key)


def is_wanted(metadata: Record, wanted: Wanted) -> bool:
    """Tell whether a file is of a task, student and method that are asked for."""
    task = metadata["dataset_key"]
    if wanted.tasks and task not in wanted.tasks:
        return False
    name = metadata.get("base_model") or "?"
    model = paper.model_name(name)
    if wanted.students and model not in model_names(wanted.students):
        return False
    method = asked_method(metadata)
    return not wanted.methods or method in wanted.methods


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
    own = [pair for pair in data if pair not in shared]
    return tuple(own)


def split_equal_epochs(files: list[ScoredFile]) -> list[list[ScoredFile]]:
    """Sort the files of a run by epoch; of one epoch that is there twice each is a run itself."""
    by_epoch = {scored.epoch: scored for scored in files}
    if len(by_epoch) < len(files):
        return [[scored] for scored in files]
    epochs = sorted(by_epoch)
    return [[by_epoch[epoch] for epoch in epochs]]


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
    strangers = Counter()  # files of tasks that TASKS has no row for
    for path in paths:
        try:
            file = completions.read_completions(path)
            task = file[0]["dataset_key"]
            if task not in tasks.TASKS:
                strangers[task] += 1
                continue
            if is_wanted(file[0], wanted):
                scored = score_file(path, file, data_dir, rules, allow_partial)
                files.append(scored)
        except UserError as error:
            skipped.append(str(error))
    for task, count in strangers.items():
        skipped.append(f"{count} files of {task!r}, a task that tasks.TASKS has no row for")
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
    folder = Path(saved, "completion_data")
    return sorted(folder.glob("B_*/*.json"))


def run_stem(path: Path) -> str:
    """D_toy__T_ft__E_005.json -> D_toy__T_ft"""
    return re.sub(r"__E_\d+$", "", path.stem)


def epoch_files(path: Path) -> list[Path]:
    """Return the completion files of all epochs of the run that path is of."""
    stem = run_stem(path)
    found = []
    for other in sorted(path.parent.glob("*.json")):
        if run_stem(other) == stem:
            found.append(other)
    return found


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
    last = epochs[-1]
    data = dict(last.data)
    data.pop("model", None)
    numbers = tuple(scored.epoch for scored in epochs)
    return without_seed(key), last.task, as_pairs(data), numbers


# ---------------- What a run is called: what it was made with, in words

USUAL = {"degree": "1", "split": "default", "seed": "0"}  # named wherever a run has another value
USUAL |= {"teacher_method": "zs_cot", "label_style": "token", "rationale": "content"}
USUAL |= {name: str(value) for name, (value, _) in provenance.CURATION.items()}
USUAL |= {"validation": "0.0"}
# named wherever the rows of a model and method do not all agree
COMPARED = ("degree", "split", "seed", "teacher", "lr", "batch_size", "epochs")


def in_words(name: str, value: str) -> str:
    """('degree', '2') -> 'D = 2'; ('split', 'few_shot_32') -> 'few-shot 32'; else 'lr 0.001'"""
    if name == "degree":
        return f"D = {value}"
    if name == "split" and value.startswith("few_shot_"):
        size = value.removeprefix("few_shot_")
        return f"few-shot {size}"
    spaced = name.replace("_", " ")
    if value == "True":
        return spaced
    return f"{spaced} {value}"


def is_usual(name: str, value: str) -> bool:
    """Tell whether a setting need not be named even where rows differ in it: 'filter right'."""
    if name in COMPARED:
        return False
    return USUAL.get(name) == value


def named_values(key: RunKey) -> dict[str, str]:
    """Return {name: value} of everything that a row is known by."""
    values = {}
    for name, value in key._asdict().items():
        values[name] = str(value)
    del values["flags"]
    del values["data"]
    values["seeds"] = " ".join(key.seeds)
    values |= dict(key.flags)
    values |= dict(key.data)
    return values


def setting_words(key: RunKey, varied: Iterable[str]) -> list[str]:
    """Return the settings of a row that are unusual, or of COMPARED and vary between rows."""
    values = named_values(key)
    if key.seeds:
        del values["seed"]  # a mean has none
    compared = [name for name in COMPARED if name in varied]
    words = []
    for name in dict.fromkeys([*USUAL, *COMPARED]):
        if name not in values:
            continue
        value = values[name]
        usual = USUAL.get(name, value)
        if name in compared or value != usual:
            words.append(in_words(name, value))
    return words


def row_label(key: RunKey, varied: Iterable[str] = ()) -> str:
    """'ft_cot, D = 2, last epoch', 'zs_cot, all questions': a row's name where that is enough."""
    parts = [key.method, *setting_words(key, varied)]
    if key.part == "all":
        parts.append("all questions")
    if key.samples > 1:
        parts.append(f"{key.samples} samples a question")
    if key.epoch:
        parts.append(key.epoch)
    if key.vote:
        parts.append(key.vote)
    if key.seeds:
        parts.append(f"mean of {len(key.seeds)} seeds")
    return ", ".join(parts)


Labels = dict[RunKey, str]


def words_of(values: dict[str, str], names: list[str]) -> str:
    """({"lr": "0.001", "seed": "1"}, ["lr", "seed"]) -> ', lr 0.001, seed 1'"""
    text = ""
    for name in names:
        value = values.get(name, NOT_RECORDED)
        words = in_words(name, value)
        text += f", {words}"
    return text


def differences(keys: list[RunKey]) -> Labels:
    """Return of each row ', schedule cosine': the names in which not all rows agree.

    What the files are called is one of these only where the settings do not tell the rows apart.
    """
    known = {key: named_values(key) for key in keys}
    varied = varied_names(list(known.values()))
    settings = [name for name in varied if name != "train_key"]
    texts = {key: words_of(known[key], settings) for key in keys}
    different = set(texts.values())
    if len(different) < len(keys):
        texts = {key: words_of(known[key], varied) for key in keys}
    return texts


def row_labels(keys: Iterable[RunKey]) -> Labels:
    """Label rows; of rows of a model that would read the same, name what differs.

    zs on two splits -> 'zs, split default' and 'zs, split template'
    """
    methods = defaultdict(list)
    for key in keys:
        methods[key.model, key.method].append(key)
    labels = {}
    for of_method in methods.values():
        known = [named_values(key) for key in of_method]
        varied = varied_names(known)
        namesakes = defaultdict(list)
        for key in of_method:
            label = row_label(key, varied)
            namesakes[label].append(key)
        for label, same in namesakes.items():
            more = differences(same)
            for key in same:
                labels[key] = label + more[key]
    return labels


def run_name(key: RunKey) -> str:
    """Return what the files of a run are called; "" where that is its method alone."""
    name = key.train_key or ""
    if name == key.method:
        return ""
    return name
