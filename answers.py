"""Read the answer in a completion, by the paper's rules or as a careful person reads, and grade it.

The paper's rules are those of the published evaluator, quirks included.  The flexible rules

    1. write the text plainly            below
    2. find what may be an answer        candidates.py
    3. leave out what the text rejects   candidates.py    'not A', 'B is wrong'
    4. find the sentence that counts     selection.py     announced > in bold > the last
    5. select a candidate in it          selection.py     '3 + 4 = 7 of 9' -> 7

Of two answers that contradict each other the last counts, of two that are given as one none.
"""

import functools
import re
import unicodedata
from collections.abc import Callable
from typing import Any, NamedTuple

import candidates as forms
from candidates import (
    Candidate,
    accepted,
    has_one_of,
    is_hedged,
    is_rejected,
    without_questions,
)
from selection import Extractor, choose, select_number, select_statement, select_string
from storage import UserError


class AnswerType(NamedTuple):
    name: str
    paper: Extractor
    flexible: Extractor


# ---------------- The paper's rules: identical to the published evaluator

PAPER_NUMBER_PATTERN = re.compile(r"-?\d+(?:\.\d+)?")
PUNCTUATION_TO_SPACES = str.maketrans("\"'.:,", "     ")


def paper_numbers(text: str) -> list[str]:
    """'$1,234.50 or 5 - 8 = -3' -> ['1234.50', '5', '8', '-3']"""
    bare = text.replace(",", "")
    return PAPER_NUMBER_PATTERN.findall(bare)


def paper_floats(text: str) -> list[float]:
    """'18.00, 5' -> [18.0, 5.0]"""
    return list(map(float, paper_numbers(text)))


def paper_yes_no(text: str) -> list[str]:
    """'No, it is "Yes".' -> ['no', 'yes'], but 'no;' -> []"""
    spaced = text.lower().translate(PUNCTUATION_TO_SPACES)
    words = spaced.split()
    return [word for word in words if word in ("yes", "no")]


# ---------------- Types of answers


def is_close(a: float, b: float) -> bool:
    """Tell whether two numbers are the same answer, as the published evaluator does."""
    return abs(a - b) < 1e-6


def decimals(number: float) -> int:
    """0.67 -> 2, 5.0 -> 0; of 1e-9 none are counted."""
    written = f"{number!r}".rstrip("0")
    _, _, stated = written.partition(".")
    return len(stated)


def is_close_as_stated(value: float, gold: float) -> bool:
    """Tell whether a number is the gold answer, to the decimals stated where it never ends.

    2/3, 0.667 and 0.67 are the same as 0.6666666666666666; 0.6 and 1 are not.
    """
    if is_close(value, gold):
        return True
    stated = decimals(value)
    if stated == 0 or decimals(gold) < 12:
        return False
    rounded = round(gold, stated)
    return is_close(value, rounded)


# The paper compares the numbers of some tasks as strings (18.00 is not 18), and lower-cases the
# gold answers of one of its yes/no tasks alone (YES_NO_CASED).
PAPER_NUMBER = Extractor(paper_numbers, lambda gold: gold.replace(",", ""))
PAPER_FLOAT = Extractor(paper_floats, forms.parse_number, is_close)
PAPER_STRING = Extractor(lambda text: [re.sub(r"[\"'\n.\s]", "", text)])  # ' "y a j o".' -> yajo
NUMBER_BY_VALUE = Extractor(
    forms.read_numbers,
    forms.parse_number,
    is_close_as_stated,
    select_number,
    forms.read_number_words,
    is_number=True,
)
YES_OR_NO = Extractor(
    forms.read_yes_no,
    lambda gold: gold.strip().lower(),
    select=select_statement,
    other_forms=forms.read_states,
    can_hedge=True,
)
LETTERS_ALONE = Extractor(forms.read_strings, forms.keep_letters, select=select_string)
NUMBER = AnswerType("number", PAPER_NUMBER, NUMBER_BY_VALUE)
FLOAT = AnswerType("number, by value", PAPER_FLOAT, NUMBER_BY_VALUE)
YES_NO = AnswerType("yes/no", Extractor(paper_yes_no), YES_OR_NO)
YES_NO_CASED = AnswerType("yes/no", Extractor(paper_yes_no, str.lower), YES_OR_NO)
STRING = AnswerType("string", PAPER_STRING, LETTERS_ALONE)


def multiple_choice(last: str) -> AnswerType:
    """A choice.  The paper reads capitals even inside words: 'Because (C)' -> ['B', 'C']."""
    paper = Extractor(re.compile(f"[A-{last}]").findall)
    flexible = Extractor(forms.letter_reader(last), str.strip, can_hedge=True)
    return AnswerType(f"letter A-{last}", paper, flexible)


A_TO_C, A_TO_E, A_TO_F = map(multiple_choice, "CEF")

# ---------------- The verdict on one completion


class Verdict(NamedTuple):
    prediction: Any  # None: no answer
    candidates: list  # everything that could have been read
    correct: bool
    contains_answer: bool  # any candidate is right
    correct_format: bool  # the template's prefix is there, or none is expected


def paper_prediction(extractor: Extractor, prefix: str | None, text: str) -> tuple[Any, list]:
    """Read the first candidate after the prefix; without one, the text's last (paper, appendix)."""
    position = 0
    if prefix:
        _, found, after = text.partition(prefix)
        if found:
            text = after
        else:
            position = -1
    candidates = extractor.candidates(text)
    if not candidates:
        return None, []
    return candidates[position], candidates


ANNOUNCING = ("\n", ":", ">", "#", "\\", ". ")  # none without one of these


def is_alone(extractor: Extractor, text: str, only: Candidate) -> bool:
    """Tell, quickly, whether a text's only candidate is its answer: most completions are so."""
    start = only.start
    end = only.end
    if start < 4 and len(text) < end + 4:  # ' (D).'
        return True
    if extractor.other_forms is not forms.nothing:  # another may be announced
        announcement = text.rfind("nswer", 0, start)
        if 0 <= announcement < start - 12 or has_one_of(text[end:], ANNOUNCING):
            return False
    if start < 4 and text[end] in ",.;":  # ' no, he is not.'
        return True
    return not is_rejected(text, [only], only)


def flexible_prediction(extractor: Extractor, prefix: str | None, text: str) -> tuple[Any, list]:
    """Read what a text commits itself to last, as a careful person would."""
    if extractor.is_number:
        bare = text.strip().rstrip(".")
        if bare.isdecimal():  # ' 350.'
            number = float(bare)
            return number, [number]
    text = normalize(text)
    candidates = extractor.candidates(text) or extractor.other_forms(text)
    if not candidates:
        return None, []
    values = [c.value for c in candidates]
    first = candidates[0]
    if len(candidates) == 1 and is_alone(extractor, text, first):
        return first.value, values
    goes_on = not prefix
    chosen = choose(extractor, text, candidates, goes_on)
    if not chosen:
        return None, values
    hedged = extractor.can_hedge and is_hedged(text, candidates, chosen)
    if hedged or is_rejected(text, candidates, chosen):
        stated = without_questions(text, candidates)
        candidates = accepted(text, stated)
        if not candidates:
            return None, values
        chosen = choose(extractor, text, candidates, goes_on)
        if not chosen or (hedged and is_hedged(text, candidates, chosen)):
            return None, values
    value = chosen.value
    if value not in values:  # in another form
        values.append(value)
    return value, values


SHORT_ANSWERS = 10_000  # that a grader remembers
PREDICTIONS = {"paper": paper_prediction, "flexible": flexible_prediction}  # by rules


Grader = Callable[[str | None, str], Verdict]  # (completion, gold answer) -> Verdict


def make_grader(answer_type: AnswerType, prefix: str | None, rules: str, task: str) -> Grader:
    """Return a function that grades; prefix: what the template puts before an answer.

    Raises UserError for other rules; the function does for a gold answer that cannot be read.
    """
    if rules not in PREDICTIONS:
        raise UserError(f"there are no {rules!r} rules: choose paper or flexible")
    predict = PREDICTIONS[rules]
    extractor = getattr(answer_type, rules)
    is_same = extractor.is_same
    read_gold = functools.cache(extractor.gold)

    @functools.lru_cache(SHORT_ANSWERS)  # many completions of a file are the same few words
    def read_short(text: str) -> tuple[Any, list]:
        return predict(extractor, prefix, text)

    def grade(completion: str | None, answer: str) -> Verdict:
        """Grade one completion; an API may send null for it."""
        text = completion or ""
        if len(text) < 40:
            prediction, candidates = read_short(text)
        else:
            prediction, candidates = predict(extractor, prefix, text)
        try:
            gold = read_gold(answer)
        except ValueError:
            message = f"the gold answer {answer[:80]!r} of {task} is not a {answer_type.name}"
            raise UserError(message) from None
        correct = prediction is not None and is_same(prediction, gold)
        contains = correct
        if not correct and (prediction is None or len(candidates) > 1):
            contains = any(is_same(value, gold) for value in set(candidates))
        has_format = not prefix or prefix in text
        return Verdict(prediction, candidates, correct, contains, has_format)

    return grade


# ---------------- Plain text

MAX_SCAN_CHARS = 100_000  # at the beginning and at the end of a completion
QUESTION = re.compile(r"\n\s{0,9}(?:Q|Question|Human|User)\s?\d{0,3}:", re.IGNORECASE)
ASKING = ("Q", "q", "Human:", "User:")  # QUESTION finds nothing without one of these
OWN_ANSWER = re.compile(r"\n\s{0,9}(?:A|Answer):", re.IGNORECASE)
RECITAL = re.compile(r"\bexamples?\b", re.IGNORECASE)
ASCII_SIGNS = {
    "-": "\u2212\u2013",  # minus sign, en dash
    "*": "\u00d7",
    "/": "\u00f7\u2044",
    ".": "\u066b",  # Arabic decimal separator
    ",": "\u066c",
    '"': "\u201c\u201d",
    "'": "\u2018\u2019",
    ". ": "\u3002",  # Chinese punctuation has no space after it
    ", ": "\uff0c\u3001",
    ": ": "\uff1a",
    "! ": "\uff01",
    "? ": "\uff1f",
    " ": "\u00a0\u2002\u2003\u2007\u2008\u2009\u202f\u3000",  # no-break, thin, ... spaces
    "": "\u200b\u200c\u200d\u2060\ufeff\u00ad",  # of no width
}
FULL_WIDTH = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
PLAIN = FULL_WIDTH | {ord(sign): plain for plain, signs in ASCII_SIGNS.items() for sign in signs}
SUPERSCRIPTS = "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"
LOWERED = str.maketrans(SUPERSCRIPTS, "-0123456789")
RAISED = re.compile(f"(?<=\\d)[{SUPERSCRIPTS}]{{1,4}}")  # 10²
UNUSUAL = re.compile(r"(?![0-9])\d|[\u00bc-\u00be\u2150-\u215e]")  # other digits; ½
CJK = "[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"  # their words end without a space
CJK_BORDER = re.compile(f"(?<={CJK})(?=[!-~])|(?<=[!-~])(?={CJK})")
LATEX = [  # pattern, replacement
    (re.compile(r"(?<=\d)(?:\\[,;!: ]|\{,\})(?=\d{3})"), ","),  # 1\,234
    (re.compile(r"\\[dt]?frac\s?\{([^{}]{1,20})\}\s?\{([^{}]{1,20})\}"), r" \1/\2"),  # \frac{3}{4}
    (re.compile(r"\\[dt]?frac\s?(\d)\s?(\d)"), r" \1/\2"),  # \frac34
    (re.compile(r"\\(?:times|cdot)\b"), "*"),
    (re.compile(r"\\(?:textbf|mathbf)\{([^{}]{1,80})\}"), r"**\1**"),
    (re.compile(r"\\(?:text|mathrm|mbox)\{([^{}]{1,80})\}"), r" \1"),
    (re.compile(r"\\(?:left|right|displaystyle)\b"), ""),
    (re.compile(r"\\[()\[\] ]"), " "),
    (re.compile(r"\\([$%&#_])"), r"\1"),
    (re.compile(r"\\(?!boxed\b)[a-zA-Z]{2,20}"), " "),  # \alpha
]


MINUS = re.compile(r"(?<![\d)] )\b(?:minus|negative) (?=\$?\d)")  # 'It is minus 4.'


def plain_character(m: re.Match) -> str:
    """'\u0663' -> '3', '\u00bd' -> ' 1/2'"""
    sign = m[0]
    if sign.isdecimal():
        return str(unicodedata.decimal(sign))
    fraction = unicodedata.normalize("NFKC", sign)
    return " " + fraction.replace("\u2044", "/")


def plain_unicode(text: str) -> str:
    """Write other digits, signs, spaces, quotes and fractions as in ASCII: '１０²' -> '10^2'"""
    text = text.translate(PLAIN)
    text = RAISED.sub(lambda m: "^" + m[0].translate(LOWERED), text)
    text = UNUSUAL.sub(plain_character, text)
    return CJK_BORDER.sub(" ", text)


def plain_latex(text: str) -> str:
    """'1\\,234 \\times \\dfrac{3}{4}' -> '1,234 *  3/4'; \\boxed stays, as it announces."""
    for pattern, replacement in LATEX:
        text = pattern.sub(replacement, text)
    return text


def own_reply(text: str) -> str:
    """Return the answer to the question that was asked.

    A base model asks itself further questions after it ('7\\n\\nQ: ...'), or recites examples
    before it ('Q: ... A: 5\\n\\nQ: ... A: 7'): then it is the last.
    """
    head, *others = QUESTION.split("\n" + text)
    if not others:
        return head
    bare = head.strip()
    is_recital = bare.endswith(":") and RECITAL.search(bare)
    if bare and not is_recital:
        return head
    *_, answer = OWN_ANSWER.split(others[-1], 1)
    return answer


def normalize(text: str) -> str:
    """Return a text's own reply in plain characters; of a long one the ends."""
    if len(text) > 2 * MAX_SCAN_CHARS:  # a model that repeats itself must not hold up the others
        text = f"{text[:MAX_SCAN_CHARS]}\n{text[-MAX_SCAN_CHARS:]}"
    if not text.isascii():
        text = plain_unicode(text)
    if has_one_of(text, ("\\", "{")):
        text = plain_latex(text)
    if has_one_of(text, ("minus ", "negative ")):
        text = MINUS.sub("-", text)
    if ":" in text and has_one_of(text, ASKING):
        text = own_reply(text)
    return text
