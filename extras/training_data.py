"""What a student learnt from: the teacher's rationales, what became of each, the samples' tokens.

Kept is what the fine-tuning file holds; why a rationale is not in it is worked out anew.  For the
page (extras/page.py) and the method's figure (extras/figure.py).
"""

from __future__ import annotations

from collections import defaultdict
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
    if path.resolve().parent.parent.name == "completion_data":
        root = path.resolve().parent.parent.parent
    train_key = metadata.get("train_key")
    student = None
    if train_key:
        name = f"D_{metadata['dataset_key']}__T_{train_key}"
        student = root / "models" / f"B_{metadata.get('base_model')}" / name
    finetune_key = metadata.get("finetune_key")
    finetune_data = None
    if finetune_key:
        curated = Path(root, "finetune_data").glob(f"P_*/F_{finetune_key}.json")
        finetune_data = find_finetune_data(sorted(curated), student)
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
    if student is None or not (student / "run.json").exists():
        return {}
    return storage.read_json(student / "run.json").get("settings") or {}


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
    family = path.parent.name.removeprefix("P_")
    teacher = None
    metadata = {}
    rows = []
    for file in sorted(Path(saved, "completion_data").glob(f"B_*/D_{task}.json")):
        if storage.file_sha256(file) == settings.get("source"):
            teacher = file
            metadata, rows = read_completions(file, task)
    return Curated(settings, data, family, teacher, metadata, rows)


def why_dropped(row: Completion, verdict: tasks.Verdict) -> str:
    """Say why a rationale of a training question is not in the fine-tuning file."""
    if not curation.has_rationale(row):
        return "it explains nothing, or was cut off"
    if verdict.prediction in (None, ""):
        return "no answer can be read"
    if not verdict.correct:
        return f"{WRONG_ANSWER} {verdict.prediction}, and {row['answer'].strip()} is right"
    return "left out by a filter (settings)"


def sample_places(data: storage.FinetuneData) -> dict[tuple[int, str], list[int]]:
    """Return {(sample_index, label): positions in the fine-tuning file, the last first}."""
    places = defaultdict(list)
    samples = zip(data["sample_index"], data["label"], strict=True)
    for position, sample in enumerate(samples):
        places[sample].insert(0, position)
    return places


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
    places = sample_places(curated.data)
    judged = defaultdict(list)
    for row in curated.rows:
        i = row["sample_index"]
        verdict = grade(row["completion"], row["answer"])
        rationale = tasks.rationale_of(row)
        texts = (row["question"], rationale, row["answer"])
        label = tasks.format_sample(settings["template"], curated.family, *texts)[1]
        found = places.get((i, storage.replace_lone_surrogates(label)))
        if i in validation:
            judged[i].append([None, "held out for validation", -1])
        elif i not in train:
            judged[i].append([None, "a test question: never learnt from", -1])
        elif row["completion_index"] >= degree:
            judged[i].append([None, f"not looked at: this run takes the first {degree}", -1])
        elif found:
            why = "its answer is right"
            if not verdict.correct:
                why = "kept though its answer is not right"
            judged[i].append([1, why, found.pop()])
        else:
            judged[i].append([0, why_dropped(row, verdict), -1])
    return dict(judged)


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


def tokenize_samples(curated: Curated, positions: list[int], files: RunFiles) -> Record:
    """Return the tokens of these samples, as training reads them, by the student's tokenizer.

    {"samples": {position: [prompt ids, label ids]}, "vocabulary": {id: text}}; where the student's
    folder is gone, "texts": {position: [prompt, label]} and "note", a sentence.
    """
    prompts = [curated.data["input"][i] for i in positions]
    labels = [curated.data["label"][i] for i in positions]
    folder = files.student
    if folder is None or not (folder / "tokenizer_config.json").exists():
        texts = zip(prompts, labels, strict=True)
        note = f"no tokens: the student's folder {folder} is not there"
        return {"note": note, "texts": dict(zip(positions, texts, strict=True))}
    from tokens import tokenize

    tokenizer, max_length, positions_of_model = read_student(folder)
    # sample_index is the place in the file, so that a sample knows it
    data = storage.FinetuneData(sample_index=positions, input=prompts, label=labels)
    samples, _ = tokenize(tokenizer, curated.family, data, max_length, positions_of_model)
    tokens = {}
    ids = set()
    for sample in samples:
        tokens[sample.sample_index] = [sample.prompt, sample.label]
        ids.update(sample.prompt, sample.label)
    return {"samples": tokens, "vocabulary": token_texts(tokenizer, ids)}


def read_student(folder: Path) -> tuple[Any, int, Positions]:
    """Return a student's tokenizer, the longest sample of its training, and its positions."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, *storage.UNREADABLE) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"the tokenizer in {folder} cannot be read: {reason}") from None
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    settings = read_settings(folder)
    return tokenizer, settings.get("max_length", 512), count_positions(config)


def samples_of_questions(data: storage.FinetuneData, shown: set[int]) -> dict[int, list[int]]:
    """Return {sample_index: positions of its samples in the fine-tuning file}."""
    positions = defaultdict(list)
    for position, index in enumerate(data["sample_index"]):
        if index in shown:
            positions[index].append(position)
    return dict(positions)
