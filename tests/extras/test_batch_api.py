"""The Batch API and fine-tuning jobs, with all that can go wrong.   python -m pytest tests/test_batch.py"""

import collections
import json
import re

import pytest

import evaluate
from api_server import Reply, batch_line
from extras import batch_api as batch
import storage as files


@pytest.fixture
def steps(ask, monkeypatch):
    """-> function: a step of --batch on 20 toy questions -> (exit message or None, what was printed)."""
    monkeypatch.setattr(batch, "POLL", 0.01)
    return lambda step, *flags: ask("--batch", step, "--max_attempts", 4, *flags)


def finish(server, change=lambda lines: lines, status="completed", errors=None, **more):
    """Every new batch ends at once; `change` works on the lines of its output."""

    def output(made, lines):
        results = change([batch_line(line) for line in lines])
        made["request_counts"] = {
            "total": len(lines),
            "completed": len(results or []),
            "failed": len(lines) - len(results or []),
        }
        server.finish_batch(made, results, status, errors(lines) if errors else None, **more)

    server.batch_output = output


def submitted(server):
    """How often each key was asked for in a batch's input file."""
    lines = [
        json.loads(line)
        for made in server.batches
        for line in server.files[made["input_file_id"]].decode().split("\n")
        if line
    ]
    return collections.Counter(line["custom_id"] for line in lines)


def test_two_rounds_for_two_steps_give_the_same_rows_as_asking_now(server, ask, steps, tmp_path):
    finish(server)
    flags = ("--teacher_method", "zs_cot", "--degree", 2, "--temperature", 0.7)
    file = tmp_path / "completion_data/B_gpt-test__C_zs_cot_t70/D_toy.json"
    assert "40 requests submitted" in steps("submit", *flags)[1]
    assert "completed, 40 of 40 done" in steps("status", *flags)[1]
    assert not file.exists()
    assert "40 answers, 0 failed, 0 missing" in steps("fetch", *flags)[1]
    assert not file.exists()
    steps("submit", *flags)
    message, _ = steps("fetch", *flags)
    by_batch = files.read_json(file)
    assert message is None
    assert len(server.batches) == 2
    assert set(submitted(server).values()) == {1}
    assert not server.asked("/chat/completions")
    # asking now finds all there
    assert ask(*flags)[0] is None
    assert not server.asked("/chat/completions")
    file.unlink()
    file.with_suffix(".journal.jsonl").unlink()
    ask(*flags)
    assert files.read_json(file)["data"] == by_batch["data"]


def test_the_one_step_format_takes_one_round_and_several_choices_a_request(server, steps, tmp_path):
    finish(server)
    flags = ("--degree", 3, "--choices", 3, "--temperature", 0.7)
    for step in ("submit", "fetch"):
        assert steps(step, *flags)[0] is None
    assert len(submitted(server)) == 20
    assert (
        len(
            evaluate.read_completions(
                tmp_path / "completion_data/B_gpt-test__C_zs_cot_one_step_t70/D_toy.json"
            )[1]
        )
        == 60
    )


def test_shards_keep_within_count_and_bytes(server, steps, monkeypatch):
    finish(server)
    monkeypatch.setattr(batch, "SHARD_REQUESTS", 8)
    steps("submit")
    assert [made["request_counts"]["total"] for made in server.batches] == [8, 8, 4]
    assert steps("fetch")[0] is None


def test_what_is_under_way_is_not_submitted_again(server, steps, ask):
    steps("submit")
    assert "0 requests submitted, 20 were under way already" in steps("submit")[1]
    assert len(server.batches) == 1
    assert "in_progress" in steps("fetch")[1]
    assert not ask.file.exists()


@pytest.mark.parametrize(
    "how", ["shuffled", "missing", "duplicate", "unknown", "500 in a row", "U+2028", "odd line"]
)
def test_results_are_joined_by_id_and_only_what_is_missing_is_submitted_again(
    server, steps, ask, how
):
    def change(lines):
        strange = json.loads(json.dumps(lines[0]).replace("Because", "Be\\u2028cause"))
        return {
            "shuffled": lines[::-1],
            "missing": lines[3:],
            "duplicate": lines + [batch_line_twice(lines[2])],
            "unknown": lines + [{**lines[0], "custom_id": "nobody"}],
            "500 in a row": [
                {
                    **lines[0],
                    "response": {
                        "status_code": 500,
                        "body": {"error": {"message": "inner trouble"}},
                    },
                },
                *lines[1:],
            ],
            "U+2028": [json.dumps(strange, ensure_ascii=False).encode() + b"\n", *lines[1:]],
            "odd line": [7, *lines],
        }[how]

    finish(server, change)
    steps("submit")
    message, out = steps("fetch")
    assert message is None
    missing = {"missing": 3, "500 in a row": 1}.get(how, 0)
    assert ask.file.exists() == (not missing)
    assert len(files.read_jsonl(ask.journal)) == 20 - missing
    assert ("1 unknown" in out) == (how in ("unknown", "odd line"))
    assert ("inner trouble" in out) == (how == "500 in a row")
    if missing:
        finish(server)
        assert f"{missing} requests submitted" in steps("submit")[1]
        assert steps("fetch")[0] is None
        assert sum(submitted(server).values()) == 20 + missing
    rows = evaluate.read_completions(ask.file)[1]
    assert len(rows) == 20
    assert not any("TWICE" in row["completion"] for row in rows)
    assert how != "U+2028" or any("\u2028" in row["completion"] for row in rows)


def batch_line_twice(line):
    again = json.loads(json.dumps(line))
    again["response"]["body"]["choices"][0]["message"]["content"] = "TWICE"
    return again


@pytest.mark.parametrize("status", ["expired", "cancelled"])
def test_of_an_ended_batch_the_partial_results_are_kept(server, steps, ask, status):
    finish(
        server,
        lambda lines: lines[:12],
        status,
        lambda lines: [
            {"custom_id": line["custom_id"], "error": {"message": "batch_expired"}}
            for line in lines[12:]
        ],
    )
    steps("submit")
    _, out = steps("fetch")
    assert status in out
    assert "12 answers, 8 failed" in out
    assert len(files.read_jsonl(ask.journal)) == 12
    finish(server)
    steps("submit")
    assert steps("fetch")[0] is None
    assert sum(submitted(server).values()) == 28
    assert len(evaluate.read_completions(ask.file)[1]) == 20


@pytest.mark.parametrize("error_file", ["set", ""])
def test_a_completed_batch_in_which_every_request_failed_is_summarised(
    server, steps, ask, error_file
):
    def errors(lines):
        return [
            {
                "custom_id": line["custom_id"],
                "response": {"status_code": 400, "body": {"error": {"message": "bad prompt"}}},
            }
            for line in lines
        ]

    finish(
        server,
        lambda lines: None,
        errors=errors if error_file else None,
        **({} if error_file else {"error_file_id": "", "output_file_id": None}),
    )
    steps("submit")
    message, out = steps("fetch")
    assert message is None
    assert "20 failed" in out and "bad prompt" in out if error_file else "20 missing" in out
    assert not any(request.path == "/files//content" for request in server.log)
    assert not ask.file.exists()


def test_a_batch_that_fails_validation_says_why_and_loses_nothing(server, steps, ask):
    finish(server, lambda lines: None, "failed", errors=None)
    original = server.batch_output
    server.batch_output = lambda made, lines: (
        original(made, lines),
        made.update(
            errors={"object": "list", "data": [{"message": "duplicate custom_id x", "code": "y"}]}
        ),
    )
    steps("submit")
    message, _ = steps("fetch")
    assert "failed: duplicate custom_id x" in message
    finish(server)
    steps("submit")
    assert steps("fetch")[0] is None
    assert len(evaluate.read_completions(ask.file)[1]) == 20


def test_a_file_that_is_too_large_is_refused_with_a_clear_message(server, steps, ask):
    server.answer = lambda request: (
        Reply(413, {"error": {"message": "too large"}}) if request.path == "/files" else None
    )
    message, _ = steps("submit")
    assert re.search(
        r"batch of 20 requests \(\d+ bytes\): the server answered 413: .*too large.*nothing is lost",
        message,
    )
    assert not server.batches
    server.answer = lambda request: None
    assert "20 requests submitted" in steps("submit")[1]


@pytest.mark.parametrize("fault", [Reply(503, {}), Reply(close=True)])
def test_a_lost_reply_to_the_creation_leaves_one_batch(server, steps, ask, fault):
    def answer(request):
        if request.path == "/batches" and request.method == "POST":
            server.usual(request)  # it is created, but the reply gets lost
            return fault

    server.answer = answer
    assert steps("submit")[0] is None
    assert len(server.batches) == 1
    server.answer = lambda request: None
    server.finish_batch(
        server.batches[0],
        [
            batch_line(json.loads(line))
            for line in server.files["file-0"].decode().split("\n")
            if line
        ],
    )
    assert steps("fetch")[0] is None
    assert len(evaluate.read_completions(ask.file)[1]) == 20


@pytest.mark.parametrize("created", [True, False])
def test_an_intent_whose_outcome_is_unknown_is_looked_up_by_the_next_step(
    server, steps, ask, created
):
    def answer(request):
        if request.path == "/batches":
            if created and request.method == "POST":
                server.usual(request)
            return Reply(503, {})

    server.answer = answer
    assert "start the same command again" in steps("submit")[0]
    server.answer, server.batches[1:] = (
        lambda request: None,
        [],
    )  # what was accepted more than once is the server's
    finish(server)
    for made in server.batches:
        made["request_counts"] = None
        server.finish_batch(
            made,
            [
                batch_line(json.loads(line))
                for line in server.files[made["input_file_id"]].decode().split("\n")
                if line
            ],
        )
    assert f"{0 if created and server.batches else 20} requests submitted" in steps("submit")[1]
    assert steps("fetch")[0] is None
    assert len(server.batches) == 1
    assert len(evaluate.read_completions(ask.file)[1]) == 20


@pytest.mark.parametrize("fault", ["404", "truncated", "cut"])
@pytest.mark.parametrize("times", [2, 99])
def test_a_result_file_that_is_not_all_there_is_fetched_again_and_nothing_marked_done(
    server, steps, ask, fault, times
):
    finish(server)
    steps("submit")

    def answer(request):
        if request.path.endswith("/content") and len(server.asked("/content")) <= times:
            whole = server.files["batch_0-output"]
            return {
                "404": Reply(404, {"error": {"message": "no file yet"}}),
                "truncated": Reply(body=whole[:-200]),
                "cut": Reply(body=whole, cut=500),
            }[fault]

    server.answer = answer
    message, _ = steps("fetch")
    if times == 99:
        assert "start the same command again" in message
        assert not ask.journal.exists()
        assert len(server.asked("/content")) == 4
        server.answer = lambda request: None
        message, _ = steps("fetch")
    assert message is None
    assert len(evaluate.read_completions(ask.file)[1]) == 20
    assert len(server.batches) == 1


def test_a_budget_without_room_for_the_batch_submits_nothing(server, steps):
    message, _ = steps("submit", "--price_in", 1000, "--price_out", 10000, "--max_cost", 10)
    assert "--max_cost 10.0" in message
    assert "may cost $" in message
    assert not server.files


# ---------------------------------------------------------------- OpenAI-style students


@pytest.mark.parametrize("style, prompt", [("chat", "messages"), ("gpt3", "prompt")])
def test_a_student_is_trained_by_a_job_and_evaluated_like_any_other(
    server, ask, steps, tmp_path, style, prompt
):
    ask("--teacher_method", "zs_cot")
    flags = (
        "--teacher_method",
        "zs_cot",
        "--method",
        "ft_cot",
        "--label_style",
        style,
        "--student",
        "gpt-small",
    )
    assert ask("--stage", "curate", *flags)[0] is None
    [curated] = (tmp_path / "finetune_data/P_openai").glob("*.jsonl")
    line = json.loads(curated.read_text().split("\n")[0])
    assert (
        style == "gpt3"
        and line["completion"].endswith(" END")
        or [m["role"] for m in line["messages"]] == ["user", "assistant"]
    )
    message, out = ask("--stage", "train", *flags)
    assert message is None, message
    note = files.read_json(next((tmp_path / "model_metadata/B_gpt-small").glob("F_*__T_*.json")))
    assert (note["file"], note["job"], note["model"], note["status"]) == (
        "file-0",
        "ftjob-0",
        "ft:gpt-small:x",
        "succeeded",
    )
    assert server.files["file-0"] == curated.read_bytes()
    assert server.jobs[0]["method"] == {"type": "supervised"}
    assert ask("--stage", "train", *flags)[0] is None
    assert len(server.jobs) == 1
    before = len(server.asked())
    message, out = ask("--stage", "evaluate", *flags)
    assert message is None
    assert "ft_cot (rationales)" in out
    assert len(server.asked()) == before + 6
    assert server.asked()[-1].body["model"] == "ft:gpt-small:x"
    assert prompt in server.asked()[-1].body
    [file] = (tmp_path / "completion_data/B_gpt-small__C_ft_cot").glob("D_toy__T_*.json")
    assert evaluate.read_completions(file)[0]["prediction_template"] == "ft_cot_token"


def test_a_lost_reply_to_the_creation_of_a_job_leaves_one_job_and_a_failed_one_is_told(
    server, ask, steps, tmp_path
):
    ask("--teacher_method", "zs_cot")
    flags = (
        "--teacher_method",
        "zs_cot",
        "--method",
        "ft_cot",
        "--label_style",
        "chat",
        "--student",
        "gpt-small",
        "--stage",
    )
    ask(*flags, "curate")

    def answer(request):
        if request.path == "/fine_tuning/jobs" and request.method == "POST":
            server.usual(request)
            return Reply(503, {})

    server.answer = answer
    create = server.create_job
    server.create_job = lambda request: (create(request), server.jobs[-1].update(status="queued"))[
        0
    ]
    looks = []
    usual = server.usual
    server.usual = lambda request: (
        looks.append(1),
        server.jobs[0].update(status="failed", error={"code": "x", "message": "too few samples"})
        if len(looks) > 6
        else None,
        usual(request),
    )[2]
    message, out = ask(*flags, "train")
    assert re.search(r"the fine-tuning job ftjob-0 failed: too few samples", message)
    assert len(server.jobs) == 1
    assert "queued" in out
    server.answer, server.create_job, server.usual = lambda request: None, create, usual
    assert ask(*flags, "train")[0] is None
    assert len(server.jobs) == 2
    assert len(server.files) == 1
