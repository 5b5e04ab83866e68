"""What a task is: the 12 benchmarks of the paper and a toy; their templates, splits and grading.
Everything here is text: importing this module needs neither torch nor numpy.

    tasks.grade("multiarith", "ft_cot_token", "3 + 4 = 7 --> 7", "7").correct  # True
"""

import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

import answers
import storage
from answers import (
    A_TO_C,
    A_TO_E,
    A_TO_F,
    FLOAT,
    NUMBER,
    STRING,
    YES_NO,
    YES_NO_CASED,
    AnswerType,
    Verdict,
)
from storage import AnyPath, UserError
from terminal import did_you_mean


# ---------------- The table.  A new benchmark is one row here (its data: data/README.md)
class Task(NamedTuple):
    key: str  # names files and flags
    name: str  # as in the paper's tables
    answer_type: AnswerType
    n: int  # samples
    train: int  # sizes of the default split
    test: int
    random: float  # accuracy of a random guess, % (paper, Table 1)
    split: str = "random"  # 70% by RandomState(0); ordered: the published parts; aqua: below


TASKS = {task.key: task for task in [
    #    key                          name             type    n      train  test  random split
    Task("single_eq",                 "SingleEq",      FLOAT,  508,   356,   152,  0.0),
    Task("addsub",                    "AddSub",        FLOAT,  395,   276,   119,  0.0),
    Task("multiarith",                "MultiArith",    NUMBER, 600,   420,   180,  0.0),
    Task("gsm8k",                     "GSM8K",         NUMBER, 8792,  7473,  1319, 0.0,  "ordered"),
    Task("aqua",                      "AQUA",          A_TO_E, 97721, 10000, 254,  20.0, "aqua"),
    Task("svamp",                     "SVAMP",         FLOAT,  1000,  700,   300,  0.0),
    Task("date_understanding", "Date Understanding",   A_TO_F, 369,   258,   111,  17.12),
    Task("tracking_shuffled_objects", "Shuffled Objects", A_TO_C, 750, 525,  225,  33.33),
    Task("last_letter_concatenation", "Last Letter",   STRING, 500,   350,   150,  0.0),
    Task("coin_flip",                 "Coin Flip",     YES_NO, 500,   350,   150,  50.0),
    Task("commonsense_qa",            "CommonSenseQA", A_TO_E, 10962, 9741,  1221, 20.0, "ordered"),
    Task("strategy_qa",               "StrategyQA", YES_NO_CASED, 2290, 1603, 687, 50.0),
    Task("toy",                       "Toy Coins",     YES_NO, 2000,  1400,  600,  50.0),
]}  # fmt: skip


def find_task(key: str) -> Task:
    """Return the row of a task.  Raises UserError with the nearest known key."""
    if key in TASKS:
        return TASKS[key]
    hint = did_you_mean(str(key), TASKS)
    raise UserError(f"there is no task {str(key)[:80]!r}{hint}: choose from {', '.join(TASKS)}")


# ---------------- Prompt and label templates (paper §3 and the published code)
# A family is what a model reads: decoder, encoder_decoder, openai (GPT-3's fine-tuning files), chat
# (a user's turn and the assistant's).  Labels of open models get their EOS when they are tokenized.
FAMILIES = ("decoder", "encoder_decoder", "openai", "chat")
API_FAMILIES = {"gpt3": "openai", "chat": "chat"}  # label styles of students behind an API
PROMPTED = ("zs", "zs_cot", "fs_cot")  # methods that only prompt a model
FINE_TUNED = ("ft", "ft_cot")  # ... that fine-tune it: on answers; on rationales and answers
ZERO_SHOT_PROMPT = "Q: {q}\n\nA:"
ZERO_SHOT_COT_PROMPT = "Q: {q}\nA: Let's think step by step."
ANSWER_TRIGGER = "\nTherefore, the answer is"  # what step 2 of Zero-shot-CoT appends
ONE_STEP_PROMPT = (
    "{q}\nThink step by step, then end with one sentence of this form: The answer is <answer>."
)
STATED_ANSWER = "The answer is"
GPT3_PROMPT = "{q}\n\n###\n\n"
TEMPLATES = {  # prediction template: {family: (prompt, label)}
    "zs": {"decoder": (ZERO_SHOT_PROMPT, ""), "encoder_decoder": ("question: {q}", ""),
           "openai": (ZERO_SHOT_PROMPT, ""), "chat": ("{q}", "")},
    "zs_cot": {**dict.fromkeys(FAMILIES, (ZERO_SHOT_COT_PROMPT, "")),
               "chat": ("{q}\nLet's think step by step.", "")},
    "zs_cot_one_step": dict.fromkeys(FAMILIES, (ONE_STEP_PROMPT, "")),
    "fs_cot": dict.fromkeys(FAMILIES, ("{examples}\nQ: {q}\nA:", "")),
    "ft_token": {"decoder": ("{q} ###", " {a}"), "encoder_decoder": ("{q}", "{a}"),
                 "openai": (GPT3_PROMPT, " {a} END"), "chat": ("{q}", "{a}")},
    "ft_natural": {"decoder": (ZERO_SHOT_PROMPT, " {a}"), "encoder_decoder": ("Q: {q}", "{a}")},
    "ft_cot_token": {"decoder": ("{q} ###", " {r} --> {a}"),
                     "encoder_decoder": ("{q}", "{r} --> {a}"),
                     "openai": (GPT3_PROMPT, " {r}\n\n-->\n\n{a} END"),
                     "chat": ("{q}", "{r} --> {a}")},
    "ft_cot_natural": {"decoder": ("Q: {q}\n\nA: Let's think step by step.\n\n",
                                   " {r}\n\nTherefore, the answer is {a}")},
}  # fmt: skip
LABEL_STYLES = [name[len("ft_cot_") :] for name in TEMPLATES if name.startswith("ft_cot_")]


def answer_prefix(template: str) -> str | None:
    """Return what a label has between rationale and answer: ' {r} --> {a}' -> '-->'."""
    _, label = next(iter(TEMPLATES[template].values()))
    between = label.partition("{r}")[2].partition("{a}")[0]
    return between.strip() or None


# prediction template -> what precedes the answer; None: the completion begins with it
ANSWER_PREFIXES = {None: None, **{name: answer_prefix(name) for name in TEMPLATES}}
ANSWER_PREFIXES |= {"fs_cot": STATED_ANSWER, "zs_cot_one_step": STATED_ANSWER}


def template_fingerprint(template: str, family: str) -> str:
    """Return 16 hex digits that change with the words of a template."""
    return storage.fingerprint([TEMPLATES[template].get(family), ANSWER_TRIGGER])


def format_sample(
    template: str,
    family: str,
    question: str,
    rationale: str = "",
    answer: str = "",
    examples: str = "",
) -> tuple[str, str]:
    """Return (prompt, label) of one sample, all parts stripped.  Raises UserError.

    ("ft_cot_token", "decoder", "2 + 3?", "It is 5.", "5") -> ("2 + 3? ###", " It is 5. --> 5")
    """
    if family not in TEMPLATES.get(template, {}):
        known = ", ".join(name for name in TEMPLATES if family in TEMPLATES[name])
        what = f"template {template!r} for {family} students"
        raise UserError(f"there is no {what}: choose from {known}")
    parts = {"q": question, "r": rationale, "a": answer, "examples": examples}
    stripped = {name: part.strip() for name, part in parts.items()}
    prompt, label = TEMPLATES[template][family]
    return prompt.format(**stripped), label.format(**stripped)


class Sample(TypedDict):
    sample_index: int  # 0, 1, ... in the order of the file
    question: str
    answer: str  # gold answer
    rationale: NotRequired[str]  # written by a person; aqua and strategy_qa


def encode_prompt(tokenizer: Any, family: str, prompt: str) -> list[int]:
    """Return the token ids of a prompt; for a decoder, which continues it, without a final EOS."""
    ids = tokenizer(storage.replace_lone_surrogates(prompt))["input_ids"]
    has_eos = bool(ids) and ids[-1] == tokenizer.eos_token_id
    return ids[:-1] if family == "decoder" and has_eos else ids


def rationale_of(completion: Mapping[str, Any]) -> str:
    """Return the reasoning: step 1 of Zero-shot-CoT, or what precedes "The answer is"."""
    if "reasoning_completion" in completion:
        return completion["reasoning_completion"] or ""
    return (completion["completion"] or "").rpartition(STATED_ANSWER)[0]


# ---------------- The verdict on one completion


def grade(
    task: str, template: str | None, completion: str | None, answer: str, rules: str = "paper"
) -> Verdict:
    """Grade a completion of a task, prompted with a template, against the gold answer.

    rules: "paper": as published, quirks included; "flexible": as a careful person reads.  Raises
    UserError for what is unknown, or a gold answer that cannot be read.
    """
    return make_grader(task, template, rules)(completion, answer)


def make_grader(task: str, template: str | None, rules: str = "paper") -> answers.Grader:
    """Make `grade` for many completions of one file: function(completion, answer) -> Verdict."""
    row = find_task(task)
    if template not in ANSWER_PREFIXES:
        known = ", ".join(TEMPLATES)
        raise UserError(f"there is no prediction template {template!r}: choose from {known}")
    return answers.make_grader(row.answer_type, ANSWER_PREFIXES[template], rules, row.key)


judge = grade  # its name in other projects and earlier versions


# ---------------- Loading and splits

Split = tuple[list[int], list[int]]  # training and test samples: sorted sample indices
SAMPLE_TYPES = {"sample_index": int, "question": str, "answer": str}


class Benchmark(NamedTuple):  # and one split of it: lists of sample indices
    task: str
    samples: list[Sample]
    train: list[int]
    validation: list[int]  # a share of what the split has for training
    test: list[int]


def prepare_command(task: str, data_dir: AnyPath) -> str:
    """Return the command that makes the files of a benchmark in a folder."""
    if Path(data_dir).resolve() == storage.ROOT / "data":
        return f"python data/prepare.py {task}"
    return f"python data/prepare.py {task} --data {data_dir}"


def load(task: str, data_dir: AnyPath = "data") -> list[Sample]:
    """Return the samples of a prepared benchmark, or of the toy task.

    Raises UserError, with the command that makes the file, where it is missing or no such file.
    """
    row = find_task(task)
    if row.key == "toy":
        return toy_samples(row.n)
    path = Path(data_dir) / "dataset" / f"{row.key}.json"
    remedy = f"make it with `{prepare_command(row.key, data_dir)}`"
    if not path.exists():
        raise UserError(f"{path.resolve()} is missing: {remedy}")
    remedy = f"mend it, or {remedy}"
    content = storage.read_json(path)
    if storage.find_wrong_type(content, {"metadata": dict, "data": list}) or not content["data"]:
        form = '{"metadata": {...}, "data": [samples]}'
        raise UserError(f"{path} is not a dataset, {form}: {remedy}")
    key = content["metadata"].get("dataset_key", row.key)
    if key != row.key:
        raise UserError(f"{path} holds the task {str(key)[:80]!r}, not {row.key!r}: {remedy}")
    samples = content["data"]
    for i, sample in enumerate(samples):
        if storage.find_wrong_type(sample, SAMPLE_TYPES) or sample["sample_index"] != i:
            needs = f"sample_index {i}, a question and an answer"
            raise UserError(f"{path}: sample {i} needs {needs}: {remedy}")
    return samples


def default_split(task: str, n: int | None = None) -> Split:
    """Split a task (of n samples) by its rule, with the permutation of the published splits."""
    import numpy as np

    row = find_task(task)
    n = n or row.n
    if row.split == "ordered":
        return list(range(row.train)), list(range(row.train, n))
    shuffle = np.random.RandomState(0).permutation
    if row.split == "aqua":  # 10,000 of the 97,467 training samples, then all 254 test samples
        first_test = n - row.test
        train = shuffle(first_test)[: row.train].tolist()
        return sorted(train), list(range(first_test, n))
    order = shuffle(n).tolist()
    cut = round(0.7 * n)
    return sorted(order[:cut]), sorted(order[cut:])


def read_split(path: Path, row: Task) -> Split:
    """Return the split in a file.  Raises UserError where it is not a split of the task."""
    content = storage.read_json(path)
    if not storage.find_wrong_type(content, {"train": list, "test": list}):
        indices = content["train"] + content["test"]
        known = all(type(i) is int and 0 <= i < row.n for i in indices)
        if known and content["train"] and content["test"] and len({*indices}) == len(indices):
            return content["train"], content["test"]
    form = '{"train": [indices], "test": [indices]}'
    which = f"each index once and from 0 to {row.n - 1}"
    raise UserError(f"{path} is not a split of {row.key}: it needs {form}, {which}")


def load_split(task: str, split: str = "default", data_dir: AnyPath = "data") -> Split:
    """Return a split: default, template, or with 8, 32 or 128 samples (paper §4): few_shot_32."""
    row = find_task(task)
    few_shot = re.fullmatch(r"few_shot_([1-9]\d{0,5})", split)
    name = "default" if few_shot else storage.safe_key(split)
    path = Path(data_dir) / "split" / f"{row.key}__{name}.json"
    if row.key == "toy" and name == "default":
        train, test = default_split("toy")
    elif path.exists():
        train, test = read_split(path, row)
    else:
        known = ["default", "template", "few_shot_8", "few_shot_32", "few_shot_128"]
        raise UserError(
            f"{path.resolve()} is missing{did_you_mean(split, known)}: make it with "
            f"`{prepare_command(row.key, data_dir)}` (splits: default; template for multiarith and "
            "date_understanding; few_shot_8, few_shot_32, few_shot_128)"
        )
    if few_shot:
        import numpy as np

        order = np.random.RandomState(0).permutation(train)
        train = sorted(order[: int(few_shot[1])].tolist())
    return train, test


def split_off_validation(train: list[int], share: float, seed: int) -> Split:
    """Return (training indices without it, a random share of them for validation)."""
    count = round(share * len(train))
    if share and not 0 < count < len(train):
        what = f"--validation {share} is a share of the training samples, {count} of {len(train)}"
        raise UserError(f"{what}: both parts need some")
    validation = random.Random(seed).sample(train, count)
    return sorted({*train} - {*validation}), sorted(validation)


def load_benchmark(
    task: str,
    split: str = "default",
    data_dir: AnyPath = "data",
    validation: float = 0.0,
    seed: int = 0,
) -> Benchmark:
    """Load a benchmark and a split; validation: share of the training part, drawn with seed."""
    train, test = load_split(task, split, data_dir)
    train, held_out = split_off_validation(train, validation, seed)
    return Benchmark(task, load(task, data_dir), train, held_out, test)


# ---------------- The toy task: made in memory (its teacher and student: data/toy.py)

NAMES = "Ann Ben Cleo Dan Eve Finn Gina Hugo Iris Jack Kate Leo Mia Nils Olga Paul".split()
TOY_EXAMPLES = (  # of Few-shot-CoT
    "Q: A coin is heads up. Ann flips the coin. Ben keeps the coin. Is the coin still heads up?\n"
    "A: Ann flips it: heads to tails. Ben keeps it: tails to tails. The answer is no.\n\n"
    "Q: A coin is heads up. Leo keeps the coin. Mia keeps the coin. Is the coin still heads up?\n"
    "A: Leo keeps it: heads to heads. Mia keeps it: heads to heads. The answer is yes.\n"
)


def toy_samples(n: int, people: int = 5) -> list[Sample]:
    """Make n samples of equal length, in tokens too, so that the length tells nothing."""
    rng = random.Random(0)
    samples = []
    for i in range(n):
        steps = [(name, rng.choice(("flips", "keeps"))) for name in rng.sample(NAMES, people)]
        story = " ".join(f"{name} {verb} the coin." for name, verb in steps)
        question = f"A coin is heads up. {story} Is the coin still heads up?"
        answer = ("yes", "no")[story.count("flips") % 2]
        samples.append(Sample(sample_index=i, question=question, answer=answer))
    return samples
