"""What makes decoding fast and changes no token: a cache in parts that need no padding, attention of one query, the likeliest word
without the whole head in fp32, and weights laid out for a CPU.  evaluate.py's `decode` uses it; it imports torch, so it is imported there.

Shapes: B rows that are decoded side by side, b of them in a part, H heads, T columns so far, D width of a head.
"""
import collections
import contextlib
import functools
import mmap
import weakref

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

from data import kernels

# ---------------- The cache: rows that were read together stay together


class Part:
    """Keys and values (b, H, T, D) of rows that were read together: they are of like length and grow alike, so that hardly a column is
    padding, whatever the other rows' lengths.  Both are corners of larger tensors, so that a token is written where there is room:
    Hugging Face's layers copy all they hold at every token, which can take longer than the model."""

    def __init__(self, layer, mask, growing):
        """What `layer` holds.  mask (b, 1, 1, T): what is added to scores, or None; growing: whether tokens will come."""
        self.keys, self.values, self.mask = layer.keys, layer.values, mask
        self.rows, self.columns, self.spare, self.room = len(layer.keys), layer.keys.shape[2], 16 * growing, None
        self.move([*range(self.rows)])

    def corners(self):
        """-> keys and values (b, H, T, D)"""
        return self.keys[:self.rows, :, :self.columns], self.values[:self.rows, :, :self.columns]

    def need(self, rows):
        """-> the numbers that so many rows take, with some columns to spare"""
        return 2 * rows * self.keys[0, :, 0].numel() * (self.columns + self.spare)

    def move(self, rows):
        """Go on with these rows, each as often as it is named: in the room they are in, if that is large enough and at most half as large
        again, where rows that left make room for columns; or else in a new one."""
        b, old, (_, heads, _, width) = len(rows), self.corners(), self.keys.shape
        fits = self.room is not None and self.need(b) <= len(self.room) <= 1.5 * self.need(b)
        if fits or rows != [*range(self.rows)]:  # what would be written over, or is not all there is, is copied first
            old = [corner[rows] for corner in old]
        if not fits:
            self.room = new_room(self.need(b), self.keys)
        columns = len(self.room) // (2 * b * heads * width)
        self.keys, self.values = self.room[:2 * b * heads * columns * width].view(2, b, heads, columns, width)
        if sums_itself(self.keys) and TURNED:
            self.values = self.values.view(b, heads, width, columns).transpose(2, 3)
        self.rows, self.mask = b, None if self.mask is None else self.mask[rows]
        for new, corner in zip(self.corners(), old):
            new.copy_(corner)

    def append(self, keys, values):
        """Add a token (b, H, 1, D) to each row."""
        if self.columns == self.keys.shape[2]:
            self.move([*range(self.rows)])
        self.columns += 1
        for corner, new in zip(self.corners(), (keys, values)):
            corner[:, :, -1:] = new

    def keep(self, rows):
        """Go on with these rows alone, each at its place already or from behind them all."""
        if len(self.room) > 1.5 * self.need(len(rows)):
            return self.move(rows)
        for place, row in enumerate(rows):
            if place != row:
                self.keys[place], self.values[place] = self.keys[row], self.values[row]
        self.rows, self.mask = len(rows), None if self.mask is None else self.mask[rows]

    def attend(self, query, bias, scaling):
        """Attention of one query a row, (b, H', 1, D) -> the same shape; H' is a multiple of H.  bias (1, H', 1, T): added to scores."""
        (keys, values), mask, (b, heads, _, width) = self.corners(), self.mask, query.shape
        shape = b, keys.shape[1], -1, self.columns  # of scores: (b, H, H' / H, T)
        bias = None if bias is None else bias.view(1, *shape[1:])
        if sums_itself(keys):
            query = (query if scaling == 1 else query * scaling).reshape(b * shape[1], -1, width)
            scores = product(query, keys.flatten(0, 1).transpose(1, 2))
            if bias is not None:
                scores.view(shape).add_(bias)
            if mask is not None:
                scores.view(shape)[..., :mask.shape[3]] += mask
            out = product(scores.softmax(-1), values.flatten(0, 1))
        else:
            mask = None if mask is None else torch.nn.functional.pad(mask, (0, self.columns - mask.shape[3]))
            bias = mask if bias is None else bias if mask is None else mask + bias
            out = torch.nn.functional.scaled_dot_product_attention(query.reshape(*shape[:3], width), keys, values, bias, scale=scaling)
        return out.reshape(b, heads, 1, width)


# MKL multiplies a single row fastest as rows @ others on Intel's processors, but on AMD's as the transpose of both, with values that lie as
# (b, H, D, T): Intel takes twice the time for that
TURNED = "AMD" in torch.cpu.get_capabilities().get("cpu_name", "")


def product(rows, others):
    """rows (N, g, K) @ others (N, K, M) -> (N, g, M), in the order that is fastest for few rows g."""
    return torch.bmm(others.transpose(1, 2), rows.transpose(1, 2)).transpose(1, 2) if TURNED else torch.bmm(rows, others)


def sums_itself(x):
    """Whether attention is two products and a softmax: for one query in fp32 they take half the time of torch's attention on AMD's
    processors, and no more than it on Intel's."""
    return x.dtype == torch.float32


def new_room(count, like):
    """-> a tensor of so many numbers.  It has pages of its own, which go back as soon as it is freed: among other blocks, rooms of
    all sizes would leave gaps as large as themselves."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_empty(count)
    try:
        pages = mmap.mmap(-1, count * like.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as e:  # files.within_memory knows this one
        raise MemoryError(f"the cache's {count * like.element_size()} bytes: {e}") from None
    pages.madvise(mmap.MADV_HUGEPAGE)  # the kernel zeroes these four times as fast
    return torch.frombuffer(pages, dtype=like.dtype)


class Parts(DynamicLayer):
    """One layer of a cache, in parts.  What it gives a model as keys and values stands for them: no numbers, but the right shape and, for
    `attend`, the parts."""

    def __init__(self, layer, mask, growing):
        """What `layer` holds is the only part.  growing: its rows will all end in the same column, or else they begin in the same."""
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.growing, self.parts = growing, [Part(layer, mask, growing)]
        self.heads, self.width = layer.keys.shape[1], layer.keys.shape[3]
        self.show()

    def show(self):
        """Make what stands for keys and values (B, H, T, D); T is that of the longest part."""
        shape = sum(part.rows for part in self.parts), self.heads, max((part.columns for part in self.parts), default=0), self.width
        self.keys = self.values = torch.full((), torch.nan, dtype=self.dtype, device=self.device).expand(shape)
        self.keys.parts = weakref.proxy(self)  # a circle would be freed late

    def update(self, keys, values, *_, **__):
        """Append new tokens (B, H, 1, D).  -> what stands for all keys and values."""
        rows = [part.rows for part in self.parts]
        for part, *new in zip(self.parts, keys.split(rows), values.split(rows)):
            part.append(*new)
        self.show()
        return self.keys, self.values

    def keep(self, kept):
        """Go on with these rows of each part."""
        self.parts = [part for part, rows in zip(self.parts, kept) if rows]
        for part, rows in zip(self.parts, filter(None, kept)):
            if len(rows) < part.rows:
                part.keep(rows)
        self.show()

    def attend(self, query, bias, scaling):
        """Attention of one query a row, (B, H', 1, D) -> the same shape.  bias (1, H', 1, T): added to scores."""
        outs = []
        for part, some in zip(self.parts, query.split([part.rows for part in self.parts])):
            own = bias if bias is None else bias[..., -part.columns:] if self.growing else bias[..., :part.columns]
            outs.append(part.attend(some, own, scaling))
        return torch.cat(outs)


def attend(module, query, key, value, attention_mask, scaling=None, position_bias=None, **more):
    """Attention, (B, H, .., D) -> (B, .., H, D): of one query in the parts of a layer; else Hugging Face's, which leaves a mark on the
    keys: where those in the cache have it, they come here as they are."""
    if hasattr(key, "parts"):
        return key.parts.attend(query, position_bias, query.shape[-1] ** -0.5 if scaling is None else scaling).transpose(1, 2), None
    key.attended = True
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, position_bias=position_bias, **more)


AttentionInterface.register("in_parts", attend)
AttentionMaskInterface.register("in_parts", sdpa_mask)


@contextlib.contextmanager
def attention_in_parts(model):
    """While it is open, the model attends by `attend`, unless its attention is not torch's or it is compiled, or it is not on a CPU: a GPU
    has nothing to gain from less padding while it waits for its many small orders (an H200 takes up to four times as long for parts)."""
    able = model.device.type == "cpu" and model.config._attn_implementation == "sdpa" and not model._compiled_call_impl
    try:
        if able:
            model.set_attn_implementation("in_parts")
        yield
    finally:
        if able:
            model.set_attn_implementation("sdpa")


# ---------------- The state of a batch: the cache ("past_key_values"), "positions" (B,) of the next tokens, masks of a cache not in parts

def layers_of(state):
    """-> [(layers, mask, whether tokens will come)] of a Hugging Face cache: self-attention, then cross-attention."""
    cache, own, other = state["past_key_values"], state.get("decoder_attention_mask"), state.get("attention_mask")
    if hasattr(cache, "cross_attention_cache"):
        return [(cache.self_attention_cache.layers, own, True), (cache.cross_attention_cache.layers, other, False)]
    return [(cache.layers, other, True)]


def in_parts(state):
    """Whether its cache is in parts."""
    return isinstance(layers_of(state)[0][0][0], Parts)


def bytes_a_token(state):
    """-> what a token of a row takes of its cache, (b, H, T, D) a layer; 0 if no layer keeps tokens."""
    kinds = [[2 * layer.keys.shape[1] * layer.keys.shape[3] * layer.dtype.itemsize for layer in layers if getattr(layer, "keys", None) is not None]
             for layers, *_ in layers_of(state)]
    return sum(map(sum, kinds)) // len(kinds)


def into_parts(state):
    """Make one part of what has just been read, or leave it, if a layer does not keep keys and values of all tokens (windows, linear
    attention) or its model does not give them to `attend` as they are.  -> state"""
    if not all(type(layer) is DynamicLayer and hasattr(layer.keys, "attended") for layers, *_ in layers_of(state) for layer in layers):
        return state
    for layers, mask, growing in layers_of(state):
        mask = None if mask.all() else torch.where(mask == 0, -torch.inf, 0.0).to(layers[0].keys.dtype)[:, None, None]
        for place, layer in enumerate(layers):  # one by one, so that hardly any is there twice
            layers[place] = Parts(layer, mask, growing)
    return {"past_key_values": state["past_key_values"], "positions": state["positions"]}


def can_start_late(model, family, state):
    """Whether rows may enter beside others that have tokens already.  A decoder is told its positions, and T5's are relative; others'
    (BART's) are counted from the first column."""
    return in_parts(state) and (family == "decoder" or hasattr(model.config, "relative_attention_num_buckets"))


def enter(state, read):
    """Put the rows of `read` behind those of `state`; both are in parts."""
    for (layers, *_), (entering, *_) in zip(layers_of(state), layers_of(read)):
        for layer, more in zip(layers, entering):
            layer.parts, more.parts = layer.parts + more.parts, []
            layer.show()
    state["positions"] = torch.cat([state["positions"], read["positions"]])


def take(state, rows):
    """Go on with these rows (B',) of what has just been read, each as often as it is named."""
    for name in state.keys() - {"past_key_values"}:
        state[name] = state[name][rows]
    if not in_parts(state):
        return state["past_key_values"].reorder_cache(rows)  # every kind of layer has this one, linear attention too
    for layers, *_ in layers_of(state):
        for layer in layers:
            layer.parts[0].move(rows.tolist())
            layer.show()


def keep(state, going):
    """Go on with these rows alone (their places, ascending).  -> their places in the order they now have"""
    if not in_parts(state):
        take(state, torch.tensor(going, device=state["positions"].device))
        return going
    first, order, kept = 0, [], []
    for part in layers_of(state)[0][0][0].parts:
        mine = [place - first for place in going if first <= place < first + part.rows]
        last = [row for row in mine if row >= len(mine)]  # these fill the gaps, so that few rows move
        kept.append([row if row in mine else last.pop() for row in range(len(mine))])
        order += [first + row for row in kept[-1]]
        first += part.rows
    for layers, *_ in layers_of(state):
        for layer in layers:
            layer.keep(kept)
    state["positions"] = state["positions"][order]
    return order


# ---------------- The likeliest word

GROUP = 32  # words whose scores are looked at together first


class Likeliest:
    """The word with the largest logit for each row, exactly, in less than half the time of a head in fp32 and a quarter of the memory of
    its packed copy: the head's product is done in 8 bits, and the words it leaves in doubt, a few a row, are multiplied in fp32."""

    def __init__(self, head):
        """head: a Linear without bias, of weight (V, K)"""
        self.head, weight = head, head.weight.detach()
        self.mean = weight.mean(0)  # what all words have in common changes no order, but would cost digits
        kept = [in_8_bits(block - self.mean) for block in weight.split(1024)]  # block by block, so that little is there twice
        words, scales, sizes, losses = map(torch.cat, zip(*kept))
        order = sizes.argsort()
        order = torch.cat([order, order[-1:].expand(-len(order) % GROUP)]).view(-1, GROUP)  # a row for each group: words of like size
        self.sizes = torch.stack([sizes[order].amax(1), losses[order].amax(1)])  # (2, groups)
        self.words = order.t().flatten()  # the words of a group lie V / GROUP apart, which finds the largest fastest
        self.rough, self.scales = torch.ops.onednn.qlinear_prepack(words[self.words], None), scales[self.words, 0]
        self.zeros = torch.zeros_like(self.words, dtype=torch.int32)

    def __call__(self, hidden):
        """hidden (B, K) -> the largest logits (B,), not finite where one is no number, and their words (B,)"""
        weight, (near, scale, size, lost) = self.head.weight, in_8_bits(hidden)
        scores = torch.ops.onednn.qlinear_pointwise(near.view(torch.uint8) + 128, 1.0, 128, self.rough, self.scales, self.zeros, None, 1.0, 0,
                                                    torch.bfloat16, "none", [], "").unflatten(1, (GROUP, -1))  # (B, GROUP, groups), / scale
        groups = scores.amax(1)
        # The logit of the word that seems likeliest is surpassed by none that is less by more than sums can be off: by what rounding took from
        # their factors (Cauchy-Schwarz), by 2^-24 of all there is at each step, and by 2^-8 as they were rounded to bf16
        rows, group = torch.arange(len(hidden)), groups.argmax(1)
        seeming = self.words[scores[rows, :, group].argmax(1) * groups.shape[1] + group]
        least = (hidden * (weight[seeming] - self.mean)).sum(1)
        errors = torch.stack([lost + hidden.shape[1] * 2**-23 * size, size + lost], 1) @ self.sizes  # (B, groups)
        def may_surpass(scores, scale, error, least):
            scores = scores * scale
            return ~(scores + 0.008 * scores.abs() + error < least)  # so said, it is true of what is no number
        row, group = may_surpass(groups, scale, errors, least[:, None]).nonzero(as_tuple=True)
        some, place = may_surpass(scores[row, :, group], scale[row], errors[row, group, None], least[row, None]).nonzero(as_tuple=True)
        row, word = row[some], self.words[place * groups.shape[1] + group[some]]
        if len(row) > 128 * len(hidden):
            return (hidden @ weight.t()).max(1)
        logits = (hidden[row] * weight[word]).sum(1)
        best = torch.full_like(least, -torch.inf).scatter_reduce_(0, row, logits, "amax")
        first = torch.where(logits == best[row], word, len(weight))  # of equals the first, as argmax
        return best, torch.full_like(best, len(weight) - 1, dtype=torch.long).scatter_reduce_(0, row, first, "amin")


def in_8_bits(x):
    """x (N, K) -> whole numbers from -127 to 127 (N, K), the scale (N, 1) that makes x of them, and norms (N,): of x, and of what is lost."""
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    near = (x / scale).round()
    return near.to(torch.int8), scale, x.norm(dim=1), (x - near * scale).norm(dim=1)


@contextlib.contextmanager
def likeliest_word(model):
    """While it is open, `model` gives in place of logits what its head would multiply, and a Likeliest that knows the head makes words of it;
    or None comes, and nothing is changed: on a device that is not a CPU with products in 8 bits, or where something is done to the logits
    afterwards."""
    head, able = model.get_output_embeddings(), torch.cpu.get_capabilities()
    if type(head) is not torch.nn.Linear or head.bias is not None or head.weight.device.type != "cpu" or head.weight.dtype != torch.float32 \
            or not (able.get("avx512_vnni") or able.get("amx_int8")) or not torch.backends.mkldnn.is_available() or model._compiled_call_impl:
        yield None
        return
    def mark(hidden):
        logits = hidden.new_zeros(1).expand(*hidden.shape[:-1], len(head.weight))
        logits.untouched = True  # what comes out of the model with this mark is what its head gave
        return logits
    head.forward, ids = mark, torch.zeros(1, 1, dtype=torch.long)
    try:
        with torch.no_grad():
            out = model(input_ids=ids, use_cache=False, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})).logits
        del head.forward
        if hasattr(out, "untouched"):
            head.forward = lambda hidden: hidden
        yield Likeliest(head) if hasattr(out, "untouched") else None
    finally:
        vars(head).pop("forward", None)


# ---------------- Products

@contextlib.contextmanager
def packed_products(model):
    """While it is open, layers on a CPU multiply by weights laid out once in the blocks that oneDNN computes in, which it would
    otherwise do anew at every token: the same sums, 1.3 to 2 times as fast for the 16 to 128 rows of a step.  The plain layout of a
    weight that nothing else uses goes meanwhile, so that it is not there twice."""
    users = collections.Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    layers = [layer for layer in model.modules() if type(layer) in (torch.nn.Linear, Conv1D) and layer.weight.device.type == "cpu"
              and layer.weight.dtype in (torch.float32, torch.bfloat16) and torch.backends.mkldnn.is_available()
              and "forward" not in vars(layer) and not model._compiled_call_impl]  # a compiled model would be compiled again
    packs, packed_weights = [], {id(layer.weight) for layer in layers}
    try:
        files = kernels.mapped_files() if layers else []
        for parameter in model.parameters() if layers else ():  # after this, nothing needs the file that weights were mapped from, or little
            if (id(parameter) not in packed_weights or users[id(parameter)] > 1) and not kernels.forget([parameter], files):
                parameter.data = parameter.data.clone()
        for layer in layers:
            packs.append(torch.ops.mkldnn._reorder_linear_weight(rows_are_outputs(layer), 64))
            layer.forward = functools.partial(packed_product, packs[-1], layer.bias, len(rows_are_outputs(layer)))
            if users[id(layer.weight)] == 1:
                kernels.forget([layer.weight], files)
                layer.weight.data = layer.weight.data.new_empty(0)
        yield
    finally:
        for layer in layers[:len(packs)][::-1]:
            packed = packs.pop()
            vars(layer).pop("forward", None)  # Ctrl-C may have come before it was set
            if not layer.weight.numel():
                layer.weight.data = packed.to_dense()
                layer.weight.data = rows_are_outputs(layer).contiguous()


def rows_are_outputs(layer):
    """-> (out, in) weight of a layer; Conv1D, GPT-2's, holds it the other way round (and the same again turns it back)."""
    return layer.weight.detach().t() if type(layer) is Conv1D else layer.weight.detach()


def packed_product(packed, bias, width, x):
    """x (.., in) -> (.., width), with a weight of torch.ops.mkldnn._reorder_linear_weight."""
    return torch.ops.mkldnn._linear_pointwise(x.reshape(-1, x.shape[-1]), packed, bias, "none", [], "").view(*x.shape[:-1], width)
