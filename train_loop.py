"""The training loop: what one optimizer step sees, how the loss is divided, when ranks talk, what a checkpoint holds.

`train` is a generator: it yields after every epoch, so its caller may evaluate the student between two epochs.  Run it
through finetune_cot.py, under plain python or torchrun (CPU: gloo, GPU: nccl):

    python finetune_cot.py --stage train --student gpt2 --finetune_data FILE --out DIR
    torchrun --standalone --nproc_per_node=2 finetune_cot.py --stage train --student gpt2 --finetune_data FILE --out DIR

Shapes: B rows of a micro-batch, T tokens of its longest row, N label tokens in it, H width, V vocabulary.
"""
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from tasks import (UserError, encode_prompt, fingerprint, is_current, keep_aside, progress, read_json, read_jsonl,
                   write_json, write_whole)


# ---------------- Ranks

class Ranks(NamedTuple):
    rank: int          # this process, 0 .. world_size - 1
    world_size: int    # processes in all
    device: torch.device

    @property
    def is_master(self):
        return self.rank == 0


def setup_ranks(device):
    """Join the process group that torchrun describes in the environment; a plain start is one rank of one."""
    cuda = device.type == "cuda"
    if "RANK" not in os.environ:
        return Ranks(0, 1, device)
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    if cuda:
        torch.cuda.set_device(local_rank)
    return Ranks(dist.get_rank(), dist.get_world_size(), torch.device(f"cuda:{local_rank}" if cuda else "cpu"))


# ---------------- Samples -> batches

class Sample(NamedTuple):
    sample_index: int
    prompt: list  # token ids
    label: list   # token ids, the last one EOS: the student learns where to stop


def encode(tokenizer, family, data, max_length, max_positions=None):
    """-> (samples, dropped sample indices) of a fine-tuning file {"sample_index", "input", "label": lists}.

    A sample whose input or label exceeds max_length tokens (paper: 512), or that does not fit the model's positions, is
    dropped: cutting it would cut off its answer, which stands last.  So is a decoder's sample without a prompt: nothing would
    predict its first label token."""
    samples, dropped = [], []
    for sample_index, prompt, label in zip(data["sample_index"], data["input"], data["label"]):
        prompt_ids = encode_prompt(tokenizer, family, prompt)
        label_ids = tokenizer(text_target=label, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        longest = len(prompt_ids) + len(label_ids) if family == "decoder" else 0  # encoder-decoders: relative positions
        if max(len(prompt_ids), len(label_ids)) > max_length or longest > (max_positions or math.inf) or not prompt_ids:
            dropped.append(sample_index)
        else:
            samples.append(Sample(sample_index, prompt_ids, label_ids))
    return samples, dropped


def global_batches(n, batch_size, seed, epoch):
    """-> the n positions in random order, cut into batches (the last may be smaller), as lists.

    The order depends on seed and epoch alone: any number of ranks, and a resumed run, see the same batches."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
    return [order[i:i + batch_size] for i in range(0, n, batch_size)]


def micro_batches(batch, micro_batch_size, world_size):
    """Regroup the samples of a global batch, by length, into micro-batches: a multiple of world_size, some may be empty.

    Rows of like length need little padding.  The optimizer step is a sum over all of them, so the grouping does not
    change what it sees; rank r takes every world_size-th from the r-th on."""
    by_length = sorted(batch, key=lambda s: (len(s.prompt) + len(s.label), s.sample_index))
    groups = world_size * math.ceil(len(batch) / (world_size * micro_batch_size))
    return [by_length[i * len(batch) // groups:(i + 1) * len(batch) // groups] for i in range(groups)]


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
        return {"input_ids": pad(rows, pad_id), "attention_mask": pad([[1] * len(row) for row in rows], 0)}, keep, targets
    inputs = {"input_ids": pad([s.prompt for s in samples], pad_id),
              "attention_mask": pad([[1] * len(s.prompt) for s in samples], 0),
              "decoder_input_ids": pad([[start_id] + s.label[:-1] for s in samples], pad_id)}
    return inputs, pad([[1] * len(s.label) for s in samples], 0).bool(), targets


# ---------------- One optimizer step

def label_logits(model, inputs, keep):
    """(N, V) logits at the positions that keep (B, T) marks.

    Only there does the loss look, so only there is the widest product of the model computed: a hook hands the vocabulary
    projection (N, H) instead of (B, T, H), whatever the model does around it (tied weights, T5's scaling)."""
    raw_model = model.module if isinstance(model, DistributedDataParallel) else model
    hook = raw_model.get_output_embeddings().register_forward_pre_hook(lambda module, args: (args[0][keep],))
    try:
        return model(**inputs, use_cache=False).logits
    finally:
        hook.remove()


def micro_loss(model, samples, collate_arguments, device, autocast):
    """-> loss of a micro-batch, summed (not averaged) over its label tokens, in fp32."""
    inputs, keep, targets = collate(samples, *collate_arguments)
    with torch.autocast(device.type, **autocast):
        logits = label_logits(model, {k: v.to(device) for k, v in inputs.items()}, keep.to(device))
    return F.cross_entropy(logits.float(), targets.to(device), reduction="sum")


def optimizer_step(model, optimizer, scaler, batch, step, args, collate_arguments, ranks, autocast):
    """One step on a global batch; -> its loss, averaged over all label tokens of the batch.

    The loss of every micro-batch is a sum, divided by the label tokens of the *whole* step.  A mean of means would weigh
    a short rationale's tokens more than a long one's, and would change with the number of micro-batches.  DDP averages
    gradients over ranks, hence the factor world_size."""
    label_tokens = sum(len(s.label) for s in batch)  # every rank has the whole batch: nothing to communicate
    groups = list(enumerate(micro_batches(batch, args.micro_batch_size, ranks.world_size)))[ranks.rank::ranks.world_size]
    total = torch.zeros((), device=ranks.device)
    for i, (group, samples) in enumerate(groups):
        # Dropout masks depend on seed, step and micro-batch alone: a resumed run draws the same, and so do 1 rank with 2
        # micro-batches and 2 ranks with 1.  (Another grouping draws other masks; without dropout all groupings agree.)
        torch.manual_seed((args.seed * 1_000_003 + step) * 1009 + group)
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = i == len(groups) - 1  # ranks talk once a step, in the last backward
        loss = micro_loss(model, samples or batch[:1], collate_arguments, ranks.device, autocast) / label_tokens
        if not samples:  # fewer samples than ranks: this rank takes part with a loss of zero, since all must
            loss = loss * 0
        scaler.scale(loss * ranks.world_size).backward()
        total += loss.detach()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if ranks.world_size > 1:
        dist.all_reduce(total)
    return total.item()  # the one point where the CPU waits for a GPU


# ---------------- What goes in: a fine-tuning file, a student, a folder to write to

def read_finetune_data(path):
    """-> {"sample_index", "input", "label": lists of equal length} of a fine-tuning file, JSON or the openai JSON lines."""
    if Path(path).suffix == ".jsonl":
        rows = read_jsonl(path)
        data = {"sample_index": list(range(len(rows)))}
        for ours, theirs in (("input", "prompt"), ("label", "completion")):
            data[ours] = [row.get(theirs) if isinstance(row, dict) else None for row in rows]
    else:
        data = read_json(path)
    columns = [data.get(k) for k in ("sample_index", "input", "label")]
    if not all(isinstance(c, list) for c in columns) or len({len(c) for c in columns}) != 1 \
            or not all(isinstance(x, kind) for c, kind in zip(columns, (int, str, str)) for x in c):
        raise UserError(f'{path} is not a fine-tuning file, {{"sample_index": [...], "input": [texts], "label": [texts]}} of equal length')
    if not columns[0]:
        raise UserError(f"{path} holds no sample: there is nothing to train on")
    return dict(zip(("sample_index", "input", "label"), columns))


def model_fingerprint(name):
    """What a student is before training: of a folder its files' sizes and the ends of each; of a hub name, the name."""
    if not Path(name).is_dir():
        return name
    seen = {}
    for file in sorted(p for p in Path(name).iterdir() if p.suffix in (".safetensors", ".json", ".bin", ".model")):
        with open(file, "rb") as f:
            head = f.read(1 << 20)
            f.seek(max(0, file.stat().st_size - (1 << 20)))
            seen[file.name] = [file.stat().st_size, hashlib.sha256(head + f.read()).hexdigest()]
    return fingerprint(seen)


def claim_student_folder(out, settings):
    """Ready the folder of a student; -> "finished", "unfinished" (it can be resumed) or "new".  The student of a run with other
    settings is kept aside, a stranger's folder refused."""
    note = read_json(out / "run.json") if (out / "run.json").exists() else None
    if note is None and out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and holds no run of this program: choose another --out")
    if note is not None and note.get("settings") == settings and not note.get("finished"):
        print(f"train: going on with the unfinished run in {out}")
        return "unfinished"
    if note is not None:
        if is_current("train", out, note.get("settings"), settings):
            return "finished"
        keep_aside(out)
    write_json(out / "run.json", {"finished": False, "settings": settings})
    return "new"


# ---------------- What is kept: checkpoint.pt (to resume), log.jsonl, and the student at the end

def save_checkpoint(path, model, optimizer, scaler, epoch, step):
    """Weights, optimizer, scaler and position, in one file that is swapped in whole.
    There is no random state to keep: order and dropout are functions of seed, epoch and step."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "epoch": epoch, "step": step}
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path, model, optimizer, scaler, device):
    """-> (epoch, step) that the checkpoint had reached; (0, 0) where there is none."""
    if not path.exists():
        return 0, 0
    state = torch.load(path, map_location=device, weights_only=True)  # weights_only: a checkpoint can run no code
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    return state["epoch"], state["step"]


def start_log(path, step, args, settings, ranks):
    """Begin log.jsonl with what made it, or, on resuming, drop what was logged after the checkpoint's step."""
    if step and path.exists():
        kept = [r for r in read_jsonl(path) if r.get("step", 0) <= step]
        write_whole(path, "".join(json.dumps(r) + "\n" for r in kept))
        return
    import transformers
    git = shutil.which("git")
    commit = git and subprocess.run([git, "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    write_whole(path, json.dumps({"command": sys.argv, "arguments": vars(args), "settings": settings, "torch": torch.__version__,
                                  "transformers": transformers.__version__, "device": device, "ranks": ranks.world_size,
                                  "commit": commit or None}, default=str) + "\n")


def log(path, **record):
    with open(path, "a") as f:
        f.write(json.dumps(record) + "\n")


def save_student(model, tokenizer, out, settings):
    """The student as a Hugging Face folder; run.json comes last and marks it as whole."""
    temporary = out / "student.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    for file in temporary.iterdir():
        os.replace(file, out / file.name)
    temporary.rmdir()
    write_json(out / "run.json", {"finished": True, "settings": settings})
    (out / "checkpoint.pt").unlink(missing_ok=True)  # three times the weights, and no longer needed


# ---------------- The loop

def train(model, tokenizer, family, data, out, args, settings, ranks):
    """Fine-tune model on data; yield after each epoch (1, 2, ...; on resuming, first the epoch reached); save to out.

    args: epochs, batch_size (samples per optimizer step), micro_batch_size (samples per forward pass and rank, a bound on
    memory), lr, weight_decay, seed, precision (fp32, tf32, bf16, fp16), max_length, checkpoint_every (epochs; 0: never).
    The paper: 20 epochs, batch 8, AdamW lr 3e-4, no schedule, no clipping (appendix).  Raises UserError on a set without
    a usable sample and on a loss that is not finite."""
    positions = max(getattr(model.config, "max_position_embeddings", None) or 0, 0)  # 0: no bound
    samples, dropped = encode(tokenizer, family, data, args.max_length, positions)
    say = print if ranks.is_master else (lambda *_, **__: None)
    if dropped:
        say(f"dropped {len(dropped)} of {len(dropped) + len(samples)} samples that are longer than {args.max_length} tokens (or than the "
            f"model): sample_index {', '.join(map(str, dropped[:10]))}{', ...' if len(dropped) > 10 else ''}")
    if not samples:
        raise UserError(f"no sample is left to train on: all {len(dropped)} exceed {args.max_length} tokens or the model's positions; "
                        "raise --max_length")

    start_id = model.config.decoder_start_token_id if family == "encoder_decoder" else None
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id  # masked, so any id will do
    collate_arguments = (family, pad_id, start_id)
    model.to(ranks.device).train()
    if args.precision == "tf32":
        torch.set_float32_matmul_precision("high")
    half = torch.float16 if args.precision == "fp16" else torch.bfloat16
    autocast = {"dtype": half, "enabled": args.precision in ("bf16", "fp16")}
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=args.precision == "fp16")  # disabled, it passes everything through
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay, fused=True)

    checkpoint, log_path = out / "checkpoint.pt", out / "log.jsonl"
    first_epoch, step = load_checkpoint(checkpoint, model, optimizer, scaler, ranks.device)
    if ranks.is_master:
        start_log(log_path, step, args, settings, ranks)
    steps = math.ceil(len(samples) / args.batch_size)
    say(f"{len(samples)} samples, {args.epochs} epochs of {steps} steps; batch {args.batch_size} = {ranks.world_size} rank(s) x "
        f"{math.ceil(args.batch_size / ranks.world_size / args.micro_batch_size)} micro-batch(es) of up to "
        f"{min(args.micro_batch_size, math.ceil(args.batch_size / ranks.world_size))}; {args.precision} on {ranks.device}", flush=True)
    parallel = DistributedDataParallel(model) if ranks.world_size > 1 else model
    if first_epoch:
        say(f"going on after epoch {first_epoch} of {args.epochs}")
        yield first_epoch

    for epoch in range(first_epoch + 1, args.epochs + 1):
        model.train()
        batches = global_batches(len(samples), args.batch_size, args.seed, epoch)
        losses, tokens, start = [], 0, time.perf_counter()
        for positions in progress(batches, f"epoch {epoch}/{args.epochs}", show=ranks.is_master):
            step, batch = step + 1, [samples[i] for i in positions]
            loss = optimizer_step(parallel, optimizer, scaler, batch, step, args, collate_arguments, ranks, autocast)
            if not math.isfinite(loss):  # gradients that overflow in fp16 are skipped by the scaler; a loss never recovers
                raise UserError(f"the loss is {loss} at step {step} (epoch {epoch}, sample_index "
                                f"{', '.join(str(s.sample_index) for s in batch)}): lower --lr or use --precision bf16 or fp32; "
                                "the last checkpoint is kept")
            losses.append((loss, sum(len(s.label) for s in batch)))
            tokens += sum(len(s.prompt) + len(s.label) for s in batch)
            if ranks.is_master:
                log(log_path, step=step, epoch=epoch, loss=loss, lr=args.lr, label_tokens=losses[-1][1])
        seconds, label_tokens = time.perf_counter() - start, sum(n for _, n in losses)
        epoch_loss = sum(loss * n for loss, n in losses) / label_tokens
        if ranks.is_master:
            log(log_path, epoch=epoch, step=step, epoch_loss=epoch_loss, tokens=tokens, seconds=round(seconds, 3))
            if args.checkpoint_every and epoch % args.checkpoint_every == 0 and epoch < args.epochs:
                save_checkpoint(checkpoint, model, optimizer, scaler, epoch, step)
            if epoch == args.epochs:
                save_student(model, tokenizer, out, settings)
        if ranks.world_size > 1:
            dist.barrier()  # what rank 0 wrote, all may read from here on
        say(f"epoch {epoch:3d}/{args.epochs}  step {step:6d}  loss {epoch_loss:.4f}  {tokens / seconds:7.0f} tokens/s  "
            f"{seconds:6.1f} s", flush=True)
        yield epoch
