"""Select the answer among the candidates of one sentence, for each type of answer.

A function select(sentence, candidates, announced) returns one of the candidates; their places are
those in the sentence.  announced: 'The answer is' or the like stands before the sentence.
"""

import bisect
import operator
import re
from collections.abc import Callable
from typing import NamedTuple

import candidates as forms
from candidates import Candidate, Candidates, has_one_of

FILLERS = frozenset(
    "about approximately around roughly exactly only just simply definitely equal to a total of "
    "also now still therefore thus then x n".split()
)
WORDS = re.compile(r"[^\W_]+")


def is_immediate(before: str) -> bool:
    """Tell whether no word, or only such as 'about', stands before an answer in its sentence."""
    if len(before) > 60:
        return False
    return FILLERS.issuperset(WORDS.findall(before.lower()))


SUBORDINATE = re.compile(
    r"(?:after|although|though|because|since|whereas|while|without|, as|\(as)\b[^,;]*"
)


def main_clause(sentence: str, candidates: Candidates) -> Candidates:
    """Leave out what stands in a reason or concession only: 'E, although A is tempting' -> E"""
    outside = candidates
    for m in SUBORDINATE.finditer(sentence):
        outside = [c for c in outside if not m.start() <= c.start < m.end()]
    return outside or candidates


def select_first_or_last(sentence: str, candidates: Candidates, announced: bool) -> Candidate:
    """Select the first candidate after an announcement, else the last one."""
    return main_clause(sentence, candidates)[0 if announced else -1]


BOLD = re.compile(r"\*\*(?!\s)[^*\n]{1,80}(?<!:)\*\*(?!:)")  # **72 clips**, not **Step 1:**


def bold_spans(pattern: re.Pattern, text: str, candidates: Candidates) -> list[tuple[int, int]]:
    """Return the spans in bold that hold a candidate."""
    if "**" not in text:
        return []
    spans = []
    for m in pattern.finditer(text):
        i = bisect.bisect_left(candidates, (m.start(),))  # the first candidate in it or behind it
        if i < len(candidates) and candidates[i].start < m.end():
            spans.append(m.span())
    return spans


# ---------------- Numbers

OPERATION = r"\ ?(?:[-+*/x]|plus|minus|times|divided\ by)\ ?"
OPERATORS = ("+", "-", "*", "/", "x", "=", "plus", "minus", "times", "by", "than")
CALCULATIONS = ("+", "-", "*", "/", "x", "lus ", "inus ", "imes ", "by ", "than ", "% ", "nt of")
OPERAND_RIGHT = re.compile(rf"""(?x)
    (?:\ [a-z]{{1,12}}){{0,2}} {OPERATION} [$(]{{0,2}} \d  # 3 boxes * $4
  | (?:%|\ percent)\ of\b  # 50% of 80
  | \ (?:more|less|fewer)\ than\ [$(]? \d  # 3 more than 9
    """)
OPERAND_LEFT = re.compile(rf"""(?x)
    (?: [\w)%] {OPERATION} | \ (?:more|less|fewer)\ than ) \Z""")
EXPRESSION = re.compile(r"(?:\A|[^\w=*/+^-])\s*\$?[\d,.]+\s*=\s*\Z")  # the '36 =' of '36 = 72/2'
EQUAL = re.compile(r"=|\bi\.e\.|\b(?:that is|namely|in other words|in total there|equals)\b")
RESULT = re.compile(r"""(?x)  # each branch begins with a literal character: that is searched fast
    (?: = | i\.e\. | that\ is | that\ means | this\ means | which\ is | which\ means | namely
      | in\ other\ words | equals | gives | give | giving | makes | make | making | totaling
      | to\ get | we\ get | leaves | leaving | then (?<!\wthen) | for\ a\ total\ of
      | (?: so (?<!\wso) | So | Therefore | therefore | Thus | thus | Hence | hence )
        (?! ,?\ (?:if|since|because|when|after|given|as)\b )
    ) (?!\w)""")
RESTATED = re.compile(r"[a-z ]{0,20}, or ")
BRACKETS = re.compile(r"\([^()]*\)")
COMPARISON = re.compile(r"\s(?:more|less|fewer|times|percent)\b|%")


def is_operand(sentence: str, c: Candidate) -> bool:
    """Tell whether a number is a part of a calculation, not its result: the 12 of '36 = 12 * 3'."""
    if OPERAND_RIGHT.match(sentence, c.end):
        return True
    left = sentence[max(0, c.start - 20) : c.start].rstrip(" $(")
    if not left.endswith(OPERATORS):
        return False
    is_quotient = "/" in sentence[c.start : c.end]
    return bool(OPERAND_LEFT.search(left) or (is_quotient and EXPRESSION.search(left)))


def outside_brackets(sentence: str, candidates: Candidates) -> Candidates:
    """Leave out numbers in brackets where there are others: '45 min (0.75 h)' -> 45"""
    outside = candidates
    for m in BRACKETS.finditer(sentence):
        outside = [c for c in outside if not m.start() < c.start < m.end()]
    return outside or candidates


def last_result(pattern: re.Pattern, sentence: str, candidates: Candidates) -> Candidate | None:
    """Return what follows the last 'equals' or 'gives' directly: '3 + 4 = 7 of 9' -> 7."""
    starts = [c.start for c in candidates]
    result = None
    for m in pattern.finditer(sentence, 0, starts[-1]):
        following = candidates[bisect.bisect_left(starts, m.end())]
        if not COMPARISON.match(sentence, following.end):
            result = following
    return result


def restated(sentence: str, candidates: Candidates) -> Candidate | None:
    """Return the announced number in another form: '5 dollars and 25 cents, or $5.25' -> 5.25"""
    *others, left, right = candidates
    if others and RESTATED.fullmatch(sentence, left.end, right.start):
        return right
    return last_result(EQUAL, sentence, candidates)


def select_number(sentence: str, candidates: Candidates, announced: bool) -> Candidate:
    """Select a result, else what an announced answer begins with, else what is bold or last."""
    if has_one_of(sentence, CALCULATIONS):
        candidates = [c for c in candidates if not is_operand(sentence, c)] or candidates
    candidates = outside_brackets(sentence, main_clause(sentence, candidates))
    if len(candidates) == 1:
        return candidates[0]
    if announced and is_immediate(sentence[: candidates[0].start]):
        # 'The answer is 51 for 2 packs' -> 51, '1.5 hours, i.e. 90 minutes' -> 90
        return restated(sentence, candidates) or candidates[0]
    if result := last_result(RESULT, sentence, candidates):
        return result
    bold = bold_spans(BOLD, sentence, candidates)
    if len(bold) == 1:
        return next(c for c in candidates if c.start >= bold[0][0])
    return candidates[-1]  # '11 and 11 makes 22' -> 22


# ---------------- Strings, yes or no

NO_NAME = re.compile(r"""(?ix)
    (?: the|an?|string|words?|letters?|is|are|concatenat\w*|results?|answer|of|last|final|simply
      | just|it|be|would|that|we|get|together|new|so|therefore|thus|hence|not ) \Z""")
NAMED = re.compile(r"\W*(?:(?:the|a|string|word|new|just|simply)\W+){0,4}")
AFTER_NAME = re.compile(r"[.,;!(<}\n]|\s*\Z|\s(?:because|since|as|which|when|from|by|for)\b")
CLAUSE_END = re.compile(r"[,;(<}\n]|\b(?:because|since|as|which|when|from|by|for|if)\b|\Z")


def select_string(sentence: str, candidates: Candidates, announced: bool) -> Candidate:
    """Select what is quoted or spelled out, else the word after 'gives' or 'is'."""
    first = next((c for c in candidates if not NO_NAME.match(c.value)), candidates[0])
    is_named = announced and NAMED.fullmatch(sentence, 0, first.start)
    if is_named and AFTER_NAME.match(sentence, first.end):
        return first  # 'The answer is the string yajo, as the letters are ...'
    results = [c for c in candidates if c.start >= result_end(sentence, candidates)]
    for group in (results, candidates):
        marked = [c for c in group if c.is_marked]
        whole = [c for c in marked if len(c.value) > 1] or marked
        if whole:
            return whole[0 if announced else -1]
    start = results[0].start
    clause_end = CLAUSE_END.search(sentence, start).start()
    words = [c for c in results if c.start < clause_end] or results[:1]
    names = [c for c in words if not NO_NAME.match(c.value)]
    return (names or words)[0 if announced else -1]


STRING_RESULT = re.compile(r"""(?ix) [=:] | \b (?:gives?|giving|gets?|spells?|makes?|making|forms?
    |forming|becomes?|yields?|produces?|into|is|are|to\ get|we\ have) \b""")


def result_end(sentence: str, candidates: Candidates) -> int:
    """Return where the result of a concatenation may begin: after the last 'gives' or 'is'."""
    last = candidates[-1].start
    return max((m.end() for m in STRING_RESULT.finditer(sentence) if m.end() <= last), default=0)


def select_statement(sentence: str, candidates: Candidates, announced: bool) -> Candidate:
    """Select the yes or no that is announced or that a sentence begins with, else the last."""
    candidates = main_clause(sentence, candidates)
    begins = is_immediate(sentence[: candidates[0].start])
    return candidates[0 if announced or begins else -1]


# ---------------- All that is known of one type of answer


class Extractor(NamedTuple):
    """How one set of rules reads one type of answer."""

    candidates: Callable  # text -> values (paper) or Candidates (flexible)
    gold: Callable = str  # gold answer -> value
    is_same: Callable = operator.eq  # (value of a candidate, of the gold answer) -> bool
    select: Callable = select_first_or_last  # flexible: which of a sentence's candidates
    other_forms: Callable = (
        forms.nothing
    )  # flexible: Candidates, read only where there are no others
    can_hedge: bool = False  # flexible: 'A or B' is no answer
    is_number: bool = False  # flexible: digits alone need no further reading
