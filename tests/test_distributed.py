"""Ranks, and what other machines get of rank 0.   pytest tests/test_distributed.py [--slow]"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, fork_ranks, run, step_losses

import distributed


def test_ranks_default_is_the_only_one(capsys):
    """A process that is alone runs everything and prints."""
    ranks = distributed.Ranks()
    assert (ranks.is_rank0, ranks.world_size, ranks.device) == (True, 1, None)
    assert distributed.on_rank0(ranks, lambda: 7) == 7
    distributed.print0(ranks, "hello")
    distributed.print0(distributed.Ranks(rank=1, world_size=2), "not this")
    assert capsys.readouterr().out == "hello\n"


def share_two_files(folders):
    """As a rank, share a and b, as if each rank had a machine of its own."""
    ranks = distributed.init_ranks(torch.device("cpu"))
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    distributed.PART_BYTES = 4
    names = ["a", "b"] if ranks.is_rank0 else []
    distributed.share_files(folders[ranks.rank], names, ranks)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return the files of two machines after a share of a and b; the second had another b."""
    folder = tmp_path_factory.mktemp("machines")
    one, two = folder / "one", folder / "two"
    one.mkdir()
    (one / "a").write_text("0123456789")
    (one / "b").write_text("same")
    (one / "c").write_text("not asked for")
    two.mkdir()
    (two / "b").write_text("stale")
    fork_ranks(2, lambda: share_two_files((one, two)), folder)
    return [{path.name: path.read_text() for path in machine.iterdir()} for machine in (one, two)]


def test_share_files_copies_what_another_machine_lacks(found):
    assert found[1] == {"a": "0123456789", "b": "same"}


def test_share_files_leaves_the_first_machine_as_it_is(found):
    assert found[0] == {"a": "0123456789", "b": "same", "c": "not asked for"}


def run_on_rank0():
    """As a rank, have rank 0 call a function; print the result and who called it."""
    ranks = distributed.init_ranks(torch.device("cpu"))
    calls = []
    result = distributed.on_rank0(ranks, lambda: calls.append(1) or {"from": ranks.rank})
    distributed.print0(ranks, "once")
    print(f"{ranks.rank}: {result} {calls}\n", end="")
    distributed.wait_for_all(ranks)


def test_on_rank0_of_two(tmp_path):
    """Rank 0 alone runs the function, and both have its result."""
    printed = fork_ranks(2, run_on_rank0, tmp_path)
    assert sorted(printed.splitlines()) == ["0: {'from': 0} [1]", "1: {'from': 0} []", "once"]


# ---- The whole method on two machines: two agents of torchrun, two ranks each

FLAGS = "--method ft_cot --device cpu --batch_size 8 --checkpoint_steps 20 --eval_every 0".split()


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def wait_for(condition, seconds):
    """Wait until condition() holds, at most so long."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


def start_machine(number, port, saved, *flags):
    """Start torchrun's agent of one of two machines, in a process group of its own."""
    agents = f"--nnodes=2 --nproc_per_node=2 --rdzv_backend=c10d --rdzv_endpoint=127.0.0.1:{port}"
    command = [sys.executable, "-m", "torch.distributed.run", *agents.split()]
    command += [f"--node_rank={number}", "finetune_cot.py", "--saved", saved, *FLAGS, *flags]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill_machine(agent):
    """Kill an agent and its ranks, which have sessions of their own."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = path.read_text().rpartition(")")[2].split()
            parents[int(path.parent.name)] = int(fields[1])
    dying = [agent.pid, *(pid for pid, parent in parents.items() if parent == agent.pid)]
    assert len(dying) == 3
    for pid in dying:
        os.kill(pid, signal.SIGKILL)


def run_machines(folders, *flags):
    """Run the method on two machines to its end; return what the first one printed."""
    port = free_port()
    agents = [start_machine(i, port, folder, *flags) for i, folder in enumerate(folders)]
    outputs = [agent.communicate(timeout=600)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    return outputs[0]


def losses_of(saved):
    [log] = saved.glob("models/*/D_toy__T_ft_cot*/log.jsonl")
    return step_losses(log.parent)


def weights_of(saved):
    from safetensors.torch import load_file

    [path] = saved.glob("models/*/D_toy__T_ft_cot*/model.safetensors")
    return load_file(path)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Return the folder of the same run in one process."""
    saved = tmp_path_factory.mktemp("one") / "saved"
    done = run("finetune_cot.py", "--saved", saved, *FLAGS, "--epochs", "1")
    assert done.returncode == 0, done.stderr
    return saved


@pytest.mark.slow
@pytest.mark.parametrize("is_shared", [True, False], ids=["shared folder", "own folders"])
def test_two_machines_train_as_one_process_does(tmp_path, one_process, is_shared):
    folders = [tmp_path / "one", tmp_path / ("one" if is_shared else "two")]
    output = run_machines(folders, "--epochs", "1")
    assert "= 4 rank(s)" in output
    assert losses_of(folders[0]) == pytest.approx(losses_of(one_process), rel=1e-6)


@pytest.mark.slow
def test_a_machine_that_dies_ends_the_other_and_the_run_resumes(tmp_path, one_process):
    """Within a minute, with a sentence; the same command ends with the weights of no stop."""
    folders = [tmp_path / "one", tmp_path / "two"]
    port = free_port()
    agents = [start_machine(i, port, folder, "--epochs", "1") for i, folder in enumerate(folders)]
    wait_for(lambda: list(folders[0].glob("models/*/*/checkpoint_*.pt")), 300)
    kill_machine(agents[1])
    start = time.monotonic()
    output, _ = agents[0].communicate(timeout=120)
    assert time.monotonic() - start < 60
    assert agents[0].returncode != 0
    assert "another rank has ended, so this one ends too" in output
    assert "going on after step" in run_machines(folders, "--epochs", "1")
    weights = weights_of(folders[0])
    for name, expected in weights_of(one_process).items():
        if name.endswith("attn.c_attn.bias"):  # a key's has no gradient but rounding
            continue
        assert (weights[name] - expected).abs().max() < 1e-4, name
