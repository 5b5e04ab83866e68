"""What sampling a teacher would cost.   python -m pytest tests/extras/test_dry_run.py"""

import re

import pytest

import tasks
from extras import dry_run

PRICES = ("--price_in", 1000, "--price_out", 10000)
LINE = re.compile(
    r"""
    dry\ run:\ toy:\ ([\d,]+)\ requests,
    \ ([\d,]+)\ prompt\ tokens\ and\ at\ most\ ([\d,]+)\ completion\ tokens
    ,\ at\ most\ \$([\d,.]+)
    """,
    re.VERBOSE,
)


def test_dry_run_estimate(server, ask):
    """A dry run asks for nothing and says what would be asked for."""
    flags = ("--dry_run", "--teacher_method", "zs_cot", "--degree", 3, "--temperature", 0.7)
    _, out = ask(*flags, *PRICES)
    numbers = [float(text.replace(",", "")) for text in LINE.search(out).groups()]
    requests, prompt_tokens, completion_tokens, cost = numbers
    assert requests == 120
    assert completion_tokens == 120 * 128
    assert cost == pytest.approx((prompt_tokens * 1000 + 120 * 128 * 10000) / 1e6, abs=0.01)
    assert "4 characters a token" in out
    assert not server.log
    assert not ask.file.parent.exists()


def test_estimate_journal(ask):
    """What is in the journal costs nothing."""
    ask("--degree", 1)
    assert "toy: 40 requests" in ask("--dry_run", "--degree", 3, "--temperature", 0)[1]


def test_dry_run_all(ask, tmp_path):
    """A task that is not prepared is left out, and named."""
    _, out = ask("--dry_run", "--task", "all", "--data", tmp_path)
    assert "dry run: multiarith is left out: " in out
    assert "dry run: in all, prompts at 4 characters a token: 0 requests" in out


@pytest.mark.slow
def test_token_counter_student(ask, model_folder):
    """Prompts are counted with the student's tokenizer where it is a folder."""
    _, out = ask("--dry_run", "--student", model_folder("gpt2"))
    length = 0
    for sample in tasks.load("toy"):
        prompt, _ = tasks.format_sample("zs_cot_one_step", "chat", sample["question"])
        length += len(prompt.encode())  # one token a byte
    assert f"toy: 20 requests, {length:,} prompt tokens" in out
    assert "counted by the tokenizer of" in out


def test_count_characters():
    """Without a tokenizer four characters are taken for a token."""
    assert dry_run.count_characters(["12345", "678"]) == 2
