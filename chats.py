"""Conversations with a local chat model: its tokenizer's template around each prompt.

    chat_config -> in_template -> format_chat

A server does this for its own models; a base model, and a student that is fine-tuned here, reads
the paper's plain prompts instead.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import replies
import servers
import storage
from storage import UserError
from tasks import FINE_TUNED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

Turns = list[str]  # user's, assistant's, user's, ...
Completion = dict[str, Any]
Completions = list[list[Completion]]  # of each prompt


class ChatConfig(NamedTuple):
    """How prompts become conversations."""

    name: str  # folder or hub name of the tokenizer
    system: str = ""
    thinking: bool | None = None  # None: as the template has it


def has_chat_template(name: str) -> bool:
    """Tell whether the tokenizer of a folder or hub name has a chat template."""
    folder = Path(name)
    if folder.is_dir():
        if (folder / "chat_template.jinja").exists():
            return True
        config = folder / "tokenizer_config.json"
        return config.exists() and bool(storage.read_json(config).get("chat_template"))
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, *storage.UNREADABLE):
        return False  # load_model says what is wrong with it
    return bool(tokenizer.chat_template)


def chat_config(
    stage: str, name: str, method: str, wanted: bool | None, thinking: bool | None, system: str
) -> ChatConfig | None:
    """Return how to chat with a model that a method asks, or None for plain prompts; say which.

    wanted: None asks its tokenizer.  Examples (fs_cot) and fine-tuned students are plain.  Raises
    UserError where it is to chat and has no template.
    """
    name = name.removeprefix("hf:")
    if name == "toy" or method == "fs_cot" or method in FINE_TUNED:
        return None
    found = wanted is not False and has_chat_template(name)
    if wanted and not found:
        raise UserError(f"--chat: the tokenizer of {name} has no chat template: use --no-chat")
    if not found and stage == "sample" and (system or thinking is not None):
        raise UserError(f"--system and --thinking need a chat template, which {name} lacks")
    if not found:
        return None
    print(f"{stage}: {name} is asked in its chat template (--no-chat: by plain prompts)")
    return ChatConfig(name, servers.text_or_file(system), thinking)


def chat_settings(config: ChatConfig | None) -> dict[str, Any]:
    """Return what a completion file says of it; nothing for plain prompts, as ever."""
    if config is None:
        return {}
    return {"chat": {"system": config.system, "thinking": config.thinking}}


def format_chat(tokenizer: Tokenizer, config: ChatConfig, turns: Turns) -> str:
    """Return the text of a conversation up to where the assistant's next turn begins.

    Without the BOS that the tokenizer puts before every text by itself.
    """
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    if config.system:
        messages.insert(0, {"role": "system", "content": config.system})
    options = {}
    if config.thinking is not None:  # the names that templates have for it
        options = {"enable_thinking": config.thinking, "thinking": config.thinking}
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **options
    )
    bos = tokenizer.bos_token
    if bos and text.startswith(bos) and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        text = text.removeprefix(bos)
    return text


def in_template(complete: Callable[..., Completions], config: ChatConfig | None) -> Callable:
    """Return a function that completes conversations as `complete` does texts; None: `complete`.

    Each prompt is a list of turns.  A text that holds its reasoning is told from it.
    """
    if config is None:
        return complete
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(config.name, trust_remote_code=False)

    def complete_chats(conversations: list[Turns], *limits: Any) -> Completions:
        """Complete each; limits: max_new_tokens, temperature, n, stop."""
        prompts = [format_chat(tokenizer, config, turns) for turns in conversations]
        completions = []
        for rows in complete(prompts, *limits):
            completions.append(list(map(split_completion, rows)))
        return completions

    return complete_chats


def split_completion(row: Completion) -> Completion:
    """Return a completion with its reasoning apart; a block that never ends is a cut text."""
    text, reasoning, is_whole = replies.split_reasoning(row["completion"])
    if not is_whole:
        row = row | {"finish_reason": "length"}
    if reasoning:
        row = row | {"completion": text, "reasoning": reasoning}
    return row
