"""The slow lanes of the OpenAI API: batches (half the price, within a day) and fine-tuning jobs.

Batches work on the journal of teacher.py: submit what it lacks, fetch what is ready, submit what is missing then (step 2 of
zs_cot, and what failed or expired).  Everything that could be paid for twice is written down before it is asked for, in
D_<task>.batches.jsonl:  run (a name for this file's batches), intent N (the requests of shard N), batch N (its id),
void N (it was refused or never came to be), fetched N (its results are in the journal).
"""

import asyncio
import json
import time
import uuid
from pathlib import Path

import evaluate
import tasks
import flags
import storage
from storage import UserError
from tasks import API_FAMILIES
from teacher import (
    ENDPOINTS,
    BadReply,
    Failed,
    Plan,
    Run,
    Stopped,
    all_units,
    attempt,
    default_rules,
    dollars,
    fail,
    fill,
    make_rows,
    most_tokens,
    next_requests,
    publish,
    read_reply,
    summarise,
    with_settings,
    words,
)

# of one batch (the API's limits: 50,000 and 200 MB)
SHARD_REQUESTS = 50_000
SHARD_BYTES = 190_000_000
FINAL = ("completed", "failed", "expired", "cancelled")
POLL = 30.0  # s between two looks at a fine-tuning job
JOB_ENDS = ("succeeded", "failed", "cancelled")
PATIENCE = 3600.0  # s for an upload or a download


def step(args, plan, path, metadata, samples):
    """--batch submit, status or fetch; writes the completion file when all is there.  Raises UserError."""
    run, problems = asyncio.run(take_step(args, plan, path, samples))
    if isinstance(run.reason, KeyboardInterrupt):
        raise run.reason
    problems += [run.reason] if run.reason else []
    if problems:
        raise UserError("; ".join(problems))
    if args.batch == "fetch":
        missing = summarise(run, samples, args.task, args.rules or default_rules(plan.api))
        if not missing:
            return publish(path, metadata, plan, samples, run.journal.rows)
        print(
            f"sample: {missing} completions are missing: --batch submit asks for what is not under way"
        )
    return path


async def take_step(args, plan, path, samples):
    """-> (the finished Run, what went wrong: one sentence each)."""
    async with Run(args, plan, path) as run:
        notes = storage.Journal(path.with_suffix(".batches.jsonl"))
        problems = []
        try:
            notes.append([{"key": "run", "id": uuid.uuid4().hex}])  # the first one stays
            await settle(run, notes)
            if args.batch == "submit":
                await submit(run, notes, samples)
            else:
                problems = await look(run, notes, fetch=args.batch == "fetch")
        except Stopped:
            pass
        except Failed as e:
            problems = [f"{e}: nothing is lost, start the same command again"]
        finally:
            notes.close()
    return run, problems


def open_shards(notes):
    """-> [(number, its intent, its batch's id or None)] of the shards that are neither void nor fetched."""
    rows = notes.rows
    numbers = range(sum(key.startswith("intent ") for key in notes.rows))
    return [
        (n, rows[f"intent {n}"], rows.get(f"batch {n}", {}).get("id"))
        for n in numbers
        if f"void {n}" not in rows and f"fetched {n}" not in rows
    ]


async def upload(run, name, content, purpose):
    """-> the id of the uploaded JSON-lines file."""
    file, _, _ = await attempt(
        run,
        lambda: run.client.files.create(file=(name + ".jsonl", content), purpose=purpose),
        timeout=PATIENCE,
    )
    return file.id


# ---------------- Submit


async def find_batch(run, notes, number):
    """-> the id of the batch that was made for a shard, or None.  Its metadata name the shard, so an unknown outcome is looked up."""
    async for batch in run.client.batches.list(limit=100):
        if (batch.metadata or {}).get("run") == notes.rows["run"]["id"] and batch.metadata.get(
            "shard"
        ) == str(number):
            return batch.id
        if batch.created_at < notes.rows[f"intent {number}"]["time"] - 86400:
            return None  # newest first: the rest is older than the intent, whatever the clocks say


async def settle(run, notes):
    """Look up the shards of which a kill or a lost reply left only the intent."""
    for number, _, batch_id in open_shards(notes):
        if batch_id is None:
            batch_id, _, _ = await attempt(run, lambda: find_batch(run, notes, number))
            found = {"key": f"batch {number}", "id": batch_id}
            notes.append(
                [found if batch_id else {"key": f"void {number}", "why": "it was never created"}]
            )


async def submit(run, notes, samples):
    """Send what the journal lacks and no open batch holds, in shards."""
    waiting = {
        request["key"] for _, intent, _ in open_shards(notes) for request in intent["requests"]
    }
    requests = [
        request
        for unit in all_units(run.plan, samples)
        for request in next_requests(run.plan, run.journal.rows, *unit)
        if request.key not in waiting
    ]
    shard = []
    size = 0
    for request in requests:
        line = {
            "custom_id": request.key,
            "method": "POST",
            "url": "/v1" + ENDPOINTS[run.plan.api],
            "body": request.body,
        }
        line = json.dumps(line) + "\n"
        if shard and (len(shard) >= SHARD_REQUESTS or size + len(line) > SHARD_BYTES):
            await submit_shard(run, notes, shard)
            shard = []
            size = 0
        shard.append((request, line))
        size += len(line)
    if shard:
        await submit_shard(run, notes, shard)
    print(
        f"batch: {len(requests)} requests submitted, {len(waiting)} were under way already; --batch fetch brings the answers"
    )


async def submit_shard(run, notes, shard):
    """Write down the intent, upload the file, create the batch: one, whatever the replies say.  Raises Failed where it is refused."""
    number = sum(key.startswith("intent ") for key in notes.rows)
    cost = sum(dollars(run.args, *most_tokens(request.body)) for request, _ in shard)
    under_way = sum(intent["cost"] for _, intent, _ in open_shards(notes))
    if run.args.max_cost is not None and run.spent + under_way + cost > run.args.max_cost:
        run.stop(
            f"--max_cost {run.args.max_cost}: ${run.spent:.4f} are spent, ${under_way:.4f} may be under way, and the next "
            f"{len(shard)} requests may cost ${cost:.4f}"
        )
        raise Stopped
    requests = [
        {"key": r.key, "sample_index": r.sample_index, "step": r.step, "keys": r.keys}
        for r, _ in shard
    ]
    notes.append(
        [
            {
                "key": f"intent {number}",
                "time": int(time.time()),
                "api": run.plan.api,
                "cost": cost,
                "requests": requests,
            }
        ]
    )
    data = "".join(line for _, line in shard).encode()

    async def create():
        return (
            await find_batch(run, notes, number)
            or (
                await run.client.batches.create(
                    input_file_id=file,
                    endpoint="/v1" + ENDPOINTS[run.plan.api],
                    completion_window="24h",
                    metadata={"run": notes.rows["run"]["id"], "shard": str(number)},
                )
            ).id
        )

    try:
        file = await upload(run, f"shard{number}", data, "batch")
        batch_id, _, _ = await attempt(run, create)
    except Failed as e:
        if e.refused:
            notes.append([{"key": f"void {number}", "why": str(e)}])
        raise Failed(f"batch of {len(shard)} requests ({len(data)} bytes): {e}") from None
    notes.append([{"key": f"batch {number}", "id": batch_id}])
    print(f"batch {batch_id}: {len(shard)} requests submitted")


# ---------------- Status and fetch


async def look(run, notes, fetch):
    """Print each open batch's status and, with fetch, take in the results of those that ended; -> problems."""
    problems = []
    shards = open_shards(notes)
    for number, intent, batch_id in shards:
        batch, _, _ = await attempt(run, lambda: run.client.batches.retrieve(batch_id))
        counts = batch.request_counts
        done = (
            f", {counts.completed} of {counts.total} done, {counts.failed} failed" if counts else ""
        )
        print(f"batch {batch_id}: {batch.status}{done}")
        if fetch and batch.status in FINAL:
            problems += await take_in(run, notes, number, intent, batch)
    if not shards:
        print("batch: none is under way")
    return problems


async def download(run, file_id, expected, seen):
    """-> the rows of a result file.  Raises BadReply where it is not all there (yet)."""
    import openai

    try:
        text = (await run.client.files.content(file_id)).content.decode()
        found = [
            json.loads(line) for line in text.split("\n") if line.strip()
        ]  # U+2028 may stand inside a string
    except openai.NotFoundError as e:
        raise BadReply(words(e)) from None
    except (ValueError, RecursionError):
        raise BadReply(f"the file {file_id} is not whole") from None
    if len(found) < expected and seen != [text]:
        seen[:] = [text]
        raise BadReply(
            f"the file {file_id} has {len(found)} lines, not {expected}"
        )  # if it comes so again, it is so
    return found


async def take_in(run, notes, number, intent, batch):
    """Write an ended batch's answers to the journal and its errors to the failures file, then mark it fetched; -> problems."""
    wanted = {request["key"]: request for request in intent["requests"]}
    lines = []
    completed = batch.request_counts.completed if batch.request_counts else 0
    for file_id, expected in ((batch.output_file_id, completed), (batch.error_file_id, 0)):
        if file_id:  # it may be null or ""
            seen = []
            found, _, _ = await attempt(
                run, lambda: download(run, file_id, expected, seen), timeout=PATIENCE
            )
            lines += found
    rows = []
    errors = []
    unknown = 0
    seen = set()
    for line in lines:
        key = line.get("custom_id") if isinstance(line, dict) else None
        if key not in wanted or key in seen:
            unknown += key not in wanted
            continue
        seen.add(key)
        request = wanted[key]
        response = line.get("response") or {}
        keys = {int(k): each for k, each in request["keys"].items()}
        try:
            if response.get("status_code") != 200:
                raise BadReply(json.dumps(line.get("error") or response.get("body") or response))
            reply = read_reply(response.get("body"), intent["api"], len(keys))
            rows += make_rows(keys, request["sample_index"], request["step"], *reply, 1, 0)
        except BadReply as e:
            errors.append(words(e))
            fail(run, key, request["sample_index"], request["step"], list(keys), Failed(errors[-1]))
    run.journal.append(rows)
    missing = len(wanted) - len(seen)
    notes.append(
        [
            {
                "key": f"fetched {number}",
                "status": batch.status,
                "answers": len(seen) - len(errors),
                "failed": len(errors),
                "missing": missing,
                "unknown": unknown,
            }
        ]
    )
    print(
        f"batch {batch.id}: {len(seen) - len(errors)} answers, {len(errors)} failed, {missing} missing, {unknown} unknown"
        + (f"; the first error: {errors[0]}" if errors else "")
    )
    said = "; ".join(words(e.message) for e in (batch.errors.data if batch.errors else None) or [])
    return (
        [f"batch {batch.id} failed: {said or 'the server does not say why'}"]
        if batch.status == "failed"
        else []
    )


# ---------------- Fine-tuning jobs: OpenAI-style students


def job_file(family, pairs):
    """-> the JSON lines of a fine-tuning job, byte for byte the published files: no newline at the end."""
    if family == "openai":
        return "\n".join(
            json.dumps({"prompt": prompt, "completion": label}) for prompt, label in pairs
        )
    turns = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": label}]
        for prompt, label in pairs
    ]
    return "\n".join(json.dumps({"messages": messages}) for messages in turns)


def fine_tune(args, data_file, note_path):
    """Have a student fine-tuned on data_file; -> its name.  What exists already (file, job) is taken up again, not made again.

    Raises UserError where the job fails."""
    made_from = {"base_model": args.student, "sha256": storage.file_sha256(data_file)}
    note = storage.read_json(note_path) if note_path.exists() else {}
    if note and any(note.get(k) != v for k, v in made_from.items()):
        storage.move_to_backup(note_path)
        note = {}
    note = note or made_from
    if not note.get("model"):
        asyncio.run(run_job(args, data_file.read_bytes(), note_path, note))
    print(f"train: the student is {note['model']} ({note_path})")
    return note["model"]


async def run_job(args, content, note_path, note):
    """Upload, create the job, wait for its end; each id is in the note before the next step."""
    async with Run(args, None, note_path) as run:

        def keep(**news):
            note.update(news)
            storage.write_json(note_path, note)

        try:
            if "file" not in note:
                keep(file=await upload(run, note_path.stem, content, "fine-tune"))
            if "job" not in note:
                job, _, _ = await attempt(
                    run, lambda: find_or_create_job(run, args.student, note["file"])
                )
                keep(job=job.id)
            while (
                job := (
                    await attempt(run, lambda: run.client.fine_tuning.jobs.retrieve(note["job"]))
                )[0]
            ).status not in JOB_ENDS:
                if job.status != note.get("status"):
                    keep(status=job.status)
                    print(
                        f"train: job {job.id}: {job.status}; Ctrl-C leaves it running, the same command looks again",
                        flush=True,
                    )
                await run.nap(POLL)
        except Failed as e:
            raise UserError(f"no fine-tuning job for {args.student}: {e}") from None
        except Stopped:
            raise (
                run.reason if isinstance(run.reason, KeyboardInterrupt) else UserError(run.reason)
            ) from None
        keep(
            status=job.status,
            **({"model": job.fine_tuned_model} if job.status == "succeeded" else {}),
        )
        if job.status != "succeeded":
            note.pop("job")  # so that the next start makes another
            keep()
            raise UserError(
                f"the fine-tuning job {job.id} {job.status}: {words(job.error.message) if job.error else 'no reason given'}"
            )


async def find_or_create_job(run, model, file_id):
    """A job is known by its uploaded file: where a reply got lost, the job that was created is found and no second one made."""
    async for job in run.client.fine_tuning.jobs.list(limit=100):
        if job.training_file == file_id and job.status not in ("failed", "cancelled"):
            return job
    return await run.client.fine_tuning.jobs.create(
        model=model, training_file=file_id, method={"type": "supervised"}
    )


def student(args, method):
    """-> of a student behind an API: the file its job's ids are kept in, its completion file, and what that says it is."""
    tuned = method.startswith("ft")
    key, run_key = (
        (flags.finetune_key(args, method), flags.train_key(args, method)) if tuned else (None, None)
    )
    who = {
        "base_model": storage.model_key(args.student),
        "completion_key": method,
        "finetune_key": key,
        "train_key": run_key,
    }
    note = (
        Path(args.saved)
        / "model_metadata"
        / f"B_{who['base_model']}"
        / f"F_{key}__T_{run_key}.json"
    )
    parts = [f"T_{run_key}" if tuned else f"S_{args.split}", *flags.samples_suffix(args)]
    return (
        note,
        storage.completion_path(args.saved, who["base_model"], method, args.task, *parts),
        who,
    )


def test(args, template, note_path, path, who):
    """Write the completion file of a student behind an API, on the test questions; -> its score."""
    model = args.student
    if template.startswith("ft"):
        model = storage.read_json(note_path).get("model") if note_path.exists() else None
        if not model:
            raise UserError(
                f"there is no finished fine-tuning job in {note_path}: run --stage train"
            )
    family = API_FAMILIES[args.label_style]
    _, indices = tasks.load_split(args.task, args.split, args.data)
    samples = tasks.load(args.task, args.data)
    samples = [samples[i] for i in indices]
    examples = evaluate.few_shot_prompt(args.task, args.data) if template == "fs_cot" else ""
    plan = Plan(
        model,
        "chat" if family == "chat" else "completions",
        template,
        family,
        args.max_new_tokens,
        args.eval_temperature if args.eval_samples > 1 else 0.0,
        args.eval_samples,
        args.eval_samples,
        examples=examples,
    )
    metadata = {
        "dataset_key": args.task,
        **who,
        "epoch": None,
        "prediction_template": template,
        "split": args.split,
        "part": "test",
    }
    fill(args, plan, path, with_settings(metadata, plan, samples), samples)
    return evaluate.score(path, "test", args.split, args.data)
