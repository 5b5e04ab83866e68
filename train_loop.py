"""The training loop.

- An optimizer step sees a global batch: random samples, the same ones for a seed and an epoch, however they are grouped.
- Its loss is summed over label tokens and divided by the label tokens of the whole batch: each weighs the same.
- Ranks talk in the last backward of a step (gradients), once after it (loss, sizes, whether to stop), at the end of an epoch
  (a barrier), and, with --shard, wherever split weights, gradients or states are put together.
- A checkpoint holds weights, optimizer, scaler and step; order, rate and dropout follow from step, seed and flags.

`train` is a generator: it yields after every epoch, so its caller may evaluate the student between two epochs.  Run it
through finetune_cot.py, under plain python or torchrun (CPU: gloo, GPU: nccl):

    python finetune_cot.py --stage train --student gpt2 --finetune_data FILE --out DIR
    torchrun --standalone --nproc_per_node=2 finetune_cot.py --stage train --student gpt2 --finetune_data FILE --out DIR

Shapes: B rows of a micro-batch, T tokens of a row, N label tokens in it, H width, V vocabulary.
"""

import functools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from storage import (
    Interrupted,
    UserError,
    corrupt_file_errors,
    parse_json,
    progress,
    read_json,
    read_text,
    out_of_memory_hint,
    write_json,
    write_atomic,
    write_errors,
)
from extras.cpu_training import PACKED, keep_freed_memory, training_kernels
from tasks import encode_prompt


# ---------------- Ranks


class Ranks(NamedTuple):
    rank: int  # this process, 0 .. world_size - 1
    world_size: int  # processes in all
    device: torch.device

    @property
    def is_master(self):
        return self.rank == 0


def setup_ranks(device):
    """Join the process group that torchrun describes in the environment; a plain start is one rank of one."""
    cuda = device.type == "cuda"
    if "RANK" not in os.environ:
        return Ranks(0, 1, device)
    if not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo"
        )  # gloo: for what --shard cpu keeps in main memory
    if cuda:
        torch.cuda.set_device(device)
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def say(ranks, text):
    """Print a line once, whatever the number of ranks, above a progress bar if there is one."""
    if ranks.is_master:
        from tqdm import tqdm

        tqdm.write(text)
        sys.stdout.flush()


# ---------------- Samples -> batches


class Sample(NamedTuple):
    sample_index: int
    prompt: list  # token ids
    label: list  # token ids, the last one EOS: the student learns where to stop


def encode(tokenizer, family, data, max_length, max_positions=0):
    """-> (samples, dropped sample indices) of a fine-tuning file {"sample_index", "input", "label": lists}.

    A sample whose input or label exceeds max_length tokens (paper: 512), or that does not fit the model's positions (0: no
    bound), is dropped: cutting it would cut off its answer, which stands last.  So is one without a prompt: nothing would
    predict its first label token.  Raises UserError where no sample is left."""
    samples = []
    dropped = []
    for sample_index, prompt, label in zip(data["sample_index"], data["input"], data["label"]):
        prompt_ids = encode_prompt(tokenizer, family, prompt)
        label_ids = tokenizer(text_target=label, add_special_tokens=False)["input_ids"] + [
            tokenizer.eos_token_id
        ]
        total = (
            len(prompt_ids) + len(label_ids) if family == "decoder" else 0
        )  # encoder-decoders: relative positions
        if (
            max(len(prompt_ids), len(label_ids)) > max_length
            or total > (max_positions or math.inf)
            or not prompt_ids
        ):
            dropped.append(sample_index)
        else:
            samples.append(Sample(sample_index, prompt_ids, label_ids))
    if not samples:
        raise UserError(
            f"no sample is left to train on: all {len(dropped)} exceed {max_length} tokens or the model's positions; "
            "raise --max_length"
        )
    return samples, dropped


def global_batches(n, batch_size, seed, epoch):
    """-> the n positions in random order, cut into batches (the last may be smaller), as lists.

    The order depends on seed and epoch alone: any number of ranks, and a resumed run, see the same batches."""
    order = torch.randperm(
        n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    ).tolist()
    return [order[i : i + batch_size] for i in range(0, n, batch_size)]


def length(sample):
    return len(sample.prompt) + len(sample.label)


def micro_batches(batch, args, packing, world_size):
    """Regroup the samples of a global batch into micro-batches: a multiple of world_size of them, some may be empty.

    None has more than micro_batch_size samples or, unless it is a single one, micro_tokens tokens (padding included; 0: no
    bound).  Padded rows should be of like length, packed ones should give every rank equally much to do.  The optimizer
    step sums over all samples, so the grouping changes its rounding and its dropout masks alone.  Rank r takes every
    world_size-th from r on: as many on each rank, since all must take part in exchanging gradients."""
    by_length = sorted(batch, key=lambda s: (-length(s), s.sample_index))
    for n_groups in range(world_size, world_size * (len(batch) + 1), world_size):
        parts = [
            by_length[i * len(batch) // n_groups : (i + 1) * len(batch) // n_groups]
            for i in range(n_groups)
        ]
        if packing:  # longest first, each to the one with the fewest tokens so far
            parts = [[] for _ in range(n_groups)]
            for sample in by_length:
                min(parts, key=lambda part: (sum(map(length, part)), len(part))).append(sample)
        tokens = [
            sum(map(length, part)) if packing else len(part) * max(map(length, part), default=0)
            for part in parts
        ]
        if all(
            len(part) <= 1
            or len(part) <= (args.micro_batch_size or len(part))
            and size <= (args.micro_tokens or size)
            for part, size in zip(parts, tokens)
        ):
            return parts


def pad(rows, value):
    """Lists of ids -> (B, T), padded on the right."""
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def collate(samples, family, pad_id, start_id):
    """-> (model inputs, keep, targets): keep (B, T) marks the positions whose next token is a label token, targets (N,) are
    those tokens, row by row.  A decoder with prompt p1 p2 and label a b reads `p1 p2 a` (b is only predicted) and keep is
    0 1 1; an encoder-decoder reads p1 p2, its decoder `start a`, and keep is 1 1."""
    targets = torch.tensor([token for s in samples for token in s.label])
    if family == "decoder":
        rows = [s.prompt + s.label[:-1] for s in samples]
        keep = pad([[0] * (len(s.prompt) - 1) + [1] * len(s.label) for s in samples], 0).bool()
        return (
            {
                "input_ids": pad(rows, pad_id),
                "attention_mask": pad([[1] * len(row) for row in rows], 0),
            },
            keep,
            targets,
        )
    inputs = {
        "input_ids": pad([s.prompt for s in samples], pad_id),
        "attention_mask": pad([[1] * len(s.prompt) for s in samples], 0),
        "decoder_input_ids": pad([[start_id] + s.label[:-1] for s in samples], pad_id),
    }
    return inputs, pad([[1] * len(s.label) for s in samples], 0).bool(), targets


def label_logits(model, inputs, keep, device):
    """(N, V) logits at the positions that keep (B, T) marks.

    Only there does the loss look, so only there is the widest product of the model computed: a hook hands the vocabulary
    projection (N, H) instead of (B, T, H), whatever the model does around it (tied weights, T5's scaling)."""
    raw_model = model.module if isinstance(model, DistributedDataParallel) else model
    keep = keep.to(device)
    hook = raw_model.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: (args[0][keep],)
    )
    try:
        return model(**{k: v.to(device) for k, v in inputs.items()}, use_cache=False).logits
    finally:
        hook.remove()


# ---------------- Packing: the samples of a micro-batch end to end in one row, so no token is padding


def collate_packed(samples, family, pad_id, start_id):
    """As collate, but (1, T): position_ids restart at each sample, and attend_per_sample keeps the samples apart."""
    PACKED.clear()
    parts = [collate([s], family, pad_id, start_id) for s in samples]
    inputs = {
        k: torch.cat([part[k] for part, _, _ in parts], 1)
        for k in parts[0][0]
        if k != "attention_mask"
    }
    for k in inputs:
        PACKED[inputs[k].shape[1]] = [part[k].shape[1] for part, _, _ in parts]
    if family == "decoder":
        inputs["position_ids"] = torch.cat(
            [torch.arange(n) for n in PACKED[inputs["input_ids"].shape[1]]]
        )[None]
    elif (
        len(PACKED) == 1
    ):  # prompts and labels have as many tokens, which are told apart by that: prompts get one more, a sample that
        # no label belongs to
        lengths = [part["input_ids"].shape[1] for part, _, _ in parts] + [1]
        inputs["input_ids"] = F.pad(inputs["input_ids"], (0, 1), value=pad_id)
        PACKED[sum(lengths)] = lengths
    return (
        inputs,
        torch.cat([keep for _, keep, _ in parts], 1),
        torch.cat([targets for _, _, targets in parts]),
    )


def can_pack(model, samples, ids):
    """Whether packed samples get the logits they get alone: tried on the longest sample before another one, so that
    absolute positions, sliding windows, states that run on, or masks of a model's own show up."""
    if model.config._attn_implementation != "sdpa":
        return False
    by_length = sorted(samples, key=length)
    pair = [by_length[-1], by_length[len(by_length) // 2]]
    model.eval()
    with torch.no_grad():
        alone = torch.cat(
            [label_logits(model, *collate([s], **ids)[:2], model.device) for s in pair]
        )
        with training_kernels(model, packing=True):
            packed = label_logits(model, *collate_packed(pair, **ids)[:2], model.device)
    return packed.shape == alone.shape and bool(
        (packed - alone).abs().max() <= 1e-3 * alone.abs().max()
    )


# ---------------- One optimizer step


class Setup(NamedTuple):
    """What stays the same from step to step."""

    model: torch.nn.Module  # the student itself, to save and to evaluate
    parallel: torch.nn.Module  # what is called: the same, or DDP around it
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    autocast: dict  # arguments of torch.autocast
    packing: bool
    collate: Callable  # samples -> (inputs, keep, targets), packed or padded
    kernels: Callable  # -> what is open while the student is trained, not while it is evaluated


def set_up(model, samples, ids, args, ranks):
    """-> Setup.  ids: family, pad_id and start_id, as collate takes them."""
    cpu = ranks.device.type == "cpu"
    half = torch.float16 if args.precision == "fp16" else torch.bfloat16
    args.micro_tokens = args.micro_tokens or (
        1024 if cpu else 0
    )  # on a CPU pieces take less memory and no more time
    model = model if args.shard != "no" else model.to(ranks.device)
    if cpu:
        keep_freed_memory()
    packing = args.packing and can_pack(model, samples, ids)
    torch.set_float32_matmul_precision(
        "highest" if args.precision != "tf32" else "medium" if cpu else "high"
    )
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if args.compile:
        model.compile(dynamic=True)
    if args.shard != "no":
        parallel = shard(model, args, ranks, half)
    else:
        parallel = DistributedDataParallel(model) if ranks.world_size > 1 else model
    # fused: one pass over the parameters.  With fp16 the scaler keeps small gradients from vanishing; disabled, it passes all through
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=args.lr,
        betas=(0.9, 0.999),
        weight_decay=args.weight_decay,
        fused=True,
    )
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=args.precision == "fp16")
    autocast = {
        "device_type": ranks.device.type,
        "dtype": half,
        "enabled": args.precision in ("bf16", "fp16"),
    }
    kernels = functools.partial(
        training_kernels,
        model,
        packing,
        products=args.precision == "fp32",
        plain=args.shard == "no" and not args.compile,
    )
    return Setup(
        model,
        parallel,
        optimizer,
        scaler,
        autocast,
        packing,
        functools.partial(collate_packed if packing else collate, **ids),
        kernels,
    )


def shard(model, args, ranks, half):
    """Split weights, gradients and optimizer state over the ranks, block by block (FSDP2).  Raises UserError without ranks."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    if not dist.is_initialized() or args.precision == "fp16":
        raise UserError(
            "--shard splits the student over ranks: start it with torchrun, and not with --precision fp16 (bf16 works)"
        )
    options = {"mesh": dist.device_mesh.init_device_mesh(ranks.device.type, (ranks.world_size,))}
    if args.precision == "bf16":  # weights travel and compute in half, gradients are summed in fp32
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    if args.shard == "cpu":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda")
    for module in model.modules():
        if type(module).__name__ in (
            model._no_split_modules or ()
        ):  # Hugging Face's name for the class of a layer
            fully_shard(module, **options)
    return fully_shard(model, **options)


class LabelLoss(torch.autograd.Function):
    """Cross-entropy of logits (N, V), summed over N in fp32: F.cross_entropy(logits.float(), targets, reduction="sum"), but the logits,
    by far the largest tensor of a step, are overwritten, by e^logit and then by their gradient, instead of copied four times.  It
    goes over a few rows at a time, which stay in a CPU's cache meanwhile: they would be read from memory a dozen times otherwise."""

    @staticmethod
    def forward(ctx, logits, targets):
        """-> the loss, a number; the logits are gone."""
        # (N, 1)
        targets = targets[:, None]
        tops = logits.amax(1, keepdim=True).float()
        sums = []
        wanted = logits.gather(1, targets).float() - tops
        ctx.rows = 32 if logits.device.type == "cpu" else 2048
        for part, top in zip(logits.split(ctx.rows), tops.split(ctx.rows)):
            powers = (
                part.float().sub_(top).exp_()
            )  # from the highest logit on: exp is exact to its argument's last digit only
            sums.append(powers.sum(1, keepdim=True))
            part.copy_(powers)  # no copy in fp32, where they are the same
        sums = torch.cat(sums)
        ctx.save_for_backward(logits, targets, sums, wanted)
        return (sums.log() - wanted).sum()

    @staticmethod
    def backward(ctx, grad):
        """-> softmax - one-hot, times grad, in the place of the logits; exact for a target, whose chance may be close to 1."""
        logits, targets, sums, wanted = ctx.saved_tensors
        for part, factor in zip(logits.split(ctx.rows), (grad / sums).split(ctx.rows)):
            part.copy_(part.float().mul_(factor))
        return logits.scatter_(
            1, targets, ((wanted - sums.log()).expm1() * grad).to(logits.dtype)
        ), None


def micro_loss(setup, samples, device):
    """-> loss of a micro-batch, summed (not averaged) over its label tokens, in fp32, and its tokens with padding."""
    inputs, keep, targets = setup.collate(samples)
    size = sum(ids.numel() for name, ids in inputs.items() if name.endswith("input_ids"))
    size += len(samples) * (
        "decoder_input_ids" not in inputs
    )  # a decoder's EOS is only predicted; it counts, as in `length`
    with torch.autocast(**setup.autocast):
        logits = label_logits(setup.parallel, inputs, keep, device)
    return LabelLoss.apply(logits, targets.to(device)), size


def optimizer_step(setup, batch, step, rate, args, ranks, stop=False):
    """One step on a global batch at the learning rate `rate`.  -> (its loss, averaged over all label tokens of the batch; the
    gradient's norm, None where fp16 overflowed and the step was skipped; tokens computed, padding included; whether any
    rank asks to stop).

    The loss of every micro-batch is a sum, divided by the label tokens of the *whole* step.  A mean of means would weigh
    a short rationale's tokens more than a long one's, and would change with the number of micro-batches.  DDP and FSDP
    average gradients over ranks, hence the factor world_size.  Raises UserError on a loss or gradient that is not finite."""
    label_tokens = sum(
        len(s.label) for s in batch
    )  # every rank has the whole batch: nothing to communicate
    groups = list(enumerate(micro_batches(batch, args, setup.packing, ranks.world_size)))[
        ranks.rank :: ranks.world_size
    ]
    total = torch.tensor(
        [0, 0, stop], dtype=torch.float64, device=ranks.device
    )  # loss, tokens with padding, asks to stop
    for i, (group, samples) in enumerate(groups):
        # Dropout masks depend on seed, step and micro-batch alone: a resumed run draws the same, and so do 1 rank with 2
        # micro-batches and 2 ranks with 1.  (Another grouping draws other masks; without dropout all groupings agree.)
        torch.manual_seed((args.seed * 1_000_003 + step) * 1009 + group)
        last = i == len(groups) - 1  # gradients are exchanged once a step, in the last backward
        if isinstance(setup.parallel, DistributedDataParallel):
            setup.parallel.require_backward_grad_sync = last
        elif args.shard != "no":
            setup.parallel.set_requires_gradient_sync(last)
        loss, tokens = micro_loss(setup, samples or batch[:1], ranks.device)
        if (
            not samples
        ):  # fewer samples than ranks: this rank takes part with a loss of zero, since all must
            loss = loss * 0
            tokens = 0
        setup.scaler.scale(loss / label_tokens * ranks.world_size).backward()
        total[0] += loss.detach() / label_tokens
        total[1] += tokens
    if ranks.world_size > 1:
        dist.all_reduce(total)
    setup.scaler.unscale_(setup.optimizer)
    parameters = [p for p in setup.model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    norm = norm.full_tensor() if args.shard != "no" else norm
    loss, size, stop = (
        total.tolist()
    )  # read once, when the whole step is queued: the CPU waits for a GPU here
    if not math.isfinite(loss) or not norm.isfinite() and not setup.scaler.is_enabled():
        raise UserError(
            f"the {'gradient' if math.isfinite(loss) else 'loss'} is {norm if math.isfinite(loss) else loss} at step {step} "
            f"(sample_index {', '.join(str(s.sample_index) for s in batch)}): lower --lr, or use --precision bf16 or fp32; "
            "the last checkpoint is kept"
        )
    if args.max_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, args.max_grad_norm, norm)
    for param_group in setup.optimizer.param_groups:
        param_group["lr"] = rate
    setup.scaler.step(setup.optimizer)
    setup.scaler.update()
    setup.optimizer.zero_grad(set_to_none=True)
    return loss, norm.item() if norm.isfinite() else None, int(size), bool(stop)


# ---------------- What is kept: checkpoints (to resume), log.jsonl, and the student at the end


def whole_state(setup, state=None):
    """-> (model, optimizer) state by parameter name, on rank 0 whole even where it is sharded; with state, set both to it."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_state_dict,
        set_state_dict,
    )

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    if not state:
        return get_state_dict(setup.model, setup.optimizer, options=options)
    set_state_dict(
        setup.model,
        setup.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=options,
    )


def save_checkpoint(out, setup, step, args, ranks):
    """checkpoint_<step>.pt: weights, optimizer, scaler, step; renamed into place when whole, then older ones beyond --keep go.
    There is no random state to keep: order and dropout are functions of seed, epoch and step, so with the same flags, data and
    ranks a resumed run is exact.  (finetune_cot.py refuses to go on with others.)  Every rank must call it."""
    model, optimizer = whole_state(setup)
    if not ranks.is_master:
        return
    path, temporary = (out / f"checkpoint_{step:08d}.{suffix}" for suffix in ("pt", "tmp"))
    try:
        with write_errors(path), open(temporary, "wb") as f:
            torch.save(
                {
                    "model": model,
                    "optimizer": optimizer,
                    "scaler": setup.scaler.state_dict(),
                    "step": step,
                },
                f,
            )
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    for old in sorted(out.glob("checkpoint_*.pt"))[: -args.keep]:
        old.unlink()


def load_checkpoint(out, setup):
    """-> the step that the newest checkpoint had reached; 0 where there is none.  Weights and optimizer are set to it."""
    if not (paths := sorted(out.glob("checkpoint_*.pt"))):
        return 0
    with corrupt_file_errors(
        paths[-1], "delete it, and the run goes on from the one before it or from the start"
    ):
        state = torch.load(
            paths[-1], map_location="cpu", weights_only=True
        )  # weights_only: a checkpoint can run no code
        whole_state(setup, state)
        setup.scaler.load_state_dict(state["scaler"])
        return state["step"]


def save_student(setup, tokenizer, out, settings, args, ranks):
    """The student as a Hugging Face folder, sharded or not; run.json comes last and marks it as whole.  Every rank must call it."""
    weights = whole_state(setup)[0] if args.shard != "no" else None
    if not ranks.is_master:
        return
    for name in (
        setup.model.all_tied_weights_keys if weights else ()
    ):  # to Hugging Face, a tied weight is there once
        weights.pop(name, None)
    temporary = out / "student.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    with write_errors(temporary):
        setup.model.save_pretrained(temporary, state_dict=weights)
        tokenizer.save_pretrained(temporary)
    for file in temporary.iterdir():
        os.replace(file, out / file.name)
    temporary.rmdir()
    write_json(out / "run.json", {"finished": True, "settings": settings})
    for checkpoint in out.glob("checkpoint_*.pt"):  # three times the weights, and no longer needed
        checkpoint.unlink()


# ---------------- log.jsonl, the line about it, the best epoch


def start_log(path, step, args, settings, ranks):
    """Begin log.jsonl with what made it, or, on resuming, drop what was logged after the checkpoint's step.  -> rows of steps"""
    rows = []
    if step and path.exists():  # a kill may have torn its last line
        rows = [
            row
            for line in read_text(path).split("\n")
            if line.endswith("}") and (row := parse_json(line, path)).get("step", 0) <= step
        ]
    if not rows:
        import transformers

        git = shutil.which("git")
        commit = (
            git
            and subprocess.run(
                [git, "rev-parse", "HEAD"],
                cwd=Path(__file__).parent,
                capture_output=True,
                text=True,
            ).stdout.strip()
        )
        device = (
            torch.cuda.get_device_name(ranks.device)
            if ranks.device.type == "cuda"
            else f"cpu, {torch.get_num_threads()} threads"
        )
        rows = [
            {
                "command": sys.argv,
                "arguments": vars(args),
                "settings": settings,
                "torch": torch.__version__,
                "ranks": ranks.world_size,
                "transformers": transformers.__version__,
                "device": device,
                "commit": commit or None,
            }
        ]
    if ranks.is_master:
        write_atomic(path, "".join(json.dumps(row, default=str) + "\n" for row in rows))
    return [row for row in rows if "loss" in row]


def log(out, ranks, **record):
    """Append a record to log.jsonl, on rank 0."""
    if ranks.is_master:
        with write_errors(out / "log.jsonl"), open(out / "log.jsonl", "a") as f:
            f.write(json.dumps(record) + "\n")


def status(rows, steps, seconds, device):
    """One aligned line about the steps of these log rows: rates, memory so far, what is left.  The loss is the mean over label tokens."""
    labels, tokens, size = (sum(row[k] for row in rows) for k in ("label_tokens", "tokens", "size"))
    peak = (
        torch.cuda.max_memory_allocated()
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    skipped = sum(row["grad_norm"] is None for row in rows)
    last = rows[-1]
    return (
        f"epoch {last['epoch']:3d}  step {last['step']:6d}/{steps}  loss {mean_loss(rows):.4f}  lr {last['lr']:.1e}  norm "
        f"{last['grad_norm'] or math.inf:7.3f}  {labels / seconds:6.0f} label tokens/s  {tokens / seconds:6.0f} tokens/s  padding "
        f"{100 - 100 * tokens / size:3.0f}%  {peak / 2**20:6.0f} MB  {seconds:6.1f} s  left {(steps - last['step']) * seconds / len(rows) / 60:5.1f} min"
        + (f"  {skipped} steps skipped (fp16 overflow)" if skipped else "")
    )


def mean_loss(rows):
    return sum(row["loss"] * row["label_tokens"] for row in rows) / sum(
        row["label_tokens"] for row in rows
    )


def keep_best(out, score, model, tokenizer):
    """Save the student to out/best_epoch_<epoch>, a Hugging Face folder with best.json, if no epoch before had this accuracy; then the
    one before goes.  score: of evaluate.py."""
    kept = sorted(out.glob("best_epoch_*"))
    if any(
        read_json(folder / "best.json").get("accuracy", -1) >= score["accuracy"] for folder in kept
    ):
        return
    temporary = out / "best.tmp"
    best = out / f"best_epoch_{score['epoch']:03d}"
    shutil.rmtree(temporary, ignore_errors=True)
    with write_errors(temporary):
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    write_json(temporary / "best.json", {k: score[k] for k in ("epoch", "part", "accuracy", "n")})
    temporary.rename(best)
    for old in kept:
        shutil.rmtree(old)
    print(
        f"train: epoch {score['epoch']} is the best so far on the {score['part']} part, {score['accuracy']:.2f}%: kept in {best}",
        flush=True,
    )


# ---------------- The loop


def learning_rate(step, steps, args):
    """Of step 1 .. steps: a line up to lr in the first `warmup` steps, then constant, or a line or half a cosine towards 0."""
    if step <= args.warmup:
        return args.lr * step / args.warmup
    done = (step - 1 - args.warmup) / (steps - args.warmup)
    return (
        args.lr
        * {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[
            args.schedule
        ]
    )


def train(model, tokenizer, family, data, out, args, settings, ranks):
    """Fine-tune model on data; yield after each epoch (1, 2, ...; on resuming, first the epoch reached); save to out.

    args: the training flags of finetune_cot.py.  The paper: 20 epochs, batch 8, AdamW lr 3e-4, no schedule, no clipping
    (appendix).  Raises UserError on a set without a usable sample, on a loss that is not finite, and, after a checkpoint,
    on SIGTERM."""
    max_positions = max(getattr(model.config, "max_position_embeddings", None) or 0, 0)
    samples, dropped = encode(tokenizer, family, data, args.max_length, max_positions)
    if dropped:
        say(
            ranks,
            f"dropped {len(dropped)} of {len(dropped) + len(samples)} samples that are longer than {args.max_length} tokens (or than "
            f"the model): sample_index {', '.join(map(str, dropped[:10]))}{', ...' if len(dropped) > 10 else ''}",
        )
    pad_id = (
        tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    )  # masked, so any id will do
    ids = {
        "family": family,
        "pad_id": pad_id,
        "start_id": getattr(model.config, "decoder_start_token_id", None),
    }
    setup = set_up(model, samples, ids, args, ranks)
    epoch_steps = math.ceil(len(samples) / args.batch_size)
    steps = args.epochs * epoch_steps
    step = load_checkpoint(out, setup)
    rows = start_log(out / "log.jsonl", step, args, settings, ranks)  # one for every step so far
    micro = micro_batches(
        sorted(samples, key=length)[-args.batch_size :], args, setup.packing, ranks.world_size
    )  # the longest batch
    say(
        ranks,
        f"{len(samples)} samples, {args.epochs} epochs of {epoch_steps} steps; batch {args.batch_size} = {ranks.world_size} rank(s) x "
        f"{len(micro) // ranks.world_size} micro-batch(es) of up to {max(map(len, micro))}, {'packed' if setup.packing else 'padded'}; "
        f"{args.precision} on {ranks.device}"
        + (f"; going on after step {step} of {steps}" if step else ""),
    )
    if step and step % epoch_steps == 0:
        yield step // epoch_steps

    terminated = []
    for epoch in range(step // epoch_steps + 1, args.epochs + 1):
        model.train()
        on_sigterm = signal.signal(signal.SIGTERM, lambda *_: terminated.append(True))
        start = said = time.perf_counter()
        first = said_rows = len(rows)
        batches = global_batches(len(samples), args.batch_size, args.seed, epoch)[
            step % epoch_steps :
        ]
        with setup.kernels():
            for indices in progress(batches, f"epoch {epoch}/{args.epochs}", show=ranks.is_master):
                step = step + 1
                batch = [samples[i] for i in indices]
                rate = learning_rate(step, steps, args)
                with out_of_memory_hint(
                    f" at step {step}: lower --micro_tokens or --micro_batch_size (same result), or use --gradient_checkpointing"
                ):
                    loss, norm, size, stop = optimizer_step(
                        setup, batch, step, rate, args, ranks, bool(terminated)
                    )
                rows.append(
                    {
                        "step": step,
                        "epoch": epoch,
                        "loss": loss,
                        "lr": rate,
                        "grad_norm": norm,
                        "label_tokens": sum(len(s.label) for s in batch),
                        "tokens": sum(map(length, batch)),
                        "size": size,
                    }
                )
                log(out, ranks, **rows[-1])
                if args.log_every and step % args.log_every == 0:
                    say(
                        ranks,
                        status(rows[said_rows:], steps, time.perf_counter() - said, ranks.device),
                    )
                    said = time.perf_counter()
                    said_rows = len(rows)
                if stop:
                    break
                if (
                    args.checkpoint_steps
                    and step % args.checkpoint_steps == 0
                    and step % epoch_steps
                ):
                    save_checkpoint(out, setup, step, args, ranks)
        signal.signal(signal.SIGTERM, on_sigterm)
        seconds = time.perf_counter() - start
        if step % epoch_steps == 0:
            epoch_rows = [row for row in rows if row["epoch"] == epoch]
            log(
                out,
                ranks,
                step=step,
                epoch=epoch,
                epoch_loss=mean_loss(epoch_rows),
                seconds=round(seconds, 3),
            )
        if step == steps:
            save_student(setup, tokenizer, out, settings, args, ranks)
        elif stop or args.checkpoint_every and epoch % args.checkpoint_every == 0:
            save_checkpoint(out, setup, step, args, ranks)
        say(ranks, status(rows[first:], steps, seconds, ranks.device))
        if ranks.world_size > 1:
            dist.barrier()  # what rank 0 wrote, all may read from here on
        if stop and step < steps:
            raise Interrupted(
                f"stopped by SIGTERM at step {step}: there is a checkpoint; start the same command again to go on"
            )
        yield epoch
