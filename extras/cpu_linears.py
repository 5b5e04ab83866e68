"""Linear layers that decode faster on a CPU: their weights are laid out once as oneDNN computes.

GPT-2 small decodes 1.6 x as fast so, T5-small 1.3 x (LOG.md).  The operators are private to torch;
where they are missing, layers stay as they are.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import mmap
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel as Model
from transformers.pytorch_utils import Conv1D


@contextlib.contextmanager
def prepacked_linears(model: Model, layers: list[torch.nn.Module]) -> Iterator[None]:
    """Within this, linear layers multiply by weights laid out once in oneDNN's own layout.

    Otherwise they are laid out anew at every token.  The plain layout of a weight that nothing else
    uses is freed meanwhile.  layers: of layers_that_run.
    """
    users: collections.Counter[int] = collections.Counter()
    for module in model.modules():
        users.update(map(id, module.parameters(recurse=False)))
    packs: list[Tensor] = []
    try:
        mapped = mmapped_weight_ranges()
        for layer in layers:
            width = len(out_by_in(layer))
            packs.append(torch.ops.mkldnn._reorder_linear_weight(out_by_in(layer), 64))
            layer.forward = functools.partial(linear_prepacked, packs[-1], layer.bias, width)
            release_mmapped_pages(layer.weight, mapped)
            if users[id(layer.weight)] == 1:
                layer.weight.data = layer.weight.data.new_empty(0)
        yield
    finally:
        with torch.inference_mode(False):  # the weights may be trained on
            for layer in reversed(layers[: len(packs)]):
                packed = packs.pop()  # one by one, so that hardly any is there twice
                vars(layer).pop("forward", None)  # Ctrl-C may have come before it was set
                if not layer.weight.numel():
                    layer.weight.data = packed.to_dense()
                    layer.weight.data = out_by_in(layer).contiguous()


def layers_that_run(model: Model, run: Callable[[], Any]) -> list[torch.nn.Module]:
    """Return the packable layers whose forward is called by run.

    Of others a model reads the weight itself: of Mamba's dt_proj, of routers.
    """
    ran = set()
    handles = []
    layers = packable_layers(model)
    for layer in layers:
        handles.append(layer.register_forward_pre_hook(lambda layer, _: ran.add(layer)))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return [layer for layer in layers if layer in ran]


def packable_layers(model: Model) -> list[torch.nn.Module]:
    """Return the layers that oneDNN can multiply by; none of a compiled model."""
    if model._compiled_call_impl or not torch.backends.mkldnn.is_available():
        return []
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return []
    layers = []
    for layer in model.modules():
        if type(layer) not in (torch.nn.Linear, Conv1D) or "forward" in vars(layer):
            continue
        if layer.weight.dtype in (torch.float32, torch.bfloat16):
            layers.append(layer)
    return layers


def out_by_in(layer: torch.nn.Module) -> Tensor:
    """Return the weight as (out, in); GPT-2's Conv1D holds (in, out)."""
    weight = layer.weight.detach()
    if type(layer) is Conv1D:
        return weight.t()
    return weight


def linear_prepacked(packed: Tensor, bias: Tensor | None, width: int, x: Tensor) -> Tensor:
    """Return (.., width) of x (.., in), with a weight of mkldnn._reorder_linear_weight."""
    *shape, inputs = x.shape
    rows = x.reshape(-1, inputs)
    output = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
    return output.view(*shape, width)


def mmapped_weight_ranges() -> list[tuple[int, int]]:
    """Return the addresses (first, end) of mapped weight files that were never written to."""
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        return []
    # "7f00-7f80 r--p ... model.safetensors", then a line for each figure: "Anonymous:    0 kB"
    entry = r"^(\w+)-(\w+) .*\.safetensors$(?:\n\w+:.*)*?\nAnonymous: +0 kB"
    text = smaps.read_text()
    ranges = []
    for first, end in re.findall(entry, text, re.MULTILINE):
        ranges.append((int(first, 16), int(end, 16)))
    return ranges


def release_mmapped_pages(weight: Tensor, mapped: list[tuple[int, int]]) -> None:
    """Free the memory of a weight within a mapped file; it is read from there again if needed.

    (Of all other memory this would clear the numbers.)  Else a packed weight is there twice.
    """
    end = weight.data_ptr() + weight.nbytes
    end -= end % mmap.PAGESIZE
    first = weight.data_ptr()
    first += -first % mmap.PAGESIZE
    size = end - first
    if size <= 0:
        return
    for start, stop in mapped:
        if start <= first and end <= stop:
            libc = ctypes.CDLL(None)
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), mmap.MADV_DONTNEED)
