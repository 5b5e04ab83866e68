"""Replies of the servers of 2024 to 2026, one row of a table each.

    python -m pytest tests/test_replies.py

What a reply becomes in the journal, in the completion file and in curation, and what it costs.
The source of a shape is the page, or the issue, that shows it; "not checked" stands where none was
found again, "a neighbour" where a shape is one that nobody documents, one step from those that are.
"""

import json
from typing import Any, NamedTuple

import pytest

import curation
import refusals
import replies
import steps
import teacher
from api import ApiConfig
from completions import SamplingConfig

PRICES = ApiConfig(price_in=1000, price_out=10_000)  # $1 a 1,000 prompt tokens, $10 completion's
TEXT = "It turns. The answer is yes."
PLAN = SamplingConfig("m", "chat", "zs_cot_one_step", "chat", 128, task="toy")
SAMPLE = {"sample_index": 3, "question": "q?", "answer": "yes"}


class Shape(NamedTuple):
    """A reply that is read: what becomes of it."""

    name: str
    source: str
    body: Any  # JSON, or bytes
    text: str | None = TEXT  # in the journal
    reasoning: str | None = None  # in the journal and the completion file
    end: str = "stop"  # finish_reason in the completion file
    kept: bool = True  # by curation
    tokens: tuple[int, int] | None = (10, 5)  # that are paid for; None: the server does not say


def chat(
    content: Any = TEXT, reason: Any = "stop", usage: Any = ..., **message: Any
) -> dict[str, Any]:
    """Return a reply of OpenAI's form; ... is what is usual, None for usage leaves it out."""
    if usage is ...:
        usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    said = {"role": "assistant", "content": content, **message}
    choice = {"index": 0, "finish_reason": reason, "message": said}
    body = {"id": "x", "object": "chat.completion", "model": "m-1", "choices": [choice]}
    if usage is not None:
        body["usage"] = usage
    return body


def with_details(prompt: int, completion: int, thought: int, total: int) -> dict[str, Any]:
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}
    return usage | {"completion_tokens_details": {"reasoning_tokens": thought}}


def events(*deltas: dict, reason: str | None = "stop", done: bool = True) -> bytes:
    """Return a stream of events, the last of which says why the text ended."""
    choices = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    if reason:
        choices.append({"index": 0, "delta": {}, "finish_reason": reason})
    lines = [json.dumps({"model": "m-1", "choices": [choice]}) for choice in choices]
    usage = {"prompt_tokens": 10, "completion_tokens": 5}
    lines.append(json.dumps({"choices": [], "usage": usage}))
    if done:
        lines.append("[DONE]")
    return "".join(f"data: {line}\n\n" for line in lines).encode()


OPENAI = "OpenAI API reference, chat.completion object, 2026"
ANTHROPIC = "platform.claude.com, OpenAI SDK compatibility, 2026"
GEMINI = "Vertex AI reference, FinishReason; any-llm issue 1290 (usage)"
VLLM_07 = "docs.vllm.ai v0.7.3, reasoning outputs"
VLLM_11 = "docs.vllm.ai v0.11.2, reasoning outputs"
OPENROUTER = "openrouter.ai, errors and debugging; reasoning tokens, 2026"
MISTRAL = "docs.mistral.ai, reasoning; spring-ai pull request 5020 (magistral-medium-2509)"
HARMONY = "OpenAI cookbook, harmony response format, 2025-08"
QWEN = "model card of Qwen3-8B: enable_thinking"
OLLAMA = "ollama issue 15288: reasoning in /v1"
SEEN = "seen on loopback: docs/api_teacher.md"

R1_TEMPLATE = "model card of DeepSeek-R1-0528: the template opens the block"
THINKING = [{"type": "thinking", "thinking": [{"type": "text", "text": "Flip."}]}]
HARMONY_TEXT = "<|channel|>analysis<|message|>Flip.<|end|><|start|>assistant"
HARMONY_TEXT += "<|channel|>final<|message|>" + TEXT + "<|return|>"

LLAMA_CHOICE = {
    "index": 0,
    "message": {"content": f" Flip.</think> {TEXT}", "role": "assistant"},
    "logprobs": None,
    "finish_reason": "stop",
}
SHAPES = [
    # ends, under all their names
    Shape("plain", OPENAI, chat()),
    Shape(
        "cut", OPENAI, chat("It turns. The", "length"), "It turns. The", end="length", kept=False
    ),
    Shape("filtered", OPENAI, chat(TEXT, "content_filter"), end="content_filter", kept=False),
    Shape("eos", "openai-dotnet pull request 267: Together", chat(reason="eos")),
    Shape("eos_token", "text-generation-inference pull request 2344", chat(reason="eos_token")),
    Shape(
        "stop_sequence",
        "text-generation-inference 2.0 API, not checked again",
        chat(reason="stop_sequence"),
    ),
    Shape("end_turn", ANTHROPIC, chat(reason="end_turn")),
    Shape("max_tokens", ANTHROPIC, chat(reason="max_tokens"), end="length", kept=False),
    Shape(
        "refusal as a reason", ANTHROPIC, chat(reason="refusal"), end="content_filter", kept=False
    ),
    Shape("STOP", GEMINI, chat(reason="STOP")),
    Shape("MAX_TOKENS", GEMINI, chat(reason="MAX_TOKENS"), end="length", kept=False),
    Shape("SAFETY", GEMINI, chat(reason="SAFETY"), end="content_filter", kept=False),
    Shape("null", "of a complete reply not checked; every chunk of a stream", chat(reason=None)),
    Shape("empty", "a neighbour", chat(reason="")),
    Shape(
        "reason as an object",
        "SGLang 0.4, meta_info, not checked again",
        chat(reason={"type": "stop"}),
    ),
    Shape("reason as a number", "a neighbour", chat(reason=1)),
    Shape("unknown", "a neighbour", chat(reason="weird")),
    Shape("tool_calls", OPENAI, chat(reason="tool_calls")),
    Shape(
        "model_length",
        "Mistral's OpenAPI document 1.0.0: FinishReason",
        chat(reason="model_length"),
        end="length",
        kept=False,
    ),
    Shape(
        "sensitive",
        "docs.z.ai, chat completion",
        chat(reason="sensitive"),
        end="content_filter",
        kept=False,
    ),
    # content
    Shape("null content", OPENAI, chat(None), None, kept=False),
    Shape("empty content", OPENAI, chat(""), "", kept=False),
    Shape("refusal", OPENAI, chat(None, refusal="I cannot"), None, kept=False),
    Shape(
        "text parts",
        OPENAI,
        chat(
            [{"type": "text", "text": "It turns. "}, {"type": "text", "text": "The answer is yes."}]
        ),
    ),
    Shape("strings as parts", "a neighbour", chat(["It turns. ", "The answer is yes."])),
    Shape("one part", "a neighbour", chat({"type": "text", "text": TEXT})),
    Shape(
        "thinking parts",
        MISTRAL,
        chat([*THINKING, {"type": "text", "text": TEXT}]),
        reasoning="Flip.",
    ),
    Shape("only thinking", MISTRAL, chat(THINKING, "length"), "", "Flip.", "length", kept=False),
    Shape(
        "thinking as a string",
        "Anthropic Messages by proxies",
        chat([{"type": "thinking", "thinking": "Flip."}, {"type": "text", "text": TEXT}]),
        reasoning="Flip.",
    ),
    Shape(
        "reference part",
        "docs.mistral.ai, citations",
        chat([{"type": "text", "text": TEXT}, {"type": "reference", "reference_ids": [1]}]),
    ),
    Shape("refusal part", OPENAI, chat([{"type": "refusal", "refusal": "No"}]), "", kept=False),
    Shape(
        "filtered without message",
        "learn.microsoft.com, Azure OpenAI content filter",
        {
            "choices": [
                {"index": 0, "finish_reason": "content_filter", "content_filter_results": {}}
            ],
            "usage": {"prompt_tokens": 10, "completion_tokens": 0},
        },
        None,
        end="content_filter",
        kept=False,
        tokens=(10, 0),
    ),
    Shape(
        "filter results beside",
        "learn.microsoft.com, Azure OpenAI content filter",
        chat() | {"prompt_filter_results": [{"prompt_index": 0}]},
    ),
    Shape(
        "lone surrogate",
        "a neighbour",
        chat("It\ud800 turns. The answer is yes."),
        "It? turns. The answer is yes.",
    ),
    # reasoning
    Shape(
        "reasoning_content",
        "api-docs.deepseek.com, deepseek-reasoner",
        chat(reasoning_content="Flip."),
        reasoning="Flip.",
    ),
    Shape(
        "reasoning_content, older vLLM",
        VLLM_07,
        chat(reasoning_content="Flip.", tool_calls=[]),
        reasoning="Flip.",
    ),
    Shape("reasoning", VLLM_11, chat(reasoning="Flip."), reasoning="Flip."),
    Shape(
        "reasoning twice",
        VLLM_11,
        chat(reasoning="Flip.", reasoning_content="Flip."),
        reasoning="Flip.",
    ),
    Shape("reasoning null", VLLM_11, chat(reasoning=None, reasoning_content=None)),
    Shape(
        "cut while thinking",
        VLLM_11,
        chat(None, "length", reasoning="Fli"),
        None,
        "Fli",
        "length",
        kept=False,
    ),
    Shape(
        "reasoning alone",
        "vLLM: no closing tag found",
        chat("", reasoning="Flip."),
        "",
        "Flip.",
        kept=False,
    ),
    Shape(
        "reasoning and details",
        OPENROUTER,
        chat(reasoning="Flip.", reasoning_details=[{"type": "reasoning.text", "text": "Flip."}]),
        reasoning="Flip.",
    ),
    Shape(
        "details alone",
        OPENROUTER,
        chat(reasoning_details=[{"type": "reasoning.summary", "summary": "Flip."}]),
        reasoning="Flip.",
    ),
    Shape(
        "thinking", "Ollama's own /api/chat, by proxies", chat(thinking="Flip."), reasoning="Flip."
    ),
    Shape(
        "LiteLLM",
        "docs.litellm.ai, reasoning content",
        chat(
            reasoning_content="Flip.", thinking_blocks=[{"type": "thinking", "thinking": "Flip."}]
        ),
        reasoning="Flip.",
    ),
    Shape(
        "llama.cpp",
        "llama.cpp tools/server README: reasoning_format",
        chat(reasoning_content="Flip.") | {"timings": {"prompt_n": 10}},
        reasoning="Flip.",
    ),
    Shape(
        "hidden reasoning",
        OPENAI,
        chat(usage=with_details(10, 65, 60, 75)),
        reasoning="",
        tokens=(10, 65),
    ),
    Shape(
        "hidden, cut",
        OPENAI,
        chat("", "length", usage=with_details(10, 128, 128, 138)),
        "",
        "",
        "length",
        kept=False,
        tokens=(10, 128),
    ),
    Shape("think tags", QWEN, chat(f"<think>\nFlip.\n</think>\n\n{TEXT}"), reasoning="Flip."),
    Shape("no thinking", QWEN, chat(f"<think>\n\n</think>\n\n{TEXT}")),
    Shape(
        "closing tag alone, llama-cpp-python",
        "seen: llama-cpp-python 0.3.36, a template that opens the block",
        chat() | {"choices": [LLAMA_CHOICE]},
        reasoning="Flip.",
    ),
    Shape("closing tag alone", R1_TEMPLATE, chat(f"Flip.\n</think>\n{TEXT}"), reasoning="Flip."),
    Shape("unclosed tag", QWEN, chat("<think>Flip. Then"), "", "Flip. Then", "length", kept=False),
    Shape(
        "two blocks",
        "a neighbour",
        chat("<think>Flip.</think>It turns.<think> Yes.</think> The answer is yes."),
        reasoning="Flip.\n Yes.",
    ),
    Shape(
        "other tags",
        "model card of Seed-OSS",
        chat(f"<seed:think>Flip.</seed:think>{TEXT}"),
        reasoning="Flip.",
    ),
    Shape(
        "bracketed tags",
        "model card of Magistral-Small-2509",
        chat(f"[THINK]Flip.[/THINK]{TEXT}"),
        reasoning="Flip.",
    ),
    Shape(
        "Kimi's tags",
        "model card of Kimi-VL-A3B-Thinking",
        chat(f"\u25c1think\u25b7Flip.\u25c1/think\u25b7{TEXT}"),
        reasoning="Flip.",
    ),
    Shape("harmony", HARMONY, chat(HARMONY_TEXT), reasoning="Flip."),
    Shape(
        "harmony, cut", HARMONY, chat(HARMONY_TEXT[:34], "stop"), "", "Flip", "length", kept=False
    ),
    Shape(
        "harmony, tokens left out",
        "seen by clients as analysis...assistantfinal...; the server is not checked",
        chat(f"analysisFlip.assistantfinal{TEXT}"),
        reasoning="Flip.",
    ),
    Shape(
        "gpt-oss, parsed",
        "vLLM recipes, gpt-oss",
        chat(reasoning="Flip.", usage=with_details(10, 5, 3, 15)),
        reasoning="Flip.",
    ),
    # usage
    Shape(
        "thought tokens apart",
        GEMINI,
        chat(usage=with_details(21, 0, 60, 81)),
        reasoning="",
        tokens=(21, 60),
    ),
    Shape(
        "thought tokens in total alone",
        "any-llm issue 1290, not checked again",
        chat(usage={"prompt_tokens": 20, "completion_tokens": 198, "total_tokens": 623}),
        tokens=(20, 603),
    ),
    Shape(
        "Anthropic's names",
        "Messages API by proxies",
        chat(usage={"input_tokens": 10, "output_tokens": 5}),
    ),
    Shape(
        "reasoning tokens at the top",
        "@ai-sdk/perplexity 3.0.19, convert-perplexity-usage",
        chat(usage={"prompt_tokens": 10, "completion_tokens": 5, "reasoning_tokens": 3}),
        reasoning="",
    ),
    Shape(
        "cached tokens",
        "api-docs.deepseek.com, usage",
        chat(usage={"prompt_tokens": 10, "completion_tokens": 5, "prompt_cache_hit_tokens": 8}),
    ),
    Shape("no usage", "transformers serve before 5.0", chat(usage=None), tokens=None),
    Shape(
        "usage of floats",
        "a neighbour",
        chat(usage={"prompt_tokens": 1.5, "completion_tokens": 5}),
        tokens=None,
    ),
    Shape(
        "absurd usage",
        "a neighbour",
        chat(usage={"prompt_tokens": 10**400, "completion_tokens": 5}),
        tokens=None,
    ),
    Shape(
        "negative usage",
        "a neighbour",
        chat(usage={"prompt_tokens": -1, "completion_tokens": 5}),
        tokens=None,
    ),
    # whole replies
    Shape("transformers serve", SEEN, chat() | {"system_fingerprint": ""}),
    Shape(
        "choice with text",
        "llama-cpp-python, completions",
        {
            "choices": [{"text": TEXT, "index": 0, "logprobs": None, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 5},
        },
    ),
    Shape(
        "no index",
        "a neighbour",
        {
            "choices": [{"message": {"content": TEXT}}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 5},
        },
    ),
    Shape(
        "event stream",
        "gateways that always stream",
        events({"role": "assistant", "content": "It turns. "}, {"content": "The answer is yes."}),
    ),
    Shape(
        "event stream with reasoning",
        VLLM_11,
        events({"reasoning": "Flip."}, {"content": TEXT}),
        reasoning="Flip.",
    ),
    Shape(
        "event stream, cut",
        OPENAI,
        events({"content": "It turns. The"}, reason="length"),
        "It turns. The",
        end="length",
        kept=False,
    ),
    Shape(
        "an error beside an answer",
        "a neighbour",
        chat()
        | {
            "choices": [
                chat()["choices"][0],
                {"index": 1, "finish_reason": "error", "message": {"content": "x"}},
            ]
        },
    ),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_read_reply_shape(shape):
    """A reply is what its row says, in the journal, the completion file, curation and money."""
    content = shape.body
    if not isinstance(content, bytes):
        content = json.dumps(content).encode()
    request = steps.Request(3, 1, {0: "key"}, {})
    reply = replies.read_reply(replies.parse_reply(content), "chat")
    [row] = teacher.journal_rows(reply, request)
    assert row["completion"] == shape.text
    assert row.get("reasoning") == shape.reasoning
    dollars = None
    if row["usage"]:
        dollars = round(PRICES.dollars(**row["usage"]), 6)
    expected = None
    if shape.tokens:
        expected = round(shape.tokens[0] / 1000 + shape.tokens[1] / 100, 6)
    assert dollars == expected
    made = teacher.make_completion(PLAN, SAMPLE, 0, [row])
    assert made["completion"] == (shape.text or "")
    assert made.get("reasoning", "") == (shape.reasoning or "")
    assert made["finish_reason"] == shape.end
    assert curation.has_rationale(made) == shape.kept


class Fault(NamedTuple):
    """A reply that cannot be used."""

    name: str
    source: str
    body: Any
    kind: str  # begins so
    tokens: tuple[int, int] | None = None  # that its usage says
    status: int | None = None


USAGE = {"usage": {"prompt_tokens": 10, "completion_tokens": 5}}
BROKEN = {"index": 0, "finish_reason": "error", "message": {"content": "It"}}
FAULTS = [
    Fault("half JSON", "a cut connection", b'{"choices": [', "a reply that is not JSON"),
    Fault("empty", "a proxy", b"", "a reply that is not JSON"),
    Fault("HTML", "a proxy", b"<html>busy</html>", "a reply that is not JSON"),
    Fault("not UTF-8", "a neighbour", b'"\xff', "a reply that is not JSON"),
    Fault("deep", "a neighbour", b"[" * 100_000, "a reply that is not JSON"),
    Fault("list", "a neighbour", [], "a reply that is no object"),
    Fault("string", "a neighbour", "hello", "a reply that is no object"),
    Fault("choices empty", OPENAI, {"choices": [], **USAGE}, "a reply without choices", (10, 5)),
    Fault("choices null", OPENROUTER, {"choices": None}, "a reply without choices"),
    Fault("choices missing", "a neighbour", {"id": "x"}, "a reply without choices"),
    Fault("no message", "a neighbour", {"choices": [{"index": 0}]}, "a reply without choices"),
    Fault("content is a number", "a neighbour", chat(7), "a reply whose content is no text"),
    Fault(
        "finish_reason error",
        OPENROUTER,
        {"choices": [BROKEN], **USAGE},
        "an error inside",
        (10, 5),
    ),
    Fault(
        "error in the choice",
        OPENROUTER,
        {"choices": [BROKEN | {"error": {"code": 502, "message": "x"}}]},
        "an error inside a reply (502)",
        status=502,
    ),
    Fault(
        "error 429",
        OPENROUTER,
        {"error": {"code": 429, "message": "slow"}},
        "an error inside a reply (429)",
        status=429,
    ),
    Fault(
        "error 429 as text",
        "a neighbour",
        {"error": {"code": "429", "message": "slow"}},
        "an error inside a reply (429)",
        status=429,
    ),
    Fault(
        "a flagged question",
        OPENROUTER,
        {
            "error": {
                "code": 403,
                "message": "x",
                "metadata": {"reasons": ["y"], "flagged_input": "q"},
            }
        },
        "an error inside a reply (403)",
        status=403,
    ),
    Fault("error as text", "Ollama", {"error": "model not found"}, "an error inside a reply"),
    Fault(
        "insufficient_system_resource",
        "api-docs.deepseek.com, finish_reason",
        chat(reason="insufficient_system_resource"),
        "an error inside",
        (10, 5),
    ),
    Fault(
        "network_error",
        "docs.z.ai, chat completion",
        chat(reason="network_error"),
        "an error inside",
        (10, 5),
    ),
    Fault(
        "broken stream",
        VLLM_11,
        events({"content": "It"}, reason=None, done=False),
        "a stream that breaks off",
        (10, 5),
    ),
    Fault(
        "stream with half a line", "a neighbour", b'data: {"choices": [\n\n', "a stream with a line"
    ),
    Fault(
        "error in a stream",
        OPENROUTER,
        b'data: {"error": {"code": 502, "message": "x"}}\n\n',
        "an error inside a reply (502)",
        status=502,
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_read_reply_fault(fault):
    """What cannot be used is named, with what its usage says that it cost."""
    content = fault.body
    if not isinstance(content, bytes):
        content = json.dumps(content).encode()
    with pytest.raises(replies.InvalidReplyError) as caught:
        replies.read_reply(replies.parse_reply(content), "chat")
    error = caught.value
    assert error.kind.startswith(fault.kind)
    assert error.status == fault.status
    tokens = None
    if error.usage:
        tokens = tuple(error.usage.values())
    assert tokens == fault.tokens


# ---- several choices

INDICES = [  # indices in the reply, how many are wanted, texts in the order of the journal
    ([0, 1, 2], 3, ["a0", "b1", "c2"]),
    ([2, 0, 1], 3, ["b0", "c1", "a2"]),
    ([0, 0, 0], 3, ["a0", "b0", "c0"]),
    ([None, None], 3, ["aNone", "bNone"]),
    ([9, 0, 1], 2, ["b0", "c1"]),
]


@pytest.mark.parametrize("indices, wanted, texts", INDICES)
def test_read_reply_indices(indices, wanted, texts):
    """Choices are in the order of their indices; where these are all the same, as they came."""
    choices = [
        {"index": index, "message": {"content": f"{letter}{index}"}}
        for letter, index in zip("abc", indices, strict=False)
    ]
    reply = replies.read_reply({"choices": choices}, "chat", wanted)
    assert [choice.text for choice in reply.choices] == texts


def test_read_reply_million_choices(monkeypatch):
    """Of a million choices a few are looked at."""
    seen = []
    read_choice = replies.read_choice

    def count(choice: Any, api: str) -> replies.Choice | None:
        seen.append(choice)
        return read_choice(choice, api)

    monkeypatch.setattr(replies, "read_choice", count)
    choices = [{"message": {"content": "a"}}] * 1_000_000
    assert len(replies.read_reply({"choices": choices}, "chat", 2).choices) == 2
    assert len(seen) < 100


# ---- what servers say

WORDS = [
    (  # llama-cpp-python 0.3.36, of a prompt that is no list
        {"error": {"message": "1 validation error", "type": "internal_server_error", "code": None}},
        "1 validation error",
    ),
    ({"error": {"message": "no model", "code": 404}}, "no model"),
    (
        {"error": "model 'x' not found, try pulling it first"},
        "model 'x' not found, try pulling it first",
    ),
    ({"detail": [{"loc": ["body", "n"], "msg": "too large"}]}, "body.n: too large"),
    ({"detail": "Not Found"}, "Not Found"),
    ({"message": "bad", "object": "error"}, "bad"),
    ([{"error": {"message": "quota", "status": "X"}}], "quota"),
    ({"error": {"error": {"message": "inner"}}}, "inner"),
    ({"errors": [{"message": "a"}, {"message": "b"}]}, "a; b"),
    ({"x": 1}, ""),
    (None, ""),
]


@pytest.mark.parametrize("body, words", WORDS)
def test_server_words(body, words):
    """The sentence in the body of an error is found, whatever its form."""
    assert refusals.server_words(body) == words


def test_printable_escapes():
    """What a terminal would take for an order is shown; letters of any alphabet stay."""
    assert refusals.printable("a\x1b[31m\r\nb\u202e\u00e9") == r"a\x1b[31m b\u202eé"
