"""Find what in a text may be its answer: numbers, letters of choices, yes or no, strings.

read_numbers("5 - 8 = -3")  # candidates of value 5, 8 and -3
"""

import bisect
import contextlib
import itertools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple


class Candidate(NamedTuple):
    """Something in a text that may be its answer."""

    start: int  # of its first character
    end: int
    value: Any
    is_marked: bool = False  # a string in quotes or spelled out


Candidates = list[Candidate]


def has_one_of(text: str, parts: tuple[str, ...]) -> bool:
    """Tell whether a text has one of some parts; a third of the time of any()."""
    for part in parts:
        if part in text:
            return True
    return False


def index_from(candidates: Candidates, start: int) -> int:
    """Return the index of the first candidate that begins at a place or later."""
    return bisect.bisect_left(candidates, (start,))


def text_before(text: str, position: int, most: int) -> str:
    """Return what stands before a place, at most so many characters."""
    begin = max(0, position - most)
    return text[begin:position]


NUMBER_PATTERN = re.compile(r"""(?ax)
    [0-9] [0-9]*  # so, not as \d+, it is searched three times as fast
    (?: (?<!\d{4}) (?:,\d{3})+ (?!\d)  # 1,234
      | (?<!\d{4}) (?:\ \d{3})+ (?![\d/]|[.,]\d{3})  # 70 000
    )? (?:\.\d+)?
    (?: (?=[\ */^ehkmbtx])
      ( (?:\ ?(?:[*x]|times)\ ?10)? \^ [({]? -?\d{1,2} [)}]?  # 5^2, 1.2 x 10^3, 10^{-2}
      | e[+-]?\d{1,3}\b  # 1e3
      | / (?<!/\d/) (?<!/\d\d/) \d{1,6} (?![\d/]|\.\d)  # 1/2, not 1/2/2003
      | \ (?:and\ )?\d{1,4}/\d{1,4} (?![\d/])  # 5 1/2
      | k\b | \ ?(?:hundred|thousand|million|billion|trillion)\b  # 1.5k, 2.5 million
      )
    )?""")
SIGNS = ("-", "$", ".")
NO_SIGN_AFTER = (".", ")", "]", "_")
NUMBER_MARKS = str.maketrans("\u2212", "-", ",$ ")
SCALES = dict(k=1e3, hundred=1e2, thousand=1e3, million=1e6, billion=1e9, trillion=1e12)


def parse_number(text: str) -> float:
    """'$1,234.50' -> 1234.5; a minus sign may be U+2212."""
    return float(text.translate(NUMBER_MARKS))


def extended_value(number: str, tail: str) -> float:
    """Return what a number is with what follows it: ('5', ' 1/2') -> 5.5, ('1.2', ' x 10^3')."""
    base = parse_number(number)
    digits = list(map(int, re.findall(r"-?\d+", tail)))
    if not digits:
        return base * SCALES[tail.strip()]
    if tail[0] == "e":
        return parse_number(number + tail)
    if tail[0] == "^":
        return base ** digits[0]
    if "^" in tail:
        return base * 10.0 ** digits[1]
    if len(digits) == 1:
        return base / digits[0]
    return base + math.copysign(digits[0] / digits[1], base)


def sign_start(text: str, start: int, has_point: bool) -> tuple[int, str]:
    """Return where the number whose first digit is at start begins, and its sign and point.

    ' -$5' -> (1, '-'), '$.5' -> (0, '.'); the 4 of '3-4' and of 'x-4' has no sign.
    """
    mark = ""
    before = text_before(text, start, 4)
    if before.endswith("."):
        if has_point or before[-2:-1].isalnum():
            return start, ""
        mark = "."
        start -= 1
    before = text_before(text, start, 3)
    bare = before.rstrip("$-")
    last = bare[-1:]
    if last.isalnum() or last in NO_SIGN_AFTER:
        return start, mark
    signs = before.removeprefix(bare)[-2:]
    if "-" in signs:
        mark = f"-{mark}"
    return start - len(signs), mark


def signed_candidate(text: str, m: re.Match) -> Candidate:
    """Return the candidate of a match of NUMBER_PATTERN with its sign and what follows it."""
    start, end = m.span()
    tail = m[1] or ""
    number = m[0].removesuffix(tail)
    if text[start - 1 : start] in SIGNS:
        start, marks = sign_start(text, start, "." in number)
        number = marks + number
    value = parse_number(number)
    if tail:
        with contextlib.suppress(OverflowError, ZeroDivisionError):  # 99^99, 5/0
            value = extended_value(number, tail.lower())
    return Candidate(start, end, value)


def read_numbers(text: str) -> Candidates:
    """By value: '18.00' -> 18, '$1,234.50' -> 1234.5, '5 - 8 = -3' -> 5, 8, -3, '1/2' -> 0.5"""
    candidates = []
    for m in NUMBER_PATTERN.finditer(text):
        number = m[0]
        start, end = m.span()
        if number.isdigit() and text[start - 1 : start] not in SIGNS:  # most are
            candidates.append(Candidate(start, end, float(number)))
        else:
            candidates.append(signed_candidate(text, m))
    return candidates


ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
    fifteen sixteen seventeen eighteen nineteen""".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
UNITS = {word: i for i, word in enumerate(ONES)} | {word: 10 * i for i, word in enumerate(TENS, 2)}
MULTIPLES = {"dozen": 12, **SCALES}
PARTS = dict(half=2, third=3, quarter=4, fourth=4, fifth=5, sixth=6, eighth=8, ninth=9, tenth=10)
PARTS |= {f"{word}s": part for word, part in PARTS.items()} | {"halves": 2}
NUMBER_WORD = "|".join([*UNITS, *MULTIPLES, *PARTS])
WORDS_PATTERN = re.compile(rf"""(?ix)
    \b (?<!\bno\ ) (?<!\bthe\ ) (?<!which\ ) (?<!this\ ) (?<!that\ ) (?<!each\ ) (?<!any\ )
    (?! k\b | (?:{"|".join(PARTS)})\b (?!\W*\Z) )  # 'half.', but not 'third, ...'
    (?:a\ )? (?:{NUMBER_WORD}) \b  # twelve, a dozen, not 'no one', 'which one'
    (?: [-\ ] (?:and\ )? (?:a\ )? (?:{NUMBER_WORD}) \b )*  # one hundred and twenty-four
    (?! \ (?:of|another|by|times|plus|minus|more|less)\b | -\w )  # one of them
    """)


def words_value(phrase: str) -> float:
    """'one hundred and five' -> 105, 'two thirds' -> 0.667, 'two and a half' -> 2.5"""
    total = 0.0
    current = 0.0
    words = re.findall(r"\w+", phrase.lower())
    for i, word in enumerate(words):
        if word in UNITS:
            current += UNITS[word]
        elif word in PARTS and words[i - 1] == "a" and current:
            current += 1 / PARTS[word]
        elif word in PARTS:
            current = max(current, 1) / PARTS[word]
        elif word in ("hundred", "dozen"):
            current = max(current, 1) * MULTIPLES[word]
        elif word in MULTIPLES:
            total += max(current, 1) * MULTIPLES[word]
            current = 0
    return total + current


def read_number_words(text: str) -> Candidates:
    """'So she has twenty-four.' -> 24"""
    found = WORDS_PATTERN.finditer(text)
    return [Candidate(*m.span(), words_value(m[0])) for m in found]


YES_NO_WORDS = {True: "yes", False: "no"}
YES_NO_PATTERN = re.compile(r"""(?x) [YyNn] (?<!\w.)  # begins with a set of characters: fast
    (?i: (?<=y) (es|eah|ep|up)  # "Yes;"
      | (?<=n) o(?:pe|\ way)?
        (?! \ (?!(?:because|since|as|the|it|he|she|they|you|we|i|but|for|this|that|there)\b) [a-z]
          | [-.'][a-z\d] )  # 'no;' and 'no because', not 'no evidence', 'no longer', 'no-one'
    ) \b""")
STATE_WORDS = ("eads", "ails", "rue", "alse", "ly not", "course", "solutely", "tainly", "nitely")
STATE_PATTERN = re.compile(r"""(?ix)
    (?: ( (?:\bnot|n't|\bno\ longer|\bnever) \ (?:still\ )? )?
        \b (?: (heads) | tails) \ up \b (?! \ or\b )  # not heads up
      | (?: \A\W{0,5} | :\ | > | \b(?:statement|claim|it|that|this|answer)(?:\ is|'s)\ )
        (?:\w{1,12}ly\ )? (not\ )? (?: (true|heads) | false | tails )
        (?= \W* (?:\Z|[.,;!]|</) )  # 'This is true.', not 'it is true that'
      | \b (?:absolute|certain|definite|probab)ly\ (not) (?= \W* (?:\Z|[.,;!]) )
      | \A\W{0,5} (of\ course|(?:absolute|certain|definite)ly) (?= \W* (?:\Z|[.,;!]) )
    )""")
UNCERTAIN = re.compile(r"\b(?:(?:if|whether)\b[^,.]{0,40}|chance of being )\Z")
DENIED = re.compile(r"\bnot (?:the case|true|correct) that [^,.]{0,40}\Z")


def read_yes_no(text: str) -> Candidates:
    """Beside any punctuation: '"No;"' -> no, 'Nope.' -> no"""
    candidates = []
    for m in YES_NO_PATTERN.finditer(text):
        value = YES_NO_WORDS[bool(m[1])]
        candidates.append(Candidate(*m.span(), value))
    return candidates


def read_states(text: str) -> Candidates:
    """What says yes or no in other words: 'still heads up', 'True.' -> yes; 'not true.' -> no"""
    candidates = []
    if not has_one_of(text, STATE_WORDS):
        return candidates
    for m in STATE_PATTERN.finditer(text):
        before = text_before(text, m.start(), 60)
        if UNCERTAIN.search(before):
            continue
        is_yes = bool(m[2] or m[4] or m[6])
        for negation in (m[1], m[3], DENIED.search(before)):
            if negation:
                is_yes = not is_yes
        value = YES_NO_WORDS[is_yes]
        candidates.append(Candidate(*m.span(), value))
    return candidates


STRING_PATTERN = re.compile(r"""(?x)  # [^\W\d_]: a letter of any alphabet; "y", "a" and "j"
        ( (?: (?:["'`]|\*\*) [^\W\d_] (?:["'`]|\*\*) (?:[ ,.+&-]{1,4}(?:and[ ])?)? ){2,9} )
      | ["*`] ([^"*`\n]{1,200}) ["*`]  # "y a j o", **yajo**
      | (?<!\w)' ([^\W\d_]{2,40}) '(?!\w)  # 'yajo'
      | ((?<![^\W\d_]) [^\W\d_] (?:[ ,.-]{1,3} [^\W\d_] (?![^\W\d_']))+)  # y-a-j-o
      | ([^\W\d_]+)  # yajo""")


def keep_letters(text: str) -> str:
    """'Y. a-j-o' -> 'yajo'"""
    return "".join(filter(str.isalpha, text)).lower()


def read_strings(text: str) -> Candidates:
    """By letters alone, in lower case: 'so "Y.A.J.O."' -> so, yajo (marked)"""
    candidates = []
    for m in STRING_PATTERN.finditer(text):
        letters = keep_letters(m[0])
        if m[1]:
            letters = keep_letters(m[0].replace("and ", ""))
        if letters:
            candidates.append(Candidate(*m.span(), letters, is_marked=not m[5]))
    return candidates


BRACKETS = ("(", "[", "{")
CLOSING = (")", "]", "}")
AFTER_CAPITAL = re.compile(r"""(?x) -?\w | '\w  # no letter of its own
    | \ (?! (?: because|is|are|since|as|and|or|which|with|rather|instead|but|was|were|would|seems
      |fits|for ) \b ) [a-z]  # 'A dog', but 'A is right'
    """)
BEFORE_SMALL = re.compile(r"""(?x)  # 'The answer is b.', 'Answer: b'
    (?: \b[Ii]s | : | [Oo]ption | [Cc]hoice | --> | \#\#\#\# | > | \A ) \s{0,3} ["'*]{0,3} \Z""")
AFTER_SMALL = re.compile(r"""(?x) ["'*]{0,3} (?: [).,;:!<] (?!\w) | \s*\Z | \ because\b | \n )""")


def letter_reader(last: str) -> Callable[[str], Candidates]:
    """Return a reader of the letters A to last, which gives them as capitals."""
    alone = re.compile(rf"[A-{last}a-{last.lower()}](?<!\w.)(?<!\w'.)(?!\w|'\w)")

    def is_choice(text: str, start: int, end: int) -> bool:
        """Tell whether a letter names a choice: 'C.', '(b)', 'is b.', not 'A dog' or 'a dog'."""
        if text[start - 1 : start] in BRACKETS and text[end : end + 1] in CLOSING:
            return True
        if text[start] <= "Z":
            return not AFTER_CAPITAL.match(text, end)
        if not AFTER_SMALL.match(text, end):
            return False
        before = text_before(text, start, 12)
        return bool(BEFORE_SMALL.search(before))

    def read_letters(text: str) -> Candidates:
        """Return the letters of a text."""
        found = [m for m in alone.finditer(text) if is_choice(text, *m.span())]
        return [Candidate(*m.span(), m[0].upper()) for m in found]

    return read_letters


def nothing(text: str) -> Candidates:
    """Read no other forms of an answer."""
    return []


# ---------------- What a text rejects

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
    return bool(QUESTIONED.search(text_before(text, c.start, 90)))


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
    following = None
    for c in reversed(candidates):
        is_listed = following and LISTED.fullmatch(text, c.end, following.start)
        if not is_listed:  # the last of its list
            all_are = ALL_REJECTED.match(text, c.end)
        if all_are:
            rejected.add(c.start)
        following = c
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
    start = chosen.start
    end = chosen.end
    sign = text[end : end + 1]
    verb = text[end + 1 : end + 3]
    if sign in ENDS or (sign == " " and verb not in VERBS):
        return False
    if sign == "," and len(candidates) == 1:
        return False
    if is_asked(text, chosen) or REJECTED_BEFORE.match(text, end):
        return True
    if not has_one_of(text[end : end + 80], LIST_REJECTIONS):
        return False
    near = [c for c in candidates if start <= c.start < start + 60]
    return start in listed_and_rejected(text, near)


def is_rejected(text: str, candidates: Candidates, chosen: Candidate) -> bool:
    """Tell whether the text around a candidate rejects it."""
    if rejected_by_what_follows(text, candidates, chosen):
        return True
    start = chosen.start
    before = text_before(text, start, 60)
    if len(before) < 4 or not has_one_of(before, REJECTIONS):
        return False
    begin = start - len(before)
    near = [c for c in candidates if begin <= c.start <= start]
    inside = moved(near, -begin)
    return len(before) in rejected_starts(before, inside)


def is_hedged(text: str, candidates: Candidates, chosen: Candidate) -> bool:
    """Tell whether two answers are given as one: '(A) or (B)', 'yes and no'."""
    i = index_from(candidates, chosen.start)
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
