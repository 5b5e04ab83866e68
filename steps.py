"""The steps of a completion: what is asked of a teacher in each, and under which key.

    list_units -> next_requests -> list_steps -> (Request)

One step, or two of Zero-shot-CoT: the rationale, then the answer after it (paper §3, step 1).
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import replies
import tasks
from answers import MAX_SCAN_CHARS
from api import JournalRow, Rows
from completions import SamplingConfig, format_prompt
from selection import SENTENCE_END, after_announcement

ENDPOINTS = {"chat": "/chat/completions", "completions": "/completions"}
Samples = list[tasks.Sample]
Unit = tuple[tasks.Sample, range]  # completion indices of a sample that one request may ask for


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
    if plan.parameters:
        parameters |= json.loads(plan.parameters)
    asked: list[Any] = [plan.api, parameters]
    if plan.system or plan.extra_headers:  # else keys are those of earlier versions
        asked += [plan.system, plan.extra_headers]
    return parameters, json.dumps(asked, sort_keys=True)


def request_body(plan: SamplingConfig, step: int, texts: list[str]) -> dict[str, Any]:
    """Return the body of a request for one choice."""
    body = dict(request_parameters(plan, step)[0])
    if plan.api == "completions":
        body["prompt"] = texts[0]
    else:
        turns = zip(("user", "assistant", "user"), texts, strict=False)
        messages = [{"role": role, "content": text} for role, text in turns]
        if plan.system:
            messages.insert(0, {"role": "system", "content": plan.system})
        body["messages"] = messages
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


def needs_answer_step(plan: SamplingConfig, row: JournalRow) -> bool:
    """Whether a rationale has an answer to ask for: not if it was cut, filtered or refused.

    A reasoning model would think again for it, so what it has stated already is not asked for.
    """
    is_whole = replies.has_ended(row["finish_reason"]) and bool((row["completion"] or "").strip())
    return is_whole and not stated_answer(plan, row)


def stated_answer(plan: SamplingConfig, row: JournalRow) -> str:
    """Return the end of a reasoning model's text from the answer on that it announces, or "".

    "So it is 4 + 3. The answer is 7." -> " 7."  The flexible rules must find it in that sentence.
    """
    if "reasoning" not in row or not plan.task:
        return ""
    stated = after_announcement((row["completion"] or "")[-MAX_SCAN_CHARS:])
    sentence = SENTENCE_END.split(stated.lstrip(), maxsplit=1)[0]
    if tasks.find_task(plan.task).answer_type.flexible.candidates(sentence):
        return stated
    return ""


@functools.lru_cache
def first_prompt(plan: SamplingConfig, question: str) -> str:
    """Return the prompt of step 1; the completions of a sample share it."""
    return format_prompt(plan, {"sample_index": 0, "question": question, "answer": ""})


def list_steps(
    plan: SamplingConfig, rows: Rows, sample: tasks.Sample, k: int
) -> list[tuple[str, list[str]]]:
    """Return (key, texts) of the steps of completion k: of step 2 once rows hold its rationale."""
    index = sample["sample_index"]
    texts = [first_prompt(plan, sample["question"])]
    steps = [(completion_key(plan, 1, texts, index, k), texts)]
    first = rows.get(steps[0][0])
    if plan.template == "zs_cot" and first and needs_answer_step(plan, first):
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
