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
    name = str(key)
    hint = did_you_mean(name, TASKS)
    known = ", ".join(TASKS)
    raise UserError(f"there is no task {name[:80]!r}{hint}: choose from {known}")


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
LABEL_STYLES = [name.removeprefix("ft_cot_") for name in TEMPLATES if "ft_cot_" in name]


def answer_prefix(template: str) -> str | None:
    """Return what a label has between rationale and answer: ' {r} --> {a}' -> '-->'."""
    families = TEMPLATES[template]
    _, label = next(iter(families.values()))
    behind = label.partition("{r}")[2]
    between = behind.partition("{a}")[0]
    return between.strip() or None


# prediction template -> what precedes the answer; None: the completion begins with it
ANSWER_PREFIXES = {None: None, **{name: answer_prefix(name) for name in TEMPLATES}}
ANSWER_PREFIXES |= {"fs_cot": STATED_ANSWER, "zs_cot_one_step": STATED_ANSWER}


def template_fingerprint(template: str, family: str) -> str:
    """Return 16 hex digits that change with the words of a template."""
    words = TEMPLATES[template].get(family)
    return storage.fingerprint([words, ANSWER_TRIGGER])


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
        known = []
        for name, families in TEMPLATES.items():
            if family in families:
                known.append(name)
        choices = ", ".join(known)
        what = f"template {template!r} for {family} students"
        raise UserError(f"there is no {what}: choose from {choices}")
    parts = {
        "q": question.strip(),
        "r": rationale.strip(),
        "a": answer.strip(),
        "examples": examples.strip(),
    }
    prompt, label = TEMPLATES[template][family]
    return prompt.format(**parts), label.format(**parts)


class Sample(TypedDict):
    sample_index: int  # 0, 1, ... in the order of the file
    question: str
    answer: str  # gold answer
    rationale: NotRequired[str]  # written by a person; aqua and strategy_qa


def encode_prompt(tokenizer: Any, family: str, prompt: str) -> list[int]:
    """Return the token ids of a prompt; for a decoder, which continues it, without a final EOS."""
    text = storage.replace_lone_surrogates(prompt)
    ids = tokenizer(text)["input_ids"]
    has_eos = ids[-1:] == [tokenizer.eos_token_id]
    if family == "decoder" and has_eos:
        return ids[:-1]
    return ids


def rationale_of(completion: Mapping[str, Any]) -> str:
    """Return the reasoning: step 1 of Zero-shot-CoT, or what precedes "The answer is"."""
    if "reasoning_completion" in completion:
        return completion["reasoning_completion"] or ""
    text = completion["completion"] or ""
    return text.rpartition(STATED_ANSWER)[0]


# ---------------- The verdict on one completion


def grade(
    task: str, template: str | None, completion: str | None, answer: str, rules: str = "paper"
) -> Verdict:
    """Grade a completion of a task, prompted with a template, against the gold answer.

    rules: "paper": as published, quirks included; "flexible": as a careful person reads.  Raises
    UserError for what is unknown, or a gold answer that cannot be read.
    """
    grader = make_grader(task, template, rules)
    return grader(completion, answer)


def make_grader(task: str, template: str | None, rules: str = "paper") -> answers.Grader:
    """Make `grade` for many completions of one file: function(completion, answer) -> Verdict."""
    row = find_task(task)
    if template not in ANSWER_PREFIXES:
        known = ", ".join(TEMPLATES)
        raise UserError(f"there is no prediction template {template!r}: choose from {known}")
    prefix = ANSWER_PREFIXES[template]
    return answers.make_grader(row.answer_type, prefix, rules, row.key)


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


def dataset_path(task: str, data_dir: AnyPath) -> Path:
    return Path(data_dir) / "dataset" / f"{task}.json"


def load(task: str, data_dir: AnyPath = "data") -> list[Sample]:
    """Return the samples of a prepared benchmark, or of the toy task.

    Raises UserError, with the command that makes the file, where it is missing or no such file.
    """
    row = find_task(task)
    if row.key == "toy":
        return toy_samples(row.n)
    path = dataset_path(task, data_dir)
    remedy = f"make it with `{prepare_command(task, data_dir)}`"
    if not path.exists():
        raise UserError(f"{path.resolve()} is missing: {remedy}")
    remedy = f"mend it, or {remedy}"
    content = storage.read_json(path)
    samples = content.get("data")
    wrong = storage.find_wrong_type(content, {"metadata": dict, "data": list})
    if wrong or not samples:
        form = '{"metadata": {...}, "data": [samples]}'
        raise UserError(f"{path} is not a dataset, {form}: {remedy}")
    key = content["metadata"].get("dataset_key", task)
    if key != task:
        shown = str(key)[:80]
        raise UserError(f"{path} holds the task {shown!r}, not {task!r}: {remedy}")
    for i, sample in enumerate(samples):
        wrong = storage.find_wrong_type(sample, SAMPLE_TYPES)
        if wrong or sample["sample_index"] != i:
            needs = f"sample_index {i}, a question and an answer"
            raise UserError(f"{path}: sample {i} needs {needs}: {remedy}")
    return samples


def default_split(task: str, n: int | None = None) -> Split:
    """Split a task (of n samples) by its rule, with the permutation of the published splits."""
    import numpy as np

    row = find_task(task)
    n = n or row.n
    everything = list(range(n))
    if row.split == "ordered":
        train = everything[: row.train]
        test = everything[row.train :]
        return train, test
    shuffle = np.random.RandomState(0).permutation
    if row.split == "aqua":  # 10,000 of the 97,467 training samples, then all 254 test samples
        first_test = n - row.test
        order = shuffle(first_test).tolist()
        train = order[: row.train]
        return sorted(train), everything[first_test:]
    order = shuffle(n).tolist()
    cut = round(0.7 * n)
    train = order[:cut]
    test = order[cut:]
    return sorted(train), sorted(test)


def read_split(path: Path, row: Task) -> Split:
    """Return the split in a file.  Raises UserError where it is not a split of the task."""
    content = storage.read_json(path)
    if not storage.find_wrong_type(content, {"train": list, "test": list}):
        train = content["train"]
        test = content["test"]
        if train and test and are_indices(train + test, row.n):
            return train, test
    form = '{"train": [indices], "test": [indices]}'
    which = f"each index once and from 0 to {row.n - 1}"
    raise UserError(f"{path} is not a split of {row.key}: it needs {form}, {which}")


def are_indices(values: list, n: int) -> bool:
    """Tell whether values are different integers from 0 to n - 1."""
    for value in values:
        if type(value) is not int or not 0 <= value < n:
            return False
    return len(set(values)) == len(values)


def load_split(task: str, split: str = "default", data_dir: AnyPath = "data") -> Split:
    """Return a split: default, template, or with 8, 32 or 128 samples (paper §4): few_shot_32."""
    row = find_task(task)
    few_shot = re.fullmatch(r"few_shot_([1-9]\d{0,5})", split)
    name = storage.safe_key(split)
    if few_shot:
        name = "default"
    path = Path(data_dir) / "split" / f"{row.key}__{name}.json"
    if task == "toy" and name == "default":
        train, test = default_split(task)
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
        count = int(few_shot[1])
        train = sorted(order[:count].tolist())
    return train, test


def split_off_validation(train: list[int], share: float, seed: int) -> Split:
    """Return (training indices without it, a random share of them for validation)."""
    total = len(train)
    count = round(share * total)
    if share and not 0 < count < total:
        what = f"--validation {share} is a share of the training samples, {count} of {total}"
        raise UserError(f"{what}: both parts need some")
    rng = random.Random(seed)
    validation = rng.sample(train, count)
    rest = set(train).difference(validation)
    return sorted(rest), sorted(validation)


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
    samples = load(task, data_dir)
    return Benchmark(task, samples, train, held_out, test)


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
        steps = []
        for name in rng.sample(NAMES, people):
            verb = rng.choice(["flips", "keeps"])
            steps.append(f"{name} {verb} the coin.")
        story = " ".join(steps)
        question = f"A coin is heads up. {story} Is the coin still heads up?"
        flips = story.count("flips")
        answer = ["yes", "no"][flips % 2]
        sample = Sample(sample_index=i, question=question, answer=answer)
        samples.append(sample)
    return samples
