"""What a task is: the 12 benchmarks of the paper and an embedded toy task.

One row of TASKS per benchmark (sizes, answer kind, split rule), loading, splits, the prompt and label templates, and
answer cleansing: `judge` says whether a completion is right, by the paper's rules or by ours.  Everything here is text:
importing this module needs neither torch nor numpy.

    import tasks
    tasks.grade("multiarith", "ft_cot_token", "3 + 4 = 7 --> 7", "7").correct     # True
"""

import difflib
import functools
import operator
import random
import re
from pathlib import Path
from typing import Callable, NamedTuple

from storage import UserError, fingerprint, read_json, safe_key, replace_lone_surrogates


# ---------------- Cleansing 1: the paper's rules, identical to the published evaluator

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
TO_SPACES = str.maketrans("\"'.:,", "     ")


def paper_numbers(text):
    """'$1,234.50 or 5 - 8 = -3' -> ['1234.50', '5', '8', '-3']"""
    return NUMBER.findall(text.replace(",", ""))


def paper_floats(text):
    numbers = paper_numbers(text)
    return list(
        map({n: float(n) for n in {*numbers}}.get, numbers)
    )  # each text once: a model may repeat itself a million times


def paper_yes_no(text):
    """'No, it is "Yes".' -> ['no', 'yes']; 'no;' is not seen"""
    return [word for word in text.lower().translate(TO_SPACES).split() if word in ("yes", "no")]


# ---------------- Cleansing 2: the flexible rules, what a careful person reads; [(position, value)]

# Where an answer is announced.  'So the answer (arabic numerals) is 12', 'Answer: C', '--> yes', '#### 7', '\boxed{7}'
# (The lookahead says what a match begins with: it passes quickly over all other places of a text.)
MARKER = re.compile(
    r"(?=[-#\\a])(?:-->|####|\\boxed\{|\banswers?\b[^.\n]{0,60}?(?:\bis\b|\bare\b|:|=))", re.I
)
NEXT_QUESTION = re.compile(
    r"\n\s{0,9}(?:Q|Question):", re.I
)  # a base model may go on and ask itself the next question
SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")
AN_END = 100_000  # characters: of a longer completion, beginning and end are read
VALUE = re.compile(
    r"(?=[-\u2212$.\d])"
    r"(?:(?<![\w.)\]])[-\u2212]?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:e[+-]?\d{1,3}\b)?"  # -$1,234.5; 1e3
    r"|(?<![\w.])[-\u2212]?\$?\.\d+"  # .5
    r"|\d+(?:,\d{3})*(?:\.\d+)?)",
    re.ASCII,
)  # the 4 of '3-4' or of '4x'


def read_numbers(text):
    """By value: '18.00', '$1,234.50', '5 - 8 = -3' -> 18, 1234.5, (5, 8, -3)"""
    return [
        (m.start(), float(m[0].replace(",", "").replace("$", "").replace("\u2212", "-")))
        for m in VALUE.finditer(text)
    ]


def read_letters(last):
    """Letters in brackets, or capitals standing alone: '(b)', 'C.', but neither the B of 'Because' nor the A of 'A dog'"""
    small = last.lower()
    article = r"(?! (?!because\b|is\b|since\b|as\b|and\b|or\b)[a-z])"
    letter = re.compile(
        rf"[(\[{{]([A-{last}a-{small}])[)\]}}]|(?<!not )(?<![\w'])([A-{last}])(?![\w'-]){article}"
    )
    alone = re.compile(rf"\W*([a-{small}])\W*")

    def read(text):
        if m := alone.fullmatch(text):  # 'c.' as the whole text
            return [(m.start(1), m[1].upper())]
        return [(m.start(), (m[1] or m[2]).upper()) for m in letter.finditer(text)]

    return read


# 'no evidence', 'no longer' say nothing; 'no because', 'no, it', 'no;' do
YES_NO = re.compile(
    r"\b(yes|no(?! (?!because\b|since\b|as\b|the\b|it\b|he\b|she\b|they\b|you\b|we\b|i\b)[a-z]))\b",
    re.I,
)


def read_yes_no(text):
    """Next to any punctuation: '"No;"' -> no"""
    return [(m.start(), m[1].lower()) for m in YES_NO.finditer(text)]


# "y a j o" in quotes, y-a-j-o spelled out, or a word; [^\W\d_] is a letter of any alphabet
LETTER_RUN = re.compile(
    r"[\"\u201c*`]([^\"\u201d*`\n]{1,200})[\"\u201d*`]"
    r"|((?<![^\W\d_])[^\W\d_](?:[ ,.-]{1,3}[^\W\d_](?![^\W\d_']))+)|([^\W\d_]+)"
)


def read_strings(text):
    """By letters only, lower case; position, value and whether it was quoted or spelled out"""
    found = [
        (m.start(), "".join(filter(str.isalpha, m[0])).lower(), not m[3])
        for m in LETTER_RUN.finditer(text)
    ]
    return [f for f in found if f[1]]


def pick_number(sentence, found, announced):
    """The result of a calculation, else the number an announced answer opens with, else the last one."""
    results = [f for f in found if f[0] > sentence.rfind("=")] if "=" in sentence else []
    opens = announced and not any(map(str.isalnum, sentence[: found[0][0]]))
    return (results or (found if opens else found[-1:]))[0][1]


def pick_string(sentence, found, announced):
    """A quoted or spelled-out string, else the last word of the first clause: 'the string yajo, as above' -> yajo"""
    marked = [f for f in found if f[2]]
    clause = re.search(r"[,;(]|$", sentence).start()
    return (marked or [f for f in found if f[0] < clause][-1:] or found)[0][1]


class Rules(NamedTuple):
    """How one kind of answer is read by one of the two sets of rules."""

    candidates: Callable  # text -> values (paper), or [(position, value)] (flexible)
    gold: Callable = str  # gold answer -> value
    same: Callable = operator.eq  # of candidate and gold
    pick: Callable = lambda sentence, found, announced: found[0 if announced else -1][
        1
    ]  # which candidate it means (flexible)


class Kind(NamedTuple):
    name: str
    paper: Rules
    flexible: Rules


def number(text):
    return float(text.replace(",", "").replace("$", ""))


def near(a, b):
    return abs(a - b) < 1e-6


def letter_kind(last):
    """The paper takes every such capital letter, even inside a word: 'Because (C)' -> ['B', 'C'] for last='E'."""
    return Kind(
        f"letter A-{last}",
        Rules(re.compile(f"[A-{last}]").findall),
        Rules(read_letters(last), str.strip),
    )


# The paper compares some numbers as strings (18.00 is not 18), lower-cases the gold answers of one yes/no task only, and of a
# string task takes the whole text as the one candidate (' "y a j o".' -> 'yajo').
VALUES = Rules(read_numbers, number, near, pick_number)
YES_OR_NO = Rules(read_yes_no, lambda gold: gold.strip().lower())
KIND_NUMBER = Kind("number", Rules(paper_numbers, lambda gold: gold.replace(",", "")), VALUES)
KIND_FLOAT = Kind("number, by value", Rules(paper_floats, number, near), VALUES)
KIND_YES_NO = Kind("yes/no", Rules(paper_yes_no), YES_OR_NO)
KIND_YES_NO_CASE = Kind("yes/no", Rules(paper_yes_no, str.lower), YES_OR_NO)
KIND_STRING = Kind(
    "string",
    Rules(lambda text: [re.sub(r"[\"'\n.\s]", "", text)]),
    Rules(read_strings, lambda gold: "".join(filter(str.isalpha, gold)).lower(), pick=pick_string),
)


# ---------------- The table.  A new benchmark is one row here (its data: data/README.md)


class Task(NamedTuple):
    key: str  # names files and flags
    name: str  # as in the paper's tables
    kind: Kind  # of answer
    n: int  # samples
    train: int  # sizes of the default split
    test: int
    random: float  # accuracy of a random guess, % (paper, Table 1)
    split: str = "random"  # random: 70% by RandomState(0); ordered: published train part, then its test part; aqua: below


TASKS = {
    task.key: task
    for task in [
        #    key                          name                        kind               n      train  test  random  split
        Task("single_eq", "SingleEq", KIND_FLOAT, 508, 356, 152, 0.0),
        Task("addsub", "AddSub", KIND_FLOAT, 395, 276, 119, 0.0),
        Task("multiarith", "MultiArith", KIND_NUMBER, 600, 420, 180, 0.0),
        Task("gsm8k", "GSM8K", KIND_NUMBER, 8792, 7473, 1319, 0.0, "ordered"),
        Task("aqua", "AQUA", letter_kind("E"), 97721, 10000, 254, 20.0, "aqua"),
        Task("svamp", "SVAMP", KIND_FLOAT, 1000, 700, 300, 0.0),
        Task("date_understanding", "Date Understanding", letter_kind("F"), 369, 258, 111, 17.12),
        Task(
            "tracking_shuffled_objects", "Shuffled Objects", letter_kind("C"), 750, 525, 225, 33.33
        ),
        Task("last_letter_concatenation", "Last Letter", KIND_STRING, 500, 350, 150, 0.0),
        Task("coin_flip", "Coin Flip", KIND_YES_NO, 500, 350, 150, 50.0),
        Task(
            "commonsense_qa", "CommonSenseQA", letter_kind("E"), 10962, 9741, 1221, 20.0, "ordered"
        ),
        Task("strategy_qa", "StrategyQA", KIND_YES_NO_CASE, 2290, 1603, 687, 50.0),
        Task("toy", "Toy Coins", KIND_YES_NO, 2000, 1400, 600, 50.0),
    ]
}


def find_task(key):
    """-> the row of a task.  Raises UserError with the nearest known keys."""
    if key in TASKS:
        return TASKS[key]
    close = "".join(
        f" (did you mean {match}?)" for match in difflib.get_close_matches(str(key), TASKS, 1)
    )
    raise UserError(f"there is no task {str(key)[:80]!r}{close}: choose from {', '.join(TASKS)}")


# ---------------- The verdict on one completion


class Verdict(NamedTuple):
    prediction: object  # what was read; None: no answer
    candidates: list  # everything that could have been read
    correct: bool
    contains_answer: bool  # any candidate is right
    correct_format: bool  # the template's prefix is there, or none is expected


# prediction_template -> what stands before the answer (None: the answer comes at once); the others follow from TEMPLATES, below
PREFIXES = {None: None, "fs_cot": "The answer is", "zs_cot_one_step": "The answer is"}


def paper_prediction(rules, prefix, text):
    """First candidate after the prefix; if it is missing, the last one of the text (paper §4 and appendix)."""
    before, found, after = text.partition(prefix) if prefix else ("", "", text)
    candidates = rules.candidates(after if found or not prefix else text)
    if not candidates:
        return None, []
    return candidates[0 if found or not prefix else -1], candidates


def flexible_prediction(rules, prefix, text):
    """What the sentence after the last announcement of an answer says; if none is announced, the text's last candidate.
    Where no prefix is expected the prompt itself was the announcement, so the text opens with its answer."""
    if (
        len(text) > 2 * AN_END
    ):  # no answer stands in the middle of that: a model that repeats itself must not hold up the rest
        text = f"{text[:AN_END]}\n{text[-AN_END:]}"
    text = text[: following.start()] if (following := NEXT_QUESTION.search(text)) else text
    found = rules.candidates(text)  # [(position, value, ...)]
    if len(found) < 2:  # nothing to choose from
        return (found[0][1], [found[0][1]]) if found else (None, [])
    announcements = [m.end() for m in MARKER.finditer(text) if m.end() <= found[-1][0]] or (
        [] if prefix else [0]
    )
    first = (
        next(f[0] for f in found if f[0] >= announcements[-1]) if announcements else found[-1][0]
    )
    start = announcements[-1] if announcements else 0
    begin = max((m.end() for m in SENTENCE_END.finditer(text, start, first)), default=start)
    end = m.start() if (m := SENTENCE_END.search(text, first)) else len(text)
    in_sentence = [(f[0] - begin, *f[1:]) for f in found if begin <= f[0] < end]
    return rules.pick(text[begin:end], in_sentence, bool(announcements)), [f[1] for f in found]


def grade(task, template, completion, answer, rules="paper"):
    """-> Verdict on a completion of `task` that was prompted with `template`, against the gold answer.

    rules="paper" is identical to the published evaluator, quirks included; rules="flexible" reads as a careful person
    would.  Raises UserError for an unknown task, template or rule set, or a gold answer that cannot be read."""
    return make_grader(task, template, rules)(completion, answer)


def make_grader(task, template, rules="paper"):
    """-> function(completion, answer) -> Verdict: `judge` for many completions of one file, gold answers read once."""
    kind = find_task(task).kind
    if template not in PREFIXES:
        raise UserError(
            f"there is no prediction template {template!r}: choose from {', '.join(map(str, PREFIXES))}"
        )
    if rules not in ("paper", "flexible"):
        raise UserError(f"there are no {rules!r} rules: choose paper or flexible")
    prefix = PREFIXES[template]
    reading = getattr(kind, rules)
    predict = paper_prediction if rules == "paper" else flexible_prediction
    read_gold = functools.cache(reading.gold)

    def verdict(completion, answer):
        """As `judge` says."""
        text = completion or ""  # an API may send null
        prediction, candidates = predict(reading, prefix, text)
        try:
            gold = read_gold(answer)
        except ValueError:
            raise UserError(
                f"the gold answer {answer[:80]!r} of {task} is not a {kind.name}"
            ) from None
        correct = prediction is not None and reading.same(prediction, gold)
        contains = (
            correct
            or len(candidates) > 1
            and any(reading.same(candidate, gold) for candidate in {*candidates})
        )
        return Verdict(prediction, candidates, correct, contains, not prefix or prefix in text)

    return verdict


judge = grade  # the name that others call it by


# ---------------- Prompt and label templates (paper §3 and the published code)
# A family is what a model reads: decoder, encoder_decoder, openai (the published GPT-3 fine-tuning files), or chat (a user's
# turn and the assistant's).  Labels of open models end with EOS, added when they are tokenized.

FAMILIES = ("decoder", "encoder_decoder", "openai", "chat")
ZERO = "Q: {q}\n\nA:"
COT = "Q: {q}\nA: Let's think step by step."
COT_ANSWER = "\nTherefore, the answer is"  # step 2 of Zero-shot-CoT: step 1 + its completion + this
ONE_STEP = (
    "{q}\nThink step by step, then end with one sentence of this form: The answer is <answer>."
)
GPT3 = "{q}\n\n###\n\n"
TEMPLATES = {  # prediction_template: {family: (prompt, label)}
    "zs": {
        "decoder": (ZERO, ""),
        "encoder_decoder": ("question: {q}", ""),
        "openai": (ZERO, ""),
        "chat": ("{q}", ""),
    },
    "zs_cot": {family: (COT, "") for family in FAMILIES}
    | {"chat": ("{q}\nLet's think step by step.", "")},
    "zs_cot_one_step": {family: (ONE_STEP, "") for family in FAMILIES},
    "fs_cot": {family: ("{examples}\nQ: {q}\nA:", "") for family in FAMILIES},
    "ft_token": {
        "decoder": ("{q} ###", " {a}"),
        "encoder_decoder": ("{q}", "{a}"),
        "openai": (GPT3, " {a} END"),
        "chat": ("{q}", "{a}"),
    },
    "ft_natural": {"decoder": (ZERO, " {a}"), "encoder_decoder": ("Q: {q}", "{a}")},
    "ft_cot_token": {
        "decoder": ("{q} ###", " {r} --> {a}"),
        "encoder_decoder": ("{q}", "{r} --> {a}"),
        "openai": (GPT3, " {r}\n\n-->\n\n{a} END"),
        "chat": ("{q}", "{r} --> {a}"),
    },
    "ft_cot_natural": {
        "decoder": (
            "Q: {q}\n\nA: Let's think step by step.\n\n",
            " {r}\n\nTherefore, the answer is {a}",
        )
    },
}
API_FAMILIES = {"gpt3": "openai", "chat": "chat"}  # label styles of students behind an API
PROMPTED = ("zs", "zs_cot", "fs_cot")  # methods that only prompt a model
FINE_TUNED = (
    "ft",
    "ft_cot",
)  # methods that fine-tune a student: on answers, on rationales and answers
LABEL_STYLES = [
    name.removeprefix("ft_cot_") for name in TEMPLATES if name.startswith("ft_cot_")
]  # --label_style
for (
    template,
    families,
) in TEMPLATES.items():  # what a label has between rationale and answer announces the answer: '-->'
    PREFIXES.setdefault(
        template,
        next(iter(families.values()))[1].partition("{r}")[2].partition("{a}")[0].strip() or None,
    )


def template_fingerprint(template, family):
    """-> 16 hex digits that change with the words of a template: what was made before it was edited is not made with it."""
    return fingerprint([TEMPLATES[template].get(family), COT_ANSWER])


def format_sample(template, family, question, rationale="", answer="", examples=""):
    """-> (prompt, label) of one sample, all parts stripped.  Raises UserError where the family has no such template."""
    if family not in TEMPLATES.get(template, {}):
        known = ", ".join(name for name in TEMPLATES if family in TEMPLATES[name])
        raise UserError(
            f"there is no template {template!r} for {family} students: choose from {known}"
        )
    prompt, label = TEMPLATES[template][family]
    parts = {
        "q": question.strip(),
        "r": rationale.strip(),
        "a": answer.strip(),
        "examples": examples.strip(),
    }
    return prompt.format(**parts), label.format(**parts)


def encode_prompt(tokenizer, family, prompt):
    """-> token ids of a prompt, with what the tokenizer puts first; a decoder's prompt is to be continued, so no EOS."""
    ids = tokenizer(replace_lone_surrogates(prompt))["input_ids"]
    return ids[:-1] if family == "decoder" and ids and ids[-1] == tokenizer.eos_token_id else ids


# ---------------- Loading and splits


def load(task, data_dir="data"):
    """-> list of {"sample_index", "question", "answer", "rationale"?} of a prepared benchmark, or of the toy task.

    Raises UserError when the file is missing (with the command that makes it) or is not such a file."""
    row = find_task(task)
    if row.key == "toy":
        return toy_samples(row.n)
    path = Path(data_dir) / "dataset" / f"{row.key}.json"
    remedy = f"make it with `python data/prepare.py {row.key}`"
    if not path.exists():
        raise UserError(f"{path} is missing: {remedy}")
    content = read_json(path)
    metadata = content.get("metadata")
    samples = content.get("data")
    if not isinstance(samples, list) or not samples or not isinstance(metadata, dict):
        raise UserError(
            f'{path} is not a dataset, {{"metadata": {{...}}, "data": [samples]}}: {remedy}'
        )
    if metadata.get("dataset_key", row.key) != row.key:
        raise UserError(
            f"{path} holds the task {str(metadata['dataset_key'])[:80]!r}, not {row.key!r}: {remedy}"
        )
    for i, sample in enumerate(samples):
        texts = (
            [sample.get(k) for k in ("question", "answer")] if isinstance(sample, dict) else [None]
        )
        if not all(isinstance(text, str) for text in texts) or sample.get("sample_index") != i:
            raise UserError(
                f"{path}: sample {i} needs sample_index {i}, a question and an answer: {remedy}"
            )
    return samples


def default_split(task, n=None):
    """-> (train, test): sorted sample indices by the task's split rule; n samples instead of the table's number."""
    import numpy as np  # the legacy RandomState: its permutations are those of the published splits

    row = find_task(task)
    n = n or row.n
    if row.split == "ordered":
        return list(range(row.train)), list(range(row.train, n))
    if row.split == "aqua":  # 10,000 of the 97,467 training samples, then all 254 test samples
        first_test = n - row.test
        return sorted(np.random.RandomState(0).permutation(first_test)[: row.train].tolist()), list(
            range(first_test, n)
        )
    order = np.random.RandomState(0).permutation(n).tolist()
    cut = round(0.7 * n)
    return sorted(order[:cut]), sorted(order[cut:])


def load_split(task, split="default", data_dir="data"):
    """-> (train indices, test indices) of `default`, `template`, or `few_shot_8`, `_32`, `_128` (a part of default's train)."""
    row = find_task(task)
    few_shot = re.fullmatch(r"few_shot_([1-9]\d{0,5})", split)
    path = (
        Path(data_dir) / "split" / f"{row.key}__{'default' if few_shot else safe_key(split)}.json"
    )
    if row.key == "toy" and path.stem.endswith("__default"):
        train, test = default_split("toy")
    elif not path.exists():
        raise UserError(
            f"{path} is missing: make it with `python data/prepare.py {row.key}` (splits: default; template for "
            "multiarith and date_understanding; few_shot_8, few_shot_32, few_shot_128)"
        )
    else:
        content = read_json(path)
        train, test = parts = [content.get(part) for part in ("train", "test")]
        valid = all(
            isinstance(part, list) and part and all(type(i) is int and 0 <= i < row.n for i in part)
            for part in parts
        )
        if not valid or len({*train, *test}) != len(train) + len(test):
            raise UserError(
                f'{path} is not a split of {row.key}: it needs {{"train": [indices], "test": [indices]}}, each index once '
                f"and from 0 to {row.n - 1}"
            )
    if few_shot:  # paper §4: fine-tuning on 8, 32 and 128 samples
        import numpy as np

        train = sorted(np.random.RandomState(0).permutation(train)[: int(few_shot[1])].tolist())
    return train, test


def split_off_validation(train, share, seed):
    """-> (training indices without it, a share of them for validation)."""
    if not 0 <= share < 1:
        raise UserError(
            f"--validation {share} is a share of the training samples: 0 or more, and below 1"
        )
    aside = random.Random(seed).sample(train, round(share * len(train)))
    return sorted({*train} - {*aside}), sorted(aside)


# ---------------- The toy task: made on the spot

NAMES = "Ann Ben Cleo Dan Eve Finn Gina Hugo Iris Jack Kate Leo Mia Nils Olga Paul".split()


def toy_samples(n, people=5):
    """Samples of equal length: `flips` and `keeps` are one word each, so the length of a question tells nothing."""
    rng = random.Random(0)
    samples = []
    for i in range(n):
        steps = [(name, rng.choice(("flips", "keeps"))) for name in rng.sample(NAMES, people)]
        told = " ".join(f"{name} {verb} the coin." for name, verb in steps)
        question = f"A coin is heads up. {told} Is the coin still heads up?"
        flips = sum(verb == "flips" for _, verb in steps)
        samples.append(
            {"sample_index": i, "question": question, "answer": "no" if flips % 2 else "yes"}
        )
    return samples


TOY_EXAMPLES = """Q: A coin is heads up. Ann flips the coin. Ben keeps the coin. Is the coin still heads up?
A: Ann flips it: heads to tails. Ben keeps it: tails to tails. The answer is no.

Q: A coin is heads up. Leo keeps the coin. Mia keeps the coin. Is the coin still heads up?
A: Leo keeps it: heads to heads. Mia keeps it: heads to heads. The answer is yes.
"""  # of Few-shot-CoT
