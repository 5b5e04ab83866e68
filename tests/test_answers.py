"""The reading of answers: a table of endings, rejected answers, wrappings, speed of long texts.

python -m pytest tests/test_answers.py           # texts of 50 KB, seconds
python -m pytest tests/test_answers.py --slow    # texts of 10 MB

tests/answer_endings.json has a row an ending: [type of answer, text, gold answer, verdict, why].
The verdict is what a careful person says; where a person could argue, "why" says so.
"""

import json
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, amount, timed

import answers
import tasks

ENDINGS = json.loads((Path(__file__).parent / "answer_endings.json").read_text())
TASK_OF_TYPE = {
    "number": "addsub",
    "letter": "commonsense_qa",
    "yes/no": "coin_flip",
    "string": "last_letter_concatenation",
}


def read(answer_type: str, text: str, template: str | None = None) -> object:
    """Return what the flexible rules read."""
    gold = {"number": "0"}.get(answer_type, "none")
    return tasks.grade(TASK_OF_TYPE[answer_type], template, text, gold, "flexible").prediction


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize("template", [None, "ft_cot_token"])
@pytest.mark.parametrize("answer_type, text, gold, verdict, why", ENDINGS)
def test_grade_endings(answer_type, text, gold, verdict, why, template):
    """An ending is judged as a careful person does, whether or not the prompt announced it."""
    graded = tasks.grade(TASK_OF_TYPE[answer_type], template, text, gold, "flexible")
    assert graded.correct == (verdict == "right"), why


def test_endings_are_many():
    """The table has 300 different texts and more, of every type of answer, and no row twice."""
    assert len({text for _, text, *_ in ENDINGS}) >= 300
    assert set(Counter(row[0] for row in ENDINGS)) == set(TASK_OF_TYPE)
    assert len({tuple(row[:3]) for row in ENDINGS}) == len(ENDINGS)


def test_endings_hold_wrong_answers():
    """Many rows tell of an answer that would be wrong: loosening the rules fails them."""
    wrong = [row for row in ENDINGS if row[3] == "wrong"]
    assert len(wrong) >= 80


# ---------------------------------------------------------------- what may not become right

REJECTED = {  # forms that reject the answer {a}, and commit themselves to nothing
    "number": [
        "It is not {a}.",
        "It isn't {a}",
        "The answer is not {a}.",
        "{a} is wrong.",
        "Neither {a} nor more.",
    ],
    "letter": [
        "It is not {a}.",
        "Not ({a})",
        "({a}) is incorrect.",
        "The answer cannot be {a}.",
        "We can rule out {a}.",
        "Option {a} is wrong.",
    ],
    "yes/no": ["The answer is not {a}.", "It is not a {a}.", "Is it {a}?\nUnclear.", "yes or no"],
    "string": ['It is not "{a}".', 'The answer is not "{a}".'],
}
GOLD = {"number": "17", "letter": "B", "yes/no": "yes", "string": "yajo"}
REJECTED_FORMS = [(name, form) for name, forms in REJECTED.items() for form in forms]


@pytest.mark.parametrize("template", [None, "ft_cot_token"])
@pytest.mark.parametrize("answer_type, form", REJECTED_FORMS)
def test_grade_rejected(answer_type, form, template):
    """An answer that the text only rejects is never right."""
    text = form.format(a=GOLD[answer_type])
    task = TASK_OF_TYPE[answer_type]
    assert not tasks.grade(task, template, text, GOLD[answer_type], "flexible").correct


INTERMEDIATE = [  # texts in which 17 comes up on the way only
    "He has 17. Then he gets 5 more. The answer is 22.",
    "12 + 5 = 17, and 17 + 5 = 22.",
    "12 + 5 = 17\n17 + 5 = 22",
    "The answer is 17 + 5 = 22.",
    "The answer is 17. Wait, I forgot 5. The answer is 22.",
    "Step 17: 11 + 11 = 22",
    "22 (17 + 5)",
    "22 = 17 + 5",
    "The answer is 22, not 17.",
    "22, as 17 boys and 5 girls came.\n\nQ: How many boys?\nA: 17",
    "17 of them are boys, so in total there are 22.",
    "--> 17\nNo, that is wrong.\n--> 22",
]


@pytest.mark.parametrize("template", [None, "ft_cot_token"])
@pytest.mark.parametrize("text", INTERMEDIATE)
def test_grade_intermediate_results(text, template):
    """An intermediate result is never right, and the last commitment is read."""
    assert read("number", text, template) == 22


# ---------------------------------------------------------------- gold answers in wrappings

WRAPPINGS = [
    "{a}",
    " {a}.",
    "The answer is {a}.",
    "Answer: {a}",
    "**{a}**",
    "Thus the final answer is: \\boxed{{{a}}}",
    "I am sure.\n<answer>{a}</answer>",
    "First this, then that. --> {a}",
    "Let's see. This takes a while.\n\n#### {a}\n",
    "There were 2 of 3 in the box (A or B, yes or no).\nTherefore, the answer is {a}.",
]
BENCHMARKS = [key for key in tasks.TASKS if key not in ("aqua", "toy")]


@pytest.mark.parametrize("key", BENCHMARKS)
def test_grade_gold_answers(key):
    """Every gold answer of a prepared benchmark is right in ten wrappings."""
    path = ROOT / "data" / "dataset" / f"{key}.json"
    if not path.exists():
        pytest.skip(f"{path} is not there: python data/prepare.py {key}")
    golds = {sample["answer"] for sample in tasks.load(key, ROOT / "data")}
    for template in (None, "ft_cot_token"):
        grade = tasks.make_grader(key, template, "flexible")
        for gold in golds:
            wrong = [w for w in WRAPPINGS if not grade(w.format(a=gold), gold).correct]
            assert not wrong, gold


GOLDS = [
    ("addsub", "0.6666666666666666"),
    ("addsub", "5.85"),
    ("gsm8k", "109,200,000"),
    ("svamp", "43.0"),
    ("date_understanding", "F"),
    ("aqua", "A"),
    ("coin_flip", "no"),
    ("strategy_qa", "Yes"),
    ("last_letter_concatenation", "anal"),
    ("last_letter_concatenation", "nose"),
]


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("key, gold", GOLDS)
def test_grade_wrapped(key, gold, wrapping):
    """A gold answer is right in ten wrappings."""
    assert tasks.grade(key, None, wrapping.format(a=gold), gold, "flexible").correct


# ---------------------------------------------------------------- parts

PLAIN_TEXTS = [
    ("１２", "12"),
    ("\u0664\u0662", "42"),
    ("3\u00bd", "3 1/2"),
    ("10\u00b2", "10^2"),
    ("10\u207b\u00b2", "10^-2"),
    ("1\u00a0234", "1 234"),
    ("\u22125", "-5"),
    ("3 \u00d7 4", "3 * 4"),
    ("\u7b54\u6848\u662fB", "\u7b54\u6848\u662f B"),
    ("a\u200bb", "ab"),
    (r"1\,234", "1,234"),
    (r"\dfrac{3}{4}", " 3/4"),
    (r"2 \times 3", "2 * 3"),
    (r"\textbf{7}", "**7**"),
    (r"\boxed{\text{no}}", r"\boxed{ no}"),
    ("minus 4", "-4"),
    ("10 minus 4", "10 minus 4"),
]


@pytest.mark.parametrize("text, plain", PLAIN_TEXTS)
def test_normalize(text, plain):
    """A text is written in plain characters."""
    assert answers.normalize(text) == plain


NUMBERS = [
    ("x4", [4]),
    ("3-4", [3, 4]),
    ("-$1,234.50", [-1234.5]),
    ("(-3)", [-3]),
    ("a.5", [5]),
    ("-.5", [-0.5]),
    (".0.5", [0.5]),
    ("-.0.5.", [0.5]),
    ("99^99^99", [99.0**99, 99]),
    ("5/0", [5]),
    ("1/2/2003", [1, 2, 2003]),
    ("2003 120", [2003, 120]),
    ("1,23", [1, 23]),
    ("9" * 400, [float("inf")]),
]


@pytest.mark.parametrize("text, values", NUMBERS)
def test_grade_candidates(text, values):
    """Every number of a text is a candidate, with its sign and by its value."""
    verdict = tasks.grade("svamp", "ft_cot_token", text, "0", "flexible")
    assert verdict.candidates == values


PRECISION = [  # stated, gold, same
    (2 / 3, 0.6666666666666666, True),
    (0.67, 0.6666666666666666, True),
    (0.667, 0.6666666666666666, True),
    (0.66, 0.6666666666666666, False),
    (0.6, 0.6666666666666666, False),
    (1.0, 0.6666666666666666, False),
    (33.33, 33.333333333333336, True),
    (33.0, 33.333333333333336, False),
    (0.3, 0.30000000000000004, True),
    (0.13, 0.125, False),
    (float("inf"), 0.5, False),
]


@pytest.mark.parametrize("stated, gold, same", PRECISION)
def test_is_close_as_stated(stated, gold, same):
    """A repeating decimal is compared to the decimals that were stated, all else exactly."""
    assert answers.is_close_as_stated(stated, gold) == same


@pytest.mark.parametrize("text", ["", " ", "\n", "?", "**", "\\", "\\frac{}{}", "-", "$", "\ud83d"])
@pytest.mark.parametrize("answer_type", TASK_OF_TYPE)
def test_grade_no_answer(answer_type, text):
    """A text without an answer has none, and raises nothing."""
    assert read(answer_type, text) is None


# ---------------------------------------------------------------- speed

HEAVY = [
    *("5^", "1/2 ", "1 000 ", "10 x 10^", "five ", "one hundred and ", "not A or ", "A, B and "),
    *("A is wrong. ", "**5** ", "**", "(5) ", "(", "after 5, ", "if 5, ", "heads up ", "i.e. "),
    *(
        "\\frac{1}{2}",
        "\\frac{",
        "１",
        "\u00bd",
        "\u7b54\u6848 5 ",
        "Wait. 5. ",
        "So 5. ",
        "Q: 5\n",
    ),
    *('"y", ', "**y**, ", "| total | ", "is the answer ", "minus ", "true ", "\\", "<answer>"),
    *("5 is the answer ", "**5**\n", "answer is 5. ", "Is it 5? ", "5 or ", "5, ", "yes or no? "),
]


@amount(50_000, 10_000_000)
def test_grade_flexible_ten_megabytes(cases):
    """A completion of ten megabytes is graded within two seconds, of whatever it repeats."""
    kinds = list(TASK_OF_TYPE.values())
    if cases < 10**6:
        kinds = kinds[:2]
    for piece in HEAVY:
        text = piece * (cases // len(piece.encode()))
        for task in kinds:
            gold = {"addsub": "5"}.get(task, "A")
            timed(tasks.grade, task, None, text, gold, "flexible")
