"""Find what a text itself rejects: 'not A', "isn't B", 'C is wrong', 'D or E?'."""

import bisect
import itertools
import re

from candidates import Candidate, Candidates, has_one_of

REJECTIONS = (
    "ot ",
    "n't",
    "than ",
    "nstead",
    "either",
    "nor ",
    "xclud",
    "liminat",
    " out ",
    "onger ",
)
REJECTED_AFTER = re.compile(r"""(?x)  # not A; isn't B; rather than C
    (?: not (?<!\wnot) (?!\ only) | Not | n't | neither | Neither | nor (?<!\wnor)
      | rather\ than | Rather\ than | other\ than | instead\ of | Instead\ of
      | exclud(?:e|es|ed|ing) | eliminat(?:e|es|ed|ing) | ruled\ out | rules?\ out
      | ruling\ out | cannot\ be | no\ longer )
    \s (?: (?:be|the|an?|just|simply|equal\ to|option|choice|answer) \s ){0,3}
    ([\s("'*\[]{0,4})""")
REJECTED_BEFORE = re.compile(r"""(?x)  # A is wrong; B can be ruled out; C is not the answer
    [)\]}"'*]{0,4} \ (?: (?:is|was|are|seems) (?:\ (?:clearly|also|definitely))?
          \ (?:wrong|incorrect|false|invalid|impossible|out|ruled\ out|eliminated)
        | (?:is|was|are) (?:n't|\ not)
          \ (?:correct|right|true|possible|the\ (?:\w{1,12}\ )?(?:answer|option|choice))
        | (?:seem|look)(?:s|ed) \ (?:right|correct|good|likely|tempting) ,?\ (?:but|yet)
        | can (?:not|'t)\ be | can\ be\ (?:ruled\ out|eliminated|excluded|rejected)
      ) \b""")
CHAINED = re.compile(r"""(?x)  # not A or B; A is wrong and so is B
    [\s)\]"'*,]{0,4} (?:is\ \w{1,12}\ )? \b (?:n?or|and\ so\ is) \b [\s("'*\[]{0,4}""")
LISTED = re.compile(r"""[\s)\]"'*]{0,4}(?:,|,?\s(?:and|or|&))[\s("'*\[]{0,4}""")  # 'A, B and C'
ENDS = ("", ".", ";", ":", "!", "\n")
VERBS = ("is", "wa", "ar", "se", "lo", "ca", "we", "do", "an", "or", "? ")  # of what rejects
LIST_REJECTIONS = (" are ", " were ", " can", " do")
ALL_REJECTED = re.compile(r"""(?x)  # ... are wrong; ... can be ruled out; ... don't fit
    [)\]}"'*]{0,4} \ (?:
        (?:are|were) (?:\ \w{1,12}ly)? \ (?:wrong|incorrect|false|impossible|out|not\b)
      | can(?:not|\ be\ ruled|\ be\ excluded) | (?:don't|do\ not)\ (?:fit|work|apply)
    ) \b""")
ASKED = re.compile(r"""[)\]"'*]{0,3}[?:]""")
HEDGED = re.compile(r"""[\s)\]"'*]*(?:\b(?:or|and)\b|/|&)[\s("'*\[]*""")  # A or B


QUESTIONED = re.compile(
    r"(?:\A|[.!?\n]\s{0,3})(?:Is|Are|Was|Could|Would|Should|Does|Do|Can)\b[^.!?\n]{0,80}\Z"
)


def is_asked(text: str, c: Candidate) -> bool:
    """Tell whether a candidate ends a question: 'Is it (A)? ...'"""
    if "?" not in text[c.end : c.end + 3]:
        return False
    return bool(QUESTIONED.search(text[max(0, c.start - 90) : c.start]))


def rejected_starts(text: str, candidates: Candidates) -> set[int]:
    """Return where candidates start that the text says are not the answer."""
    after = set()
    for m in REJECTED_AFTER.finditer(text):
        after.update(range(m.start(1), m.end() + 1))
    rejected = listed_and_rejected(text, candidates)
    previous_end = -1  # of a candidate that was rejected
    for c in candidates:
        if (
            c.start in after
            or (previous_end >= 0 and CHAINED.fullmatch(text, previous_end, c.start))
            or REJECTED_BEFORE.match(text, c.end)
            or is_asked(text, c)
        ):
            rejected.add(c.start)
            previous_end = c.end
        else:
            previous_end = -1
    return rejected


def listed_and_rejected(text: str, candidates: Candidates) -> set[int]:
    """Return where candidates start that are rejected together: 'A, B and D are wrong'."""
    rejected = set()
    is_listed = False  # before one that is rejected
    for c, following in zip(reversed(candidates), [None, *reversed(candidates)], strict=False):
        if ALL_REJECTED.match(text, c.end):
            is_listed = following is None or not LISTED.fullmatch(text, c.end, following.start)
        elif following is None or not LISTED.fullmatch(text, c.end, following.start):
            is_listed = False
        if is_listed:
            rejected.add(c.start)
    return rejected


def accepted(text: str, candidates: Candidates) -> Candidates:
    """Leave out what the text itself rejects: 'not A', "isn't B", 'C is wrong', 'not A or B'."""
    rejected = rejected_starts(text, candidates)
    return [c for c in candidates if c.start not in rejected]


def moved(candidates: Candidates, by: int) -> Candidates:
    """Return candidates of a part of a text with their places in the text, or the reverse."""
    return [Candidate(c.start + by, c.end + by, c.value, c.is_marked) for c in candidates]


def rejected_by_what_follows(text: str, candidates: Candidates, chosen: Candidate) -> bool:
    """Tell whether what stands behind a candidate rejects it: '... is wrong', '... and B are'."""
    end = chosen.end
    following = text[end : end + 3]
    if following[:1] in ENDS or (following[0] == " " and following[1:] not in VERBS):
        return False
    if following[0] == "," and len(candidates) == 1:
        return False
    if is_asked(text, chosen) or REJECTED_BEFORE.match(text, end):
        return True
    if not has_one_of(text[end : end + 80], LIST_REJECTIONS):
        return False
    near = [c for c in candidates if chosen.start <= c.start < chosen.start + 60]
    return chosen.start in listed_and_rejected(text, near)


def is_rejected(text: str, candidates: Candidates, chosen: Candidate) -> bool:
    """Tell whether the text around a candidate rejects it."""
    if rejected_by_what_follows(text, candidates, chosen):
        return True
    begin = max(0, chosen.start - 60)
    before = text[begin : chosen.start]
    if len(before) < 4 or not has_one_of(before, REJECTIONS):
        return False
    near = [c for c in candidates if begin <= c.start <= chosen.start]
    return chosen.start - begin in rejected_starts(before, moved(near, -begin))


def is_hedged(text: str, candidates: Candidates, chosen: Candidate) -> bool:
    """Tell whether two answers are given as one: '(A) or (B)', 'yes and no'."""
    i = bisect.bisect_left(candidates, (chosen.start,))
    for a, b in itertools.pairwise(candidates[max(0, i - 1) : i + 2]):
        if a.value != b.value and HEDGED.fullmatch(text, a.end, b.start):
            return True
    return False


def without_questions(text: str, candidates: Candidates) -> Candidates:
    """Leave out what a question asks about: 'Yes or no? Yes.' -> the last yes"""
    asked = set()
    for a, b in itertools.pairwise(candidates):
        if HEDGED.fullmatch(text, a.end, b.start) and ASKED.match(text, b.end):
            asked |= {a.start, b.start}
    return [c for c in candidates if c.start not in asked]
