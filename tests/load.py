"""A million completions: how fast, and in how much memory, `evaluate.py score` reads them.

    python tests/load.py --files 15 --rows 3334                 # 50,000 completions, seconds
    python tests/load.py                                        # 1,000,000 in 300 files, 2 GB on the disk while it runs
    python tests/load.py --students                             # the same of students, whose rationales are read for answers too

Beside it, on the same files: the published evaluator's steps, plainly written again, a DataFrame row a completion where
pandas is installed, else a dict a row.  Exits with 1 where a bound is not kept: 20,000 completions/s a core, 1.5 GB.
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

ROOT = Path(__file__).resolve().parent.parent
SENTENCE = "Each of the {} boxes holds {} red apples and {} green ones, so we add them up and take away what was given to the neighbours. "


def make(folder, files, rows, seed=0, students=False):
    """Write completion files of two-step Zero-shot-CoT on a numeric task, about 2 kB a completion; -> their paths.

    As in the published files, nine of ten completions hold one number and the text is in the rationale.  With `students`,
    rationale and answer are one completion, as those of fine-tuned students are, and as long as the published rationales of
    multiarith and svamp: 250 characters, 7 numbers."""
    chance = random.Random(seed)
    paths = []
    text = lambda n: "".join(
        SENTENCE.format(*(chance.randrange(100) for _ in range(3))) for _ in range(n)
    )
    samples = [
        {"sample_index": i, "question": text(2), "answer": str(chance.randrange(1000))}
        for i in range(600)
    ]
    (folder / "data/dataset").mkdir(parents=True)
    (folder / "data/dataset/multiarith.json").write_text(
        json.dumps({"metadata": {"dataset_key": "multiarith"}, "data": samples})
    )
    for number in range(files):
        data = {}
        for j in range(rows):
            s = samples[j % 600]
            reasoning = text(2 if students else 5)
            prompt = f"Q: {s['question']}\nA: Let's think step by step."
            right = chance.random() < 0.7
            row = {
                **s,
                "completion_index": j // 600,
                "prompt": f"{prompt} {reasoning}\nTherefore, the answer is",
                "completion": f" {s['answer'] if right else chance.randrange(1000)}"
                + (f", since {chance.randrange(100)} are left." if chance.random() < 0.1 else "."),
                "finish_reason": "stop",
                "reasoning_prompt": prompt,
                "reasoning_completion": reasoning,
                "reasoning_finish_reason": "stop",
            }
            if students:
                row = {k: v for k, v in row.items() if "reasoning" not in k} | {
                    "prompt": f"{s['question']} ###",
                    "completion": f" {reasoning}-->{row['completion']}",
                }
            data.setdefault(str(s["sample_index"]), []).append(row)
        paths.append(folder / f"D_multiarith__{number:03d}.json")
        method, template = ("ft_cot", "ft_cot_token") if students else ("zs_cot", "zs_cot")
        paths[-1].write_text(
            json.dumps(
                {
                    "metadata": {
                        "dataset_key": "multiarith",
                        "base_model": "m",
                        "completion_key": method,
                        "prediction_template": template,
                    },
                    "data": data,
                },
                indent=4,
            )
        )
    return paths


def plain(path, pandas=None):
    """The published evaluator's steps: all rows into a table, each cleansed and compared, the mean of a column; -> accuracy, %."""
    rows = [row for many in json.loads(Path(path).read_text())["data"].values() for row in many]

    def evaluate_row(row):
        before, found, after = row["completion"].partition("-->")
        found = re.findall(r"-?\d+(?:\.\d+)?", (after if found else before).replace(",", ""))
        prediction = found[0] if found else ""
        answer = row["answer"].replace(",", "")
        return {
            "sample_index": row["sample_index"],
            "completion_index": row["completion_index"],
            "correct": prediction == answer,
            "contains_answer": answer in found,
            "correct_format": True,
            "complete": row["finish_reason"] == "stop",
        }

    if not pandas:
        table = [evaluate_row(row) for row in rows]
        return 100 * sum(row["correct"] for row in table) / len(table)
    table = pandas.concat(
        [
            pandas.DataFrame([row]).apply(lambda r: pandas.Series(evaluate_row(r)), axis=1)
            for row in rows
        ]
    )
    return 100 * float(table["correct"].mean())


def memory(pid):
    """-> bytes that a process and its children hold, shared pages counted once."""
    total = 0
    pids = [pid]
    for p in pids:
        try:
            pids += map(int, Path(f"/proc/{p}/task/{p}/children").read_text().split())
            total += 1024 * int(
                re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{p}/smaps_rollup").read_text(), re.M)[1]
            )
        except (OSError, TypeError):
            continue  # it has just ended
    return total


def measured(command):
    """-> (seconds, most bytes held at a time, output) of a command."""
    start = time.perf_counter()
    most = [0]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    def watch():
        while process.poll() is None:
            most[0] = max(most[0], memory(process.pid))
            time.sleep(0.2)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    seconds = time.perf_counter() - start
    watcher.join()
    assert process.returncode == 0, process.returncode
    return seconds, most[0], output


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", type=int, default=300)
    parser.add_argument("--rows", type=int, default=3334, help="completions a file")
    parser.add_argument(
        "--students", action="store_true", help="rationale and answer in one completion"
    )
    parser.add_argument(
        "--folder",
        help="where to put the files (default: a temporary folder; all of it is removed)",
    )
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        start = time.perf_counter()
        paths = make(folder, args.files, args.rows, students=args.students)
        n = args.files * args.rows
        size = sum(p.stat().st_size for p in paths)
        cores = len(os.sched_getaffinity(0))
        print(
            f"{n:,} completions in {len(paths)} files, {size / 1e9:.2f} GB, made in {time.perf_counter() - start:.0f} s; {cores} cores",
            flush=True,
        )
        command = [
            sys.executable,
            "evaluate.py",
            "score",
            *map(str, paths),
            "--part",
            "all",
            "--data",
            str(folder / "data"),
            "--json",
        ]
        seconds, most, output = measured(command)
        scores = [json.loads(line) for line in output.splitlines()]
        rate = n / seconds / cores
        print(
            f"evaluate.py score: {seconds:.1f} s, {rate:,.0f} completions/s a core, at most {most / 1e6:.0f} MB",
            flush=True,
        )
        assert len(scores) == len(paths)
        assert sum(s["n"] for s in scores) == n
        try:
            import pandas
        except ImportError:
            pandas = None
        few, kind = (
            (paths[:1], "pandas, a DataFrame row a completion")
            if pandas
            else (paths[:5], "no pandas: a dict a row")
        )
        start = time.perf_counter()
        accuracies = [plain(path, pandas) for path in few]
        print(
            f"plain re-implementation ({kind}), one core, paper rules alone: {len(few) * args.rows / (time.perf_counter() - start):,.0f} completions/s"
        )
        assert [round(a, 2) for a in accuracies] == [s["accuracy"] for s in scores[: len(few)]]
        sys.exit(not (rate >= 20_000 and most < 1.5e9))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
