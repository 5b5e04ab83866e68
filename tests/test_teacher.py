"""A teacher behind an API: what it is asked and what is kept.

The folder recorded/ holds what an earlier version wrote: its journals are taken up as they are.
"""

import json
import re
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def test_with_limit(server, ask):
    """Chat teachers have a larger default than the paper's; its own strings have the paper's."""
    del ask.flags["--teacher_max_new_tokens"]
    assert ask()[0] is None
    assert server.log[-1].body["max_completion_tokens"] == 1024
    assert ask("--api", "completions")[0] is None
    assert server.log[-1].body["max_tokens"] == 128


def test_with_limit_old_journal(server, ask):
    """A journal that was begun with the paper's limit goes on with it."""
    del ask.flags["--teacher_max_new_tokens"]
    file = ask.completion_file("zs_cot_t70")
    shutil.copytree(RECORDED / "zs_cot_t70", file.parent)
    file.unlink()
    assert ask(*OLD_FLAGS, *OLD_RUNS["zs_cot_t70"])[0] is None
    assert not server.log


# ---------------------------------------------------------------- how a request is made


def test_request_parameters_extra(server, ask, monkeypatch):
    """Parameters, a system's turn and headers are sent, in both steps."""
    monkeypatch.setenv("AZURE_KEY", "sk-other-secret")
    more = ("--reasoning_effort", "low", "--top_p", 0.9, "--extra_body", '{"top_k": 20}')
    more += ("--system", "Be brief.", "--extra_headers", "api-key=AZURE_KEY")
    assert ask("--teacher_method", "zs_cot", *more)[0] is None
    assert len(server.asked()) == 40
    for request in server.log:
        assert request.body["reasoning_effort"] == "low"
        assert request.body["top_p"] == 0.9
        assert request.body["top_k"] == 20
        assert request.body["messages"][0] == {"role": "system", "content": "Be brief."}
        assert request.headers["api-key"] == "sk-other-secret"
    written = [path.read_text() for path in ask.file.parent.parent.rglob("*.json*")]
    assert "sk-other-secret" not in "".join(written)
    assert "api-key=AZURE_KEY" in "".join(written)


@pytest.mark.parametrize(
    "more",
    [
        ("--reasoning_effort", "low"),
        ("--top_p", 0.9),
        ("--extra_body", '{"top_k": 20}'),
        ("--system", "Be brief."),
        ("--extra_headers", "x-mode=MODE"),
    ],
)
def test_completion_key_parameters(server, ask, monkeypatch, more):
    """What is sent is part of the key; without it the old answers are found again."""
    monkeypatch.setenv("MODE", "fast-mode")
    ask()
    assert ask(*more)[0] is None
    assert len(server.asked()) == 40
    ask()
    assert len(server.asked()) == 40


def test_connect_only_to_ask(server, ask, monkeypatch):
    """A run that lacks no answer makes no client: its library takes long to import."""
    assert ask()[0] is None
    ask.file.unlink()
    monkeypatch.delattr("api.ApiSession.connect")
    assert ask()[0] is None
    assert ask.file.exists()


def test_make_client_without_key(server, ask, monkeypatch):
    """Without a key no Authorization header is sent: some servers refuse an empty one."""
    monkeypatch.delenv("OPENAI_API_KEY")
    assert ask()[0] is None
    assert "authorization" not in server.log[0].headers


def test_words_hide_extra_headers(server, ask, monkeypatch):
    """A server that repeats the value of an extra header does not make us show it."""
    monkeypatch.setenv("AZURE_KEY", "sk-other-secret")
    server.answer = lambda request: Reply(401, {"error": "bad key sk-other-secret"})
    message, out = ask("--extra_headers", "api-key=AZURE_KEY")
    assert "bad key [key]" in message
    assert "sk-other-secret" not in f"{message}{out}{ask.err}"


def test_make_client_redirect(server, ask):
    """A redirect to another host is not followed: nothing is sent there."""
    with ApiServer() as other:
        location = {"location": f"{other.url}/chat/completions"}
        server.answer = lambda request: Reply(308, b"", location)
        message, _ = ask("--concurrency", 1)
        assert f"redirects to {other.url}/chat/completions" in message
        assert not other.log
    assert len(server.log) == 1


def test_make_client_azure(server, ask):
    """The query of the base URL stands behind the path of each request."""
    paths = []
    read_request = server.read_request

    async def keep_path(reader: Any) -> Request:
        request = await read_request(reader)
        paths.append(request.path)
        return request

    server.read_request = keep_path
    server.answer = lambda request: Reply(body=completion(request))
    assert ask("--base_url", f"{server.url}/deployments/d?api-version=2024-10-21")[0] is None
    assert set(paths) == {"/deployments/d/chat/completions"}


# ---------------------------------------------------------------- why texts end


def test_watch_ends_first_ten(server, ask):
    """After the first ten texts, and at the end, cut ones are counted, with the flag's name."""
    texts = iter(["length"] * 7 + ["stop"] * 13)
    server.answer = lambda request: Reply(body=completion(request, finish_reason=next(texts)))
    _, out = ask("--concurrency", 1)
    sentence = "texts were cut at 128 tokens (--teacher_max_new_tokens)"
    assert f"sample: 7 of 10 {sentence}" in ask.err
    assert f"sample: 7 of 20 {sentence}: give more than" in out


def test_watch_ends_all_cut(server, ask, monkeypatch):
    """Where the first twenty are all cut, nothing more is bought."""
    monkeypatch.setitem(tasks.TASKS, "toy", tasks.TASKS["toy"]._replace(n=60, train=40, test=20))
    server.answer = lambda request: Reply(body=completion(request, "", "length"))
    message, _ = ask()
    assert (
        "all of the first 20 texts were cut: give more than --teacher_max_new_tokens 128" in message
    )
    assert len(server.asked()) <= 24


def test_watch_ends_unknown(server, ask):
    """An unknown reason is taken for an end, named once, and counted."""
    server.answer = lambda request: Reply(body=completion(request, finish_reason="wei\x1brd"))
    _, out = ask("--teacher_method", "zs_cot")
    assert len(server.asked()) == 40
    assert out.count("is not known, and taken for an end") == 1
    assert r"40 texts ended with 'wei\\x1brd', taken for an end" in out
    row = read_rows(ask.completion_file("zs_cot"))[0]
    assert row["reasoning_finish_reason"] == row["finish_reason"] == "stop"


# ---------------------------------------------------------------- reasoning models

THOUGHT = "The coin starts up and is flipped."


def think(text: str) -> Callable[[Request], Reply]:
    """Answer with a text, after reasoning in a field of its own."""

    def answer(request: Request) -> Reply:
        body = completion(request, text)
        body["choices"][0]["message"]["reasoning"] = THOUGHT
        return Reply(body=body)

    return answer


@pytest.mark.parametrize(
    "text, requests, answer",
    [
        ("It is up. The answer is yes.", 20, " yes."),
        ("It is up.\n\n**Answer:** no", 20, "** no"),
        (r"It is up. \boxed{yes}", 20, "yes}"),
        ("It is up.", 40, "It is up."),
        ("The answer is not clear. It is up.", 40, "The answer is not clear. It is up."),
    ],
)
def test_stated_answer(server, ask, text, requests, answer):
    """A reasoning model that has stated its answer is not made to think again for it."""
    server.answer = think(text)
    assert ask("--teacher_method", "zs_cot")[0] is None
    assert len(server.asked()) == requests
    row = read_rows(ask.completion_file("zs_cot"))[0]
    assert row["reasoning_completion"] == text
    assert row["reasoning"] == THOUGHT
    assert row["completion"] == answer
    assert row["finish_reason"] == "stop"


def test_stated_answer_hidden_reasoning(server, ask):
    """It is one even where the server only counts its reasoning tokens."""
    usage = {"prompt_tokens": 10, "completion_tokens": 65}
    usage |= {"completion_tokens_details": {"reasoning_tokens": 60}}
    server.answer = lambda request: Reply(
        body=completion(request, "So. The answer is yes.", usage=usage)
    )
    _, out = ask("--teacher_method", "zs_cot")
    assert len(server.asked()) == 20
    assert "1300 completion tokens, 1200 of them reasoning" in out
    metadata = storage.read_json(ask.completion_file("zs_cot"))["metadata"]
    assert metadata["usage"]["reasoning_tokens"] == 1200


@pytest.mark.parametrize(
    "which, label",
    [
        ("content", "It is up. The answer is yes."),
        ("reasoning", THOUGHT),
        ("both", f"{THOUGHT}\n\nIt is up. The answer is yes."),
    ],
)
def test_choose_texts_labels(server, ask, which, label):
    """A student learns what a reasoning teacher said, thought, or both."""
    server.answer = think("It is up. The answer is yes.")
    flags = ("--teacher_method", "zs_cot", "--method", "ft_cot", "--student", "toy")
    ask(*flags)
    message, out = ask(*flags, "--stage", "curate", "--rationale", which)
    assert message is None
    assert "curate: 14 of 14 have reasoning of their own, 0 were cut" in out
    suffix = "" if which == "content" else f"_{which}"
    [file] = ask.flags["--saved"].glob(f"finetune_data/*/F_zs_cot_toy_by_gpt-test{suffix}.json")
    labels = storage.read_json(file)["label"]
    assert labels[0].removesuffix(" --> yes").strip() == label


def test_choose_texts_without_reasoning(server, ask):
    """Where a teacher shows no reasoning, none can be learnt, and the sentence says so."""
    flags = ("--teacher_method", "zs_cot", "--method", "ft_cot", "--student", "toy")
    ask(*flags)
    message, out = ask(*flags, "--stage", "curate", "--rationale", "reasoning")
    assert "0 of 14 have reasoning of their own" in out
    assert "no correct rationale is left" in message


def test_nothing_left_cut(server, ask):
    """Where the token limit left nothing, its flag is named."""
    server.answer = lambda request: Reply(body=completion(request, "", "length"))
    ask()
    message, _ = ask("--stage", "curate", "--method", "ft_cot")
    assert "try a larger --teacher_max_new_tokens (14 were cut)" in message


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
    [("right", 20), ("more", 20), ("shuffled", 20), ("fewer", 60), ("duplicate", 20)],
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
    "reason, text", [("length", "cut"), ("content_filter", "cut"), ("stop", None), ("stop", " ")]
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
    assert re.search(r"curate: keeping the \d+ of 14 rationales", out)
    assert "ft_cot (rationales)" in out


def test_api_key_in_traceback(ask, capsys, monkeypatch):
    """A crash in the middle of a run shows no key."""

    def crash(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(teacher, "journal_rows", crash)
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


def test_no_completions_published(ask, monkeypatch):
    """The paper's teacher is no API's any more: its completions are published."""
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setenv("OPENAI_BASE_URL", "")
    command = ["--stage", "sample", "--task", "toy", "--teacher", "text-davinci-002"]
    with pytest.raises(SystemExit) as caught:
        finetune_cot.main([*command, "--saved", str(ask.file.parent)])
    for words in (
        "https://github.com/itsnamgyu/reasoning-teacher",
        "data/prepare.py --completions",
        "--teacher NAME --base_url",
    ):
        assert words in caught.value.code


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
        (("--teacher", "toy", "--top_p", 0.9), "--top_p is for teachers behind an API"),
        (("--no-thinking",), "--thinking is for local models"),
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
