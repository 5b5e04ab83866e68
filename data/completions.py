"""A completion dataset is one file: a model and a prompting method, on the samples of a task (saved/README.md).

Any model behind `complete(prompts, n, temperature, max_new_tokens, stop)` makes one; evaluation and curation read it.
"""
import itertools
import json
import operator
from pathlib import Path

import tasks
from data import files
from data.files import UserError


def few_shot_examples(task, data_dir="data"):
    """-> the Few-shot-CoT prompt of a task.  Raises UserError where there is none."""
    path = Path(data_dir) / "few_shot_cot_prompts.json"
    prompt = files.read_json(path).get(task) if path.exists() else None
    if prompt is None and task == "toy":
        from data.toy import TOY_EXAMPLES
        return TOY_EXAMPLES
    if not isinstance(prompt, dict) or not isinstance(prompt.get("prompt"), str):
        raise UserError(f"{path} has no few-shot prompt for {task}: make it with `python data/prepare.py {task}`, or use zs_cot "
                        "(there is none for tracking_shuffled_objects)")
    return prompt["prompt"]


def make_completions(complete, samples, method, family, template, degree=1, temperature=0.0, max_new_tokens=128, examples=""):
    """-> {"<sample_index>": [row, ...]}: `degree` completions per sample, by any model behind `complete(prompts, n,
    temperature, max_new_tokens, stop)`.  zs_cot takes two steps (paper §3, step 1): the rationale, then the answer after it."""
    prompts = [tasks.format_sample(template, family, s["question"], examples=examples)[0] for s in samples]
    stop = ["\nQ:"] if method == "fs_cot" else None  # the examples teach a base model to go on with a next question
    first = complete(prompts, degree, temperature, max_new_tokens, stop)
    data = {str(s["sample_index"]): [{"sample_index": s["sample_index"], "completion_index": k, "question": s["question"],
                                      "answer": s["answer"], "prompt": prompt, **one} for k, one in enumerate(many)]
            for s, prompt, many in zip(samples, prompts, first)}
    if method == "zs_cot":
        rows = [row for many in data.values() for row in many]
        for row in rows:
            row |= {"reasoning_" + k: row[k] for k in ("prompt", "completion", "finish_reason")}
            row["prompt"] += row["completion"] + tasks.COT_ANSWER
        for row, [answer] in zip(rows, complete([row["prompt"] for row in rows], 1, 0.0, max_new_tokens, None)):
            row |= answer
    return data


METADATA_TYPES = {"dataset_key": str, "epoch": int | None, "validation": list | None, "settings": dict | None} | {k: str | None for k in (
    "base_model", "completion_key", "finetune_key", "train_key", "prediction_template", "split", "part")}
TEXT_OR_NOT = [str, type(None)]
ROW_TYPES = {"sample_index": [int], "completion_index": [int], "question": [str], "answer": [str], "completion": TEXT_OR_NOT,
             "reasoning_completion": TEXT_OR_NOT}
KINDS_OF_ROW = set(itertools.product(*ROW_TYPES.values()))  # compared as one, which is quick; a bool is no int
PLACE = operator.itemgetter("sample_index", "completion_index")


def read_completions(path, task=None):
    """-> (metadata, rows in order of sample and completion) of a completion file.

    Raises UserError where it is not one, is another task's, or holds a completion twice."""
    content = files.read_json(path)
    metadata, data = content.get("metadata"), content.get("data")
    if not isinstance(metadata, dict) or not isinstance(data, dict) or "dataset_key" not in metadata:
        raise UserError(f'{path} is not a completion file, {{"metadata": {{"dataset_key": ...}}, "data": {{"<sample_index>": [rows]}}}}')
    for k, kind in METADATA_TYPES.items():
        if not isinstance(metadata.get(k), kind) or isinstance(metadata.get(k), bool):
            raise UserError(f"{path}: {k} in its metadata is {json.dumps(metadata.get(k))[:80]}, which it cannot be: mend it")
    if metadata.get("settings") is None:
        metadata.pop("settings", None)
    key = tasks.find_task(metadata["dataset_key"]).key
    if task and key != task:
        raise UserError(f"{path} holds completions of the task {key}, not {task}")
    rows = []
    for index, many in data.items():
        for row in many if isinstance(many, list) else [None]:
            if not isinstance(row, dict) or tuple(map(type, map(row.get, ROW_TYPES))) not in KINDS_OF_ROW \
                    or str(row["sample_index"]) != index or "completion" not in row:
                raise UserError(f"{path}: a completion of sample {index} lacks its sample_index, completion_index, question, answer or "
                                "completion, or one is not what it should be")
            rows.append(row)
    rows.sort(key=PLACE)
    for (i, k), following in itertools.pairwise(map(PLACE, rows)):
        if (i, k) == following:
            raise UserError(f"{path}: completion {k} of sample {i} is there twice")
    return metadata, rows


def check_rows(path, rows, task, samples, data_dir):
    """Raise UserError for a completion that is not of these samples: foreign, or with another question or gold answer."""
    gold = [(sample["question"].strip(), sample["answer"].strip()) for sample in samples]
    for row in rows:
        i = row["sample_index"]
        if not 0 <= i < len(gold) or (row["question"].strip(), row["answer"].strip()) != gold[i]:
            raise UserError(f"{path}: sample {i} is not sample {i} of {task} in {data_dir} (question or gold answer differ): "
                            "the file was made from other data")


def rows_of_part(path, metadata, rows, part, split, data_dir, allow_partial):
    """-> the rows of the asked part, checked against the dataset: no sample may be missing, foreign or differ from it."""
    task = metadata["dataset_key"]
    if part == "all" and task != "toy" and not (Path(data_dir) / "dataset" / f"{task}.json").exists():
        return rows  # nothing to check against: the rows carry their gold answers
    samples = tasks.load(task, data_dir)
    check_rows(path, rows, task, samples, data_dir)
    if part == "validation":
        wanted = set(metadata.get("validation") or [])
    else:
        wanted = set(range(len(samples)) if part == "all" else tasks.load_split(task, split, data_dir)[part == "test"])
    missing = sorted(wanted - {row["sample_index"] for row in rows})
    if missing and not allow_partial:
        raise UserError(f"{path} lacks {len(missing)} of the {len(wanted)} samples of part '{part}' (first: {missing[0]}): "
                        "complete it, choose another --part, or score what there is with --allow_partial")
    return [row for row in rows if row["sample_index"] in wanted]


def is_made(stage, args, path, settings):
    """Whether a completion file is there and was made with these settings."""
    return path.exists() and files.is_current(stage, path, read_completions(path, args.task)[0].get("settings"), settings)


def write_completions(path, metadata, data):
    """Completions cost GPU hours or money: those made with other settings are kept aside."""
    if path.exists():
        files.keep_aside(path)
    files.write_json(path, {"metadata": metadata, "data": data})
    files.remove_journals(path)


def read_prompts(path, max_new_tokens):
    """-> (rows, prompts, limits) of a JSON-lines file with a "prompt" and perhaps a "max_new_tokens" on each line."""
    rows = files.read_jsonl(path)
    for i, row in enumerate(rows, 1):
        limit = row.get("max_new_tokens", max_new_tokens) if isinstance(row, dict) else None
        if type(limit) is not int or limit < 1 or not isinstance(row.get("prompt"), str):
            raise UserError(f'{path}, row {i}: it needs {{"prompt": "text"}}, and max_new_tokens, if given, a number above 0')
    return rows, [row["prompt"] for row in rows], [row.get("max_new_tokens", max_new_tokens) for row in rows]
