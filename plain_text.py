"""Write a completion plainly, before its answer is read: '\\frac{1}{2}', '１２', '½', 'Q: ...'.

normalize("1\\,234 \\times 10²\n\nQ: What is 3 + 4?")  # '1,234 * 10^2'
"""

import re
import unicodedata

MAX_SCAN_CHARS = 100_000  # at the beginning and at the end of a completion
QUESTION = re.compile(r"\n\s{0,9}(?:Q|Question|Human|User)\s?\d{0,3}:", re.IGNORECASE)
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
    if m[0].isdecimal():
        return str(unicodedata.decimal(m[0]))
    return " " + unicodedata.normalize("NFKC", m[0]).replace("\u2044", "/")


def plain_unicode(text: str) -> str:
    """Write other digits, signs, spaces, quotes and fractions as in ASCII: '１０²' -> '10^2'"""
    text = RAISED.sub(lambda m: "^" + m[0].translate(LOWERED), text.translate(PLAIN))
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
    is_recital = not head.strip() or (RECITAL.search(head) and head.rstrip().endswith(":"))
    if others and is_recital:
        return OWN_ANSWER.split(others[-1], 1)[-1]
    return head


def normalize(text: str) -> str:
    """Return a text's own reply in plain characters; of a long one the ends."""
    if len(text) > 2 * MAX_SCAN_CHARS:  # a model that repeats itself must not hold up the others
        text = f"{text[:MAX_SCAN_CHARS]}\n{text[-MAX_SCAN_CHARS:]}"
    if not text.isascii():
        text = plain_unicode(text)
    if "\\" in text or "{" in text:
        text = plain_latex(text)
    if "minus " in text or "negative " in text:
        text = MINUS.sub("-", text)
    if ":" in text and ("Q" in text or "q" in text or "Human:" in text or "User:" in text):
        text = own_reply(text)
    return text
