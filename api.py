"""Requests to an OpenAI-style server: what is kept, pace, budget, retries, and when to stop.

teacher.py says what is asked; extras/batch_api.py uses the same session for batches and jobs.
"""

import asyncio
import contextlib
import functools
import math
import os
import random
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict, get_args, get_type_hints

import servers
import storage
from refusals import FLAGGED, STOPPING_CODES, Refusal, StatusError, error_text, read_refusal
from replies import InvalidReplyError, read_usage
from storage import UserError

BACKOFF = 0.5  # seconds: random waits of up to 0.5, 1, 2, ... before the next attempt
LONGEST_BACKOFF = 30.0
LONGEST_PAUSE = 900.0  # seconds that all workers wait while the server says 429; then the run stops
MAX_RATE_LIMITED = 50  # 429s of one request, which may be too large for the limit
FIRST_REFUSALS = 5  # equal 400s to the first requests of a run: no single question is to blame
MAX_EQUAL_FAULTS = 5  # in a row: replies that cost money and cannot be used; failed connections
PASSING_STATUSES = (408, 409, 429)  # worth another attempt, as those from 500 on
STOPPING_STATUSES = (401, 402, 403, 404)  # a key, an account or a name is wrong
REMEDIES = {  # of a parameter that a model refuses
    "temperature": "use --no_temperature",
    "max_tokens": "leave out --legacy_max_tokens",
    "max_completion_tokens": "use --legacy_max_tokens",
    "top_p": "leave out --top_p",
    "reasoning_effort": "change --reasoning_effort",
    "n": "leave out --choices",
}


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
    extra_headers: str = ""  # NAME=ENV_VARIABLE,...

    def dollars(self, prompt_tokens: int, completion_tokens: int, **_: int) -> float:
        """Return what tokens cost at most; of a usage, reasoning tokens are among completion's."""
        prompt_cost = prompt_tokens * (self.price_in or 0)
        completion_cost = completion_tokens * (self.price_out or 0)
        return (prompt_cost + completion_cost) / 1e6


class RequestError(Exception):
    """A request that is refused or given up; the run continues."""


class RunStopped(Exception):
    """The run ends: no new request."""


# ---------------- The journal: what was answered, and what that cost


class JournalRow(TypedDict):
    """A choice that was answered; the first one of a request has the columns from usage on."""

    key: str
    sample_index: int
    completion_index: int
    step: int
    completion: str | None  # the text, without reasoning
    reasoning: NotRequired[str]  # "" where the server counts its tokens and does not show it
    finish_reason: str | None
    refusal: NotRequired[str]
    model: str | None  # that answered
    usage: NotRequired[dict | None]  # None: the server did not say
    attempts: NotRequired[int]
    unanswered: NotRequired[int]  # attempts without a reply: they may have been billed
    possible_cost: NotRequired[float | int]  # dollars at most, where usage is None


Rows = dict[str, JournalRow]  # by key
ROW_TYPES = {  # as tuples, which isinstance takes faster than unions
    name: get_args(hint) or (hint,) for name, hint in get_type_hints(JournalRow).items()
}
ROW_TYPES["completion_index"] = (int, list)  # of a failure, a list


def open_journal(path: Path) -> storage.Journal:
    """Open a journal of answers or failures.

    Raises UserError for a row of another program: it must neither be scored nor count as money.
    """
    journal = storage.Journal(path)
    known = set()  # columns and their types of rows that are right
    for key, row in journal.rows.items():
        shape = (*row, *map(type, row.values()))
        is_right = shape in known or has_columns(row)
        usage = row.get("usage")
        if usage is not None:  # it must be one that can be counted
            is_right = is_right and read_usage(usage) is not None
        if not is_right:
            name = str(key)[:40]
            raise UserError(
                f"{path}: the row with the key {name!r} is not one of this program: "
                "mend or delete that line"
            )
        known.add(shape)
    return journal


def has_columns(row: dict[str, Any]) -> bool:
    """Tell whether an answer or, where it has an `error`, a failure has its columns."""
    for name, value in row.items():
        expected = ROW_TYPES.get(name, object)
        if not isinstance(value, expected):
            return False
    if "usage" in row:
        counts = (row.get("attempts"), row.get("unanswered"))
        if not all(type(count) is int for count in counts):
            return False
    return "error" in row or JournalRow.__required_keys__ <= row.keys()


def sum_usage(rows: Iterable[JournalRow]) -> dict[str, int]:
    """Return tokens and requests of journal rows: `metadata.usage` of a completion file."""
    billed = [row for row in rows if "usage" in row]
    known = [row["usage"] for row in billed if row["usage"]]
    total = {"prompt_tokens": 0, "completion_tokens": 0}
    reasoning = 0
    for usage in known:
        total["prompt_tokens"] += usage["prompt_tokens"]
        total["completion_tokens"] += usage["completion_tokens"]
        reasoning += usage.get("reasoning_tokens", 0)
    total |= {
        "usage_unknown": len(billed) - len(known),
        "requests": len(billed),
        "attempts": sum(row["attempts"] for row in billed),
        "unanswered": sum(row["unanswered"] for row in billed),
    }
    if reasoning:  # among the completion tokens
        total["reasoning_tokens"] = reasoning
    return total


# ---------------- The session


class ApiSession:
    """What the workers of a run share: client, journal, pace, budget, and why the run ends."""

    def __init__(self, api: ApiConfig, path: Path) -> None:
        """Open the journal of a completion file and count what was spent on it so far."""
        self.api = api
        self.base_url = api.base_url or servers.OPENAI
        self.secrets = servers.secrets(api.extra_headers)
        address = servers.read_address(self.base_url)
        self.proxy = servers.find_proxy(address)
        self.http: Any = None  # an httpx2.AsyncClient, from connect() on
        self.journal = open_journal(path.with_suffix(".journal.jsonl"))
        self.failures = open_journal(path.with_suffix(".failures.jsonl"))
        self.unwritten: deque[list[JournalRow]] = deque()
        self.writer = ThreadPoolExecutor(max_workers=1)
        self.requests = 0  # that were answered
        self.failed_keys: set[str] = set()
        self.ends: Counter[str] = Counter()  # why rationales ended
        self.unknown_ends: Counter[str] = Counter()
        self.refusals: list[str] = []
        self.unusable_kind = ""
        self.unusable: list[object] = []  # calls with replies of that kind since an answer
        self.lost_connections = 0  # in a row
        self.lost_at = -math.inf  # time.monotonic() of the last one
        self.stop_reason: str | KeyboardInterrupt | None = None
        self.stopped = asyncio.Event()
        self.turns = asyncio.Lock()
        self.next_turn = 0.0  # time.monotonic() of the next request, by the limits a minute
        self.not_before = 0.0  # time.monotonic() at which the pause of all workers ends
        self.paused_since = math.inf  # time.monotonic(); until a request is answered
        self.pause_reason = ""
        self.reserved = 0.0  # dollars that the requests under way may cost
        usage = self.usage()
        self.spent = api.dollars(usage["prompt_tokens"], usage["completion_tokens"])
        for row in self.all_rows():
            self.spent += row.get("possible_cost", 0)  # it may have been billed

    def connect(self) -> None:
        """Make the client, since something must be asked.  Raises UserError for a bad key."""
        import clients

        self.http = clients.make_client(self.base_url, self.api.extra_headers, self.proxy)

    @functools.cached_property
    def client(self) -> Any:
        """Return the openai.AsyncOpenAI around the client, for batches and fine-tuning jobs."""
        import clients

        headers = self.api.extra_headers
        return clients.wrap_client(self.http, self.base_url, headers)

    async def post(self, endpoint: str, body: dict[str, Any], key: str) -> bytes:
        """Send a request; return the body of its reply.  Raises StatusError, httpx2.HTTPError."""
        headers = {"X-Client-Request-Id": key}
        response = await self.http.post(endpoint, json=body, headers=headers)
        if not response.is_success:
            raise StatusError(response)
        return response.content

    def usage(self) -> dict[str, int]:
        """Return the tokens and requests of all runs; what cannot be used was paid for, too."""
        return sum_usage(self.all_rows())

    def all_rows(self) -> Iterator[JournalRow]:
        """Yield the answers and failures of all runs."""
        yield from self.journal.rows.values()
        yield from self.failures.rows.values()

    def words(self, error: object) -> str:
        """Return what a server or the network said, without the secrets of this session."""
        return error_text(error, self.secrets)

    async def run(self, work: Awaitable[Any]) -> Any:
        """Return what work gives, with the files closed; Ctrl-C stops the run, and work ends.

        Requests under way are waited for.  A second Ctrl-C raises KeyboardInterrupt at once.
        SIGTERM does the same by itself: what a script starts with & has Ctrl-C ignored.
        """
        task = asyncio.ensure_future(work)
        shield = asyncio.shield(task)

        def terminate() -> None:
            if not shield.cancel():  # the second signal, or all is done
                raise KeyboardInterrupt

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminate)
        try:
            return await shield
        except asyncio.CancelledError:
            asyncio.current_task().uncancel()
            self.stop(KeyboardInterrupt())
            text = "stopping: requests under way are waited for; press Ctrl-C again to leave them"
            print(text, file=sys.stderr, flush=True)
            return await task
        finally:
            await self.close()

    async def close(self) -> None:
        """Write what is waiting, close the client, and give the journals free."""
        self.writer.shutdown()  # when all is written
        if self.http:
            await self.http.aclose()
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
        requests_per_minute = self.api.requests_per_minute or math.inf
        tokens_per_minute = self.api.tokens_per_minute or math.inf
        minutes = max(1 / requests_per_minute, tokens / tokens_per_minute)
        async with self.turns:
            now = time.monotonic()
            while (turn := max(self.not_before, self.next_turn)) > now:
                await self.sleep_or_stop(turn - now)
                now = time.monotonic()
            self.next_turn = now + 60 * minutes

    def pause(self, asked: float | None, why: str) -> None:
        """Make all workers wait as long as the server asks, else longer and longer."""
        now = time.monotonic()
        self.paused_since = min(self.paused_since, now)
        paused = now - self.paused_since
        longest = max(asked or 0, paused)
        if longest > LONGEST_PAUSE:
            wait = f"the server asks to wait {asked or paused:.0f} s"
            self.stop(f"{wait} ({why}): start the same command again then")
        backoff = min(LONGEST_BACKOFF, max(BACKOFF, paused))
        wait = asked or backoff * random.uniform(0.5, 1)
        end = now + wait
        self.not_before = max(self.not_before, end)
        self.pause_reason = why

    async def reserve(self, cost: float) -> None:
        """Set aside what a request may cost; the run ends where --max_cost has no room for it."""
        limit = self.api.max_cost
        if limit is None:
            limit = math.inf
        while self.spent + self.reserved + cost > limit:
            if self.reserved < 1e-10:  # nothing under way whose bill could turn out lower
                spent = f"${self.spent:.4f} are spent, or may have been"
                self.stop(f"--max_cost {limit}: {spent}, and the next request may cost ${cost:.4f}")
            await self.sleep_or_stop(0.01)
        self.reserved += cost

    async def record(self, rows: list[JournalRow]) -> None:
        """Hand rows to the writer; wait while more are unwritten than there are workers.

        That bounds what a kill can lose, and what is spent after the disk is full.
        """
        new_rows = self.journal.add(rows)
        self.unwritten.append(new_rows)
        loop = asyncio.get_running_loop()
        self.writer.submit(self.write_journal, loop)
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
            reason = f"{problem}, so nothing more is asked: {remedy}"
            loop.call_soon_threadsafe(self.stop, reason)

    def add_failure(self, key: str, **columns: Any) -> None:
        """Put on the disk why there is no answer, and what that may cost."""
        number = len(self.failures.rows)
        row = {"key": f"{key} {number}", **columns}
        self.failures.append([row])

    def bill(self, error: InvalidReplyError, most: float) -> None:
        """Count what a reply that cannot be used costs: its usage, or `most` dollars."""
        row = {"error": self.words(error)}
        if error.usage:
            self.spent += self.api.dollars(**error.usage)
            row |= {"usage": error.usage, "attempts": 1, "unanswered": 0}
        elif most:
            self.spent += most
            row["possible_cost"] = most
        if len(row) > 1:
            self.add_failure("unusable", **row)

    def count_unusable(self, kind: str, call: object) -> bool:
        """Count replies that cannot be used; return whether this call is to be given up.

        Five in a row of one kind end the run, unless one call got all of them: its question may be
        to blame.
        """
        if kind != self.unusable_kind:
            self.unusable_kind = kind
            self.unusable.clear()
        self.unusable.append(call)
        count = len(self.unusable)
        if count < MAX_EQUAL_FAULTS:
            return False
        if self.unusable != [call] * count:
            text = f"{count} replies in a row could not be used: {kind}"
            self.stop(f"{text} ({self.failures.path} says more where they cost money)")
        return True

    def lose_connection(self, text: str, started: float) -> None:
        """Count a connection that could not be made, which costs nothing; all workers pause.

        The fifth in a row ends the run.  Those begun before the last failure are one event with it.
        """
        if started < self.lost_at:
            return
        self.lost_at = time.monotonic()
        self.lost_connections += 1
        self.pause(None, text)
        if self.lost_connections >= MAX_EQUAL_FAULTS:
            self.stop(f"no connection to the server: {text}")

    def count_answer(self) -> None:
        """Forget the faults in a row: a request was answered."""
        self.paused_since = math.inf
        self.pause_reason = ""
        self.unusable.clear()
        self.lost_connections = 0


# ---------------- One call


def handle_refusal(session: ApiSession, refusal: Refusal) -> None:
    """Return where a refusal is worth another attempt; pause or stop the run where it must be.

    Raises RequestError where the server refuses this one request.
    """
    status = refusal.status
    text = session.words(refusal.text)
    code = refusal.code
    is_flagged = code == FLAGGED  # one question is to blame
    if code in STOPPING_CODES or (status in STOPPING_STATUSES and not is_flagged):
        session.stop(text)
    elif status < 400:
        session.stop(f"{text}: name that address with --base_url")
    elif code in ("unsupported_value", "unsupported_parameter"):
        name = str(refusal.param)
        remedy = REMEDIES.get(name, "see --help for the flag that sends it")
        session.stop(f"the model refuses the parameter {refusal.param!r}: {remedy} ({text})")
    elif status < 500 and status not in PASSING_STATUSES:
        session.refusals.append(text)
        if not session.requests and session.refusals == [text] * FIRST_REFUSALS:
            session.stop(f"the first {FIRST_REFUSALS} requests were all refused: {text}")
        raise RequestError(text)
    elif status == 429 or refusal.wait is not None:
        session.pause(refusal.wait, text)


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
    import httpx2

    call = object()
    tried = 0
    unanswered = 0
    rate_limited = 0
    while tried < session.api.max_attempts and rate_limited < MAX_RATE_LIMITED:
        if tried:
            backoff = min(LONGEST_BACKOFF, BACKOFF * 2**tried)
            await session.sleep_or_stop(random.uniform(0, backoff))
        await session.wait_for_rate_limit(tokens)
        await session.reserve(cost)
        tried += 1
        started = time.monotonic()
        try:
            if session.stopped.is_set():
                raise RunStopped
            async with asyncio.timeout(timeout or session.api.attempt_timeout):
                reply = await send()
            session.count_answer()
            return reply, tried, unanswered
        except (StatusError, InvalidReplyError) as e:
            fault = read_fault(session, e, cost, call)
        except (httpx2.HTTPError, OSError) as e:  # TimeoutError is one
            fault = read_loss(session, e, cost, started)
        finally:
            session.reserved -= cost
        unanswered += fault.is_unanswered
        if fault.is_final:
            break
        if fault.refusal:
            handle_refusal(session, fault.refusal)
            if fault.refusal.status == 429:  # turned away, which is no attempt
                tried -= 1
                rate_limited += 1
    raise RequestError(f"given up after {tried + rate_limited} attempts: {fault.text}")


class Fault(NamedTuple):
    """Why an attempt brought no answer."""

    text: str
    refusal: Refusal | None = None  # what the server said instead
    is_unanswered: bool = False  # sent, without a reply: it may have been billed
    is_final: bool = False  # not worth another attempt


def read_fault(session: ApiSession, error: Exception, cost: float, call: object) -> Fault:
    """Return what is wrong with a reply; count what it costs: a 200 is billed, an error is not.

    An error of the request's own, such as 429, is no more billed in a 200 than as a status.
    """
    if not isinstance(error, InvalidReplyError):
        refusal = read_refusal(error.response)
        text = session.words(refusal.text)
        return Fault(text, refusal)
    text = session.words(error)
    status = error.status
    if error.code in STOPPING_CODES:
        status = 429  # which is what it has elsewhere
    if status is not None and status < 500:
        session.bill(error, 0.0)
        text = f"the server answered 200 with {text}"
        refusal = Refusal(status, text, error.code)
        return Fault(text, refusal)
    session.bill(error, cost)
    is_final = session.count_unusable(error.kind, call)
    return Fault(text, is_final=is_final)


def read_loss(session: ApiSession, error: Exception, cost: float, started: float) -> Fault:
    """Return why there is no reply; count what that may cost: nothing where nothing was sent."""
    import httpx2

    never_sent = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, httpx2.ProxyError)
    text = "no reply in time"
    if isinstance(error, httpx2.ConnectTimeout):
        text = "it takes too long"
    elif not isinstance(error, TimeoutError):
        text = root_causes(error)
    if session.proxy:
        proxy = servers.proxy_name(session.proxy)
        text += f", through the proxy {proxy}"
    text = session.words(text)
    if isinstance(error, never_sent):
        session.lose_connection(text, started)
        return Fault(text)
    session.spent += cost
    if cost:  # written down at once, for later runs
        session.add_failure("unanswered", error=text, possible_cost=cost)
    return Fault(text, is_unanswered=True)


def root_causes(error: Any) -> str:
    """Return what an error says, and its first cause: "all attempts failed" is no reason."""
    text = str(error) or type(error).__name__
    while cause := error.__cause__ or error.__context__:
        error = cause
    if isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, ConnectionError) and error.errno:
        error = os.strerror(error.errno)
    root = str(error)
    if root in text:
        return text
    return f"{text} ({root})"
