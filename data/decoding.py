"""What makes decoding fast and changes no token: a cache that rows enter and leave in place, and weights laid out for a CPU.
evaluate.py's `decode` uses it; it imports torch, so it is imported there.

Shapes: B rows that are decoded side by side, H heads, T columns so far, D width of a head.  All rows of a decoder end in column T
and are padded on the left; what an encoder has read begins in column 0 and is padded on the right.
"""
import collections
import contextlib
import functools

import torch
from transformers.cache_utils import DynamicLayer
from transformers.pytorch_utils import Conv1D

# ---------------- The cache of the rows that are decoded side by side


class Room(DynamicLayer):
    """One layer's keys and values (B, H, T, D), the corner of larger tensors, so that a token, or a row, is written where there is
    room.  As Hugging Face's layers come, they copy all they hold at every token, which can take longer than the model."""

    def __init__(self, layer, rows, columns):
        """Room for so many rows and columns (more is made when needed), of the kind that `layer` holds."""
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        _, heads, _, width = layer.keys.shape
        self.room = {name: layer.keys.new_empty(rows, heads, columns, width) for name in ("keys", "values")}
        self.see(0, 0)

    def see(self, rows, columns):
        """Hold this corner; what is in it, stays."""
        for name, room in self.room.items():
            setattr(self, name, room[:rows, :, :columns])

    def reserve(self, rows, columns):
        """Make room for so many rows and columns in all."""
        for name, room in self.room.items():
            if rows > len(room) or columns > room.shape[2]:
                old, more = getattr(self, name), columns + max(64, columns // 4) if columns > room.shape[2] else room.shape[2]
                self.room[name] = room.new_empty(max(rows, len(room)), room.shape[1], more, room.shape[3])
                self.room[name][:len(old), :, :old.shape[2]] = old

    def update(self, keys, values, *_, **__):
        """Append new tokens (B, H, 1, D).  -> all keys and values."""
        rows, old = len(keys), self.keys.shape[2]
        self.reserve(rows, old + keys.shape[2])
        self.see(rows, old + keys.shape[2])
        self.keys[:, :, old:], self.values[:, :, old:] = keys, values
        return self.keys, self.values

    def enter(self, layer, left):
        """Put the rows that `layer` holds below those here, which are at least as long; padding is zeros."""
        rows, new, more = len(self.keys), layer.keys.shape[2], len(layer.keys)
        width = self.keys.shape[2] if rows else new
        self.reserve(rows + more, width)
        for name, room in self.room.items():
            part, first = room[rows:rows + more, :, :width], width - new if left else 0
            part[:, :, first:first + new] = getattr(layer, name)
            part[:, :, :first], part[:, :, first + new:] = 0, 0
        self.see(rows + more, width)

    def drop(self, columns):
        """Take the first so many columns, which are padding in all rows, away."""
        rows, old = len(self.keys), self.keys.shape[2]
        for name, room in self.room.items():
            room[:rows, :, :old - columns] = room[:rows, :, columns:old].clone()
        self.see(rows, old - columns)

    def reorder_cache(self, rows):
        """Go on with these rows (B',) alone, in this order; in place, where no row comes from before its new place."""
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero().squeeze(1)
        for name in self.room:
            old = getattr(self, name)
            old[moved] = old[rows[moved]]
        self.see(len(rows), self.keys.shape[2])


def layers_of(state):
    """-> [(layers, whether their rows are padded on the left)] of a Hugging Face cache: self-attention, then cross-attention."""
    cache = state["past_key_values"]
    if hasattr(cache, "cross_attention_cache"):
        return [(cache.self_attention_cache.layers, True), (cache.cross_attention_cache.layers, False)]
    return [(cache.layers, True)]


def masks_of(state):
    """-> [(name, whether its rows are padded on the left)], in the order of layers_of."""
    return [("decoder_attention_mask", True), ("attention_mask", False)] if "decoder_attention_mask" in state else [("attention_mask", True)]


def has_plain_cache(state):
    """Whether all layers keep keys and values of all tokens: no windows, no linear attention."""
    return all(isinstance(layer, Room) or type(layer) is DynamicLayer and layer.is_initialized for layers, _ in layers_of(state) for layer in layers)


def can_start_late(model, family, state):
    """Whether rows may enter beside others that have tokens already.  A decoder is told its positions, and T5's are relative; others'
    (BART's) are counted from the first column."""
    return has_plain_cache(state) and (family == "decoder" or hasattr(model.config, "relative_attention_num_buckets"))


def enter(state, more, rows):
    """Put the rows of `more`, which have just been read, below those of `state` (None: they are the first of so many rows to come).
    Columns that have become padding in all rows go.  -> state"""
    entering, (own, _), first = [list(layers) for layers, _ in layers_of(more)], masks_of(more)[0], state is None
    if first:
        state = {name: value if name == "past_key_values" else value[:0] for name, value in more.items()}
        for layers, left in layers_of(state):
            layers[:] = [Room(layer, rows, layer.keys.shape[2] + 128 * left) for layer in layers]
    elif (empty := int(state[own].any(0).long().argmax())) > state[own].shape[1] // 4:
        state[own] = state[own][:, empty:]
        for room in layers_of(state)[0][0]:
            room.drop(empty)
    for (rooms, left), layers in zip(layers_of(state), entering):
        for room, layer in zip(rooms, layers):
            room.enter(layer, left)
    for name, left in masks_of(state):
        width = more[name].shape[1] if first else state[name].shape[1]
        padding = (width - more[name].shape[1], 0) if left else (0, width - more[name].shape[1])
        state[name] = torch.cat([state[name][:, :width], torch.nn.functional.pad(more[name], padding)])
    return state


def keep(state, rows):
    """Go on with these rows (B',) only; a row may be taken several times from a state that has just been read."""
    for name, _ in masks_of(state):
        state[name] = state[name][rows]
    state["past_key_values"].reorder_cache(rows)  # every kind of layer has this one, linear attention too


# ---------------- Products

@contextlib.contextmanager
def packed_products(model):
    """While it is open, layers on a CPU multiply by weights laid out once in the blocks that oneDNN computes in, which it would
    otherwise do anew at every token: the same sums, 1.3 to 2 times as fast for the 16 to 128 rows of a step.  The plain layout of a
    weight that nothing else uses goes meanwhile, so that it is not there twice."""
    users = collections.Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    layers = [layer for layer in model.modules() if type(layer) in (torch.nn.Linear, Conv1D) and layer.weight.device.type == "cpu"
              and layer.weight.dtype in (torch.float32, torch.bfloat16) and torch.backends.mkldnn.is_available()
              and not model._compiled_call_impl]  # a compiled model would be compiled again
    packs, packed_weights = [], {id(layer.weight) for layer in layers}
    try:
        for parameter in model.parameters() if layers else ():  # after this, nothing needs the file that weights were mapped from
            if id(parameter) not in packed_weights or users[id(parameter)] > 1:
                parameter.data = parameter.data.clone()
        for layer in layers:
            weight = rows_are_outputs(layer)
            packs.append(torch.ops.mkldnn._reorder_linear_weight(weight, 64))
            layer.forward = functools.partial(packed_product, packs[-1], layer.bias, len(weight))
            if users[id(layer.weight)] == 1:
                layer.weight.data = weight.new_empty(0)
        yield
    finally:
        for layer, packed in zip(layers, packs):
            vars(layer).pop("forward", None)  # Ctrl-C may have come before it was set
            if not layer.weight.numel():
                layer.weight.data = packed.to_dense()
                layer.weight.data = rows_are_outputs(layer)


def rows_are_outputs(layer):
    """-> (out, in) weight of a layer; Conv1D, GPT-2's, holds it the other way round (and the same again turns it back)."""
    return layer.weight.detach().t().contiguous() if type(layer) is Conv1D else layer.weight.detach()


def packed_product(packed, bias, width, x):
    """x (.., in) -> (.., width), with a weight of torch.ops.mkldnn._reorder_linear_weight."""
    return torch.ops.mkldnn._linear_pointwise(x.reshape(-1, x.shape[-1]), packed, bias, "none", [], "").view(*x.shape[:-1], width)
