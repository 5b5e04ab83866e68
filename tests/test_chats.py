"""Conversations with local chat models.   python -m pytest tests/test_chats.py"""

import shutil

import pytest
from conftest import read_rows, tiny_tokenizer

import chats
import completions
import storage
from completions import SamplingConfig
from storage import UserError

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}<no>{% endif %}[assistant]"
)


def chat_tokenizer(bos: bool = False):
    tokenizer = tiny_tokenizer(bos)
    tokenizer.chat_template = TEMPLATE
    if bos:
        tokenizer.add_special_tokens({"bos_token": "<bos>"})
        tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    return tokenizer


@pytest.fixture
def chat_folder(model_folder, tmp_path):
    """A Hugging Face folder whose tokenizer has a chat template."""
    folder = tmp_path / "chatty"
    shutil.copytree(model_folder("gpt2"), folder)
    chat_tokenizer().save_pretrained(folder)
    return folder


CONFIG = chats.ChatConfig("x")
FORMATS = [
    (CONFIG, ["a"], "[user] a\n[assistant]"),
    (CONFIG, ["a", "b", "c"], "[user] a\n[assistant] b\n[user] c\n[assistant]"),
    (CONFIG._replace(system="s"), ["a"], "[system] s\n[user] a\n[assistant]"),
    (CONFIG._replace(thinking=False), ["a"], "[user] a\n<no>[assistant]"),
    (CONFIG._replace(thinking=True), ["a"], "[user] a\n[assistant]"),
]


@pytest.mark.parametrize("config, turns, text", FORMATS)
def test_format_chat(config, turns, text):
    """Turns stand in the tokenizer's template, up to the assistant's next one."""
    assert chats.format_chat(chat_tokenizer(), config, turns) == text


def test_format_chat_one_bos():
    """The tokenizer adds BOS by itself, so the template's is left out."""
    tokenizer = chat_tokenizer(bos=True)
    text = chats.format_chat(tokenizer, CONFIG, ["a"])
    assert tokenizer(text)["input_ids"].count(tokenizer.bos_token_id) == 1


def test_has_chat_template(chat_folder, model_folder):
    """It is told from the folder's files."""
    assert chats.has_chat_template(str(chat_folder))
    assert not chats.has_chat_template(str(model_folder("gpt2")))


@pytest.mark.parametrize(
    "name, method, wanted",
    [("toy", "zs", None), ("hf:CHAT", "fs_cot", None), ("CHAT", "ft_cot", None)]
    + [("hf:CHAT", "zs_cot", False), ("hf:PLAIN", "zs_cot", None)],
)
def test_chat_config_plain(chat_folder, model_folder, capsys, name, method, wanted):
    """Examples, fine-tuned students and models without a template are asked by plain prompts."""
    name = name.replace("CHAT", str(chat_folder)).replace("PLAIN", str(model_folder("gpt2")))
    assert chats.chat_config("sample", name, method, wanted, None, "") is None
    assert capsys.readouterr().out == ""


def test_chat_config_default(chat_folder, capsys):
    """A model with a template is asked in it, and that is said."""
    config = chats.chat_config("sample", f"hf:{chat_folder}", "zs_cot", None, None, None)
    assert config == chats.ChatConfig(str(chat_folder))
    assert "is asked in its chat template (--no-chat: by plain prompts)" in capsys.readouterr().out


def test_chat_config_no_template(model_folder):
    """--chat for a model without a template is refused."""
    with pytest.raises(UserError, match="has no chat template"):
        chats.chat_config("sample", str(model_folder("gpt2")), "zs", True, None, "")


@pytest.mark.parametrize("thinking, system", [(False, ""), (None, "Be brief.")])
def test_chat_config_nothing_dropped(model_folder, thinking, system):
    """What a model without a template cannot be told is refused, not dropped."""
    with pytest.raises(UserError, match="need a chat template"):
        chats.chat_config("sample", str(model_folder("gpt2")), "zs", None, thinking, system)


def test_make_completions_turns():
    """Zero-shot-CoT's second step is a third turn of the conversation."""
    asked = []

    def complete(conversations, *limits):
        asked.extend(conversations)
        return [[{"completion": "It is up.", "finish_reason": "stop"}] for _ in conversations]

    plan = SamplingConfig("m", "", "zs_cot", "chat", 8)
    sample = {"sample_index": 0, "question": "q?", "answer": "yes"}
    [row] = completions.make_completions(complete, [sample], plan)["0"]
    first = "q?\nLet's think step by step."
    assert asked == [[first], [first, "It is up.", "Therefore, the answer is"]]
    assert row["prompt"] == "Therefore, the answer is"
    assert row["reasoning_prompt"] == first


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<think>a</think>b", {"completion": "b", "reasoning": "a", "finish_reason": "stop"}),
        ("<think>a", {"completion": "", "reasoning": "a", "finish_reason": "length"}),
        ("b", {"completion": "b", "finish_reason": "stop"}),
    ],
)
def test_split_completion(text, expected):
    """Reasoning is told from the text; a block that never ends is a cut text."""
    assert chats.split_completion({"completion": text, "finish_reason": "stop"}) == expected


def test_sample_in_template(chat_folder, small_toy, method, tmp_path):
    """A local chat model is asked in its template, or, by --no-chat, by the paper's prompts."""
    flags = f"--saved {tmp_path} --stage sample --teacher_max_new_tokens 4 --split few_shot_2"
    flags += f" --teacher hf:{chat_folder} --degree 1 --temperature 0"
    message, out = method(flags)
    assert message is None
    assert "is asked in its chat template" in out
    [file] = tmp_path.glob("completion_data/*/D_toy.json")
    settings = storage.read_json(file)["metadata"]["settings"]
    assert settings["chat"] == {"system": "", "thinking": None}
    assert read_rows(file)[0]["prompt"] == "Therefore, the answer is"
    assert "made with the same settings: skipped" in method(flags)[1]
    assert method(flags, "--no-chat")[0] is None
    assert "chat" not in storage.read_json(file)["metadata"]["settings"]
    assert read_rows(file)[0]["reasoning_prompt"].startswith("Q: ")
