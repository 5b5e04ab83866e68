"""Packing: samples end to end in a row, attention among the tokens of each, logits at labels alone.

Shapes: B rows of a micro-batch, T tokens of a row, N label tokens in all, H width, V vocabulary.
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, BatchEncoding
from transformers import PreTrainedModel as Model
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from batches import IGNORE_INDEX, MicroBatch, PackedLengths


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
