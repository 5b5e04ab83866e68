"""The Batch API and fine-tuning jobs, with all that can go wrong."""

import collections
import json
import re
from collections.abc import Callable, Iterator

import pytest
from api_server import ApiServer, Reply, Request, batch_line
from conftest import read_rows

import completions
import evaluate
import storage
from extras import batch_api, finetune_jobs

Lines = list[dict]


@pytest.fixture
def steps(ask, monkeypatch):
    """A step of --batch on 20 toy questions: -> (exit message or None, what was printed)."""
    monkeypatch.setattr(finetune_jobs, "POLL_SECONDS", 0.01)

    def step(name: str, *flags: object) -> tuple[str | None, str]:
        return ask("--batch", name, "--max_attempts", 4, *flags)

    return step


def finish(
    server: ApiServer,
    change: Callable[[Lines], list | None] = list,
    status: str = "completed",
    errors: Callable[[Lines], Lines] | None = None,
    **more: object,
) -> None:
    """Make every new batch end at once; `change` works on the lines of its output."""

    def end(batch: dict, lines: Lines) -> None:
        results = change([batch_line(line) for line in lines])
        done = len(results or [])
        failed = len(lines) - done
        batch["request_counts"] = {"total": len(lines), "completed": done, "failed": failed}
        error_lines = None
        if errors:
            error_lines = errors(lines)
        server.finish_batch(batch, results, status, error_lines, **more)

    server.batch_output = end


def input_lines(server: ApiServer, batch: dict) -> Iterator[dict]:
    for line in server.files[batch["input_file_id"]].decode().split("\n"):
        if line:
            yield json.loads(line)


def finish_now(server: ApiServer, batch: dict) -> None:
    server.finish_batch(batch, [batch_line(line) for line in input_lines(server, batch)])


def submitted(server: ApiServer) -> collections.Counter[str]:
    """Return how often each key was asked for in the input file of a batch."""
    keys: collections.Counter[str] = collections.Counter()
    for batch in server.batches:
        keys.update(line["custom_id"] for line in input_lines(server, batch))
    return keys


def test_run_batch_command_two_steps(server, ask, steps):
    """Two rounds for two steps give the same rows as asking now."""
    finish(server)
    flags = ("--teacher_method", "zs_cot", "--degree", 2, "--temperature", 0.7)
    file = ask.completion_file("zs_cot_t70")
    assert "40 requests submitted" in steps("submit", *flags)[1]
    assert "completed, 40 of 40 done" in steps("status", *flags)[1]
    assert not file.exists()
    assert "40 answers, 0 failed, 0 missing" in steps("fetch", *flags)[1]
    assert not file.exists()
    steps("submit", *flags)
    assert steps("fetch", *flags)[0] is None
    by_batch = storage.read_json(file)
    assert len(server.batches) == 2
    assert set(submitted(server).values()) == {1}
    assert ask(*flags)[0] is None
    assert not server.asked("/chat/completions"), "asking now finds all in the journal"
    file.unlink()
    file.with_suffix(".journal.jsonl").unlink()
    ask(*flags)
    assert storage.read_json(file)["data"] == by_batch["data"]


def test_run_batch_command_choices(server, ask, steps):
    """The one-step format takes one round, with several choices a request."""
    finish(server)
    flags = ("--degree", 3, "--choices", 3, "--temperature", 0.7)
    assert steps("submit", *flags)[0] is None
    assert steps("fetch", *flags)[0] is None
    assert len(submitted(server)) == 20
    assert len(read_rows(ask.completion_file("zs_cot_one_step_t70"))) == 60


def test_split_into_shards_requests(server, steps, monkeypatch):
    """Shards keep within the limit of requests."""
    finish(server)
    monkeypatch.setattr(batch_api, "MAX_SHARD_REQUESTS", 8)
    steps("submit")
    assert [batch["request_counts"]["total"] for batch in server.batches] == [8, 8, 4]
    assert steps("fetch")[0] is None


def test_split_into_shards_bytes(server, steps, monkeypatch):
    """Shards keep within the limit of bytes."""
    finish(server)
    monkeypatch.setattr(batch_api, "MAX_SHARD_BYTES", 5000)
    steps("submit")
    assert len(server.batches) > 1
    assert max(len(content) for content in server.files.values()) <= 5000
    assert sum(submitted(server).values()) == 20


def test_submit_under_way(server, steps, ask):
    """What is under way is not submitted again."""
    steps("submit")
    assert "0 requests submitted, 20 were under way already" in steps("submit")[1]
    assert len(server.batches) == 1
    assert "in_progress" in steps("fetch")[1]
    assert not ask.file.exists()


def test_refuse_open_batches(server, steps, ask):
    """What is in a batch is not bought a second time: a plain start says so and waits."""
    steps("submit")
    message, _ = ask()
    assert "20 requests are under way in 1 batches (batch_0)" in message
    assert "--batch fetch" in message
    assert "--batch cancel" in message
    assert not server.asked("/chat/completions")
    finish_now(server, server.batches[0])
    assert steps("fetch")[0] is None
    assert ask()[0] is None
    assert not server.asked("/chat/completions")


def test_cancel_partial(server, steps, ask):
    """Of a batch that is cancelled, what it answered is fetched, and the rest asked for now."""
    steps("submit")
    assert "batch batch_0: cancelling; --batch fetch" in steps("cancel")[1]
    lines = [batch_line(line) for line in input_lines(server, server.batches[0])]
    server.finish_batch(server.batches[0], lines[:12], "cancelled")
    assert "8 missing" in steps("fetch")[1]
    assert ask()[0] is None
    assert len(server.asked("/chat/completions")) == 8


def test_cancel_unknown(server, steps, ask):
    """A batch that the server has forgotten is given up by cancel; until then it is named."""
    steps("submit")
    server.batches.clear()
    server.answer = lambda request: Reply(404, {}) if "/batches/" in request.path else None
    assert "knows no batch batch_0 any more: --batch cancel" in steps("fetch")[0]
    assert "so it is given up" in steps("cancel")[1]
    server.answer = lambda request: None
    assert ask()[0] is None


def test_check_budget_open_batch(server, steps):
    """What is under way counts as spent at most, by the prices of today."""
    steps("submit")
    prices = ("--price_in", 1000, "--price_out", 10000)
    more = ("--teacher_max_new_tokens", 64, "--max_cost", 40)  # $18 more
    message, _ = steps("submit", *prices, *more)
    assert re.search(r"\$30\.\d+ may be under way, and the next 20 requests may cost \$1", message)


# ---------------------------------------------------------------- results


def message_of(line: dict) -> dict:
    return line["response"]["body"]["choices"][0]["message"]


def changed(lines: Lines, how: str) -> list:
    """The usual lines of an output file, with something odd about them."""
    copy = json.loads(json.dumps(lines[0]))
    if how == "shuffled":
        return lines[::-1]
    if how == "missing":
        return lines[3:]
    if how == "duplicate":
        message_of(copy)["content"] = "TWICE"
        return [*lines, copy]
    if how == "unknown":
        return [*lines, copy | {"custom_id": "nobody"}]
    if how == "500 in a row":
        body = {"error": {"message": "inner trouble"}}
        return [copy | {"response": {"status_code": 500, "body": body}}, *lines[1:]]
    if how == "U+2028":
        message_of(copy)["content"] = "Be\u2028cause"
        return [json.dumps(copy, ensure_ascii=False).encode() + b"\n", *lines[1:]]
    return [7, *lines]


MISSING = {"missing": 3, "500 in a row": 1}


@pytest.mark.parametrize(
    "how", ["shuffled", "missing", "duplicate", "unknown", "500 in a row", "U+2028", "odd line"]
)
def test_ingest_results_joined(server, steps, ask, how):
    """Results are joined by id; only what is missing is submitted again."""
    missing = MISSING.get(how, 0)
    finish(server, lambda lines: changed(lines, how))
    steps("submit")
    message, out = steps("fetch")
    assert message is None
    assert ask.file.exists() == (not missing)
    assert len(storage.read_jsonl(ask.journal)) == 20 - missing
    assert ("1 unknown" in out) == (how in ("unknown", "odd line"))
    assert ("inner trouble" in out) == (how == "500 in a row")
    finish(server)
    steps("submit")
    assert steps("fetch")[0] is None
    assert sum(submitted(server).values()) == 20 + missing
    texts = [row["completion"] for row in read_rows(ask.file)]
    assert len(texts) == 20
    assert "TWICE" not in texts
    assert ("Be\u2028cause" in texts) == (how == "U+2028")


@pytest.mark.parametrize("status", ["expired", "cancelled"])
def test_ingest_results_partial(server, steps, ask, status):
    """Of a batch that expired or was cancelled the partial results are kept."""

    def errors(lines: Lines) -> Lines:
        error = {"message": "batch_expired"}
        return [{"custom_id": line["custom_id"], "error": error} for line in lines[12:]]

    finish(server, lambda lines: lines[:12], status, errors)
    steps("submit")
    _, out = steps("fetch")
    assert status in out
    assert "12 answers, 8 failed" in out
    assert len(storage.read_jsonl(ask.journal)) == 12
    finish(server)
    steps("submit")
    assert steps("fetch")[0] is None
    assert sum(submitted(server).values()) == 28
    assert len(read_rows(ask.file)) == 20


def test_ingest_results_all_failed(server, steps, ask):
    """A completed batch in which every request failed is summarised."""

    def errors(lines: Lines) -> Lines:
        response = {"status_code": 400, "body": {"error": {"message": "bad prompt"}}}
        return [{"custom_id": line["custom_id"], "response": response} for line in lines]

    finish(server, lambda lines: None, errors=errors)
    steps("submit")
    message, out = steps("fetch")
    assert message is None
    assert "20 failed" in out
    assert "bad prompt" in out
    assert not ask.file.exists()


def test_download_results_no_file(server, steps, ask):
    """A file id that is null or empty is not fetched."""
    finish(server, lambda lines: None, error_file_id="", output_file_id=None)
    steps("submit")
    message, out = steps("fetch")
    assert message is None
    assert "20 missing" in out
    assert not server.asked("/content")
    assert not ask.file.exists()


def test_poll_batches_failed_validation(server, steps, ask):
    """A batch that fails validation says why and loses nothing."""
    errors = {"object": "list", "data": [{"message": "duplicate custom_id x", "code": "y"}]}
    # finish_batch takes its own `errors`: these are set on the batch itself.
    server.batch_output = lambda batch, lines: batch.update(status="failed", errors=errors)
    steps("submit")
    assert "failed: duplicate custom_id x" in steps("fetch")[0]
    finish(server)
    steps("submit")
    assert steps("fetch")[0] is None
    assert len(read_rows(ask.file)) == 20


@pytest.mark.parametrize("fault", ["404", "truncated", "cut"])
@pytest.mark.parametrize("times", [2, 99])
def test_download_incomplete(server, steps, ask, fault, times):
    """A result file that is not complete is fetched again, and nothing marked done."""
    finish(server)
    steps("submit")
    content = server.files["batch_0-output"]
    replies = {
        "404": Reply(404, {"error": {"message": "no file yet"}}),
        "truncated": Reply(body=content[:-200]),
        "cut": Reply(body=content, cut=500),
    }

    def answer(request: Request) -> Reply | None:
        if request.path.endswith("/content") and len(server.asked("/content")) <= times:
            return replies[fault]
        return None

    server.answer = answer
    message, _ = steps("fetch")
    if times == 99:
        assert "start the same command again" in message
        assert not ask.journal.exists()
        assert len(server.asked("/content")) == 4
        server.answer = lambda request: None
        message, _ = steps("fetch")
    assert message is None
    assert len(read_rows(ask.file)) == 20
    assert len(server.batches) == 1


# ---------------------------------------------------------------- lost replies, and money


def test_upload_too_large(server, steps):
    """A file that is too large is refused with a clear message, and can be submitted again."""
    too_large = Reply(413, {"error": {"message": "too large"}})
    server.answer = lambda request: too_large if request.path == "/files" else None
    message, _ = steps("submit")
    assert re.search(r"batch of 20 requests \(\d+ bytes\): the server answered 413: ", message)
    assert "too large" in message
    assert message.endswith("nothing is lost, start the same command again")
    assert not server.batches
    server.answer = lambda request: None
    assert "20 requests submitted" in steps("submit")[1]


@pytest.mark.parametrize("fault", [Reply(503, {}), Reply(close=True)])
def test_submit_shard_lost_reply(server, steps, ask, fault):
    """A lost reply to the creation leaves one batch."""

    def answer(request: Request) -> Reply | None:
        if request.path == "/batches" and request.method == "POST":
            server.usual(request)  # it is created, but the reply gets lost
            return fault
        return None

    server.answer = answer
    assert steps("submit")[0] is None
    assert len(server.batches) == 1
    server.answer = lambda request: None
    finish_now(server, server.batches[0])
    assert steps("fetch")[0] is None
    assert len(read_rows(ask.file)) == 20


@pytest.mark.parametrize("created", [True, False])
def test_reconcile_intents_unknown(server, steps, ask, created):
    """An intent whose outcome is unknown is looked up by the next step."""

    def answer(request: Request) -> Reply | None:
        if request.path != "/batches":
            return None
        if created and request.method == "POST":
            server.usual(request)
        return Reply(503, {})

    server.answer = answer
    assert "start the same command again" in steps("submit")[0]
    server.answer = lambda request: None
    del server.batches[1:]  # the lists failed too, so that each attempt may have created one
    expected = 20
    if server.batches:
        finish_now(server, server.batches[0])
        server.batches[0]["request_counts"] = None
        expected = 0
    finish(server)
    assert f"{expected} requests submitted" in steps("submit")[1]
    assert steps("fetch")[0] is None
    assert len(server.batches) == 1
    assert len(read_rows(ask.file)) == 20


def test_check_budget_no_room(server, steps):
    """A budget without room for the batch submits nothing."""
    message, _ = steps("submit", "--price_in", 1000, "--price_out", 10000, "--max_cost", 10)
    assert "--max_cost 10.0" in message
    assert "may cost $" in message
    assert not server.files


# ---------------------------------------------------------------- students behind an API


STUDENT = ("--teacher_method", "zs_cot", "--method", "ft_cot", "--student", "gpt-small")


@pytest.mark.parametrize(
    "style, columns", [("chat", {"messages"}), ("gpt3", {"prompt", "completion"})]
)
def test_fine_tune_student(server, ask, steps, tmp_path, style, columns):
    """A student is trained by a job, on the curated file, whose ids are kept."""
    flags = (*STUDENT, "--label_style", style)
    ask("--teacher_method", "zs_cot")
    assert ask("--stage", "curate", *flags)[0] is None
    [curated] = (tmp_path / "finetune_data/P_openai").glob("*.jsonl")
    assert {frozenset(row) for row in storage.read_jsonl(curated)} == {frozenset(columns)}
    assert ask("--stage", "train", *flags)[0] is None
    [note_path] = (tmp_path / "model_metadata/B_gpt-small").glob("F_*__T_*.json")
    note = storage.read_json(note_path)
    assert note["file"] == "file-0"
    assert note["job"] == "ftjob-0"
    assert note["model"] == "ft:gpt-small:x"
    assert note["status"] == "succeeded"
    assert server.files["file-0"] == curated.read_bytes()
    assert server.jobs[0]["method"] == {"type": "supervised"}
    assert ask("--stage", "train", *flags)[0] is None
    assert len(server.jobs) == 1


def test_wait_for_job_gone(server, ask, steps, tmp_path):
    """A job that the server has forgotten names the note to delete."""
    flags = (*STUDENT, "--label_style", "chat")
    ask("--teacher_method", "zs_cot")
    ask("--stage", "curate", *flags)
    server.answer = lambda request: Reply(404, {}) if "/jobs/" in request.path else None
    message, _ = ask("--stage", "train", *flags)
    [note_path] = (tmp_path / "model_metadata/B_gpt-small").glob("F_*__T_*.json")
    assert f"knows no fine-tuning job ftjob-0 any more: delete {note_path}" in message


@pytest.mark.parametrize("style, prompt", [("chat", "messages"), ("gpt3", "prompt")])
def test_fine_tuned_model_evaluated(server, ask, steps, tmp_path, style, prompt):
    """A student behind an API is evaluated like any other."""
    flags = (*STUDENT, "--label_style", style)
    ask("--teacher_method", "zs_cot")
    ask("--stage", "curate", *flags)
    ask("--stage", "train", *flags)
    before = len(server.asked())
    message, out = ask("--stage", "evaluate", *flags)
    assert message is None
    assert "ft_cot (rationales)" in out
    assert len(server.asked()) == before + 6
    assert server.asked()[-1].body["model"] == "ft:gpt-small:x"
    assert prompt in server.asked()[-1].body
    [file] = (tmp_path / "completion_data/B_gpt-small__C_ft_cot").glob("D_toy__T_*.json")
    assert completions.read_completions(file)[0]["prediction_template"] == "ft_cot_token"


def test_fine_tuned_model_missing(ask):
    """Evaluating a student whose job has not finished says what to do."""
    message, _ = ask("--stage", "evaluate", "--label_style", "chat", *STUDENT)
    assert "there is no finished fine-tuning job in" in message


def lose_job_replies(server: ApiServer, looks: int) -> None:
    """Create jobs without a reply; one is queued, and fails after so many requests."""
    usual = server.usual
    seen = []

    def answer(request: Request) -> Reply:
        seen.append(request)
        if len(seen) > looks and server.jobs:
            error = {"code": "x", "message": "too few samples"}
            server.jobs[0].update(status="failed", error=error)
        reply = usual(request)
        if request.path == "/fine_tuning/jobs" and request.method == "POST":
            server.jobs[-1]["status"] = "queued"
            return Reply(503, {})
        return reply

    server.answer = answer


def test_finish_job_lost_reply(server, ask, steps):
    """A lost reply to the creation of a job leaves one job; a failed one is told, and made anew."""
    flags = (*STUDENT, "--label_style", "chat", "--stage")
    ask("--teacher_method", "zs_cot")
    ask(*flags, "curate")
    lose_job_replies(server, looks=6)
    message, out = ask(*flags, "train")
    assert "the fine-tuning job ftjob-0 failed: too few samples" in message
    assert len(server.jobs) == 1
    assert "queued" in out
    server.answer = lambda request: None
    assert ask(*flags, "train")[0] is None
    assert len(server.jobs) == 2
    assert len(server.files) == 1


def test_api_key_in_files(server, ask, steps, tmp_path, capsys):
    """Batches and students behind an API keep the key to themselves; `ask` looks into files."""
    finish(server)
    for step in ("submit", "status", "fetch"):
        assert steps(step)[0] is None
    flags = (*STUDENT, "--label_style", "chat", "--rules", "paper")
    ask("--teacher_method", "zs_cot")
    for stage in ("curate", "train", "evaluate"):
        assert ask("--stage", stage, *flags)[0] is None
    assert (tmp_path / "model_metadata").exists()
    evaluate.main(["table", "--saved", str(tmp_path), "--allow_partial"])
    evaluate.main(["show", str(ask.file)])
    assert "sk-" not in f"{capsys.readouterr()}"
