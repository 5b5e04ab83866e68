"""The slow lanes of the OpenAI API: batches (half the price, within a day) and fine-tuning jobs.

Batches work on the journal of teacher.py: submit what it lacks, fetch what is ready, submit what is
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

import replies
import steps
import storage
import teacher
from api import ApiConfig, ApiSession, RequestError, RunStopped, call_with_retries
from completions import SamplingConfig
from replies import InvalidReplyError
from steps import Request, Samples
from storage import UserError

MAX_SHARD_REQUESTS = 50_000  # of one batch; the API's limits are these and 200 MB
MAX_SHARD_BYTES = 190_000_000
FINAL_STATUSES = ("completed", "failed", "expired", "cancelled")
POLL_SECONDS = 30.0  # between two looks at a fine-tuning job
FINAL_JOB_STATUSES = ("succeeded", "failed", "cancelled")
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
    problems = asyncio.run(session.run(run_step(session, command, path, plan, samples)))
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
        names = ", ".join(shard.batch_id or f"shard {shard.number}" for shard in shards[:3])
        raise UserError(
            f"{requests} requests are under way in {len(shards)} batches ({names}) and would be "
            "paid for twice: --batch fetch brings their answers, --batch cancel gives them up"
        )


def open_shards(notes: storage.Journal) -> list[Shard]:
    """Return the shards that are neither void nor fetched."""
    shards = []
    for number in range(count_intents(notes)):
        if f"void {number}" in notes.rows or f"fetched {number}" in notes.rows:
            continue
        batch_id = notes.rows.get(f"batch {number}", {}).get("id")
        shards.append(Shard(number, notes.rows[f"intent {number}"], batch_id))
    return shards


def count_intents(notes: storage.Journal) -> int:
    return sum(key.startswith("intent ") for key in notes.rows)


async def call(
    session: ApiSession, send: Callable[[], Awaitable[Any]], timeout: float | None = None
) -> Any:
    """Return what `await send()` gives.  Raises RequestError, RunStopped."""
    reply, _, _ = await call_with_retries(session, send, timeout=timeout)
    return reply


async def upload(session: ApiSession, name: str, content: bytes, purpose: str) -> str:
    """Return the id of the uploaded JSON-lines file."""
    file = (f"{name}.jsonl", content)
    send = functools.partial(session.client.files.create, file=file, purpose=purpose)
    return (await call(session, send, TRANSFER_TIMEOUT)).id


# ---------------- Submit


async def find_batch(batches: Batches, number: int) -> str | None:
    """Return the id of the batch that was created for a shard: its metadata name the shard."""
    run = batches.notes.rows["run"]["id"]
    oldest = batches.notes.rows[f"intent {number}"]["time"] - 86400  # whatever the clocks say
    async for batch in batches.session.client.batches.list(limit=100):
        if (batch.metadata or {}).items() >= {"run": run, "shard": str(number)}.items():
            return batch.id
        if batch.created_at < oldest:  # they come newest first
            return None
    return None


async def reconcile_intents(batches: Batches) -> None:
    """Look up the shards of which a kill or a lost reply left only the intent."""
    for shard in open_shards(batches.notes):
        if shard.batch_id is not None:
            continue
        send = functools.partial(find_batch, batches, shard.number)
        batch_id = await call(batches.session, send)
        note = {"key": f"void {shard.number}", "why": "it was never created"}
        if batch_id:
            note = {"key": f"batch {shard.number}", "id": batch_id}
        batches.notes.append([note])


async def submit(batches: Batches, samples: Samples) -> None:
    """Send what the journal lacks and no open batch holds, in shards."""
    waiting = set()
    for shard in open_shards(batches.notes):
        waiting |= {request["key"] for request in shard.intent["requests"]}
    requests = []
    rows = batches.session.journal.rows
    for unit in steps.list_units(batches.plan, samples):
        missing = steps.next_requests(batches.plan, rows, *unit)
        requests += [request for request in missing if request.key not in waiting]
    for shard_requests, content in split_into_shards(requests, batches.plan.api):
        await submit_shard(batches, shard_requests, content)
    under_way = f"{len(waiting)} were under way already"
    print(
        f"batch: {len(requests)} requests submitted, {under_way}; --batch fetch brings the answers"
    )


def split_into_shards(
    requests: Iterable[Request], api: str
) -> Iterator[tuple[list[Request], bytes]]:
    """Yield requests with the content of their input file, within the limits of a batch."""
    shard: list[Request] = []
    content = bytearray()
    for request in requests:
        url = "/v1" + steps.ENDPOINTS[api]
        row = {"custom_id": request.key, "method": "POST", "url": url, "body": request.body}
        line = json.dumps(row).encode() + b"\n"
        is_full = len(shard) >= MAX_SHARD_REQUESTS or len(content) + len(line) > MAX_SHARD_BYTES
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
    bounds = [steps.token_upper_bound(request.body) for request in requests]
    tokens = [sum(column) for column in zip(*bounds, strict=True)]
    cost = session.api.dollars(*tokens)
    check_budget(batches, len(requests), cost)
    intent = {"key": f"intent {number}", "time": int(time.time()), "api": plan.api, "cost": cost}
    intent["tokens"] = tokens  # at most, prompt's and completion's: prices may come later
    intent["requests"] = [
        {"key": r.key, "sample_index": r.sample_index, "step": r.step, "keys": r.keys}
        for r in requests
    ]
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
            metadata={"run": notes.rows["run"]["id"], "shard": str(number)},
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


def check_budget(batches: Batches, count: int, cost: float) -> None:
    """Stop the session where --max_cost has no room for a batch.  Raises RunStopped then."""
    session = batches.session
    limit = session.api.max_cost
    under_way = sum(cost_at_most(session, shard) for shard in open_shards(batches.notes))
    if limit is not None and session.spent + under_way + cost > limit:
        known = f"${session.spent:.4f} are spent, ${under_way:.4f} may be under way"
        session.stop(
            f"--max_cost {limit}: {known}, and the next {count} requests may cost ${cost:.4f}"
        )
        raise RunStopped


def cost_at_most(session: ApiSession, shard: Shard) -> float:
    """Return what a shard may cost in dollars, by today's prices where its tokens are noted."""
    if "tokens" in shard.intent and session.api.price_in is not None:
        return session.api.dollars(*shard.intent["tokens"])
    return shard.intent["cost"]


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
            note = {"key": f"void {shard.number}", "why": "the server does not know it any more"}
            batches.notes.append([note])
            print(f"batch {shard.batch_id}: {note['why']}, so it is given up")
            continue
        if batch.status not in (*FINAL_STATUSES, "cancelling"):
            send = functools.partial(batches.session.client.batches.cancel, shard.batch_id)
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
            ingest_results(batches, shard, batch, await download_results(batches, batch))
            if batch.status == "failed":
                words = batches.session.words
                said = [words(e.message) for e in getattr(batch.errors, "data", None) or ()]
                reason = "; ".join(said) or "the server does not say why"
                problems.append(f"batch {batch.id} failed: {reason}")
    if not shards:
        print("batch: none is under way")
    return problems


async def download_results(batches: Batches, batch: Any) -> list[Any]:
    """Return the lines of a batch's output and error files, either of which may be missing."""
    completed = 0
    if batch.request_counts:
        completed = batch.request_counts.completed
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
            values = [json.loads(line) for line in lines if line.strip()]
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
    wanted = {request["key"]: request for request in shard.intent["requests"]}
    seen = set()
    rows = []
    errors = []
    unknown = 0
    for line in lines:
        key = line.get("custom_id") if isinstance(line, dict) else None
        if key in seen:
            continue
        if key not in wanted:
            unknown += 1
            continue
        seen.add(key)
        keys = {int(k): name for k, name in wanted[key]["keys"].items()}  # JSON made texts of them
        request = Request(wanted[key]["sample_index"], wanted[key]["step"], keys, {})
        try:
            rows += read_result(line, shard.intent["api"], request)
        except InvalidReplyError as e:
            errors.append(batches.session.words(e))
            batches.session.bill(e, 0.0)  # a request that fails in a batch is not billed
            teacher.add_failure(batches.session, request, errors[-1])
    batches.session.journal.append(rows)
    answers = len(seen) - len(errors)
    missing = len(wanted) - len(seen)
    note = {"key": f"fetched {shard.number}", "status": batch.status, "answers": answers}
    note |= {"failed": len(errors), "missing": missing, "unknown": unknown}
    batches.notes.append([note])
    text = f"{answers} answers, {len(errors)} failed, {missing} missing, {unknown} unknown"
    if errors:
        text += f"; the first error: {errors[0]}"
    print(f"batch {batch.id}: {text}")


def read_result(line: dict[str, Any], api: str, request: Request) -> list[teacher.JournalRow]:
    """Return the journal's rows of a line of a result file.  Raises InvalidReplyError."""
    response = line.get("response") or {}
    if response.get("status_code") != 200:
        error = line.get("error") or response.get("body") or response
        words = replies.server_words(error) or json.dumps(error)
        raise InvalidReplyError("a request that failed", words)
    reply = replies.read_reply(response.get("body"), api, len(request.keys))
    rows = teacher.journal_rows(reply, request)
    rows[0] |= {"attempts": 1, "unanswered": 0}
    return rows


# ---------------- Fine-tuning jobs: students behind an API


def finetune_job_text(family: str, pairs: list[tuple[str, str]]) -> str:
    """Return the JSON lines of a fine-tuning job, byte for byte as published: no last newline."""
    lines = []
    for prompt, label in pairs:
        if family == "openai":
            line = {"prompt": prompt, "completion": label}
        else:
            turns = [("user", prompt), ("assistant", label)]
            line = {"messages": [{"role": role, "content": text} for role, text in turns]}
        lines.append(json.dumps(line))
    return "\n".join(lines)


def fine_tune(api: ApiConfig, base_model: str, data_file: Path, note_path: Path) -> str:
    """Have a student fine-tuned on data_file; return its name.

    The ids of file and job are kept in note_path: what exists is not made again.  Raises UserError
    where the job fails.
    """
    made_from = {"base_model": base_model, "sha256": storage.file_sha256(data_file)}
    note = storage.read_json(note_path) if note_path.exists() else made_from
    if not made_from.items() <= note.items():
        storage.move_to_backup(note_path)
        note = made_from
    if not note.get("model"):
        session = ApiSession(api, note_path)
        content = data_file.read_bytes()
        asyncio.run(session.run(finish_job(session, base_model, content, note_path, note)))
        session.raise_stop_reason()
    print(f"train: the student is {note['model']} ({note_path})")
    return note["model"]


async def finish_job(
    session: ApiSession, base_model: str, content: bytes, note_path: Path, note: dict[str, Any]
) -> None:
    """Upload, create the job, wait for its end; each id is in the note before the next step.

    Raises UserError where the job is refused or fails.
    """

    def keep(**columns: str) -> None:
        note.update(columns)
        storage.write_json(note_path, note)

    try:
        if "file" not in note:
            keep(file=await upload(session, note_path.stem, content, "fine-tune"))
        if "job" not in note:
            send = functools.partial(find_or_create_job, session, base_model, note["file"])
            keep(job=(await call(session, send)).id)
        job = await wait_for_job(session, note, keep, note_path)
    except RequestError as e:
        raise UserError(f"no fine-tuning job for {base_model}: {e}") from None
    except RunStopped:
        return
    keep(status=job.status)
    if job.status == "succeeded":
        keep(model=job.fine_tuned_model)
        return
    note.pop("job")  # the next start makes another
    keep()
    reason = session.words(getattr(job.error, "message", "no reason given"))
    raise UserError(f"the fine-tuning job {job.id} {job.status}: {reason}")


async def find_or_create_job(session: ApiSession, base_model: str, file_id: str) -> Any:
    """Return the job of an uploaded file: where a reply got lost, it is found, not made again."""
    jobs = session.client.fine_tuning.jobs
    async for job in jobs.list(limit=100):
        if job.training_file == file_id and job.status not in ("failed", "cancelled"):
            return job
    method = {"type": "supervised"}
    return await jobs.create(model=base_model, training_file=file_id, method=method)


async def wait_for_job(
    session: ApiSession, note: dict[str, Any], keep: Callable[..., None], note_path: Path
) -> Any:
    """Return the job of a note when it has ended.  Raises UserError where the server lost it."""
    import openai

    async def send() -> Any:
        """Look once."""
        try:
            return await session.client.fine_tuning.jobs.retrieve(note["job"])
        except openai.NotFoundError:
            what = f"the server knows no fine-tuning job {note['job']} any more"
            raise UserError(f"{what}: delete {note_path} to have the student made again") from None

    while (job := await call(session, send)).status not in FINAL_JOB_STATUSES:
        if job.status != note.get("status"):
            keep(status=job.status)
            hint = "Ctrl-C leaves it running, the same command looks again"
            print(f"train: job {job.id}: {job.status}; {hint}", flush=True)
        await session.sleep_or_stop(POLL_SECONDS)
    return job


def fine_tuned_model(note_path: Path) -> str:
    """Return the name of a student whose job has finished.  Raises UserError where it has not."""
    note = storage.read_json(note_path) if note_path.exists() else {}
    if not note.get("model"):
        raise UserError(f"there is no finished fine-tuning job in {note_path}: run --stage train")
    return note["model"]
