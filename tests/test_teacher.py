"""A teacher behind an API: what it is asked and what is kept.

The folder recorded/ holds what an earlier version wrote: its journals are taken up as they are.
"""

import json
import re
import shutil
import traceback
from pathlib import Path

import pytest
from api_server import ApiServer, Reply, Request, completion
from conftest import KEY, first_time, keys_asked, read_rows

import evaluate
import finetune_cot
import flags
import storage
import tasks
import teacher

# ---------------------------------------------------------------- what is asked


def requests_of(server: ApiServer, turns: int) -> list[Request]:
    return [request for request in server.log if len(request.body["messages"]) == turns]


def test_answer_texts_chat(server, ask):
    """Two-step chat keeps the rationale as the assistant's turn."""
    assert ask("--teacher_method", "zs_cot")[0] is None
    question = tasks.load("toy")[0]["question"]
    second = requests_of(server, turns=3)
    [messages] = [
        request.body["messages"]
        for request in second
        if request.body["messages"][0]["content"].startswith(question)
    ]
    row = read_rows(ask.completion_file("zs_cot"))[0]
    assert messages == [
        {"role": "user", "content": question + "\nLet's think step by step."},
        {"role": "assistant", "content": row["reasoning_completion"]},
        {"role": "user", "content": "Therefore, the answer is"},
    ]


def test_next_requests_two_steps(server, ask):
    """Each rationale has an answer step, whose answer is read off greedily."""
    flags = ("--teacher_method", "zs_cot", "--degree", 2, "--temperature", 0.7)
    assert ask(*flags)[0] is None
    first = requests_of(server, turns=1)
    second = requests_of(server, turns=3)
    assert len(first) == 40
    assert len(second) == 40
    assert {request.body["temperature"] for request in first} == {0.7}
    assert {request.body["temperature"] for request in second} == {0.0}
    assert not [r for r in server.log if "n" in r.body or "stop" in r.body]


def test_publish_two_steps(server, ask):
    """A completion file of two-step chat has both steps, and what they cost."""
    flags = ("--teacher_method", "zs_cot", "--degree", 2, "--temperature", 0.7)
    message, out = ask(*flags)
    assert message is None
    file = ask.completion_file("zs_cot_t70")
    row = read_rows(file)[0]
    assert row["api"] == "chat"
    assert row["model"] == "gpt-test-0613"
    assert row["prompt"] == "Therefore, the answer is"
    assert row["finish_reason"] == "stop"
    assert row["reasoning_prompt"].endswith("step by step.")
    assert row["reasoning_completion"].startswith("Because")
    assert row["completion"] in ("yes.", "no.")
    assert storage.read_json(file)["metadata"]["usage"] == {
        "prompt_tokens": 800,
        "completion_tokens": 400,
        "usage_unknown": 0,
        "requests": 80,
        "attempts": 80,
        "unanswered": 0,
    }
    assert "% of 40 are correct so far (flexible rules)" in out


def test_answer_texts_completions(server, ask):
    """Raw completions send the strings of the paper."""
    assert ask("--teacher_method", "zs_cot", "--api", "completions")[0] is None
    question = tasks.load("toy")[0]["question"]
    prompts = {request.body["prompt"] for request in server.asked("/completions")}
    prompts = {prompt for prompt in prompts if question in prompt}
    first = f"Q: {question}\nA: Let's think step by step."
    row = read_rows(ask.completion_file("zs_cot"))[0]
    assert prompts == {row["reasoning_prompt"], row["prompt"]}
    assert row["reasoning_prompt"] == first
    assert row["prompt"] == f"{first}{row['reasoning_completion']}\nTherefore, the answer is"
    assert server.log[0].body["max_tokens"] == 128


def test_stop_strings_few_shot(server, ask, tmp_path):
    """Few-shot completions end at the next question, even where the server does not stop."""
    examples = "Q: a?\nA: b. The answer is yes."
    storage.write_json(tmp_path / "few_shot_cot_prompts.json", {"toy": {"prompt": examples}})
    text = " So. The answer is no.\nQ: Next"
    server.answer = lambda request: Reply(body=completion(request, text, "length"))
    flags = ("--teacher_method", "fs_cot", "--api", "completions", "--data", tmp_path)
    assert ask(*flags)[0] is None
    assert server.log[0].body["stop"] == ["\nQ:"]
    assert server.log[0].body["prompt"].startswith(examples + "\nQ: A coin")
    row = read_rows(ask.completion_file("fs_cot"))[0]
    assert row["completion"] == " So. The answer is no."
    assert row["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "flags, names",
    [
        ((), {"model", "messages", "temperature", "max_completion_tokens"}),
        (("--no_temperature",), {"model", "messages", "max_completion_tokens"}),
        (("--legacy_max_tokens",), {"model", "messages", "temperature", "max_tokens"}),
    ],
)
def test_request_parameters_names(server, ask, flags, names):
    """Only what was set is sent."""
    assert ask(*flags)[0] is None
    assert set(server.log[0].body) == names


def test_sample_remote_train_part(server, ask):
    """The training part alone can be asked."""
    assert ask("--teacher_part", "train", "--split", "few_shot_8")[0] is None
    assert len(server.asked()) == 8
    assert len(read_rows(ask.file)) == 8


def test_next_requests_degree(server, ask):
    """A larger degree asks only for the new completions, a smaller one for nothing."""
    flags = ("--temperature", 0.7, "--degree")
    file = ask.completion_file("zs_cot_one_step_t70")
    ask(*flags, 1)
    assert ask(*flags, 3)[0] is None
    assert len(server.asked()) == 60
    assert max(keys_asked(server).values()) == 1
    assert [row["completion_index"] for row in read_rows(file)] == [0, 1, 2] * 20
    ask(*flags, 2)
    assert len(server.asked()) == 60
    assert len(read_rows(file)) == 40


def test_completion_key_settings(server, ask):
    """Changed settings never reuse old answers, and old settings find theirs again."""
    ask()
    ask("--teacher_max_new_tokens", 64)
    assert len(server.asked()) == 40
    ask("--api", "completions")
    assert len(server.asked()) == 60
    ask()
    assert len(server.asked()) == 60
    assert len(read_rows(ask.file)) == 20


def test_is_finished_file(server, ask):
    """A finished file, and one from elsewhere, are used as they are."""
    ask()
    asked = len(server.log)
    assert "made with the same settings: skipped" in ask()[1]
    assert len(server.log) == asked
    ask.journal.unlink()
    assert "using the completions of gpt-test" in ask("--degree", 1)[1]
    assert len(server.log) == asked


def test_ask_for_missing_concurrency(server, ask):
    """No more requests are under way than --concurrency says."""
    server.delay = 0.02
    assert ask("--concurrency", 3)[0] is None
    assert server.most_open == 3


# ---------------------------------------------------------------- files of an earlier version

RECORDED = Path(__file__).parent / "recorded"
OLD_RUNS = {
    "zs_cot_t70": ("--teacher_method", "zs_cot"),
    "zs_cot_one_step_t70": ("--api", "completions", "--degree", 2, "--choices", 2),
}
OLD_FLAGS = ("--split", "few_shot_2", "--teacher_part", "train", "--temperature", 0.7)


@pytest.mark.parametrize("key", OLD_RUNS)
def test_ask_for_missing_old_journal(server, ask, key):
    """A journal that an earlier version wrote is taken up: the same keys, the same file."""
    file = ask.completion_file(key)
    shutil.copytree(RECORDED / key, file.parent)
    file.unlink()
    assert ask(*OLD_FLAGS, *OLD_RUNS[key])[0] is None
    assert not server.log
    assert file.read_bytes() == (RECORDED / key / "D_toy.json").read_bytes()


@pytest.mark.parametrize("key", OLD_RUNS)
def test_record_old_format(server, ask, key):
    """Files of answers and failures are written byte for byte as before."""

    def answer(request: Request) -> Reply | None:
        if key == "zs_cot_t70" and len(server.log) == 1:
            return Reply(close=True)
        if key == "zs_cot_t70" and len(server.log) == 3:
            return Reply(body=completion(request, usage=...))
        return None

    server.answer = answer
    prices = ("--price_in", 1000, "--price_out", 10000, "--concurrency", 1)
    assert ask(*OLD_FLAGS, *prices, *OLD_RUNS[key])[0] is None
    written = sorted(ask.completion_file(key).parent.iterdir())
    assert [path.name for path in written] == sorted(p.name for p in (RECORDED / key).iterdir())
    for path in written:
        assert path.read_bytes() == (RECORDED / key / path.name).read_bytes()


# ---------------------------------------------------------------- several choices a request


def reply_with_choices(request: Request, how: str) -> Reply:
    """The usual reply, with fewer or more choices, in another order, or one index twice."""
    body = completion(request)
    choices = body["choices"]
    if how == "fewer":
        choices = choices[:1]
    if how == "more":
        choices = [*choices, {**choices[-1], "index": 9}]
    if how == "shuffled":
        choices = choices[::-1]
    if how == "duplicate":
        choices = [{**choice, "index": 0} for choice in choices]
    return Reply(body=body | {"choices": choices})


@pytest.mark.parametrize(
    "how, requests",
    [("right", 20), ("more", 20), ("shuffled", 20), ("fewer", 60), ("duplicate", 60)],
)
def test_read_reply_choices(server, ask, how, requests):
    """Whatever number of choices comes back, each completion is there once."""
    server.answer = lambda request: reply_with_choices(request, how)
    assert ask("--degree", 3, "--temperature", 0.7, "--choices", 3)[0] is None
    assert len(server.asked()) == requests
    file = ask.completion_file("zs_cot_one_step_t70")
    journal = storage.read_jsonl(file.with_suffix(".journal.jsonl"))
    assert len(journal) == 60
    assert len({row["key"] for row in journal}) == 60
    billed = [row for row in journal if "usage" in row]
    assert len(billed) == requests, "what a request cost stands once, with its first choice"
    if how == "shuffled":
        for row in journal:
            assert row["completion"].endswith(str(row["completion_index"] or "."))


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
def test_needs_answer_step_unfinished(server, ask, reason, text):
    """An unfinished or missing rationale is stored without a second turn and never right."""
    odd_questions = [sample["question"] for sample in tasks.load("toy")[:5]]

    def answer(request: Request) -> Reply | None:
        said = json.dumps(request.body)
        if any(question in said for question in odd_questions):
            return Reply(body=completion(request, text, reason))
        return None

    server.answer = answer
    assert ask("--teacher_method", "zs_cot")[0] is None
    assert len(server.asked()) == 5 + 15 * 2
    for row in read_rows(ask.completion_file("zs_cot"))[:5]:
        assert row["reasoning_completion"] == (text or "")
        assert row["reasoning_finish_reason"] == reason
        assert row["completion"] == ""
        assert row["finish_reason"] is None
        for rules in ("paper", "flexible"):
            assert not tasks.grade("toy", "zs_cot", "", row["answer"], rules).correct


def test_make_completion_cut(server, ask):
    """A right answer in a cut reply is not taught."""
    text = "It turns. The answer is yes. Or"
    server.answer = lambda request: Reply(body=completion(request, text, "length"))
    ask()
    message, _ = ask("--stage", "curate", "--method", "ft_cot")
    assert "no correct rationale is left" in message
    assert len(read_rows(ask.file)) == 20


def test_read_choice_refusal(server, ask):
    """A refusal is a row with its reason."""
    message = {"role": "assistant", "content": None, "refusal": "I cannot"}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    usage = {"prompt_tokens": 1, "completion_tokens": 1}
    first_time(server, Reply(body={"model": "m", "choices": [choice], "usage": usage}))
    assert ask("--concurrency", 1)[0] is None
    row = read_rows(ask.file)[0]
    assert row["completion"] == ""
    assert row["refusal"] == "I cannot"
    assert not tasks.grade("toy", "zs_cot_one_step", row["completion"], row["answer"]).correct


def test_print_summary_identical(server, ask):
    """Identical rationales above temperature 0 are pointed out."""
    server.answer = lambda request: Reply(body=completion(request, "The answer is yes."))
    _, out = ask("--degree", 2, "--temperature", 0.7)
    assert "warning: all completions of 20 of 20 questions are identical" in out


def test_publish_partial_other_settings(server, ask):
    """Curating with flags that nothing was asked for with says so."""
    server.answer = lambda request: Reply(401, {}) if len(server.log) > 4 else None
    ask()
    flags = ("--stage", "curate", "--method", "ft_cot", "--teacher_max_new_tokens", 64)
    assert "holds no completion that was asked for with these flags" in ask(*flags)[0]


def test_sample_remote_trains(server, ask):
    """What was sampled through an API is curated, and a student trains on it."""
    flags = ("--teacher_method", "zs_cot", "--method", "ft_cot", "--student", "toy")
    ask(*flags)
    message, out = ask(*flags, "--stage", "all", "--epochs", 1, "--max_new_tokens", 4)
    assert message is None
    assert re.search(r"curate: kept \d+ of 14 rationales", out)
    assert "ft_cot (rationales)" in out


def test_api_key_in_traceback(ask, capsys, monkeypatch):
    """A crash in the middle of a run shows no key."""

    def crash(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(teacher, "read_reply", crash)
    with pytest.raises(ZeroDivisionError) as caught:
        ask()
    assert KEY not in "".join(traceback.format_exception(caught.value))
    assert KEY not in f"{capsys.readouterr()}"


def test_api_key_in_files(ask, capsys, tmp_path):
    """No stage with an API teacher prints the key or writes it; `ask` looks into every file."""
    small = ("--method", "ft_cot", "--epochs", 1, "--max_new_tokens", 4, "--rules", "paper")
    flags = ("--teacher_method", "zs_cot", "--stage", "all", "--student", "toy", *small)
    assert ask(*flags)[0] is None
    written = sorted(map(str, (tmp_path / "completion_data").glob("*/*.json")))
    assert len(written) == 2
    assert (tmp_path / "models").exists()
    evaluate.main(["score", *written, "--part", "all", "--allow_partial"])
    assert KEY not in f"{capsys.readouterr()}"


# ---------------------------------------------------------------- flags


def test_sample_remote_without_api(ask, monkeypatch):
    """Without a key and a base URL the message says how to get an API."""
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setenv("OPENAI_BASE_URL", "")
    command = ["--stage", "sample", "--teacher", "gpt-test", "--saved", str(ask.file.parent)]
    with pytest.raises(SystemExit, match="set OPENAI_API_KEY or --base_url"):
        finetune_cot.main(command)


@pytest.mark.parametrize(
    "url, warns",
    [
        ("http://127.0.0.1:9/v1", False),
        ("http://localhost:9/v1", False),
        ("https://example.org/v1", False),
        ("http://example.org/v1", True),
    ],
)
def test_check_plain_http(url, warns, capsys):
    """Plain http to another machine warns."""
    flags.check(flags.parse_args(["--base_url", url])[0])
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
def test_check_refused_flags(server, ask, flags, sentence):
    """Flags that cannot work are refused before anything is asked."""
    message, _ = ask(*flags)
    assert message.startswith("error: ")
    assert sentence in message
    assert not server.log
