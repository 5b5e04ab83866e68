"""What a student learnt from: the teacher's rationales, what became of each, the samples' tokens.

Kept is what the fine-tuning file holds; why a rationale is not in it is worked out anew.  For the
page (extras/page.py) and the method's figure (extras/figure.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import curation
import storage
import tasks
from completions import Completion, read_completions
from models import Positions, count_positions
from storage import UserError

WRONG_ANSWER = "its answer reads"  # why a rationale is dropped begins so
Record = dict[str, Any]  # a JSON object


class RunFiles(NamedTuple):
    """Where a student's files lie, as far as its completion file tells."""

    saved: Path
    student: Path | None  # the folder of a fine-tuned one
    finetune_data: Path | None


def run_files(path: Path, metadata: Record, saved: str) -> RunFiles:
    """Return the files beside a completion file, which stands in the folder completion_data."""
    root = Path(saved)
    folder = path.resolve().parent.parent
    if folder.name == "completion_data":
        root = folder.parent
    student = None
    train_key = metadata.get("train_key")
    if train_key:
        of_model = f"B_{metadata.get('base_model')}"
        of_run = f"D_{metadata['dataset_key']}__T_{train_key}"
        student = root / "models" / of_model / of_run
    finetune_data = None
    if metadata.get("finetune_key"):
        pattern = f"P_*/F_{metadata['finetune_key']}.json"
        data_root = root / "finetune_data"
        curated = sorted(data_root.glob(pattern))
        finetune_data = find_finetune_data(curated, student)
    return RunFiles(root, student, finetune_data)


def find_finetune_data(curated: list[Path], student: Path | None) -> Path | None:
    """Return which of these files a student was trained on, by the hash in its run.json.

    The first where there is no run.json; None where the file was made anew since.
    """
    trained_on = read_settings(student).get("finetune_data")
    for path in curated:
        if trained_on in (None, storage.file_sha256(path)):
            return path
    return None


def read_settings(student: Path | None) -> Record:
    """Return the settings in a student's run.json; {} where there is none."""
    if student is None:
        return {}
    path = student / "run.json"
    if not path.exists():
        return {}
    run = storage.read_json(path)
    return run.get("settings") or {}


class Curated(NamedTuple):
    """A fine-tuning file, how it was made, and the teacher's completions that it was made from."""

    settings: Record  # of curation
    data: storage.FinetuneData
    family: str
    teacher: Path | None  # None: of ft, or no longer there
    metadata: Record  # of the teacher's file
    rows: list[Completion]  # in it


def read_curated(path: Path, task: str, saved: Path) -> Curated:
    """Read a fine-tuning file and find the teacher's file by the hash that stands beside it."""
    note = curation.read_note(path)
    settings = note.get("settings") or {}
    data = storage.read_finetune_data(path)
    folder = path.parent.name
    family = folder.removeprefix("P_")
    source = settings.get("source")
    completion_data = saved / "completion_data"
    teachers = completion_data.glob(f"B_*/D_{task}.json")
    for teacher in sorted(teachers):
        if storage.file_sha256(teacher) == source:
            metadata, rows = read_completions(teacher, task)
            return Curated(settings, data, family, teacher, metadata, rows)
    return Curated(settings, data, family, teacher=None, metadata={}, rows=[])


def why_dropped(row: Completion, verdict: tasks.Verdict) -> str:
    """Say why a rationale of a training question is not in the fine-tuning file."""
    if not curation.has_rationale(row):
        return "it explains nothing, or was cut off"
    if verdict.prediction in (None, ""):
        return "no answer can be read"
    if not verdict.correct:
        return f"{WRONG_ANSWER} {verdict.prediction}, and {row['answer'].strip()} is right"
    return "left out by a filter (settings)"


def positions_of(values: Iterable[Hashable]) -> dict[Any, list[int]]:
    """["a", "b", "a"] -> {"a": [0, 2], "b": [1]}"""
    positions = defaultdict(list)
    for position, value in enumerate(values):
        positions[value].append(position)
    return positions


def judge_rationales(curated: Curated, task: str, train: set[int], validation: set[int]) -> Record:
    """Return {sample_index: [[1 if kept, why, position of its sample or -1], ...]}.

    In the order of the teacher's completions.  Kept is what the fine-tuning file holds; the reason
    is worked out anew, by the rules and filters that stand beside it.  None instead of 1 or 0: it
    was not for training.
    """
    settings = curated.settings
    template = curated.metadata.get("prediction_template")
    grade = tasks.make_grader(task, template, settings.get("rules", "paper"))
    degree = settings.get("degree", 1)
    samples = zip(curated.data["sample_index"], curated.data["label"], strict=True)
    positions = positions_of(samples)
    judged = defaultdict(list)
    for row in curated.rows:
        i = row["sample_index"]
        verdict = grade(row["completion"], row["answer"])
        found = positions[i, label_of(row, curated)]
        kept = None
        position = -1
        if i in validation:
            why = "held out for validation"
        elif i not in train:
            why = "a test question: never learnt from"
        elif row["completion_index"] >= degree:
            why = f"not looked at: this run takes the first {degree}"
        elif found:
            kept = 1
            position = found.pop(0)
            why = "its answer is right"
            if not verdict.correct:
                why = "kept though its answer is not right"
        else:
            kept = 0
            why = why_dropped(row, verdict)
        judged[i].append([kept, why, position])
    return dict(judged)


def label_of(row: Completion, curated: Curated) -> str:
    """Return the label that a rationale becomes in the fine-tuning file, if it is kept."""
    _, label = tasks.format_sample(
        curated.settings["template"],
        curated.family,
        row["question"],
        tasks.rationale_of(row),
        row["answer"],
    )
    return storage.replace_lone_surrogates(label)


def token_texts(tokenizer: Any, ids: set[int]) -> dict[int, str]:
    """Return what the page writes for each token: ' the', '<|endoftext|>', of half a letter Ã."""
    texts = {}
    for token_id in sorted(ids):
        token = tokenizer.convert_ids_to_tokens(token_id)
        text = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        if token.startswith("\u2581"):  # SentencePiece's space, which decoding drops
            text = token.replace("\u2581", " ")
        elif "\ufffd" in text:
            text = token
        texts[token_id] = text
    return texts


def tokenize_samples(curated: Curated, shown: dict[int, list[int]], files: RunFiles) -> Record:
    """Return the tokens of samples, as training reads them, by the student's tokenizer.

    shown: {sample_index: positions of its samples}.  Returns {"samples": {position: [prompt ids,
    label ids]}, "vocabulary": {id: text}}; where the student's folder is gone, "texts": {position:
    [prompt, label]} and "note", a sentence.
    """
    prompts = curated.data["input"]
    labels = curated.data["label"]
    texts = {}
    for positions in shown.values():
        for i in positions:
            texts[i] = [prompts[i], labels[i]]
    folder = files.student
    if not has_tokenizer(folder):
        note = f"no tokens: the student's folder {folder} is not there"
        return {"note": note, "texts": texts}
    from tokens import tokenize

    tokenizer, max_length, positions_of_model = read_student(folder)
    # sample_index is the place in the file, so that a sample knows it
    data = storage.FinetuneData(sample_index=list(texts), input=[], label=[])
    for prompt, label in texts.values():
        data["input"].append(prompt)
        data["label"].append(label)
    samples, _ = tokenize(tokenizer, curated.family, data, max_length, positions_of_model)
    tokens = {}
    ids = set()
    for sample in samples:
        tokens[sample.sample_index] = [sample.prompt, sample.label]
        ids.update(sample.prompt, sample.label)
    vocabulary = token_texts(tokenizer, ids)
    return {"samples": tokens, "vocabulary": vocabulary}


def has_tokenizer(folder: Path | None) -> bool:
    """Tell whether a student's folder is there."""
    if folder is None:
        return False
    path = folder / "tokenizer_config.json"
    return path.exists()


def read_student(folder: Path) -> tuple[Any, int, Positions]:
    """Return a student's tokenizer, the longest sample of its training, and its positions."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, *storage.UNREADABLE) as error:
        reason = storage.one_line(error)
        raise UserError(f"the tokenizer in {folder} cannot be read: {reason}") from None
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    settings = read_settings(folder)
    max_length = settings.get("max_length", 512)
    return tokenizer, max_length, count_positions(config)
