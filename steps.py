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
    temperature = plan.temperature
    if temperature is not None:
        if step == 2:
            temperature = 0.0  # the answer is read off greedily
        parameters["temperature"] = temperature
    stops = stop_strings(plan)
    if stops and plan.api == "completions" and step == 1:
        parameters["stop"] = stops
    if plan.parameters:
        parameters |= json.loads(plan.parameters)
    asked: list[Any] = [plan.api, parameters]
    also = [plan.system, plan.extra_headers]
    if any(also):  # else keys are those of earlier versions
        asked += also
    as_json = json.dumps(asked, sort_keys=True)
    return parameters, as_json


def request_body(plan: SamplingConfig, step: int, texts: list[str]) -> dict[str, Any]:
    """Return the body of a request for one choice."""
    parameters, _ = request_parameters(plan, step)
    if plan.api == "completions":
        return parameters | {"prompt": texts[0]}
    messages = []
    if plan.system:
        instruction = {"role": "system", "content": plan.system}
        messages.append(instruction)
    roles = ("user", "assistant", "user")
    for role, text in zip(roles, texts, strict=False):
        turn = {"role": role, "content": text}
        messages.append(turn)
    return parameters | {"messages": messages}


def completion_key(plan: SamplingConfig, step: int, texts: list[str], which: str) -> str:
    """Return 20 hex digits of all that is asked; which: "SAMPLE COMPLETION"."""
    _, parameters = request_parameters(plan, step)
    which_step = f"{which} {step}"
    asked = "\0".join([parameters, *texts, which_step])
    content = asked.encode("utf-8", "replace")
    digest = hashlib.sha256(content)
    return digest.hexdigest()[:20]


def answer_texts(plan: SamplingConfig, prompt: str, rationale: str) -> list[str]:
    """Return the texts of Zero-shot-CoT's second step (paper §3): turns, or one prompt."""
    trigger = tasks.ANSWER_TRIGGER
    if plan.api == "chat":
        return [prompt, rationale, trigger.strip()]
    return [prompt + rationale + trigger]


def needs_answer_step(plan: SamplingConfig, row: JournalRow) -> bool:
    """Whether a rationale has an answer to ask for: not if it was cut, filtered or refused.

    A reasoning model would think again for it, so what it has stated already is not asked for.
    """
    text = row["completion"] or ""
    is_whole = replies.has_ended(row["finish_reason"])
    if not is_whole or not text.strip():
        return False
    return not stated_answer(plan, row)


def stated_answer(plan: SamplingConfig, row: JournalRow) -> str:
    """Return the end of a reasoning model's text from the answer on that it announces, or "".

    "So it is 4 + 3. The answer is 7." -> " 7."  The flexible rules must find it in that sentence.
    """
    if "reasoning" not in row or not plan.task:
        return ""
    text = row["completion"] or ""
    stated = after_announcement(text[-MAX_SCAN_CHARS:])
    sentences = SENTENCE_END.split(stated.lstrip(), maxsplit=1)
    task = tasks.find_task(plan.task)
    rules = task.answer_type.flexible
    if rules.candidates(sentences[0]):
        return stated
    return ""


@functools.lru_cache
def first_prompt(plan: SamplingConfig, question: str) -> str:
    """Return the prompt of step 1; the completions of a sample share it."""
    sample = {"sample_index": 0, "question": question, "answer": ""}
    return format_prompt(plan, sample)


def list_steps(
    plan: SamplingConfig, rows: Rows, sample: tasks.Sample, k: int
) -> list[tuple[str, list[str]]]:
    """Return (key, texts) of the steps of completion k: of step 2 once rows hold its rationale."""
    which = f"{sample['sample_index']} {k}"
    prompt = first_prompt(plan, sample["question"])
    key = completion_key(plan, 1, [prompt], which)
    steps = [(key, [prompt])]
    first = rows.get(key)
    if first is None or plan.template != "zs_cot":
        return steps
    if needs_answer_step(plan, first):
        texts = answer_texts(plan, prompt, first["completion"])
        key = completion_key(plan, 2, texts, which)
        steps.append((key, texts))
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
            body = request_body(plan, 2, texts)
            request = Request(index, 2, {k: key}, body)
            second_steps.append(request)
    if not first_keys:
        return second_steps
    prompt = format_prompt(plan, sample)
    body = request_body(plan, 1, [prompt])
    if len(first_keys) > 1:
        body["n"] = len(first_keys)
    request = Request(index, 1, first_keys, body)
    return [request]


def list_units(plan: SamplingConfig, samples: Samples) -> Iterator[Unit]:
    for sample in samples:
        ks = range(plan.degree)
        for start in ks[:: plan.choices]:
            end = start + plan.choices
            yield sample, ks[start:end]


def token_upper_bound(body: dict[str, Any]) -> tuple[int, int]:
    """Return the most (prompt, completion) tokens of a request: one a byte, and 16 more a turn."""
    turns = body.get("messages")
    if turns is None:
        turns = [{"content": body["prompt"]}]
    prompt_tokens = 0
    for turn in turns:
        text = turn["content"]
        prompt_tokens += len(text.encode()) + 16
    limit = body.get("max_completion_tokens") or body["max_tokens"]
    choices = body.get("n", 1)
    return prompt_tokens, limit * choices
