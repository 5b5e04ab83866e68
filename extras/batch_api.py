"""Batches of the OpenAI API: half the price, within a day.

They work on the journal of teacher.py: submit what it lacks, fetch what is ready, submit what is
missing then (step 2 of zs_cot, and what failed or expired).  What is under way counts as asked and
as spent: asking now waits for fetch or cancel.  What could be paid for twice is noted before it is
asked for, in D_<task>.batches.jsonl:

    run         a name for the batches of this file
    intent N    the requests of shard N, before its batch is created
    batch N     the id of its batch
    void N      it was refused, or never came to be
    fetched N   its results are in the journal
"""

import asyncio
import functools
import json
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import refusals
import replies
import steps
import storage
import teacher
from api import ApiConfig, ApiSession, RequestError, RunStopped, call_with_retries
from completions import SamplingConfig
from refusals import StatusError
from replies import InvalidReplyError
from steps import Request, Samples
from storage import UserError

MAX_SHARD_REQUESTS = 50_000  # of one batch; the API's limits are these and 200 MB
MAX_SHARD_BYTES = 190_000_000
FINAL_STATUSES = ("completed", "failed", "expired", "cancelled")
TRANSFER_TIMEOUT = 3600.0  # seconds for an upload or a download


class Batches(NamedTuple):
    """The batches of one completion file."""

    session: ApiSession
    plan: SamplingConfig
    notes: storage.Journal


class Shard(NamedTuple):
    """The requests of one batch; batch_id is None as long as it is not known to exist."""

    number: int
    intent: dict[str, Any]
    batch_id: str | None


def run_batch_command(
    command: str,
    path: Path,
    metadata: dict,
    plan: SamplingConfig,
    samples: Samples,
    api: ApiConfig,
    rules: str,
) -> Path:
    """Do one step of --batch: submit, status, cancel, or fetch, which writes the completion file.

    Raises UserError where a step fails: what was submitted or fetched before is written down.
    """
    metadata = teacher.with_settings(metadata, plan, samples)
    if teacher.is_finished(path, metadata):
        return path
    session = ApiSession(api, path)
    session.connect()
    work = run_step(session, command, path, plan, samples)
    problems = asyncio.run(session.run(work))
    session.raise_stop_reason()
    if problems:
        raise UserError("; ".join(problems))
    if command != "fetch":
        return path
    dataset = teacher.make_dataset(plan, samples, session.journal.rows)
    teacher.print_summary(session, plan, dataset, metadata["dataset_key"], rules)
    if not dataset.missing:
        return teacher.publish(path, metadata, dataset, samples)
    missing = f"{dataset.missing} completions are missing"
    print(f"sample: {missing}: --batch submit asks for what is not under way")
    return path


async def run_step(
    session: ApiSession, command: str, path: Path, plan: SamplingConfig, samples: Samples
) -> list[str]:
    """Return what went wrong, a sentence each."""
    notes = storage.Journal(path.with_suffix(".batches.jsonl"))
    batches = Batches(session, plan, notes)
    try:
        notes.append([{"key": "run", "id": uuid.uuid4().hex}])  # where there is one, it stays
        await reconcile_intents(batches)
        if command == "submit":
            await submit(batches, samples)
            return []
        if command == "cancel":
            await cancel(batches)
            return []
        return await poll_batches(batches, fetch=command == "fetch")
    except RunStopped:
        return []
    except RequestError as e:
        return [f"{e}: nothing is lost, start the same command again"]
    finally:
        notes.close()


def refuse_open_batches(path: Path) -> None:
    """Raise UserError where batches of a completion file are under way.

    Asking for the same now would buy it twice.
    """
    notes = storage.Journal(path.with_suffix(".batches.jsonl"))
    notes.close()
    shards = open_shards(notes)
    if shards:
        requests = sum(len(shard.intent["requests"]) for shard in shards)
        some = [shard.batch_id or f"shard {shard.number}" for shard in shards[:3]]
        names = ", ".join(some)
        raise UserError(
            f"{requests} requests are under way in {len(shards)} batches ({names}) and would be "
            "paid for twice: --batch fetch brings their answers, --batch cancel gives them up"
        )


def open_shards(notes: storage.Journal) -> list[Shard]:
    """Return the shards that are neither void nor fetched."""
    shards = []
    rows = notes.rows
    for number in range(count_intents(notes)):
        if f"void {number}" in rows or f"fetched {number}" in rows:
            continue
        batch = rows.get(f"batch {number}", {})
        shard = Shard(number, rows[f"intent {number}"], batch.get("id"))
        shards.append(shard)
    return shards


def count_intents(notes: storage.Journal) -> int:
    return sum(key.startswith("intent ") for key in notes.rows)


async def call(
    session: ApiSession, send: Callable[[], Awaitable[Any]], timeout: float | None = None
) -> Any:
    """Return what `await send()` gives.  Raises RequestError, RunStopped."""
    import openai

    async def send_plainly() -> Any:
        """Send once; of openai's exceptions, raise what is below them."""
        try:
            return await send()
        except openai.APIStatusError as e:
            cause = StatusError(e.response)
        except openai.APIConnectionError as e:
            cause = e.__cause__
        raise cause  # out here, where it gets no context that would have it as its cause

    reply, _, _ = await call_with_retries(session, send_plainly, timeout=timeout)
    return reply


async def upload(session: ApiSession, name: str, content: bytes, purpose: str) -> str:
    """Return the id of the uploaded JSON-lines file."""
    create = session.client.files.create
    file = (f"{name}.jsonl", content)
    send = functools.partial(create, file=file, purpose=purpose)
    uploaded = await call(session, send, TRANSFER_TIMEOUT)
    return uploaded.id


# ---------------- Submit


async def find_batch(batches: Batches, number: int) -> str | None:
    """Return the id of the batch that was created for a shard: its metadata name the shard."""
    rows = batches.notes.rows
    name = shard_name(batches, number)
    oldest = rows[f"intent {number}"]["time"] - 86400  # whatever the clocks say
    async for batch in batches.session.client.batches.list(limit=100):
        metadata = batch.metadata or {}
        if name.items() <= metadata.items():
            return batch.id
        if batch.created_at < oldest:  # they come newest first
            return None
    return None


def shard_name(batches: Batches, number: int) -> dict[str, str]:
    """Return the metadata that tell the batch of a shard from all others."""
    run = batches.notes.rows["run"]
    shard = str(number)
    return {"run": run["id"], "shard": shard}


async def reconcile_intents(batches: Batches) -> None:
    """Look up the shards of which a kill or a lost reply left only the intent."""
    for shard in open_shards(batches.notes):
        if shard.batch_id is not None:
            continue
        send = functools.partial(find_batch, batches, shard.number)
        batch_id = await call(batches.session, send)
        number = shard.number
        note = {"key": f"void {number}", "why": "it was never created"}
        if batch_id:
            note = {"key": f"batch {number}", "id": batch_id}
        batches.notes.append([note])


async def submit(batches: Batches, samples: Samples) -> None:
    """Send what the journal lacks and no open batch holds, in shards."""
    session, plan, notes = batches
    waiting = set()
    for shard in open_shards(notes):
        for request in shard.intent["requests"]:
            waiting.add(request["key"])
    requests = []
    rows = session.journal.rows
    for sample, ks in steps.list_units(plan, samples):
        missing = steps.next_requests(plan, rows, sample, ks)
        requests += [request for request in missing if request.key not in waiting]
    for shard_requests, content in split_into_shards(requests, plan.api):
        await submit_shard(batches, shard_requests, content)
    text = f"{len(requests)} requests submitted, {len(waiting)} were under way already"
    print(f"batch: {text}; --batch fetch brings the answers")


def split_into_shards(
    requests: Iterable[Request], api: str
) -> Iterator[tuple[list[Request], bytes]]:
    """Yield requests with the content of their input file, within the limits of a batch."""
    shard: list[Request] = []
    content = bytearray()
    url = "/v1" + steps.ENDPOINTS[api]
    for request in requests:
        row = {"custom_id": request.key, "method": "POST", "url": url, "body": request.body}
        text = json.dumps(row)
        line = text.encode() + b"\n"
        size = len(content) + len(line)
        is_full = len(shard) >= MAX_SHARD_REQUESTS or size > MAX_SHARD_BYTES
        if shard and is_full:
            yield shard, bytes(content)
            shard = []
            content.clear()
        shard.append(request)
        content += line
    if shard:
        yield shard, bytes(content)


async def submit_shard(batches: Batches, requests: list[Request], content: bytes) -> None:
    """Write down the intent, upload the file, create one batch, whatever the replies say.

    Raises RequestError where that is refused or given up.
    """
    session, plan, notes = batches
    number = count_intents(notes)
    intent = make_intent(batches, number, requests)
    check_budget(batches, len(requests), intent["cost"])
    notes.append([intent])

    async def create() -> str:
        """Create the batch of the shard, unless it is there; return its id."""
        found = await find_batch(batches, number)
        if found:  # an attempt whose reply got lost
            return found
        batch = await session.client.batches.create(
            input_file_id=file_id,
            endpoint="/v1" + steps.ENDPOINTS[plan.api],
            completion_window="24h",
            metadata=shard_name(batches, number),
        )
        return batch.id

    try:
        file_id = await upload(session, f"shard{number}", content, "batch")
        batch_id = await call(session, create)
    except RequestError as e:
        size = f"batch of {len(requests)} requests ({len(content)} bytes)"
        raise RequestError(f"{size}: {e}") from None
    notes.append([{"key": f"batch {number}", "id": batch_id}])
    print(f"batch {batch_id}: {len(requests)} requests submitted")


def make_intent(batches: Batches, number: int, requests: list[Request]) -> dict[str, Any]:
    """Return the note of a shard that is to be sent."""
    bounds = [steps.token_upper_bound(request.body) for request in requests]
    tokens = [sum(column) for column in zip(*bounds, strict=True)]
    noted = []
    for request in requests:
        columns = request._asdict()
        del columns["body"]
        noted.append({"key": request.key, **columns})
    return {
        "key": f"intent {number}",
        "time": int(time.time()),
        "api": batches.plan.api,
        "cost": batches.session.api.dollars(*tokens),
        "tokens": tokens,  # at most, prompt's and completion's: prices may come later
        "requests": noted,
    }


def check_budget(batches: Batches, count: int, cost: float) -> None:
    """Stop the session where --max_cost has no room for a batch.  Raises RunStopped then."""
    session = batches.session
    limit = session.api.max_cost
    if limit is None:
        return
    shards = open_shards(batches.notes)
    under_way = sum(cost_at_most(session, shard) for shard in shards)
    if session.spent + under_way + cost > limit:
        known = f"${session.spent:.4f} are spent, ${under_way:.4f} may be under way"
        session.stop(
            f"--max_cost {limit}: {known}, and the next {count} requests may cost ${cost:.4f}"
        )
        raise RunStopped


def cost_at_most(session: ApiSession, shard: Shard) -> float:
    """Return what a shard may cost in dollars, by today's prices where its tokens are noted."""
    intent = shard.intent
    if "tokens" in intent and session.api.price_in is not None:
        return session.api.dollars(*intent["tokens"])
    return intent["cost"]


# ---------------- Status, cancel and fetch


async def retrieve(batches: Batches, shard: Shard) -> Any:
    """Return a batch as the server has it; None where it does not know it any more."""
    import openai

    async def send() -> Any:
        """Ask once."""
        try:
            return await batches.session.client.batches.retrieve(shard.batch_id)
        except openai.NotFoundError:
            return None

    return await call(batches.session, send)


async def cancel(batches: Batches) -> None:
    """Cancel the batches under way; what they answered until then is still to be fetched.

    One that the server does not know any more is given up for good.
    """
    shards = open_shards(batches.notes)
    for shard in shards:
        batch = await retrieve(batches, shard)
        if batch is None:
            why = "the server does not know it any more"
            note = {"key": f"void {shard.number}", "why": why}
            batches.notes.append([note])
            print(f"batch {shard.batch_id}: {why}, so it is given up")
            continue
        has_ended = batch.status in FINAL_STATUSES
        if not has_ended and batch.status != "cancelling":
            client = batches.session.client
            send = functools.partial(client.batches.cancel, shard.batch_id)
            batch = await call(batches.session, send)
        print(f"batch {batch.id}: {batch.status}; --batch fetch brings what it answered")
    if not shards:
        print("batch: none is under way")


async def poll_batches(batches: Batches, fetch: bool) -> list[str]:
    """Print the status of each open batch and, with fetch, ingest those that ended.

    Returns what went wrong, a sentence each.
    """
    problems = []
    shards = open_shards(batches.notes)
    for shard in shards:
        batch = await retrieve(batches, shard)
        if batch is None:
            remedy = "--batch cancel gives it up, so that its requests can be asked again"
            problems.append(f"the server knows no batch {shard.batch_id} any more: {remedy}")
            continue
        text = f"batch {batch.id}: {batch.status}"
        counts = batch.request_counts
        if counts:
            text += f", {counts.completed} of {counts.total} done, {counts.failed} failed"
        print(text)
        if fetch and batch.status in FINAL_STATUSES:
            lines = await download_results(batches, batch)
            ingest_results(batches, shard, batch, lines)
            if batch.status == "failed":
                words = batches.session.words
                errors = getattr(batch.errors, "data", None) or ()
                said = [words(error.message) for error in errors]
                reason = "; ".join(said) or "the server does not say why"
                problems.append(f"batch {batch.id} failed: {reason}")
    if not shards:
        print("batch: none is under way")
    return problems


async def download_results(batches: Batches, batch: Any) -> list[Any]:
    """Return the lines of a batch's output and error files, either of which may be missing."""
    completed = 0
    counts = batch.request_counts
    if counts:
        completed = counts.completed
    lines = []
    for file_id, expected in ((batch.output_file_id, completed), (batch.error_file_id, 0)):
        if file_id:  # it may be null or ""
            lines += await download(batches, file_id, expected)
    return lines


async def download(batches: Batches, file_id: str, expected: int) -> list[Any]:
    """Return the values of a result file, which may not be complete at once.

    A file with fewer lines than expected is taken when it comes the same way twice.
    """
    import openai

    previous = ""

    async def send() -> list[Any]:
        """Download the lines once; raise where the file is not whole yet."""
        nonlocal previous
        try:
            reply = await batches.session.client.files.content(file_id)
            text = reply.content.decode()
            lines = text.split("\n")  # and nowhere else: U+2028 may stand inside a string
            lines = filter(str.strip, lines)
            values = [json.loads(line) for line in lines]
        except openai.NotFoundError as e:
            raise InvalidReplyError(f"the file {file_id} is not there", str(e)) from None
        except (ValueError, RecursionError):
            raise InvalidReplyError(f"the file {file_id} is not complete") from None
        if len(values) < expected and text != previous:
            previous = text
            found = f"{len(values)} of {expected}"
            raise InvalidReplyError(f"the file {file_id} lacks lines", found)
        return values

    return await call(batches.session, send, TRANSFER_TIMEOUT)


def ingest_results(batches: Batches, shard: Shard, batch: Any, lines: list[Any]) -> None:
    """Write a batch's answers to the journal and its errors to the failures; mark it fetched.

    The first line of a custom_id counts.
    """
    session = batches.session
    wanted = {request["key"]: request for request in shard.intent["requests"]}
    seen = set()
    rows = []
    errors = []
    unknown = 0
    for line in lines:
        key = None
        if isinstance(line, dict):
            key = line.get("custom_id")
        if key in seen:
            continue
        if key not in wanted:
            unknown += 1
            continue
        seen.add(key)
        request = noted_request(wanted[key])
        try:
            rows += read_result(line, shard.intent["api"], request)
        except InvalidReplyError as e:
            text = session.words(e)
            errors.append(text)
            session.bill(e, 0.0)  # a request that fails in a batch is not billed
            teacher.add_failure(session, request, text)
    session.journal.append(rows)
    failed = len(errors)
    answers = len(seen) - failed
    missing = len(wanted) - len(seen)
    note = {"key": f"fetched {shard.number}", "status": batch.status, "answers": answers}
    note |= {"failed": failed, "missing": missing, "unknown": unknown}
    batches.notes.append([note])
    text = f"{answers} answers, {failed} failed, {missing} missing, {unknown} unknown"
    if errors:
        text += f"; the first error: {errors[0]}"
    print(f"batch {batch.id}: {text}")


def noted_request(note: dict[str, Any]) -> Request:
    """Return a request of an intent, without its body."""
    keys = {}
    for k, key in note["keys"].items():
        keys[int(k)] = key  # JSON made texts of the numbers
    return Request(note["sample_index"], note["step"], keys, {})


def read_result(line: dict[str, Any], api: str, request: Request) -> list[teacher.JournalRow]:
    """Return the journal's rows of a line of a result file.  Raises InvalidReplyError."""
    response = line.get("response") or {}
    body = response.get("body")
    status = response.get("status_code")
    if status != 200:
        error = line.get("error") or body or response
        words = refusals.server_words(error) or json.dumps(error)
        raise InvalidReplyError("a request that failed", words)
    reply = replies.read_reply(body, api, len(request.keys))
    rows = teacher.journal_rows(reply, request)
    billing = {"attempts": 1, "unanswered": 0}
    rows[0] |= billing
    return rows
