"""Fine-tuning jobs: students behind an API.

fine_tune -> finish_job -> find_or_create_job, wait_for_job
"""

import asyncio
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import storage
from api import ApiConfig, ApiSession, RequestError, RunStopped
from extras.batch_api import call, upload
from storage import UserError

POLL_SECONDS = 30.0  # between two looks at a job
FINAL_JOB_STATUSES = ("succeeded", "failed", "cancelled")


def finetune_job_text(family: str, pairs: list[tuple[str, str]]) -> str:
    """Return the JSON lines of a fine-tuning job, byte for byte as published: no last newline."""
    lines = []
    for prompt, label in pairs:
        question = {"role": "user", "content": prompt}
        answer = {"role": "assistant", "content": label}
        line: dict[str, Any] = {"messages": [question, answer]}
        if family == "openai":
            line = {"prompt": prompt, "completion": label}
        lines.append(json.dumps(line))
    return "\n".join(lines)


def fine_tune(api: ApiConfig, base_model: str, data_file: Path, note_path: Path) -> str:
    """Have a student fine-tuned on data_file; return its name.

    The ids of file and job are kept in note_path: what exists is not made again.  Raises UserError
    where the job fails.
    """
    sha256 = storage.file_sha256(data_file)
    made_from = {"base_model": base_model, "sha256": sha256}
    note = read_note(note_path) or made_from
    if not made_from.items() <= note.items():
        storage.move_to_backup(note_path)
        note = made_from
    if not note.get("model"):
        session = ApiSession(api, note_path)
        session.connect()
        content = data_file.read_bytes()
        work = finish_job(session, base_model, content, note_path, note)
        asyncio.run(session.run(work))
        session.raise_stop_reason()
    print(f"train: the student is {note['model']} ({note_path})")
    return note["model"]


def read_note(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    return storage.read_json(path)


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
            job = await call(session, send)
            keep(job=job.id)
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
    said = getattr(job.error, "message", "no reason given")
    reason = session.words(said)
    raise UserError(f"the fine-tuning job {job.id} {job.status}: {reason}")


async def find_or_create_job(session: ApiSession, base_model: str, file_id: str) -> Any:
    """Return the job of an uploaded file: where a reply got lost, it is found, not made again."""
    jobs = session.client.fine_tuning.jobs
    async for job in jobs.list(limit=100):
        has_failed = job.status in ("failed", "cancelled")
        if job.training_file == file_id and not has_failed:
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
    note = read_note(note_path)
    if not note.get("model"):
        raise UserError(f"there is no finished fine-tuning job in {note_path}: run --stage train")
    return note["model"]
