"""Find the sentence in which a text commits itself to its answer, and read it.

    '3 * 4 = 12. The answer is 12. Wait, and 1 more. So 13.'  ->  the sentence 'So 13.'

An announcement ('The answer is', '-->', ...) counts more than bold, and bold more than the place at
the end; of several announcements the last counts, and a correction after it counts more.
"""

import bisect
import re

from candidates import Candidate, Candidates
from rejection import accepted, moved
from selection import BOLD, Extractor, bold_spans, is_immediate

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
    limit = min(len(text), position + MAX_SENTENCE)
    end = SENTENCE_END.search(text, position, limit)
    return begin, end.start() if end else limit


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
    elif announced and not is_immediate(text[begin : inside[0].start]):
        others = extractor.other_forms(text[begin : inside[0].start])
        others = [c for c in others[:1] if is_immediate(sentence[: c.start])]
    if len(inside) == 1 and not others:
        return inside[0]
    inside = others or moved(inside, -begin)
    if not inside:
        return None
    [chosen] = moved([extractor.select(sentence, inside, announced)], begin)
    return chosen


WORD = re.compile(r"[^\W_]")


def read_announced(
    extractor: Extractor, text: str, start: int, candidates: Candidates
) -> Candidate | None:
    """Read the sentence that begins at start, else that of the next candidate."""
    i = bisect.bisect_left(candidates, (start,))  # the first of them
    if i == len(candidates) - 1 and candidates[i].start - start < 4:
        if not text[start : candidates[i].start].strip(" :$\"'*("):
            return candidates[i]  # ' is 12.', which most announcements are
    word = WORD.search(text, start)
    if not word:
        return None
    span = start, find_sentence(text, start, word.start())[1]
    if chosen := read_sentence(extractor, text, span, candidates, True):
        return chosen
    if i == len(candidates):
        return None
    span = find_sentence(text, start, candidates[i].start)
    return read_sentence(extractor, text, span, candidates, True)


def read_last(extractor: Extractor, text: str, candidates: Candidates) -> Candidate | None:
    """Read the last sentence that has a candidate; a conclusion after it may use other forms."""
    last = candidates[-1]
    for m in CONCLUSION.finditer(text, last.end):
        span = find_sentence(text, m.end(), m.end())
        if concluded := read_sentence(extractor, text, span, [], False):
            return concluded
    bold = bold_spans(BOLD_OPENING, text, candidates)
    if len(bold) == 1:  # '**72 clips**, as 48 were sold in April. And 24 in May.'
        return read_sentence(extractor, text, bold[0], candidates, True)
    return read_sentence(extractor, text, find_sentence(text, 0, last.start), candidates, False)


STEPS = re.compile(r"""(?x) \s*
    (?: 1[.)]\s [^\n]*\n (?:[^\n]*\n){0,9}? \s*2[.)]\s  # a numbered list
      | \$?\d [^\n=]{0,60} = [^\n]* \n [^\n=]{0,60}\d\ ?=  # lines of calculations
    )""")


def begins_with_answer(text: str, candidates: Candidates) -> bool:
    """Tell whether a text goes on after 'Therefore, the answer is', which its prompt ended with."""
    first = WORD.search(text)
    if first and first.start() >= candidates[0].start:
        return not STEPS.match(text)
    return not (first and first[0].isupper() and SENTENCE_END.search(text.rstrip()[:-1]))


def postposed(text: str, candidates: Candidates, start: int) -> Candidate | None:
    """Return what is called the answer afterwards: 'So (B) is the best answer.'"""
    found = None
    for m in POSTPOSED.finditer(text, start):
        i = bisect.bisect_left(candidates, (m.start(),)) - 1
        if i >= 0 and NEARBY.fullmatch(text, candidates[i].end, m.start()):
            found = candidates[i]
    return found


def corrected(text: str, candidates: Candidates, start: int) -> Candidates:
    """Return the candidates after the last correction of an answer that was given before."""
    position = len(text)
    for m in CORRECTION.finditer(text, start):
        before = text[max(0, m.start() - 6) : m.start()].rstrip(" ")
        if before.endswith((".", "!", "?", ")", "\n", "No,", "Oh,")) or m[0].startswith("I "):
            position = m.end()
    return [c for c in candidates if c.start >= position]


def last_announcement(lowered: str, limit: int, announcements: dict) -> tuple[int, int]:
    """Return (start, end) of the last announcement that begins before limit, or (-1, -1)."""
    last = -1, -1
    for opening, pattern in announcements.items():
        start = lowered.rfind(opening, 0, limit)
        while start >= 0 and not (m := pattern.match(lowered, start)):
            start = lowered.rfind(opening, 0, start)
        if start >= 0:
            last = max(last, (start, m.end()))
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
        if chosen := read_announced(extractor, text, end, candidates):
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
    if len(text) - chosen.end < 8:
        return chosen
    if later := corrected(text, candidates, chosen.end):
        return read_last(extractor, text, later)
    return postposed(text, candidates, chosen.end) or chosen
