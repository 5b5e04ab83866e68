"""Kill the whole toy pipeline at random moments, start it again, and compare every byte with a run that was left alone.

    python tests/kill_anywhere.py                  # 50 kills: SIGKILL, SIGTERM, Ctrl-C
    python tests/kill_anywhere.py --ranks 2 --times 10   # torchrun, one rank is killed: the other must end within 60 s

Sampling, curation, training with a checkpoint every other step, evaluation after each epoch and the table, on 60 toy questions.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
FLAGS = [
    "--epochs",
    "3",
    "--max_new_tokens",
    "48",
    "--checkpoint_steps",
    "2",
    "--eval_every",
    "1",
    "--device",
    "cpu",
]


def pipeline(saved):
    """The method and the table, on a small toy task."""
    import evaluate
    import finetune_cot
    import tasks

    tasks.TASKS["toy"] = tasks.TASKS["toy"]._replace(n=60, train=42, test=18)
    finetune_cot.main([*FLAGS, "--saved", str(saved)])
    if os.environ.get("RANK", "0") == "0":
        with open(Path(saved) / "table.txt", "w") as f, contextlib.redirect_stdout(f):
            evaluate.main(["table", "--saved", str(saved)])


def start(saved, ranks, log):
    """-> the pid of a run: a fork of this process, which has torch in memory already, or torchrun."""
    if ranks > 1:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={ranks}",
            __file__,
            "--pipeline",
            str(saved),
        ]
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log).pid
    if pid := os.fork():
        return pid
    os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    status = 1
    try:
        pipeline(saved)
        status = 0
    except SystemExit as e:
        print(e.code, file=sys.stderr, flush=True)
    finally:
        sys.stdout.flush()
        os._exit(status)


def end(pid, seconds):
    """-> the exit status of a run, negative for a signal; the harness fails where it has not ended in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    sys.exit(f"FAILED: a run did not end within {seconds} s")


def contents(folder):
    """-> {name: bytes} of all that a run leaves; of logs, all but what the clock or the command line wrote."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"):
        found[str(path.relative_to(folder))] = path.read_bytes().replace(
            str(folder).encode(), b"SAVED"
        )
        if path.name == "log.jsonl":
            found[str(path.relative_to(folder))] = [
                {k: v for k, v in json.loads(line).items() if k != "seconds"}
                for line in path.open()
            ][1:]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--times", type=int, default=50, help="kills (default 50)")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pipeline", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.pipeline:
        return pipeline(args.pipeline)
    import torch  # noqa: F401 (what a fork need not load again)
    import transformers  # noqa: F401
    import evaluate  # noqa: F401
    import train_loop  # noqa: F401

    chance = random.Random(args.seed)
    began = time.monotonic()
    kills = {}
    resumed = 0
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "w+") as log:
        whole = Path(folder) / "whole"
        at = time.monotonic()
        if end(start(whole, args.ranks, log), 300):
            sys.exit("FAILED: " + (Path(folder) / "log").read_text())
        takes = time.monotonic() - at
        expected = contents(whole)
        print(f"a run that is left alone takes {takes:.1f} s", flush=True)
        done = lost = 0
        while done < args.times:
            saved = Path(folder) / "killed"
            for _ in range(
                chance.randrange(1, 5)
            ):  # kills of one pipeline, each somewhere in what is left of it
                pid = start(saved, args.ranks, log)
                sent = chance.choice(
                    [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
                    if args.ranks == 1
                    else [signal.SIGKILL]
                )
                time.sleep(chance.random() * takes)
                if os.waitpid(pid, os.WNOHANG)[0]:
                    break  # it was done before
                victim = pid
                if args.ranks > 1:
                    children = subprocess.run(
                        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True
                    ).stdout.split()
                    victim = int(chance.choice(children)) if children else pid
                os.kill(victim, sent)
                ended = time.monotonic()
                end(pid, 60)
                print(f"{sent.name}: ended in {time.monotonic() - ended:.1f} s", flush=True)
                done, kills[sent.name] = done + 1, kills.get(sent.name, 0) + 1
            if status := end(start(saved, args.ranks, log), 300):
                sys.exit(f"FAILED with {status}: " + (Path(folder) / "log").read_text()[-2000:])
            found = contents(saved)
            different = [
                name for name in {*expected, *found} if expected.get(name) != found.get(name)
            ]
            lost += bool(different)
            resumed += 1
            if different:
                kept = shutil.copytree(
                    saved, f"{tempfile.gettempdir()}/killed-{os.getpid()}-{resumed}"
                )
                print(f"DIFFERENT after restart: {sorted(different)}, kept in {kept}", flush=True)
            shutil.rmtree(saved)
        said = (Path(folder) / "log").read_text()
        ours = re.findall(
            r"^\[rank\d+\]: Traceback" if args.ranks > 1 else "Traceback", said, re.M
        )  # torchrun adds one of its own
        print(
            f"{done} kills ({', '.join(f'{n} {name}' for name, n in kills.items())}) of {resumed} pipelines, {len(expected)} files each: "
            f"{lost} differ; {len(ours)} tracebacks; "
            f"{said.count('another rank has ended')} times the other rank said why; {time.monotonic() - began:.0f} s"
        )
        sys.exit(bool(lost or ours))


if __name__ == "__main__":
    main()
