"""A training step in which nothing waits for the host, replayed as a CUDA graph.

It is train_loop.optimizer_step: the same samples, loss, gradients, dropout seeds and AdamW.  All
that it reads comes to the GPU in one copy a micro-batch, rounded up to few sizes.  The second
micro-batch of a size is captured in a CUDA graph.  Losses and norms stay on the GPU until they are
asked for.  On a CPU, where the tests run it, there are no graphs.

Shapes: T tokens of a packed row, B samples in it, n tokens of a padded row, N label tokens.
"""

import functools
import math
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel as Model

from batches import IGNORE_INDEX, PackedLengths, Samples, collate
from checkpoints import Row
from extras.gpu_graphs import Graphs
from extras.gpu_training import Gather, Places, compute_places
from train_loop import (
    HALF,
    LabelLoss,
    TrainSetup,
    check_is_finite,
    count_label_tokens,
    seed_dropout,
    step_figures,
)

MAX_TAKEN = 64  # steps whose figures may wait on the GPU


def is_supported(setup: TrainSetup) -> bool:
    """Tell whether this run can take static steps; others take train_loop's own.

    fp16's scaler asks the host, so do recomputed layers, and ranks exchange gradients by DDP.
    """
    config = setup.config
    if config.shard != "no" or setup.ranks.world_size > 1:
        return False
    if config.precision == "fp16" or config.compile or config.gradient_checkpointing:
        return False
    return setup.packing


# ---------------- What a micro-batch reads

Arrays = dict[str, np.ndarray]
Tensors = dict[str, Tensor]
Shape = tuple[tuple[str, tuple], ...]  # the name and the shape of each array
IDS = {"prompt": "input_ids", "label": "decoder_input_ids"}  # names in PackedLengths, of the model


def static_arrays(samples: Samples, start_token: int | None, label_tokens: int) -> Arrays:
    """Return all that a micro-batch reads, by name; rows and labels end with a dummy.

    label_tokens: of the whole batch.  A dummy's token and position are 0, its target is ignored.
    """
    batch = collate(samples, start_token, packing=True)
    arrays = {"label_tokens": np.array(label_tokens)}
    lengths = batch.inputs["packed_lengths"]
    size = add_row(arrays, "prompt", lengths.prompt, batch.inputs)
    if lengths.label:
        size = add_row(arrays, "label", lengths.label, batch.inputs)
    targets = batch.targets[0].numpy()
    (places,) = np.nonzero(targets != IGNORE_INDEX)
    n_labels = len(places)
    most = round_up(n_labels + 1, 256)
    from_labels = np.full(size, most - 1)
    from_labels[places] = np.arange(n_labels)
    arrays["from_labels"] = from_labels
    arrays["to_labels"] = fill_up(places, most, size - 1)
    arrays["targets"] = fill_up(targets[places], most, IGNORE_INDEX)
    return arrays


def add_row(arrays: Arrays, name: str, lengths: list[int], inputs: Tensors) -> int:
    """Add a packed row, of prompts or of labels; return how long it is."""
    n_tokens = sum(lengths)
    size = round_up(n_tokens + 1, 128)
    longest = max(lengths)
    width = round_up(longest + 1, 64)
    to_padded, to_row = compute_places(lengths, size, width)
    arrays[f"{name}_to_padded"] = to_padded
    arrays[f"{name}_to_row"] = to_row
    for key in (IDS[name], "position_ids"):
        if key in inputs:
            row = inputs[key].numpy()
            arrays[key] = fill_up(row[0], size, 0)
    return size


def round_up(count: int, step: int) -> int:
    return -(-count // step) * step


def fill_up(numbers: np.ndarray, size: int, value: int) -> np.ndarray:
    """Append a value up to a size."""
    filled = np.full(size, value)
    filled[: len(numbers)] = numbers
    return filled


def join(arrays: Arrays) -> tuple[Shape, Tensor]:
    """Return the arrays' shape, and all numbers in one int64 tensor."""
    shape = []
    flat = []
    for name, array in arrays.items():
        shape.append((name, array.shape))
        flat.append(array.ravel())
    numbers = np.concatenate(flat)
    return tuple(shape), torch.from_numpy(numbers)


def split(buffer: Tensor, shape: Shape) -> Tensors:
    """Undo join, by views of the buffer."""
    tensors = {}
    start = 0
    for name, sizes in shape:
        end = start + math.prod(sizes)
        part = buffer[start:end]
        tensors[name] = part.view(sizes)
        start = end
    return tensors


# ---------------- The step


class Taken(NamedTuple):
    """A step whose loss and norm are still on the GPU."""

    step: int
    batch: Samples
    lr: float
    size: int


class StaticStep:
    """Takes steps, and tells their figures later."""

    def __init__(self, setup: TrainSetup) -> None:
        self.setup = setup
        self.model = setup.state.model
        self.device = setup.ranks.device
        kind = self.model.config.model_type
        self.graphs = Graphs(self.device, f"a step of models of type {kind}")
        self.buffers: dict[Shape, Tensor] = {}
        self.is_whole = has_one_micro_batch(setup)  # then gradients are in the step's graph alone
        self.taken: list[Taken] = []
        self.figures = self.zeros(MAX_TAKEN, 2)
        self.lr = self.zeros()
        self.loss = self.zeros()
        self.norm = self.zeros()
        self.found_inf = self.zeros()
        self.optimizer = setup.state.optimizer
        warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
        self.optimizer.found_inf = self.found_inf  # fused AdamW changes nothing where it is 1
        for param_group in self.optimizer.param_groups:
            param_group["lr"] = self.lr
            param_group["capturable"] = self.graphs.is_used

    def zeros(self, *sizes: int) -> Tensor:
        return torch.zeros(sizes, device=self.device)

    def __call__(self, batch: Samples, step: int, lr: float, is_asked: bool) -> Iterator[Row]:
        """Take a step; if asked, or after MAX_TAKEN, return the figures since the last time.

        The iterator raises UserError where a loss or a gradient was not finite.
        """
        place = len(self.taken)
        with self.graphs.on_stream():
            size = self.queue(batch, step, lr)
            self.figures[place, 0] = self.loss
            self.figures[place, 1] = self.norm
            one = Taken(step, batch, lr, size)
            self.taken.append(one)
            if not is_asked and len(self.taken) < MAX_TAKEN:
                return iter(())
            values = self.figures.tolist()  # here alone the host waits
        taken = self.taken
        self.taken = []
        return checked_rows(taken, values)

    def take(self, batch: Samples, step: int, lr: float, stop: bool) -> tuple[Iterator[Row], bool]:
        """Take a step; return the figures that are needed now, and whether to stop."""
        config = self.setup.config
        intervals = [self.setup.steps_per_epoch, config.log_every, config.checkpoint_steps]
        is_asked = stop
        for interval in filter(None, intervals):
            is_asked |= step % interval == 0
        return self(batch, step, lr, is_asked), stop

    def queue(self, batch: Samples, step: int, lr: float) -> int:
        """Start a step; return its tokens with padding."""
        setup = self.setup
        label_tokens = count_label_tokens(batch)
        self.lr.fill_(lr)
        self.loss.zero_()
        self.optimizer.zero_grad(set_to_none=self.is_whole)
        size = 0
        groups = setup.micro_batches(batch)
        start_token = setup.decoder_start_token_id
        for number, group in enumerate(groups):
            seed_dropout(setup.config, step, number)
            arrays = static_arrays(group, start_token, label_tokens)
            for name in IDS.values():
                if name in arrays:
                    size += len(arrays[name])
            shape = self.copy_in(arrays)
            work = functools.partial(self.accumulate, shape)
            self.graphs.run(shape, work)
        if not self.is_whole:
            self.graphs.run("update", self.update)
        return size

    def copy_in(self, arrays: Arrays) -> Shape:
        """Copy the arrays to the buffer of their shape; return the shape."""
        shape, source = join(arrays)
        if shape not in self.buffers:
            self.buffers[shape] = torch.empty_like(source, device=self.device)
        self.graphs.copy_in(self.buffers[shape], source)
        return shape

    def accumulate(self, shape: Shape) -> None:
        """Add loss and gradients of a micro-batch; where it is the whole batch, update too."""
        tensors = split(self.buffers[shape], shape)
        half = HALF.get(self.setup.config.precision)
        is_half = half is not None
        with torch.autocast(self.device.type, half, enabled=is_half):
            logits = label_logits(self.model, tensors)
        total = LabelLoss.apply(logits, tensors["targets"])
        loss = total / tensors["label_tokens"]
        loss.backward()
        self.loss += loss.detach()
        if self.is_whole:
            self.update()

    def update(self) -> None:
        """Take AdamW's step, unless loss or gradient are not finite."""
        parameters = []
        gradients = []
        for weight in self.model.parameters():
            if weight.grad is not None:
                parameters.append(weight)
                gradients.append(weight.grad)
        norm = torch.nn.utils.get_total_norm(gradients)
        self.norm.copy_(norm)
        figures = self.loss + norm
        is_finite = figures.isfinite()
        self.found_inf.copy_(~is_finite)
        max_norm = self.setup.config.max_grad_norm
        if max_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        self.optimizer.step()


def has_one_micro_batch(setup: TrainSetup) -> bool:
    """Tell whether the longest batch, and so each, is computed at once."""
    batch = []
    for i in setup.samples.shortest_first[-setup.config.batch_size :]:
        batch.append(setup.samples[i])
    groups = setup.micro_batches(batch)
    return len(groups) == 1


def label_logits(model: Model, tensors: Tensors) -> Tensor:
    """Return the (N, V) logits of label tokens, as batches.label_logits does."""
    inputs = {}
    places = {"label": None}
    for name, ids in IDS.items():
        if ids in tensors:
            inputs[ids] = tensors[ids][None]
            to_padded = tensors[f"{name}_to_padded"]
            to_row = tensors[f"{name}_to_row"]
            places[name] = Places(to_padded, to_row)
    if "position_ids" in tensors:
        inputs["position_ids"] = tensors["position_ids"][None]
    inputs["packed_lengths"] = PackedLengths(**places)

    def select_labels(module: nn.Module, hidden: tuple[Tensor]) -> Tensor:
        (row,) = hidden[0]
        return Gather.apply(row, tensors["to_labels"], tensors["from_labels"])

    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(select_labels)
    try:
        return model(**inputs, use_cache=False).logits
    finally:
        hook.remove()


def checked_rows(taken: list[Taken], values: list) -> Iterator[Row]:
    """Yield the rows of log.jsonl; raise UserError at a loss or gradient that is not finite."""
    for (step, batch, lr, size), (loss, norm) in zip(taken, values, strict=False):
        check_is_finite("loss", loss, step, batch)
        check_is_finite("gradient", norm, step, batch)
        row = step_figures(batch, loss, lr, norm, size)
        row["step"] = step
        yield row
