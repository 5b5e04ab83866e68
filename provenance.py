"""What made a result: the flags that change it, the code that chose its samples, the model.

A run is known by these, never by its name.  They stand in the settings beside every file; what is
skipped, what a table puts into one row and a figure into one point follows from comparing them.
"""

import ast
import functools
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import storage
from storage import AnyPath, JsonObject, UserError
from tasks import FINE_TUNED

# ---------------- The flags.  Each stands in one of two lists: a new one belongs into either

STAGES = ["sample", "curate", "train", "evaluate"]
ASKED_WITH = (  # of every method; seed: of the toy student and of sampled answers
    "task method student family split seed max_new_tokens eval_samples eval_temperature"
).split()
TRAINED_WITH = (  # what run.json holds of the flags
    "epochs batch_size lr weight_decay seed precision max_length schedule warmup max_grad_norm"
).split()
TUNED_WITH = "label_style validation data_seed finetune_data".split()  # of ft and ft_cot
CHAT_WITH = "chat thinking system".split()  # of models that are prompted in their chat template
REQUESTED_WITH = "reasoning_effort top_p extra_body extra_headers".split()  # of an API
SAMPLED_WITH = (
    "teacher teacher_method temperature teacher_max_new_tokens api no_temperature data_seed"
).split() + [*CHAT_WITH, *REQUESTED_WITH]
CURATION = {  # flag: (the paper's value, what stands in file names for another one)
    "rationale": ("content", "{}"),
    "filter": ("right", "{}"),
    "max_rationale_words": (0, "{}words"),
    "max_per_question": (0, "{}each"),
    "max_similarity": (1.0, "similar{:g}"),
    "drop_unfinished": (False, "finished"),
    "drop_duplicates": (False, "unique"),
}
TAUGHT_WITH = [*SAMPLED_WITH, "degree", "rules", *CURATION]  # of ft_cot alone
UNSURE = [  # in no name: the file alone knows
    *("teacher_max_new_tokens", "api", "no_temperature"),
    *CHAT_WITH,
    *REQUESTED_WITH,
]
RESULT_FLAGS = sorted({*ASKED_WITH, *TRAINED_WITH, *TUNED_WITH, *TAUGHT_WITH})
COMPUTED_WITH = (  # rounding and, where a student has dropout, its masks: checkpoints.py names them
    "device plain cuda_graphs compile shard "
    "micro_batch_size micro_tokens packing gradient_checkpointing"
).split()
NEUTRAL_FLAGS = [  # they change no result
    *COMPUTED_WITH,
    *"study stage redo show dry_run batch".split(),  # what is done
    *"saved data out train_key".split(),  # where files lie; what they hold is compared
    *"base_url teacher_part choices legacy_max_tokens concurrency requests_per_minute".split(),
    *"tokens_per_minute attempt_timeout max_attempts price_in price_out max_cost".split(),
    *"checkpoint_every checkpoint_steps keep keep_best log_every eval_every".split(),
    "eval_batch_size",
]


def flags_of(method: str) -> list[str]:
    """Return the flags that a method's result depends on, but task and method themselves."""
    names = [name for name in ASKED_WITH if name not in ("task", "method")]
    if method in FINE_TUNED:
        names += TRAINED_WITH + TUNED_WITH
    else:
        names += CHAT_WITH
    if method == "ft_cot":
        names += TAUGHT_WITH
    return list(dict.fromkeys(names))


def effective_flags(method: str, values: JsonObject) -> JsonObject:
    """Return the flags of a run that its result depends on, given the values of the others.

    Where one answer is given greedily, no temperature matters, nor does the seed of an untrained
    student that has weights of its own.
    """
    kept = {name: values[name] for name in flags_of(method)}
    is_greedy = values["eval_samples"] == 1
    if is_greedy:
        del kept["eval_temperature"]
    if is_greedy and method not in FINE_TUNED and values["student"] != "toy":
        del kept["seed"]
    if method == "ft" and not values["validation"]:
        del kept["data_seed"]
    return kept


def stage_flags(stage: str, method: str, values: JsonObject) -> JsonObject:
    """Return the flags that the file of a stage depends on.

    Of a teacher's file the degree is none: fewer rationales a question are the first of more.
    """
    if stage == "sample":
        return {name: values[name] for name in SAMPLED_WITH}
    if stage == "curate":
        names = ["split", "label_style", "validation"]
        if method == "ft_cot":
            names += TAUGHT_WITH
        return {name: values[name] for name in names}
    return effective_flags(method, values)


def check_redo(redo: str | None, stage: str, is_api_student: bool) -> None:
    """Raise UserError where --redo would pay again, or would do nothing."""
    if redo == "sample":
        raise UserError(
            "--redo sample: a teacher's completions cost money or hours, so they are never made "
            "again by a flag: move the completion file and its journal away"
        )
    if redo and is_api_student and redo != "curate":
        raise UserError(
            f"--redo {redo}: what a student behind an API costs is not paid twice: move its files "
            "in model_metadata and completion_data away"
        )
    if redo and stage != "all" and STAGES.index(redo) > STAGES.index(stage):
        raise UserError(f"--redo {redo} does nothing with --stage {stage}, which comes before it")


def is_redone(redo: str | None, stage: str) -> bool:
    """Tell whether --redo names this stage or one before it."""
    return redo is not None and STAGES.index(redo) <= STAGES.index(stage)


# ---------------- The code that chooses and reads answers, and that of the training loop

CODE_FILES = (
    "tasks.py",
    "answers.py",
    "candidates.py",
    "selection.py",
    "replies.py",
    "curation.py",
    "extras/filters.py",
    "extras/finetune_jobs.py",
)
CODE_ROOTS = ["choose_samples", "finetune_text"]  # of curation.py: all else follows from them
TRAINING_FILES = ("train_loop.py", "batches.py", "tokens.py")
TRAINING_ROOTS = ["train", "load_or_tokenize"]
OTHER_ROWS = ("TASKS", "TEMPLATES")  # tables of which a file depends on its own row alone
Definitions = dict[str, list[ast.stmt]]  # {name: the statements that define it}


def read_sources(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the texts of some files; extras/ may have been deleted."""
    paths = [Path(__file__).parent / name for name in names]
    return tuple(path.read_text() for path in paths if path.exists())


# At the start: what is edited during a long study counts for the next one.
SOURCES = read_sources(CODE_FILES)
TRAINING_SOURCES = read_sources(TRAINING_FILES)


def defined_names(statement: ast.stmt) -> list[str]:
    """Return what a statement at the top of a module defines: 'A, B = 1, 2' -> A, B."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    targets = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign | ast.AugAssign):
        targets = [statement.target]
    return [name for target in targets for name in used_names(target)]


def used_names(node: ast.AST) -> Iterator[str]:
    """Yield the names and attributes in a piece of code."""
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            yield part.id
        elif isinstance(part, ast.Attribute):
            yield part.attr


@functools.cache
def read_definitions(sources: tuple[str, ...]) -> Definitions:
    """Return all definitions at the top of some modules."""
    definitions = defaultdict(list)
    for source in sources:
        for statement in ast.parse(source).body:
            for name in defined_names(statement):
                definitions[name].append(statement)
    return definitions


def task_row(definitions: Definitions, task: str) -> list[ast.AST]:
    """Return the row of TASKS of a task, as code: Task("svamp", ...)."""
    found = []
    for node in ast.walk(definitions["TASKS"][0]):
        if isinstance(node, ast.Call) and node.args:
            first = node.args[0]
            if isinstance(first, ast.Constant) and first.value == task:
                found.append(node)
    return found


def code_fingerprint(task: str) -> str:
    """Return 16 hex digits of the code that makes a task's fine-tuning files.

    Filters, graders, the task's kind of answer, the choice of rationales, the sample format, and
    whatever these name in CODE_FILES; not comments, other tasks or other templates.
    """
    definitions = read_definitions(SOURCES)
    names = list(CODE_ROOTS)
    for row in task_row(definitions, task):
        names += used_names(row)
    return fingerprint_of(names, definitions)


def training_fingerprint() -> str:
    """Return 16 hex digits of the code of the training loop; not of the fast paths in extras/."""
    return fingerprint_of(TRAINING_ROOTS, read_definitions(TRAINING_SOURCES))


def fingerprint_of(names: list[str], definitions: Definitions) -> str:
    """Return 16 hex digits of what some names stand for, and of all that is used there."""
    waiting = list(names)
    found = {}
    while waiting:
        name = waiting.pop()
        if name not in definitions or name in found or name in OTHER_ROWS:
            continue
        found[name] = list(map(ast.unparse, definitions[name]))
        for statement in definitions[name]:
            waiting += used_names(statement)
    return storage.fingerprint(found)


# ---------------- Models

MODEL_SUFFIXES = (".safetensors", ".json", ".bin", ".model")
LARGE = 1 << 26  # bytes: hashing more takes long enough to remember it
HASHES = "model_hashes.json"  # below --saved: {path: [size, mtime_ns, inode, SHA-256]}


def model_fingerprint(name: str, saved: AnyPath) -> str:
    """Return what identifies an untrained model: the content of its files, or its hub name."""
    if not Path(name).is_dir():
        return name
    files = sorted(path for path in Path(name).iterdir() if path.suffix in MODEL_SUFFIXES)
    return storage.fingerprint({path.name: content_hash(path, saved) for path in files})


def content_hash(path: Path, saved: AnyPath) -> str:
    """Return the SHA-256 of a file; of a large one that has not changed, the one in HASHES."""
    known = path.stat()
    if known.st_size < LARGE:
        return storage.file_sha256(path)
    state = [known.st_size, known.st_mtime_ns, known.st_ino]
    notes = Path(saved) / HASHES
    hashes = {}
    if notes.exists():
        hashes = storage.read_json(notes)
    place = str(path.resolve())
    *old_state, digest = hashes.get(place, [None])
    if old_state != state:
        digest = storage.file_sha256(path)
        storage.write_json(notes, hashes | {place: [*state, digest]})
    return digest


# ---------------- What a finished run says of itself


def note_other_code(out: Path) -> None:
    """Say where the training loop has been edited since a student was trained; it is kept."""
    trained_by = storage.read_json(out / "run.json").get("code")
    if trained_by not in (None, training_fingerprint()):  # None: of an earlier version
        print(
            "train: the code of the training loop has changed since: to train the student again by "
            "it, add --redo train"
        )


def finished_settings(out: Path) -> JsonObject:
    """Return the settings in the run.json of a finished student.  Raises UserError."""
    note: JsonObject = {}
    if (out / "run.json").exists():
        note = storage.read_json(out / "run.json")
    settings = note.get("settings")
    if not note.get("finished") or not isinstance(settings, dict):
        raise UserError(f"there is no finished student in {out}: run --stage train")
    if type(settings.get("epochs")) is not int:
        raise UserError(f"{out / 'run.json'} does not say its number of epochs: train it again")
    return settings


def trained_flags(settings: JsonObject) -> JsonObject:
    """Return what run.json holds of the flags, and a hash of what was learnt."""
    known = {name: settings[name] for name in TRAINED_WITH if name in settings}
    if "finetune_data" in settings:
        known["finetune_data"] = str(settings["finetune_data"])[:16]
    return known


def with_notes(known: JsonObject, made_with: JsonObject, note: JsonObject) -> JsonObject:
    """Return the flags of a fine-tuned student, corrected by what stands beside its files.

    made_with: the settings of run.json; note: made_from.json of the fine-tuning file.  What the
    teacher was asked with is known from its own file alone; of a student that learnt from another
    file than the flags name, nothing of the curation is known.
    """
    known = {name: value for name, value in known.items() if name not in TRAINED_WITH}
    known |= trained_flags(made_with)
    if known["student"] != "toy":
        known["student"] = made_with["student"]
    for name in UNSURE:
        known.pop(name, None)
    learnt = made_with.get("finetune_data", note.get("sha256"))
    if not note or note["sha256"] != learnt:
        for name in (*TUNED_WITH, *TAUGHT_WITH):
            known.pop(name, None)
        return known | trained_flags(made_with)
    settings = note["settings"]
    if "rules" in settings:
        known["rules"] = settings["rules"]
    known["finetune_data"] = learnt[:16]
    return known | note.get("taught", {})


def teacher_flags(settings: Any) -> JsonObject:
    """Return what a teacher's completion file says of how it was asked, by the flags' names.

    A published file says nothing: what is not known is left out, never guessed.
    """
    if not isinstance(settings, dict):
        return {}
    known = {}
    if "max_new_tokens" in settings:
        known["teacher_max_new_tokens"] = settings["max_new_tokens"]
    if "api" in settings:
        known["api"] = settings["api"]
        known["no_temperature"] = settings.get("temperature") is None
        parameters = json.loads(settings.get("parameters") or "{}")
        for name in ("reasoning_effort", "top_p"):
            known[name] = parameters.pop(name, None)
        known["extra_body"] = None
        if parameters:
            known["extra_body"] = json.dumps(parameters, sort_keys=True)
        known["extra_headers"] = settings.get("extra_headers", "")
        known["system"] = settings.get("system", "")
    if isinstance(settings.get("chat"), dict):
        known |= {"chat": True, **settings["chat"]}
    return known
