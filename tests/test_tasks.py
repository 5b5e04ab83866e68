"""Cleansing, templates, splits, loading, the toy task.

python -m pytest tests/test_tasks.py           # cleansing of random texts in a short form, seconds
python -m pytest tests/test_tasks.py --slow    # 20,000 texts, and texts of 10 MB
"""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import amount, timed

import storage
import tasks
from data import toy
from storage import UserError

# ---------------------------------------------------------------- the paper's rules


def test_grade_agrees_with_the_published_evaluator(shared):
    """The paper's rules agree with the published evaluator on every vector, in every field."""
    rows = storage.read_jsonl(shared / "vectors" / "cleansing_paper.jsonl")
    assert len(rows) == 4000
    for row in rows:
        task = row["dataset_key"]
        template = row["prediction_template"]
        verdict = tasks.grade(task, template, row["completion"], row["answer"])
        for field in tasks.Verdict._fields:
            assert getattr(verdict, field) == row[field], (field, row)


QUIRKS = [
    ("gsm8k", "ft_cot_token", "5 - 8 = -3 --> -3", "-3", "-3", True),
    ("gsm8k", "ft_cot_token", "3 --> 4 --> 5", "4", "4", True),  # the first arrow counts
    (
        "gsm8k",
        "ft_cot_token",
        "bags of 3, 4 each, so 12 apples",
        "12",
        "12",
        True,
    ),  # none: the last
    ("gsm8k", "zs_cot", " 39, not 40", "39", "39", True),  # none expected: the first
    ("gsm8k", "zs", "18.00", "18", "18.00", False),  # compared as strings
    ("svamp", "zs", "18.00", "18.0", 18.0, True),  # compared as floats
    ("aqua", None, "Because 3<4, the answer is C", "C", "B", False),  # even inside a word
    ("coin_flip", None, "no; yes", "yes", "yes", True),  # 'no;' is not seen
    ("coin_flip", None, "Yes.", "Yes", "yes", False),  # gold is not lower-cased here
    ("strategy_qa", None, "Yes.", "Yes", "yes", True),  # but here
    ("last_letter_concatenation", "zs", ' "y a j o".', "yajo", "yajo", True),
    ("last_letter_concatenation", "zs", "", "yajo", "", False),
    ("multiarith", "fs_cot", "3 + 4. The answer is 7.", "7", "7", True),
]


@pytest.mark.parametrize("task, template, completion, answer, prediction, correct", QUIRKS)
def test_grade_quirks(task, template, completion, answer, prediction, correct):
    """The paper's rules on the quirks one should know."""
    verdict = tasks.grade(task, template, completion, answer)
    assert verdict.prediction == prediction
    assert verdict.correct == correct


# ---------------------------------------------------------------- the flexible rules

ARROW = "ft_cot_token"
NONE = None
NUMBERS = [  # template, completion, what a careful person reads
    (ARROW, "5 - 8 = -3 --> -3", -3),
    (NONE, "5 - 8 = -3 --> -3", -3),
    (ARROW, "bags of 3, 4 each, so 12 apples", 12),
    (NONE, "bags of 3, 4 each, so 12 apples", 12),
    (ARROW, "3 --> 4 --> 5", 5),
    (NONE, "The answer is 12", 12),
    ("fs_cot", "The answer is 12", 12),
    (NONE, " 39.", 39),
    (NONE, " $51 for ONE pack", 51),
    (NONE, " 18.00", 18),
    (NONE, " $1,234.50.", 1234.5),
    (NONE, " 1,000,000 people", 1000000),
    (NONE, " \n\n24 + 24 = 48", 48),
    (NONE, " 9-6=3 cups of flour.", 3),
    (NONE, " 8 (3 + 5)", 8),
    (NONE, "x = 3.\nSo the answer is x = 6.", 6),
    (NONE, "**18** dollars", 18),
    ("ft_cot_natural", "Therefore, the answer is 7.", 7),
    (ARROW, "so 3 + 4 = 7 apples in all.", 7),
    (NONE, "The answer (arabic numerals) is 12.", 12),
    (NONE, "\\boxed{42}", 42),
    (ARROW, "He has 9 left.\n#### 9", 9),
    (NONE, " -5 degrees", -5),
    (NONE, " \u22124", -4),
    (NONE, " .5", 0.5),
    (NONE, "1e3", 1000),
    (NONE, "7\n\nQ: What is 3 + 4?\nA: 99", 7),
    (ARROW, "The final answer: 20%", 20),
    (ARROW, "--> 12 END", 12),
    (NONE, "none at all", None),
    (NONE, "", None),
    (ARROW, "I do not know -->", None),
    (NONE, " 3-4 apples, so 4", 4),
    (ARROW, "from 10-3 he gets 7", 7),
    (NONE, "The answer is that 11 + 11 makes a total of 22 eggs.", 22),
]
LETTERS = [
    (NONE, "Because 3<4, the answer is C", "C"),
    (NONE, " (F).", "F"),
    (NONE, "(b)", "B"),
    (NONE, "c.", "C"),
    (NONE, "A dog is an animal, so (D)", "D"),
    (ARROW, "(A) is wrong, (B) is right", "B"),
    (NONE, "The answer is A because B is wrong.", "A"),
    (NONE, "The answer is not A, it is E.", "E"),
    (ARROW, "The days pass. --> D", "D"),
    (NONE, "[E]", "E"),
    (NONE, "DEC", None),
    (NONE, "Answer: C) printer", "C"),
    (NONE, "An office", None),
    (NONE, "**B**", "B"),
    (NONE, "The correct answer is:\n(C)", "C"),
    (ARROW, "So the answer is D.\n\nQ: next? (A)", "D"),
]
YES_NO = [
    (NONE, ' "Yes, the coin is heads up."', "yes"),
    (NONE, '"No;"', "no"),
    (NONE, " yes- he could.", "yes"),
    (NONE, "yes!", "yes"),
    (NONE, "NO", "no"),
    (NONE, "No, there is no evidence, yes?", "no"),
    (NONE, "There is no evidence for this", None),
    (NONE, "no longer", None),
    (NONE, "unknown", None),
    (ARROW, "It is not true, so no.", "no"),
    (ARROW, "no --> yes", "yes"),
    (NONE, "The answer is (yes)", "yes"),
    (NONE, "no because it fell", "no"),
    (NONE, "Yesterday", None),
    (ARROW, "The answer is no. Or was it yes? The answer is yes.", "yes"),
]
STRINGS = [
    (NONE, ' "y a j o".', "yajo"),
    (NONE, "yajo", "yajo"),
    (NONE, " y-a-j-o", "yajo"),
    (NONE, "The answer is yajo.", "yajo"),
    (ARROW, "so --> YAJO", "yajo"),
    (NONE, 'The answer is the string "yajo", as above.', "yajo"),
    (ARROW, "The last letters are y, a, j, o --> yajo", "yajo"),
    (NONE, "**yajo**", "yajo"),
    (NONE, "the string yajo, as above", "yajo"),
    (NONE, " y, a, j, o", "yajo"),
    (NONE, "12 --", None),
    (NONE, "", None),
]
FLEXIBLE_CASES = [
    *(("gsm8k", "1,234", *case) for case in NUMBERS),
    *(("svamp", "43.0", *case) for case in NUMBERS),
    *(("date_understanding", "A", *case) for case in LETTERS),
    *(("strategy_qa", "Yes", *case) for case in YES_NO),
    *(("coin_flip", "yes", *case) for case in YES_NO),
    *(("last_letter_concatenation", "yajo", *case) for case in STRINGS),
]


@pytest.mark.parametrize("task, gold, template, completion, expected", FLEXIBLE_CASES)
def test_grade_flexible(task, gold, template, completion, expected):
    """The flexible rules read what a careful person would; no answer is never right."""
    verdict = tasks.grade(task, template, completion, gold, rules="flexible")
    assert verdict.prediction == expected
    assert not (expected is None and verdict.correct)


BY_VALUE = [
    ("gsm8k", "18.00", "18"),
    ("multiarith", "$1,234.50", "1234.5"),
    ("gsm8k", "1234", "1,234"),
    ("coin_flip", "yes!", "Yes"),
    ("strategy_qa", "NO", "No"),
    ("last_letter_concatenation", "Y.A.J.O.", "yajo"),
]


@pytest.mark.parametrize("task, completion, answer", BY_VALUE)
def test_grade_flexible_by_value(task, completion, answer):
    """The flexible rules compare by value."""
    assert tasks.grade(task, None, completion, answer, rules="flexible").correct


@pytest.mark.parametrize("rules", ["paper", "flexible"])
def test_grade_null(rules):
    """A null completion is no answer."""
    assert tasks.grade("gsm8k", "zs", None, "5", rules).prediction is None


UNKNOWN = [
    (("nope", None, "", ""), "no task 'nope'"),
    (("gsm8k", "zero", "", ""), "no prediction template 'zero'"),
    (("gsm8k", None, "", "1", "lax"), "no 'lax' rules"),
    (("svamp", None, "1", "many"), "gold answer 'many' of svamp is not a number, by value"),
]


@pytest.mark.parametrize("arguments, message", UNKNOWN)
def test_grade_unknown(arguments, message):
    """What is not known is refused."""
    with pytest.raises(UserError, match=message):
        tasks.grade(*arguments)


# ---------------------------------------------------------------- an oracle of the paper's rules


def is_digit(text: str, i: int) -> bool:
    """Tell whether a text has a digit at i."""
    return i < len(text) and text[i].isdecimal()


def skip_digits(text: str, i: int) -> int:
    """Return the first place from i on that is no digit."""
    while is_digit(text, i):
        i += 1
    return i


def oracle_numbers(text: str) -> list[str]:
    """Read numbers character by character."""
    text = text.replace(",", "")
    found = []
    i = 0
    while i < len(text):
        start = i + (text[i] == "-" and is_digit(text, i + 1))
        end = skip_digits(text, start)
        if end == start:
            i += 1
            continue
        if text[end : end + 1] == "." and is_digit(text, end + 1):
            end = skip_digits(text, end + 1)
        found.append(text[i:end])
        i = end
    return found


def oracle_floats(text: str) -> list[float]:
    """Read numbers by value."""
    return list(map(float, oracle_numbers(text)))


def oracle_words(text: str) -> list[str]:
    """Read yes and no character by character."""
    words = [""]
    for c in text.lower():
        if c in "\"'\n.:," or c.isspace():
            words.append("")
        else:
            words[-1] += c
    return [word for word in words if word in ("yes", "no")]


def oracle_letters(last: str) -> Callable[[str], list[str]]:
    """Read the capitals A to last."""
    return lambda text: [c for c in text if "A" <= c <= last]


def oracle_text(text: str) -> list[str]:
    """Read the whole text."""
    return ["".join(c for c in text if c not in "\"'\n." and not c.isspace())]


def same_text(a: str, gold: str) -> bool:
    """Numbers as strings."""
    return a == gold.replace(",", "")


def same_float(a: float, gold: str) -> bool:
    """Numbers by value."""
    return abs(a - float(gold)) < 1e-6


def same_lower(a: str, gold: str) -> bool:
    """Words whatever their case."""
    return a == gold.lower()


ORACLES = {  # task: candidates, equality with the gold answer, gold answers
    "gsm8k": (oracle_numbers, same_text, ("7", "1,234", "-3", "18.00")),
    "svamp": (oracle_floats, same_float, ("7.0", "1234.0", "-3", "18")),
    "aqua": (oracle_letters("E"), str.__eq__, "ABCDE"),
    "date_understanding": (oracle_letters("F"), str.__eq__, "ABCDEF"),
    "tracking_shuffled_objects": (oracle_letters("C"), str.__eq__, "ABC"),
    "coin_flip": (oracle_words, str.__eq__, ("yes", "no")),
    "strategy_qa": (oracle_words, same_lower, ("Yes", "No")),
    "last_letter_concatenation": (oracle_text, str.__eq__, ("yajo", "ab")),
}
PIECES = [
    *(
        "7",
        "1,234",
        "-3",
        "18.00",
        "1,2,3",
        "9" * 40,
        "1e9",
        "0.5",
        ".5",
        "5.",
        "3-4",
        "$",
        "%",
        "=",
    ),
    *("--", "-", "-->", " --> ", "The answer is ", "Therefore, the answer is "),
    *("yes", "No", "NO;", "A", "(B)", "Because", "E.", "F", "y a j o", "yajo", "ab", "x"),
    *('"', "'", ".", ",", ":", "\n", " ", "\t", "\r\n", "\u2028", "\u00a0", "\u3000", "\x1c"),
    *("\u2212", "\u0663", "\u00b2", "\u0130", "\u00df", "\0", "\ud83d", "\U0001f600", "\ufeff"),
]


def random_text(chance: random.Random) -> str:
    """Join up to 24 pieces, one in ten any character."""
    pieces = []
    for _ in range(chance.randrange(25)):
        if chance.random() < 0.9:
            pieces.append(chance.choice(PIECES))
        else:
            pieces.append(chr(chance.randrange(0x3000)))
    return "".join(pieces)


def oracle_verdict(task: str, prefix: str | None, text: str, gold: str) -> tuple:
    """Grade by the paper's rules, in plain code."""
    read, is_same, _ = ORACLES[task]
    at = -1
    if prefix:
        at = text.find(prefix)
    if at >= 0:
        candidates = read(text[at + len(prefix) :])
    else:
        candidates = read(text)
    prediction = None
    if candidates and prefix and at < 0:
        prediction = candidates[-1]
    elif candidates:
        prediction = candidates[0]
    correct = prediction is not None and is_same(prediction, gold)
    contains = any(is_same(candidate, gold) for candidate in candidates)
    return prediction, candidates, correct, contains, not prefix or at >= 0


@amount(2_000, 10_000)
def test_grade_paper_random_texts(cases):
    """The paper's verdicts are those of an oracle that reads character by character."""
    chance = random.Random(1)
    for _ in range(cases):
        task = chance.choice(list(ORACLES))
        text = random_text(chance)
        template = chance.choice(list(tasks.ANSWER_PREFIXES))
        gold = chance.choice(ORACLES[task][2])
        expected = oracle_verdict(task, tasks.ANSWER_PREFIXES[template], text, gold)
        verdict = timed(tasks.grade, task, template, text, gold)
        assert verdict == expected, (task, template, text, gold)


# ---------------------------------------------------------------- answers known by construction

NOISE = (
    "so then we see that he has the apples left over and goes to school with his friends where "
    "it rains a lot"
).split()
ANNOUNCEMENTS = [
    "So the answer is ",
    "Therefore, the answer is: ",
    "Answer: ",
    "--> ",
    "The final answer (as asked) is ",
]


def stated_number(chance: random.Random) -> tuple[str, str]:
    """Return (text of a number, its value) as a person or model might write it."""
    whole = [chance.randrange(10), chance.randrange(10_000), -chance.randrange(1, 99)]
    n = chance.choice([*whole, chance.randrange(10**6) / 100])
    text = chance.choice([f"{n}", f"{n:,}", f"**{n}**", f"{n} apples", f"{n}."])
    if chance.random() < 0.2 and "*" not in text:
        text = f"${text}".replace("$-", "-$")
    return text, f"{n}"


def stated_answer(chance: random.Random, task: str) -> tuple[str, str]:
    """Return (text of an answer, its value) as a person or model might write it."""
    if task in ("gsm8k", "svamp"):
        return stated_number(chance)
    if task in ("coin_flip", "strategy_qa"):
        word = chance.choice(("yes", "no"))
        return chance.choice([word, word.upper(), f'"{word}"', f"({word})", f"{word};"]), word
    if task == "last_letter_concatenation":
        word = "".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=4))
        spelled = " ".join(word)
        return chance.choice([f'"{word}"', f'"{spelled}"', spelled.upper(), "-".join(word)]), word
    letter = chance.choice("ABC")
    forms = [f"({letter})", letter, f"{letter}.", f"[{letter}]", f"{letter}) the last one"]
    return chance.choice(forms), letter


@amount(1_000, 5_000)
def test_grade_flexible_stated_answers(cases):
    """The flexible rules read an answer that is stated at the end, whatever precedes it."""
    chance = random.Random(2)
    for _ in range(cases):
        task = chance.choice(list(ORACLES))
        answer, value = stated_answer(chance, task)
        before = " ".join(chance.choices(NOISE, k=chance.randrange(30)))
        if task != "last_letter_concatenation":
            before += chance.choice(["", " 4 + 5 = 9", " (B) or (C)?", " yes or no?"])
        before = f"{before}.\n" * chance.choice([1, 1, 1, 300])
        text = before + chance.choice(ANNOUNCEMENTS) + answer
        template = chance.choice(["ft_cot_token", None])
        verdict = timed(tasks.grade, task, template, text, value, "flexible")
        assert verdict.correct, (task, text, verdict)
        assert verdict.contains_answer


@amount(500, 3_000)
def test_grade_flexible_random_texts(cases):
    """The flexible rules take any text, and predict one of its candidates or nothing."""
    chance = random.Random(3)
    for _ in range(cases):
        task = chance.choice(list(ORACLES))
        template = chance.choice(list(tasks.ANSWER_PREFIXES))
        gold = ORACLES[task][2][0]
        verdict = timed(tasks.grade, task, template, random_text(chance), gold, "flexible")
        assert verdict.prediction in [*verdict.candidates, None]
        assert not (verdict.prediction is None and verdict.correct)


HEAVY = [
    *("1", "1,", "1 ", "9 = ", "3.5 ", "y a ", "(A) ", "A ", "no ", "the answer is ", "--> "),
    *("\n", ". ", '"', '"ab" ', "answer 1 is=", "-", "a-", "ab ", "\u0663 "),
]
HEAVY_TASKS = ("svamp", "last_letter_concatenation", "gsm8k", "aqua", "coin_flip")


@amount(50_000, 10_000_000)
def test_grade_ten_megabytes(cases):
    """A completion of ten megabytes is graded within two seconds."""
    kinds = HEAVY_TASKS
    if cases < 10**6:
        kinds = HEAVY_TASKS[:2]
    for piece in HEAVY:
        text = piece * (cases // len(piece.encode()))
        for task in kinds:
            timed(tasks.grade, task, "ft_cot_token", text, ORACLES[task][2][0], "paper")


# ---------------------------------------------------------------- the table and its splits

SIZES = {
    "single_eq": (356, 152),
    "addsub": (276, 119),
    "multiarith": (420, 180),
    "gsm8k": (7473, 1319),
    "aqua": (10000, 254),
    "svamp": (700, 300),
    "tracking_shuffled_objects": (525, 225),
    "date_understanding": (258, 111),
    "coin_flip": (350, 150),
    "last_letter_concatenation": (350, 150),
    "commonsense_qa": (9741, 1221),
    "strategy_qa": (1603, 687),
}


def test_find_task_nearest_name():
    """An unknown task is answered with the nearest name."""
    with pytest.raises(UserError, match="did you mean multiarith"):
        tasks.find_task("multi_arith")


@pytest.mark.parametrize("task, sizes", SIZES.items())
def test_default_split_sizes(task, sizes):
    """Default splits have the published sizes and cover their part once."""
    train, test = tasks.default_split(task)
    row = tasks.TASKS[task]
    assert (len(train), len(test)) == sizes == (row.train, row.test)
    assert train == sorted(set(train))
    assert test == sorted(set(test))
    assert not set(train) & set(test)
    assert max(train + test) == row.n - 1
    if task != "aqua":
        assert sorted(train + test) == list(range(row.n))


def test_default_split_is_numpys_permutation():
    """The split rule is numpy's permutation."""
    order = np.random.RandomState(0).permutation(600)
    assert tasks.default_split("multiarith")[0] == sorted(order[:420].tolist())


def test_load_split_few_shot_nested():
    """Few-shot splits are nested parts of the training set."""
    train, test = tasks.load_split("toy", "default")
    parts = [tasks.load_split("toy", f"few_shot_{n}") for n in (8, 32, 128)]
    assert [len(part[0]) for part in parts] == [8, 32, 128]
    assert all(part[1] == test for part in parts)
    assert set(parts[0][0]) < set(parts[1][0]) < set(parts[2][0]) < set(train)


def test_load_split_few_shot_published(shared, tmp_path):
    """The eight few-shot indices are those that the published file samples repeatedly."""
    train, test = tasks.default_split("multiarith")
    path = tmp_path / "split" / "multiarith__default.json"
    storage.write_json(path, {"train": train, "test": test})
    published = "saved/completion_data/B_text-davinci-002__C_zs_cot/D_multiarith.json"
    data = storage.read_json(shared / published)["data"]
    repeated = sorted(int(i) for i, rows in data.items() if len(rows) > 1)
    assert tasks.load_split("multiarith", "few_shot_8", tmp_path)[0] == repeated


BAD_SPLITS = [
    {"train": [0, 600], "test": [1]},
    {"train": [-1], "test": [1]},
    {"train": [], "test": [1]},
    {"train": [1], "test": []},
    {"train": [0, 0], "test": [1]},
    {"train": [0], "test": [0]},
    {"train": ["0"], "test": [1]},
    {"train": [True], "test": [0]},
    {"train": 3, "test": [1]},
    {},
]


@pytest.mark.parametrize("split", BAD_SPLITS)
def test_load_split_wrong_form(tmp_path, split):
    """A split of the wrong form is refused."""
    storage.write_json(tmp_path / "split" / "multiarith__default.json", split)
    with pytest.raises(UserError, match="is not a split of multiarith: .* from 0 to 599"):
        tasks.load_split("multiarith", "default", tmp_path)


@pytest.mark.parametrize("share, size", [(0, 0), (0.1, 140), (0.999, 1399)])
def test_split_off_validation_share(share, size):
    """The share is drawn with its seed, and both parts are sorted and disjoint."""
    train, _ = tasks.default_split("toy")
    rest, validation = tasks.split_off_validation(train, share, 1)
    assert len(validation) == size
    assert sorted(rest + validation) == train
    assert validation == sorted(validation)
    assert (rest, validation) == tasks.split_off_validation(train, share, 1)
    assert share == 0 or validation != tasks.split_off_validation(train, share, 2)[1]


@pytest.mark.parametrize("share, n", [(-0.1, 2), (1, 2), (2, 2), (0.1, 4), (0.95, 8)])
def test_split_off_validation_refuses(share, n):
    """Something must be left on both sides: 0.1 of 4 rounds to none, 0.95 of 8 to all."""
    with pytest.raises(UserError, match="is a share of the training samples"):
        tasks.split_off_validation(list(range(n)), share, 0)


# ---------------------------------------------------------------- loading

WRONG_DATASETS = [
    ({"data": []}, "is not a dataset"),
    ({"metadata": {}, "data": []}, "is not a dataset"),
    ([1], "holds a JSON list, not an object"),
    ({"metadata": {"dataset_key": "svamp"}, "data": [{}]}, "holds the task 'svamp'"),
    (
        {"metadata": {}, "data": [{"sample_index": 0, "question": "q", "answer": 5}]},
        "sample 0 needs",
    ),
    (
        {"metadata": {}, "data": [{"sample_index": 1, "question": "q", "answer": ""}]},
        "sample 0 needs",
    ),
    ({"metadata": {}, "data": [7]}, "sample 0 needs"),
]


@pytest.mark.parametrize("content, message", WRONG_DATASETS)
def test_load_wrong_form(tmp_path, content, message):
    """A dataset of the wrong form is refused."""
    storage.write_json(tmp_path / "dataset" / "multiarith.json", content)
    with pytest.raises(UserError, match=message):
        tasks.load("multiarith", tmp_path)


def test_load_split_suggests_the_nearest(tmp_path):
    """A split that is nearly one of the known is answered with that one."""
    with pytest.raises(UserError, match=r"is missing \(did you mean few_shot_32\?\)"):
        tasks.load_split("multiarith", "fewshot_32", tmp_path)


def test_load_missing(tmp_path):
    """A missing dataset or split names the command that makes it."""
    command = "is missing: make it with `python data/prepare.py multiarith --data"
    with pytest.raises(UserError, match=f"dataset/multiarith.json {command}"):
        tasks.load("multiarith", tmp_path)
    with pytest.raises(UserError, match=f"multiarith__template.json {command}"):
        tasks.load_split("multiarith", "template", tmp_path)


@pytest.fixture
def eggs(tmp_path, monkeypatch) -> Path:
    """A benchmark of 20 samples and its split, prepared."""
    row = tasks.TASKS["multiarith"]._replace(key="eggs", n=20, train=14, test=6)
    monkeypatch.setitem(tasks.TASKS, "eggs", row)
    data = [{"sample_index": i, "question": f"{i}?", "answer": f"{i}"} for i in range(20)]
    dataset = {"metadata": {"dataset_key": "eggs"}, "data": data}
    storage.write_json(tmp_path / "dataset" / "eggs.json", dataset)
    split = {"train": list(range(14)), "test": list(range(14, 20))}
    storage.write_json(tmp_path / "split" / "eggs__default.json", split)
    return tmp_path


def test_load_benchmark_parts(eggs):
    """A benchmark comes with its samples and the parts of a split."""
    benchmark = tasks.load_benchmark("eggs", data_dir=eggs, validation=0.25, seed=3)
    assert benchmark.task == "eggs"
    assert benchmark.samples == tasks.load("eggs", eggs)
    assert benchmark.test == [14, 15, 16, 17, 18, 19]
    parts = tasks.split_off_validation(list(range(14)), 0.25, 3)
    assert (benchmark.train, benchmark.validation) == parts
    assert tasks.load_benchmark("toy", "few_shot_8").validation == []


def test_load_benchmark_reads_each_file_once(eggs, monkeypatch):
    """One command needs dataset and split in several places, and reads them once."""
    read = []
    real = storage.read_json
    monkeypatch.setattr(storage, "read_json", lambda path: read.append(path.name) or real(path))
    tasks.load_benchmark("eggs", data_dir=eggs)
    assert sorted(read) == ["eggs.json", "eggs__default.json"]


# ---------------------------------------------------------------- templates

TEMPLATES = [
    ("zs", "decoder", "Q: q?\n\nA:", ""),
    ("zs", "encoder_decoder", "question: q?", ""),
    ("zs_cot", "decoder", "Q: q?\nA: Let's think step by step.", ""),
    ("zs_cot", "encoder_decoder", "Q: q?\nA: Let's think step by step.", ""),
    ("zs_cot", "chat", "q?\nLet's think step by step.", ""),
    ("fs_cot", "decoder", "E\nQ: q?\nA:", ""),
    ("ft_token", "decoder", "q? ###", " a"),
    ("ft_token", "encoder_decoder", "q?", "a"),
    ("ft_natural", "decoder", "Q: q?\n\nA:", " a"),
    ("ft_natural", "encoder_decoder", "Q: q?", "a"),
    ("ft_cot_token", "decoder", "q? ###", " r --> a"),
    ("ft_cot_token", "encoder_decoder", "q?", "r --> a"),
    (
        "ft_cot_natural",
        "decoder",
        "Q: q?\n\nA: Let's think step by step.\n\n",
        " r\n\nTherefore, the answer is a",
    ),
    ("ft_cot_token", "openai", "q?\n\n###\n\n", " r\n\n-->\n\na END"),
    ("ft_token", "openai", "q?\n\n###\n\n", " a END"),
]


@pytest.mark.parametrize("template, family, prompt, label", TEMPLATES)
def test_format_sample_is_the_papers(template, family, prompt, label):
    """The templates are the paper's."""
    sample = tasks.format_sample(template, family, " q?\n", "\n r ", " a ", "E\n")
    assert sample == (prompt, label)


def test_format_sample_braces():
    """Braces in a question or answer are left alone."""
    prompt, label = tasks.format_sample("ft_token", "decoder", "{x} {q}", answer="{a}")
    assert (prompt, label) == ("{x} {q} ###", " {a}")


def test_format_sample_unknown():
    """A family without a template is told which there are."""
    with pytest.raises(UserError, match="no template 'ft_cot_natural' for encoder_decoder"):
        tasks.format_sample("ft_cot_natural", "encoder_decoder", "q")


@pytest.mark.parametrize("family", tasks.FAMILIES)
@pytest.mark.parametrize("template", ["ft_cot_token", "ft_cot_natural"])
def test_answer_prefixes_are_in_labels(template, family):
    """Labels hold the prefix that scoring looks for, and the right answer after it."""
    if family in tasks.TEMPLATES[template]:
        _, label = tasks.format_sample(template, family, "q", "r 1", "2")
        verdict = tasks.grade("gsm8k", template, label, "2")
        assert verdict.correct_format
        assert verdict.correct


def test_answer_prefixes_of_prompts():
    """One-step methods ask for a sentence; two-step methods expect the answer at once."""
    expected = {None: None, "zs": None, "zs_cot": None, "ft_token": None, "ft_natural": None}
    expected |= {"fs_cot": "The answer is", "zs_cot_one_step": "The answer is"}
    expected |= {"ft_cot_token": "-->", "ft_cot_natural": "Therefore, the answer is"}
    assert tasks.ANSWER_PREFIXES == expected


def test_template_fingerprint_changes_with_words(monkeypatch):
    """What was made before a template was edited is not made with it."""
    before = tasks.template_fingerprint("zs", "decoder")
    assert before != tasks.template_fingerprint("zs", "encoder_decoder")
    edited = {**tasks.TEMPLATES["zs"], "decoder": ("Q. {q}", "")}
    monkeypatch.setitem(tasks.TEMPLATES, "zs", edited)
    assert before != tasks.template_fingerprint("zs", "decoder")


class Tokenizer:
    """Codes of characters, and an EOS after each text."""

    eos_token_id = 0

    def __call__(self, text: str) -> dict[str, list[int]]:
        """Return the token ids of a text."""
        return {"input_ids": [*text.encode(), 0]}


def test_encode_prompt_eos():
    """A decoder continues its prompt, so that its EOS goes; half a character is encoded."""
    assert tasks.encode_prompt(Tokenizer(), "decoder", "a\ud800") == [97, 63]
    assert tasks.encode_prompt(Tokenizer(), "encoder_decoder", "a") == [97, 0]


RATIONALES = [
    ({"completion": " 7.", "reasoning_completion": " 3 + 4 is 7."}, " 3 + 4 is 7."),
    ({"completion": " 7.", "reasoning_completion": None}, ""),
    ({"completion": "3 + 4 is 7. The answer is 7."}, "3 + 4 is 7. "),
    ({"completion": "3 + 4 is 7."}, ""),
    ({"completion": None}, ""),
]


@pytest.mark.parametrize("completion, rationale", RATIONALES)
def test_rationale_of(completion, rationale):
    """Step 1 of Zero-shot-CoT, or what precedes the answer's sentence."""
    assert tasks.rationale_of(completion) == rationale


# ---------------------------------------------------------------- the toy task and its teacher


def test_toy_samples_length():
    """A toy question does not give its answer away by its length."""
    samples = tasks.toy_samples(400)
    assert len({len(s["question"].split()) for s in samples}) == 1
    assert {s["answer"] for s in samples} == {"yes", "no"}
    assert 0.4 < sum(s["answer"] == "yes" for s in samples) / 400 < 0.6


@pytest.fixture(scope="module")
def toy_prompts() -> list[str]:
    """Prompts for rationales of 500 toy questions."""
    samples = tasks.toy_samples(500)
    return [tasks.format_sample("zs_cot", "decoder", s["question"])[0] for s in samples]


def test_toy_teacher_varies(toy_prompts):
    """Above temperature 0 the toy teacher varies, and repeats itself with its seed."""
    sampled = toy.toy_teacher(toy_prompts, n=2, temperature=0.7, seed=1)
    assert sampled == toy.toy_teacher(toy_prompts, n=2, temperature=0.7, seed=1)
    assert sampled != toy.toy_teacher(toy_prompts, n=2, temperature=0.7, seed=2)
    assert sum(a != b for a, b in sampled) > 300
    assert all(a == b for a, b in toy.toy_teacher(toy_prompts, n=2))


def test_toy_teacher_is_wrong_once_in_five(toy_prompts):
    """Curation has something to leave out."""
    rationales = [rows[0]["completion"] for rows in toy.toy_teacher(toy_prompts, temperature=0.7)]
    pairs = zip(toy_prompts, rationales, strict=True)
    prompts = [prompt + rationale + tasks.ANSWER_TRIGGER for prompt, rationale in pairs]
    answers = [rows[0]["completion"] for rows in toy.toy_teacher(prompts)]
    samples = zip(tasks.toy_samples(500), answers, strict=True)
    right = sum(sample["answer"] in answer for sample, answer in samples)
    assert 0.74 < right / 500 < 0.86


def test_toy_teacher_few_shot_states_the_answer():
    """Few-shot-CoT is answered in the form of the examples."""
    [sample] = tasks.toy_samples(1)
    examples = tasks.TOY_EXAMPLES
    prompt, _ = tasks.format_sample("fs_cot", "decoder", sample["question"], examples=examples)
    [[row]] = toy.toy_teacher([prompt])
    verdict = tasks.grade("toy", "fs_cot", row["completion"], sample["answer"])
    assert verdict.correct_format
    assert tasks.rationale_of(row).strip().startswith("The coin is heads up.")
