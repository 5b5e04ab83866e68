"""Make, grade and score completion datasets; a command line for that and for generation.

python evaluate.py generate --model DIR --prompts FILE.jsonl --out FILE.jsonl   # {"prompt": ...}
python evaluate.py score saved/completion_data/*/*.json [--part train|test|all] [--json]
python evaluate.py table [--format markdown]       # beside the paper's values
python evaluate.py plot degree --out FILE.png      # figures
python evaluate.py page --out FILE [FILE ...]      # all of it, to look through in a browser
python evaluate.py show FILE [--disagree]          # completions; or where the rules differ
python evaluate.py diff FILE FILE                  # where two runs differ
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import sys
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import distributed
import storage
import tasks
import terminal
from completions import Completion, read_completions, rows_of_part
from decoding import StrPath, generate, has_extra
from distributed import all_gather, rank_and_world_size
from models import load_model, select_device
from storage import UserError

if TYPE_CHECKING:
    from tasks import Verdict


# ---------------- Grade and score


class GradedRow(NamedTuple):
    """A completion and what the rules make of it."""

    row: Completion
    outcome: str  # by the rules asked for: right, wrong or unreadable
    verdicts: dict[str, Verdict]  # by both: "paper", "flexible"


class Score(TypedDict, total=False):
    """What is known of a scored file, as `score --json` prints it; shares are percentages."""

    file: str
    task: str
    model: str | None
    method: str | None
    train_key: str | None
    epoch: int | None
    template: str | None
    run: dict | None
    part: str
    split: str
    rules: str  # those that decide
    n: int  # completions
    questions: int
    correct: int
    accuracy: float
    low: float  # 95% interval
    high: float
    paper: float  # accuracy by these rules
    flexible: float
    contains_answer: float
    correct_format: float
    complete: float  # that stopped by themselves
    no_answer: int
    votes: dict  # of extras/compare.py, where questions have several answers


def wilson_interval(correct: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95% Wilson score interval of a share, in percent: of 0 of 10 (0, 27.75)."""
    share = correct / n
    z2 = z * z / n
    middle = share + z2 / 2
    variance = share * (1 - share) / n + z2 / (4 * n)
    half = z * math.sqrt(variance)
    whole = 1 + z2
    low = max(0.0, middle - half)
    high = min(whole, middle + half)
    return 100 * low / whole, 100 * high / whole


def grade_rows(metadata: dict, rows: list[Completion], rules: str) -> list[GradedRow]:
    """Grade completions by both sets of rules; `rules` decide the outcome."""
    task = metadata["dataset_key"]
    template = metadata.get("prediction_template")
    graders = {}
    for name in ("paper", "flexible"):
        graders[name] = tasks.make_grader(task, template, name)
    graded = []
    for row in rows:
        verdicts = {}
        for name, grade in graders.items():
            verdicts[name] = grade(row["completion"], row["answer"])
        verdict = verdicts[rules]
        outcome = "wrong"
        if verdict.correct:
            outcome = "right"
        elif verdict.prediction in (None, ""):
            outcome = "unreadable"
        one = GradedRow(row, outcome, verdicts)
        graded.append(one)
    return graded


def score(
    path: StrPath,
    part: str = "test",
    split: str | None = None,
    data_dir: StrPath = "data",
    rules: str = "paper",
    allow_partial: bool = False,
) -> Score:
    """Score a part of a completion file.  split: None is the one that it was made for."""
    file = read_completions(path)
    scored, _ = score_rows(path, *file, part, split, data_dir, rules, allow_partial)
    return scored


def score_rows(
    path: StrPath,
    metadata: dict,
    rows: list[Completion],
    part: str,
    split: str | None,
    data_dir: StrPath,
    rules: str,
    allow_partial: bool,
) -> tuple[Score, list[GradedRow]]:
    """Return the score of a part of what was read from path, and its graded rows."""
    split = split or metadata.get("split") or "default"
    rows = rows_of_part(path, metadata, rows, part, split, data_dir, allow_partial)
    if not rows:
        raise UserError(f"{path} has no completion of part '{part}'")
    graded = grade_rows(metadata, rows, rules)
    asked = [one.verdicts[rules] for one in graded]
    correct = sum(verdict.correct for verdict in asked)
    questions = len({row["sample_index"] for row in rows})
    # several answers to a question are not independent: the interval counts questions
    low, high = wilson_interval(correct * questions / len(rows), questions)
    scored = Score(
        file=str(path),
        task=metadata["dataset_key"],
        model=metadata.get("base_model"),
        method=metadata.get("completion_key"),
        train_key=metadata.get("train_key"),
        epoch=metadata.get("epoch"),
        template=metadata.get("prediction_template"),
        run=metadata.get("run"),
        part=part,
        split=split,
        rules=rules,
        n=len(rows),
        questions=questions,
        correct=correct,
        accuracy=percentage(verdict.correct for verdict in asked),
        low=round(low, 2),
        high=round(high, 2),
        paper=percentage(one.verdicts["paper"].correct for one in graded),
        flexible=percentage(one.verdicts["flexible"].correct for one in graded),
        contains_answer=percentage(verdict.contains_answer for verdict in asked),
        correct_format=percentage(verdict.correct_format for verdict in asked),
        complete=percentage(row.get("finish_reason") == "stop" for row in rows),
        no_answer=sum(verdict.prediction in (None, "") for verdict in asked),
    )
    return scored, graded


def percentage(flags: Iterable[bool]) -> float:
    """Return the share of true values: [True, False, False] -> 33.33."""
    flags = list(flags)
    return round(100 * sum(flags) / len(flags), 2)


# ---------------- Print


def print_scores(scores: list[Score]) -> None:
    """Print a line for each file."""
    header = "accuracy  95% interval      paper flexible contains  format complete"
    print(f"{header} no answer      n  file")
    names = ("paper", "flexible", "contains_answer", "correct_format", "complete")
    for s in scores:
        interval = f"[{s['low']:.2f}, {s['high']:.2f}]"
        measures = [f"{s[name]:8.2f}" for name in names]
        shares = " ".join(measures)
        line = f"{s['accuracy']:8.2f}  {interval:<14} {shares[1:]}"
        counts = f"{s['no_answer']:9d} {s['n']:6d}"
        print(f"{line} {counts}  {s['file']} ({s['part']})")
        if "votes" in s:
            from extras import compare

            print(f"{'':10}{compare.describe_votes(s)}")


def print_accuracy(scored: Score, epoch: int | None) -> None:
    """Print two lines about a student that was just evaluated."""
    when = ""
    if epoch:
        when = f" after epoch {epoch}"
    accuracy = f"{scored['accuracy']:.2f}% {interval_text(scored)}"
    count = f"{scored['correct']} of {scored['n']}"
    print(f"    test accuracy{when}: {accuracy}, {count}")
    share = scored["correct_format"]
    if share < 50:
        print(
            f"    only {share:.1f}% put the answer as the template does; else the last one counts"
        )
    print(f"    -> {scored['file']}")


def interval_text(scored: Score) -> str:
    """Write the 95% interval of a score: '[0.0, 27.8]'."""
    low = scored["low"]
    high = scored["high"]
    return f"[{low:.1f}, {high:.1f}]"


def print_completion(title: str, row: Completion, verdicts: dict[str, Verdict]) -> None:
    """Print a completion with its question and gold answer, and what each set of rules reads."""
    sample = row["sample_index"]
    number = row["completion_index"]
    print(f"\n{title} (sample {sample}, completion {number})")
    print_field("question", row["question"])
    if "reasoning_completion" in row:
        print_field("rationale", row["reasoning_completion"] or "")
    print_field("completion", row["completion"] or "")
    print_field("gold", row["answer"])
    for rules, verdict in verdicts.items():
        outcome = "wrong"
        if verdict.correct:
            outcome = "right"
        read = f"{verdict.prediction} is {outcome}, of {verdict.candidates}"
        print_field(rules, read)


def print_field(name: str, text: str) -> None:
    """Print a text behind its name, in lines of 120 characters at most."""
    lines = []
    for line in text.strip().splitlines():
        wrapped = textwrap.wrap(line, 105)
        lines += wrapped or [""]
    indented = f"\n{'':14}".join(lines)
    label = f"{name}:"
    print(f"  {label:<12}{indented}")


def print_report(results: list[Score], student: str, seed: int, saved: StrPath) -> None:
    """Print a run's last table, a right and a wrong completion, and where its files are."""
    last = results[-1]
    task = tasks.TASKS[last["task"]]
    questions = last["questions"]
    asked = f"{questions} test questions"
    if last["n"] > questions:
        each = last["n"] / questions
        asked += f" x {each:g} answers"
    guess = f"(a random guess: {task.random}%)"
    print(f"\n{task.name}, {asked}, student {student}, seed {seed} {guess}\n")
    print("method                 accuracy  95% interval      correct  no answer")
    examples = {}
    for scored in results:
        print_result(scored)
        metadata, rows = read_completions(scored["file"])
        aside = set(metadata.get("validation") or [])
        judged = [row for row in rows if row["sample_index"] not in aside]
        graded = grade_rows(metadata, judged, "paper")
        for one in reversed(graded):
            examples[one.outcome] = (scored["method"], one)
    for outcome in ("right", "wrong"):
        if outcome in examples:
            method, one = examples[outcome]
            print_completion(f"A {outcome} completion of {method}:", one.row, one.verdicts)
    print(f"\nEverything is under {saved}/: completion_data (texts), finetune_data, models")
    print(f"Compare runs: python evaluate.py table --saved {saved}")


def print_result(scored: Score) -> None:
    """Print a method's line of a run's last table."""
    method = scored["method"]
    labels = {"ft": "ft (answers alone)", "ft_cot": "ft_cot (rationales)"}
    label = labels.get(method, method)
    interval = interval_text(scored)
    shares = f"{scored['accuracy']:7.1f}%  {interval:<15}"
    counts = f"{scored['correct']:>5}/{scored['n']}  {scored['no_answer']:>9}"
    print(f"{label:<22} {shares} {counts}")


# ---------------- Command line

BATCH_SIZE_HELP = """rows decoded at once, of the longest; of shorter ones on a CPU up to twice as
many (default: on a CPU 96, but at most what takes half the memory of the weights, or 0.6 GB; on a
GPU 512, in half of its free memory); more is faster and takes more memory"""


def generate_file(
    model: str,
    prompts: str,
    out: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    samples: int,
    stop: list[str] | None,
    batch_size: int | None,
    precision: str,
    seed: int,
    device: str | None,
    plain: bool,
) -> None:
    """Complete a file of prompts, in one process or on the ranks of torchrun."""
    sizes = [max_new_tokens, samples]
    if batch_size is not None:
        sizes.append(batch_size)
    is_sampled = 0 < temperature < 100
    if (
        min(sizes) < 1
        or not (is_sampled or (temperature == 0 and samples == 1))
        or not 0 < top_p <= 1
        or "" in (stop or [])
    ):
        raise UserError(
            "--batch_size, --samples and --max_new_tokens must be 1 or more, --temperature from 0 "
            "to 100, and above 0 with --samples, --top_p above 0 and at most 1, --stop not empty"
        )
    rows, texts, limits = storage.read_prompts(prompts, max_new_tokens)
    where = select_device(device)
    is_distributed = "RANK" in os.environ  # under torchrun
    if is_distributed:
        distributed.init_ranks(where)
    dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[precision]
    loaded, tokenizer, family = load_model(model, dtype)
    completions = generate(
        *(loaded.to(where), tokenizer, family, texts, limits, temperature, samples, stop),
        *(batch_size, seed, "error", top_p, out, plain),
    )
    if rank_and_world_size()[0] == 0:
        write_generated(out, rows, completions)
    if is_distributed:
        all_gather(None)  # leave together
        sys.stdout.flush()
        os._exit(0)  # past torch's threads: one of them may abort a process that ends


def write_generated(out: str, rows: list[dict], completions: list[list[dict]]) -> None:
    """Write the rows that were read, each with its completion; with several, numbered."""
    lines = []
    for row, of_prompt in zip(rows, completions, strict=True):
        for k, completion in enumerate(of_prompt):
            written = dict(row)
            if len(of_prompt) > 1:
                written["completion_index"] = k
            written |= completion
            line = json.dumps(written)
            lines.append(line + "\n")
    storage.write_atomic(out, "".join(lines))
    storage.remove_journals(out)
    print(f"wrote {len(lines)} completions to {out}")


def score_files(
    files: list[str],
    part: str,
    split: str | None,
    data: str,
    rules: str,
    allow_partial: bool,
    as_json: bool,
) -> None:
    """Print one line, or one JSON object, for each completion file."""
    score_file = score
    if has_extra("compare"):
        from extras import compare

        score_file = compare.score_with_votes  # and a vote where questions have several answers
    choice = (part, split, data, rules, allow_partial)
    scores = [score_file(path, *choice) for path in files]
    if as_json:
        for scored in scores:
            print(json.dumps(scored))
    else:
        print_scores(scores)


def add_generate_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `generate`."""
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face folder or name")
    add("--prompts", required=True, help='JSON lines: {"prompt": text, "max_new_tokens"?: number}')
    add("--out", required=True, help="the same lines with completion and finish_reason, in order")
    limit = "new tokens of a prompt whose line names no number (default 1024)"
    add("--max_new_tokens", type=int, default=1024, help=limit)
    add("--temperature", type=float, default=0.0, help="0: greedy (default, as in the paper)")
    top_p = "sample from the most probable tokens that reach this share (default 1: all)"
    add("--top_p", type=float, default=1.0, help=top_p)
    samples = "completions of a prompt, each a line with its completion_index (default 1)"
    add("--samples", type=int, default=1, help=samples)
    add("--stop", nargs="+", help="strings that end a completion and are cut off")
    add("--batch_size", type=int, help=BATCH_SIZE_HELP)
    precision = "of weights and matmuls (default fp32)"
    add("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help=precision)
    add("--seed", type=int, default=0, help="of sampling (default 0)")
    add("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    add("--plain", action="store_true", help="do without fast paths; the texts are the same")


def add_score_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `score`."""
    add = parser.add_argument
    add("files", nargs="+", help="completion files")
    parts = ["train", "validation", "test", "all"]
    part = "samples to score (default test; the paper's Teacher rows: all)"
    add("--part", choices=parts, default="test", help=part)
    split = "default, template, few_shot_8, ... (default: the one that a file was made for)"
    add("--split", help=split)
    rules = "rules that read the answer (default paper)"
    add("--rules", choices=["paper", "flexible"], default="paper", help=rules)
    data = storage.default_folder("data")
    add("--data", default=data, help="folder of the prepared benchmarks (default the project's)")
    add("--allow_partial", action="store_true", help="score files that lack samples of the part")
    as_json = "one JSON object a file instead of a table"
    add("--json", action="store_true", dest="as_json", help=as_json)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; `run` is the function of the command, the rest its keywords."""
    if argv is None:
        argv = sys.argv[1:]
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    exact = functools.partial(argparse.ArgumentParser, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=exact)
    generate_parser = commands.add_parser("generate", help="complete prompts with a local model")
    generate_parser.set_defaults(run=generate_file)
    add_generate_flags(generate_parser)
    score_parser = commands.add_parser("score", help="score completion files")
    score_parser.set_defaults(run=score_files)
    add_score_flags(score_parser)
    if has_extra("report"):
        from extras import compare, page, plot, report

        report.add_command(commands)
        compare.add_commands(commands)
        plot.add_command(commands)
        page.add_command(commands)
    elif argv[:1] and argv[0] in ("table", "plot", "page", "show", "diff"):
        raise UserError(f"evaluate.py {argv[0]} needs extras/report.py, which is not here")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run a command; an error that the user can correct is one sentence and a failing exit."""
    with terminal.error_exits():
        options = vars(parse_args(argv))
        run = options.pop("run")
        del options["command"]
        run(**options)


if __name__ == "__main__":
    import evaluate  # the module that extras/ imports, so that there are not two

    evaluate.main()
