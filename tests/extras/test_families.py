"""Tiny models of every family that transformers has: a step and texts beside Hugging Face's own.

python -m pytest tests/extras/test_families.py --slow
python tests/extras/test_families.py    # writes the table into docs/students.md
"""

import contextlib
import io
import math
import re
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conftest import (
    decoder_start_of,
    family_classes,
    family_of,
    prepare_training,
    tiny_family,
    tiny_tokenizer,
    train_config,
)

import decoding
import storage
import tokens
import train_loop
from storage import UserError

DOCS = Path(__file__).resolve().parents[2] / "docs" / "students.md"
PROMPTS = ["a", "count to ten ###", "x" * 40, "How many?"]
LIMITS = [8, 3, 5, 8]  # rows leave at different times
DATA = {
    "sample_index": [0, 1, 2, 3],
    "input": [f"count to {i} " + "x" * (5 * i) + "###" for i in range(4)],
    "label": [" " + "so " * (4 * i % 7) + f"--> {i}" for i in range(4)],
}
OTHER_LOSS = {"trocr"}  # Hugging Face's loss does not predict the next token


class FamilyRow(NamedTuple):
    """What became of a family."""

    model_type: str
    refusal: str = ""  # why it is not trained, in one sentence
    layout: str = ""  # packed, padded, one by one
    loss_error: float = math.nan  # relative
    gradient_error: float = math.nan  # of the largest gradient
    decoding: str = ""  # pages, cache, one by one
    same_texts: int = 0  # of PROMPTS, by the plain and by the fast path


def hugging_face_step(model: Any, samples: list) -> tuple[float, dict[str, torch.Tensor]]:
    """The oracle: Hugging Face's own loss, each sample alone, without dropout."""
    model.zero_grad()
    count = sum(len(sample.label) for sample in samples)
    total = 0.0
    for sample in samples:
        ids = torch.tensor([sample.prompt + sample.label])
        inputs = {"labels": torch.tensor([[-100] * len(sample.prompt) + sample.label])}
        if model.config.is_encoder_decoder:
            ids = torch.tensor([sample.prompt])
            start = [decoder_start_of(model), *sample.label[:-1]]  # mBART would wrap the labels
            inputs = {"labels": torch.tensor([sample.label])}
            inputs["decoder_input_ids"] = torch.tensor([start])
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).loss
        loss = loss * len(sample.label) / count
        loss.backward()
        total += loss.item()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    return total, gradients


def our_step(setup: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """The loop's loss and gradients without dropout."""
    model = setup.state.model
    model.zero_grad()
    with train_loop.training_mode(setup):
        model.eval()
        totals = train_loop.accumulate_gradients(setup, setup.samples, 1, False)
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    return totals[0].item(), gradients


def largest_error(gradients: dict, expected: dict) -> float:
    """Return the largest difference of two sets of gradients, by the largest gradient."""
    largest = max(gradient.abs().max() for gradient in expected.values() if gradient is not None)
    errors = []
    for name, wanted in expected.items():
        if wanted is not None:
            gradient = gradients[name]
            if gradient is None:
                gradient = torch.zeros_like(wanted)
            errors.append((gradient - wanted).abs().max())
    return (max(errors) / largest).item()


def hugging_face_texts(model: Any, tokenizer: Any) -> list[str]:
    """The oracle: generate on one prompt at a time, greedily."""
    texts = []
    for prompt, limit in zip(PROMPTS, LIMITS, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        options = {"max_new_tokens": limit, "do_sample": False}
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0]
        new = output[1:]
        if not model.config.is_encoder_decoder:
            new = output[ids.shape[1] :]
        texts.append(tokenizer.decode(new, skip_special_tokens=True))
    return texts


def layout_of(setup: Any) -> str:
    if setup.packing:
        return "packed"
    return "one by one" if setup.config.micro_batch_size == 1 else "padded"


def try_family(model_type: str) -> FamilyRow:
    """Train and decode a tiny model of a family; return what becomes of it."""
    model = tiny_family(model_type)
    tokenizer = tiny_tokenizer()
    family = family_of(model)
    samples = tokens.tokenize(tokenizer, family, DATA, 512)[0]
    try:
        setup = prepare_training(model, samples, train_config())
    except UserError as e:
        return FamilyRow(model_type, refusal=str(e))
    loss, gradients = our_step(setup)
    expected_loss, expected_gradients = hugging_face_step(model, samples)
    expected_texts = hugging_face_texts(model, tokenizer)
    same = 0
    for plain in (True, False):
        rows = decoding.generate(model, tokenizer, family, PROMPTS, LIMITS, plain=plain)
        texts = [completions[0]["completion"] for completions in rows]
        same += sum(a == b for a, b in zip(texts, expected_texts, strict=True))
    return FamilyRow(
        model_type,
        layout=layout_of(setup),
        loss_error=abs(loss - expected_loss) / abs(expected_loss),
        gradient_error=largest_error(gradients, expected_gradients),
        same_texts=same,
    )


NOT_BUILT = (  # what configurations and classes raise that cannot be made tiny
    *(AttributeError, ImportError, LookupError, ValueError),
    StrictDataclassError,
)


def try_families() -> tuple[list[FamilyRow], dict[str, str]]:
    """Return a row of each family that can be built, and {model type: why not} of the others."""
    transformers.utils.logging.set_verbosity_error()
    rows = []
    not_tried = {}
    for model_type in sorted(family_classes()):
        try:
            tiny_family(model_type)
        except NOT_BUILT as e:
            not_tried[model_type] = type(e).__name__
            continue
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            row = try_family(model_type)
        rows.append(row._replace(decoding=decoding_of(row, said.getvalue())))
    return rows, not_tried


def decoding_of(row: FamilyRow, said: str) -> str:
    """Read from the printed lines how a family was decoded."""
    if row.refusal:
        return ""
    if "decoded one by one" in said:
        return "one by one"
    if "prepacked weights" in said:
        return "plain"
    return "fast, without pages" if "pages give" in said else "fast"


def table_of(rows: list[FamilyRow], not_tried: dict[str, str]) -> str:
    """Return the families as a page of Markdown."""
    refused = [row for row in rows if row.refusal]
    trained = [row for row in rows if not row.refusal]
    about = [
        f"Tiny random models, transformers {transformers.__version__}, torch "
        f"{torch.__version__.partition('+')[0]}, fp32 on a CPU: one training step beside Hugging "
        "Face's loss and gradients of each sample alone, greedy texts beside its generate (four "
        "prompts, by the plain and by the fast path). Errors are relative to the loss and to the "
        "largest gradient. Written by `python tests/extras/test_families.py`.",
        f"{len(trained)} families are trained and decoded, {len(refused)} are refused before "
        f"anything is computed, {len(not_tried)} could not be built at tiny size (most read "
        "images or sound).",
    ]
    lines = [
        *textwrap.wrap(about[0], 118),
        "",
        *textwrap.wrap(about[1], 118),
        "",
        "| family | samples | loss | gradients | decoding | equal texts |",
        "|---|---|--:|--:|---|--:|",
    ]
    for row in trained:
        errors = f"{row.loss_error:.0e} | {row.gradient_error:.0e}"
        if row.model_type in OTHER_LOSS:
            errors = "its own is another | -"
        lines.append(
            f"| {row.model_type} | {row.layout} | {errors} | {row.decoding} | {row.same_texts}/8 |"
        )
    lines += ["", "| refused | with |", "|---|---|"]
    lines += [f"| {row.model_type} | {row.refusal} |" for row in refused]
    names = textwrap.wrap(f"Not tried: {', '.join(not_tried)}.", 118, break_on_hyphens=False)
    return "\n".join([*lines, "", *names, ""])


@pytest.fixture(scope="module")
def families():
    start = time.process_time()
    rows, not_tried = try_families()
    return rows, not_tried, time.process_time() - start


@pytest.mark.slow
def test_families_are_exact_or_refused(families):
    """What is trained and decoded equals Hugging Face; the rest is refused in a sentence."""
    rows, _, _ = families
    wrong = []
    for row in rows:
        errors = [row.loss_error, row.gradient_error]
        if row.refusal:
            continue
        if row.same_texts < 8 or (max(errors) > 1e-5 and row.model_type not in OTHER_LOSS):
            wrong.append(row)
    assert wrong == []


@pytest.mark.slow
def test_families_are_many_and_quick(families):
    """150 families are tried in five minutes of one core."""
    rows, _, seconds = families
    assert len(rows) >= 150
    assert seconds < 300


def main() -> None:
    """Write the table into docs/students.md, after what was written there by hand."""
    text = DOCS.read_text()
    head = re.split(r"(?m)^## Families\n", text)[0]
    storage.write_atomic(DOCS, f"{head}## Families\n\n{table_of(*try_families())}")


if __name__ == "__main__":
    main()
