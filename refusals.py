"""What a server says instead of an answer: its status, its words, its code, how long to wait.

    read_refusal -> server_words, error_code, retry_after

Errors inside a 200 have the same forms (replies.py).
"""

import contextlib
import json
import re
import time
from collections.abc import Iterable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

import servers

STOPPING_CODES = ("insufficient_quota", "billing_hard_limit_reached")
FLAGGED = "content_filter"  # the code of a question that a moderator refused
MAX_DEPTH = 8  # of errors in errors


class Refusal(NamedTuple):
    """What a server says instead of an answer: an HTTP error, or an error inside a 200."""

    status: int
    text: str
    code: str | None = None  # of the error
    param: str | None = None  # that is refused
    wait: float | None = None  # seconds that it asks for


class StatusError(Exception):
    """A reply with a status that is no success."""

    def __init__(self, response: Any) -> None:
        """Keep a response of httpx2."""
        super().__init__(response.status_code)
        self.response = response


def read_refusal(response: Any) -> Refusal:
    """Return what a response that is no success says, in the server's words."""
    body = None
    with contextlib.suppress(ValueError, RecursionError):
        body = json.loads(response.content)
    words = server_words(body)
    if not words:
        page = response.content[:4000].decode("utf-8", "replace")
        words = re.sub(r"<[^<>]*>", " ", page)
    status = response.status_code
    if status < 400:
        address = response.headers.get("location", "nowhere")
        words = f"it redirects to {address}"
    error = error_object(body)
    code = error_code(error)
    text = f"the server answered {status}: {words}"
    wait = retry_after(response.headers)
    return Refusal(status, text, code, error.get("param"), wait)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a server asks to wait: milliseconds, seconds, or an HTTP date."""
    try:
        if "retry-after-ms" in headers:
            return float(headers["retry-after-ms"]) / 1000
        wait = headers["retry-after"]
        if ":" not in wait:
            return float(wait)
        end = parsedate_to_datetime(wait)
        return max(0.0, end.timestamp() - time.time())
    except (LookupError, TypeError, ValueError):
        return None


def error_object(body: Any) -> dict[str, Any]:
    """Return the object in the body of an error that has its code; {} where there is none."""
    if not isinstance(body, dict):
        return {}
    if isinstance(body.get("error"), dict):
        return body["error"]
    return body


def error_code(error: dict[str, Any]) -> str | None:
    """Return the code of an error, or its type: that of an empty account where it is one of them.

    OpenRouter's 403 is a wrong key, or one flagged question, of which its metadata tell.
    """
    metadata = error.get("metadata")
    if isinstance(metadata, dict) and ("flagged_input" in metadata or metadata.get("reasons")):
        return FLAGGED
    named = (error.get("code"), error.get("type"))
    names = [name for name in named if isinstance(name, str)]
    for name in names:
        if name in STOPPING_CODES:
            return name
    return next(iter(names), None)


def server_words(body: Any, depth: int = MAX_DEPTH) -> str:
    """Return the sentence in the body of an error, whatever its form; "" where there is none.

    {"error": {"message": "a"}}, {"error": "a"}, {"message": "a"}, {"detail": "a"}, [{"error": ..}]
    all say "a"; {"detail": [{"loc": ["body", "n"], "msg": "too large"}]} says "body.n: too large".
    """
    if isinstance(body, str):
        return body
    if isinstance(body, list) and depth:
        said = [server_words(part, depth - 1) for part in body[:5]]
        return "; ".join(filter(None, said))
    if not isinstance(body, dict) or not depth:
        return ""
    for name in ("error", "message", "detail", "msg", "errors", "error_description", "title"):
        words = server_words(body.get(name), depth - 1)
        if not words:
            continue
        place = body.get("loc")
        if name == "msg" and isinstance(place, list):
            words = ".".join(map(str, place)) + f": {words}"
        return words
    return ""


def printable(text: str) -> str:
    """Return a text in one line; what a terminal could take for an order is shown escaped."""
    words = text.split()
    line = " ".join(words)
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def error_text(error: object, secrets: Iterable[str] | None = None) -> str:
    """Return what a server or the network said, in one line, without a secret it may repeat."""
    text = printable(str(error)) or type(error).__name__
    if secrets is None:
        secrets = servers.secrets()
    for secret in secrets:
        text = text.replace(secret, "[key]")
    return text[:400]
