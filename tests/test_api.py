"""Requests to a server, and every fault that it can have.   python -m pytest tests/test_api.py"""

import collections
import datetime
import email.utils
import gzip
import json
import os
import random
import re
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from api_server import ApiServer, Reply, Request, completion
from conftest import KEY, ROOT, first_time, keys_asked, read_rows, run

import api
import clients
import steps
import storage
import tasks

PRICES = ("--price_in", 1000, "--price_out", 10000)  # the usual reply: 10 and 5 tokens, $0.06

# ---------------------------------------------------------------- 429: all workers pause


def date_in(seconds: float) -> str:
    date = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
    return email.utils.format_datetime(date, usegmt=True)


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
def test_pause_retry_after(server, ask, headers, seconds):
    """After a 429 no worker asks before the server allows it."""
    if headers == "date":
        headers = {"retry-after": date_in(seconds=2)}
    first_time(server, Reply(429, {"error": {"message": "slow down"}}, headers), of=4)
    assert ask()[0] is None
    assert len(read_rows(ask.file)) == 20
    assert len(server.asked()) == 24
    times = [request.time for request in server.asked()]
    assert times[4] - times[3] >= seconds
    assert times[3] - times[0] < 0.5
    attempts = {row["attempts"] for row in storage.read_jsonl(ask.journal)}
    assert attempts == {1}, "being turned away is no attempt"


def test_pause_too_long(server, ask):
    """A wait that is too long stops the run with the server's words."""
    first_time(
        server, Reply(429, {"error": {"message": "come back tomorrow"}}, {"retry-after": "60000"})
    )
    message, _ = ask("--concurrency", 1)
    assert "the server asks to wait 60000 s" in message
    assert "come back tomorrow" in message
    assert len(server.asked()) == 1


def test_pause_ten_minutes(ask, server, monkeypatch):
    """Ten minutes are waited for."""
    seen = []
    pause = api.ApiSession.pause

    def short_pause(session: api.ApiSession, asked: float, why: str) -> None:
        pause(session, asked, why)
        seen.append(asked)
        assert session.not_before > time.monotonic() + 590
        session.not_before = 0

    monkeypatch.setattr(api.ApiSession, "pause", short_pause)
    first_time(server, Reply(429, {}, {"retry-after": "600"}))
    assert ask()[0] is None
    assert seen == [600]


def test_pause_only_429(server, ask, monkeypatch):
    """A server that only says 429 stops the run."""
    monkeypatch.setattr(api, "LONGEST_PAUSE", 0.5)
    server.answer = lambda request: Reply(429, {"error": {"message": "slow down"}})
    message, _ = ask()
    assert "slow down" in message
    assert "start the same command again" in message
    assert len(server.asked()) < 200


def test_wait_for_rate_limit_requests(server, ask):
    """The limit of requests a minute is kept."""
    assert ask("--requests_per_minute", 1200)[0] is None
    times = [request.time for request in server.asked()]
    gaps = [later - earlier for earlier, later in zip(times, times[4:], strict=False)]
    assert min(gaps) >= 0.1, "four requests take 0.2 s; a busy machine may delay the first"
    assert times[-1] - times[0] >= 0.05 * 19 * 0.97


def test_wait_for_rate_limit_tokens(server, ask):
    """The limit of tokens a minute is kept."""
    assert ask("--tokens_per_minute", 250_000)[0] is None  # about 200 tokens a request: 50 ms each
    times = [request.time for request in server.asked()]
    assert times[-1] - times[0] > 19 * 0.03


# ---------------------------------------------------------------- what stops the run

UNSUPPORTED = {
    "message": "Unsupported value: 'temperature'",
    "code": "unsupported_value",
    "param": "temperature",
}


@pytest.mark.parametrize(
    "status, error",
    [
        (429, {"message": "no money left", "code": "insufficient_quota"}),
        (401, {"message": f"wrong key {KEY}"}),
        (402, {"message": "add credits"}),
        (403, {"message": "not for you"}),
        (404, {"message": "no model gpt-test"}),
        (400, UNSUPPORTED),
    ],
)
def test_handle_status_stops(server, ask, status, error):
    """What no retry can mend stops the run and keeps the rows."""
    first_time(server, None, of=8, later=Reply(status, {"error": error}))
    message, out = ask()
    assert message.startswith("error: ")
    assert error["message"].replace(KEY, "[key]") in message
    assert 9 <= len(server.asked()) <= 8 + 4
    assert len(storage.read_jsonl(ask.journal)) == 8
    assert not ask.file.exists()
    if "param" in error:
        assert "the model refuses the parameter 'temperature': use --no_temperature" in message
    server.answer = lambda request: None
    asked = len(server.asked())
    assert ask()[0] is None
    assert len(server.asked()) == asked + 12
    assert len(read_rows(ask.file)) == 20


def answer_question(server: ApiServer, question: str, reply: Reply) -> None:
    """Make the server give a reply to every request that holds a question."""
    server.answer = lambda request: reply if question in json.dumps(request.body) else None


def test_handle_status_one_refusal(server, ask):
    """One refused question is recorded, and the rest finish."""
    question = tasks.load("toy")[7]["question"]
    answer_question(server, question, Reply(400, {"error": {"message": "content policy"}}))
    message, out = ask()
    assert "1 of 20 completions are missing, 1 requests failed" in message
    assert not ask.file.exists()
    [failure] = storage.read_jsonl(ask.failures)
    assert failure["sample_index"] == 7
    assert "content policy" in failure["error"]
    assert len(storage.read_jsonl(ask.journal)) == 19
    assert ask("--stage", "curate", "--method", "ft_cot")[0] is None  # go on without it
    assert len(read_rows(ask.file)) == 19
    assert storage.read_json(ask.file)["metadata"]["settings"]["missing"] == 1
    server.answer = lambda request: None
    assert ask()[0] is None
    assert len(read_rows(ask.file)) == 20
    assert storage.read_json(ask.file)["metadata"]["settings"]["missing"] == 0


def test_handle_status_all_refused(server, ask):
    """A 400 to everything stops the run after the first few."""
    server.answer = lambda request: Reply(400, {"error": {"message": "bad model"}})
    message, _ = ask()
    assert "the first 5 requests were all refused: the server answered 400" in message
    assert "bad model" in message
    assert len(server.asked()) <= 5 + 4


@pytest.mark.parametrize("code", [401, 402, "insufficient_quota"])
def test_handle_refusal_in_200(server, ask, code):
    """An error that no retry can mend stops the run in a 200, too, and costs nothing."""
    error = {"error": {"code": code, "message": "no credit"}}
    first_time(server, None, of=8, later=Reply(body=error))
    message, out = ask(*PRICES)
    assert "no credit" in message
    assert len(storage.read_jsonl(ask.journal)) == 8
    assert len(server.asked()) <= 8 + 4


FLAGGED = {  # openrouter.ai, errors and debugging: moderation errors
    "code": 403,
    "message": "model requires moderation: your input was flagged",
    "metadata": {
        "reasons": ["violence"],
        "flagged_input": "q",
        "provider_name": "p",
        "model_slug": "m",
    },
}


@pytest.mark.parametrize("status", [200, 403])
def test_handle_refusal_flagged(server, ask, status):
    """A question that a moderator flags is refused alone; the others are answered."""
    first_time(server, Reply(status, {"error": FLAGGED}), of=2)
    assert "requests failed" in ask(*PRICES)[0]
    total = len(server.asked())
    assert len(storage.read_jsonl(ask.journal)) == total - 2
    assert len(storage.read_jsonl(ask.failures)) == 2


def test_handle_refusal_429_in_200(server, ask):
    """A 429 in a 200 makes all workers pause, and is no attempt."""
    first_time(server, Reply(body={"error": {"code": 429, "message": "slow"}}), of=4)
    assert ask(*PRICES)[0] is None
    assert {row["attempts"] for row in storage.read_jsonl(ask.journal)} == {1}
    assert not ask.failures.exists()


@pytest.mark.parametrize(
    "status, body, words",
    [
        (422, {"detail": [{"loc": ["body", "n"], "msg": "too large"}]}, "422: body.n: too large"),
        (404, {"error": "model 'x' not found, try pulling it"}, "404: model 'x' not found, try"),
        (400, b"<html><b>Bad</b> gateway</html>", "400: Bad gateway"),
        (400, {"error": {"message": "\x1b[2Jbad"}}, r"400: \x1b[2Jbad"),
        (307, b"", "it redirects to http://h.test/v1: name that address with --base_url"),
    ],
)
def test_read_refusal_words(server, ask, status, body, words):
    """The server's words are told, whatever their form, and no order to the terminal is passed."""
    headers = {"location": "http://h.test/v1"} if status == 307 else {}
    server.answer = lambda request: Reply(status, body, headers)
    assert words in ask()[0]


# ---------------------------------------------------------------- what is worth another attempt

PASSING = {
    "500": Reply(500, {"error": {"message": "oops"}}),
    "503 HTML": Reply(503, b"<html>busy</html>", {"content-type": "text/html"}),
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
    "not UTF-8": Reply(body=b'"\xff'),
    "deep": Reply(body=b"[" * 100_000),
}


@pytest.mark.parametrize("fault", PASSING)
def test_call_with_retries_passing_fault(server, ask, fault):
    """A passing fault is retried and leaves exactly one row."""
    first_time(server, PASSING[fault], of=3)
    message, _ = ask()
    assert message is None, message
    assert len(server.asked()) == 23
    assert len(read_rows(ask.file)) == 20
    assert len(storage.read_jsonl(ask.journal)) == 20
    assert not ask.failures.exists()
    assert storage.read_json(ask.file)["metadata"]["usage"]["attempts"] == 23


@pytest.mark.parametrize(
    "fault", ["500", "503 HTML", "408", "409", "reset", "malformed", "empty choices"]
)
def test_call_with_retries_bounded(server, ask, fault):
    """Retries are bounded and end in the failures file."""
    answer_question(server, tasks.load("toy")[3]["question"], PASSING[fault])
    message, _ = ask("--max_attempts", 4)
    assert "1 of 20 completions are missing" in message
    assert len(server.asked()) == 19 + 4
    [failure] = storage.read_jsonl(ask.failures)
    assert failure["error"].startswith("given up after 4 attempts: ")


def test_call_with_retries_closed_idle(server, ask):
    """An idle connection that the server closed is no failure."""
    server.answer = lambda request: Reply(body=completion(request), then_close=True)
    assert ask()[0] is None
    assert len(read_rows(ask.file)) == 20
    assert len(storage.read_jsonl(ask.journal)) == 20


@pytest.mark.parametrize("slow", [Reply(delay=1), Reply(body=b" " * 100, drip=0.05)])
def test_call_with_retries_slow(server, ask, slow):
    """Slow replies are cut by the wall clock and counted as possibly billed."""
    first_time(server, slow, of=2)
    start = time.monotonic()
    assert ask("--attempt_timeout", 0.3, "--concurrency", 2)[0] is None
    assert time.monotonic() - start < 3
    assert len(server.asked()) == 22
    assert len(read_rows(ask.file)) == 20
    time.sleep(0.8)  # a late reply has no one to take it
    assert len(storage.read_jsonl(ask.journal)) == 20
    assert storage.read_json(ask.file)["metadata"]["usage"]["unanswered"] == 2


@pytest.mark.slow
def test_call_with_retries_one_of_1000(server, ask, monkeypatch):
    """One request that always fails does not sink the other 999."""
    monkeypatch.setitem(
        tasks.TASKS, "toy", tasks.TASKS["toy"]._replace(n=1000, train=700, test=300)
    )
    question = tasks.load("toy")[333]["question"]
    answer_question(server, question, PASSING["500"])
    message, _ = ask("--concurrency", 32)
    assert "1 of 1000 completions are missing" in message
    assert len(storage.read_jsonl(ask.journal)) == 999


# ---------------------------------------------------------------- money


@pytest.mark.parametrize(
    "usage",
    [
        {},
        {"usage": None},
        {"usage": {"prompt_tokens": "many"}},
        {"usage": {"prompt_tokens": -1, "completion_tokens": 2}},
    ],
)
def test_read_usage_missing(server, ask, usage):
    """Missing usage is unknown, and not 0."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"content": "The answer is yes."}}
    first_time(server, Reply(body={"model": "m", "choices": [choice], **usage}), of=3)
    assert ask()[0] is None
    metadata = storage.read_json(ask.file)["metadata"]
    assert metadata["usage"]["usage_unknown"] == 3
    assert metadata["usage"]["prompt_tokens"] == 170


def test_reserve_budget(server, ask):
    """The budget is never passed, and counts earlier runs."""
    usage = {"prompt_tokens": 200, "completion_tokens": 128}  # $1.48, the most
    server.answer = lambda request: Reply(body=completion(request, usage=usage), delay=0.01)
    message, _ = ask(*PRICES, "--max_cost", 8, "--concurrency", 8)
    assert "--max_cost 8.0: $7.4000 are spent" in message
    assert len(server.asked()) == 5
    message, _ = ask(*PRICES, "--max_cost", 8)
    assert "are spent" in message
    assert len(server.asked()) == 5
    assert ask(*PRICES, "--max_cost", 12)[0]
    assert len(server.asked()) == 8


def test_reserve_no_room(server, ask):
    """A budget without room for the first request asks for nothing."""
    message, _ = ask(*PRICES, "--max_cost", 1)  # 128 completion tokens may cost $1.28
    assert "the next request may cost $1." in message
    assert not server.log


def test_reserve_unanswered(server, ask):
    """An attempt without a reply counts against the budget, in later runs too."""
    first_time(server, Reply(delay=1), of=1)
    ask("--attempt_timeout", 0.5, "--concurrency", 1, *PRICES, "--max_cost", 2)
    possible = [row["possible_cost"] for row in storage.read_jsonl(ask.failures)]
    assert len(possible) == 1
    assert 1.28 < possible[0] < 2
    asked = len(server.asked())
    message, _ = ask(*PRICES, "--max_cost", possible[0] + 1.3)
    assert "are spent, or may have been" in message
    assert len(server.asked()) == asked


def test_bill_usage(server, ask):
    """A 200 that cannot be used costs what its usage says, in later runs too."""
    usage = {"prompt_tokens": 200, "completion_tokens": 80}  # $1
    first_time(server, Reply(body={"choices": [], "usage": usage}), of=2)
    _, out = ask(*PRICES)
    assert "$3.2000" in out  # and 20 usual replies
    [first, second] = storage.read_jsonl(ask.failures)
    assert first["usage"] == usage
    message, _ = ask(*PRICES, "--max_cost", 3.3, "--degree", 2, "--temperature", 0.7)
    assert message is not None


def test_bill_at_most(server, ask):
    """Without usage it costs the most that was asked for."""
    first_time(server, Reply(body=b'{"choices": ['), of=1)
    ask(*PRICES, "--concurrency", 1)
    [row] = storage.read_jsonl(ask.failures)
    assert row["error"].startswith("a reply that is not JSON")
    assert 1.28 < row["possible_cost"] < 2


UNUSABLE = {"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 5}}


@pytest.mark.parametrize("concurrency", [1, 4])
def test_count_unusable_stops(server, ask, concurrency):
    """Five equal replies in a row that cannot be used stop the run."""
    server.answer = lambda request: Reply(body=UNUSABLE | {"id": len(server.log)})
    message, out = ask(*PRICES, "--concurrency", concurrency)
    assert "replies in a row could not be used: a reply without choices" in message
    assert len(server.asked()) <= 5 + concurrency
    assert f"${0.06 * len(server.asked()):.4f}" in out


def test_count_unusable_one_question(server, ask):
    """One question that always gets such replies does not stop the others."""
    answer_question(server, tasks.load("toy")[3]["question"], Reply(body=UNUSABLE))
    message, _ = ask("--concurrency", 1)
    assert "1 of 20 completions are missing" in message
    assert len(server.asked()) == 19 + 5


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_lose_connection(ask, scheme):
    """A connection that cannot be made costs nothing, and the fifth in a row stops the run."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"{scheme}://127.0.0.1:{closed.getsockname()[1]}/v1"
        message, _ = ask("--base_url", url, *PRICES, "--max_cost", 2)
    assert message.startswith("error: no connection to the server: ")
    assert "refused" in message
    assert not ask.failures.exists() or "possible_cost" not in ask.failures.read_text()
    assert "are spent" not in ask(*PRICES, "--max_cost", 2.9)[1]


class Greeting(socketserver.BaseRequestHandler):
    """Says something that is no TLS."""

    def handle(self) -> None:
        self.request.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def test_lose_connection_tls(ask):
    """A failed TLS handshake is such a connection."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Greeting) as plain:
        threading.Thread(target=plain.serve_forever, daemon=True).start()
        message, _ = ask("--base_url", f"https://127.0.0.1:{plain.server_address[1]}/v1")
        plain.shutdown()
    assert message.startswith("error: no connection to the server: ")
    assert "SSL" in message


def test_lose_connection_proxy(ask, monkeypatch):
    """Where a proxy is used, a failure names it, without its password."""
    monkeypatch.setenv("HTTP_PROXY", "http://me:secret@127.0.0.1:1")
    message, _ = ask("--base_url", "http://h.test/v1")
    assert "through the proxy http://127.0.0.1:1" in message
    assert "secret" not in message


def test_find_proxy_loopback(server, ask, monkeypatch):
    """No proxy stands between us and this machine."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    assert ask()[0] is None
    assert len(server.asked()) == 20


def test_bounded_stream(server, ask, monkeypatch):
    """A body that is too long is not read to its end."""
    monkeypatch.setattr(clients, "MAX_REPLY_BYTES", 2000)
    first_time(server, Reply(body=b" " * 3000))
    assert ask()[0] is None
    assert len(server.asked()) == 21
    server.answer = lambda request: Reply(body=b" " * 3000)
    message, _ = ask("--teacher_method", "zs_cot")
    assert "a reply of more than 2000 bytes" in message


def test_bounded_transport_compressed(server, ask):
    """A compressed body may be a huge one: nobody asked for it."""
    body = gzip.compress(b" " * 10_000_000)
    server.answer = lambda request: Reply(body=body, headers={"content-encoding": "gzip"})
    message, _ = ask()
    assert "a compressed reply, though none was asked for" in message
    assert server.log[0].headers["accept-encoding"] == "identity"


FAULTY = [  # what a server answers, and what it bills, by itself: "at most" is unknown
    (Reply(429, {"error": {"message": "slow"}}, {"retry-after-ms": "1"}), 0),
    (Reply(500, {"error": {"message": "oops"}}), 0),
    (Reply(503, b"<html>busy</html>"), 0),
    (Reply(408, {}), 0),
    (Reply(close=True), "at most"),
    (Reply(reset=True), "at most"),
    (Reply(body=b'{"choices": ['), "at most"),
    (Reply(body={"error": {"code": 502, "message": "upstream"}}), "at most"),
    (Reply(body={"error": {"code": 429, "message": "slow"}}), 0),
    (Reply(body={"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 0}}), 0.01),
]


@pytest.mark.parametrize("requests", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_spent_equals_bill(server, ask, monkeypatch, requests):
    """With 30% faults of all kinds what was spent is what the server bills, to the cent."""
    row = tasks.TASKS["toy"]._replace(n=requests, train=requests - 50, test=50)
    monkeypatch.setitem(tasks.TASKS, "toy", row)
    chance = random.Random(0)
    bill = []
    answered = collections.Counter()

    def answer(request: Request) -> Reply:
        reply, cost = Reply(body=completion(request)), 0.06
        if chance.random() < 0.3:
            reply, cost = chance.choice(FAULTY)
        else:
            answered[request.key] += 1
        if cost == "at most":
            prompt_tokens, completion_tokens = steps.token_upper_bound(request.body)
            cost = prompt_tokens / 1000 + completion_tokens / 100
        bill.append(cost)
        return reply

    server.answer = answer
    flags = (*PRICES, "--concurrency", 16, "--max_attempts", 20)
    limit = requests * 0.15
    message, out = ask(*flags, "--max_cost", limit)
    assert f"--max_cost {limit}" in message
    assert sum(bill) <= limit + 16 * 2
    message, out = ask(*flags)
    assert message is None
    assert abs(float(re.findall(r"\$([\d.]+)", out)[-1].rstrip(".")) - sum(bill)) < 0.005
    assert set(answered.values()) == {1}
    assert len(answered) == requests


# ---------------------------------------------------------------- kills, locks, full disks


def start(
    server: ApiServer, saved: Path, *flags: object, after: str = "true"
) -> subprocess.Popen[str]:
    """Start the command line on toy questions; after: a command of the shell before it."""
    command = ["finetune_cot.py", "--stage", "sample", "--task", "toy", "--teacher", "gpt-test"]
    command += ["--teacher_part", "train", "--temperature", "0.7"]
    command += ["--base_url", server.url, "--saved", saved, *flags]
    command = [sys.executable, *map(str, command)]
    return subprocess.Popen(
        ["bash", "-c", f'{after} && exec "$0" "$@"', *command],
        cwd=ROOT,
        env={**os.environ, "OPENAI_API_KEY": KEY},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def journal_keys(folder: Path) -> set[str]:
    """Return the keys of the whole lines of all journals."""
    keys = set()
    for file in folder.rglob("*.journal.jsonl"):
        for line in file.read_text().split("\n"):
            if line.endswith("}"):
                keys.add(json.loads(line)["key"])
    return keys


def kill_again_and_again(server: ApiServer, saved: Path, flags: tuple, times: int) -> int:
    """Run to the end in spite of kills; return how many requests were asked for again.

    None of the kills makes a key in the journal be asked for again.
    """
    server.delay = 0.02
    journaled = set()
    for i in range(times):
        before = len(server.log)
        wanted = random.Random(i).randint(1, 40)
        process = start(server, saved, *flags)
        while process.poll() is None and len(server.log) < before + wanted:
            time.sleep(0.001)
        process.kill()
        process.wait()
        asked = {request.key for request in server.log[before:]}
        assert not journaled & asked
        journaled = journal_keys(saved)
    process = start(server, saved, *flags)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert KEY not in out
    return sum(n - 1 for n in keys_asked(server).values())


def check_same_dataset(server: ApiServer, tmp_path: Path, flags: tuple) -> int:
    """Compare with an undisturbed run; return the number of completions."""
    process = start(server, tmp_path / "whole", *flags)
    process.communicate(timeout=120)
    name = "completion_data/B_gpt-test__C_zs_cot_t70/D_toy.json"
    killed = tmp_path / "killed" / name
    assert killed.read_bytes() == (tmp_path / "whole" / name).read_bytes()
    return len(read_rows(killed))


def test_record_kill(server, tmp_path):
    """A kill loses nothing but what was under way."""
    flags = ("--split", "few_shot_12", "--teacher_method", "zs_cot", "--degree", 2)
    flags += ("--concurrency", 4)
    again = kill_again_and_again(server, tmp_path / "killed", flags, 2)
    assert 0 < again <= 2 * 4 * 2  # a worker: a request under way and a reply being written
    assert check_same_dataset(server, tmp_path, flags) == 24


@pytest.mark.slow
def test_record_twenty_kills(server, tmp_path):
    """Twenty kills lose nothing but what was under way."""
    flags = ("--split", "few_shot_63", "--teacher_method", "zs_cot", "--degree", 4)
    flags += ("--concurrency", 8)
    again = kill_again_and_again(server, tmp_path / "killed", flags, 20)
    assert again <= 20 * 8 * 2
    assert len(keys_asked(server)) == 63 * 4 * 2
    assert check_same_dataset(server, tmp_path, flags) == 63 * 4


def test_open_journal_torn_line(server, ask):
    """A torn last line is asked for again; a bad line elsewhere is refused."""
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
def test_open_journal_second_process(server, tmp_path, ask):
    """A second process on the same output is refused."""
    server.delay = 0.3
    flags = ("--split", "few_shot_8", "--teacher_method", "zs_cot_one_step", "--concurrency", 1)
    process = start(server, tmp_path, *flags)
    while not server.log:
        time.sleep(0.01)
    message, _ = ask("--temperature", 0.7)
    assert "is being written by another run: wait for it or stop it" in message
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    assert KEY not in out


def wait_for_requests(server: ApiServer, count: int) -> None:
    while len(server.log) < count:
        time.sleep(0.01)


FEW = ("--split", "few_shot_32", "--teacher_method", "zs_cot_one_step", "--concurrency", 4)


@pytest.mark.parametrize(
    "sent, after",
    [
        (signal.SIGINT, "true"),
        (signal.SIGTERM, "true"),
        (signal.SIGTERM, "trap '' INT"),  # Ctrl-C is ignored, as of what a script starts with &
    ],
)
def test_run_interrupted(server, tmp_path, sent, after):
    """Ctrl-C, and SIGTERM whatever Ctrl-C does, waits for what is under way and keeps it."""
    server.delay = 0.4
    process = start(server, tmp_path, *FEW, after=after)
    wait_for_requests(server, 8)
    with open(f"/proc/{process.pid}/cmdline") as f:
        assert KEY not in f.read()
    process.send_signal(sent)
    out, _ = process.communicate(timeout=60)
    [journal] = tmp_path.rglob("*.journal.jsonl")
    assert process.returncode == 1
    assert "interrupted: what is finished is kept" in out
    assert "Traceback" not in out
    assert len(storage.read_jsonl(journal)) == len(server.log) == 8
    assert KEY.encode() not in journal.read_bytes()


@pytest.mark.parametrize("sent, after", [(signal.SIGINT, "true"), (signal.SIGTERM, "trap '' INT")])
def test_run_second_ctrl_c(server, tmp_path, sent, after):
    """A second Ctrl-C or SIGTERM leaves the requests under way, and keeps what was answered."""
    server.answer = lambda request: Reply(delay=30) if len(server.log) > 4 else None
    process = start(server, tmp_path, *FEW, after=after)
    wait_for_requests(server, 8)
    process.send_signal(sent)
    time.sleep(0.5)
    process.send_signal(sent)
    out, _ = process.communicate(timeout=10)
    [journal] = tmp_path.rglob("*.journal.jsonl")
    assert process.returncode == 1
    assert "press Ctrl-C again to leave them" in out
    assert "interrupted: what is finished is kept" in out
    assert "Traceback" not in out
    assert len(storage.read_jsonl(journal)) == 4


def test_write_journal_full_disk(server, tmp_path):
    """A full disk stops the run, and no more is spent."""
    flags = ("--split", "few_shot_128", "--teacher_method", "zs_cot_one_step", "--concurrency", 2)
    process = start(server, tmp_path, *flags, after="ulimit -f 4")
    out, _ = process.communicate(timeout=60)
    [journal] = tmp_path.rglob("*.journal.jsonl")
    kept = storage.read_jsonl(journal)  # whole lines only, some ten
    assert process.returncode == 1
    assert "cannot be written (File too large), so nothing more is asked: make room" in out
    assert "Traceback" not in out
    assert 5 < len(kept)
    assert len(server.log) <= len(kept) + 6


# ---------------------------------------------------------------- the key


def test_api_key_flags():
    """No flag takes the key: the environment alone has it."""
    text = run("finetune_cot.py", "--help-all").stdout
    assert set(re.findall(r"--\w*key\w*", text)) == {"--train_key"}


def test_make_client_bad_key(server, ask, monkeypatch):
    """A key that no header can carry is refused without showing it."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\u00e9\u2026")
    message, _ = ask()
    assert "OPENAI_API_KEY holds characters" in message
    assert "\u00e9" not in message
