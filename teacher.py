"""Ask a teacher through the OpenAI API, or any server that speaks it (vLLM, llama.cpp, Ollama, transformers serve).

Each completion is written to a journal beside the completion file before anything else happens to it, under a key that says
what was asked; whatever ends a run, the next one asks only for keys that are not there.  The completion file is made from the
journal when all is there.  The API key comes from OPENAI_API_KEY alone.  (saved/README.md: the files; README.md: how to use it.)

    sample -> fill -> worker -> ask -> attempt (the one retry loop) -> record (the journal) -> publish (the completion file)

extras/batch_api.py asks through the Batch API instead, over the same journal, and has OpenAI-style students fine-tuned.
"""

import asyncio
import functools
import gc
import hashlib
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
from pathlib import Path
from typing import NamedTuple

import evaluate
import storage
import tasks
from flags import base_url, has_api
from storage import UserError

ENDPOINTS = {"chat": "/chat/completions", "completions": "/completions"}


# s: random waits of up to 0.5, 1, 2, ... before the next attempt
BACKOFF = 0.5
LONGEST_BACKOFF = 30.0
LONGEST_PAUSE = 900.0  # s that all workers wait while the server says 429, then the run stops
MOST_429 = 50  # of one request, which may be too large for the limit
FIRST_REFUSALS = (
    5  # the same 400 to the first requests of a run: the mistake is ours, not in a question
)


# ---------------- The client


def api_key():
    return os.environ.get("OPENAI_API_KEY", "").strip()


def make_client(args):
    """-> AsyncOpenAI without retries of its own: ours are in one place."""
    import openai

    if not api_key().isascii() or not api_key().isprintable():
        raise UserError("OPENAI_API_KEY holds characters that no key has: set it again")
    return openai.AsyncOpenAI(
        api_key=api_key() or "none",
        base_url=base_url(args),
        max_retries=0,
        timeout=args.attempt_timeout,
    )


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
        said = (
            choice.get("message" if api == "chat" else "text", 0) if isinstance(choice, dict) else 0
        )
        said = said if api == "chat" else {"content": said}
        if not isinstance(said, dict) or not isinstance(said.get("content"), str | None):
            raise BadReply(f"a choice without a message: {json.dumps(choice)[:200]}")
        reason = choice.get("finish_reason")
        index = choice.get("index")
        text = said.get("content")
        one = {
            "completion": text and storage.replace_lone_surrogates(text),
            "finish_reason": reason if isinstance(reason, str) else None,
        }
        one |= {"refusal": str(said["refusal"])} if said.get("refusal") else {}
        found.setdefault(index if type(index) is int else place, one)
    usage = reply.get("usage")
    model = reply.get("model")
    counts = [
        usage.get(k) if isinstance(usage, dict) else None
        for k in ("prompt_tokens", "completion_tokens")
    ]
    known = all(type(count) is int and count >= 0 for count in counts)
    return (
        [found[i] for i in sorted(found)][:n],
        dict(zip(("prompt_tokens", "completion_tokens"), counts)) if known else None,
        model if isinstance(model, str) else None,
    )


def retry_after(headers):
    """-> seconds the server asks to wait (retry-after-ms, seconds, or an HTTP date), or None."""
    text = headers.get("retry-after", "")
    try:
        seconds = (
            float(headers["retry-after-ms"]) / 1000 if "retry-after-ms" in headers else float(text)
        )
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
    texts = (
        [turn["content"] for turn in body["messages"]] if "messages" in body else [body["prompt"]]
    )
    limit = body.get("max_completion_tokens") or body["max_tokens"]
    return sum(len(text.encode()) + 16 for text in texts), limit * body.get("n", 1)


def dollars(args, prompt, completion):
    return (prompt * (args.price_in or 0) + completion * (args.price_out or 0)) / 1e6


def totals(rows):
    """-> {"prompt_tokens", "completion_tokens", "usage_unknown", "requests", "attempts", "unanswered"} over journal rows."""
    first = [row for row in rows if "usage" in row]
    known = [row["usage"] for row in first if row["usage"]]
    return {
        "prompt_tokens": sum(u["prompt_tokens"] for u in known),
        "completion_tokens": sum(u["completion_tokens"] for u in known),
        "usage_unknown": len(first) - len(known),
        "requests": len(first),
        "attempts": sum(row["attempts"] for row in first),
        "unanswered": sum(row["unanswered"] for row in first),
    }


ROW_TYPES = {
    "completion": str | None,
    "finish_reason": str | None,
    "model": str | None,
    "refusal": str | None,
    "usage": dict | None,
    "attempts": int | None,
    "unanswered": int | None,
    "possible_cost": float | int | None,
}


def check_journal(journal):
    """Raise UserError for a row that this program did not write: nothing may be bought, or scored, because of it."""
    for key, row in journal.rows.items():
        usage = row.get("usage")
        is_answer = "error" not in row
        if (
            not all(isinstance(row.get(k), kind) for k, kind in ROW_TYPES.items())
            or is_answer
            and not {"completion", "model"} <= row.keys()
            or usage is not None
            and not all(type(usage.get(k)) is int for k in ("prompt_tokens", "completion_tokens"))
            or "usage" in row
            and not {"attempts", "unanswered"} <= row.keys()
            or is_answer
            and "finish_reason" not in row
        ):
            raise UserError(
                f"{journal.path}: the row with the key {key[:40]!r} is not one of this program: mend or delete that line"
            )


# ---------------- One run


class Run:
    """What the workers share: journal, pace, budget, counts, and why the run ends.  Use it inside `async with`."""

    def __init__(self, args, plan, path):
        self.args = args
        self.plan = plan
        self.client = make_client(args)
        self.journal = storage.Journal(path.with_suffix(".journal.jsonl"))
        self.failures = storage.Journal(path.with_suffix(".failures.jsonl"))
        for journal in (self.journal, self.failures):
            check_journal(journal)
        self.failed_keys = set()
        self.unwritten = queue.Queue()
        self.started = time.monotonic()
        self.requests = 0
        self.refusals = []
        # why it ends
        self.reason = None
        self.stopped = asyncio.Event()
        self.not_before = self.next_turn = 0.0  # pace
        self.paused_since = None
        self.pauses = 0
        self.turns = asyncio.Lock()
        # budget, dollars
        self.reserved = 0.0
        self.released = asyncio.Condition()
        self.tokens = totals(self.journal.rows.values())
        self.spent = dollars(args, self.tokens["prompt_tokens"], self.tokens["completion_tokens"])
        # Attempts without a reply, and replies without usage, may have been billed: their most counts as spent.
        self.spent += sum(
            row.get("possible_cost", 0)
            for journal in (self.journal, self.failures)
            for row in journal.rows.values()
        )

    async def __aenter__(self):
        for s in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(s, self.interrupt)
        self.writer = threading.Thread(
            target=write_journal, args=(self, asyncio.get_running_loop())
        )
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
        print(
            "stopping: requests under way are waited for; press Ctrl-C again to leave them",
            file=sys.stderr,
            flush=True,
        )

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
            self.pauses = self.pauses + 1
            self.paused_since = self.paused_since or now
        if (asked or 0) > LONGEST_PAUSE or now - (self.paused_since or now) > LONGEST_PAUSE:
            return self.stop(
                f"the server asks to wait{f' {asked:.0f} s' if asked else ''} ({why}): start the same command again then"
            )
        wait = asked or min(LONGEST_BACKOFF, BACKOFF * 2 ** min(self.pauses, 10)) * random.uniform(
            0.5, 1
        )
        self.not_before = max(self.not_before, now + wait)

    async def reserve(self, cost):
        """Set aside what a request may cost at most; ends the run where --max_cost has no room for it."""
        async with self.released:
            while (
                self.args.max_cost is not None
                and self.spent + self.reserved + cost > self.args.max_cost
                and not self.reason
            ):
                if self.reserved < 1e-10:  # nothing under way whose bill could turn out lower
                    self.stop(
                        f"--max_cost {self.args.max_cost}: ${self.spent:.4f} are spent, or may have been, and the next request may "
                        f"cost ${cost:.4f}"
                    )
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
        remedy = (
            "use --no_temperature"
            if error.param == "temperature"
            else "see --help for the flag that sends it"
        )
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
            run.pauses = 0
            run.paused_since = None
            return reply, tried + 1, unanswered
        except openai.APIStatusError as e:
            failure = words(e)
            on_status(run, e)
            turned_away += e.status_code == 429
            tried += e.status_code != 429
        except (openai.APIConnectionError, TimeoutError) as e:
            failure = "no reply in time" if isinstance(e, TimeoutError) else words(e.__cause__ or e)
            tried = tried + 1
            unanswered = unanswered + 1
            if cost:  # it may have been billed: written down at once, for later runs
                run.spent += cost
                run.failures.append(
                    [
                        {
                            "key": f"unanswered {len(run.failures.rows)}",
                            "error": failure,
                            "possible_cost": cost,
                        }
                    ]
                )
        except BadReply as e:
            failure = words(e)
            tried = tried + 1
        finally:
            await run.release(cost)
        if run.reason:
            raise Stopped
        if tried >= run.args.max_attempts or turned_away >= MOST_429:
            raise Failed(f"given up after {tried + turned_away} attempts: {failure}")
        await run.nap(random.uniform(0, min(LONGEST_BACKOFF, BACKOFF * 2**tried)) if tried else 0)


# ---------------- What is kept


def fail(run, key, sample_index, step, ks, error):
    """Add a failure to the failures file: what was asked, and why there is no answer."""
    run.failures.append(
        [
            {
                "key": f"{key} {len(run.failures.rows)}",
                "sample_index": sample_index,
                "completion_index": ks,
                "step": step,
                "error": str(error),
            }
        ]
    )


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
            loop.call_soon_threadsafe(
                run.stop,
                f"{run.journal.path} cannot be written ({e.strerror}), so nothing more is asked: make "
                "room and start the same command again",
            )


# ---------------- What is asked, and under which key


class Plan(NamedTuple):
    """What is asked of whom."""

    model: str
    api: str  # a key of ENDPOINTS
    template: str  # of tasks.TEMPLATES; zs_cot takes two steps
    family: str
    max_new_tokens: int
    temperature: float | None = 0.0  # None: not sent
    degree: int = 1  # completions a question
    choices: int = 1  # of them a request
    legacy_max_tokens: bool = False
    examples: str = ""  # of fs_cot


class Request(NamedTuple):
    sample_index: int
    step: int  # 1, or 2: the answer after the rationale
    keys: dict  # {completion_index: key} of what it asks for
    body: dict

    @property
    def key(self):
        return next(iter(self.keys.values()))


def stop_strings(plan):
    """Where a completion ends: few-shot examples teach a base model to go on with a next question; the paper's labels end in END."""
    return (
        ["\nQ:"]
        if plan.template == "fs_cot"
        else [" END"]
        if plan.family == "openai" and plan.template.startswith("ft")
        else []
    )


@functools.lru_cache
def parameters(plan, step):
    """-> (what every request of a step sends besides its text, the same as JSON)."""
    temperature = (
        plan.temperature if step == 1 or plan.temperature is None else 0.0
    )  # the answer is read off greedily
    limit = (
        "max_completion_tokens"
        if plan.api == "chat" and not plan.legacy_max_tokens
        else "max_tokens"
    )
    fixed = {"model": plan.model, limit: plan.max_new_tokens} | (
        {"temperature": temperature} if temperature is not None else {}
    )
    fixed |= (
        {"stop": stop_strings(plan)}
        if plan.api == "completions" and stop_strings(plan) and step == 1
        else {}
    )
    return fixed, json.dumps([plan.api, fixed], sort_keys=True)


def conversation(plan, prompt, reasoning):
    """-> the texts of Zero-shot-CoT's second step (paper §3, step 1), which goes on after the reasoning; chat models take it in turns."""
    return (
        [prompt, reasoning, tasks.COT_ANSWER.strip()]
        if plan.api == "chat"
        else [prompt + reasoning + tasks.COT_ANSWER]
    )


def request_body(plan, step, texts):
    """-> the body of a request for one choice."""
    if plan.api == "completions":
        return {**parameters(plan, step)[0], "prompt": texts[0]}
    messages = [
        {"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), texts)
    ]
    return {**parameters(plan, step)[0], "messages": messages}


def prompt_of(plan, sample):
    return tasks.format_sample(
        plan.template, plan.family, sample["question"], examples=plan.examples
    )[0]


def key_of(plan, step, texts, sample_index, k):
    """-> what names a completion: 20 hex digits of all that is asked, for which sample, its number and its step."""
    asked = "\0".join([parameters(plan, step)[1], *texts, f"{sample_index} {k} {step}"])
    return hashlib.sha256(asked.encode()).hexdigest()[:20]


def goes_on(row):
    """Whether step 2 makes sense: a rationale that was cut, filtered or refused has no answer to read off."""
    return row["finish_reason"] == "stop" and bool((row["completion"] or "").strip())


def steps_of(plan, rows, sample, k):
    """-> [(key, texts)] of completion k of a sample: step 1 and, once the journal's rows {key: row} hold its rationale, step 2."""
    index = sample["sample_index"]
    texts = [prompt_of(plan, sample)]
    steps = [(key_of(plan, 1, texts, index, k), texts)]
    first = rows.get(steps[0][0])
    if plan.template == "zs_cot" and first and goes_on(first):
        texts = conversation(plan, texts[0], first["completion"])
        steps.append((key_of(plan, 2, texts, index, k), texts))
    return steps


def next_requests(plan, rows, sample, ks):
    """-> the requests that completions ks of a sample need next; [] when all is there."""
    index = sample["sample_index"]
    steps = {k: steps_of(plan, rows, sample, k) for k in ks}
    missing = {k: first[0] for k, [first, *_] in steps.items() if first[0] not in rows}
    if missing:
        body = request_body(plan, 1, [prompt_of(plan, sample)]) | (
            {"n": len(missing)} if len(missing) > 1 else {}
        )
        return [Request(index, 1, missing, body)]
    return [
        Request(index, 2, {k: key}, request_body(plan, 2, texts))
        for k, [_, *second] in steps.items()
        for key, texts in second
        if key not in rows
    ]


def all_units(plan, samples):
    """The queue: (sample, completion indices that one request may ask for)."""
    for sample in samples:
        for k in range(0, plan.degree, plan.choices):
            yield sample, range(k, min(k + plan.choices, plan.degree))


# ---------------- Workers


def make_rows(request_keys, sample_index, step, choices, usage, model, attempts, unanswered):
    """-> the journal's rows: one a choice; what the request as a whole cost stands in the first."""
    rows = [
        {
            "key": key,
            "sample_index": sample_index,
            "completion_index": k,
            "step": step,
            **choice,
            "model": model,
        }
        for (k, key), choice in zip(request_keys.items(), choices)
    ]
    rows[0] |= {"usage": usage, "attempts": attempts, "unanswered": unanswered}
    return rows


async def ask(run, request):
    """Ask for one request's completions and write them to the journal; a failure goes to the failures file."""
    import httpx2

    prompt, completion = most_tokens(request.body)
    cost = dollars(run.args, prompt, completion)
    n = len(request.keys)

    async def send():
        """One attempt; -> (choices, usage, model).  Raises BadReply where the server sent no answer."""
        response = await run.client.post(
            ENDPOINTS[run.plan.api],
            body=request.body,
            cast_to=httpx2.Response,
            options={"headers": {"X-Client-Request-Id": request.key}},
        )
        try:
            reply = json.loads(response.content)
        except (ValueError, RecursionError):
            raise BadReply(f"a reply that is not JSON: {response.text[:200]!r}") from None
        return read_reply(reply, run.plan.api, n)

    try:
        (choices, usage, model), attempts, unanswered = await attempt(
            run, send, prompt / 4 + completion, cost
        )
    except Failed as e:
        run.failed_keys.add(request.key)
        return fail(run, request.key, request.sample_index, request.step, list(request.keys), e)
    rows = make_rows(
        request.keys,
        request.sample_index,
        request.step,
        choices,
        usage,
        model,
        attempts,
        unanswered,
    )
    paid = dollars(run.args, usage["prompt_tokens"], usage["completion_tokens"]) if usage else cost
    if cost and not usage:
        rows[0]["possible_cost"] = cost
    run.requests = run.requests + 1
    run.spent = run.spent + paid
    for k, count in (usage or {"usage_unknown": 1}).items():
        run.tokens[k] += count
    await record(run, rows)


async def worker(run, units):
    """Take the next unit from the queue that all workers share, and ask until nothing of it is missing but what failed."""
    try:
        for sample, ks in units:
            while requests := [
                r
                for r in next_requests(run.plan, run.journal.rows, sample, ks)
                if r.key not in run.failed_keys
            ]:
                for request in requests:
                    await ask(run, request)
    except Stopped:
        pass


async def collect(args, plan, path, samples):
    """Ask, with many workers at once, for everything that the journal lacks; -> the finished Run."""
    gc.disable()  # 100,000 rows are read a third faster
    try:
        run = Run(args, plan, path)
        todo = [
            unit
            for unit in all_units(plan, samples)
            if next_requests(plan, run.journal.rows, *unit)
        ]
    finally:
        gc.freeze()
        gc.enable()
    async with run:
        units = iter(todo)
        total = len(samples) * plan.degree
        steps = 2 if plan.template == "zs_cot" else 1
        there = total - sum(len(ks) for _, ks in todo)
        asking = f"; asking {plan.model} for the rest" if todo else ""
        print(
            f"sample: {there} of {total} completions are in {run.journal.path}{asking}", flush=True
        )
        reporter = asyncio.create_task(
            report(
                run,
                lambda: f"{there + run.requests * plan.choices // steps} of {total} completions",
            )
        )
        try:
            await asyncio.gather(
                *(worker(run, units) for _ in range(min(args.concurrency, len(todo))))
            )
        finally:
            reporter.cancel()
    return run


async def report(run, done):
    """A running line: every 10 seconds, or every second where someone looks on."""
    looked_at = sys.stderr.isatty()
    while True:
        await asyncio.sleep(1 if looked_at else 10)
        print(
            f"\r{done()}; {progress(run)}\033[K" if looked_at else f"{done()}; {progress(run)}",
            end="" if looked_at else "\n",
            file=sys.stderr,
            flush=True,
        )


def progress(run):
    """failed, requests and their rate, tokens, dollars"""
    minutes = (time.monotonic() - run.started) / 60
    t = run.tokens
    cost = f", ${run.spent:.4f}" if run.args.price_in is not None else ""
    unknown = (
        f" and those of {t['usage_unknown']} requests that the server did not count"
        if t["usage_unknown"]
        else ""
    )
    return (
        f"{len(run.failed_keys)} failed; {run.requests} requests, {run.requests / minutes:.0f} a minute; in all "
        f"{t['prompt_tokens']} prompt and {t['completion_tokens']} completion tokens{unknown}{cost}"
    )


# ---------------- From the journal to the completion file


def make_completion(plan, sample, k, first, second=None):
    """-> one row of the completion file from the journal's rows of its steps (second: None where there is none)."""
    text = first["completion"] or ""
    last = second or first
    ends = [
        text.find(stop) for stop in stop_strings(plan) if stop in text
    ]  # some servers leave the stop string in
    row = {
        "sample_index": sample["sample_index"],
        "completion_index": k,
        "question": sample["question"],
        "answer": sample["answer"],
        "prompt": prompt_of(plan, sample),
        "completion": text[: min(ends)] if ends else text,
        "finish_reason": "stop" if ends else first["finish_reason"],
    }
    if plan.template == "zs_cot":
        row |= {
            "reasoning_" + name: row[name] for name in ("prompt", "completion", "finish_reason")
        }
        row |= {
            "prompt": tasks.COT_ANSWER.strip()
            if plan.api == "chat"
            else row["prompt"] + text + tasks.COT_ANSWER,
            "completion": second and second["completion"] or "",
            "finish_reason": second and second["finish_reason"],
        }
    return (
        row
        | {"api": plan.api, "model": last["model"]}
        | ({"refusal": last["refusal"]} if "refusal" in last else {})
    )


def dataset(plan, samples, rows):
    """-> ({"<sample_index>": [row, ...]} of every completion whose steps are all in rows, the journal's rows behind it, missing)."""
    data = {}
    used = []
    missing = 0
    for sample in samples:
        for k in range(plan.degree):
            found = [rows.get(key) for key, _ in steps_of(plan, rows, sample, k)]
            if None in found:
                missing += 1
                continue
            used += found
            data.setdefault(str(sample["sample_index"]), []).append(
                make_completion(plan, sample, k, *found)
            )
    return data, used, missing


def publish(path, metadata, plan, samples, rows):
    """Write the completion file from the journal, which keeps every row: so nothing is lost by writing over an older file."""
    data, used, missing = dataset(plan, samples, rows)
    if not data:
        raise UserError(
            f"{path.with_suffix('.journal.jsonl')} holds no completion that was asked for with these flags: use those of "
            "--stage sample"
        )
    settings = metadata["settings"] | {"missing": missing}
    storage.write_json(
        path, {"metadata": metadata | {"settings": settings, "usage": totals(used)}, "data": data}
    )
    print(
        f"sample: {len(samples)} questions x {plan.degree}"
        + (f", {missing} completions missing" if missing else "")
        + f" -> {path}"
    )
    return path


def summarise(run, samples, task, rules):
    """Print what this run did, the share of correct completions so far, and a warning where sampling is not random; -> missing."""
    data, _, missing = dataset(run.plan, samples, run.journal.rows)
    rows = [row for many in data.values() for row in many]
    right = sum(
        tasks.grade(task, run.plan.template, row["completion"], row["answer"], rules).correct
        for row in rows
    )
    share = (
        f"; {100 * right / len(rows):.1f}% of {len(rows)} are correct so far ({rules} rules)"
        if rows
        else ""
    )
    print(f"sample: {progress(run)}{share}")
    text = "reasoning_completion" if run.plan.template == "zs_cot" else "completion"
    many = [[row[text] for row in rows] for rows in data.values() if len(rows) > 1]
    same = sum(len(set(texts)) == 1 for texts in many)
    if same and run.plan.temperature != 0:
        print(
            f"warning: all completions of {same} of {len(many)} questions are identical: does the server sample?  (transformers serve "
            "does only where the model's generation_config.json says do_sample: true)"
        )
    return missing


def fill(args, plan, path, metadata, samples):
    """Write the completion file of an API model from the journal and from what is asked for now.  Raises UserError where some of
    it is missing at the end: what was answered is in the journal."""
    run = asyncio.run(collect(args, plan, path, samples))
    total = len(samples) * plan.degree
    missing = summarise(
        run, samples, metadata["dataset_key"], args.rules or default_rules(plan.api)
    )
    if isinstance(run.reason, KeyboardInterrupt):
        raise run.reason
    if run.reason:
        raise UserError(
            f"{run.reason} ({total - missing} of {total} completions are there, in {run.journal.path})"
        )
    if missing:
        raise UserError(
            f"{missing} of {total} completions are missing, {len(run.failed_keys)} requests failed ({run.failures.path} says "
            "why): start the same command again to ask for them, or go on without them from --stage curate"
        )
    return publish(path, metadata, plan, samples, run.journal.rows)


# ---------------- Stage sample, for a teacher that is neither the toy nor a local model


def default_rules(api):
    """Chat models write their answers in sentences that the paper's rules often misread."""
    return "flexible" if api == "chat" else "paper"


def rules_of(args, metadata):
    """-> the rules that curate a completion file: --rules, or what suits the model that wrote it."""
    return args.rules or default_rules(metadata.get("settings", {}).get("api"))


def teacher_samples(args):
    train, test = tasks.load_split(args.task, args.split, args.data)
    samples = tasks.load(args.task, args.data)
    return [samples[i] for i in sorted(train + (test if args.teacher_part == "all" else []))]


def teacher_plan(args):
    examples = (
        evaluate.few_shot_prompt(args.task, args.data) if args.teacher_method == "fs_cot" else ""
    )
    return Plan(
        args.teacher,
        args.api,
        args.teacher_method,
        "chat" if args.api == "chat" else "decoder",
        args.teacher_max_new_tokens,
        None if args.no_temperature else args.temperature,
        args.degree,
        args.choices,
        args.legacy_max_tokens,
        examples,
    )


def with_settings(metadata, plan, samples):
    settings = {
        k: v for k, v in plan._asdict().items() if k not in ("family", "choices", "examples")
    }
    return metadata | {
        "settings": settings
        | {"examples": storage.fingerprint(plan.examples), "samples": storage.fingerprint(samples)}
    }


def sample(args, path, metadata):
    """The completion file of --teacher: as it is where a user put it there, else sampled through the API.

    Raises UserError where there is neither a file nor an API to ask."""
    journal = path.with_suffix(".journal.jsonl")
    ours = journal.exists() and journal.stat().st_size > 0
    if args.dry_run:
        return dry_run(args, path)
    if path.exists() and not (ours and has_api(args)):
        print(f"sample: using the completions of {args.teacher} at {path}")
        return path
    if not has_api(args):
        raise UserError(
            f"there are no completions of {args.teacher} for {args.task} at {path}: put the teacher's completion file there "
            "(saved/README.md has the format), set OPENAI_API_KEY or --base_url to sample it through the API, or take a "
            "local teacher, hf:NAME"
        )
    plan = teacher_plan(args)
    samples = teacher_samples(args)
    if args.degree > 1 and plan.temperature == 0:
        raise UserError(
            f"--degree {args.degree} at --temperature 0 would buy {args.degree} identical rationales: use --temperature 0.7"
        )
    metadata = with_settings(metadata, plan, samples)
    if path.exists() and storage.settings_match(
        "sample",
        path,
        evaluate.read_completions(path, args.task)[0].get("settings"),
        metadata["settings"] | {"missing": 0},
    ):
        return path
    if args.batch:
        from extras import batch_api as batch

        return batch.step(args, plan, path, metadata, samples)
    return fill(args, plan, path, metadata, samples)


def taken_up(file):
    """-> the journal in a file, to read only."""
    journal = storage.Journal(file)
    journal.close()
    check_journal(journal)
    return journal


def publish_partial(args, path, metadata):
    """For --stage curate: where sampling is unfinished, write the completion file from what the journal holds, asking for nothing."""
    file = path.with_suffix(".journal.jsonl")
    old = (
        evaluate.read_completions(path, args.task)[0].get("settings", {})
        if path.exists()
        else {"missing": True}
    )
    if not file.exists() or not (
        old.get("missing") or old.get("degree", args.degree) < args.degree
    ):
        return
    plan = teacher_plan(args)
    samples = teacher_samples(args)
    journal = taken_up(file)
    publish(path, with_settings(metadata, plan, samples), plan, samples, journal.rows)


# ---------------- Dry run


def token_counter(student):
    """-> (texts -> tokens in all, how it counts): the tokenizer of a student's folder, or 4 characters a token."""
    file = Path(student) / "tokenizer.json"
    if file.is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file))
        return lambda texts: sum(
            len(e.ids) for e in tokenizer.encode_batch(texts)
        ), f"prompts counted by the tokenizer of {student}"
    return lambda texts: sum(map(len, texts)) // 4, "prompts at 4 characters a token"


def estimate(args, path, count):
    """-> (requests, prompt tokens, completion tokens) that a run would ask for; tokens of completions at their most."""
    plan = teacher_plan(args)
    samples = teacher_samples(args)
    file = path.with_suffix(".journal.jsonl")
    rows = taken_up(file).rows if file.exists() else {}
    texts = []
    completions = 0
    answers = 0
    for sample, ks in all_units(plan, samples):
        for request in (
            next_requests(plan, rows, sample, ks)
            if rows
            else [Request(0, 1, dict.fromkeys(ks), {})]
        ):
            second = (
                len(request.keys) if plan.template == "zs_cot" else 0
            )  # answers to read off, each in a request of its own
            texts += [prompt_of(plan, sample)] * ((request.step == 1) + second)
            completions = completions + len(request.keys) * (request.step == 1) + second
            answers = answers + second
    return (
        len(texts),
        count(texts) + answers * (plan.max_new_tokens + 8),
        completions * plan.max_new_tokens,
    )


def dry_run(args, path):
    """Print what would be asked and, given prices, cost.  --task all: of every benchmark that is prepared."""
    count, how = token_counter(args.student)
    everything = [0, 0, 0]
    for task in (
        [task for task in tasks.TASKS if task != "toy"] if args.task == "all" else [args.task]
    ):
        args.task = task
        try:
            numbers = estimate(args, path.with_name(f"D_{task}.json"), count)
        except UserError as e:
            print(f"dry run: {task} is left out: {e}")
            continue
        everything = [a + b for a, b in zip(everything, numbers)]
        print_estimate(args, task, *numbers)
    print_estimate(args, f"in all, {how}", *everything)


def print_estimate(args, what, requests, prompt, completion):
    cost = (
        f", at most ${dollars(args, prompt, completion):,.2f}" if args.price_in is not None else ""
    )
    print(
        f"dry run: {what}: {requests:,} requests, {prompt:,} prompt tokens and at most {completion:,} completion tokens{cost}"
    )
