"""Samples of tokens -> global batches -> micro-batches -> tensors, padded or packed.

A global batch is what an optimizer step sees.  Micro-batches are what fits a forward pass of a
rank.  Packed, the samples of a micro-batch lie end to end in one row, so that nothing is padding.

Shapes: B rows of a micro-batch, T tokens of a row, N label tokens in all, H width, V vocabulary.
"""

import contextlib
import functools
import heapq
import inspect
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, BatchEncoding
from transformers import PreTrainedModel as Model
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tokens import TrainSample

Ids = list[int]
Samples = list[TrainSample]

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
    lengths = [sample.length for sample in longest_first]
    max_samples = max_samples or len(batch)
    max_tokens = max_tokens or sum(lengths) * len(batch)
    split = split_packed if packing else split_padded
    bounds = {"max_samples": max_samples, "max_tokens": max_tokens, "packing": packing}
    is_small = functools.partial(is_within, lengths=lengths, **bounds)
    fewest = fewest_groups(lengths, max_samples, max_tokens)
    fewest = math.ceil(fewest / world_size) * world_size
    for n_groups in itertools.count(fewest, world_size):
        groups = list(itertools.takewhile(is_small, split(lengths, n_groups)))
        if len(groups) == n_groups:
            break
    return [select(longest_first, places) for places in groups]


def select(samples: Samples, places: Iterable[int]) -> Samples:
    return [samples[place] for place in places]


def fewest_groups(lengths: Ids, max_samples: int, max_tokens: int) -> int:
    """Return a number of micro-batches below which the bounds cannot hold: where to begin."""
    by_samples = math.ceil(len(lengths) / max_samples)
    bounded = [min(length, max_tokens) for length in lengths]  # longer ones stand alone
    by_tokens = math.ceil(sum(bounded) / max_tokens)
    return max(by_samples, by_tokens)


def is_within(
    group: Sequence[int], lengths: Ids, max_samples: int, max_tokens: int, packing: bool
) -> bool:
    """Return whether the samples at these places, the longest first, may be a micro-batch."""
    if len(group) < 2:
        return True
    if packing:
        tokens = sum(lengths[place] for place in group)
    else:
        tokens = len(group) * lengths[group[0]]
    return len(group) <= max_samples and tokens <= max_tokens


def split_padded(lengths: Ids, n_groups: int) -> Iterator[Sequence[int]]:
    """Cut places in the longest-first order into groups of like length: little padding."""
    ends = (i * len(lengths) // n_groups for i in range(n_groups + 1))
    for start, end in itertools.pairwise(ends):
        yield range(start, end)


def split_packed(lengths: Ids, n_groups: int) -> list[Sequence[int]]:
    """Balance the tokens, so that every rank has equally much to do; the longest go first."""
    groups: list[Ids] = [[] for _ in range(n_groups)]
    smallest = [(0, 0, i) for i in range(n_groups)]  # a heap of (tokens, samples, group)
    for place, length in enumerate(lengths):
        tokens, count, i = smallest[0]
        groups[i].append(place)
        heapq.heapreplace(smallest, (tokens + length, count + 1, i))
    return groups


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
    is_decoder = decoder_start_token_id is None
    prompts = [sample.prompt for sample in samples]
    labels = [sample.label for sample in samples]
    shifted = [label[:-1] for label in labels]  # EOS is only predicted
    if is_decoder:
        pairs = zip(prompts, shifted, strict=True)
        rows = {"input_ids": [prompt + label for prompt, label in pairs]}
        ignored = [[IGNORE_INDEX] * (len(prompt) - 1) for prompt in prompts]
        targets = [skipped + label for skipped, label in zip(ignored, labels, strict=True)]
    else:
        rows = {"input_ids": prompts}
        rows["decoder_input_ids"] = [[decoder_start_token_id, *label] for label in shifted]
        targets = labels
    join = end_to_end if packing else pad
    inputs = {name: join(ids) for name, ids in rows.items()}
    n_tokens = sum(ids.numel() for ids in inputs.values())
    if is_decoder:
        n_tokens += len(samples)  # EOS counts, as in TrainSample.length
    input_lengths = [len(ids) for ids in rows["input_ids"]]
    if not packing:
        mask = [[1] * length for length in input_lengths]
        inputs["attention_mask"] = pad(mask)
        return MicroBatch(inputs, pad(targets, IGNORE_INDEX), n_tokens)
    label_lengths = [len(ids) for ids in rows.get("decoder_input_ids", [])]
    inputs["packed_lengths"] = PackedLengths(input_lengths, label_lengths)
    if is_decoder:  # positions restart at each sample
        positions = map(range, input_lengths)
        inputs["position_ids"] = end_to_end(positions)
    return MicroBatch(inputs, end_to_end(targets), n_tokens)


def pad(rows: list[Ids], value: int = 0) -> Tensor:
    """Fill rows up on the right, to (B, T); padding is masked, so any token id will do."""
    width = max(len(row) for row in rows)
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def end_to_end(rows: Iterable[Iterable[int]]) -> Tensor:
    """Join rows to one, (1, T)."""
    return torch.tensor([list(itertools.chain.from_iterable(rows))])


# ---------------- Packed rows: attention among the tokens of each sample, logits at labels alone


@torch.compiler.disable  # the lengths differ with every step
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    packed_lengths: PackedLengths,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend within each sample of a packed row; the attention implementation "packed".

    query, key, value: (1, heads, T, head_dim).  Returns (1, T, heads, head_dim) and no weights.
    Costs the sum of the squared sample lengths; a block mask over the row would cost T squared.
    """
    query_lengths, key_lengths = lengths_of_layer(module, packed_lengths)
    queries = query.split(query_lengths, dim=2)
    keys = key.split(key_lengths, dim=2)
    values = value.split(key_lengths, dim=2)
    outputs = []
    for q, k, v in zip(queries, keys, values, strict=True):
        if position_bias is not None:
            options["position_bias"] = position_bias[:, :, : q.shape[2], : k.shape[2]]
        output, _ = sdpa_attention_forward(module, q, k, v, None, **options)
        outputs.append(output)
    return torch.cat(outputs, dim=1), None


AttentionInterface.register("packed", packed_attention)


def lengths_of_layer(module: nn.Module, lengths: PackedLengths) -> tuple[list[int], list[int]]:
    """Return each sample's number of queries and of keys in an attention layer."""
    if not lengths.label or not module.is_decoder:
        return lengths.prompt, lengths.prompt
    if module.is_causal:
        return lengths.label, lengths.label
    return lengths.label, lengths.prompt  # cross-attention


def set_position_bias(
    module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give T5's first layers the position bias of the longest sample, not of the whole row.

    A forward pre-hook.  The bias depends on distances alone: all samples' are corners of that one.
    """
    if options.get("position_bias") is None:
        sizes = [max(lengths) for lengths in lengths_of_layer(module, options["packed_lengths"])]
        if module.has_relative_attention_bias:
            options["position_bias"] = module.compute_bias(*sizes, device=inputs[0].device)
        else:
            options["position_bias"] = inputs[0].new_zeros(1, module.n_heads, *sizes)
    return inputs, options


@contextlib.contextmanager
def packed_rows(model: Model) -> Iterator[None]:
    """Within this the model reads packed rows."""
    with contextlib.ExitStack() as stack:
        model.set_attn_implementation("packed")
        stack.callback(model.set_attn_implementation, "sdpa")
        for module in model.modules():
            if hasattr(module, "compute_bias"):
                hook = module.register_forward_pre_hook(set_position_bias, with_kwargs=True)
                stack.callback(hook.remove)
        yield


def label_logits(model: nn.Module, batch: MicroBatch, device: torch.device) -> Tensor:
    """Return the (N, V) logits that predict label tokens, row by row; no others are computed.

    A packed row asks for them where the model knows `logits_to_keep`.  Otherwise a hook hands
    (N, H) instead of (B, T, H) to the vocabulary projection, whatever the model does around it.
    """
    raw_model = getattr(model, "module", model)  # what DDP is around
    inputs = BatchEncoding(batch.inputs).to(device)
    is_label = (batch.targets != IGNORE_INDEX).to(device)
    parameters = inspect.signature(raw_model.forward).parameters
    if len(is_label) == 1 and "logits_to_keep" in parameters:
        positions = is_label[0].nonzero()[:, 0]
        logits = model(**inputs, logits_to_keep=positions, use_cache=False).logits
        return logits.flatten(0, 1)  # of (1, N, V); [0] would copy its gradient
    head = raw_model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda module, hidden: (hidden[0][is_label],))
    try:
        return model(**inputs, use_cache=False).logits
    finally:
        hook.remove()
