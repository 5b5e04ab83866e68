"""A million completions: how fast, and in how much memory, `evaluate.py score` reads them.

    python tests/load.py --files 15 --rows 3334       # 50,000 completions, seconds
    python tests/load.py                              # 1,000,000 in 300 files, 2 GB on the disk
    python tests/load.py --students                   # of students, whose rationales are read too

Beside it, on the same files: the published evaluator's steps, plainly written again, a DataFrame
row a completion where pandas is installed, else a dict a row.

Exits with 1 where a bound is not kept: 20,000 completions/s a core, 1.5 GB.
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SENTENCE = (
    "Each of the {} boxes holds {} red apples and {} green ones, so we add them up and take away "
    "what was given to the neighbours. "
)
QUESTIONS = 600
LOWEST_RATE = 20_000  # completions/s a core
MOST_MEMORY = 1.5e9  # bytes


def make_text(rng: random.Random, sentences: int) -> str:
    text = ""
    for _ in range(sentences):
        text += SENTENCE.format(rng.randrange(100), rng.randrange(100), rng.randrange(100))
    return text


def make_row(rng: random.Random, sample: dict[str, Any], k: int, students: bool) -> dict[str, Any]:
    """Return completion k of a sample, of two-step Zero-shot-CoT or of a fine-tuned student."""
    reasoning = make_text(rng, 2 if students else 5)
    prompt = f"Q: {sample['question']}\nA: Let's think step by step."
    answer = sample["answer"]
    if rng.random() >= 0.7:
        answer = str(rng.randrange(1000))
    end = "."
    if rng.random() < 0.1:
        end = f", since {rng.randrange(100)} are left."
    row = {**sample, "completion_index": k, "finish_reason": "stop"}
    if students:
        text = f" {reasoning}--> {answer}{end}"
        return row | {"prompt": f"{sample['question']} ###", "completion": text}
    return row | {
        "prompt": f"{prompt} {reasoning}\nTherefore, the answer is",
        "completion": f" {answer}{end}",
        "reasoning_prompt": prompt,
        "reasoning_completion": reasoning,
        "reasoning_finish_reason": "stop",
    }


def make_files(folder: Path, files: int, rows: int, students: bool) -> list[Path]:
    """Write completion files on a numeric task, about 2 kB a completion; return their paths.

    As in the published files, nine of ten completions hold one number and the text is in the
    rationale.  With `students`, rationale and answer are one completion, as those of fine-tuned
    students are, and as long as the published rationales of multiarith and svamp: 250 characters,
    7 numbers.
    """
    rng = random.Random(0)
    samples = []
    for i in range(QUESTIONS):
        answer = str(rng.randrange(1000))
        samples.append({"sample_index": i, "question": make_text(rng, 2), "answer": answer})
    write_json(
        folder / "data/dataset/multiarith.json",
        {"metadata": {"dataset_key": "multiarith"}, "data": samples},
    )
    method, template = "zs_cot", "zs_cot"
    if students:
        method, template = "ft_cot", "ft_cot_token"
    metadata = {"dataset_key": "multiarith", "base_model": "m", "completion_key": method}
    metadata["prediction_template"] = template
    paths = []
    for number in range(files):
        data: dict[str, list] = {}
        for j in range(rows):
            sample = samples[j % QUESTIONS]
            row = make_row(rng, sample, j // QUESTIONS, students)
            data.setdefault(str(sample["sample_index"]), []).append(row)
        paths.append(folder / f"D_multiarith__{number:03d}.json")
        write_json(paths[-1], {"metadata": metadata, "data": data})
    return paths


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=4))


def evaluate_row(row: dict[str, Any]) -> dict[str, Any]:
    """Cleanse and compare one completion, as the published evaluator does."""
    before, arrow, after = row["completion"].partition("-->")
    text = before
    if arrow:
        text = after
    found = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    answer = row["answer"].replace(",", "")
    return {
        "sample_index": row["sample_index"],
        "completion_index": row["completion_index"],
        "correct": found[:1] == [answer],
        "contains_answer": answer in found,
        "correct_format": True,
        "complete": row["finish_reason"] == "stop",
    }


def plain_accuracy(path: Path, pandas: ModuleType | None) -> float:
    """Return the accuracy in percent, by the published evaluator's steps, a table of all rows."""
    rows: list[dict[str, Any]] = []
    for many in json.loads(path.read_text())["data"].values():
        rows += many
    if not pandas:
        return 100 * sum(evaluate_row(row)["correct"] for row in rows) / len(rows)

    def evaluate_series(row: Any) -> Any:
        return pandas.Series(evaluate_row(row))

    frames = [pandas.DataFrame([row]).apply(evaluate_series, axis=1) for row in rows]
    return 100 * float(pandas.concat(frames)["correct"].mean())


def memory(pid: int) -> int:
    """Return the bytes that a process and its children hold, shared pages counted once."""
    total = 0
    pids = [pid]
    for p in pids:
        try:
            pids += map(int, Path(f"/proc/{p}/task/{p}/children").read_text().split())
            rollup = Path(f"/proc/{p}/smaps_rollup").read_text()
            total += 1024 * int(re.search(r"^Pss:\s+(\d+)", rollup, re.MULTILINE)[1])
        except (OSError, TypeError):
            continue  # it has just ended
    return total


def measure(command: list[str]) -> tuple[float, int, str]:
    """Return seconds, most bytes held at a time, and output of a command."""
    start = time.perf_counter()
    seen = [0]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    def watch() -> None:
        while process.poll() is None:
            seen.append(memory(process.pid))
            time.sleep(0.2)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    seconds = time.perf_counter() - start
    watcher.join()
    assert process.returncode == 0, process.returncode
    return seconds, max(seen), output


def compare(folder: Path, files: int, rows: int, students: bool) -> bool:
    """Print both speeds; return whether the bounds are kept."""
    paths = make_files(folder, files, rows, students)
    count = files * rows
    cores = len(os.sched_getaffinity(0))
    size = sum(path.stat().st_size for path in paths) / 1e9
    print(f"{count:,} completions in {files} files, {size:.2f} GB; {cores} cores", flush=True)
    command = [sys.executable, "evaluate.py", "score", *map(str, paths)]
    command += ["--part", "all", "--data", str(folder / "data"), "--json"]
    seconds, most, output = measure(command)
    rate = count / seconds / cores
    speed = f"{seconds:.1f} s, {rate:,.0f} completions/s a core"
    print(f"evaluate.py score: {speed}, at most {most / 1e6:.0f} MB", flush=True)
    scores = [json.loads(line) for line in output.splitlines()]
    assert sum(score["n"] for score in scores) == count
    try:
        import pandas
    except ImportError:
        pandas = None
    few = paths[:5]
    kind = "a dict a row"
    if pandas:
        few = paths[:1]
        kind = "pandas, a DataFrame row a completion"
    start = time.perf_counter()
    accuracies = [round(plain_accuracy(path, pandas), 2) for path in few]
    plain_rate = len(few) * rows / (time.perf_counter() - start)
    print(f"plain ({kind}), one core, paper rules alone: {plain_rate:,.0f} completions/s")
    assert accuracies == [score["accuracy"] for score in scores[: len(few)]]
    return rate >= LOWEST_RATE and most < MOST_MEMORY


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--files", type=int, default=300)
    add("--rows", type=int, default=3334, help="completions a file")
    add("--students", action="store_true", help="rationale and answer in one completion")
    add("--folder", help="where to put the files, which are removed (default: a temporary folder)")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        is_fast = compare(folder, options.files, options.rows, options.students)
    finally:
        shutil.rmtree(folder)
    sys.exit(not is_fast)


if __name__ == "__main__":
    main()
