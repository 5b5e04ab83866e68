"""What makes training fast and changes no result but which numbers a dropout mask drops: attention among the tokens of a packed sample,
and operations for a CPU.  train_loop.py opens `training_kernels` around an epoch; outside it the student is Hugging Face's own.

Shapes: T tokens of a row, H heads, W width of a head, N rows of a product.
"""

import contextlib
import ctypes
import functools
import mmap
import re
import sys
from pathlib import Path

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.pytorch_utils import Conv1D

# What attend_per_sample needs to know of the row that train_loop.collate_packed made last: its tokens -> the tokens of each sample
# (the prompts and the labels of an encoder-decoder are two rows)
PACKED = {}


@contextlib.contextmanager
def training_kernels(model, packing, products=False, plain=True):
    """While it is open, the student attends per sample (packing).  On a CPU, if it is plain (neither sharded nor compiled), it also draws
    its dropout faster, gets the gradient of a tied embedding row by row, and (products) multiplies in fp32 by oneDNN."""
    replaced = []
    hooks = []

    def replace(module, name, value):
        replaced.append((module, name, vars(module).get(name)))
        setattr(module, name, value)

    try:
        if packing:
            model.set_attn_implementation("per_sample")
        head = model.get_output_embeddings()
        for module in model.modules():
            if packing and hasattr(module, "compute_bias"):
                replace(
                    module,
                    "compute_bias",
                    functools.partial(bias_per_sample, module, module.compute_bias),
                )
            if not plain or next(model.parameters()).device.type != "cpu":
                continue
            if type(module) is torch.nn.Dropout and 0 < module.p < 1:
                replace(module, "forward", functools.partial(dropout_of, module))
            elif (
                type(module) is torch.nn.Embedding
                and module.weight is head.weight
                and module.weight.requires_grad
                and module.padding_idx is None
            ):
                if not hooks:
                    rows = []
                    hooks.append(
                        module.weight.register_post_accumulate_grad_hook(
                            functools.partial(add_rows, rows)
                        )
                    )
                replace(module, "forward", functools.partial(Lookup.apply, rows, module.weight))
            elif (
                products
                and torch.backends.mkldnn.is_available()
                and type(module) in (torch.nn.Linear, Conv1D)
            ):
                replace(module, "forward", functools.partial(product_of, module))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, name, before in reversed(replaced):
            vars(module).pop(name) if before is None else setattr(module, name, before)
        if packing:
            model.set_attn_implementation("sdpa")


# ---------------- Attention in a packed row


@torch.compiler.disable  # the lengths differ with every step
def attend_per_sample(
    module,
    query,
    key,
    value,
    attention_mask,
    position_bias=None,
    dropout=0.0,
    scaling=None,
    is_causal=None,
    **more,
):
    """Attention in a packed row, (1, H, T, W) -> (1, T, H, W): each sample among its own tokens.

    One call a sample costs the sum of their squared lengths; a mask over the row would cost the square of the sum.  On a GPU many small
    calls cost more than padding: there it is one, on padded samples."""
    queries = PACKED[query.shape[2]]
    keys = PACKED[key.shape[2]]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if in_one_call(query):
        return attend_padded(
            module,
            query,
            key,
            value,
            position_bias,
            queries,
            keys[: len(queries)],
            causal,
            dropout,
            scaling,
            **more,
        ), None
    if position_bias is None:
        biases = [None] * len(queries)
    elif isinstance(position_bias, list):  # of bias_per_sample: what lies ahead is masked there
        biases = position_bias
        causal = False
    else:
        biases = [row.split(keys, 3)[i] for i, row in enumerate(position_bias.split(queries, 2))]
    parts = zip(query.split(queries, 2), key.split(keys, 2), value.split(keys, 2), biases)
    if (
        dropout and query.device.type == "cpu" and query.shape[1] == key.shape[1]
    ):  # there, sdpa takes the long way for it, in fp32
        return torch.cat([attend(*part, causal, scaling, dropout) for part in parts], 1), None
    return torch.cat(
        [
            sdpa_attention_forward(module, q, k, v, None, dropout, scaling, causal, bias, **more)[0]
            for q, k, v, bias in parts
        ],
        1,
    ), None


AttentionInterface.register("per_sample", attend_per_sample)


def attend(query, key, value, bias, causal, scaling, p):
    """Attention of one sample with dropout, (1, H, T, W) -> (1, T, H, W).  bias: what is added to its scores, (1, H, T, T) or None."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if causal:
        bias = causal_mask(query.shape[2]) + (0 if bias is None else bias)
    if bias is None:
        scores = query[0] @ key[0].transpose(1, 2) * scaling
    else:
        scores = torch.baddbmm(
            bias.reshape(-1, *bias.shape[-2:]), query[0], key[0].transpose(1, 2), alpha=scaling
        )
    return (drop(scores.softmax(-1), p) @ value[0]).transpose(0, 1)[None]


def causal_mask(n):
    """(n, n): 0 where a token may look, -inf where it would look ahead."""
    return largest_causal_mask(-(-n // 256) * 256)[:n, :n]


@functools.lru_cache(maxsize=4)
def largest_causal_mask(n):
    return torch.full((n, n), -torch.inf).triu(1)


def in_one_call(x):
    return x.device.type != "cpu"


@functools.lru_cache(maxsize=8)  # once for all layers
def padded_places(lengths, device):
    """How samples that lie end to end in a row (T,) go to padded rows (B, n), and back.
    -> where in the row to find each token of these, any where there is padding (B, n); where in these, flat, to find each of the row (T,);
    and what of these is no padding (B, n)."""
    lengths, columns = torch.tensor(lengths)[:, None], torch.arange(max(lengths))
    real = columns < lengths
    return [
        x.to(device)
        for x in (
            (lengths.cumsum(0) - lengths + columns) * real,
            real.flatten().nonzero()[:, 0],
            real,
        )
    ]


def attend_padded(module, query, key, value, bias, queries, keys, causal, dropout, scaling, **more):
    """As attend_per_sample, in one call on samples padded on the right; queries, keys: their lengths."""
    (places, back, _), (key_places, _, real) = (
        padded_places(tuple(n), query.device) for n in (queries, keys)
    )
    query, key, value = (
        x[0]
        .index_select(1, where.flatten())
        .unflatten(1, where.shape)
        .transpose(0, 1)  # (B, H, n, W)
        for x, where in ((query, places), (key, key_places), (value, key_places))
    )
    if isinstance(bias, tuple):  # of bias_per_sample: what lies ahead is masked there
        bias = bias[0]
        ahead = True
    else:
        bias = (
            None
            if bias is None
            else bias[0][:, places[:, :, None], key_places[:, None]].transpose(0, 1)
        )
        ahead = False
    mask = None if causal else real[:, None, None]  # padding lies ahead of all that counts
    out, _ = sdpa_attention_forward(
        module, query, key, value, mask, dropout, scaling, causal and not ahead, bias, **more
    )  # (B, n, H, W)
    return out.flatten(0, 1).index_select(0, back)[None]


def bias_per_sample(module, compute, length, _, **more):
    """T5's position bias as a list, (1, H, T, T) for each sample.  It tells of distances alone, so all are corners of the longest's, and on
    a GPU that one alone is given, in a tuple."""
    bias = compute(max(PACKED[length]), max(PACKED[length]), **more)
    if module.is_causal:
        bias = bias + causal_mask(bias.shape[-1]).to(bias.device)
    if in_one_call(bias):
        return (bias,)
    corners = {n: bias[:, :, :n, :n].contiguous() for n in set(PACKED[length])}
    return [corners[n] for n in PACKED[length]]


# ---------------- On a CPU


def glibc():
    """-> the library, where it is what allocates"""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "mallopt") else None


def keep_freed_memory(largest=None):
    """Let glibc keep blocks that are freed, up to so many bytes (None: all): what it gives back to the kernel is zeroed page by page when it
    is taken again, which is up to 40% of the time of training and 5% of decoding."""
    if libc := glibc():
        libc.mallopt(
            *((-4, 0) if largest is None else (-3, largest))
        )  # M_MMAP_MAX, M_MMAP_THRESHOLD
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: none


def give_freed_memory_back():
    """Let glibc give back all that is free now."""
    if libc := glibc():
        libc.malloc_trim(0)


def mapped_files():
    """-> the addresses (first, end) of memory that is a file's with weights, none of them changed since."""
    if not glibc():
        return []
    found = re.findall(
        r"^(\w+)-(\w+) .*\.safetensors$(?:\n\w+:.*)*?\nAnonymous: +0 kB",
        Path("/proc/self/smaps").read_text(),
        re.MULTILINE,
    )
    return [
        (int(first, 16), int(end, 16)) for first, end in found
    ]  # Anonymous: pages that were written to are the file's no more


def forget(weights, mapped):
    """Take the pages of weights from memory that are one of the `mapped` files'; what is read of them again comes from there.
    -> whether all are a file's"""
    found = []
    for weight in weights:
        first = weight.data_ptr()
        end = weight.data_ptr() + weight.nbytes
        found.append(any(start <= first < end <= stop for start, stop in mapped))
        # the pages that are its own
        first = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
        end = end // mmap.PAGESIZE * mmap.PAGESIZE
        if found[-1] and first < end:
            glibc().madvise(
                ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED
            )
    return all(found)


def dropout_of(module, x):
    return drop(x, module.p) if module.training else x


def drop(x, p):
    """Dropout as torch's, which draws its masks number by number, in a fifth of the time: 16 random bits a number come four by four.
    So p is rounded to 1/65536, and what is kept is scaled by just that.  The mask takes one byte a number."""
    dropped = round(p * 65536)
    bits = (
        torch.empty(-(-x.numel() // 4), dtype=torch.int64)
        .random_(-(2**63), None)
        .view(torch.int16)[: x.numel()]
        .view(x.shape)
    )
    return x * (bits >= dropped - 32768).view(torch.uint8) * (65536 / (65536 - dropped))


class Lookup(torch.autograd.Function):
    """Embeddings (.., width) of ids (..), with the weight (V, width) of the head.  Their gradient is a few rows, which add_rows adds to
    the head's when that is there; torch would make it as large as the head's, and add the two, for each use of the embedding."""

    @staticmethod
    def forward(ctx, rows, weight, ids):
        """-> weight[ids]"""
        ctx.rows = rows
        ctx.ids = ids
        return torch.nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx, grad):
        """Keeps the gradient; that of the weight, which is not None elsewhere, comes after it."""
        ctx.rows.append((ctx.ids.flatten(), grad.flatten(0, -2)))
        return None, None, None


def add_rows(rows, weight):
    """After the head's gradient has been added to weight.grad: add the rows that Lookup kept."""
    for ids, grad in rows:
        weight.grad.index_add_(0, ids, grad.to(weight.grad.dtype))
    rows.clear()


class Product(torch.autograd.Function):
    """x (N, in) times a weight, (out, in) or transposed (in, out), plus bias (out): the same sums in fp32 by oneDNN, 5 to 30% faster for
    most shapes of a student than what torch takes for them on a CPU; the weight's gradient is torch's own, where neither wins."""

    @staticmethod
    def forward(ctx, x, weight, bias, transposed):
        """-> (N, out)"""
        ctx.save_for_backward(x, weight)
        ctx.bias = bias is not None
        ctx.transposed = transposed
        return linear(x, weight.t() if transposed else weight, bias)

    @staticmethod
    def backward(ctx, grad):
        """-> gradients of x, weight and bias"""
        x, weight = ctx.saved_tensors
        return (
            linear(grad, weight if ctx.transposed else weight.t(), None)
            if ctx.needs_input_grad[0]
            else None,
            x.t() @ grad if ctx.transposed else grad.t() @ x,
            grad.sum(0) if ctx.bias else None,
            None,
        )


def linear(x, weight, bias):
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def product_of(layer, x):
    """x (.., in) -> (.., out) of a layer; Conv1D, GPT-2's, holds its weight transposed."""
    product = Product.apply(
        x.reshape(-1, x.shape[-1]), layer.weight, layer.bias, type(layer) is Conv1D
    )
    return product.view(*x.shape[:-1], product.shape[-1])
