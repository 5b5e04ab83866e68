"""Sample a teacher behind an API: OpenAI, or any server that speaks it (vLLM, llama.cpp, Ollama).

    sample_remote -> ask_for_missing -> worker -> ask -> read_reply (-> the journal)
    the journal -> make_completion -> publish (-> the completion file)

Every answer is written to a journal before anything else happens to it, under a key that says what
was asked.  Whatever ends a run, the next one asks only for keys that are missing; the completion
file is made from the journal (saved/README.md).  api.py has the requests themselves.
"""

import asyncio
import contextlib
import functools
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import storage
import tasks
from api import (
    ApiConfig,
    ApiSession,
    InvalidReplyError,
    JournalRow,
    RequestError,
    Rows,
    RunStopped,
    call_with_retries,
    open_journal,
    read_usage,
    sum_usage,
)
from completions import (
    Completion,
    SamplingConfig,
    completions_match,
    format_prompt,
    read_completions,
)
from storage import UserError

ENDPOINTS = {"chat": "/chat/completions", "completions": "/completions"}
Samples = list[tasks.Sample]
Unit = tuple[tasks.Sample, range]  # completion indices of a sample that one request may ask for

# ---------------- What is asked, and under which key


class Request(NamedTuple):
    """A request for completions of a sample (step 1), or for the answer of one (step 2)."""

    sample_index: int
    step: int
    keys: dict[int, str]  # {completion_index: key} of what it asks for
    body: dict[str, Any]

    @property
    def key(self) -> str:
        return next(iter(self.keys.values()))


def stop_strings(plan: SamplingConfig) -> list[str]:
    """Return where a completion ends: before the next question, or at the END of the paper."""
    if plan.template == "fs_cot":
        return ["\nQ:"]  # few-shot examples teach a base model to continue with a question
    if plan.family == "openai" and plan.template.startswith("ft"):
        return [" END"]
    return []


@functools.lru_cache
def request_parameters(plan: SamplingConfig, step: int) -> tuple[dict[str, Any], str]:
    """Return what every request of a step sends besides its text, and the same as JSON."""
    limit = "max_tokens"
    if plan.api == "chat" and not plan.legacy_max_tokens:
        limit = "max_completion_tokens"
    parameters: dict[str, Any] = {"model": plan.model, limit: plan.max_new_tokens}
    if plan.temperature is not None:
        parameters["temperature"] = plan.temperature
        if step == 2:
            parameters["temperature"] = 0.0  # the answer is read off greedily
    if plan.api == "completions" and step == 1 and stop_strings(plan):
        parameters["stop"] = stop_strings(plan)
    return parameters, json.dumps([plan.api, parameters], sort_keys=True)


def request_body(plan: SamplingConfig, step: int, texts: list[str]) -> dict[str, Any]:
    """Return the body of a request for one choice."""
    body = dict(request_parameters(plan, step)[0])
    if plan.api == "completions":
        body["prompt"] = texts[0]
    else:
        turns = zip(("user", "assistant", "user"), texts, strict=False)
        body["messages"] = [{"role": role, "content": text} for role, text in turns]
    return body


def completion_key(
    plan: SamplingConfig, step: int, texts: list[str], sample_index: int, k: int
) -> str:
    """Return 20 hex digits of all that is asked, for which sample, completion and step."""
    _, parameters = request_parameters(plan, step)
    asked = "\0".join([parameters, *texts, f"{sample_index} {k} {step}"])
    return hashlib.sha256(asked.encode("utf-8", "replace")).hexdigest()[:20]


def answer_texts(plan: SamplingConfig, prompt: str, rationale: str) -> list[str]:
    """Return the texts of Zero-shot-CoT's second step (paper §3): turns, or one prompt."""
    if plan.api == "chat":
        return [prompt, rationale, tasks.ANSWER_TRIGGER.strip()]
    return [prompt + rationale + tasks.ANSWER_TRIGGER]


def needs_answer_step(row: JournalRow) -> bool:
    """Whether a rationale has an answer to read off: not if it was cut, filtered or refused."""
    return row["finish_reason"] == "stop" and bool((row["completion"] or "").strip())


def list_steps(
    plan: SamplingConfig, rows: Rows, sample: tasks.Sample, k: int
) -> list[tuple[str, list[str]]]:
    """Return (key, texts) of the steps of completion k: of step 2 once rows hold its rationale."""
    index = sample["sample_index"]
    texts = [format_prompt(plan, sample)]
    steps = [(completion_key(plan, 1, texts, index, k), texts)]
    first = rows.get(steps[0][0])
    if plan.template == "zs_cot" and first and needs_answer_step(first):
        texts = answer_texts(plan, texts[0], first["completion"])
        steps.append((completion_key(plan, 2, texts, index, k), texts))
    return steps


def next_requests(
    plan: SamplingConfig, rows: Rows, sample: tasks.Sample, ks: Iterable[int]
) -> list[Request]:
    """Return the requests that completions ks of a sample need next; [] when all are in rows."""
    index = sample["sample_index"]
    first_keys = {}
    second_steps = []
    for k in ks:
        steps = list_steps(plan, rows, sample, k)
        key, texts = steps[-1]
        if key in rows:
            continue
        if len(steps) == 1:
            first_keys[k] = key
        else:
            second_steps.append(Request(index, 2, {k: key}, request_body(plan, 2, texts)))
    if not first_keys:
        return second_steps
    body = request_body(plan, 1, [format_prompt(plan, sample)])
    if len(first_keys) > 1:
        body["n"] = len(first_keys)
    return [Request(index, 1, first_keys, body)]


def list_units(plan: SamplingConfig, samples: Samples) -> Iterator[Unit]:
    for sample in samples:
        for k in range(0, plan.degree, plan.choices):
            yield sample, range(k, min(k + plan.choices, plan.degree))


def token_upper_bound(body: dict[str, Any]) -> tuple[int, int]:
    """Return the most (prompt, completion) tokens of a request: one a byte, and 16 more a turn."""
    texts = [turn["content"] for turn in body.get("messages", [])] or [body["prompt"]]
    limit = body.get("max_completion_tokens") or body["max_tokens"]
    return sum(len(text.encode()) + 16 for text in texts), limit * body.get("n", 1)


# ---------------- What comes back


def read_reply(reply: Any, api: str, request: Request) -> list[JournalRow]:
    """Return a row a choice, no more than were asked for, and in the first one the usage.

    Raises InvalidReplyError for a reply, or a choice, without a message.
    """
    found: dict[int, dict[str, Any]] = {}
    try:
        for place, choice in enumerate(reply["choices"]):
            index = choice.get("index")
            if type(index) is not int:
                index = place
            found.setdefault(index, read_choice(choice, api))
    except (AttributeError, LookupError, TypeError):
        found = {}
    if not found:
        raise InvalidReplyError(f"a reply without choices: {json.dumps(reply)[:200]}")
    rows = []
    for (k, key), place in zip(request.keys.items(), sorted(found), strict=False):
        row = {"key": key, "sample_index": request.sample_index, "completion_index": k}
        row |= {"step": request.step, **found[place], "model": text_or_none(reply.get("model"))}
        rows.append(row)
    rows[0]["usage"] = read_usage(reply.get("usage"))
    return rows


def read_choice(choice: dict[str, Any], api: str) -> dict[str, str | None]:
    """Return the text of a choice and why it ended; another shape raises what it happens to."""
    message = {"content": choice["text"]} if api == "completions" else choice["message"]
    text = message.get("content")
    if text is not None:
        text = storage.replace_lone_surrogates(text)
    columns = {"completion": text, "finish_reason": text_or_none(choice.get("finish_reason"))}
    if message.get("refusal"):
        columns["refusal"] = str(message["refusal"])
    return columns


def text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None


# ---------------- Workers


async def ask(session: ApiSession, plan: SamplingConfig, request: Request) -> None:
    """Ask for a request's completions: answers to the journal, a failure to the failures file."""
    import httpx2

    prompt_tokens, completion_tokens = token_upper_bound(request.body)
    cost = session.api.dollars(prompt_tokens, completion_tokens)

    async def send() -> list[JournalRow]:
        """Send the request once and read its reply."""
        response = await session.client.post(
            ENDPOINTS[plan.api],
            body=request.body,
            cast_to=httpx2.Response,
            options={"headers": {"X-Client-Request-Id": request.key}},
        )
        try:
            reply = json.loads(response.content)
        except (ValueError, RecursionError):
            raise InvalidReplyError(f"a reply that is not JSON: {response.text[:200]!r}") from None
        return read_reply(reply, plan.api, request)

    tokens = prompt_tokens / 4 + completion_tokens
    try:
        rows, attempts, unanswered = await call_with_retries(session, send, tokens, cost)
    except RequestError as e:
        session.failed_keys.add(request.key)
        add_failure(session, request, e)
        return
    rows[0] |= {"attempts": attempts, "unanswered": unanswered}
    session.requests += 1
    if rows[0]["usage"]:
        session.spent += session.api.dollars(**rows[0]["usage"])
    elif cost:
        session.spent += cost
        rows[0]["possible_cost"] = cost
    await session.record(rows)


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
    with contextlib.suppress(RunStopped):
        for sample, ks in units:
            requests = next_requests(plan, session.journal.rows, sample, ks)
            while requests:
                for request in requests:
                    await ask(session, plan, request)
                requests = next_requests(plan, session.journal.rows, sample, ks)
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
    print(text, flush=True)
    units = iter(todo)
    count = min(session.api.concurrency, len(todo))
    reporter = asyncio.create_task(report_progress(session))
    try:
        await session.run(asyncio.gather(*(worker(session, plan, units) for _ in range(count))))
    finally:
        reporter.cancel()


async def report_progress(session: ApiSession) -> None:
    while True:
        await asyncio.sleep(10)
        print(describe_progress(session), file=sys.stderr, flush=True)


def describe_progress(session: ApiSession) -> str:
    """Return what this run did, and the tokens and dollars of all runs."""
    usage = sum_usage(session.journal.rows.values())
    text = f"sample: {len(session.failed_keys)} failed; {session.requests} requests; in all "
    text += f"{usage['prompt_tokens']} prompt and {usage['completion_tokens']} completion tokens"
    if usage["usage_unknown"]:
        text += f" and those of {usage['usage_unknown']} requests that the server did not count"
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
            completions = data.setdefault(str(sample["sample_index"]), [])
            completions.append(make_completion(plan, sample, k, steps))
    return Dataset(data, used, missing)


def make_completion(
    plan: SamplingConfig, sample: tasks.Sample, k: int, steps: list[JournalRow]
) -> Completion:
    """Return completion k of a sample from the journal's rows of its steps.

    Of zs_cot, `completion` is the answer of step 2; "" where there was none to read off.
    """
    prompt = format_prompt(plan, sample)
    text = steps[0]["completion"] or ""
    first = {"prompt": prompt, "completion": text, "finish_reason": steps[0]["finish_reason"]}
    for stop in stop_strings(plan):
        if stop in text:  # some servers leave it in
            first |= {"completion": text.partition(stop)[0], "finish_reason": "stop"}
    row = {"sample_index": sample["sample_index"], "completion_index": k}
    row |= {"question": sample["question"], "answer": sample["answer"], **first}
    if plan.template == "zs_cot":
        row |= {f"reasoning_{name}": value for name, value in first.items()}
        row |= {"prompt": answer_texts(plan, prompt, text)[-1]}
        row |= {"completion": "", "finish_reason": None}
    for second in steps[1:]:
        row["completion"] = second["completion"] or ""
        row["finish_reason"] = second["finish_reason"]
    row |= {"api": plan.api, "model": steps[-1]["model"]}
    if "refusal" in steps[-1]:
        row["refusal"] = steps[-1]["refusal"]
    return row


def publish(path: Path, metadata: dict, dataset: Dataset, samples: Samples) -> Path:
    """Write the completion file.  The journal keeps every row, so an older file may be replaced."""
    settings = metadata["settings"] | {"missing": dataset.missing}
    metadata = metadata | {"settings": settings, "usage": sum_usage(dataset.rows)}
    storage.write_json(path, {"metadata": metadata, "data": dataset.data})
    missing = ""
    if dataset.missing:
        missing = f", {dataset.missing} completions missing"
    print(f"sample: {len(samples)} questions x {settings['degree']}{missing} -> {path}")
    return path


def print_summary(
    session: ApiSession, plan: SamplingConfig, dataset: Dataset, task: str, rules: str
) -> None:
    """Print what a run did, how much is correct so far, and a warning where nothing is random."""
    text = describe_progress(session)
    grade = tasks.make_grader(task, plan.template, rules)
    rows = [row for completions in dataset.data.values() for row in completions]
    correct = sum(grade(row["completion"], row["answer"]).correct for row in rows)
    if rows:
        share = 100 * correct / len(rows)
        text += f"; {share:.1f}% of {len(rows)} are correct so far ({rules} rules)"
    print(text)
    groups = [completions for completions in dataset.data.values() if len(completions) > 1]
    identical = sum(is_repetition(completions) for completions in groups)
    if identical and plan.temperature != 0:
        print(
            f"warning: all completions of {identical} of {len(groups)} questions are identical: "
            "does the server sample?  (transformers serve does only where the model's "
            "generation_config.json says do_sample: true)"
        )


def is_repetition(completions: list[Completion]) -> bool:
    texts = [row.get("reasoning_completion", row["completion"]) for row in completions]
    return len(set(texts)) == 1


# ---------------- Stage sample, of a teacher behind an API


def default_rules(api: str | None) -> str:
    """Return the answer rules: chat models write sentences that the paper's often misread."""
    if api == "chat":
        return "flexible"
    return "paper"


def with_settings(metadata: dict, plan: SamplingConfig, samples: Samples) -> dict:
    """Return metadata with the settings that its completion file is made with."""
    settings = plan._asdict()
    for name in ("family", "choices", "examples"):
        del settings[name]
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
    return sample_missing(api, plan, path, metadata, samples, rules)


def sample_missing(
    api: ApiConfig, plan: SamplingConfig, path: Path, metadata: dict, samples: Samples, rules: str
) -> Path:
    """Write a completion file from the journal and from what is asked for now.

    Raises UserError where some of it is missing in the end: the journal has what was answered.
    """
    session = ApiSession(api, path)
    asyncio.run(ask_for_missing(session, plan, samples))
    dataset = make_dataset(plan, samples, session.journal.rows)
    print_summary(session, plan, dataset, metadata["dataset_key"], rules)
    total = len(samples) * plan.degree
    found = f"{total - dataset.missing} of {total} completions are there"
    session.raise_stop_reason(f" ({found}, in {session.journal.path})")
    if dataset.missing:
        failed = f"{len(session.failed_keys)} requests failed ({session.failures.path} says why)"
        raise UserError(
            f"{dataset.missing} of {total} completions are missing, {failed}: start the same "
            "command again to ask for them, or continue without them from --stage curate"
        )
    return publish(path, metadata, dataset, samples)


def publish_partial(path: Path, metadata: dict, plan: SamplingConfig, samples: Samples) -> None:
    """Write the completion file of unfinished sampling from the journal; ask for nothing."""
    journal_path = path.with_suffix(".journal.jsonl")
    old = {"missing": True}
    if path.exists():
        old = read_completions(path, metadata["dataset_key"])[0].get("settings", {})
    is_partial = old.get("missing") or old.get("degree", plan.degree) < plan.degree
    if not is_partial or not journal_path.exists():
        return
    dataset = make_dataset(plan, samples, read_journal(journal_path))
    if not dataset.data:
        raise UserError(
            f"{journal_path} holds no completion that was asked for with these flags: use those of "
            "--stage sample"
        )
    publish(path, with_settings(metadata, plan, samples), dataset, samples)


def read_journal(path: Path) -> Rows:
    journal = open_journal(path)
    journal.close()
    return journal.rows
