"""One reply of a server, read: what it says, how it was thought out, why it ended, what it cost.

    parse_reply -> read_reply -> read_choice -> split_reasoning

Servers that speak OpenAI's language differ in every one of these (docs/api_teacher.md has a table).
Nothing here knows of requests, journals or money: the functions are pure.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import storage
from refusals import MAX_DEPTH, error_code, error_object, server_words


class Choice(NamedTuple):
    """One text of a reply."""

    text: str | None  # None: nothing was said
    reasoning: str | None  # what was thought before it; None: nothing is known of any
    finish_reason: str | None  # as the server named it, or "length" where reasoning has no end
    refusal: str | None = None


class Reply(NamedTuple):
    """What is usable of a reply."""

    choices: list[Choice]
    usage: dict[str, int] | None  # None: the server does not say
    model: str | None  # that answered


class InvalidReplyError(Exception):
    """A 200 without an answer: it may have cost money, and is worth another attempt.

    kind: what several such replies have in common; the text has more.  status: the HTTP status that
    an error inside the reply names.
    """

    def __init__(
        self,
        kind: str,
        detail: str = "",
        usage: dict[str, int] | None = None,
        status: int | None = None,
        code: str | None = None,
    ) -> None:
        text = kind
        if detail:
            text += f": {detail}"
        super().__init__(text)
        self.kind = kind
        self.usage = usage
        self.status = status
        self.code = code


# ---------------- Why a text ended

FINISH_REASONS = {  # what it means: the names that servers have for it
    "stop": """stop stopped eos eos_token end_turn stop_sequence stop_token end_of_text endoftext
        end finish finished complete completed done tool_calls tool_use function_call""",
    "length": """length max_tokens max_length max_output_tokens model_length token_limit incomplete
        context_length_exceeded model_context_window_exceeded""",
    "content_filter": """content_filter content_filtered content_policy refusal safety recitation
        sensitive blocklist prohibited_content spii guardrail_intervened""",
    "error": """error abort aborted cancelled canceled insufficient_system_resource network_error
        malformed_function_call""",
}
FINISH_KINDS = {name: kind for kind, names in FINISH_REASONS.items() for name in names.split()}


def finish_kind(reason: str | None) -> str:
    """Return stop, length, content_filter or error; unknown for a name that no row has.

    No name at all is an end: several servers leave it out.
    """
    if not reason:
        return "stop"
    name = reason.strip().lower().replace("-", "_")
    return FINISH_KINDS.get(name, "unknown")


def has_ended(reason: str | None) -> bool:
    """Tell whether a text came to its natural end, under whatever name."""
    kind = finish_kind(reason)
    return kind in ("stop", "unknown")


# ---------------- Reasoning inside a text

TAG_NAMES = "think|thinking|thought|reasoning|seed:think"
TAGS = re.compile(rf"""(?xi)
    (?P<opening> < (?:{TAG_NAMES}) > | \[THINK\] | \u25c1think\u25b7)  # <think>
  | (?P<closing> </ (?:{TAG_NAMES}) > | \[/THINK\] | \u25c1/think\u25b7)  # </think>
""")
CHANNELS = re.compile(r"""(?xs)  # of gpt-oss: <|channel|>analysis<|message|>Three.<|end|>
    <\|channel\|> (?P<name> \w+) [^<]* <\|message\|>
    (?P<text> .*?) (?= <\|(?:end|return|call|start|channel)\|> | \Z)
""")
BARE_CHANNELS = re.compile(r"""(?xs)  # the same where special tokens were left out
    \A analysis (?= [A-Z]) (?P<thought> .*?)  # analysisThree, so
    (?: assistantfinal (?P<said> .*) | \Z)  # assistantfinalThe answer is 3.
""")


def split_reasoning(content: str) -> tuple[str, str, bool]:
    """Return (text, reasoning, whether both are whole) of a text that may hold its reasoning.

    "<think>2 + 3</think>It is 5." -> ("It is 5.", "2 + 3", True).  Of a chat template that opens
    the block itself only the closing tag is there.
    """
    parts: dict[bool, list[str]] = {False: [], True: []}  # by whether it is reasoning
    if "<|channel|>" in content:
        for channel in CHANNELS.finditer(content):
            is_reasoning = channel["name"] != "final"
            parts[is_reasoning].append(channel["text"])
        is_whole = bool(parts[False])
    elif bare := BARE_CHANNELS.match(content):
        parts[True].append(bare["thought"])
        parts[False].append(bare["said"] or "")
        is_whole = bare["said"] is not None
    else:
        tags = []
        if any(mark in content for mark in "<[\u25c1"):
            tags = list(TAGS.finditer(content))
        if not tags:
            return content, "", True
        is_reasoning = tags[0].lastgroup == "closing"
        start = 0
        for tag in tags:
            between = content[start : tag.start()]
            parts[is_reasoning].append(between)
            is_reasoning = tag.lastgroup == "opening"
            start = tag.end()
        parts[is_reasoning].append(content[start:])
        is_whole = not is_reasoning
    text = "".join(parts[False])
    reasoning = "\n".join(parts[True])
    return text.strip(), reasoning.strip(), is_whole


# ---------------- One choice

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking", "reasoning_details")
THINKING_PARTS = ("thinking", "reasoning", "reasoning_text")


def joined_text(value: Any, depth: int = MAX_DEPTH) -> str:
    """Return the text of a string, a part, or a list of parts: [{"text": "a"}, "b"] -> "ab"."""
    if isinstance(value, str):
        return value
    if not depth:
        return ""
    if isinstance(value, list):
        texts = [joined_text(part, depth - 1) for part in value]
        return "".join(texts)
    if isinstance(value, dict):
        for name in ("text", "thinking", "content", "summary", "reasoning"):
            if value.get(name):
                return joined_text(value[name], depth - 1)
    return ""


def split_parts(content: Any) -> tuple[str | None, str, str]:
    """Return (text, reasoning, refusal) of a message's content: a string or a list of parts.

    Raises InvalidReplyError for anything else.
    """
    if content is None or isinstance(content, str):
        return content, "", ""
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        said = json.dumps(content)
        raise InvalidReplyError("a reply whose content is no text", said[:200])
    texts = {"text": "", "reasoning": "", "refusal": ""}
    for part in content:
        kind = "text"
        if isinstance(part, dict):
            kind = part.get("type", "text")
        if kind == "refusal":
            refusal = part.get("refusal") or ""
            texts["refusal"] += str(refusal)
        elif kind in THINKING_PARTS:
            texts["reasoning"] += joined_text(part)
        elif kind in ("text", "output_text"):
            texts["text"] += joined_text(part)
    return texts["text"], texts["reasoning"], texts["refusal"]


def read_choice(choice: Any, api: str) -> Choice | None:
    """Return a choice; None for what is none, such as one without a message.

    A filtered choice may lack its message (Azure): it is a choice that says nothing.
    """
    if not isinstance(choice, dict):
        return None
    reason = choice.get("finish_reason")
    if isinstance(reason, dict):
        reason = reason.get("type")
    if not isinstance(reason, str):
        reason = None
    message = choice.get("message")
    has_text = isinstance(choice.get("text"), str)
    if has_text and (api == "completions" or message is None):
        message = {"content": choice["text"]}
    if not isinstance(message, dict):
        if finish_kind(reason) == "content_filter":
            return Choice(None, None, reason)
        return None
    text, reasoning, refusal = split_parts(message.get("content"))
    reasoning = reasoning_field(message) + reasoning
    if text:
        text, thought, is_whole = split_reasoning(text)
        reasoning += thought
        if not is_whole:
            reason = "length"
        text = storage.replace_lone_surrogates(text)
    reasoning = storage.replace_lone_surrogates(reasoning.strip())
    if message.get("refusal"):
        refusal = str(message["refusal"])
    refusal = storage.replace_lone_surrogates(refusal)
    return Choice(text, reasoning or None, reason, refusal or None)


def reasoning_field(message: dict[str, Any]) -> str:
    """Return the reasoning of a message's own field for it: servers may fill two with the same."""
    for name in REASONING_FIELDS:
        text = joined_text(message.get(name))
        if text.strip():
            return text
    return ""


# ---------------- The whole reply


def parse_reply(content: bytes) -> Any:
    """Return the JSON value of a body, or of a stream of events that nobody asked for.

    Raises InvalidReplyError.
    """
    if content.lstrip()[:6].startswith((b"data:", b"event:", b":")):
        return join_events(content.decode("utf-8", "replace"))
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        said = content[:200].decode("utf-8", "replace")
        raise InvalidReplyError("a reply that is not JSON", repr(said)) from None


def read_events(text: str) -> Iterator[Any]:
    """Yield the JSON values of a stream of events."""
    for line in text.split("\n"):
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") and data != "[DONE]":
            try:
                yield json.loads(data)
            except (ValueError, RecursionError):
                raise InvalidReplyError("a stream with a line that is not JSON", data) from None


def join_events(text: str) -> dict[str, Any]:
    """Return a stream of events as the reply that it would have been without streaming.

    Raises InvalidReplyError for a stream that breaks off: a choice in it never ended.
    """
    reply: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for event in read_events(text):
        if not isinstance(event, dict):
            continue
        parts = as_list(event.pop("choices", None))
        reply |= {name: value for name, value in event.items() if value}
        for part in parts:
            if isinstance(part, dict):
                index = part.get("index") or 0
                choice = choices.setdefault(index, {"message": {}})
                add_delta(choice, part)
    found = list(choices.values())
    is_whole = all("finish_reason" in choice for choice in found)
    if not is_whole and "error" not in reply:
        usage = read_usage(reply.get("usage"))
        raise InvalidReplyError("a stream that breaks off", text[-200:], usage)
    return reply | {"choices": found}


def add_delta(choice: dict[str, Any], part: dict[str, Any]) -> None:
    """Add what an event of a stream says to the choice that it is about."""
    reason = part.get("finish_reason")
    if reason is not None:
        choice["finish_reason"] = reason
    text = part.get("text")  # of completions
    delta = part.get("delta") or {"content": text}
    if not isinstance(delta, dict):
        return
    message = choice["message"]
    for name in ("content", "refusal", *REASONING_FIELDS):
        said = joined_text(delta.get(name))
        if said:
            message[name] = message.get(name, "") + said


def as_list(value: Any) -> list[Any]:
    """Return a list; [] for what is none."""
    if isinstance(value, list):
        return value
    return []


def read_usage(usage: Any) -> dict[str, int] | None:
    """Return the tokens that a server counted and bills, or None where it does not say.

    completion_tokens includes the reasoning: some servers count that in total_tokens alone.
    """
    if not isinstance(usage, dict):
        return None
    prompt = usage.get("prompt_tokens", usage.get("input_tokens"))
    completion = usage.get("completion_tokens", usage.get("output_tokens"))
    if not (is_count(prompt) and is_count(completion)):
        return None
    total = usage.get("total_tokens")
    if is_count(total):
        completion = max(completion, total - prompt)
    counts = {"prompt_tokens": prompt, "completion_tokens": completion}
    details = usage.get("completion_tokens_details")
    thought = usage.get("reasoning_tokens")
    if isinstance(details, dict):
        thought = details.get("reasoning_tokens", thought)
    if is_count(thought) and thought > 0:
        counts["reasoning_tokens"] = thought
    return counts


def is_count(value: Any) -> bool:
    """Tell whether a value can be a number of tokens."""
    if type(value) is not int:
        return False
    return 0 <= value < 10**12


def read_reply(reply: Any, api: str, wanted: int = 1) -> Reply:
    """Return the choices of a reply in order, `wanted` of them at most, with its usage.

    Choices that end in an error are left out.  Raises InvalidReplyError where none is left.
    """
    if not isinstance(reply, dict):
        said = json.dumps(reply)
        raise InvalidReplyError("a reply that is no object", said[:200])
    usage = read_usage(reply.get("usage"))
    raise_error(reply.get("error"), usage)
    choices = []
    failed = []
    for raw in ordered_choices(reply, 4 * wanted + 64):  # a million would take long to read
        choice = read_choice(raw, api)
        if choice and finish_kind(choice.finish_reason) == "error":
            failed.append(raw)
        elif choice:
            choices.append(choice)
    if failed and not choices:
        error = failed[0].get("error") or "finish_reason error"
        raise_error(error, usage)
    if not choices:
        said = json.dumps(reply)
        raise InvalidReplyError("a reply without choices", said[:200], usage)
    model = reply.get("model")
    if not isinstance(model, str):
        return Reply(choices[:wanted], usage, None)
    model = storage.replace_lone_surrogates(model)
    return Reply(choices[:wanted], usage, model)


def ordered_choices(reply: dict[str, Any], most: int) -> list[Any]:
    """Return what a reply lists as choices, by their index where each has one of its own."""
    found = as_list(reply.get("choices"))[:most]
    by_index = {}
    for choice in found:
        index = None
        if isinstance(choice, dict):
            index = choice.get("index")
        if type(index) is int:
            by_index[index] = choice
    if len(by_index) < len(found):
        return found
    return [by_index[index] for index in sorted(by_index)]


def raise_error(error: Any, usage: dict[str, int] | None) -> None:
    """Raise InvalidReplyError for an error inside a reply; return where there is none."""
    if not error:
        return
    parts = error_object(error)
    code = parts.get("code")
    status = None
    kind = "an error inside a reply"
    if re.fullmatch("[45][0-9][0-9]", str(code)):
        status = int(code)
        kind += f" ({status})"
    raise InvalidReplyError(kind, server_words(error), usage, status, error_code(parts))
