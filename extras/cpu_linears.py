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
    modules = list(model.modules())
    users = collections.Counter(id(p) for m in modules for p in m.parameters(recurse=False))
    freed = {id(layer.weight) for layer in layers if users[id(layer.weight)] == 1}
    packs: list[Tensor] = []
    try:
        mapped = mmapped_weight_ranges()
        for layer in layers:
            width = len(out_by_in(layer))
            packs.append(torch.ops.mkldnn._reorder_linear_weight(out_by_in(layer), 64))
            layer.forward = functools.partial(linear_prepacked, packs[-1], layer.bias, width)
            release_mmapped_pages(layer.weight, mapped)
            if id(layer.weight) in freed:
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
    return [
        layer
        for layer in model.modules()
        if type(layer) in (torch.nn.Linear, Conv1D)
        and layer.weight.dtype in (torch.float32, torch.bfloat16)
        and "forward" not in vars(layer)
    ]


def out_by_in(layer: torch.nn.Module) -> Tensor:
    """Return the weight as (out, in); GPT-2's Conv1D holds (in, out)."""
    weight = layer.weight.detach()
    if type(layer) is Conv1D:
        return weight.t()
    return weight


def linear_prepacked(packed: Tensor, bias: Tensor | None, width: int, x: Tensor) -> Tensor:
    """Return (.., width) of x (.., in), with a weight of mkldnn._reorder_linear_weight."""
    rows = x.reshape(-1, x.shape[-1])
    output = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
    return output.view(*x.shape[:-1], width)


def mmapped_weight_ranges() -> list[tuple[int, int]]:
    """Return the addresses (first, end) of mapped weight files that were never written to."""
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        return []
    # "7f00-7f80 r--p ... model.safetensors", then a line for each figure: "Anonymous:    0 kB"
    entry = r"^(\w+)-(\w+) .*\.safetensors$(?:\n\w+:.*)*?\nAnonymous: +0 kB"
    found = re.findall(entry, smaps.read_text(), re.MULTILINE)
    return [(int(first, 16), int(end, 16)) for first, end in found]


def release_mmapped_pages(weight: Tensor, mapped: list[tuple[int, int]]) -> None:
    """Free the memory of a weight within a mapped file; it is read from there again if needed.

    (Of all other memory this would clear the numbers.)  Else a packed weight is there twice.
    """
    first = -(-weight.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (weight.data_ptr() + weight.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if first < end and any(start <= first and end <= stop for start, stop in mapped):
        address = ctypes.c_void_p(first)
        ctypes.CDLL(None).madvise(address, ctypes.c_size_t(end - first), mmap.MADV_DONTNEED)
