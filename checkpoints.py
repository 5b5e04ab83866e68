"""What a training run leaves on disk: checkpoints to resume from, the student, log.jsonl.

    <out>/checkpoint_<step>.pt   weights, optimizer, scaler, step; renamed into place when whole
    <out>/log.jsonl              what made the run, then a row per step and per epoch
    <out>/best_epoch_<epoch>/    with --keep_best: a Hugging Face folder with best.json
    <out>/*, run.json            the finished student, a Hugging Face folder; run.json comes last

There is no random state to keep: the order of the samples and dropout are functions of seed, epoch
and step, so with the same settings and number of ranks a resumed run is exact.
"""

import json
import math
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch.distributed.checkpoint import state_dict
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer

import storage
from storage import Ranks, write_errors

Row = dict[str, Any]  # of JSON, or of a state by parameter name
Rows = list[Row]


class TrainState(NamedTuple):
    """What training changes."""

    model: Model
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # of fp16: keeps small gradients from vanishing


# ---------------- Checkpoints


FULL = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)  # even where sharded


def full_state_dict(state: TrainState) -> tuple[Row, Row]:
    """Return (model, optimizer) state by parameter name, whole on rank 0; every rank calls it."""
    return state_dict.get_state_dict(state.model, state.optimizer, options=FULL)


def save_checkpoint(out: Path, state: TrainState, step: int, keep: int, ranks: Ranks) -> None:
    """Write a checkpoint and delete all but the newest `keep`; every rank must call it."""
    model, optimizer = full_state_dict(state)
    if not ranks.is_rank0:
        return
    scaler = state.scaler.state_dict()
    content = {"model": model, "optimizer": optimizer, "scaler": scaler, "step": step}
    path = out / f"checkpoint_{step:08d}.pt"
    temporary = path.with_suffix(".tmp")
    try:
        with write_errors(path), open(temporary, "wb") as f:
            torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    for old in sorted(out.glob("checkpoint_*.pt"))[:-keep]:
        old.unlink()


def load_checkpoint(out: Path, state: TrainState) -> int:
    """Set state to the newest checkpoint; return its step, 0 where there is none."""
    checkpoints = sorted(out.glob("checkpoint_*.pt"))
    if not checkpoints:
        return 0
    remedy = "delete it, and the run goes on from the one before it or from the start"
    with storage.corrupt_file_errors(checkpoints[-1], remedy):
        # weights_only: a checkpoint can run no code
        content = torch.load(checkpoints[-1], map_location="cpu", weights_only=True)
        state_dict.set_state_dict(
            state.model,
            state.optimizer,
            model_state_dict=content["model"],
            optim_state_dict=content["optimizer"],
            options=FULL,
        )
        state.scaler.load_state_dict(content["scaler"])
        return content["step"]


# ---------------- Students


def save_pretrained(
    folder: Path, model: Model, tokenizer: Tokenizer, weights: Row | None = None
) -> None:
    """Write a Hugging Face folder in the place of what an interrupted run left there."""
    shutil.rmtree(folder, ignore_errors=True)
    with write_errors(folder):
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)


def save_student(
    out: Path, state: TrainState, tokenizer: Tokenizer, settings: Row, ranks: Ranks
) -> None:
    """Save the finished student and delete the checkpoints; every rank must call it."""
    weights = None
    if hasattr(state.model, "set_requires_gradient_sync"):  # sharded
        weights, _ = full_state_dict(state)
        for name in state.model.all_tied_weights_keys:  # Hugging Face saves a tied weight once
            weights.pop(name, None)
    if not ranks.is_rank0:
        return
    temporary = out / "student.tmp"
    save_pretrained(temporary, state.model, tokenizer, weights)
    for file in temporary.iterdir():
        storage.sync_file(file)  # on the disk before run.json says so and the checkpoints go
        os.replace(file, out / file.name)
    temporary.rmdir()
    storage.write_json(out / "run.json", {"finished": True, "settings": settings})
    for checkpoint in out.glob("checkpoint_*.pt"):  # three times the weights, and done with
        checkpoint.unlink()


def keep_best(out: Path, score: Row, model: Model, tokenizer: Tokenizer) -> None:
    """Save the student as the best epoch's, in the place of the one before, if it is the best."""
    kept = sorted(out.glob("best_epoch_*"))
    accuracies = [storage.read_json(folder / "best.json").get("accuracy", -1) for folder in kept]
    if max(accuracies, default=-1) >= score["accuracy"]:
        return
    temporary = out / "best.tmp"
    best = out / f"best_epoch_{score['epoch']:03d}"
    save_pretrained(temporary, model, tokenizer)
    note = {key: score[key] for key in ("epoch", "part", "accuracy", "n")}
    storage.write_json(temporary / "best.json", note)
    temporary.rename(best)
    for old in kept:
        shutil.rmtree(old)
    print(
        f"train: epoch {score['epoch']} is the best so far on the {score['part']} part, "
        f"{score['accuracy']:.2f}%: kept in {best}",
        flush=True,
    )


# ---------------- log.jsonl, and the line that the user sees


def start_log(out: Path, step: int, ranks: Ranks, settings: Row, arguments: Row) -> Rows:
    """Begin log.jsonl or, resuming, drop what was logged after step; return its rows of steps."""
    path = out / "log.jsonl"
    rows = []
    if step and path.exists():
        for line in storage.read_text(path).split("\n"):
            if line.endswith("}"):  # a kill may have torn the last line
                rows.append(storage.parse_json(line, path))
        rows = [row for row in rows if row.get("step", 0) <= step]
    if not rows:
        rows = [log_header(ranks, settings, arguments)]
    if ranks.is_rank0:
        text = "".join(json.dumps(row, default=str) + "\n" for row in rows)
        storage.write_atomic(path, text)
    return [row for row in rows if "loss" in row]


def log_header(ranks: Ranks, settings: Row, arguments: Row) -> Row:
    """Describe what makes a run."""
    device = f"cpu, {torch.get_num_threads()} threads"
    if ranks.device.type == "cuda":
        device = torch.cuda.get_device_name(ranks.device)
    git = shutil.which("git")
    commit = None
    if git:
        command = [git, "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        commit = done.stdout.strip() or None
    return {
        "command": sys.argv,
        "arguments": arguments,
        "settings": settings,
        "torch": torch.__version__,
        "ranks": ranks.world_size,
        "transformers": transformers.__version__,
        "device": device,
        "commit": commit,
    }


def append_log(out: Path, row: Row, ranks: Ranks) -> None:
    """Add a row to log.jsonl, on rank 0."""
    if not ranks.is_rank0:
        return
    path = out / "log.jsonl"
    with write_errors(path), open(path, "a") as f:
        f.write(json.dumps(row) + "\n")


def log_epoch(out: Path, epoch: int, rows: Rows, seconds: float, ranks: Ranks) -> None:
    """Add the row of a finished epoch."""
    loss = mean_loss([row for row in rows if row["epoch"] == epoch])
    row = {"step": rows[-1]["step"], "epoch": epoch, "epoch_loss": loss}
    append_log(out, row | {"seconds": round(seconds, 3)}, ranks)


def mean_loss(rows: Rows) -> float:
    """Average over the label tokens of several steps."""
    total = sum(row["loss"] * row["label_tokens"] for row in rows)
    return total / sum(row["label_tokens"] for row in rows)


def describe_steps(rows: Rows, steps: int, seconds: float, device: torch.device) -> str:
    """Describe the steps of these rows in an aligned line; memory is the peak so far."""
    last = rows[-1]
    norm = last["grad_norm"] or math.inf
    labels = sum(row["label_tokens"] for row in rows)
    tokens = sum(row["tokens"] for row in rows)
    padding = 100 - 100 * tokens / sum(row["size"] for row in rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    minutes_left = (steps - last["step"]) * seconds / len(rows) / 60
    line = (
        f"epoch {last['epoch']:3d}  step {last['step']:6d}/{steps}  loss {mean_loss(rows):.4f}  "
        f"lr {last['lr']:.1e}  norm {norm:7.3f}  {labels / seconds:6.0f} label tokens/s  "
        f"{tokens / seconds:6.0f} tokens/s  padding {padding:3.0f}%  {peak / 2**20:6.0f} MB  "
        f"{seconds:6.1f} s  left {minutes_left:5.1f} min"
    )
    skipped = sum(row["grad_norm"] is None for row in rows)
    if skipped:
        line += f"  {skipped} steps skipped (fp16 overflow)"
    return line
