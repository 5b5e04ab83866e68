"""log.jsonl of a training run, the line about it that the user sees, and the best of its epochs.

A record with the command, arguments and versions first; one for every step; one with epoch_loss and seconds for every epoch."""
import json
import math
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from data.files import parse_json, read_json, read_text, write_json, write_whole, writing


def start_log(path, step, args, settings, ranks):
    """Begin log.jsonl with what made it, or, on resuming, drop what was logged after the checkpoint's step.  -> rows of steps"""
    rows = []
    if step and path.exists():  # a kill may have torn its last line
        rows = [row for line in read_text(path).split("\n") if line.endswith("}") and (row := parse_json(line, path)).get("step", 0) <= step]
    if not rows:
        import transformers
        git = shutil.which("git")
        commit = git and subprocess.run([git, "rev-parse", "HEAD"], cwd=Path(__file__).parent.parent, capture_output=True, text=True).stdout.strip()
        device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
        rows = [{"command": sys.argv, "arguments": vars(args), "settings": settings, "torch": torch.__version__, "ranks": ranks.world_size,
                 "transformers": transformers.__version__, "device": device, "commit": commit or None}]
    if ranks.is_master:
        write_whole(path, "".join(json.dumps(row, default=str) + "\n" for row in rows))
    return [row for row in rows if "loss" in row]


def log(out, ranks, **record):
    """Append a record to log.jsonl, on rank 0."""
    if ranks.is_master:
        with writing(out / "log.jsonl"), open(out / "log.jsonl", "a") as f:
            f.write(json.dumps(record) + "\n")


def status(rows, steps, seconds, device):
    """One aligned line about the steps of these log rows: rates, memory so far, what is left.  The loss is the mean over label tokens."""
    labels, tokens, size = (sum(row[k] for row in rows) for k in ("label_tokens", "tokens", "size"))
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    skipped, last = sum(row["grad_norm"] is None for row in rows), rows[-1]
    return (f"epoch {last['epoch']:3d}  step {last['step']:6d}/{steps}  loss {mean_loss(rows):.4f}  lr {last['lr']:.1e}  norm "
            f"{last['grad_norm'] or math.inf:7.3f}  {labels / seconds:6.0f} label tokens/s  {tokens / seconds:6.0f} tokens/s  padding "
            f"{100 - 100 * tokens / size:3.0f}%  {peak / 2**20:6.0f} MB  {seconds:6.1f} s  left {(steps - last['step']) * seconds / len(rows) / 60:5.1f} min"
            + (f"  {skipped} steps skipped (fp16 overflow)" if skipped else ""))


def mean_loss(rows):
    return sum(row["loss"] * row["label_tokens"] for row in rows) / sum(row["label_tokens"] for row in rows)


def keep_best(out, score, model, tokenizer):
    """Save the student to out/best_epoch_<epoch>, a Hugging Face folder with best.json, if no epoch before had this accuracy; then the
    one before goes.  score: of evaluate.py."""
    kept = sorted(out.glob("best_epoch_*"))
    if any(read_json(folder / "best.json").get("accuracy", -1) >= score["accuracy"] for folder in kept):
        return
    temporary, best = out / "best.tmp", out / f"best_epoch_{score['epoch']:03d}"
    shutil.rmtree(temporary, ignore_errors=True)
    with writing(temporary):
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    write_json(temporary / "best.json", {k: score[k] for k in ("epoch", "part", "accuracy", "n")})
    temporary.rename(best)
    for old in kept:
        shutil.rmtree(old)
    print(f"train: epoch {score['epoch']} is the best so far on the {score['part']} part, {score['accuracy']:.2f}%: kept in {best}", flush=True)
