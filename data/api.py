"""How to ask an OpenAI-style server: the client, the pace, the budget, one retry loop, and a journal that survives any end.

data/teacher.py says what is asked and makes the completion file from the journal; data/batch.py uses the Batch API.
The API key comes from OPENAI_API_KEY alone, and is in no file, message or traceback of ours.
"""
import asyncio
import json
import math
import os
import queue
import random
import signal
import sys
import threading
import time
from email.utils import parsedate_to_datetime

from data import files
from data.files import UserError

BACKOFF, LONGEST_BACKOFF = 0.5, 30.0    # s: random waits of up to 0.5, 1, 2, ... before the next attempt
LONGEST_PAUSE = 900.0                   # s that all workers wait while the server says 429, then the run stops
MOST_429 = 50                           # of one request, which may be too large for the limit
FIRST_REFUSALS = 5                      # the same 400 to the first requests of a run: the mistake is ours, not in a question


# ---------------- The client

def base_url(args):
    return args.base_url or os.environ.get("OPENAI_BASE_URL") or None


def api_key():
    return os.environ.get("OPENAI_API_KEY", "").strip()


def has_api(args):
    return bool(api_key() or base_url(args))


def make_client(args):
    """-> AsyncOpenAI without retries of its own: ours are in one place."""
    import openai
    if not api_key().isascii() or not api_key().isprintable():
        raise UserError("OPENAI_API_KEY holds characters that no key has: set it again")
    return openai.AsyncOpenAI(api_key=api_key() or "none", base_url=base_url(args), max_retries=0, timeout=args.attempt_timeout)


# ---------------- What comes back

class BadReply(Exception):
    """A reply that is no answer: worth another attempt."""


class Failed(Exception):
    """A request that the server refused, or that is given up; the run goes on."""
    refused = False


class Stopped(Exception):
    """The run ends: no new request."""


def read_reply(reply, api, n):
    """-> (at most n choices, in the order of their indices; usage, or None where the server does not say; model).

    Raises BadReply for anything that holds no choices, whatever its status was."""
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or not choices:
        raise BadReply(f"a reply without choices: {json.dumps(reply)[:200]}")
    found = {}
    for place, choice in enumerate(choices):
        said = choice.get("message" if api == "chat" else "text", 0) if isinstance(choice, dict) else 0
        said = said if api == "chat" else {"content": said}
        if not isinstance(said, dict) or not isinstance(said.get("content"), str | None):
            raise BadReply(f"a choice without a message: {json.dumps(choice)[:200]}")
        reason, index, text = choice.get("finish_reason"), choice.get("index"), said.get("content")
        one = {"completion": text and files.whole_characters(text), "finish_reason": reason if isinstance(reason, str) else None}
        one |= {"refusal": str(said["refusal"])} if said.get("refusal") else {}
        found.setdefault(index if type(index) is int else place, one)
    usage, model = reply.get("usage"), reply.get("model")
    counts = [usage.get(k) if isinstance(usage, dict) else None for k in ("prompt_tokens", "completion_tokens")]
    known = all(type(count) is int and count >= 0 for count in counts)
    return ([found[i] for i in sorted(found)][:n], dict(zip(("prompt_tokens", "completion_tokens"), counts)) if known else None,
            model if isinstance(model, str) else None)


def retry_after(headers):
    """-> seconds the server asks to wait (retry-after-ms, seconds, or an HTTP date), or None."""
    text = headers.get("retry-after", "")
    try:
        seconds = float(headers["retry-after-ms"]) / 1000 if "retry-after-ms" in headers else float(text)
    except ValueError:
        try:
            seconds = max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
        except (TypeError, ValueError):
            return None
    return seconds if 0 <= seconds < math.inf else None


def words(error):
    """What a server or the network said, in one line, without the key, should it be repeated there."""
    text = " ".join(f"{error}".split()) or type(error).__name__
    return (text.replace(api_key(), "[key]") if api_key() else text)[:300]


# ---------------- Money

def most_tokens(body):
    """-> (prompt, completion) tokens that a request can cost at most: no token is shorter than a byte; 16 more a turn."""
    texts = [turn["content"] for turn in body["messages"]] if "messages" in body else [body["prompt"]]
    limit = body.get("max_completion_tokens") or body["max_tokens"]
    return sum(len(text.encode()) + 16 for text in texts), limit * body.get("n", 1)


def dollars(args, prompt, completion):
    return (prompt * (args.price_in or 0) + completion * (args.price_out or 0)) / 1e6


def totals(rows):
    """-> {"prompt_tokens", "completion_tokens", "usage_unknown", "requests", "attempts", "unanswered"} over journal rows."""
    first = [row for row in rows if "usage" in row]
    known = [row["usage"] for row in first if row["usage"]]
    return {"prompt_tokens": sum(u["prompt_tokens"] for u in known), "completion_tokens": sum(u["completion_tokens"] for u in known),
            "usage_unknown": len(first) - len(known), "requests": len(first), "attempts": sum(row["attempts"] for row in first),
            "unanswered": sum(row["unanswered"] for row in first)}


ROW_TYPES = {"completion": str | None, "finish_reason": str | None, "model": str | None, "refusal": str | None, "usage": dict | None,
             "attempts": int | None, "unanswered": int | None, "possible_cost": float | int | None}


def check_journal(journal):
    """Raise UserError for a row that this program did not write: nothing may be bought, or scored, because of it."""
    for key, row in journal.rows.items():
        usage, is_answer = row.get("usage"), "error" not in row
        if not all(isinstance(row.get(k), kind) for k, kind in ROW_TYPES.items()) or is_answer and not {"completion", "model"} <= row.keys() \
                or usage is not None and not all(type(usage.get(k)) is int for k in ("prompt_tokens", "completion_tokens")) \
                or "usage" in row and not {"attempts", "unanswered"} <= row.keys() or is_answer and "finish_reason" not in row:
            raise UserError(f"{journal.path}: the row with the key {key[:40]!r} is not one of this program: mend or delete that line")


# ---------------- One run

class Run:
    """What the workers share: journal, pace, budget, counts, and why the run ends.  Use it inside `async with`."""

    def __init__(self, args, plan, path):
        self.args, self.plan, self.client = args, plan, make_client(args)
        self.journal = files.Journal(path.with_suffix(".journal.jsonl"))
        self.failures = files.Journal(path.with_suffix(".failures.jsonl"))
        for journal in (self.journal, self.failures):
            check_journal(journal)
        self.failed_keys, self.unwritten = set(), queue.Queue()
        self.started, self.requests, self.refusals = time.monotonic(), 0, []
        self.reason, self.stopped = None, asyncio.Event()                                   # why it ends
        self.not_before = self.next_turn = 0.0                                              # pace
        self.paused_since, self.pauses, self.turns = None, 0, asyncio.Lock()
        self.reserved, self.released = 0.0, asyncio.Condition()                             # budget, dollars
        self.tokens = totals(self.journal.rows.values())
        self.spent = dollars(args, self.tokens["prompt_tokens"], self.tokens["completion_tokens"])
        # Attempts without a reply, and replies without usage, may have been billed: their most counts as spent.
        self.spent += sum(row.get("possible_cost", 0) for journal in (self.journal, self.failures) for row in journal.rows.values())

    async def __aenter__(self):
        for s in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(s, self.interrupt)
        self.writer = threading.Thread(target=write_journal, args=(self, asyncio.get_running_loop()))
        self.writer.start()
        return self

    async def __aexit__(self, *error):
        for s in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().remove_signal_handler(s)
        self.unwritten.put(None)
        await asyncio.to_thread(self.writer.join)
        await self.client.close()
        for journal in (self.failures, self.journal):  # the journal's lock goes last
            if not journal.rows:
                journal.path.unlink()
            journal.close()

    def stop(self, reason):
        """End the run: requests under way are waited for and recorded, no new one goes out.  The first reason counts."""
        self.reason = self.reason or reason
        self.stopped.set()

    def interrupt(self):
        if isinstance(self.reason, KeyboardInterrupt):
            raise KeyboardInterrupt  # the second time: leave at once
        self.stop(KeyboardInterrupt())
        print("stopping: requests under way are waited for; press Ctrl-C again to leave them", file=sys.stderr, flush=True)

    async def nap(self, seconds):
        """Sleep; raises Stopped when the run ends meanwhile."""
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                await self.stopped.wait()
        except TimeoutError:
            return
        raise Stopped

    async def turn(self, tokens):
        """Wait for this request's turn: after a pause that any 429 sets for all, and within the limits a minute."""
        async with self.turns:
            while (wait := max(self.not_before, self.next_turn) - time.monotonic()) > 0:
                await self.nap(wait)
            if self.reason:
                raise Stopped
            a_request = 60 / self.args.requests_per_minute if self.args.requests_per_minute else 0
            a_token = 60 / self.args.tokens_per_minute if self.args.tokens_per_minute else 0
            self.next_turn = time.monotonic() + max(a_request, tokens * a_token)

    def pause(self, asked, why):
        """All workers wait: as long as the server asks, or longer from pause to pause.  Ends the run where that is too long."""
        now = time.monotonic()
        if now >= self.not_before:  # one pause, however many requests were turned away
            self.pauses, self.paused_since = self.pauses + 1, self.paused_since or now
        if (asked or 0) > LONGEST_PAUSE or now - (self.paused_since or now) > LONGEST_PAUSE:
            return self.stop(f"the server asks to wait{f' {asked:.0f} s' if asked else ''} ({why}): start the same command again then")
        wait = asked or min(LONGEST_BACKOFF, BACKOFF * 2 ** min(self.pauses, 10)) * random.uniform(0.5, 1)
        self.not_before = max(self.not_before, now + wait)

    async def reserve(self, cost):
        """Set aside what a request may cost at most; ends the run where --max_cost has no room for it."""
        async with self.released:
            while self.args.max_cost is not None and self.spent + self.reserved + cost > self.args.max_cost and not self.reason:
                if self.reserved < 1e-10:  # nothing under way whose bill could turn out lower
                    self.stop(f"--max_cost {self.args.max_cost}: ${self.spent:.4f} are spent, or may have been, and the next request may "
                              f"cost ${cost:.4f}")
                else:
                    await self.released.wait()
            if self.reason:
                raise Stopped
            self.reserved += cost

    async def release(self, cost):
        async with self.released:
            self.reserved -= cost
            self.released.notify_all()


def on_status(run, error):
    """Decide on an HTTP error: end the run, give the request up (Failed), or return: it is worth another attempt."""
    said = f"the server answered {error.status_code}: {words(error)}"
    if error.status_code in (401, 403, 404) or "insufficient_quota" in (error.code, error.type):
        run.stop(said)
    elif error.code in ("unsupported_value", "unsupported_parameter"):
        remedy = "use --no_temperature" if error.param == "temperature" else "see --help for the flag that sends it"
        run.stop(f"the model refuses the parameter {error.param!r}: {remedy} ({said})")
    elif error.status_code not in (408, 409, 429) and error.status_code < 500:
        run.refusals.append(said)
        if not run.requests and len(run.refusals) >= FIRST_REFUSALS and len(set(run.refusals)) == 1:
            run.stop(f"the first {FIRST_REFUSALS} requests were all refused: {said}")
        failure = Failed(said)
        failure.refused = True
        raise failure
    elif error.status_code == 429 or retry_after(error.response.headers) is not None:
        run.pause(retry_after(error.response.headers), said)


async def attempt(run, send, tokens=0, cost=0.0, timeout=None):
    """The one retry loop: -> (what `await send()` gives, attempts, those of them without a reply).

    Raises Failed where the request is refused or given up, Stopped where the run ends."""
    import openai
    tried = turned_away = unanswered = 0
    while True:
        await run.turn(tokens)
        await run.reserve(cost)
        try:
            async with asyncio.timeout(timeout or run.args.attempt_timeout):
                reply = await send()
            run.pauses, run.paused_since = 0, None
            return reply, tried + 1, unanswered
        except openai.APIStatusError as e:
            failure = words(e)
            on_status(run, e)
            turned_away += e.status_code == 429
            tried += e.status_code != 429
        except (openai.APIConnectionError, TimeoutError) as e:
            failure = "no reply in time" if isinstance(e, TimeoutError) else words(e.__cause__ or e)
            tried, unanswered = tried + 1, unanswered + 1
            if cost:  # it may have been billed: written down at once, for later runs
                run.spent += cost
                run.failures.append([{"key": f"unanswered {len(run.failures.rows)}", "error": failure, "possible_cost": cost}])
        except BadReply as e:
            failure, tried = words(e), tried + 1
        finally:
            await run.release(cost)
        if run.reason:
            raise Stopped
        if tried >= run.args.max_attempts or turned_away >= MOST_429:
            raise Failed(f"given up after {tried + turned_away} attempts: {failure}")
        await run.nap(random.uniform(0, min(LONGEST_BACKOFF, BACKOFF * 2 ** tried)) if tried else 0)


# ---------------- What is kept

def fail(run, key, sample_index, step, ks, error):
    """Add a failure to the failures file: what was asked, and why there is no answer."""
    run.failures.append([{"key": f"{key} {len(run.failures.rows)}", "sample_index": sample_index, "completion_index": ks, "step": step,
                          "error": str(error)}])


async def record(run, rows):
    """Hand finished rows to the writer.  The worker goes on while they are written, unless more wait than there are workers:
    that bounds what a kill can lose, and what is spent after the disk is full."""
    run.unwritten.put(run.journal.add(rows))
    while run.unwritten.qsize() > run.args.concurrency:
        await run.nap(0.01)


def write_journal(run, loop):
    """The one writer, a thread: rows that finish while others are being written share the next write and fsync."""
    while (rows := run.unwritten.get()) is not None:
        while not run.unwritten.empty() and run.unwritten.queue[0] is not None:
            rows += run.unwritten.get()
        try:
            run.journal.write(rows)
        except OSError as e:
            loop.call_soon_threadsafe(run.stop, f"{run.journal.path} cannot be written ({e.strerror}), so nothing more is asked: make "
                                                "room and start the same command again")
