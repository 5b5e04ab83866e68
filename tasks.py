"""What a task is: the 12 benchmarks of the paper and a toy; their answers, templates and splits.
Everything here is text: importing this module needs neither torch nor numpy.

    tasks.grade("multiarith", "ft_cot_token", "3 + 4 = 7 --> 7", "7").correct  # True
"""

import difflib
import functools
import operator
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

import storage
from storage import AnyPath, UserError

# ---------------- Answer cleansing by the paper's rules: identical to the published evaluator

PAPER_NUMBER_PATTERN = re.compile(r"-?\d+(?:\.\d+)?")
NUMBER_MARKS = str.maketrans("\u2212", "-", ",$")
PUNCTUATION_TO_SPACES = str.maketrans("\"'.:,", "     ")


def paper_numbers(text: str) -> list[str]:
    """'$1,234.50 or 5 - 8 = -3' -> ['1234.50', '5', '8', '-3']"""
    return PAPER_NUMBER_PATTERN.findall(text.replace(",", ""))


def paper_floats(text: str) -> list[float]:
    """'18.00, 5' -> [18.0, 5.0]"""
    return list(map(float, paper_numbers(text)))


def paper_yes_no(text: str) -> list[str]:
    """'No, it is "Yes".' -> ['no', 'yes'], but 'no;' -> []"""
    words = text.lower().translate(PUNCTUATION_TO_SPACES).split()
    return [word for word in words if word in ("yes", "no")]


# ---------------- Answer cleansing by the flexible rules: what a careful person reads
class Candidate(NamedTuple):  # something in a text that may be its answer
    start: int  # of its first character
    value: Any
    is_marked: bool = False  # a string in quotes or spelled out


Candidates = list[Candidate]
NUMBER_PATTERN = re.compile(r"""(?ax) (?=[-\u2212$.\d])  # passes over all other characters quickly
    (?: (?<![\w.)\]]) [-\u2212]? \$?  # -5, -$1,234.50, 1e3
        (?: \d{1,3} (?:,\d{3})+ (?!\d) | \d+ ) (?:\.\d+)? (?:e[+-]?\d{1,3}\b)?
      | (?<![\w.]) [-\u2212]? \$? \.\d+  # .5
      | \d+ (?:,\d{3})* (?:\.\d+)?  # the 4 of '3-4', of 'x4'
    )""")
YES_NO_PATTERN = re.compile(r"""(?ix) \b ( yes  # "Yes;"
           | no (?![ ](?!(?:because|since|as|the|it|he|she|they|you|we|i)\b)[a-z])
           )  # 'no;' and 'no because', not 'no evidence' or 'no longer'
        \b""")
STRING_PATTERN = re.compile(r"""(?x)  # [^\W\d_]: a letter of any alphabet
        [\"\u201c*`] ([^\"\u201d*`\n]{1,200}) [\"\u201d*`]  # "y a j o", **yajo**
      | ((?<![^\W\d_]) [^\W\d_] (?:[ ,.-]{1,3} [^\W\d_] (?![^\W\d_']))+)  # y-a-j-o
      | ([^\W\d_]+)  # yajo""")


def parse_number(text: str) -> float:
    """'$1,234.50' -> 1234.5; a minus sign may be U+2212."""
    return float(text.translate(NUMBER_MARKS))


def keep_letters(text: str) -> str:
    """'Y. a-j-o' -> 'yajo'"""
    return "".join(filter(str.isalpha, text)).lower()


def read_numbers(text: str) -> Candidates:
    """By value: '18.00' -> 18, '$1,234.50' -> 1234.5, '5 - 8 = -3' -> 5, 8, -3"""
    return [Candidate(m.start(), parse_number(m[0])) for m in NUMBER_PATTERN.finditer(text)]


def read_yes_no(text: str) -> Candidates:
    """Beside any punctuation: '"No;"' -> no"""
    return [Candidate(m.start(), m[1].lower()) for m in YES_NO_PATTERN.finditer(text)]


def read_strings(text: str) -> Candidates:
    """By letters alone, in lower case: 'so "Y.A.J.O."' -> so, yajo (marked)"""
    found = [(m, keep_letters(m[0])) for m in STRING_PATTERN.finditer(text)]
    return [Candidate(m.start(), letters, not m[3]) for m, letters in found if letters]


def select_number(sentence: str, candidates: Candidates, announced: bool) -> Candidate:
    """Select a calculation's result, else what an announced answer begins with, else the last."""
    results = [c for c in candidates if c.start > sentence.rfind("=")]
    if "=" in sentence and results:
        return results[0]  # '3 + 4 = 7 of 9' -> 7
    opening = sentence[: candidates[0].start]
    if announced and not any(map(str.isalnum, opening)):
        return candidates[0]  # 'The answer is 51 for 2 packs' -> 51
    return candidates[-1]  # '11 and 11 makes 22' -> 22


def select_string(sentence: str, candidates: Candidates, announced: bool) -> Candidate:
    """Select what is quoted or spelled out, else the last word of the first clause."""
    marked = [c for c in candidates if c.is_marked]
    clause_end = re.search(r"[,;(]|$", sentence).start()
    in_clause = [c for c in candidates if c.start < clause_end]
    return (marked or in_clause[-1:] or candidates)[0]


def select_first_or_last(sentence: str, candidates: Candidates, announced: bool) -> Candidate:
    """Select the first candidate after an announcement, else the last one."""
    return candidates[0 if announced else -1]


class Extractor(NamedTuple):  # how one set of rules reads one type of answer
    candidates: Callable  # text -> values (paper) or Candidates (flexible)
    gold: Callable = str  # gold answer -> value
    is_same: Callable = operator.eq  # (value of a candidate, of the gold answer) -> bool
    select: Callable = select_first_or_last  # flexible: which of a sentence's candidates


class AnswerType(NamedTuple):
    name: str
    paper: Extractor
    flexible: Extractor


def is_close(a: float, b: float) -> bool:
    """Tell whether two numbers are the same answer, as the published evaluator does."""
    return abs(a - b) < 1e-6


def multiple_choice(last: str) -> AnswerType:
    """A choice.  The paper reads capitals even inside words: 'Because (C)' -> ['B', 'C']."""
    small = last.lower()
    letter = re.compile(rf"""(?x) [(\[{{] ([A-{last}a-{small}]) [)\]}}]  # (b)
          | (?<!not[ ]) (?<![\w']) ([A-{last}]) (?![\w'-])  # 'C.', not 'Because' or 'not C'
            (?![ ](?!(?:because|is|since|as|and|or)\b)[a-z])  # 'A is right', not 'A dog'
        """)
    whole_text = re.compile(rf"\W*([a-{small}])\W*")  # c.

    def read_letters(text: str) -> Candidates:
        """Return the letters of a text, as capitals."""
        if m := whole_text.fullmatch(text):
            return [Candidate(m.start(1), m[1].upper())]
        return [Candidate(m.start(), (m[1] or m[2]).upper()) for m in letter.finditer(text)]

    paper = Extractor(re.compile(f"[A-{last}]").findall)
    return AnswerType(f"letter A-{last}", paper, Extractor(read_letters, str.strip))


# The paper compares the numbers of some tasks as strings (18.00 is not 18), and lower-cases the
# gold answers of one of its yes/no tasks alone (YES_NO_CASED).
PAPER_NUMBER = Extractor(paper_numbers, lambda gold: gold.replace(",", ""))
PAPER_FLOAT = Extractor(paper_floats, parse_number, is_close)
NUMBER_BY_VALUE = Extractor(read_numbers, parse_number, is_close, select_number)
YES_OR_NO = Extractor(read_yes_no, lambda gold: gold.strip().lower())
NUMBER = AnswerType("number", PAPER_NUMBER, NUMBER_BY_VALUE)
FLOAT = AnswerType("number, by value", PAPER_FLOAT, NUMBER_BY_VALUE)
YES_NO = AnswerType("yes/no", Extractor(paper_yes_no), YES_OR_NO)
YES_NO_CASED = AnswerType("yes/no", Extractor(paper_yes_no, str.lower), YES_OR_NO)
PAPER_STRING = Extractor(lambda text: [re.sub(r"[\"'\n.\s]", "", text)])  # ' "y a j o".' -> yajo
STRING = AnswerType(
    "string", PAPER_STRING, Extractor(read_strings, keep_letters, select=select_string)
)
A_TO_C, A_TO_E, A_TO_F = map(multiple_choice, "CEF")


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
    close = difflib.get_close_matches(str(key), TASKS, 1)
    hint = f" (did you mean {close[0]}?)" if close else ""
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
class Verdict(NamedTuple):
    prediction: Any  # None: no answer
    candidates: list  # everything that could have been read
    correct: bool
    contains_answer: bool  # any candidate is right
    correct_format: bool  # the template's prefix is there, or none is expected


ANNOUNCEMENT = re.compile(r"""(?ix) (?=[-\#\\a])  # passes over all other characters quickly
    (?: -->  # --> yes
      | \#\#\#\#  # #### 7
      | \\boxed\{  # \boxed{7}
      | \banswers?\b [^.\n]{0,60}? (?:\bis\b|\bare\b|:|=)  # answer (in dollars) is 7; Answer: C
    )""")
NEXT_QUESTION = re.compile(r"\n\s{0,9}(?:Q|Question):", re.IGNORECASE)
SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")
MAX_SCAN_CHARS = 100_000  # at the beginning and at the end of a completion


def paper_prediction(extractor: Extractor, prefix: str | None, text: str) -> tuple[Any, list]:
    """Read the first candidate after the prefix; without one, the text's last (paper, appendix)."""
    position = 0
    if prefix and prefix in text:
        text = text.partition(prefix)[2]
    elif prefix:
        position = -1
    candidates = extractor.candidates(text)
    if not candidates:
        return None, []
    return candidates[position], candidates


def first_reply(text: str) -> str:
    """Cut a text where a base model asks itself a next question; of a long one keep the ends."""
    if len(text) > 2 * MAX_SCAN_CHARS:  # a model that repeats itself must not hold up the others
        text = f"{text[:MAX_SCAN_CHARS]}\n{text[-MAX_SCAN_CHARS:]}"
    return NEXT_QUESTION.split(text, 1)[0]


def find_sentence(text: str, start: int, position: int) -> tuple[int, int]:
    """Return begin and end of the sentence that position is in; it begins at `start` or later."""
    ends_before = (m.end() for m in SENTENCE_END.finditer(text, start, position))
    begin = max(ends_before, default=start)
    end = SENTENCE_END.search(text, position)
    return begin, end.start() if end else len(text)


def flexible_prediction(extractor: Extractor, prefix: str | None, text: str) -> tuple[Any, list]:
    """Read the sentence after the last announcement of an answer, else the last candidate."""
    text = first_reply(text)
    candidates = extractor.candidates(text)
    values = [c.value for c in candidates]
    if len(values) < 2:
        return next(iter(values), None), values
    position = candidates[-1].start
    announcements = [m.end() for m in ANNOUNCEMENT.finditer(text) if m.end() <= position]
    if not prefix:  # the prompt itself was an announcement, so the text begins with its answer
        announcements.insert(0, 0)
    start = max(announcements, default=0)
    if announcements:
        position = next(c.start for c in candidates if c.start >= start)
    begin, end = find_sentence(text, start, position)
    inside = [c._replace(start=c.start - begin) for c in candidates if begin <= c.start < end]
    return extractor.select(text[begin:end], inside, bool(announcements)).value, values


PREDICTIONS = {"paper": paper_prediction, "flexible": flexible_prediction}  # by rules


def grade(
    task: str, template: str | None, completion: str | None, answer: str, rules: str = "paper"
) -> Verdict:
    """Grade a completion of a task, prompted with a template, against the gold answer.

    rules: "paper": as published, quirks included; "flexible": as a careful person reads.  Raises
    UserError for what is unknown, or a gold answer that cannot be read.
    """
    return make_grader(task, template, rules)(completion, answer)


def make_grader(
    task: str, template: str | None, rules: str = "paper"
) -> Callable[[str | None, str], Verdict]:
    """Make `grade` for many completions of one file: function(completion, answer) -> Verdict."""
    answer_type = find_task(task).answer_type
    if template not in ANSWER_PREFIXES:
        known = ", ".join(TEMPLATES)
        raise UserError(f"there is no prediction template {template!r}: choose from {known}")
    if rules not in PREDICTIONS:
        raise UserError(f"there are no {rules!r} rules: choose paper or flexible")
    prefix = ANSWER_PREFIXES[template]
    extractor = getattr(answer_type, rules)
    predict = PREDICTIONS[rules]
    read_gold = functools.cache(extractor.gold)

    def grade_one(completion: str | None, answer: str) -> Verdict:
        """Grade one completion; an API may send null for it."""
        text = completion or ""
        prediction, candidates = predict(extractor, prefix, text)
        try:
            gold = read_gold(answer)
        except ValueError:
            message = f"the gold answer {answer[:80]!r} of {task} is not a {answer_type.name}"
            raise UserError(message) from None
        correct = prediction is not None and extractor.is_same(prediction, gold)
        contains = correct or any(extractor.is_same(value, gold) for value in set(candidates))
        return Verdict(prediction, candidates, correct, contains, not prefix or prefix in text)

    return grade_one


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


def load(task: str, data_dir: AnyPath = "data") -> list[Sample]:
    """Return the samples of a prepared benchmark, or of the toy task.

    Raises UserError, with the command that makes the file, where it is missing or no such file.
    """
    row = find_task(task)
    if row.key == "toy":
        return toy_samples(row.n)
    path = Path(data_dir) / "dataset" / f"{row.key}.json"
    remedy = f"make it with `python data/prepare.py {row.key}`"
    if not path.exists():
        raise UserError(f"{path} is missing: {remedy}")
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
        raise UserError(
            f"{path} is missing: make it with `python data/prepare.py {row.key}` (splits: default; "
            "template for multiarith and date_understanding; few_shot_8, few_shot_32, few_shot_128)"
        )
    if few_shot:
        import numpy as np

        order = np.random.RandomState(0).permutation(train)
        train = sorted(order[: int(few_shot[1])].tolist())
    return train, test


def split_off_validation(train: list[int], share: float, seed: int) -> Split:
    """Return (training indices without it, a random share of them for validation)."""
    if not 0 <= share < 1:
        raise UserError(f"--validation {share} is a share of the training samples: 0 to below 1")
    validation = random.Random(seed).sample(train, round(share * len(train)))
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
