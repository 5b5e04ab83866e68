"""What a training run leaves on disk: checkpoints to resume from, the student, log.jsonl.

    <out>/checkpoint_<step>.pt   weights, optimizer, scaler, step; renamed into place when whole
    <out>/log.jsonl              what made the run, then a row per step and per epoch
    <out>/best_epoch_<epoch>/    with --keep_best: a Hugging Face folder with best.json
    <out>/*, run.json            the finished student, a Hugging Face folder; run.json comes last

There is no random state to keep: the order of the samples and dropout are functions of seed, epoch
and step, so with the same settings, micro-batches and number of ranks a resumed run is exact.
"""

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch.distributed.checkpoint import state_dict
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer

import distributed
import storage
from distributed import Ranks, on_rank0, share_files, wait_for_all
from provenance import COMPUTED_WITH, training_fingerprint
from storage import write_errors

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
    written = sorted(out.glob("checkpoint_*.pt"))
    for old in written[:-keep]:
        old.unlink()


def load_checkpoint(out: Path, state: TrainState, ranks: Ranks) -> int:
    """Set state to rank 0's newest checkpoint; return its step, 0 where there is none.

    Other machines get a copy of the file for as long as it is read; every rank must call it.
    """
    newest = on_rank0(ranks, lambda: max(out.glob("checkpoint_*.pt"), default=None))
    if not newest:
        return 0
    path = out / newest.name
    copied = share_files(out, [path.name], ranks)
    remedy = "delete it, and the run goes on from the one before it or from the start"
    with storage.corrupt_file_errors(path, remedy):
        # weights_only: a checkpoint can run no code
        content = torch.load(path, map_location="cpu", weights_only=True)
        state_dict.set_state_dict(
            state.model,
            state.optimizer,
            model_state_dict=content["model"],
            optim_state_dict=content["optimizer"],
            options=FULL,
        )
        state.scaler.load_state_dict(content["scaler"])
    wait_for_all(ranks)  # all of a machine have read it
    for name in copied:
        (out / name).unlink()
    return content["step"]


# ---------------- Students


def save_pretrained(
    folder: Path, model: Model, tokenizer: Tokenizer, weights: Row | None = None
) -> None:
    """Write a Hugging Face folder in the place of what an interrupted run left there.

    A tokenizer without a padding token (GPT-2's) gets EOS for one: pipelines refuse batches else.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
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
    note = {"finished": True, "settings": settings, "code": training_fingerprint()}
    storage.write_json(out / "run.json", note)
    for checkpoint in out.glob("checkpoint_*.pt"):  # three times the weights, and done with
        checkpoint.unlink()


def keep_best(out: Path, score: Row, model: Model, tokenizer: Tokenizer) -> None:
    """Save the student as the best epoch's, in the place of the one before, if it is the best."""
    kept = sorted(out.glob("best_epoch_*"))
    for folder in kept:
        best_so_far = storage.read_json(folder / "best.json")
        if best_so_far.get("accuracy", -1) >= score["accuracy"]:
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
    """Begin log.jsonl or, resuming, drop what was logged after step; return its rows of steps.

    A resumed run adds its own header to the first one's list "resumed", and prints what is
    computed in another way than before.
    """
    path = out / "log.jsonl"
    rows = []
    if step and path.exists():
        logged = storage.read_text(path)
        for line in logged.split("\n"):
            if not line.endswith("}"):  # a kill may have torn the last line
                continue
            row = storage.parse_json(line, path)
            if row.get("step", 0) <= step:
                rows.append(row)
    header = log_header(ranks, settings, arguments)
    if not rows:
        rows = [header]
    elif "step" not in rows[0]:
        resumed = rows[0].get("resumed", [])
        headers = [rows[0], *resumed]
        changed = changed_computation(headers[-1], header)
        if changed:
            distributed.print0(
                ranks,
                f"train: going on after step {step} with other {changed}: the same samples in the "
                "same order, but rounding and dropout masks are not those of an unbroken run",
            )
        rows[0]["resumed"] = [*resumed, {"step": step, **header}]
    if ranks.is_rank0:
        lines = [json.dumps(row, default=str) + "\n" for row in rows]
        storage.write_atomic(path, "".join(lines))
    return [row for row in rows if "loss" in row]


def changed_computation(old: Row, new: Row) -> str:
    """Return 'micro_tokens 0 -> 512, ranks 1 -> 2': how a run is computed, where that changed.

    old, new: headers; what the old one does not say is not compared.
    """
    old_values = old.get("arguments") or {}
    old_values = old_values | old
    new_values = new["arguments"] | new  # "device" is the header's, which names the threads
    known = []
    for name in (*COMPUTED_WITH, "ranks", "torch", "transformers"):
        if name in old_values and name in new_values:
            known.append(name)
    return storage.changed_settings(old_values, new_values, known)


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


@contextlib.contextmanager
def open_log(out: Path, ranks: Ranks) -> Iterator[Callable[[Row], None]]:
    """Yield a function that adds a row to log.jsonl, on rank 0; each is there when it returns."""
    if not ranks.is_rank0:
        yield lambda row: None
        return
    path = out / "log.jsonl"
    with open(path, "ab", buffering=0) as f:

        def append(row: Row) -> None:
            with write_errors(path):
                f.write(f"{json.dumps(row)}\n".encode())

        yield append


def epoch_row(epoch: int, rows: Rows, seconds: float, device: torch.device) -> Row:
    """Return the row of log.jsonl of a finished epoch."""
    of_epoch = [row for row in rows if row["epoch"] == epoch]
    last = rows[-1]
    return {
        "step": last["step"],
        "epoch": epoch,
        "epoch_loss": mean_loss(of_epoch),
        "seconds": round(seconds, 3),
        "peak_memory_mb": peak_memory(device) >> 20,
    }


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that the process, or its tensors on a GPU, have taken so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":
        return peak  # in bytes, elsewhere in kB
    return peak * 1024


def mean_loss(rows: Rows) -> float:
    """Average over the label tokens of several steps."""
    losses = [row["loss"] * row["label_tokens"] for row in rows]
    tokens = [row["label_tokens"] for row in rows]
    return sum(losses) / sum(tokens)


def describe_steps(rows: Rows, epochs: int, steps: int, seconds: float) -> str:
    """Describe the steps of these rows in a line; the rest of their figures is in log.jsonl.

    steps: of the whole command, which tell with the seconds of these the time that is left.
    """
    last = rows[-1]
    tokens = sum(row["tokens"] for row in rows)
    line = (
        f"    epoch {last['epoch']} of {epochs}  step {last['step']}  loss {mean_loss(rows):.4f}  "
        f"{tokens / seconds:,.0f} tokens/s  {seconds:.1f} s"
    )
    steps_left = steps - last["step"]
    seconds_left = steps_left * seconds / len(rows)
    if seconds_left >= 60:
        line += f", about {seconds_left / 60:.1f} min of training left in all"
    elif seconds_left:
        line += f", about {seconds_left:.0f} s of training left in all"
    skipped = sum(row["grad_norm"] is None for row in rows)
    if skipped:
        line += f"  {skipped} steps skipped (fp16 overflow)"
    return line
