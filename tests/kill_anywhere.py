"""Kill the toy pipeline at random moments, start it again, and compare every byte with a whole run.

    python tests/kill_anywhere.py                        # 50 kills: SIGKILL, SIGTERM, Ctrl-C
    python tests/kill_anywhere.py --ranks 2 --times 10   # torchrun: the other rank ends within 60 s

The pipeline: sampling, curation, training with a checkpoint every other step, evaluation after each
epoch and the scores, on 60 toy questions.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
FLAGS = "--epochs 3 --max_new_tokens 48 --checkpoint_steps 2 --eval_every 1 --device cpu"
SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]


# ---- one run


def pipeline(saved: Path, flags: str = FLAGS) -> None:
    """Run the method and score its students, on a small toy task."""
    import evaluate
    import finetune_cot
    import tasks

    tasks.TASKS["toy"] = tasks.TASKS["toy"]._replace(n=60, train=42, test=18)
    finetune_cot.main([*shlex.split(flags), "--saved", str(saved)])
    if os.environ.get("RANK", "0") == "0":
        files = sorted(saved.glob("completion_data/B_toy_student*/*.json"))
        with open(saved / "scores.txt", "w") as f, contextlib.redirect_stdout(f):
            evaluate.main(["score", *map(str, files)])


def start(saved: Path, log: IO[str], ranks: int = 1, flags: str = FLAGS) -> int:
    """Start a run and return its pid: a fork of this process, which holds torch, or torchrun."""
    if ranks > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        script = [f"--nproc_per_node={ranks}", __file__, "--pipeline", str(saved)]
        return subprocess.Popen([*launcher, *script], cwd=ROOT, stdout=log, stderr=log).pid
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        pipeline(saved, flags)
        status = 0
    except SystemExit as e:
        print(e.code, file=sys.stderr, flush=True)
    finally:
        sys.stdout.flush()
        os._exit(status)


def wait_for_end(pid: int, seconds: float) -> int:
    """Return the exit status of a run, negative for a signal; exit if it has not ended in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    sys.exit(f"FAILED: a run did not end within {seconds} s")


def read_log(path: Path) -> list[dict]:
    """Return the rows of a log.jsonl but the first, which holds the command line, without times."""
    rows = [json.loads(line) for line in path.open()]
    for row in rows:
        row.pop("seconds", None)
        row.pop("peak_memory_mb", None)
    return rows[1:]


def contents(folder: Path) -> dict[str, Any]:
    """Return {name: bytes} of all that a run leaves; of logs what does not depend on the clock."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or path.suffix == ".lock":
            continue
        if path.name == "log.jsonl":
            found[name] = read_log(path)
        else:
            found[name] = path.read_bytes().replace(str(folder).encode(), b"SAVED")
    return found


# ---- kills


def choose_victim(pid: int, ranks: int, chance: random.Random) -> int:
    """Return the pid to kill: of a run under torchrun one of its ranks."""
    if ranks == 1:
        return pid
    command = ["pgrep", "-P", str(pid)]
    children = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return int(chance.choice(children or [pid]))


def kill_one_run(
    saved: Path, log: IO[str], ranks: int, takes: float, chance: random.Random
) -> str | None:
    """Start a run, kill it within `takes` seconds and return the signal; None if it had ended."""
    pid = start(saved, log, ranks)
    sent = signal.SIGKILL
    if ranks == 1:
        sent = chance.choice(SIGNALS)
    time.sleep(chance.random() * takes)
    if os.waitpid(pid, os.WNOHANG)[0]:
        return None
    os.kill(choose_victim(pid, ranks, chance), sent)
    began = time.monotonic()
    wait_for_end(pid, 60)
    print(f"{sent.name}: ended in {time.monotonic() - began:.1f} s", flush=True)
    return sent.name


def run_to_end(saved: Path, log: IO[str], ranks: int) -> dict[str, Any]:
    """Run the pipeline and return what it left; exit if it fails."""
    status = wait_for_end(start(saved, log, ranks), 300)
    if status:
        sys.exit(f"FAILED with {status}: {Path(log.name).read_text()[-2000:]}")
    return contents(saved)


def report_difference(saved: Path, expected: dict[str, Any], found: dict[str, Any]) -> None:
    """Print which files differ, and keep a copy of the folder."""
    names = []
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            names.append(name)
    kept = tempfile.mkdtemp(prefix="killed-")
    shutil.copytree(saved, kept, dirs_exist_ok=True)
    print(f"DIFFERENT after restart: {names}, kept in {kept}", flush=True)


def kill_pipelines(folder: Path, log: IO[str], ranks: int, times: int, seed: int) -> int:
    """Kill runs, one to four of a pipeline; return how many pipelines ended unlike a whole one."""
    chance = random.Random(seed)
    began = time.monotonic()
    expected = run_to_end(folder / "whole", log, ranks)
    takes = time.monotonic() - began
    print(f"a run that is left alone takes {takes:.1f} s", flush=True)
    saved = folder / "killed"
    kills = []
    pipelines = 0
    differ = 0
    while len(kills) < times:
        for _ in range(chance.randrange(1, 5)):
            sent = kill_one_run(saved, log, ranks, takes, chance)
            if sent is None:
                break
            kills.append(sent)
        found = run_to_end(saved, log, ranks)
        pipelines += 1
        if found != expected:
            differ += 1
            report_difference(saved, expected, found)
        shutil.rmtree(saved)
    counts = ", ".join(f"{kills.count(name)} {name}" for name in sorted(set(kills)))
    print(f"{len(kills)} kills ({counts}) of {pipelines} pipelines, {len(expected)} files each")
    print(f"{differ} differ; {time.monotonic() - began:.0f} s")
    return differ


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--times", type=int, default=50, help="kills (default 50)")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pipeline", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.pipeline:
        return pipeline(options.pipeline)
    import transformers  # noqa: F401 (with torch: what a fork need not load again)

    import evaluate  # noqa: F401
    import train_loop  # noqa: F401

    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "w+") as log:
        differ = kill_pipelines(Path(folder), log, options.ranks, options.times, options.seed)
        said = Path(log.name).read_text()
    traceback = "Traceback"
    if options.ranks > 1:
        traceback = r"^\[rank\d+\]: Traceback"  # torchrun adds one of its own
    tracebacks = len(re.findall(traceback, said, re.M))
    print(f"{tracebacks} tracebacks; {said.count('another rank has ended')} named a lost rank")
    sys.exit(bool(differ or tracebacks))


if __name__ == "__main__":
    main()
