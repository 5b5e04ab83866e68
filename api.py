"""Requests to an OpenAI-style server: what is kept, pace, budget, retries, and when to stop.

teacher.py says what is asked; extras/batch_api.py uses the same session for batches and jobs.
"""

import asyncio
import collections
import contextlib
import math
import os
import random
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict, get_type_hints

import storage
from storage import UserError

BACKOFF = 0.5  # seconds: random waits of up to 0.5, 1, 2, ... before the next attempt
LONGEST_BACKOFF = 30.0
LONGEST_PAUSE = 900.0  # seconds that all workers wait while the server says 429; then the run stops
MAX_RATE_LIMITED = 50  # 429s of one request, which may be too large for the limit
FIRST_REFUSALS = 5  # equal 400s to the first requests of a run: no single question is to blame


class ApiConfig(NamedTuple):
    """Who is asked, how fast, and for how much money."""

    base_url: str | None = None  # None: OpenAI
    concurrency: int = 16  # requests under way at once
    requests_per_minute: float = 0.0  # 0: no limit of ours
    tokens_per_minute: float = 0.0
    attempt_timeout: float = 120.0  # seconds, in all
    max_attempts: int = 6  # a request
    price_in: float | None = None  # dollars a million prompt tokens
    price_out: float | None = None  # dollars a million completion tokens
    max_cost: float | None = None  # dollars a completion file, earlier runs included

    def dollars(self, prompt_tokens: int, completion_tokens: int) -> float:
        cost = prompt_tokens * (self.price_in or 0) + completion_tokens * (self.price_out or 0)
        return cost / 1e6


class InvalidReplyError(Exception):
    """A reply without an answer, whatever its status: worth another attempt."""


class RequestError(Exception):
    """A request that is refused or given up; the run continues."""


class RunStopped(Exception):
    """The run ends: no new request."""


# ---------------- What a server says besides its answer


def api_key() -> str:
    return os.environ.get("OPENAI_API_KEY", "").strip()


def error_text(error: object) -> str:
    """Return what a server or the network said, in one line, without a key that it may repeat."""
    text = " ".join(str(error).split()) or type(error).__name__
    if api_key():
        text = text.replace(api_key(), "[key]")
    return text[:300]


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a server asks to wait: milliseconds, seconds, or an HTTP date."""
    try:
        if "retry-after-ms" in headers:
            return float(headers["retry-after-ms"]) / 1000
        if ":" not in headers["retry-after"]:
            return float(headers["retry-after"])
        return max(0.0, parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    except (LookupError, TypeError, ValueError):
        return None


def read_usage(usage: Any) -> dict[str, int] | None:
    """Return the tokens that a server counted, or None where it does not say."""
    if not isinstance(usage, dict):
        return None
    counts = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
    if all(type(count) is int and count >= 0 for count in counts.values()):
        return counts
    return None


# ---------------- The journal: what was answered, and what that cost


class JournalRow(TypedDict):
    """A choice that was answered; the first one of a request has the columns from usage on."""

    key: str
    sample_index: int
    completion_index: int
    step: int
    completion: str | None  # the raw text
    finish_reason: str | None
    refusal: NotRequired[str]
    model: str | None  # that answered
    usage: NotRequired[dict | None]  # None: the server did not say
    attempts: NotRequired[int]
    unanswered: NotRequired[int]  # attempts without a reply: they may have been billed
    possible_cost: NotRequired[float | int]  # dollars at most, where usage is None


Rows = dict[str, JournalRow]  # by key
ROW_TYPES = get_type_hints(JournalRow) | {"completion_index": int | list}  # of a failure, a list


def open_journal(path: Path) -> storage.Journal:
    """Open a journal of answers or failures.

    Raises UserError for a row of another program: it must neither be scored nor count as money.
    """
    journal = storage.Journal(path)
    for key, row in journal.rows.items():
        if not is_journal_row(row):
            raise UserError(
                f"{path}: the row with the key {str(key)[:40]!r} is not one of this program: "
                "mend or delete that line"
            )
    return journal


def is_journal_row(row: dict[str, Any]) -> bool:
    """Whether an answer or, where it has an `error`, a failure has all its columns."""
    if not all(isinstance(value, ROW_TYPES.get(name, object)) for name, value in row.items()):
        return False
    if row.get("usage") is not None and read_usage(row["usage"]) is None:
        return False
    if "usage" in row and not all(type(row.get(k)) is int for k in ("attempts", "unanswered")):
        return False
    return "error" in row or JournalRow.__required_keys__ <= row.keys()


def sum_usage(rows: Iterable[JournalRow]) -> dict[str, int]:
    """Return tokens and requests of journal rows: `metadata.usage` of a completion file."""
    billed = [row for row in rows if "usage" in row]
    known = [row["usage"] for row in billed if row["usage"]]
    return {
        "prompt_tokens": sum(usage["prompt_tokens"] for usage in known),
        "completion_tokens": sum(usage["completion_tokens"] for usage in known),
        "usage_unknown": len(billed) - len(known),
        "requests": len(billed),
        "attempts": sum(row["attempts"] for row in billed),
        "unanswered": sum(row["unanswered"] for row in billed),
    }


# ---------------- The session


class ApiSession:
    """What the workers of a run share: client, journal, pace, budget, and why the run ends."""

    def __init__(self, api: ApiConfig, path: Path) -> None:
        """Open the journal of a completion file and count what was spent on it so far."""
        self.api = api
        self.client = make_client(api)
        self.journal = open_journal(path.with_suffix(".journal.jsonl"))
        self.failures = open_journal(path.with_suffix(".failures.jsonl"))
        self.unwritten: collections.deque[list[JournalRow]] = collections.deque()
        self.writer = ThreadPoolExecutor(max_workers=1)
        self.requests = 0  # that were answered
        self.failed_keys: set[str] = set()
        self.refusals: list[str] = []
        self.stop_reason: str | KeyboardInterrupt | None = None
        self.stopped = asyncio.Event()
        self.turns = asyncio.Lock()
        self.next_turn = 0.0  # time.monotonic() of the next request, by the limits a minute
        self.not_before = 0.0  # time.monotonic() at which the pause of all workers ends
        self.paused_since = math.inf  # time.monotonic(); until a request is answered
        self.reserved = 0.0  # dollars that the requests under way may cost
        usage = sum_usage(self.journal.rows.values())
        self.spent = api.dollars(usage["prompt_tokens"], usage["completion_tokens"])
        for row in (*self.journal.rows.values(), *self.failures.rows.values()):
            self.spent += row.get("possible_cost", 0)  # it may have been billed

    async def run(self, work: Awaitable[Any]) -> Any:
        """Return what work gives, with the files closed; Ctrl-C stops the run, and work ends.

        Requests under way are waited for.  A second Ctrl-C raises KeyboardInterrupt at once.
        """
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, os.kill, os.getpid(), signal.SIGINT)
        task = asyncio.ensure_future(work)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            asyncio.current_task().uncancel()
            self.stop(KeyboardInterrupt())
            text = "stopping: requests under way are waited for; press Ctrl-C again to leave them"
            print(text, file=sys.stderr, flush=True)
            return await task
        finally:
            await self.close()

    async def close(self) -> None:
        self.writer.shutdown()  # when all is written
        await self.client.close()
        for journal in (self.failures, self.journal):  # the journal's lock is released last
            if not journal.rows:
                journal.path.unlink()
            journal.close()

    def stop(self, reason: str | KeyboardInterrupt) -> None:
        """End the run: requests under way are waited for, no new one is sent."""
        self.stop_reason = self.stop_reason or reason
        self.stopped.set()

    def raise_stop_reason(self, detail: str = "") -> None:
        """Raise why the run was stopped, if it was: KeyboardInterrupt or UserError."""
        if isinstance(self.stop_reason, KeyboardInterrupt):
            raise self.stop_reason
        if self.stop_reason:
            raise UserError(f"{self.stop_reason}{detail}")

    async def sleep_or_stop(self, seconds: float) -> None:
        """Sleep.  Raises RunStopped when the run ends meanwhile."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.stopped.wait(), seconds)
            raise RunStopped

    async def wait_for_rate_limit(self, tokens: float) -> None:
        """Wait until no pause and no limit a minute forbids a request of so many tokens."""
        a_request = 60 / (self.api.requests_per_minute or math.inf)
        a_token = 60 / (self.api.tokens_per_minute or math.inf)
        async with self.turns:
            while (wait := max(self.not_before, self.next_turn) - time.monotonic()) > 0:
                await self.sleep_or_stop(wait)
            self.next_turn = time.monotonic() + max(a_request, tokens * a_token)

    def pause(self, asked: float | None, why: str) -> None:
        """Make all workers wait as long as the server asks, else longer and longer."""
        now = time.monotonic()
        self.paused_since = min(self.paused_since, now)
        paused = now - self.paused_since
        if max(asked or 0, paused) > LONGEST_PAUSE:
            wait = f"the server asks to wait {asked or paused:.0f} s"
            self.stop(f"{wait} ({why}): start the same command again then")
        backoff = min(LONGEST_BACKOFF, max(BACKOFF, paused)) * random.uniform(0.5, 1)
        self.not_before = max(self.not_before, now + (asked or backoff))

    async def reserve(self, cost: float) -> None:
        """Set aside what a request may cost; the run ends where --max_cost has no room for it."""
        limit = self.api.max_cost
        while limit is not None and self.spent + self.reserved + cost > limit:
            if self.reserved < 1e-10:  # nothing under way whose bill could turn out lower
                spent = f"${self.spent:.4f} are spent, or may have been"
                self.stop(f"--max_cost {limit}: {spent}, and the next request may cost ${cost:.4f}")
            await self.sleep_or_stop(0.01)
        self.reserved += cost

    async def record(self, rows: list[JournalRow]) -> None:
        """Hand rows to the writer; wait while more are unwritten than there are workers.

        That bounds what a kill can lose, and what is spent after the disk is full.
        """
        self.unwritten.append(self.journal.add(rows))
        self.writer.submit(self.write_journal, asyncio.get_running_loop())
        while len(self.unwritten) > self.api.concurrency:
            await self.sleep_or_stop(0.01)

    def write_journal(self, loop: asyncio.AbstractEventLoop) -> None:
        """Write what is unwritten, in a thread: rows of a moment share one write and fsync."""
        rows: list[JournalRow] = []
        while self.unwritten:
            rows += self.unwritten.popleft()
        try:
            if rows:
                self.journal.write(rows)
        except OSError as e:
            problem = f"{self.journal.path} cannot be written ({e.strerror})"
            remedy = "make room and start the same command again"
            loop.call_soon_threadsafe(self.stop, f"{problem}, so nothing more is asked: {remedy}")

    def add_failure(self, key: str, **columns: Any) -> None:
        """Put on the disk why there is no answer, and what that may cost."""
        self.failures.append([{"key": f"{key} {len(self.failures.rows)}", **columns}])


def make_client(api: ApiConfig) -> Any:
    """Return an openai.AsyncOpenAI without retries of its own: see call_with_retries."""
    import openai  # 0.5 s

    if not api_key().isascii() or not api_key().isprintable():
        raise UserError("OPENAI_API_KEY holds characters that no key has: set it again")
    key = api_key() or "none"  # the client wants one, a local server does not
    return openai.AsyncOpenAI(api_key=key, base_url=api.base_url, max_retries=0)


# ---------------- One call


def handle_status(session: ApiSession, error: Any) -> None:
    """Return where an HTTP error is worth another attempt; pause or stop the run where it must be.

    Raises RequestError where the server refuses this one request.
    """
    status = error.status_code
    asked = retry_after(error.response.headers)
    text = f"the server answered {status}: {error_text(error)}"
    if status in (401, 403, 404) or "insufficient_quota" in (error.code, error.type):
        session.stop(text)
    elif error.code in ("unsupported_value", "unsupported_parameter"):
        remedy = "see --help for the flag that sends it"
        if error.param == "temperature":
            remedy = "use --no_temperature"
        session.stop(f"the model refuses the parameter {error.param!r}: {remedy} ({text})")
    elif status < 500 and status not in (408, 409, 429):
        session.refusals.append(text)
        if not session.requests and session.refusals == [text] * FIRST_REFUSALS:
            session.stop(f"the first {FIRST_REFUSALS} requests were all refused: {text}")
        raise RequestError(text)
    elif status == 429 or asked is not None:
        session.pause(asked, text)


async def call_with_retries(
    session: ApiSession,
    send: Callable[[], Awaitable[Any]],
    tokens: float = 0.0,
    cost: float = 0.0,
    timeout: float | None = None,
) -> tuple[Any, int, int]:
    """Return what `await send()` gives, the attempts, and those of them without a reply.

    Raises RequestError where the request is refused or given up, RunStopped where the run ends.
    """
    # The client's own retries hide attempts without a reply, which may have been billed; in them
    # every worker runs into a 429 by itself, and insufficient_quota is asked again.
    import openai

    tried = unanswered = rate_limited = 0
    while tried < session.api.max_attempts and rate_limited < MAX_RATE_LIMITED:
        if tried:
            backoff = min(LONGEST_BACKOFF, BACKOFF * 2**tried)
            await session.sleep_or_stop(random.uniform(0, backoff))
        await session.wait_for_rate_limit(tokens)
        await session.reserve(cost)
        tried += 1
        try:
            if session.stopped.is_set():
                raise RunStopped
            async with asyncio.timeout(timeout or session.api.attempt_timeout):
                reply = await send()
            session.paused_since = math.inf
            return reply, tried, unanswered
        except openai.APIStatusError as e:
            failure = error_text(e)
            handle_status(session, e)
            if e.status_code == 429:  # turned away, which is no attempt
                tried -= 1
                rate_limited += 1
        except (openai.APIConnectionError, TimeoutError) as e:
            failure = no_reply_text(e)
            unanswered += 1
            session.spent += cost
            if cost:  # written down at once, for later runs
                session.add_failure("unanswered", error=failure, possible_cost=cost)
        except InvalidReplyError as e:
            failure = error_text(e)
        finally:
            session.reserved -= cost
    raise RequestError(f"given up after {tried + rate_limited} attempts: {failure}")


def no_reply_text(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no reply in time"
    return error_text(error.__cause__ or error)
