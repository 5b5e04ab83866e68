"""The toy task's teacher, wrong once in five, and its student; the samples are in tasks.py.

Five coin states in a row are hard to see at once and easy one at a time, so rationales help a tiny
student; without them it stays at chance.
"""

import random
import re
from pathlib import Path
from typing import Any

import tasks
from distributed import Ranks, wait_for_all
from storage import AnyPath, file_lock, write_errors
from tasks import NAMES

OTHER_SIDE = {"heads": "tails", "tails": "heads"}
ANSWERS = {"heads": "yes", "tails": "no"}
PHRASES = [  # (start, one step, end): the teacher's several ways to say the same
    ("The coin is heads up.", "{name} {verb} it: {before} to {side}.", "So it is {side} up."),
    ("Start: heads.", "From {before}, {name} {verb} it to {side}.", "In the end {side}."),
    ("Heads.", "{name} {verb} {before}, now {side}.", "The coin shows {side}."),
]
WORDS = "A coin is heads up. flips keeps the coin. Is the coin still heads up? tails yes no ### -->"


def toy_rationale(question: str, rng: random.Random, phrases: tuple[str, str, str]) -> str:
    """Follow the coin; in one rationale of five, lose track once, which inverts the end."""
    steps = re.findall(r"(\w+) (flips|keeps) the coin", question)
    wrong_step = None
    if steps and rng.random() < 0.2:
        wrong_step = rng.randrange(len(steps))
    start, step, end = phrases
    side = "heads"
    sentences = [start]
    for i, (name, verb) in enumerate(steps):
        before = side
        flips = verb == "flips"
        if i == wrong_step:
            flips = not flips
        if flips:
            side = OTHER_SIDE[before]
        sentence = step.format(name=name, verb=verb, before=before, side=side)
        sentences.append(sentence)
    sentences.append(end.format(side=side))
    return " ".join(sentences)


def read_answer(text: str) -> str:
    """'... so it is tails up.' -> 'no'"""
    sides = re.findall(r"heads|tails", text)
    return ANSWERS[sides[-1]]


def answer_prompt(prompt: str, seed: str, diverse: bool) -> str:
    """Return the teacher's completion of either step of Zero-shot-CoT, or of Few-shot-CoT."""
    if prompt.endswith(tasks.ANSWER_TRIGGER):
        return f" {read_answer(prompt)}."
    rng = random.Random(f"{seed} {prompt}")
    phrases = PHRASES[0]
    if diverse:
        phrases = rng.choice(PHRASES)
    *_, question = prompt.rpartition("Q:")
    rationale = toy_rationale(question, rng, phrases)
    if prompt.endswith("\nA:"):  # Few-shot-CoT: the answer is stated
        return f" {rationale} {tasks.STATED_ANSWER} {read_answer(rationale)}."
    return f" {rationale}"


def toy_teacher(
    prompts: list[str],
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    n: int = 1,
    stop: list[str] | None = None,
    seed: int = 0,
    first: int = 0,
) -> list[list[dict[str, Any]]]:
    """Complete each prompt n times, the same way for the same seed; the signature of `complete`.

    Above temperature 0 the rationales of a question vary in wording (diverse reasoning).  first:
    the number of the first of the n, where others of the same prompts are there already.
    """
    completions = []
    for prompt in prompts:
        of_prompt = []
        for k in range(first, first + n):
            stream = f"{seed}"
            if temperature:
                stream = f"{seed} {k}"
            text = answer_prompt(prompt, stream, diverse=temperature > 0)
            of_prompt.append({"completion": text, "finish_reason": "stop"})
        completions.append(of_prompt)
    return completions


def toy_vocabulary() -> dict[str, int]:
    """Return the token ids of all words and punctuation marks of the task."""
    texts = [WORDS, *NAMES]
    for phrases in PHRASES:
        texts += phrases
    text = re.sub(r"\{\w+\}", " ", " ".join(texts))
    words = set(re.findall(r"\w+|[^\w\s]+", text))
    tokens = ["<eos>", "<unk>", *sorted(words)]
    return {token: i for i, token in enumerate(tokens)}


def make_toy_student(folder: AnyPath, seed: int) -> None:
    """Save a 2-layer, 64-wide GPT-2 with random weights and a word-level tokenizer of the task."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = Tokenizer(models.WordLevel(toy_vocabulary(), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    torch.manual_seed(seed)
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 128}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    tokens = {"vocab_size": len(fast), "bos_token_id": 0, "eos_token_id": 0}
    scale = 0.11  # near 1/sqrt(64): at GPT-2's 0.02 it learns at half the speed
    config = GPT2Config(initializer_range=scale, **sizes, **no_dropout, **tokens)
    with write_errors(folder):
        GPT2LMHeadModel(config).save_pretrained(folder)
        fast.save_pretrained(folder)


def untrained_student(saved: AnyPath, seed: int, ranks: Ranks) -> str:
    """Return the folder of the toy student of a seed; rank 0 makes it where it is not there."""
    folder = Path(saved) / "models" / "B_toy_student" / f"untrained_s{seed}"
    with file_lock(folder, ranks.is_rank0, timeout=60):
        last_file = folder / "tokenizer_config.json"
        if ranks.is_rank0 and not last_file.exists():
            make_toy_student(folder, seed)
    wait_for_all(ranks)
    return str(folder)
