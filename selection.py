"""Select the answer among the candidates of one sentence, for each type of answer.

A function select(sentence, candidates, announced) returns one of the candidates; their places are
those in the sentence.  announced: 'The answer is' or the like stands before the sentence.
"""

import operator
import re
from collections.abc import Callable
from typing import NamedTuple

import candidates as forms
from candidates import Candidate, Candidates, accepted, has_one_of, index_from, moved, text_before

FILLERS = frozenset(
    "about approximately around roughly exactly only just simply definitely equal to a total of "
    "also now still therefore thus then x n".split()
)
WORDS = re.compile(r"[^\W_]+")


def first_or_last(candidates: Candidates, is_first: bool) -> Candidate:
    """Return the first candidate, or the last."""
    if is_first:
        return candidates[0]
    return candidates[-1]


def is_immediate(before: str) -> bool:
    """Tell whether no word, or only such as 'about', stands before an answer in its sentence."""
    if len(before) > 60:
        return False
    return FILLERS.issuperset(WORDS.findall(before.lower()))


SUBORDINATE = re.compile(
    r"(?:after|although|though|because|since|whereas|while|without|, as|\(as)\b[^,;]*"
)


def outside(pattern: re.Pattern, sentence: str, candidates: Candidates) -> Candidates:
    """Leave out candidates in what a pattern finds, unless there are no others."""
    others = candidates
    for m in pattern.finditer(sentence):
        start, end = m.span()
        others = [c for c in others if not start <= c.start < end]
    return others or candidates


def main_clause(sentence: str, candidates: Candidates) -> Candidates:
    """Leave out what stands in a reason or concession only: 'E, although A is tempting' -> E"""
    return outside(SUBORDINATE, sentence, candidates)


def select_first_or_last(sentence: str, candidates: Candidates, announced: bool) -> Candidate:
    """Select the first candidate after an announcement, else the last one."""
    return first_or_last(main_clause(sentence, candidates), announced)


BOLD = re.compile(r"\*\*(?!\s)[^*\n]{1,80}(?<!:)\*\*(?!:)")  # **72 clips**, not **Step 1:**


def bold_spans(pattern: re.Pattern, text: str, candidates: Candidates) -> list[tuple[int, int]]:
    """Return the spans in bold that hold a candidate."""
    if "**" not in text:
        return []
    spans = []
    for m in pattern.finditer(text):
        start, end = m.span()
        i = index_from(candidates, start)  # the first candidate in it or behind it
        if i < len(candidates) and candidates[i].start < end:
            spans.append((start, end))
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
BRACKETED = re.compile(r"\([^()]*\)")  # '45 min (0.75 h)' -> 45
COMPARISON = re.compile(r"\s(?:more|less|fewer|times|percent)\b|%")


def is_operand(sentence: str, c: Candidate) -> bool:
    """Tell whether a number is a part of a calculation, not its result: the 12 of '36 = 12 * 3'."""
    if OPERAND_RIGHT.match(sentence, c.end):
        return True
    left = text_before(sentence, c.start, 20).rstrip(" $(")
    if not left.endswith(OPERATORS):
        return False
    if OPERAND_LEFT.search(left):
        return True
    is_quotient = "/" in sentence[c.start : c.end]
    return is_quotient and bool(EXPRESSION.search(left))


def last_result(pattern: re.Pattern, sentence: str, candidates: Candidates) -> Candidate | None:
    """Return what follows the last 'equals' or 'gives' directly: '3 + 4 = 7 of 9' -> 7."""
    last = candidates[-1]
    result = None
    for m in pattern.finditer(sentence, 0, last.start):
        i = index_from(candidates, m.end())
        following = candidates[i]
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
        results = [c for c in candidates if not is_operand(sentence, c)]
        candidates = results or candidates
    candidates = main_clause(sentence, candidates)
    candidates = outside(BRACKETED, sentence, candidates)
    first = candidates[0]
    if len(candidates) == 1:
        return first
    if announced and is_immediate(sentence[: first.start]):
        # 'The answer is 51 for 2 packs' -> 51, '1.5 hours, i.e. 90 minutes' -> 90
        return restated(sentence, candidates) or first
    result = last_result(RESULT, sentence, candidates)
    if result:
        return result
    bold = bold_spans(BOLD, sentence, candidates)
    if len(bold) == 1:
        [(start, _)] = bold
        i = index_from(candidates, start)
        return candidates[i]
    return candidates[-1]  # '11 and 11 makes 22' -> 22


# ---------------- Strings, yes or no

NO_NAME = re.compile(r"""(?ix)
    (?: the|an?|string|words?|letters?|is|are|concatenat\w*|results?|answer|of|last|final|simply
      | just|it|be|would|that|we|get|together|new|so|therefore|thus|hence|not ) \Z""")
NAMED = re.compile(r"\W*(?:(?:the|a|string|word|new|just|simply)\W+){0,4}")
AFTER_NAME = re.compile(r"[.,;!(<}\n]|\s*\Z|\s(?:because|since|as|which|when|from|by|for)\b")
CLAUSE_END = re.compile(r"[,;(<}\n]|\b(?:because|since|as|which|when|from|by|for|if)\b|\Z")


def names_among(candidates: Candidates) -> Candidates:
    """Leave out 'the', 'string', 'is' and the like, unless there is nothing else."""
    names = [c for c in candidates if not NO_NAME.match(c.value)]
    return names or candidates


def select_string(sentence: str, candidates: Candidates, announced: bool) -> Candidate:
    """Select what is quoted or spelled out, else the word after 'gives' or 'is'."""
    first = names_among(candidates)[0]
    is_named = announced and NAMED.fullmatch(sentence, 0, first.start)
    if is_named and AFTER_NAME.match(sentence, first.end):
        return first  # 'The answer is the string yajo, as the letters are ...'
    begin = result_end(sentence, candidates)
    results = [c for c in candidates if c.start >= begin]
    for group in (results, candidates):
        marked = [c for c in group if c.is_marked]
        whole = [c for c in marked if len(c.value) > 1]
        if marked:
            return first_or_last(whole or marked, announced)
    start = results[0].start
    clause_end = CLAUSE_END.search(sentence, start).start()
    words = [c for c in results if c.start < clause_end]
    names = names_among(words or results[:1])
    return first_or_last(names, announced)


STRING_RESULT = re.compile(r"""(?ix) [=:] | \b (?:gives?|giving|gets?|spells?|makes?|making|forms?
    |forming|becomes?|yields?|produces?|into|is|are|to\ get|we\ have) \b""")


def result_end(sentence: str, candidates: Candidates) -> int:
    """Return where the result of a concatenation may begin: after the last 'gives' or 'is'."""
    last = candidates[-1]
    begin = 0
    for m in STRING_RESULT.finditer(sentence):
        if m.end() > last.start:
            break
        begin = m.end()
    return begin


def select_statement(sentence: str, candidates: Candidates, announced: bool) -> Candidate:
    """Select the yes or no that is announced or that a sentence begins with, else the last."""
    candidates = main_clause(sentence, candidates)
    first = candidates[0]
    begins = is_immediate(sentence[: first.start])
    return first_or_last(candidates, announced or begins)


# ---------------- All that is known of one type of answer


class Extractor(NamedTuple):
    """How one set of rules reads one type of answer."""

    candidates: Callable  # text -> values (paper) or Candidates (flexible)
    gold: Callable = str  # gold answer -> value
    is_same: Callable = operator.eq  # (value of a candidate, of the gold answer) -> bool
    select: Callable = select_first_or_last  # flexible: which of a sentence's candidates
    other_forms: Callable = forms.nothing  # flexible: Candidates, read where there are no others
    can_hedge: bool = False  # flexible: 'A or B' is no answer
    is_number: bool = False  # flexible: digits alone need no further reading


# ---------------- The sentence

ANNOUNCEMENTS = {  # what it begins with: all of it; both of a lower-case text
    "-->": re.compile(r"-->"),  # --> yes
    "####": re.compile(r"####"),  # #### 7
    "\\boxed": re.compile(r"\\boxed\{"),  # \boxed{7}
    "answer": re.compile(r"""(?x)
        answer (?: s?\b [^.\n]{0,60}? (?:\b(?:is|are|be)\b|:|=)  # answer (in $) is 7; Answer: C
          | [*_\s]{0,6}\n  # ## Answer
          | > (?<=<answer>)  # <answer>7</answer>
        )"""),
    "option": re.compile(r"option(?: is\b|:)"),
    "choice": re.compile(r"choice(?: is\b|:)"),
    "total": re.compile(r"total[ *]{0,4}\|"),  # | Total | 36 |
}
FOREIGN_ANNOUNCEMENTS = {
    "respuesta": re.compile(r"respuesta\b[^.\n]{0,30}?(?:\bes\b|:)"),  # La respuesta es 7
    "resposta": re.compile(r"resposta\b[^.\n]{0,30}?(?:\b\u00e9|:)"),
    "risposta": re.compile(r"risposta\b[^.\n]{0,30}?(?:\b\u00e8|:)"),
    "r\u00e9ponse": re.compile(r"r\u00e9ponse\b[^.\n]{0,30}?(?:\best\b|:)"),
    "antwort": re.compile(r"antwort\b[^.\n]{0,30}?(?:\b(?:ist|lautet)\b|:)"),
    "\u7b54\u6848": re.compile("\u7b54\u6848\\s?[:\u662f\u4e3a\u70ba]?"),  # Chinese
    "\u7b54\u3048": re.compile("\u7b54\u3048\\s?[:\u306f]?"),  # Japanese
    "\uc815\ub2f5": re.compile("\uc815\ub2f5\\s?[:\uc740]?"),  # Korean
}
POSTPOSED = re.compile(r"""(?x)  # 'So (B) is the best answer.'
    (?: fits\ best | makes\ (?:the\ )?most\ sense
      | is\ (?<=\bis\ )
        (?: the\ (?:\w{1,12}\ ){0,2}(?:answer|option|choice|solution|only\ one) | correct | right )
    ) \b""")
NEARBY = re.compile(r"[^.,;!?\n]{0,25}")
CORRECTION = re.compile(r"""(?x)  # 'The answer is 12. Wait, it is 15.'
    (?:Wait|wait|Hold\ on|Oops|Actually|Correction|Sorry|Hmm|Scratch\ that)\b
  | I\ (?:mean|made\ an?\ (?:\w{1,12}\ )?(?:mistake|error))\b""")
CONCLUSION = re.compile(r"""(?ix)  # 'So she has twelve.'
    (?:\A|[.!?]\s{1,3}|\n)\s{0,3}(?:so|therefore|thus|hence|altogether|in\ total|in\ all)\b""")
MAX_SENTENCE = 1000  # characters before and behind its answer
SENTENCE_END = re.compile(r"""(?x)
    [.!?] (?!\ =) (?<!i\.e\.) (?<!e\.g\.) (?<!approx\.) (?<!Mr\.) (?<!Mrs\.) (?<!Dr\.)
    (?= [*"')\]]{0,3} (?:\s|\Z) )
  | \n""")
BOLD_OPENING = re.compile(rf"(?:\A|\n|[.!?]\s)\s{{0,3}}{BOLD.pattern}")


def find_sentence(text: str, start: int, position: int) -> tuple[int, int]:
    """Return begin and end of the sentence that position is in; it begins at `start` or later."""
    begin = max(start, position - MAX_SENTENCE)
    for m in SENTENCE_END.finditer(text, begin, position):
        begin = m.end()
    end = min(len(text), position + MAX_SENTENCE)
    m = SENTENCE_END.search(text, position, end)
    if m:
        end = m.start()
    return begin, end


def read_sentence(
    extractor: Extractor, text: str, span: tuple[int, int], candidates: Candidates, announced: bool
) -> Candidate | None:
    """Select a candidate of a sentence, or what it says in other forms ('twelve'), or None."""
    begin, end = span
    inside = [c for c in candidates if begin <= c.start < end]
    sentence = text[begin:end]
    others = []
    if not inside:
        others = accepted(sentence, extractor.other_forms(sentence))
    elif announced:
        before = text[begin : inside[0].start]
        if not is_immediate(before):
            first = extractor.other_forms(before)[:1]
            others = [c for c in first if is_immediate(sentence[: c.start])]
    if len(inside) == 1 and not others:
        return inside[0]
    inside = others or moved(inside, -begin)
    if not inside:
        return None
    selected = extractor.select(sentence, inside, announced)
    [chosen] = moved([selected], begin)
    return chosen


WORD = re.compile(r"[^\W_]")


def read_announced(
    extractor: Extractor, text: str, start: int, candidates: Candidates
) -> Candidate | None:
    """Read the sentence that begins at start, else that of the next candidate."""
    i = index_from(candidates, start)
    following = candidates[i:]
    if len(following) == 1:
        before = text[start : following[0].start]
        if len(before) < 4 and not before.strip(" :$\"'*("):
            return following[0]  # ' is 12.', which most announcements are
    word = WORD.search(text, start)
    if not word:
        return None
    _, end = find_sentence(text, start, word.start())
    chosen = read_sentence(extractor, text, (start, end), candidates, True)
    if chosen or not following:
        return chosen
    span = find_sentence(text, start, following[0].start)
    return read_sentence(extractor, text, span, candidates, True)


def read_last(extractor: Extractor, text: str, candidates: Candidates) -> Candidate | None:
    """Read the last sentence that has a candidate; a conclusion after it may use other forms."""
    last = candidates[-1]
    for m in CONCLUSION.finditer(text, last.end):
        end = m.end()
        span = find_sentence(text, end, end)
        concluded = read_sentence(extractor, text, span, [], False)
        if concluded:
            return concluded
    bold = bold_spans(BOLD_OPENING, text, candidates)
    if len(bold) == 1:  # '**72 clips**, as 48 were sold in April. And 24 in May.'
        return read_sentence(extractor, text, bold[0], candidates, True)
    span = find_sentence(text, 0, last.start)
    return read_sentence(extractor, text, span, candidates, False)


STEPS = re.compile(r"""(?x) \s*
    (?: 1[.)]\s [^\n]*\n (?:[^\n]*\n){0,9}? \s*2[.)]\s  # a numbered list
      | \$?\d [^\n=]{0,60} = [^\n]* \n [^\n=]{0,60}\d\ ?=  # lines of calculations
    )""")


def begins_with_answer(text: str, candidates: Candidates) -> bool:
    """Tell whether a text goes on after 'Therefore, the answer is', which its prompt ended with."""
    first = WORD.search(text)
    if first.start() >= candidates[0].start:
        return not STEPS.match(text)
    if not first[0].isupper():
        return True
    body = text.rstrip()[:-1]
    return not SENTENCE_END.search(body)


def postposed(text: str, candidates: Candidates, start: int) -> Candidate | None:
    """Return what is called the answer afterwards: 'So (B) is the best answer.'"""
    found = None
    for m in POSTPOSED.finditer(text, start):
        begin = m.start()
        i = index_from(candidates, begin)
        for c in candidates[i - 1 : i]:  # the one before it, if any
            if NEARBY.fullmatch(text, c.end, begin):
                found = c
    return found


CORRECTED = (".", "!", "?", ")", "\n", "No,", "Oh,")  # what stands before a correction


def corrected(text: str, candidates: Candidates, start: int) -> Candidates:
    """Return the candidates after the last correction of an answer that was given before."""
    position = len(text)
    for m in CORRECTION.finditer(text, start):
        before = text_before(text, m.start(), 6).rstrip(" ")
        if before.endswith(CORRECTED) or m[0].startswith("I "):
            position = m.end()
    i = index_from(candidates, position)
    return candidates[i:]


def last_announcement(lowered: str, limit: int, announcements: dict) -> tuple[int, int]:
    """Return (start, end) of the last announcement that begins before limit, or (-1, -1)."""
    last = -1, -1
    for opening, pattern in announcements.items():
        start = lowered.rfind(opening, 0, limit)
        while start >= 0:
            m = pattern.match(lowered, start)
            if m:
                last = max(last, m.span())
                break
            start = lowered.rfind(opening, 0, start)
    return last


def after_announcement(text: str) -> str:
    """Return what follows the last announcement: 'So 7. The answer is 7.' -> ' 7.'; else ""."""
    _, end = last_announcement(text.lower(), len(text), ANNOUNCEMENTS)
    if end < 0:
        return ""
    return text[end:]


def announced(extractor: Extractor, text: str, candidates: Candidates) -> Candidate | None:
    """Return what the last announcement announces, or one of two before it, or None."""
    lowered = text.lower()
    if len(lowered) != len(text):  # a few letters of other alphabets become two
        lowered = text
    kinds = ANNOUNCEMENTS
    start, end = last_announcement(lowered, len(text), kinds)
    if start < 0:
        kinds = FOREIGN_ANNOUNCEMENTS
        start, end = last_announcement(lowered, len(text), kinds)
    for _ in range(3):
        if start < 0:
            return None
        chosen = read_announced(extractor, text, end, candidates)
        if chosen:
            return chosen
        start, end = last_announcement(lowered, start, kinds)
    return None


def choose(
    extractor: Extractor, text: str, candidates: Candidates, goes_on: bool
) -> Candidate | None:
    """Return the candidate that a text commits itself to last, or None.

    goes_on: the prompt announced the answer, so that the text may begin with it.
    """
    chosen = announced(extractor, text, candidates) or postposed(text, candidates, 0)
    if not chosen and goes_on and begins_with_answer(text, candidates):
        chosen = read_announced(extractor, text, 0, candidates)
    if not chosen:
        return read_last(extractor, text, candidates)
    end = chosen.end
    if len(text) - end < 8:
        return chosen
    later = corrected(text, candidates, end)
    if later:
        return read_last(extractor, text, later)
    return postposed(text, candidates, end) or chosen
