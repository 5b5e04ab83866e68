"""Completion datasets: made by any model.   python -m pytest tests/test_completions.py"""

import copy

import pytest

import completions
import tasks
from completions import SamplingConfig
from storage import UserError


def sampling(method: str, **changes: object) -> SamplingConfig:
    """Return how a local decoder is asked."""
    plan = SamplingConfig("m", "", method, "decoder", max_new_tokens=128)
    return plan._replace(**changes)


def test_make_completions_zero_shot_cot():
    """Zero-shot-CoT asks twice and keeps both answers."""
    asked = []

    def complete(prompts, max_new_tokens, temperature, n, stop):
        asked.append(prompts)
        text = " r{}" if len(asked) == 1 else " 7."
        rows = [{"completion": text.format(k), "finish_reason": "stop"} for k in range(n)]
        return [copy.deepcopy(rows) for _ in prompts]

    samples = [{"sample_index": 3, "question": "q", "answer": "7"}]
    data = completions.make_completions(complete, samples, sampling("zs_cot", degree=2))
    step_1 = "Q: q\nA: Let's think step by step."
    step_2 = [f"{step_1} r{k}\nTherefore, the answer is" for k in (0, 1)]
    assert asked == [[step_1], step_2]
    for k, row in enumerate(data["3"]):
        assert row["completion_index"] == k
        assert row["reasoning_prompt"] == step_1
        assert row["reasoning_completion"] == f" r{k}"
        assert row["reasoning_finish_reason"] == "stop"
        assert row["prompt"] == step_2[k]
        assert row["completion"] == " 7."


def test_make_completions_few_shot_stops_at_the_next_question():
    """A base model that writes a next question is stopped there."""
    stops = []

    def complete(prompts, max_new_tokens, temperature, n, stop):
        stops.append(stop)
        return [[{"completion": "r", "finish_reason": "stop"}] for _ in prompts]

    samples = [{"sample_index": 0, "question": "q", "answer": "7"}]
    for method in ("fs_cot", "zs"):
        completions.make_completions(complete, samples, sampling(method, examples="Q: e"))
    assert stops == [["\nQ:"], None]


def test_few_shot_prompt_missing(tmp_path):
    """A task without a few-shot prompt says how to make it."""
    with pytest.raises(UserError, match="has no few-shot prompt for svamp: make it with"):
        completions.few_shot_prompt("svamp", tmp_path)


def test_few_shot_prompt_toy(tmp_path):
    """The toy's examples are built in."""
    assert completions.few_shot_prompt("toy", tmp_path) == tasks.TOY_EXAMPLES
