"""What a run leaves on disk, and resuming.   python -m pytest tests/test_checkpoints.py"""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import (
    ROOT,
    log_rows,
    one_rank,
    start_training,
    timeless_rows,
    tiny_model,
    tiny_tokenizer,
    torchrun,
    toy_data,
    train_all,
    train_command,
)

import checkpoints
import train_loop
from storage import UserError


def weights_of(out):
    return (out / "model.safetensors").read_bytes()


def checkpoint_names(out):
    return [path.name for path in sorted(out.glob("checkpoint*"))]


# ---------------- log.jsonl


def test_start_log_says_what_made_the_run(tmp_path):
    """And there is a row for every step and epoch."""
    header, *rows = train_all(tiny_model("gpt2"), tiny_tokenizer(), tmp_path)
    assert header["arguments"]["lr"] == 1e-3
    assert header["torch"] == torch.__version__
    assert header["device"].startswith("cpu")
    assert header["ranks"] == 1
    assert header["settings"] == {"test": True}
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    keys = ["step", "epoch", "loss", "lr", "grad_norm", "label_tokens", "tokens", "size"]
    assert list(steps[0]) == keys
    epoch = [row for row in steps if row["epoch"] == 1]
    total = sum(row["loss"] * row["label_tokens"] for row in epoch)
    mean = total / sum(row["label_tokens"] for row in epoch)
    assert next(row["epoch_loss"] for row in rows if "epoch_loss" in row) == pytest.approx(mean)


def test_start_log_needs_no_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    rows = train_all(tiny_model("gpt2"), tiny_tokenizer(), tmp_path, epochs=1)
    assert rows[0]["commit"] is None


def test_start_log_drops_what_came_after_the_checkpoint(tmp_path):
    """And a torn last line."""
    lines = [
        '{"command": []}',
        '{"step": 1, "loss": 2.0}',
        '{"step": 2, "loss": 1.0}',
        '{"step": 3',
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    rows = checkpoints.start_log(tmp_path, 1, one_rank(), {}, {})
    assert [row["step"] for row in rows] == [1]
    assert [row.get("step") for row in log_rows(tmp_path)] == [None, 1]


def test_start_log_names_another_computation(tmp_path, capsys):
    """Resumed with other micro-batches, a run goes on, says what differs, and logs both."""
    model = tiny_model("gpt2", dropout=0.1)
    run = start_training(model, tiny_tokenizer(), tmp_path, epochs=2)
    next(run)
    run.close()
    capsys.readouterr()
    header = log_rows(tmp_path)[0]
    given = header["arguments"] | {"micro_batch_size": 2, "packing": False}
    header["arguments"] |= {"micro_batch_size": 8, "packing": True}
    (tmp_path / "log.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [header, *log_rows(tmp_path)[1:]])
    )
    checkpoints.start_log(tmp_path, 3, one_rank(), {}, given)
    out = capsys.readouterr().out
    assert "going on after step 3 with other micro_batch_size 8 -> 2, packing True -> False" in out
    assert "dropout masks are not those of an unbroken run" in out
    first, *rows = log_rows(tmp_path)
    assert first["arguments"]["micro_batch_size"] == 8
    assert [row["arguments"]["micro_batch_size"] for row in first["resumed"]] == [2]
    assert first["resumed"][0]["step"] == 3
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]


def test_start_log_names_threads(tmp_path, capsys):
    """The number of threads changes rounding, so it is named, too; the same again is not."""
    header = checkpoints.log_header(one_rank(), {}, {})
    old = header | {"device": "cpu, 64 threads"}
    (tmp_path / "log.jsonl").write_text(json.dumps(old) + "\n")
    checkpoints.start_log(tmp_path, 1, one_rank(), {}, {})
    assert f"device cpu, 64 threads -> {header['device']}" in capsys.readouterr().out
    checkpoints.start_log(tmp_path, 1, one_rank(), {}, {})
    assert capsys.readouterr().out == ""


def test_log_every_prints_a_line_for_every_so_many_steps(tmp_path, capsys):
    train_all(tiny_model("gpt2"), tiny_tokenizer(), tmp_path, epochs=1, log_every=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("    epoch")]
    assert len(lines) == 4  # 3 steps and the epoch
    assert re.search(
        r"loss \d\.\d{4}  [\d,]+ tokens/s  [\d.]+ s, about \d+ s of training left in all", lines[0]
    )


# ---------------- Resuming


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_load_checkpoint_resumes_to_the_same_bits(kind, tmp_path):
    """A run stopped after an epoch goes on to bit-identical weights and the same log."""
    whole = tmp_path / "whole"
    stopped = tmp_path / "stopped"
    train_all(tiny_model(kind, dropout=0.1), tiny_tokenizer(), whole, epochs=4)
    run = start_training(tiny_model(kind, dropout=0.1), tiny_tokenizer(), stopped, epochs=4)
    next(run)
    next(run)
    run.close()
    # a step of the third epoch that was logged and lost
    with checkpoints.open_log(stopped, one_rank()) as log:
        log({"step": 7, "epoch": 3, "loss": 99.0})
    torch.manual_seed(12345)  # whatever the random state of the new process is
    model = tiny_model(kind, dropout=0.1)
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    assert list(start_training(model, tiny_tokenizer(), stopped, epochs=4)) == [2, 3, 4]
    assert weights_of(whole) == weights_of(stopped)
    assert timeless_rows(stopped) == timeless_rows(whole)
    assert not checkpoint_names(stopped)
    assert json.loads((stopped / "run.json").read_text())["finished"]


def test_save_checkpoint_keeps_the_newest_and_survives_a_full_disk(tmp_path):
    changes = {"epochs": 9, "keep": 2}
    run = start_training(tiny_model("gpt2"), tiny_tokenizer(), tmp_path, **changes)
    for _ in range(4):
        next(run)
    kept = ["checkpoint_00000009.pt", "checkpoint_00000012.pt"]
    assert checkpoint_names(tmp_path) == kept
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # as a full disk: no file grows beyond this
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError):
            next(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint_names(tmp_path) == kept
    run = start_training(tiny_model("gpt2"), tiny_tokenizer(), tmp_path, **changes)
    assert next(run) == 4


def test_keep_best_keeps_the_first_of_the_best_epochs(tmp_path):
    model = tiny_model("gpt2")
    for epoch, accuracy in ((1, 50.0), (2, 60.0), (3, 60.0), (4, 55.0)):
        score = {"epoch": epoch, "part": "test", "accuracy": accuracy, "n": 10}
        checkpoints.keep_best(tmp_path, score, model, tiny_tokenizer())
    [folder] = tmp_path.glob("best*")
    assert folder.name == "best_epoch_002"
    assert json.loads((folder / "best.json").read_text())["accuracy"] == 60.0
    assert (folder / "model.safetensors").exists()


# ---------------- Stopped and killed


@pytest.mark.slow
def test_sigterm_writes_a_checkpoint_within_the_epoch(tmp_path):
    """And the run goes on to the same bits and log."""
    data = toy_data(60)
    out = tmp_path / "out"
    train_all(tiny_model("t5", dropout=0.1), tiny_tokenizer(), tmp_path / "whole", data, epochs=3)

    def stop():
        # 8 steps an epoch and its own row
        while not (out / "log.jsonl").exists() or len(timeless_rows(out)) < 11:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    with pytest.raises(UserError, match="stopped by SIGTERM at step"):
        train_all(tiny_model("t5", dropout=0.1), tiny_tokenizer(), out, data, epochs=3)
    [name] = checkpoint_names(out)
    assert int(name.removesuffix(".pt").rpartition("_")[2]) % 8
    train_all(tiny_model("t5", dropout=0.1), tiny_tokenizer(), out, data, epochs=3)
    assert timeless_rows(out) == timeless_rows(tmp_path / "whole")
    assert weights_of(out) == weights_of(tmp_path / "whole")


@pytest.mark.parametrize("at, is_finished", [(8, False), (16, True)])
def test_sigterm_in_the_last_step_of_an_epoch_stops_after_the_next(
    at, is_finished, tmp_path, monkeypatch
):
    """In the last step of all, the run is finished."""
    data = toy_data(60)
    out = tmp_path / "out"
    step = train_loop.optimizer_step
    sent = []

    def terminated(setup, batch, number, *more):
        if number == at and not sent:
            sent.append(number)
            os.kill(os.getpid(), signal.SIGTERM)
        return step(setup, batch, number, *more)

    def run(folder):
        train_all(tiny_model("gpt2", dropout=0.1), tiny_tokenizer(), folder, data, epochs=2)

    run(tmp_path / "whole")
    monkeypatch.setattr(train_loop, "optimizer_step", terminated)
    if is_finished:
        run(out)
    else:
        # it came within step 8, so step 9 knows of it
        with pytest.raises(UserError, match="stopped by SIGTERM at step 9"):
            run(out)
        run(out)
    assert sent == [at]
    assert timeless_rows(out) == timeless_rows(tmp_path / "whole")
    assert weights_of(out) == weights_of(tmp_path / "whole")


STOPS = (signal.SIGKILL, 7), (signal.SIGTERM, 17), (signal.SIGKILL, 27)  # and the rows before it


def start_process(n_ranks, command):
    """-> a training process, under torchrun where there are ranks, in a group of its own."""
    if n_ranks > 1:
        return torchrun(n_ranks, *command)
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def kill_family(pid):
    """Kill a process and its children, by their ids."""
    command = ["ps", "-o", "pid=", "--ppid", str(pid)]
    children = subprocess.run(command, check=False, capture_output=True, text=True).stdout.split()
    for child in [pid, *map(int, children)]:
        os.kill(child, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("n_ranks", [1, 2])
def test_a_run_stopped_at_any_moment_resumes_to_the_same_bits(n_ranks, tmp_path, model_folder):
    data = tmp_path / "data.json"
    data.write_text(json.dumps(toy_data(40)))
    flags = ["--epochs", 6, "--checkpoint_steps", 2, "--lr", "1e-3"]
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    rng = random.Random(n_ranks)
    command = train_command(model_folder("gpt2"), data, killed, *flags)
    process = start_process(n_ranks, train_command(model_folder("gpt2"), data, whole, *flags))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    for signal_sent, n_rows in STOPS:
        process = start_process(n_ranks, command)
        while process.poll() is None:
            if (killed / "log.jsonl").exists() and len(log_rows_so_far(killed)) > n_rows:
                break
            time.sleep(0.02)
        time.sleep(rng.random() * 0.05)
        if signal_sent == signal.SIGKILL:
            kill_family(process.pid)
        else:
            process.send_signal(signal_sent)
        output, _ = process.communicate(timeout=60)
        assert process.returncode != 0, output
        assert signal_sent == signal.SIGKILL or "stopped by SIGTERM at step" in output
    process = start_process(n_ranks, command)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "going on after step" in output
    assert weights_of(whole) == weights_of(killed)
    assert timeless_rows(whole) == timeless_rows(killed)


def log_rows_so_far(out):
    """The lines of a log that is being written: the last may be torn."""
    return (out / "log.jsonl").read_text().splitlines()


@pytest.mark.slow
def test_when_a_rank_dies_the_others_end(tmp_path, model_folder):
    data = tmp_path / "data.json"
    data.write_text(json.dumps(toy_data(400)))
    out = tmp_path / "out"
    flags = ["--epochs", 1000, "--checkpoint_every", 0]
    process = torchrun(2, *train_command(model_folder("gpt2"), data, out, *flags))
    deadline = time.monotonic() + 60
    while not (out / "log.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    command = ["ps", "-o", "pid=", "--ppid", str(process.pid)]
    children = subprocess.run(command, check=False, capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
