"""Samples of tokens -> global batches -> micro-batches -> tensors, padded or packed.

A global batch is what an optimizer step sees.  Micro-batches are what fits a forward pass of a
rank.  Packed, the samples of a micro-batch lie end to end in one row, so that nothing is padding.

Shapes: B rows of a micro-batch, T tokens of a row, N label tokens in all, H width, V vocabulary.
"""

import inspect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from heapq import heapreplace
from math import ceil
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, BatchEncoding
from transformers import PreTrainedModel as Model
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from models import set_attention
from tokens import TrainSample

Ids = list[int]
Samples = list[TrainSample]
Places = Sequence[int]
Inputs = tuple[Any, ...]
Options = dict[str, Any]

# ---------------- Global batches -> micro-batches


def global_batches(n_samples: int, batch_size: int, seed: int, epoch: int) -> list[Ids]:
    """Shuffle the positions 0 .. n_samples - 1 and cut them into batches; the last may be smaller.

    The order depends on seed and epoch alone: any number of ranks, and a resumed run, agree on it.
    """
    generator = torch.Generator()
    generator.manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(n_samples, generator=generator).tolist()
    starts = range(0, n_samples, batch_size)
    return [order[start : start + batch_size] for start in starts]


def micro_batches(
    batch: Samples, max_samples: int | None, max_tokens: int, packing: bool, world_size: int = 1
) -> list[Samples]:
    """Regroup a global batch into the fewest micro-batches within the bounds (0 or None: none).

    Their number is a multiple of world_size, since rank r takes every world_size-th from r on;
    some may be empty.  A single sample is always within the bounds.  The step sums over all
    samples, so the grouping changes its rounding and its dropout masks alone.
    """
    longest_first = sorted(batch, key=attrgetter("sample_index"))
    longest_first.sort(key=attrgetter("length"), reverse=True)  # stable
    lengths = [sample.length for sample in longest_first]
    max_samples = max_samples or len(batch)
    max_tokens = max_tokens or sum(lengths) * len(batch)

    def is_within_bounds(places: Places) -> bool:
        """Return whether the samples at these places, the longest first, may be a micro-batch."""
        n_samples = len(places)
        if n_samples < 2:
            return True
        if n_samples > max_samples:
            return False
        if packing:
            of_samples = map(lengths.__getitem__, places)
            return sum(of_samples) <= max_tokens
        longest = lengths[places[0]]
        return n_samples * longest <= max_tokens

    split = split_padded
    if packing:
        split = split_packed
    fewest = fewest_groups(lengths, max_samples, max_tokens)
    n_groups = ceil(fewest / world_size) * world_size
    groups = split(lengths, n_groups)
    while not all(map(is_within_bounds, groups)):
        n_groups += world_size
        groups = split(lengths, n_groups)
    return [select(longest_first, places) for places in groups]


def select(samples: Samples, places: Places) -> Samples:
    return [samples[place] for place in places]


def fewest_groups(lengths: Ids, max_samples: int, max_tokens: int) -> int:
    """Return a number of micro-batches below which the bounds cannot hold: where to begin."""
    n_tokens = 0
    for length in lengths:
        n_tokens += min(length, max_tokens)  # a longer one stands alone
    by_samples = ceil(len(lengths) / max_samples)
    by_tokens = ceil(n_tokens / max_tokens)
    return max(by_samples, by_tokens)


def split_padded(lengths: Ids, n_groups: int) -> list[Places]:
    """Cut places in the longest-first order into groups of like length: little padding."""
    groups = []
    start = 0
    for i in range(1, n_groups + 1):
        end = i * len(lengths) // n_groups
        places = range(start, end)
        groups.append(places)
        start = end
    return groups


def split_packed(lengths: Ids, n_groups: int) -> list[Places]:
    """Balance the tokens, so that every rank has equally much to do; the longest go first."""
    groups = []
    by_tokens = []  # a heap of (tokens, samples, group): the smallest comes first
    for i in range(n_groups):
        groups.append([])
        by_tokens.append((0, 0, i))
    for place, length in enumerate(lengths):
        tokens, count, smallest = by_tokens[0]
        groups[smallest].append(place)
        grown = (tokens + length, count + 1, smallest)
        heapreplace(by_tokens, grown)
    return groups


# ---------------- Micro-batches -> tensors


class PackedLengths(NamedTuple):
    """Tokens of each sample in a packed row; a keyword of model(...) that reaches each layer."""

    prompt: Ids  # as the decoder, or the encoder, reads them
    label: Ids  # as an encoder-decoder's decoder reads them; else empty


class MicroBatch(NamedTuple):
    """A forward pass of a rank."""

    inputs: Options  # the keywords of model(...)
    targets: Tensor  # (B, T) of the decoder: the next token if it is the label's, or IGNORE_INDEX
    n_tokens: int  # padding included


IGNORE_INDEX = -100


def collate(samples: Samples, decoder_start_token_id: int | None, packing: bool) -> MicroBatch:
    """Make tensors.  decoder_start_token_id: an encoder-decoder's; None: the model is a decoder.

    A decoder with prompt p q and label a b reads `p q a`; targets are `-100 a b`.
    An encoder-decoder reads p q, its decoder `start a`; targets are `a b`.
    """
    is_decoder = decoder_start_token_id is None
    inputs = []
    decoder_inputs = []
    targets = []
    for sample in samples:
        shifted = sample.label[:-1]  # EOS is only predicted
        if is_decoder:
            inputs.append(sample.prompt + shifted)
            n_ignored = len(sample.prompt) - 1
            ignored = [IGNORE_INDEX] * n_ignored
            targets.append(ignored + sample.label)
        else:
            inputs.append(sample.prompt)
            decoder_inputs.append([decoder_start_token_id, *shifted])
            targets.append(sample.label)
    join = pad
    if packing:
        join = end_to_end
    tensors = {"input_ids": join(inputs)}
    if not is_decoder:
        tensors["decoder_input_ids"] = join(decoder_inputs)
    n_tokens = 0
    for ids in tensors.values():
        n_tokens += ids.numel()
    if is_decoder:
        n_tokens += len(samples)  # EOS counts, as in TrainSample.length
    lengths = [len(ids) for ids in inputs]
    if not packing:
        mask = [[1] * length for length in lengths]
        tensors["attention_mask"] = pad(mask)
        return MicroBatch(tensors, pad(targets, IGNORE_INDEX), n_tokens)
    label_lengths = [len(ids) for ids in decoder_inputs]
    tensors["packed_lengths"] = PackedLengths(lengths, label_lengths)
    if is_decoder:  # positions restart at each sample
        tensors["position_ids"] = end_to_end(map(range, lengths))
    return MicroBatch(tensors, end_to_end(targets), n_tokens)


def pad(rows: list[Ids], value: int = 0) -> Tensor:
    """Fill rows up on the right, to (B, T); padding is masked, so any token id will do."""
    width = max(map(len, rows))
    padded = []
    for row in rows:
        missing = width - len(row)
        padding = [value] * missing
        padded.append(row + padding)
    return torch.tensor(padded)


def end_to_end(rows: Iterable[Iterable[int]]) -> Tensor:
    """Join rows to one, (1, T)."""
    joined = itertools.chain.from_iterable(rows)
    row = list(joined)
    return torch.tensor([row])


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
            n_queries = q.shape[2]
            n_keys = k.shape[2]
            options["position_bias"] = position_bias[:, :, :n_queries, :n_keys]
        output, _ = sdpa_attention_forward(module, q, k, v, None, **options)
        outputs.append(output)
    return torch.cat(outputs, dim=1), None


AttentionInterface.register("packed", packed_attention)


def lengths_of_layer(module: nn.Module, lengths: PackedLengths) -> tuple[Ids, Ids]:
    """Return each sample's number of queries and of keys in an attention layer."""
    prompt, label = lengths
    if not label or not module.is_decoder:
        return prompt, prompt
    if module.is_causal:
        return label, label
    return label, prompt  # cross-attention


def set_position_bias(
    module: nn.Module, inputs: Inputs, options: Options
) -> tuple[Inputs, Options]:
    """Give T5's first layers the position bias of the longest sample, not of the whole row.

    A forward pre-hook.  The bias depends on distances alone: all samples' are corners of that one.
    """
    if options.get("position_bias") is not None:
        return inputs, options
    hidden = inputs[0]
    query_lengths, key_lengths = lengths_of_layer(module, options["packed_lengths"])
    n_queries = max(query_lengths)
    n_keys = max(key_lengths)
    if module.has_relative_attention_bias:
        bias = module.compute_bias(n_queries, n_keys, device=hidden.device)
    else:
        bias = hidden.new_zeros(1, module.n_heads, n_queries, n_keys)
    options["position_bias"] = bias
    return inputs, options


@contextmanager
def packed_rows(model: Model) -> Iterator[None]:
    """Within this the model reads packed rows."""
    with ExitStack() as stack:
        set_attention(model, "packed")
        stack.callback(set_attention, model, "sdpa")
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
    is_label = batch.targets != IGNORE_INDEX
    is_label = is_label.to(device)
    signature = inspect.signature(raw_model.forward)
    if len(is_label) == 1 and "logits_to_keep" in signature.parameters:
        _, positions = is_label.nonzero(as_tuple=True)
        output = model(**inputs, logits_to_keep=positions, use_cache=False)
        return output.logits.flatten(0, 1)  # of (1, N, V); [0] would copy its gradient
    head = raw_model.get_output_embeddings()

    def select_labels(module: nn.Module, inputs: Inputs) -> Tensor:
        return inputs[0][is_label]

    hook = head.register_forward_pre_hook(select_labels)
    try:
        output = model(**inputs, use_cache=False)
    finally:
        hook.remove()
    return output.logits
