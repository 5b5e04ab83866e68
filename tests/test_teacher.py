"""A teacher behind an API: what it is asked, what is kept, and every fault a server can have.   python -m pytest tests/test_teacher.py"""

import collections
import datetime
import email.utils
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest

import evaluate
import finetune_cot
import tasks
from api_server import Reply, completion
from conftest import KEY, ROOT
import teacher as api
import storage as files


def rows(file):
    return evaluate.read_completions(file)[1]


def first_time(server, reply, of=1):
    """The server gives the first `of` requests this reply, later ones the usual."""
    server.answer = lambda request: reply if len(server.log) <= of else None


def keys_asked(server):
    return collections.Counter(request.key for request in server.asked())


# ---------------------------------------------------------------- what is asked


def test_two_step_chat_keeps_the_reasoning_as_the_assistant_s_turn(server, ask, tmp_path):
    message, out = ask("--teacher_method", "zs_cot", "--degree", 2, "--temperature", 0.7)
    assert message is None, message
    first, second = ([r for r in server.log if len(r.body["messages"]) == n] for n in (1, 3))
    assert len(first) == len(second) == 40
    assert all("n" not in r.body and "stop" not in r.body for r in server.log)
    question = tasks.load("toy")[0]["question"]
    [asked] = [r for r in second if r.body["messages"][0]["content"].startswith(question)][:1]
    assert [m["role"] for m in asked.body["messages"]] == ["user", "assistant", "user"]
    assert asked.body["messages"][0]["content"] == question + "\nLet's think step by step."
    assert asked.body["messages"][2]["content"] == "Therefore, the answer is"
    # the answer is read off greedily
    assert {r.body["temperature"] for r in first} == {0.7}
    assert {r.body["temperature"] for r in second} == {0.0}
    file = tmp_path / "completion_data/B_gpt-test__C_zs_cot_t70/D_toy.json"
    metadata = files.read_json(file)["metadata"]
    row = rows(file)[0]
    assert (row["api"], row["model"], row["prompt"], row["finish_reason"]) == (
        "chat",
        "gpt-test-0613",
        "Therefore, the answer is",
        "stop",
    )
    assert row["reasoning_prompt"].endswith("step by step.")
    assert row["reasoning_completion"].startswith("Because")
    assert row["completion"] in ("yes.", "no.")
    assert metadata["usage"] == {
        "prompt_tokens": 800,
        "completion_tokens": 400,
        "usage_unknown": 0,
        "requests": 80,
        "attempts": 80,
        "unanswered": 0,
    }
    assert "% of 40 are correct so far (flexible rules)" in out


def test_raw_completions_send_the_paper_s_strings(server, ask, tmp_path):
    assert ask("--teacher_method", "zs_cot", "--api", "completions")[0] is None
    question = tasks.load("toy")[0]["question"]
    prompts = {
        r.body["prompt"]
        for r in server.log
        if r.path == "/completions" and question in r.body["prompt"]
    }
    step_1 = f"Q: {question}\nA: Let's think step by step."
    row = rows(tmp_path / "completion_data/B_gpt-test__C_zs_cot/D_toy.json")[0]
    assert (
        prompts
        == {step_1, step_1 + row["reasoning_completion"] + "\nTherefore, the answer is"}
        == {row["reasoning_prompt"], row["prompt"]}
    )
    assert server.log[0].body["max_tokens"] == 128


def test_few_shot_prompts_end_at_the_next_question_even_where_the_server_does_not_stop(
    server, ask, tmp_path
):
    (tmp_path / "data").mkdir()
    files.write_json(
        tmp_path / "data/few_shot_cot_prompts.json",
        {"toy": {"prompt": "Q: a?\nA: b. The answer is yes."}},
    )
    server.answer = lambda request: Reply(
        body=completion(request, " So. The answer is no.\nQ: Next", "length")
    )
    assert (
        ask("--teacher_method", "fs_cot", "--api", "completions", "--data", tmp_path / "data")[0]
        is None
    )
    assert server.log[0].body["stop"] == ["\nQ:"]
    assert server.log[0].body["prompt"].startswith("Q: a?\nA: b. The answer is yes.\nQ: A coin")
    row = rows(tmp_path / "completion_data/B_gpt-test__C_fs_cot/D_toy.json")[0]
    assert (row["completion"], row["finish_reason"]) == (" So. The answer is no.", "stop")


@pytest.mark.parametrize(
    "flags, names",
    [
        ((), {"model", "messages", "temperature", "max_completion_tokens"}),
        (("--no_temperature",), {"model", "messages", "max_completion_tokens"}),
        (("--legacy_max_tokens",), {"model", "messages", "temperature", "max_tokens"}),
    ],
)
def test_only_what_was_set_is_sent(server, ask, flags, names):
    assert ask(*flags)[0] is None
    assert set(server.log[0].body) == names


def test_the_training_part_alone_can_be_asked(server, ask):
    assert ask("--teacher_part", "train", "--split", "few_shot_8")[0] is None
    assert len(server.asked()) == len(rows(ask.file)) == 8


def test_a_larger_degree_asks_only_for_the_new_ones_and_a_smaller_one_for_nothing(
    server, ask, tmp_path
):
    flags = ("--temperature", 0.7, "--degree")
    ask(*flags, 1)
    assert ask(*flags, 3)[0] is None
    assert len(server.asked()) == 60
    assert max(keys_asked(server).values()) == 1
    file = tmp_path / "completion_data/B_gpt-test__C_zs_cot_one_step_t70/D_toy.json"
    assert [row["completion_index"] for row in rows(file)] == [0, 1, 2] * 20
    ask(*flags, 2)
    assert len(server.asked()) == 60
    assert len(rows(file)) == 40


def test_changed_settings_never_reuse_old_answers(server, ask):
    ask()
    for flags in (("--teacher_max_new_tokens", 64), ("--api", "completions")):
        before = len(server.asked())
        ask(*flags)
        assert len(server.asked()) == before + 20
    before = len(server.asked())
    _, out = ask()  # all rows are still there
    assert len(server.asked()) == before
    assert len(rows(ask.file)) == 20


def test_a_finished_file_and_a_file_from_elsewhere_are_used_as_they_are(server, ask):
    ask()
    asked = len(server.log)
    assert "made with the same settings: skipped" in ask()[1]
    assert len(server.log) == asked
    ask.journal.unlink()
    assert "using the completions of gpt-test" in ask("--degree", 1)[1]
    assert len(server.log) == asked


def test_without_a_key_and_a_base_url_the_way_to_an_api_is_named(ask, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setenv("OPENAI_BASE_URL", "")
    with pytest.raises(SystemExit, match="set OPENAI_API_KEY or --base_url"):
        finetune_cot.main(
            ["--stage", "sample", "--teacher", "gpt-test", "--saved", str(ask.file.parent)]
        )


def test_identical_rationales_above_temperature_0_are_pointed_out(server, ask):
    server.answer = lambda request: Reply(body=completion(request, "The answer is yes."))
    _, out = ask("--degree", 2, "--temperature", 0.7)
    assert "warning: all completions of 20 of 20 questions are identical" in out


# ---------------------------------------------------------------- several choices a request


def broken_n(request, how):
    body = completion(request)
    choices = body["choices"]
    body["choices"] = {
        "fewer": choices[:1],
        "more": choices + [{**choices[-1], "index": 9}],
        "shuffled": choices[::-1],
        "duplicate": [{**c, "index": 0} for c in choices],
        "right": choices,
    }[how]
    return Reply(body=body)


@pytest.mark.parametrize(
    "how, requests",
    [("right", 20), ("more", 20), ("shuffled", 20), ("fewer", 60), ("duplicate", 60)],
)
def test_whatever_number_of_choices_comes_back_each_completion_is_there_once(
    server, ask, tmp_path, how, requests
):
    server.answer = lambda request: broken_n(request, how)
    assert ask("--degree", 3, "--temperature", 0.7, "--choices", 3)[0] is None
    assert len(server.asked()) == requests
    journal = files.read_jsonl(
        tmp_path / "completion_data/B_gpt-test__C_zs_cot_one_step_t70/D_toy.journal.jsonl"
    )
    assert len({row["key"] for row in journal}) == len(journal) == 60
    assert (
        sum("usage" in row for row in journal) == requests
    )  # of a request once, on its first choice
    if how == "shuffled":
        assert all(
            row["completion"].endswith(str(row["completion_index"] or ".")) for row in journal
        )


# ---------------------------------------------------------------- 429: all workers pause


def in_a_moment():
    return email.utils.format_datetime(
        datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=2), usegmt=True
    )


@pytest.mark.parametrize(
    "headers, seconds",
    [
        ({"retry-after": "1"}, 1),
        ({"retry-after-ms": "300"}, 0.3),
        ("date", 0.9),
        ({}, 0.004),
        ({"retry-after": "0"}, 0.004),
    ],
)
def test_after_a_429_no_worker_asks_before_the_server_allows_it(server, ask, headers, seconds):
    first_time(
        server,
        Reply(
            429,
            {"error": {"message": "slow down"}},
            {"retry-after": in_a_moment()} if headers == "date" else headers,
        ),
        of=4,
    )
    assert ask()[0] is None
    assert len(rows(ask.file)) == 20
    assert len(server.asked()) == 24
    times = [request.time for request in server.asked()]
    assert times[4] - times[3] >= seconds
    assert times[3] - times[0] < 0.5
    assert all(
        row["attempts"] == 1 for row in files.read_jsonl(ask.journal)
    )  # being turned away is no attempt


def test_a_wait_that_is_too_long_stops_the_run_with_the_server_s_words(server, ask):
    first_time(
        server, Reply(429, {"error": {"message": "come back tomorrow"}}, {"retry-after": "60000"})
    )
    message, _ = ask("--concurrency", 1)
    assert "the server asks to wait 60000 s" in message
    assert "come back tomorrow" in message
    assert len(server.asked()) == 1


def test_ten_minutes_are_waited_for(ask, server, monkeypatch):
    seen = []
    pause = api.Run.pause

    def short_pause(run, asked, why):
        pause(run, asked, why)
        seen.append(asked)
        assert run.not_before > time.monotonic() + 590
        run.not_before = 0

    monkeypatch.setattr(api.Run, "pause", short_pause)
    first_time(server, Reply(429, {}, {"retry-after": "600"}))
    assert ask()[0] is None
    assert seen == [600]


def test_a_server_that_only_says_429_stops_the_run(server, ask, monkeypatch):
    monkeypatch.setattr(api, "LONGEST_PAUSE", 0.5)
    server.answer = lambda request: Reply(429, {"error": {"message": "slow down"}})
    message, _ = ask()
    assert "slow down" in message
    assert "start the same command again" in message
    assert len(server.asked()) < 200


def test_the_requests_a_minute_are_kept(server, ask):
    assert ask("--requests_per_minute", 1200)[0] is None
    times = [request.time for request in server.asked()]
    assert all(b - a >= 0.03 for a, b in zip(times, times[1:]))
    assert times[-1] - times[0] >= 0.05 * 19 * 0.97


def test_the_tokens_a_minute_are_kept(server, ask):
    assert ask("--tokens_per_minute", 250_000)[0] is None  # about 200 tokens a request: 50 ms each
    assert server.asked()[-1].time - server.asked()[0].time > 19 * 0.03


def test_no_more_requests_are_under_way_than_asked_for(server, ask):
    server.delay = 0.02
    assert ask("--concurrency", 3)[0] is None
    assert server.most_open == 3


# ---------------------------------------------------------------- what stops the run at once


@pytest.mark.parametrize(
    "status, error",
    [
        (429, {"message": "no money left", "code": "insufficient_quota"}),
        (401, {"message": f"wrong key {KEY}"}),
        (403, {"message": "not for you"}),
        (404, {"message": "no model gpt-test"}),
        (
            400,
            {
                "message": "Unsupported value: 'temperature'",
                "code": "unsupported_value",
                "param": "temperature",
            },
        ),
    ],
)
def test_what_no_retry_can_mend_stops_the_run_and_keeps_the_rows(server, ask, status, error):
    server.answer = lambda request: Reply(status, {"error": error}) if len(server.log) > 8 else None
    message, out = ask()
    assert message.startswith("error: ")
    assert error["message"].replace(KEY, "[key]") in message
    assert 9 <= len(server.asked()) <= 8 + 4
    assert len(files.read_jsonl(ask.journal)) == 8
    assert not ask.file.exists()
    assert (
        error.get("param") is None or "--no_temperature" in message and "'temperature'" in message
    )
    server.answer = lambda request: None
    asked = len(server.asked())
    assert ask()[0] is None
    assert len(server.asked()) == asked + 12
    assert len(rows(ask.file)) == 20


def test_one_refused_question_is_recorded_and_the_rest_finish(server, ask):
    question = tasks.load("toy")[7]["question"]
    server.answer = lambda request: (
        Reply(400, {"error": {"message": "content policy"}})
        if question in json.dumps(request.body)
        else None
    )
    message, out = ask()
    assert "1 of 20 completions are missing, 1 requests failed" in message
    assert not ask.file.exists()
    [failure] = files.read_jsonl(ask.failures)
    assert failure["sample_index"] == 7
    assert "content policy" in failure["error"]
    assert len(files.read_jsonl(ask.journal)) == 19
    assert ask("--stage", "curate", "--method", "ft_cot")[0] is None  # go on without it
    assert len(rows(ask.file)) == 19
    assert files.read_json(ask.file)["metadata"]["settings"]["missing"] == 1
    server.answer = lambda request: None
    assert ask()[0] is None
    assert len(rows(ask.file)) == 20
    assert files.read_json(ask.file)["metadata"]["settings"]["missing"] == 0


def test_a_400_to_everything_stops_after_the_first_few(server, ask):
    server.answer = lambda request: Reply(400, {"error": {"message": "bad model"}})
    message, _ = ask()
    assert "the first 5 requests were all refused: the server answered 400" in message
    assert "bad model" in message
    assert len(server.asked()) <= 5 + 4


# ---------------------------------------------------------------- what is worth another attempt

HTML = Reply(503, b"<html>busy</html>", {"content-type": "text/html"})
PASSING = {
    "500": Reply(500, {"error": {"message": "oops"}}),
    "503 HTML": HTML,
    "408": Reply(408, {}),
    "409": Reply(409, {}),
    "reset": Reply(reset=True),
    "close": Reply(close=True),
    "truncated": Reply(body=b'{"choices": [{}]}', cut=9),
    "malformed": Reply(body=b'{"choices": ['),
    "empty": Reply(body=b""),
    "HTML 200": Reply(body=b"<html>", headers={"content-type": "text/html"}),
    "list": Reply(body=[]),
    "text": Reply(body="hello"),
    "error in a 200": Reply(body={"error": {"message": "inner"}}),
    "no choices": Reply(body={"id": "x"}),
    "empty choices": Reply(body={"choices": []}),
    "no message": Reply(body={"choices": [{"index": 0}]}),
    "message of parts": Reply(
        body={"choices": [{"index": 0, "message": {"content": [{"text": "a"}]}}]}
    ),
    "not UTF-8": Reply(body=b'"\xff'),
    "deep": Reply(body=b"[" * 100_000),
}


@pytest.mark.parametrize("fault", PASSING)
def test_a_passing_fault_is_retried_and_leaves_exactly_one_row(server, ask, fault):
    first_time(server, PASSING[fault], of=3)
    message, _ = ask()
    assert message is None, message
    assert len(server.asked()) == 23
    assert len(rows(ask.file)) == 20
    assert len(files.read_jsonl(ask.journal)) == 20
    assert not ask.failures.exists()
    assert files.read_json(ask.file)["metadata"]["usage"]["attempts"] == 23


@pytest.mark.parametrize(
    "fault", ["500", "503 HTML", "408", "409", "reset", "malformed", "empty choices"]
)
def test_retries_are_bounded_and_end_in_the_failures_file(server, ask, fault):
    server.answer = lambda request: (
        PASSING[fault] if tasks.load("toy")[3]["question"] in json.dumps(request.body) else None
    )
    message, _ = ask("--max_attempts", 4)
    assert "1 of 20 completions are missing" in message
    assert len(server.asked()) == 19 + 4
    [failure] = files.read_jsonl(ask.failures)
    assert failure["error"].startswith("given up after 4 attempts: ")


def test_an_idle_connection_that_the_server_closed_is_no_failure(server, ask):
    server.answer = lambda request: Reply(body=completion(request), then_close=True)
    assert ask()[0] is None
    assert len(rows(ask.file)) == 20
    assert len(files.read_jsonl(ask.journal)) == 20


@pytest.mark.parametrize("slow", [Reply(delay=1), Reply(body=b" " * 100, drip=0.05)])
def test_slow_replies_are_cut_by_the_wall_clock_and_counted_as_possibly_billed(server, ask, slow):
    first_time(server, slow, of=2)
    start = time.monotonic()
    assert ask("--attempt_timeout", 0.3, "--concurrency", 2)[0] is None
    assert time.monotonic() - start < 3
    assert len(server.asked()) == 22
    assert len(rows(ask.file)) == 20
    time.sleep(0.8)  # a late reply has no one to take it
    assert len(files.read_jsonl(ask.journal)) == 20
    assert files.read_json(ask.file)["metadata"]["usage"]["unanswered"] == 2


@pytest.mark.slow
def test_one_request_that_always_fails_does_not_sink_the_other_999(server, ask, monkeypatch):
    monkeypatch.setitem(
        tasks.TASKS, "toy", tasks.TASKS["toy"]._replace(n=1000, train=700, test=300)
    )
    question = tasks.load("toy")[333]["question"]
    server.answer = lambda request: PASSING["500"] if question in json.dumps(request.body) else None
    message, _ = ask("--concurrency", 32)
    assert "1 of 1000 completions are missing" in message
    assert len(files.read_jsonl(ask.journal)) == 999


# ---------------------------------------------------------------- answers of odd kinds


@pytest.mark.parametrize(
    "reason, text",
    [
        ("length", "cut"),
        ("content_filter", "cut"),
        ("weird", "cut"),
        (None, "cut"),
        ("stop", None),
        ("stop", " "),
    ],
)
def test_an_unfinished_or_missing_rationale_is_stored_without_a_second_turn_and_never_kept(
    server, ask, tmp_path, reason, text
):
    first_questions = [s["question"] for s in tasks.load("toy")[:5]]
    server.answer = lambda request: (
        Reply(body=completion(request, text, reason))
        if any(q in json.dumps(request.body) for q in first_questions)
        else None
    )
    assert ask("--teacher_method", "zs_cot")[0] is None
    assert len(server.asked()) == 5 + 15 * 2
    file = tmp_path / "completion_data/B_gpt-test__C_zs_cot/D_toy.json"
    odd = rows(file)[:5]
    assert all(
        (
            row["reasoning_completion"],
            row["reasoning_finish_reason"],
            row["completion"],
            row["finish_reason"],
        )
        == (text or "", reason, "", None)
        for row in odd
    )
    assert not any(
        tasks.grade("toy", "zs_cot", row["completion"], row["answer"], rules).correct
        for row in odd
        for rules in ("paper", "flexible")
    )


def test_a_right_answer_in_a_cut_reply_is_not_taught(server, ask, tmp_path):
    server.answer = lambda request: Reply(
        body=completion(request, "It turns. The answer is yes. Or", "length")
    )
    ask()
    message, _ = ask("--stage", "curate", "--method", "ft_cot")
    assert "no correct rationale is left" in message
    assert len(rows(ask.file)) == 20


def test_a_refusal_is_a_row_with_its_reason(server, ask):
    refusal = [
        {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": None, "refusal": "I cannot"},
        }
    ]
    first_time(
        server,
        Reply(
            body={
                "model": "m",
                "choices": refusal,
                "usage": {"prompt_tokens": 1, "completion_tokens": 1},
            }
        ),
    )
    assert ask("--concurrency", 1)[0] is None
    row = rows(ask.file)[0]
    assert (row["completion"], row["refusal"]) == ("", "I cannot")
    assert not tasks.grade("toy", "zs_cot_one_step", row["completion"], row["answer"]).correct


@pytest.mark.parametrize(
    "usage", [..., None, {"prompt_tokens": "many"}, {"prompt_tokens": -1, "completion_tokens": 2}]
)
def test_missing_usage_is_unknown_and_not_0(server, ask, usage):
    first_time(
        server,
        Reply(
            body={
                "model": "m",
                "choices": [
                    {
                        "index": 0,
                        "finish_reason": "stop",
                        "message": {"content": "The answer is yes."},
                    }
                ],
                **({"usage": usage} if usage is not ... else {}),
            }
        ),
        of=3,
    )
    assert ask()[0] is None
    metadata = files.read_json(ask.file)["metadata"]
    assert metadata["usage"]["usage_unknown"] == 3
    assert metadata["usage"]["prompt_tokens"] == 170


# ---------------------------------------------------------------- money

PRICES = ("--price_in", 1000, "--price_out", 10000)  # the usual reply: 10 and 5 tokens, $0.06


def test_a_dry_run_asks_nothing_and_says_what_would_be_asked(server, ask):
    _, out = ask(
        "--dry_run", "--teacher_method", "zs_cot", "--degree", 3, "--temperature", 0.7, *PRICES
    )
    requests, prompt, completions, cost = re.search(
        r"dry run: toy: ([\d,]+) requests, ([\d,]+) prompt tokens and at most ([\d,]+) completion tokens, at most \$([\d,.]+)",
        out,
    ).groups()
    assert (requests, completions) == ("120", f"{120 * 128:,}")
    assert not server.log
    assert not ask.file.parent.exists()
    assert f"{(int(prompt.replace(',', '')) * 1000 + 120 * 128 * 10000) / 1e6:,.2f}" == cost
    assert "4 characters a token" in out
    ask("--degree", 1)
    assert (
        "toy: 40 requests" in ask("--dry_run", "--degree", 3, "--temperature", 0)[1]
    )  # what is in the journal costs nothing


@pytest.mark.slow
def test_a_dry_run_counts_with_the_student_s_tokenizer_where_it_is_a_folder(
    server, ask, model_folder
):
    _, out = ask("--dry_run", "--student", model_folder("gpt2"))
    length = sum(
        len(tasks.format_sample("zs_cot_one_step", "chat", s["question"])[0].encode())
        for s in tasks.load("toy")
    )
    # one token a byte
    assert f"toy: 20 requests, {length:,} prompt tokens" in out
    assert "counted by the tokenizer of" in out


def test_the_budget_is_never_passed_and_counts_earlier_runs(server, ask):
    server.answer = lambda request: Reply(
        body=completion(request, usage={"prompt_tokens": 200, "completion_tokens": 128}), delay=0.01
    )  # the most: $1.48
    message, _ = ask(*PRICES, "--max_cost", 8, "--concurrency", 8)
    assert "--max_cost 8.0: $7.4000 are spent" in message
    assert len(server.asked()) == 5
    message, _ = ask(*PRICES, "--max_cost", 8)
    assert "are spent" in message
    assert len(server.asked()) == 5
    assert ask(*PRICES, "--max_cost", 12)[0]
    assert len(server.asked()) == 8


def test_a_budget_that_has_no_room_for_the_first_request_asks_nothing(server, ask):
    message, _ = ask(*PRICES, "--max_cost", 1)  # 128 completion tokens may cost $1.28
    assert "the next request may cost $1." in message
    assert not server.log


def test_an_unanswered_attempt_counts_against_the_budget_in_later_runs_too(server, ask):
    first_time(server, Reply(delay=1), of=1)
    ask("--attempt_timeout", 0.5, "--concurrency", 1, *PRICES, "--max_cost", 2)
    possible = [row["possible_cost"] for row in files.read_jsonl(ask.failures)]
    assert len(possible) == 1
    assert 1.28 < possible[0] < 2
    asked = len(server.asked())
    message, _ = ask(*PRICES, "--max_cost", possible[0] + 1.3)
    assert "are spent, or may have been" in message
    assert len(server.asked()) == asked


# ---------------------------------------------------------------- kills, locks, full disks


def start(server, saved, *flags, **options):
    """The command line as a process of its own, on toy questions."""
    command = [
        sys.executable,
        "finetune_cot.py",
        "--stage",
        "sample",
        "--task",
        "toy",
        "--teacher",
        "gpt-test",
        "--teacher_part",
        "train",
        "--base_url",
        server.url,
        "--saved",
        saved,
        "--temperature",
        "0.7",
        *flags,
    ]
    return subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, "OPENAI_API_KEY": KEY},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def kill_again_and_again(server, tmp_path, flags, times):
    """Run to the end in spite of kills, none of which makes a key in the journal be asked for again; -> requests asked again."""
    server.delay = 0.02
    journaled = set()
    for i in range(times):
        before = len(server.log)
        wanted = random.Random(i).randint(1, 40)
        process = start(server, tmp_path, *flags)
        while process.poll() is None and len(server.log) < before + wanted:
            time.sleep(0.001)
        process.kill()
        process.wait()
        assert not journaled & {request.key for request in server.log[before:]}
        journaled = {
            json.loads(line)["key"]
            for file in tmp_path.rglob("*.journal.jsonl")
            for line in file.read_text().split("\n")
            if line.endswith("}")
        }
    process = start(server, tmp_path, *flags)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and KEY not in out, out
    return sum(n - 1 for n in keys_asked(server).values())


def same_dataset(server, tmp_path, flags):
    process = start(server, tmp_path / "whole", *flags)
    process.communicate(timeout=120)
    files = [
        tmp_path / side / "completion_data/B_gpt-test__C_zs_cot_t70/D_toy.json"
        for side in ("killed", "whole")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    return rows(files[0])


def test_a_kill_loses_nothing_but_what_was_under_way(server, tmp_path):
    flags = (
        "--split",
        "few_shot_12",
        "--teacher_method",
        "zs_cot",
        "--degree",
        2,
        "--concurrency",
        4,
    )
    again = kill_again_and_again(server, tmp_path / "killed", flags, 2)
    assert (
        0 < again <= 2 * 4 * 2
    )  # a worker has a request under way and a reply being written, at most
    assert len(same_dataset(server, tmp_path, flags)) == 24


@pytest.mark.slow
def test_twenty_kills_lose_nothing_but_what_was_under_way(server, tmp_path):
    flags = (
        "--split",
        "few_shot_63",
        "--teacher_method",
        "zs_cot",
        "--degree",
        4,
        "--concurrency",
        8,
    )
    again = kill_again_and_again(server, tmp_path / "killed", flags, 20)
    print(
        f"{len(keys_asked(server))} keys, {len(server.asked())} requests, {again} asked again: they were under way at one of 20 kills"
    )
    assert again <= 20 * 8 * 2
    assert len(keys_asked(server)) == 63 * 4 * 2
    assert len(same_dataset(server, tmp_path, flags)) == 63 * 4


def test_a_torn_last_line_is_asked_again_and_a_bad_line_elsewhere_is_refused(server, ask):
    ask()
    whole = ask.file.read_bytes()
    lines = ask.journal.read_bytes().splitlines(keepends=True)
    ask.file.unlink()
    ask.journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:-9])
    asked = len(server.asked())
    assert ask()[0] is None
    assert len(server.asked()) == asked + 1
    assert ask.file.read_bytes() == whole
    ask.file.unlink()
    ask.journal.write_bytes(lines[0][:-9] + b"\n" + b"".join(lines[1:]))
    assert re.search(r"D_toy.journal.jsonl, line 1 is not valid JSON", ask()[0])
    assert len(server.asked()) == asked + 1


@pytest.mark.slow
def test_a_second_process_on_the_same_output_is_refused(server, tmp_path, ask):
    server.delay = 0.3
    process = start(
        server,
        tmp_path,
        "--split",
        "few_shot_8",
        "--teacher_method",
        "zs_cot_one_step",
        "--concurrency",
        1,
    )
    while not server.log:
        time.sleep(0.01)
    message, _ = ask("--temperature", 0.7)
    assert "is being written by another run: wait for it or stop it" in message
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and KEY not in out, out


def test_ctrl_c_waits_for_what_is_under_way_and_keeps_it(server, tmp_path):
    server.delay = 0.4
    process = start(
        server,
        tmp_path,
        "--split",
        "few_shot_32",
        "--teacher_method",
        "zs_cot_one_step",
        "--concurrency",
        4,
    )
    while len(server.log) < 6:
        time.sleep(0.01)
    with open(f"/proc/{process.pid}/cmdline") as f:
        assert KEY not in f.read()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    [journal] = tmp_path.rglob("*.journal.jsonl")
    assert process.returncode == 1
    assert "interrupted: what is finished is kept" in out
    assert "Traceback" not in out
    assert len(files.read_jsonl(journal)) == len(server.log) == 8
    assert KEY.encode() not in journal.read_bytes()


def test_a_full_disk_stops_the_run_and_spends_no_more(server, tmp_path):
    import resource

    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))  # some ten rows
    process = start(
        server,
        tmp_path,
        "--split",
        "few_shot_128",
        "--teacher_method",
        "zs_cot_one_step",
        "--concurrency",
        2,
        preexec_fn=limit,
    )
    out, _ = process.communicate(timeout=60)
    [journal] = tmp_path.rglob("*.journal.jsonl")
    kept = files.read_jsonl(journal)  # whole lines only
    assert (
        process.returncode == 1
        and "cannot be written (File too large), so nothing more is asked: make room" in out
        and "Traceback" not in out
    ), out
    assert 5 < len(kept)
    assert len(server.log) <= len(kept) + 6


# ---------------------------------------------------------------- the key, and flags


def test_the_key_is_asked_for_nowhere_but_in_the_environment():
    assert not any("key" in action.dest and action.dest != "train_key" for action in flags_of())


def flags_of():
    import argparse

    parser = argparse.ArgumentParser()
    import flags

    flags.add_teacher_flags(parser)
    return parser._actions


@pytest.mark.parametrize(
    "url, warns",
    [
        ("http://127.0.0.1:9/v1", False),
        ("http://localhost:9/v1", False),
        ("https://example.org/v1", False),
        ("http://example.org/v1", True),
    ],
)
def test_plain_http_to_another_machine_warns(url, warns, capsys):
    import flags

    flags.check_teacher(finetune_cot.parse_args(["--base_url", url])[0])
    assert ("unencrypted" in capsys.readouterr().err) == warns


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (("--base_url", "ftp://x"), "must begin with http"),
        (("--base_url", "http://me:secret@127.0.0.1/v1"), "must hold no name and no password"),
        (("--concurrency", 0), "--concurrency 0 must be above 0"),
        (("--price_in", 1), "prices come in pairs"),
        (("--max_cost", 1), "--max_cost needs them"),
        (("--dry_run", "--batch", "fetch"), "one at a time"),
        (("--dry_run", "--stage", "all"), "go with --stage sample"),
        (("--teacher", "toy", "--dry_run"), "behind an API"),
        (("--degree", 2), "would buy 2 identical rationales"),
        (("--requests_per_minute", "nan"), "--requests_per_minute nan must be"),
    ],
)
def test_flags_that_cannot_work_are_refused_before_anything_is_asked(server, ask, flags, sentence):
    message, _ = ask(*flags)
    assert message.startswith("error: ")
    assert sentence in message
    assert not server.log


def test_a_key_that_no_header_can_carry_is_refused_without_showing_it(server, ask, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\u00e9\u2026")
    message, _ = ask()
    assert "OPENAI_API_KEY holds characters" in message
    assert "\u00e9" not in message


def test_what_was_sampled_through_an_api_is_curated_and_trains(server, ask, tmp_path):
    ask("--teacher_method", "zs_cot")
    message, out = ask(
        "--teacher_method",
        "zs_cot",
        "--stage",
        "all",
        "--method",
        "ft_cot",
        "--student",
        "toy",
        "--epochs",
        1,
        "--max_new_tokens",
        4,
    )
    assert message is None
    assert re.search(r"curate: kept \d+ of 14 rationales", out)
    assert "ft_cot (rationales)" in out
