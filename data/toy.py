"""The toy task: who flips, who keeps, and is the coin still heads up?  Made on the spot: no download, no key, no GPU.

Five coin states in a row are hard to see at once and easy one at a time, so rationales help a tiny student; without them
it stays at chance.  Beside the samples stand their teacher, which is wrong once in five, and their student.
"""

import random
import re

import tasks
from storage import write_errors
from tasks import NAMES

SIDES = {True: "heads", False: "tails"}


TOY_PHRASES = [  # (start, one step, end): the teacher's several ways to say the same
    ("The coin is heads up.", "{name} {verb} it: {before} to {side}.", "So it is {side} up."),
    ("Start: heads.", "From {before}, {name} {verb} it to {side}.", "In the end {side}."),
    ("Heads.", "{name} {verb} {before}, now {side}.", "The coin shows {side}."),
]
TOY_VOCABULARY = [
    *NAMES,
    *(re.sub(r"\{\w+\}", " ", part) for phrases in TOY_PHRASES for part in phrases),
    "A coin is heads up. flips keeps the coin. Is the coin still heads up? tails yes no ### -->",
]


def toy_rationale(question, rng, phrases):
    """Follow the coin; in one rationale of five, lose track at one person, which turns the end around."""
    steps = re.findall(r"(\w+) (flips|keeps) the coin", question)
    slip = rng.randrange(len(steps)) if steps and rng.random() < 0.2 else None
    start, step, end = phrases
    heads = True
    said = [start]
    for i, (name, verb) in enumerate(steps):
        before = heads
        heads = heads ^ (verb == "flips") ^ (i == slip)
        said.append(step.format(name=name, verb=verb, before=SIDES[before], side=SIDES[heads]))
    return " ".join([*said, end.format(side=SIDES[heads])])


def toy_teacher(prompts, n=1, temperature=0.0, max_new_tokens=128, stop=None, seed=0):
    """An embedded teacher with the signature of `complete`: n completions a prompt, the same ones for the same seed.

    It answers both steps of Zero-shot-CoT, and Few-shot-CoT with a sentence that states the answer.  Above temperature 0 its rationales vary in wording (diverse reasoning)."""

    def one(prompt, k):
        """-> the k-th completion of a prompt"""
        if prompt.endswith(tasks.COT_ANSWER):
            sides = re.findall(r"heads|tails", prompt)
            return " yes." if sides[-1] == "heads" else " no."
        rng = random.Random(f"{seed} {k} {prompt}" if temperature else f"{seed} {prompt}")
        rationale = toy_rationale(
            prompt.rpartition("Q:")[2],
            rng,
            rng.choice(TOY_PHRASES) if temperature else TOY_PHRASES[0],
        )
        answer = "yes" if re.findall(r"heads|tails", rationale)[-1] == "heads" else "no"
        return f" {rationale}" + f" {tasks.PREFIXES['fs_cot']} {answer}." * prompt.endswith("\nA:")

    return [
        [{"completion": one(prompt, k), "finish_reason": "stop"} for k in range(n)]
        for prompt in prompts
    ]


def make_toy_student(folder, seed):
    """Save a 2-layer, 128-wide GPT-2 with random weights, and a word-level tokenizer that knows the toy task's words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    special = ["<eos>", "<unk>"]
    words = re.findall(r"\w+|[^\w\s]+", " ".join(TOY_VOCABULARY))
    tokenizer = Tokenizer(
        models.WordLevel(
            {word: i for i, word in enumerate([*special, *sorted(set(words))])}, unk_token="<unk>"
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(fast),
        n_layer=2,
        n_head=4,
        n_embd=128,
        n_positions=128,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.08,  # 1/sqrt(128): at GPT-2's 0.02, meant for 768 wide, it learns at half the speed
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    with write_errors(folder):
        GPT2LMHeadModel(config).save_pretrained(folder)
        fast.save_pretrained(folder)
