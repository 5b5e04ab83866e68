"""Fine-tune a student on prompts and labels (paper §3, step 3): the loop, top to bottom.

    batches.py -> packing -> loss at label tokens -> optimizer step -> the loop -> checkpoints.py

- A step sees a global batch: random samples, the same for a seed and an epoch, however grouped.
- Its loss is the mean over the label tokens of the whole batch.
- Ranks communicate in the last backward of a step (gradients), once after it (loss, whether to
  stop), after an epoch (a barrier), and, with --shard, where split weights are gathered.
- Order, learning rate and dropout follow from step, seed and config: a resumed run is exact.

Start it through finetune_cot.py:

    python finetune_cot.py --stage train --student gpt2 --finetune_data FILE --out DIR
    torchrun --standalone --nproc_per_node=2 finetune_cot.py --stage train --student gpt2 ...

Shapes: B rows of a micro-batch, T tokens of a row, N label tokens in all, H width, V vocabulary.
"""

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer

import checkpoints
import rehearsal
from batches import (
    IGNORE_INDEX,
    Samples,
    collate,
    global_batches,
    label_logits,
    micro_batches,
    packed_rows,
)
from checkpoints import Row, Rows, TrainState, describe_steps
from distributed import Ranks, print0
from storage import Interrupted, UserError, out_of_memory_hint
from terminal import progress
from tokens import TokenizedSamples


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What the loop needs to know; the flags of finetune_cot.py, by name."""

    epochs: int = 20  # the paper's
    batch_size: int = 8  # samples of an optimizer step, over all ranks; the paper's
    lr: float = 3e-4  # of AdamW; the paper's
    schedule: str = "constant"  # after warm-up: constant (the paper's), linear, cosine
    warmup: int = 0  # steps; the paper's
    weight_decay: float = 0.01  # the paper's
    max_grad_norm: float = 0.0  # 0: no clipping, the paper's
    max_length: int = 512  # tokens of a prompt and of a label; the paper's
    seed: int = 0  # of the samples' order and of dropout
    precision: str = "fp32"  # fp32, tf32 (matmuls), bf16, fp16 (autocast)
    packing: bool = True  # samples end to end instead of padded, where that is exact
    micro_batch_size: int | None = None  # samples of a forward pass and rank; None: no bound
    micro_tokens: int = 0  # tokens of a forward pass and rank; 0: 1024 on CPUs, no bound on GPUs
    gradient_checkpointing: bool = False  # compute activations twice, keep fewer
    compile: bool = False  # torch.compile the student
    shard: str = "no"  # no: DDP; gpu: FSDP2; cpu: FSDP2, weights in main memory
    checkpoint_every: int = 1  # epochs; 0: never
    checkpoint_steps: int = 0  # steps, within an epoch; 0: never
    keep: int = 1  # checkpoints kept, the newest
    log_every: int = 0  # steps between printed lines; 0: a line an epoch
    plain: bool = False  # only what this file shows, nothing of extras/
    cuda_graphs: bool = False  # on one GPU, extras/gpu_step.py takes the steps


OUT_OF_MEMORY_ADVICE = (
    ": lower --micro_tokens or --micro_batch_size (same result), or use --gradient_checkpointing"
)

# ---------------- Loss, at label tokens alone


class LabelLoss(torch.autograd.Function):
    """F.cross_entropy(logits, targets, reduction="sum") in fp32, in the memory of the logits.

    The (N, V) logits are by far the largest tensor of a step.  Here their gradient takes their
    place at once, some rows at a time, so that they are never copied.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss; from here on logits hold their gradient."""
        rows = 64 if logits.device.type == "cpu" else 2048  # 64 stay in a CPU's cache
        loss = torch.zeros((), device=logits.device)
        for part, ids in zip(logits.split(rows), targets.split(rows), strict=True):
            leaf = part.float().detach().requires_grad_()
            with torch.enable_grad():
                part_loss = F.cross_entropy(leaf, ids, reduction="sum")
            (gradient,) = torch.autograd.grad(part_loss, leaf)
            part.copy_(gradient)
            loss += part_loss.detach()
        ctx.save_for_backward(logits)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grad), None


HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def micro_loss(setup: "TrainSetup", samples: Samples) -> tuple[Tensor, int]:
    """Return the loss summed over a micro-batch's label tokens, and its tokens with padding."""
    batch = collate(samples, setup.decoder_start_token_id, setup.packing)
    device = setup.ranks.device
    half = HALF.get(setup.config.precision)
    with torch.autocast(device.type, half, enabled=half is not None):
        logits = label_logits(setup.parallel, batch, device)
    targets = batch.targets[batch.targets != IGNORE_INDEX].to(device)
    return LabelLoss.apply(logits, targets), batch.n_tokens


# ---------------- One optimizer step


class TrainSetup(NamedTuple):
    """What stays the same from step to step."""

    state: TrainState  # model (to save and to evaluate), optimizer, scaler
    parallel: nn.Module  # what is called: the model, or DDP around it
    samples: TokenizedSamples
    decoder_start_token_id: int | None  # what T5's decoder reads first; None: a decoder-only model
    packing: bool
    config: TrainConfig
    ranks: Ranks

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.samples) / self.config.batch_size)

    @property
    def max_steps(self) -> int:
        return self.config.epochs * self.steps_per_epoch

    def micro_batches(self, batch: Samples) -> list[Samples]:
        max_samples = self.config.micro_batch_size
        max_tokens = self.config.micro_tokens
        if not max_tokens and self.ranks.device.type == "cpu":
            max_tokens = 1024  # less memory and no more time (LOG.md)
        return micro_batches(batch, max_samples, max_tokens, self.packing, self.ranks.world_size)


def prepare_training(
    model: Model,
    samples: TokenizedSamples,
    decoder_start_token_id: int | None,
    config: TrainConfig,
    ranks: Ranks,
) -> TrainSetup:
    """Place, compile and parallelize the student as config says, and make its optimizer."""
    rehearsal.check_samples(model, samples)
    if config.shard == "no":
        model.to(ranks.device)
    state = TrainState(model, None, None)  # the rest comes when the layout is known
    setup = TrainSetup(state, model, samples, decoder_start_token_id, True, config, ranks)
    torch.set_float32_matmul_precision("highest")  # an earlier run may have asked for less
    setup = choose_layout(setup)
    matmul_precision = "highest"
    if config.precision == "tf32":
        matmul_precision = "medium" if ranks.device.type == "cpu" else "high"
    torch.set_float32_matmul_precision(matmul_precision)
    if config.gradient_checkpointing:
        old_name = model.gradient_checkpointing_enable  # the one of transformers 5.17
        enable = getattr(model, "activation_checkpointing_enable", old_name)
        enable({"use_reentrant": False})
    if config.compile:
        model.compile(dynamic=True)
    parallel = model
    if config.shard != "no":
        from extras.sharding import shard

        parallel = shard(model, config.shard, config.precision, ranks)
    elif ranks.world_size > 1:
        # static_graph fails an assertion inside DDP (torch 2.13), packed or padded
        parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    options = {"lr": config.lr, "betas": (0.9, 0.999), "weight_decay": config.weight_decay}
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **options)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=config.precision == "fp16")
    return setup._replace(state=TrainState(model, optimizer, scaler), parallel=parallel)


def choose_layout(setup: TrainSetup) -> TrainSetup:
    """Return how samples are laid out: packed, padded or one by one, and whether by fast paths.

    The first that gives this student the logits and gradients of each sample alone.
    """
    model = setup.state.model
    config = setup.config
    samples = rehearsal.longest_and_shortest(setup.samples)
    trial = (model, samples, setup.decoder_start_token_id)
    kind = f"models of type {model.config.model_type} give"
    layouts = [(True, config.plain), (True, True), (False, config.plain), (False, True)]
    if not config.packing or model.config._attn_implementation != "sdpa":
        layouts = layouts[2:]
    with rehearsal.rehearsal_mode(model), out_of_memory_hint(OUT_OF_MEMORY_ADVICE):
        truth = rehearsal.try_alone(*trial, config.shard != "no")
        for packing, plain in dict.fromkeys(layouts):
            chosen = setup._replace(
                packing=packing, config=dataclasses.replace(config, plain=plain)
            )
            with training_mode(chosen):
                model.eval()
                is_exact = rehearsal.agrees(*trial, packing, truth)
            if is_exact:
                if plain != config.plain:
                    print0(setup.ranks, f"{kind} other gradients on the fast path: it is left out")
                return chosen
    print0(setup.ranks, f"{kind} a sample of a batch another loss: samples are trained one by one")
    return setup._replace(
        packing=False, config=dataclasses.replace(config, plain=True, micro_batch_size=1)
    )


@contextlib.contextmanager
def training_mode(setup: TrainSetup) -> Iterator[None]:
    """Inside the block: dropout, packed attention, fast paths; outside, Hugging Face's model."""
    model = setup.state.model
    model.train()
    with contextlib.ExitStack() as stack:
        if setup.packing:
            stack.enter_context(packed_rows(model))
        if not setup.config.plain and (Path(__file__).parent / "extras").is_dir():
            stack.enter_context(open_fast_paths(setup))
        yield


def open_fast_paths(setup: TrainSetup) -> contextlib.AbstractContextManager:
    """Return the patches that train faster on the device and change nothing but rounding."""
    if has_gpu(setup):
        from extras.gpu_training import gpu_training_patches as patches
    else:
        from extras.cpu_training import cpu_training_patches as patches
    return patches(setup)


def has_gpu(setup: TrainSetup) -> bool:
    return setup.ranks.device.type != "cpu"


def open_static_step(setup: TrainSetup) -> Any:
    """Return a gpu_step.StaticStep, which never waits for a GPU, or None without --cuda_graphs."""
    if setup.config.cuda_graphs and has_gpu(setup) and not setup.config.plain:
        from extras import gpu_step

        if gpu_step.is_supported(setup):
            return gpu_step.StaticStep(setup)
    return None


# (batch, step, learning rate, asked to stop) -> (rows of log.jsonl, whether to stop)
TakeStep = Callable[[Samples, int, float, bool], tuple[Iterable[Row], bool]]


def choose_step(setup: TrainSetup) -> TakeStep:
    """Return what takes a step, optimizer_step but for --cuda_graphs."""
    static_step = open_static_step(setup)
    if static_step:
        return static_step.take

    def take_step(batch: Samples, step: int, lr: float, stop: bool) -> tuple[list[Row], bool]:
        figures, stop = optimizer_step(setup, batch, step, lr, stop)
        return [figures], stop

    return take_step


def optimizer_step(
    setup: TrainSetup, batch: Samples, step: int, lr: float, stop: bool = False
) -> tuple[Row, bool]:
    """Take one step on a global batch; return its figures, and whether any rank asks to stop.

    grad_norm is None where fp16 overflowed and the step was skipped; size counts padding too.
    Raises UserError on a loss or gradient that is not finite.
    """
    model, optimizer, scaler = setup.state
    totals = accumulate_gradients(setup, batch, step, stop)
    scaler.unscale_(optimizer)
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if setup.config.shard != "no":
        norm = norm.full_tensor()
    loss, size, stop = totals.tolist()  # read when all is queued: the CPU waits for a GPU here
    grad_norm = norm.item()
    check_is_finite("loss", loss, step, batch)
    if not math.isfinite(grad_norm) and scaler.is_enabled():
        grad_norm = None
    else:
        check_is_finite("gradient", grad_norm, step, batch)
    if setup.config.max_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, setup.config.max_grad_norm, norm)
    for param_group in optimizer.param_groups:
        param_group["lr"] = lr
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return step_figures(batch, loss, lr, grad_norm, int(size)), bool(stop)


def step_figures(batch: Samples, loss: float, lr: float, grad_norm: float | None, size: int) -> Row:
    """Return what log.jsonl says of a step."""
    return {
        "loss": loss,
        "lr": lr,
        "grad_norm": grad_norm,
        "label_tokens": count_label_tokens(batch),
        "tokens": sum(sample.length for sample in batch),
        "size": size,
    }


def accumulate_gradients(setup: TrainSetup, batch: Samples, step: int, stop: bool) -> Tensor:
    """Add the gradients of all micro-batches; return [loss, size, asks to stop] over all ranks.

    The loss of every micro-batch is a sum, divided by the label tokens of the *whole* batch.  A
    mean of means would weigh a short rationale's tokens more than a long one's, and would change
    with the grouping.  DDP and FSDP average gradients over ranks, hence the factor world_size.
    """
    rank, world_size, device = setup.ranks
    label_tokens = count_label_tokens(batch)  # every rank has the whole batch
    groups = setup.micro_batches(batch)
    totals = torch.tensor([0, 0, stop], dtype=torch.float64, device=device)
    for group in range(rank, len(groups), world_size):
        seed_dropout(setup.config, step, group)
        is_last = group + world_size >= len(groups)  # gradients are exchanged once a step
        if setup.config.shard != "no":
            setup.parallel.set_requires_gradient_sync(is_last)
        elif world_size > 1:
            setup.parallel.require_backward_grad_sync = is_last  # DDP's
        loss, size = micro_loss(setup, groups[group] or batch[:1])
        if not groups[group]:  # fewer samples than ranks: all must take part, this one with zero
            loss = loss * 0
            size = 0
        loss = loss / label_tokens
        setup.state.scaler.scale(loss * world_size).backward()
        totals[0] += loss.detach()
        totals[1] += size
    if world_size > 1:
        dist.all_reduce(totals)
    return totals


def seed_dropout(config: TrainConfig, step: int, group: int) -> None:
    """Seed a micro-batch by itself: a resumed run draws the same dropout masks.

    And so do one rank with two micro-batches and two ranks with one.
    """
    torch.manual_seed((config.seed * 1_000_003 + step) * 1009 + group)


def count_label_tokens(batch: Samples) -> int:
    return sum(len(sample.label) for sample in batch)


def check_is_finite(what: str, value: float, step: int, batch: Samples) -> None:
    """Raise UserError with step and samples on a loss or gradient that is not finite."""
    if math.isfinite(value):
        return
    indices = ", ".join(str(sample.sample_index) for sample in batch)
    raise UserError(
        f"the {what} is {value} at step {step} (sample_index {indices}): lower --lr, or use "
        "--precision bf16 or fp32; the last checkpoint is kept"
    )


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """Return the rate of step 1 .. steps: linear warm-up to lr, then the schedule, towards 0."""
    if step <= config.warmup:
        return config.lr * step / config.warmup
    done = (step - 1 - config.warmup) / (steps - config.warmup)
    if config.schedule == "linear":
        return config.lr * (1 - done)
    if config.schedule == "cosine":
        return config.lr * ((1 + math.cos(math.pi * done)) / 2)
    return config.lr


# ---------------- The loop


def train(
    model: Model,
    tokenizer: Tokenizer,
    samples: TokenizedSamples,
    out: Path,
    config: TrainConfig,
    settings: Row,
    ranks: Ranks,
    arguments: Row,
    later: int = 0,
) -> Iterator[int]:
    """Fine-tune model and save it to out; yield each epoch (1, 2, ...) when it is done.

    Resumes from a checkpoint in out; an epoch that it ends is yielded first.  Raises UserError
    without a finite loss, Interrupted on SIGTERM, after a checkpoint.
    later: steps of the students to come, for the time that is left.
    """
    start_token = None
    if model.config.is_encoder_decoder:
        start_token = model.config.decoder_start_token_id
    setup = prepare_training(model, samples, start_token, config, ranks)
    step = checkpoints.load_checkpoint(out, setup.state, ranks)
    rows = checkpoints.start_log(out, step, ranks, settings, arguments)  # one for every step so far
    print0(ranks, describe_run(setup, step))
    take_step = choose_step(setup)
    if step and step % setup.steps_per_epoch == 0:
        yield step // setup.steps_per_epoch
    stop_asked = threading.Event()
    for epoch in range(step // setup.steps_per_epoch + 1, config.epochs + 1):
        start = time.perf_counter()
        first = len(rows)
        with checkpoints.open_log(out, ranks) as log:
            with training_mode(setup), set_on_sigterm(stop_asked):
                step, stop = train_epoch(setup, take_step, epoch, step, rows, log, out, stop_asked)
            seconds = time.perf_counter() - start
            if step % setup.steps_per_epoch == 0:
                log(checkpoints.epoch_row(epoch, rows, seconds, ranks.device))
        if step == setup.max_steps:
            checkpoints.save_student(out, setup.state, tokenizer, settings, ranks)
        elif stop or config.checkpoint_every and epoch % config.checkpoint_every == 0:
            checkpoints.save_checkpoint(out, setup.state, step, config.keep, ranks)
        print0(ranks, describe_steps(rows[first:], config.epochs, setup.max_steps + later, seconds))
        rows.clear()  # log.jsonl has them
        if ranks.world_size > 1:
            dist.barrier()  # what rank 0 wrote, all may read from here on
        if stop and step < setup.max_steps:
            what = f"stopped by SIGTERM at step {step}: there is a checkpoint"
            raise Interrupted(f"{what}; start the same command again to go on")
        yield epoch


def train_epoch(
    setup: TrainSetup,
    take_step: TakeStep,
    epoch: int,
    step: int,
    rows: Rows,
    log: Callable[[Row], None],
    out: Path,
    stop_asked: threading.Event,
) -> tuple[int, bool]:
    """Take an epoch's steps after `step`; return the step reached, and whether to stop there."""
    config = setup.config
    ranks = setup.ranks
    batches = global_batches(len(setup.samples), config.batch_size, config.seed, epoch)
    batches = batches[step % setup.steps_per_epoch :]
    printed = time.perf_counter()
    first = len(rows)
    for indices in progress(batches, f"epoch {epoch}/{config.epochs}", show=ranks.is_rank0):
        step += 1
        batch = [setup.samples[i] for i in indices]
        lr = learning_rate(step, setup.max_steps, config)
        with out_of_memory_hint(f" at step {step}{OUT_OF_MEMORY_ADVICE}"):
            told, stop = take_step(batch, step, lr, stop_asked.is_set())
        for figures in told:  # of this step; with --cuda_graphs of none, or of those before it too
            rows.append({"step": step, "epoch": epoch, **figures})
            log(rows[-1])
        if config.log_every and step % config.log_every == 0:
            seconds = time.perf_counter() - printed
            print0(ranks, describe_steps(rows[first:], config.epochs, setup.max_steps, seconds))
            printed += seconds
            first = len(rows)
        if stop:
            break
        is_due = config.checkpoint_steps and step % config.checkpoint_steps == 0
        if is_due and step % setup.steps_per_epoch:
            checkpoints.save_checkpoint(out, setup.state, step, config.keep, ranks)
    return step, stop


@contextlib.contextmanager
def set_on_sigterm(event: threading.Event) -> Iterator[None]:
    """Set event on SIGTERM inside the block, instead of ending the process."""
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def describe_run(setup: TrainSetup, step: int) -> str:
    """Say how many samples and steps there are, and the micro-batches of the longest batch."""
    config = setup.config
    longest = setup.samples.shortest_first[-config.batch_size :]
    groups = setup.micro_batches([setup.samples[i] for i in longest])
    n_ranks = setup.ranks.world_size
    layout = "packed" if setup.packing else "padded"
    epochs = f"{config.epochs} epochs of {setup.steps_per_epoch} steps"
    batch = f"batch {config.batch_size}"
    if len(groups) > 1:
        batch += f" = {n_ranks} rank(s) x {len(groups) // n_ranks} micro-batch(es)"
    where = f"{config.precision} on {setup.ranks.device}"
    line = f"    {len(setup.samples):,} samples, {epochs}; {batch}, {layout}; {where}"
    if step:
        line += f"\n    going on after step {step} of {setup.max_steps}"
    return line
