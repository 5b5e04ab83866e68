"""Sample a teacher behind an API: OpenAI, or any server that speaks it (vLLM, llama.cpp, Ollama).

    sample_remote -> ask_for_missing -> worker -> ask -> journal_rows (-> the journal)
    the journal -> make_completion -> publish (-> the completion file)

Every answer is written to a journal before anything else happens to it, under a key that says what
was asked.  Whatever ends a run, the next one asks only for keys that are missing; the completion
file is made from the journal (saved/README.md).  steps.py has what is asked, replies.py reads what
comes back, and api.py has pace, budget and retries.
"""

import asyncio
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import replies
import storage
import tasks
from api import (
    ApiConfig,
    ApiSession,
    JournalRow,
    RequestError,
    Rows,
    RunStopped,
    call_with_retries,
    open_journal,
    sum_usage,
)
from completions import Completion, SamplingConfig, completions_match, read_completions
from steps import (
    ENDPOINTS,
    Request,
    Samples,
    Unit,
    answer_texts,
    first_prompt,
    list_steps,
    list_units,
    next_requests,
    stated_answer,
    stop_strings,
    token_upper_bound,
)
from storage import UserError

CHAT_MAX_TOKENS = 1024  # new tokens of a rationale: 128, the paper's, cut most of today's

# ---------------- What comes back


def journal_rows(reply: replies.Reply, request: Request) -> list[JournalRow]:
    """Return a row a choice, no more than were asked for, and in the first one the usage."""
    usage = reply.usage or {}
    thinks = "reasoning_tokens" in usage
    rows = []
    for k, choice in zip(request.keys, reply.choices, strict=False):
        row = {
            "key": request.keys[k],
            "sample_index": request.sample_index,
            "completion_index": k,
            "step": request.step,
            "completion": choice.text,
        }
        if choice.reasoning or thinks:
            row["reasoning"] = choice.reasoning or ""
        row["finish_reason"] = choice.finish_reason
        if choice.refusal:
            row["refusal"] = choice.refusal
        rows.append(row | {"model": reply.model})
    rows[0]["usage"] = reply.usage
    return rows


# ---------------- Workers


async def ask(session: ApiSession, plan: SamplingConfig, request: Request) -> None:
    """Ask for a request's completions: answers to the journal, a failure to the failures file."""
    prompt_tokens, completion_tokens = token_upper_bound(request.body)
    cost = session.api.dollars(prompt_tokens, completion_tokens)

    async def send() -> list[JournalRow]:
        """Send the request once and read its reply."""
        content = await session.post(ENDPOINTS[plan.api], request.body, request.key)
        value = replies.parse_reply(content)
        reply = replies.read_reply(value, plan.api, len(request.keys))
        return journal_rows(reply, request)

    tokens = prompt_tokens / 4 + completion_tokens
    try:
        rows, attempts, unanswered = await call_with_retries(session, send, tokens, cost)
    except RequestError as e:
        session.failed_keys.add(request.key)
        add_failure(session, request, e)
        return
    session.requests += 1
    first = rows[0]
    first |= {"attempts": attempts, "unanswered": unanswered}
    if first["usage"]:
        session.spent += session.api.dollars(**first["usage"])
    elif cost:
        session.spent += cost
        first["possible_cost"] = cost
    watch_ends(session, plan, rows)
    await session.record(rows)


def watch_ends(session: ApiSession, plan: SamplingConfig, rows: list[JournalRow]) -> None:
    """Say why texts ended: an unknown reason once, cut ones after the first ten.

    Stops the run where the first twenty of a teacher are all cut: so would be those to come.
    """
    before = session.ends.total()
    for row in rows:
        reason = row["finish_reason"]
        kind = replies.finish_kind(reason)
        text = row["completion"] or ""
        if any(stop in text for stop in stop_strings(plan)):
            kind = "stop"
        if kind == "unknown":
            session.unknown_ends[reason] += 1
            if session.unknown_ends[reason] == 1:
                name = session.words(reason)
                print(f"sample: finish_reason {name!r} is not known, and taken for an end")
        if row["step"] == 1:
            session.ends[kind] += 1
    total = session.ends.total()
    cut = session.ends["length"]
    if cut and before < 10 <= total:
        print(describe_cuts(plan, cut, total), file=sys.stderr, flush=True)
    if plan.is_teacher and cut == total >= 20:
        session.stop(f"all of the first {total} texts were cut: {limit_advice(plan)}")


def describe_cuts(plan: SamplingConfig, cut: int, total: int) -> str:
    """Return how many texts were cut, with the flag that says where."""
    limit = plan.max_new_tokens
    flag = limit_flag(plan)
    return f"sample: {cut} of {total} texts were cut at {limit} tokens ({flag})"


def limit_flag(plan: SamplingConfig) -> str:
    """Return the flag that set the token limit."""
    if plan.is_teacher:
        return "--teacher_max_new_tokens"
    return "--max_new_tokens"


def limit_advice(plan: SamplingConfig) -> str:
    """Return what to do where texts are cut at the token limit."""
    return f"give more than {limit_flag(plan)} {plan.max_new_tokens}; reasoning counts as well"


def add_failure(session: ApiSession, request: Request, error: Exception) -> None:
    """Write down what was asked, and why there is no answer."""
    session.add_failure(
        request.key,
        sample_index=request.sample_index,
        completion_index=list(request.keys),
        step=request.step,
        error=str(error),
    )


async def worker(session: ApiSession, plan: SamplingConfig, units: Iterator[Unit]) -> None:
    """Take units from the iterator that all workers share; ask until only failures are missing."""
    rows = session.journal.rows
    with contextlib.suppress(RunStopped):
        for sample, ks in units:
            requests = next_requests(plan, rows, sample, ks)
            while requests:
                for request in requests:
                    await ask(session, plan, request)
                requests = next_requests(plan, rows, sample, ks)
                requests = [r for r in requests if r.key not in session.failed_keys]


async def ask_for_missing(session: ApiSession, plan: SamplingConfig, samples: Samples) -> None:
    """Ask, with many workers at once, for everything that the journal lacks."""
    rows = session.journal.rows
    todo = [unit for unit in list_units(plan, samples) if next_requests(plan, rows, *unit)]
    total = len(samples) * plan.degree
    found = total - sum(len(ks) for _, ks in todo)
    text = f"sample: {found} of {total} completions are in {session.journal.path}"
    if todo:
        text += f"; asking {plan.model} for the rest"
        session.connect()
    print(text, flush=True)
    units = iter(todo)
    count = min(session.api.concurrency, len(todo))
    reporter = asyncio.create_task(report_progress(session))
    workers = [worker(session, plan, units) for _ in range(count)]
    try:
        await session.run(asyncio.gather(*workers))
    finally:
        reporter.cancel()


async def report_progress(session: ApiSession) -> None:
    while True:
        await asyncio.sleep(10)
        text = describe_progress(session)
        if session.pause_reason:
            text += f"; all wait: {session.pause_reason}"
        print(text, file=sys.stderr, flush=True)


def describe_progress(session: ApiSession) -> str:
    """Return what this run did, and the tokens and dollars of all runs."""
    usage = session.usage()
    text = f"sample: {len(session.failed_keys)} failed; {session.requests} requests; in all "
    text += f"{usage['prompt_tokens']} prompt and {usage['completion_tokens']} completion tokens"
    if usage["usage_unknown"]:
        text += f" and those of {usage['usage_unknown']} requests that the server did not count"
    if "reasoning_tokens" in usage:
        text += f", {usage['reasoning_tokens']} of them reasoning"
    if session.api.price_in is not None:
        text += f", ${session.spent:.4f}"
    return text


# ---------------- From the journal to the completion file


class Dataset(NamedTuple):
    """The completions whose steps are all in a journal."""

    data: dict[str, list[Completion]]  # by sample_index
    rows: list[JournalRow]  # that they were made from
    missing: int  # completions


def make_dataset(plan: SamplingConfig, samples: Samples, rows: Rows) -> Dataset:
    """Make completions of the journal rows; count those that lack a step."""
    data: dict[str, list[Completion]] = {}
    used = []
    missing = 0
    for sample in samples:
        for k in range(plan.degree):
            steps = [rows.get(key) for key, _ in list_steps(plan, rows, sample, k)]
            if None in steps:
                missing += 1
                continue
            used += steps
            name = str(sample["sample_index"])
            completion = make_completion(plan, sample, k, steps)
            data.setdefault(name, []).append(completion)
    return Dataset(data, used, missing)


def make_completion(
    plan: SamplingConfig, sample: tasks.Sample, k: int, steps: list[JournalRow]
) -> Completion:
    """Return completion k of a sample from the journal's rows of its steps.

    Of zs_cot, `completion` is the answer of step 2; "" where there was none to read off.
    """
    prompt = first_prompt(plan, sample["question"])
    first = {"prompt": prompt, **read_row(steps[0])}
    text = first["completion"]
    for stop in stop_strings(plan):
        if stop in text:  # some servers leave it in
            first |= {"completion": text.partition(stop)[0], "finish_reason": "stop"}
    reasoning = first.pop("reasoning")
    row = {"sample_index": sample["sample_index"], "completion_index": k}
    row |= {"question": sample["question"], "answer": sample["answer"], **first}
    if plan.template == "zs_cot":
        row |= {f"reasoning_{name}": value for name, value in first.items()}
        row["prompt"] = answer_texts(plan, prompt, text)[-1]
        row["completion"] = stated_answer(plan, steps[0])
        row["finish_reason"] = None
        if row["completion"]:
            row["finish_reason"] = first["finish_reason"]
    for second in steps[1:]:
        answer = read_row(second)
        row["completion"] = answer["completion"]
        row["finish_reason"] = answer["finish_reason"]
    if reasoning:
        row["reasoning"] = reasoning
    last = steps[-1]
    row |= {"api": plan.api, "model": last["model"]}
    if "refusal" in last:
        row["refusal"] = last["refusal"]
    return row


def read_row(row: JournalRow) -> dict[str, str]:
    """Return text, finish_reason (stop, length, ...) and reasoning of a row of any version."""
    text, reasoning, is_whole = replies.split_reasoning(row["completion"] or "")
    kind = replies.finish_kind(row["finish_reason"])
    if kind == "unknown":
        kind = "stop"
    if not is_whole:
        kind = "length"
    reasoning = row.get("reasoning") or reasoning
    return {"completion": text, "finish_reason": kind, "reasoning": reasoning}


def publish(path: Path, metadata: dict, dataset: Dataset, samples: Samples) -> Path:
    """Write the completion file.  The journal keeps every row, so an older file may be replaced."""
    settings = metadata["settings"] | {"missing": dataset.missing}
    metadata = metadata | {"settings": settings, "usage": sum_usage(dataset.rows)}
    storage.write_json(path, {"metadata": metadata, "data": dataset.data})
    text = f"sample: {len(samples)} questions x {settings['degree']}"
    if dataset.missing:
        text += f", {dataset.missing} completions missing"
    print(f"{text} -> {path}")
    return path


def print_summary(
    session: ApiSession, plan: SamplingConfig, dataset: Dataset, task: str, rules: str
) -> None:
    """Print what a run did, how much is correct so far, and a warning where nothing is random."""
    text = describe_progress(session)
    grade = tasks.make_grader(task, plan.template, rules)
    rows = []
    for completions in dataset.data.values():
        rows += completions
    grades = [grade(row["completion"], row["answer"]) for row in rows]
    correct = sum(each.correct for each in grades)
    if rows:
        share = 100 * correct / len(rows)
        text += f"; {share:.1f}% of {len(rows)} are correct so far ({rules} rules)"
    print(text)
    cut = sum(is_cut(row) for row in rows)
    if cut:
        text = describe_cuts(plan, cut, len(rows))
        print(f"{text}: {limit_advice(plan)}")
    for reason, count in session.unknown_ends.items():
        name = session.words(reason)
        print(f"sample: {count} texts ended with {name!r}, taken for an end")
    groups = [completions for completions in dataset.data.values() if len(completions) > 1]
    identical = sum(is_repetition(completions) for completions in groups)
    if identical and plan.temperature != 0:
        print(
            f"warning: all completions of {identical} of {len(groups)} questions are identical: "
            "does the server sample?  (transformers serve does only where the model's "
            "generation_config.json says do_sample: true)"
        )


def is_cut(row: Completion) -> bool:
    """Tell whether the token limit cut the rationale."""
    reason = row.get("reasoning_finish_reason", row["finish_reason"])
    return reason == "length"


def is_repetition(completions: list[Completion]) -> bool:
    texts = [row.get("reasoning_completion", row["completion"]) for row in completions]
    return len(set(texts)) == 1


# ---------------- Stage sample, of a teacher behind an API


def default_rules(api: str | None) -> str:
    """Return the answer rules: chat models write sentences that the paper's often misread."""
    if api == "chat":
        return "flexible"
    return "paper"


def no_completions(name: str, task: str, path: Path) -> UserError:
    """Return an error that says how to get the completions of a teacher."""
    get = (
        "set OPENAI_API_KEY or --base_url to ask it through the API, put its file there "
        "(saved/README.md has the format), or take a local teacher, hf:NAME"
    )
    if name == "text-davinci-002":  # which no API has any more
        get = (
            "the paper's are in teacher_completion_data.tar.gz, linked from "
            "https://github.com/itsnamgyu/reasoning-teacher (a part of 8 GB in all), and `python "
            "data/prepare.py --completions teacher_completion_data.tar.gz` takes them in; for data "
            "of your own ask another teacher: --teacher NAME --base_url "
            "http://127.0.0.1:8000/v1 (or with OPENAI_API_KEY), or --teacher hf:NAME, a local one"
        )
    return UserError(f"there are no completions of {name} for {task} at {path}: {get}")


def has_journal(path: Path) -> bool:
    """Tell whether a completion file has answers in its journal."""
    journal_path = path.with_suffix(".journal.jsonl")
    return journal_path.exists() and journal_path.stat().st_size > 0


def with_limit(
    plan: SamplingConfig, samples: Samples, path: Path, limit: int | None
) -> SamplingConfig:
    """Return the plan with a limit of tokens; None: of a chat, more than the paper's 128.

    A journal that was begun with the paper's goes on with it: what was paid for is kept.
    """
    journal_path = path.with_suffix(".journal.jsonl")
    if limit or plan.api != "chat":
        return plan
    if has_journal(path) and journal_begins_with(journal_path, plan, samples):
        return plan
    return plan._replace(max_new_tokens=CHAT_MAX_TOKENS)


def journal_begins_with(path: Path, plan: SamplingConfig, samples: Samples) -> bool:
    """Tell whether the first answer of a journal was asked for as a plan says."""
    with open(path, "rb") as f:
        first = f.readline()
    try:
        row = storage.parse_json(first, path)
        index = row["sample_index"]
        for sample in samples:
            if sample["sample_index"] == index:
                steps = list_steps(plan, {}, sample, row["completion_index"])
                key, _ = steps[0]
                return key == row["key"]
    except (LookupError, TypeError, UserError):  # open_journal says what is wrong with it
        pass
    return False


def with_settings(metadata: dict, plan: SamplingConfig, samples: Samples) -> dict:
    """Return metadata with the settings that its completion file is made with."""
    settings = plan._asdict()
    for name in ("family", "choices", "examples", "task", "is_teacher"):
        del settings[name]
    for name in ("parameters", "system", "extra_headers"):
        if not settings[name]:
            del settings[name]  # as in the files of earlier versions
    settings["examples"] = storage.fingerprint(plan.examples)
    settings["samples"] = storage.fingerprint(samples)
    return metadata | {"settings": settings}


def is_finished(path: Path, metadata: dict) -> bool:
    """Whether a completion file lacks nothing, and was made with the settings of metadata."""
    settings = metadata["settings"] | {"missing": 0}
    return completions_match("sample", path, metadata["dataset_key"], settings)


def sample_remote(
    path: Path, metadata: dict, plan: SamplingConfig, samples: Samples, api: ApiConfig, rules: str
) -> Path:
    """Write the completion file of a teacher behind an API, unless it is there; return its path.

    Raises UserError where some of it is missing in the end.
    """
    metadata = with_settings(metadata, plan, samples)
    if is_finished(path, metadata):
        return path
    return sample_missing(path, metadata, plan, samples, api, rules)


def sample_missing(
    path: Path, metadata: dict, plan: SamplingConfig, samples: Samples, api: ApiConfig, rules: str
) -> Path:
    """Write a completion file from the journal and from what is asked for now.

    Raises UserError where some of it is missing in the end: the journal has what was answered.
    """
    refuse_open_batches(path)
    session = ApiSession(api, path)
    asyncio.run(ask_for_missing(session, plan, samples))
    dataset = make_dataset(plan, samples, session.journal.rows)
    print_summary(session, plan, dataset, metadata["dataset_key"], rules)
    total = len(samples) * plan.degree
    found = f"{total - dataset.missing} of {total} completions are there"
    session.raise_stop_reason(f" ({found}, in {session.journal.path})")
    if dataset.missing:
        count = len(session.failed_keys)
        failed = f"{count} requests failed ({session.failures.path} says why)"
        raise UserError(
            f"{dataset.missing} of {total} completions are missing, {failed}: start the same "
            "command again to ask for them, or continue without them from --stage curate"
        )
    return publish(path, metadata, dataset, samples)


def refuse_identical(plan: SamplingConfig) -> None:
    """Raise UserError where a plan would buy one rationale several times."""
    if plan.degree > 1 and plan.temperature == 0:
        raise UserError(
            f"--degree {plan.degree} at --temperature 0 would buy {plan.degree} identical "
            "rationales: use --temperature 0.7"
        )


def refuse_open_batches(path: Path) -> None:
    """Raise UserError where a batch of this completion file is under way: it is paid for."""
    if path.with_suffix(".batches.jsonl").exists():
        from extras import batch_api

        batch_api.refuse_open_batches(path)


def publish_partial(path: Path, metadata: dict, plan: SamplingConfig, samples: Samples) -> None:
    """Write the completion file of unfinished sampling from the journal; ask for nothing."""
    journal_path = path.with_suffix(".journal.jsonl")
    old = {"missing": True}
    if path.exists():
        old = read_completions(path, metadata["dataset_key"])[0].get("settings", {})
    degree = old.get("degree", plan.degree)
    is_partial = old.get("missing") or degree < plan.degree
    if not is_partial or not journal_path.exists():
        return
    rows = read_journal(journal_path)
    dataset = make_dataset(plan, samples, rows)
    if not dataset.data:
        raise UserError(
            f"{journal_path} holds no completion that was asked for with these flags: use those of "
            "--stage sample"
        )
    metadata = with_settings(metadata, plan, samples)
    publish(path, metadata, dataset, samples)


def read_journal(path: Path) -> Rows:
    journal = open_journal(path)
    journal.close()
    return journal.rows
