"""Completion datasets: a model and a way of prompting it, and its texts on a task, in one file.

Any model behind complete(prompts, max_new_tokens, temperature, n, stop) makes one.  A teacher's is
curated, a student's is scored, a table is many of them (format: saved/README.md).
"""

import json
import operator
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict

import storage
import tasks
from storage import AnyPath, JsonObject, UserError
from tasks import Sample

# ---------------- The file (saved/README.md)


class Completion(TypedDict):  # a row of a completion dataset (saved/README.md)
    sample_index: int
    completion_index: int  # 0 to degree - 1
    question: str
    answer: str  # the gold answer
    completion: str | None  # what the answer is read from
    prompt: NotRequired[str]
    finish_reason: NotRequired[str]  # stop or length
    reasoning_prompt: NotRequired[str]  # these three: of step 1 of Zero-shot-CoT
    reasoning_completion: NotRequired[str | None]
    reasoning_finish_reason: NotRequired[str]
    reasoning: NotRequired[str]  # what a reasoning model thought before its text, or its rationale
    api: NotRequired[str]  # of a teacher behind an API: "chat" or "completions"


TEXT_OR_NULL = str | None
ROW_TYPES = {
    "sample_index": int, "completion_index": int, "question": str, "answer": str,
    "completion": TEXT_OR_NULL, "reasoning_completion": TEXT_OR_NULL,
}  # fmt: skip
METADATA_TYPES = {
    "dataset_key": str, "base_model": TEXT_OR_NULL, "completion_key": TEXT_OR_NULL,
    "finetune_key": TEXT_OR_NULL, "train_key": TEXT_OR_NULL, "epoch": int | None,
    "prediction_template": TEXT_OR_NULL, "split": TEXT_OR_NULL, "part": TEXT_OR_NULL,
    "validation": list | None, "settings": dict | None,
}  # fmt: skip
POSITION = operator.itemgetter("sample_index", "completion_index")


def read_completions(path: AnyPath, task: str | None = None) -> tuple[JsonObject, list[Completion]]:
    """Return (metadata, rows in order) of a completion file (of a task).  Raises UserError."""
    content = storage.read_json(path)
    metadata = content.get("metadata")
    data = content.get("data")
    if (
        storage.find_wrong_type(content, {"metadata": dict, "data": dict})
        or "dataset_key" not in metadata
    ):
        form = '{"metadata": {"dataset_key": ...}, "data": {"<sample_index>": [rows]}}'
        raise UserError(f"{path} is not a completion file, {form}")
    if wrong := storage.find_wrong_type(metadata, METADATA_TYPES):
        what = f"is {json.dumps(metadata.get(wrong))[:80]}, which it cannot be"
        raise UserError(f"{path}: {wrong} in its metadata {what}: mend it")
    if metadata.get("settings") is None:
        metadata.pop("settings", None)
    if task and metadata["dataset_key"] != task:
        raise UserError(
            f"{path} holds completions of the task {metadata['dataset_key']}, not {task}"
        )
    rows = []
    for index, sample_rows in data.items():
        for row in sample_rows if isinstance(sample_rows, list) else [None]:
            wrong = storage.find_wrong_type(row, ROW_TYPES) or "completion" not in row
            wrong = wrong or row["completion_index"] < 0
            if wrong or str(row["sample_index"]) != index:
                columns = "sample_index, completion_index, question, answer or completion"
                what = f"lacks its {columns}, or one is not what it should be"
                raise UserError(f"{path}: a completion of sample {index[:80]} {what}")
            rows.append(row)
    rows.sort(key=POSITION)
    for row, following in zip(rows, rows[1:], strict=False):
        if POSITION(row) == POSITION(following):
            i, k = POSITION(row)
            raise UserError(f"{path}: completion {k} of sample {i} is there twice")
    return metadata, rows


def completions_match(
    stage: str, path: Path, task: str, settings: JsonObject, run: JsonObject | None = None
) -> bool:
    """Tell whether a completion file exists and was made with these settings.

    run: the flags that made it.  Others may have led to the same student: then the file's record of
    them is brought up to date, since that is what tables know it by.
    """
    if not path.exists():
        return False
    metadata, _ = read_completions(path, task)
    old_run = metadata.get("run") or {}
    new_run = old_run | (run or {})
    if metadata.get("settings") != settings or new_run == old_run:
        return storage.settings_match(stage, path, metadata.get("settings"), settings)
    content = storage.read_json(path)
    content["metadata"]["run"] = new_run
    storage.write_json(path, content)
    changed = storage.changed_settings(old_run, new_run, new_run)
    print(f"{stage}: {path} holds answers of the same student; noted in it: {changed}")
    return True


def sampled_degree(path: Path, task: str, settings: JsonObject) -> int:
    """Return how many completions a question a file has; 0 if made with other settings.

    Their number itself, the degree, does not matter.  Prints what will become of the file.
    """
    if not path.exists():
        return 0
    metadata, _ = read_completions(path, task)
    old = metadata.get("settings") or {}
    found = old.get("degree", 0)
    wanted = settings["degree"]
    if found == wanted or old | {"degree": wanted} != settings:
        is_current = storage.settings_match("sample", path, metadata.get("settings"), settings)
        if is_current:
            return found
        return 0
    if found > wanted:
        print(f"sample: {path} has {found} rationales a question: the first {wanted} are used")
    else:
        print(f"sample: {path} has {found} rationales a question: asking for {wanted - found} more")
    return found


def write_completions(path: Path, metadata: JsonObject, data: JsonObject, first: int = 0) -> None:
    """Write a completion file; one that is there cost hours or money, so it goes to a backup.

    first: completions of each sample that it keeps, before those of data.
    """
    if first:
        old = storage.read_json(path)["data"]
        data = {index: old.get(index, []) + rows for index, rows in data.items()}
    elif path.exists():
        storage.move_to_backup(path)
    storage.write_json(path, {"metadata": metadata, "data": data})
    storage.remove_journals(path)


def set_aside_completions(paths: Iterable[Path], made_by: str | None) -> None:
    """Move completion files of another student than `made_by` (None: of any) to backups.

    made_by: fingerprint of what the student was made with, `model` in a file's settings.
    """
    for path in paths:
        settings = read_completions(path)[0].get("settings", {})
        if made_by is None or settings.get("model") != made_by:
            storage.move_to_backup(path)


# ---------------- Make one


class SamplingConfig(NamedTuple):
    """How a model is asked; the keys of an API's answers hold all but `degree` and `choices`."""

    model: str
    api: str  # "chat" or "completions", of a model behind an API
    template: str  # of tasks.TEMPLATES; zs_cot takes two steps: the rationale, then the answer
    family: str
    max_new_tokens: int
    temperature: float | None = 0.0  # None: not sent
    degree: int = 1  # completions a question
    choices: int = 1  # completions a request
    legacy_max_tokens: bool = False  # of chat servers that know only max_tokens (llama.cpp)
    examples: str = ""  # of fs_cot
    # of a model behind an API, where they are set:
    parameters: str = ""  # JSON: what else each request sends (top_p, reasoning_effort, ...)
    system: str = ""  # the system's turn of a chat
    extra_headers: str = ""  # NAME=ENV_VARIABLE,...
    task: str = ""  # whose rules find an answer that step 1 states already
    is_teacher: bool = False  # no student, whose texts are scored even where they are cut


def format_prompt(plan: SamplingConfig, sample: Sample) -> str:
    """Return the prompt of a sample, without a label."""
    question = sample["question"]
    return tasks.format_sample(plan.template, plan.family, question, examples=plan.examples)[0]


def fingerprints(samples: list[Sample], plan: SamplingConfig) -> JsonObject:
    """Return what tells, in settings, that questions, templates or few-shot examples changed."""
    known = {"samples": storage.fingerprint(samples)}
    known["texts"] = tasks.template_fingerprint(plan.template, plan.family)
    if plan.examples:
        known["examples"] = storage.fingerprint(plan.examples)
    return known


def sampling_settings(plan: SamplingConfig, samples: list[Sample], seed: int) -> JsonObject:
    """Return the settings of the completion file of a toy or local teacher."""
    settings = {"teacher": plan.model, "method": plan.template, "degree": plan.degree}
    settings |= {"temperature": plan.temperature, "seed": seed}
    settings |= {"max_new_tokens": plan.max_new_tokens}
    return settings | fingerprints(samples, plan)


def evaluation_settings(
    plan: SamplingConfig, made_by: str, epoch: int | None, samples: list[Sample], seed: int
) -> JsonObject:
    """Return the settings of a student's completion file.  made_by: a hash of what made it."""
    settings = {"model": made_by, "epoch": epoch, "template": plan.template}
    settings |= {"max_new_tokens": plan.max_new_tokens, **fingerprints(samples, plan)}
    if plan.degree > 1:
        settings |= {"samples_a_question": plan.degree}
        settings |= {"temperature": plan.temperature, "seed": seed}
    return settings


def few_shot_prompt(task: str, data_dir: AnyPath = "data") -> str:
    """Return the Few-shot-CoT prompt of a task.  Raises UserError where there is none."""
    path = Path(data_dir) / "few_shot_cot_prompts.json"
    prompt = None
    if path.exists():
        prompt = storage.read_json(path).get(task)
    if prompt is None and task == "toy":
        return tasks.TOY_EXAMPLES
    if not isinstance(prompt, dict) or not isinstance(prompt.get("prompt"), str):
        raise UserError(
            f"{path} has no few-shot prompt for {task}: make it with `python data/prepare.py "
            f"{task}`, or use zs_cot (there is none for tracking_shuffled_objects)"
        )
    return prompt["prompt"]


def make_completions(
    complete: Callable[..., list[list[dict]]],
    samples: list[Sample],
    plan: SamplingConfig,
    first: int = 0,
) -> dict[str, list[Completion]]:
    """Return {"<sample_index>": [row, ...]}, completions first .. plan.degree - 1 of each sample.

    complete(prompts, max_new_tokens, temperature, n, stop) gives, for each prompt, n times
    {"completion", "finish_reason"}.  zs_cot takes two steps (paper §3, step 1): the rationale, then
    the answer after it.  A chat model gets lists of turns as prompts (chats.py).
    """
    prompts = [format_prompt(plan, sample) for sample in samples]
    is_chat = plan.family == "chat"
    stop = None
    if plan.template == "fs_cot":
        stop = ["\nQ:"]  # the examples lead a base model to write a next question
    limit = plan.max_new_tokens
    asked = [[prompt] for prompt in prompts] if is_chat else prompts
    completions = complete(asked, limit, plan.temperature, plan.degree - first, stop)
    data = {}
    for sample, prompt, of_sample in zip(samples, prompts, completions, strict=True):
        i = sample["sample_index"]
        text = {"question": sample["question"], "answer": sample["answer"], "prompt": prompt}
        data[str(i)] = [
            {"sample_index": i, "completion_index": k, **text, **completion}
            for k, completion in enumerate(of_sample, first)
        ]
    if plan.template == "zs_cot":
        rows = [row for of_sample in data.values() for row in of_sample]
        add_answers(complete, rows, limit, plan.family)
    return data


def add_answers(
    complete: Callable[..., list[list[dict]]], rows: list[dict], limit: int, family: str
) -> None:
    """Take step 2 of Zero-shot-CoT: each row's completion becomes its rationale.

    What an encoder-decoder writes begins a text of its own, without the space of a next word.
    """
    asked = []
    for row in rows:
        row |= {f"reasoning_{k}": row[k] for k in ("prompt", "completion", "finish_reason")}
        if family == "chat":
            turns = [row["prompt"], row["completion"], tasks.ANSWER_TRIGGER.strip()]
            row["prompt"] = turns[-1]
            asked.append(turns)
            continue
        if family == "encoder_decoder" and row["completion"][:1].strip():
            row["prompt"] += " "
        row["prompt"] += row["completion"] + tasks.ANSWER_TRIGGER
        asked.append(row["prompt"])
    answers = complete(asked, limit, 0.0, 1, None)
    for row, [answer] in zip(rows, answers, strict=True):
        row |= {name: answer[name] for name in ("completion", "finish_reason")}


# ---------------- Check one against the benchmark


def check_rows(path: AnyPath, rows: list[Completion], task: str, samples: list[Sample]) -> None:
    """Raise UserError for a completion of another sample, question or gold answer."""
    gold = [(sample["question"].strip(), sample["answer"].strip()) for sample in samples]
    for row in rows:
        i = row["sample_index"]
        if not 0 <= i < len(gold) or (row["question"].strip(), row["answer"].strip()) != gold[i]:
            raise UserError(
                f"{path}: sample {i} is not sample {i} of {task} (question or gold answer differ): "
                "the file was made from other data"
            )


def rows_of_part(
    path: AnyPath,
    metadata: dict,
    rows: list[Completion],
    part: str,
    split: str,
    data_dir: AnyPath,
    allow_partial: bool,
) -> list[Completion]:
    """Return the rows of a part.  Raises UserError where samples are missing or of other data."""
    task = metadata["dataset_key"]
    is_prepared = task == "toy" or (Path(data_dir) / "dataset" / f"{task}.json").exists()
    if part == "all" and not is_prepared:
        return rows  # nothing to check against: the rows carry their gold answers
    samples = tasks.load(task, data_dir)
    check_rows(path, rows, task, samples)
    if part == "all":
        wanted = set(range(len(samples)))
    elif part == "validation":
        wanted = set(metadata.get("validation") or [])
    else:
        wanted = set(tasks.load_split(task, split, data_dir)[part == "test"])
    missing = sorted(wanted - {row["sample_index"] for row in rows})
    if missing and not allow_partial:
        raise UserError(
            f"{path} lacks {len(missing)} of the {len(wanted)} samples of part '{part}' (first: "
            f"{missing[0]}): complete it, choose another --part, or score what there is with "
            "--allow_partial"
        )
    return [row for row in rows if row["sample_index"] in wanted]
