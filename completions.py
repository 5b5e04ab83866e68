"""Completion datasets: a model and a way of prompting it, and its texts on a task, in one file.

Any model behind complete(prompts, max_new_tokens, temperature, n, stop) makes one.  A teacher's is
curated, a student's is scored, a table is many of them (format: saved/README.md).
"""

import itertools
import json
import operator
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

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
    wrong = storage.find_wrong_type(content, {"metadata": dict, "data": dict})
    if wrong or "dataset_key" not in metadata:
        form = '{"metadata": {"dataset_key": ...}, "data": {"<sample_index>": [rows]}}'
        raise UserError(f"{path} is not a completion file, {form}")
    wrong = storage.find_wrong_type(metadata, METADATA_TYPES)
    if wrong:
        value = json.dumps(metadata.get(wrong))
        what = f"is {value[:80]}, which it cannot be"
        raise UserError(f"{path}: {wrong} in its metadata {what}: mend it")
    if metadata.get("settings") is None:
        metadata.pop("settings", None)
    found = metadata["dataset_key"]
    if task and found != task:
        raise UserError(f"{path} holds completions of the task {found}, not {task}")
    rows = []
    for index, of_sample in content["data"].items():
        if not are_completions(of_sample, index):
            columns = "sample_index, completion_index, question, answer or completion"
            what = f"lacks its {columns}, or one is not what it should be"
            raise UserError(f"{path}: a completion of sample {index[:80]} {what}")
        rows += of_sample
    rows.sort(key=POSITION)
    places = map(POSITION, rows)
    for place, following in itertools.pairwise(places):
        if place == following:
            i, k = place
            raise UserError(f"{path}: completion {k} of sample {i} is there twice")
    return metadata, rows


def are_completions(rows: Any, index: str) -> bool:
    """Tell whether what a file holds for a sample are its completions."""
    if not isinstance(rows, list):
        return False
    for row in rows:
        if storage.find_wrong_type(row, ROW_TYPES) or "completion" not in row:
            return False
        if row["completion_index"] < 0 or str(row["sample_index"]) != index:
            return False
    return True


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
    old_settings = metadata.get("settings")
    old_run = metadata.get("run") or {}
    new_run = old_run | (run or {})
    if old_settings != settings or new_run == old_run:
        return storage.settings_match(stage, path, old_settings, settings)
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
        if storage.settings_match("sample", path, metadata.get("settings"), settings):
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
        content = storage.read_json(path)
        old = content["data"]
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
        metadata, _ = read_completions(path)
        settings = metadata.get("settings", {})
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
    prompt, _ = tasks.format_sample(plan.template, plan.family, question, examples=plan.examples)
    return prompt


def fingerprints(samples: list[Sample], plan: SamplingConfig) -> JsonObject:
    """Return what tells, in settings, that questions, templates or few-shot examples changed."""
    known = {"samples": storage.fingerprint(samples)}
    known["texts"] = tasks.template_fingerprint(plan.template, plan.family)
    if plan.examples:
        known["examples"] = storage.fingerprint(plan.examples)
    return known


def sampling_settings(plan: SamplingConfig, samples: list[Sample], seed: int) -> JsonObject:
    """Return the settings of the completion file of a toy or local teacher."""
    return {
        "teacher": plan.model,
        "method": plan.template,
        "degree": plan.degree,
        "temperature": plan.temperature,
        "seed": seed,
        "max_new_tokens": plan.max_new_tokens,
        **fingerprints(samples, plan),
    }


def evaluation_settings(
    plan: SamplingConfig, made_by: str, epoch: int | None, samples: list[Sample], seed: int
) -> JsonObject:
    """Return the settings of a student's completion file.  made_by: a hash of what made it."""
    settings = {
        "model": made_by,
        "epoch": epoch,
        "template": plan.template,
        "max_new_tokens": plan.max_new_tokens,
        **fingerprints(samples, plan),
    }
    if plan.degree > 1:
        settings["samples_a_question"] = plan.degree
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
    asked = prompts
    if plan.family == "chat":
        asked = [[prompt] for prompt in prompts]
    stop = None
    if plan.template == "fs_cot":
        stop = ["\nQ:"]  # the examples lead a base model to write a next question
    limit = plan.max_new_tokens
    completions = complete(asked, limit, plan.temperature, plan.degree - first, stop)
    data = {}
    rows = []
    for sample, prompt, of_sample in zip(samples, prompts, completions, strict=True):
        i = sample["sample_index"]
        text = {"question": sample["question"], "answer": sample["answer"], "prompt": prompt}
        sample_rows = []
        for k, completion in enumerate(of_sample, first):
            row = {"sample_index": i, "completion_index": k, **text, **completion}
            sample_rows.append(row)
        data[str(i)] = sample_rows
        rows += sample_rows
    if plan.template == "zs_cot":
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
        for name in ("prompt", "completion", "finish_reason"):
            row[f"reasoning_{name}"] = row[name]
        before = row["prompt"]
        rationale = row["completion"]
        if family == "chat":
            prompt = tasks.ANSWER_TRIGGER.strip()
            asked.append([before, rationale, prompt])
        else:
            if family == "encoder_decoder" and rationale[:1].strip():
                before += " "
            prompt = before + rationale + tasks.ANSWER_TRIGGER
            asked.append(prompt)
        row["prompt"] = prompt
    answers = complete(asked, limit, 0.0, 1, None)
    for row, [answer] in zip(rows, answers, strict=True):
        row["completion"] = answer["completion"]
        row["finish_reason"] = answer["finish_reason"]


# ---------------- Check one against the benchmark


def texts_of(row: Completion | Sample) -> tuple[str, str]:
    question = row["question"].strip()
    answer = row["answer"].strip()
    return question, answer


def check_rows(path: AnyPath, rows: list[Completion], task: str, samples: list[Sample]) -> None:
    """Raise UserError for a completion of another sample, question or gold answer."""
    for row in rows:
        i = row["sample_index"]
        is_known = 0 <= i < len(samples)
        if not is_known or texts_of(row) != texts_of(samples[i]):
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
    is_prepared = task == "toy" or tasks.dataset_path(task, data_dir).exists()
    if part == "all" and not is_prepared:
        return rows  # nothing to check against: the rows carry their gold answers
    samples = tasks.load(task, data_dir)
    check_rows(path, rows, task, samples)
    if part == "all":
        wanted = set(range(len(samples)))
    elif part == "validation":
        wanted = set(metadata.get("validation") or [])
    else:
        train, test = tasks.load_split(task, split, data_dir)
        wanted = set(train)
        if part == "test":
            wanted = set(test)
    found = {row["sample_index"] for row in rows}
    missing = sorted(wanted - found)
    if missing and not allow_partial:
        raise UserError(
            f"{path} lacks {len(missing)} of the {len(wanted)} samples of part '{part}' (first: "
            f"{missing[0]}): complete it, choose another --part, or score what there is with "
            "--allow_partial"
        )
    return [row for row in rows if row["sample_index"] in wanted]
