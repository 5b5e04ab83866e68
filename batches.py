"""Samples -> tokens -> global batches -> micro-batches -> tensors, padded or packed.

A global batch is what an optimizer step sees.  Micro-batches are what fits a forward pass of a
rank.  Packed, the samples of a micro-batch lie end to end in one row, so that nothing is padding.

Shapes: B rows of a micro-batch, T tokens of a row.
"""

import itertools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from storage import FinetuneData, UserError
from tasks import encode_prompt

# ---------------- Samples -> tokens


Ids = list[int]


class TrainSample(NamedTuple):
    """Token ids of a sample; the label ends with EOS, so that the student learns to stop."""

    sample_index: int
    prompt: Ids
    label: Ids

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.label)


Samples = list[TrainSample]


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    family: str,
    data: FinetuneData,
    max_length: int,
    max_positions: int | None = None,
) -> tuple[Samples, Ids]:
    """Return the samples of a fine-tuning file, and the indices of those that are dropped.

    A sample is dropped, never cut, where its prompt or label exceeds max_length tokens (paper: 512)
    or both a decoder's max_positions: its answer stands last.  So is one without a prompt: nothing
    predicts its first label token.  Raises UserError where no sample is left.
    """
    samples = []
    dropped = []
    columns = (data["sample_index"], data["input"], data["label"])
    for index, text, label_text in zip(*columns, strict=True):
        prompt = encode_prompt(tokenizer, family, text)
        label = tokenizer(text_target=label_text, add_special_tokens=False)["input_ids"]
        sample = TrainSample(index, prompt, label + [tokenizer.eos_token_id])
        is_too_long = max(len(sample.prompt), len(sample.label)) > max_length
        if (
            family == "decoder" and (max_positions or 0) > 0
        ):  # encoder-decoders are taken to have relative positions
            is_too_long = is_too_long or sample.length > max_positions
        if is_too_long or not prompt:
            dropped.append(index)
        else:
            samples.append(sample)
    if not samples:
        raise UserError(
            f"no sample is left to train on: all {len(dropped)} exceed {max_length} tokens or the "
            "model's positions; raise --max_length"
        )
    return samples, dropped


def describe_dropped(dropped: Ids, n_kept: int, max_length: int) -> str:
    """Say how many samples are dropped, and which are the first of them."""
    indices = ", ".join(str(index) for index in dropped[:10])
    if len(dropped) > 10:
        indices += ", ..."
    return (
        f"dropped {len(dropped)} of {len(dropped) + n_kept} samples that are longer than "
        f"{max_length} tokens (or than the model): sample_index {indices}"
    )


# ---------------- Global batches -> micro-batches


def global_batches(n_samples: int, batch_size: int, seed: int, epoch: int) -> list[Ids]:
    """Shuffle the positions 0 .. n_samples - 1 and cut them into batches; the last may be smaller.

    The order depends on seed and epoch alone: any number of ranks, and a resumed run, agree on it.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(n_samples, generator=generator).tolist()
    return [order[i : i + batch_size] for i in range(0, n_samples, batch_size)]


def micro_batches(
    batch: Samples, max_samples: int | None, max_tokens: int, packing: bool, world_size: int = 1
) -> list[Samples]:
    """Regroup a global batch into the fewest micro-batches within the bounds (0 or None: none).

    Their number is a multiple of world_size, since rank r takes every world_size-th from r on;
    some may be empty.  A single sample is always within the bounds.  The step sums over all
    samples, so the grouping changes its rounding and its dropout masks alone.
    """
    longest_first = sorted(batch, key=lambda sample: (-sample.length, sample.sample_index))
    split = split_packed if packing else split_padded
    for n_groups in itertools.count(world_size, world_size):
        groups = split(longest_first, n_groups)
        most_samples = max(len(group) for group in groups)
        sizes = [computed_tokens(group, packing) for group in groups if len(group) > 1]
        is_few = most_samples <= (max_samples or most_samples)
        if is_few and max(sizes, default=0) <= (max_tokens or math.inf):
            return groups


def split_padded(longest_first: Samples, n_groups: int) -> list[Samples]:
    """Cut into groups of like length, which need little padding."""
    ends = [i * len(longest_first) // n_groups for i in range(n_groups + 1)]
    return [longest_first[start:end] for start, end in itertools.pairwise(ends)]


def split_packed(longest_first: Samples, n_groups: int) -> list[Samples]:
    """Balance the tokens, so that every rank has equally much to do."""
    groups: list[Samples] = [[] for _ in range(n_groups)]
    for sample in longest_first:
        smallest = min(groups, key=lambda group: (computed_tokens(group, True), len(group)))
        smallest.append(sample)
    return groups


def computed_tokens(group: Samples, packing: bool) -> int:
    """Count the tokens of a micro-batch, padding included."""
    lengths = [sample.length for sample in group]
    if packing:
        return sum(lengths)
    return len(lengths) * max(lengths, default=0)


# ---------------- Micro-batches -> tensors


class PackedLengths(NamedTuple):
    """Tokens of each sample in a packed row; a keyword of model(...) that reaches each layer."""

    prompt: Ids  # as the decoder, or the encoder, reads them
    label: Ids  # as an encoder-decoder's decoder reads them; else empty


class MicroBatch(NamedTuple):
    """A forward pass of a rank."""

    inputs: dict[str, Any]  # the keywords of model(...)
    targets: Tensor  # (B, T) of the decoder: the next token if it is the label's, or IGNORE_INDEX
    n_tokens: int  # padding included


IGNORE_INDEX = -100


def collate(samples: Samples, decoder_start_token_id: int | None, packing: bool) -> MicroBatch:
    """Make tensors.  decoder_start_token_id: an encoder-decoder's; None: the model is a decoder.

    A decoder with prompt p q and label a b reads `p q a`; targets are `-100 a b`.
    An encoder-decoder reads p q, its decoder `start a`; targets are `a b`.
    """
    if decoder_start_token_id is None:
        rows = {"input_ids": [s.prompt + s.label[:-1] for s in samples]}
        targets = [[IGNORE_INDEX] * (len(s.prompt) - 1) + s.label for s in samples]
    else:
        decoder_rows = [[decoder_start_token_id] + s.label[:-1] for s in samples]
        rows = {"input_ids": [s.prompt for s in samples], "decoder_input_ids": decoder_rows}
        targets = [s.label for s in samples]
    join = end_to_end if packing else pad
    inputs = {name: join(ids) for name, ids in rows.items()}
    n_tokens = sum(ids.numel() for ids in inputs.values())
    if decoder_start_token_id is None:
        n_tokens += len(samples)  # EOS is only predicted; it counts, as in TrainSample.length
    prompt_lengths = [len(ids) for ids in rows["input_ids"]]
    if not packing:
        inputs["attention_mask"] = pad([[1] * length for length in prompt_lengths])
        return MicroBatch(inputs, pad(targets, IGNORE_INDEX), n_tokens)
    label_lengths = [len(ids) for ids in rows.get("decoder_input_ids", [])]
    inputs["packed_lengths"] = PackedLengths(prompt_lengths, label_lengths)
    if decoder_start_token_id is None:  # positions restart at each sample
        inputs["position_ids"] = end_to_end(range(length) for length in prompt_lengths)
    return MicroBatch(inputs, end_to_end(targets), n_tokens)


def pad(rows: list[Ids], value: int = 0) -> Tensor:
    """Fill rows up on the right, to (B, T); padding is masked, so any token id will do."""
    width = max(len(row) for row in rows)
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def end_to_end(rows: Iterable[Iterable[int]]) -> Tensor:
    """Join rows to one, (1, T)."""
    return torch.tensor([list(itertools.chain.from_iterable(rows))])
