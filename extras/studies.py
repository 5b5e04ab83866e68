"""The paper's experiments as single commands: flags with several values make a grid of cells.

    python finetune_cot.py --study degree --student gpt2                  # a row of STUDIES
    python finetune_cot.py --task svamp --degree 1 8 --temperature 0.7 --seeds 0 1   # a grid

Cells run one after another, each resumable as ever, and end in one table (extras/report.py);
figures are `python evaluate.py plot` (extras/plot.py).
"""

from __future__ import annotations

import argparse
import itertools
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distributed
import flags
import provenance
import storage
import tasks
from extras import report
from extras.runs import epoch_files
from storage import Interrupted, UserError
from terminal import one_of

USAGE = (
    "%(prog)s [--study NAME] [--task NAME ...] [--teacher NAME] [--student NAME] "
    "[more flags: --help tells them]"
)
GRID = (
    "task teacher student split teacher_method filter max_rationale_words degree lr batch_size seed"
).split()
# tasks of the paper's studies, and those beside multiarith and svamp with diverse reasoning
FOUR = "multiarith svamp date_understanding last_letter_concatenation"
MANY = (
    "single_eq addsub date_understanding tracking_shuffled_objects last_letter_concatenation "
    "coin_flip strategy_qa"
)
SIZES = "few_shot_8 few_shot_32 few_shot_128 default"
STUDENTS = (
    "gpt2 gpt2-medium gpt2-large google-t5/t5-small google-t5/t5-base google-t5/t5-large "
    "google/flan-t5-small google/flan-t5-base google/flan-t5-large"
)
STUDIES = {  # name: grids of flags, run in order; what the command line says goes over it
    "table_1": (
        "--task all --method zs zs_cot fs_cot ft ft_cot",
        "--task multiarith svamp --method ft_cot --degree 64 --temperature 0.7",
        f"--task {MANY} --method ft_cot --degree 8 --temperature 0.7",
    ),
    "degree": (
        "--task multiarith svamp --method ft_cot --degree 1 2 4 8 16 32 64 --temperature 0.7",
        f"--task {MANY} --method ft_cot --degree 1 2 4 8 --temperature 0.7",
    ),
    "train_size": (
        f"--task {FOUR} --method ft ft_cot --split {SIZES}",
        f"--task multiarith svamp --method ft_cot --split {SIZES} --degree 64 --temperature 0.7",
        "--task date_understanding last_letter_concatenation --method ft_cot "
        f"--split {SIZES} --degree 8 --temperature 0.7",
    ),
    "teachers": (
        f"--task {FOUR} --method ft_cot "
        "--teacher davinci text-davinci-001 text-davinci-002 text-davinci-003",
    ),
    "students": (f"--task all --method zs fs_cot ft ft_cot --student {STUDENTS}",),
    "template": (
        "--task multiarith date_understanding --method ft ft_cot --split default template",
    ),
    "filter": (f"--task {FOUR} --method ft_cot --filter right all random",),
    "rationale_length": (f"--task {FOUR} --method ft_cot --max_rationale_words 32 64 96 0",),
    "lr_batch": (
        "--task multiarith svamp --method ft_cot --lr 1e-4 3e-4 1e-3 --batch_size 4 8 16 32",
    ),
    "few_shot_teachers": (f"--task {FOUR} --method ft_cot --teacher_method zs_cot fs_cot",),
}


# ---------------- From flags to cells: the Namespace of flags of one run each


def command_lines(argv: list[str]) -> list[list[str]]:
    """Return the flags of each grid of --study NAME, each with the rest of the line behind it."""
    finder = argparse.ArgumentParser(usage=USAGE, add_help=False, allow_abbrev=False)
    finder.add_argument("--study", type=one_of([*STUDIES]))
    study = finder.parse_known_args(argv)[0].study
    if not study:
        return [argv]
    return [[*grid.split(), *argv] for grid in STUDIES[study]]


def expand(flags: Namespace) -> list[Namespace]:
    """Return a cell for every combination of the values of the flags in GRID.

    --task all stands for every benchmark, but in a dry run, which adds them up by itself.
    """
    options = dict(vars(flags))
    if flags.task == ["all"] and not flags.dry_run:
        options["task"] = [task for task in tasks.TASKS if task != "toy"]
    values = []
    for name in GRID:
        value = options[name]
        if not isinstance(value, list):
            value = [value]
        values.append(value)
    cells = []
    for combination in itertools.product(*values):
        chosen = dict(zip(GRID, combination, strict=True))
        cells.append(Namespace(**options | chosen))
    return cells


def split_methods(cell: Namespace) -> list[Namespace]:
    """Return a cell for each method of one."""
    return [Namespace(**vars(cell) | {"method": [method]}) for method in cell.method]


def output_files(cell: Namespace) -> tuple[Path, Path]:
    """Return the file that a cell ends with and its teacher's, which tell the cells apart."""
    completions = flags.teacher_file(cell)
    method = cell.method[-1]
    if cell.stage == "sample":
        return completions, completions
    if cell.stage == "curate":
        family = flags.student_family(cell)
        return flags.finetune_file(cell, method, family), completions
    return flags.test_file(cell, method, 0), completions


def check_same_result(path: Path, first: Namespace, second: Namespace, stage: str) -> None:
    """Raise UserError where two cells that write one file differ in what it depends on.

    The names of two students, a/model and b/model, are both `model`, say.
    """
    method = second.method[-1]
    wanted = provenance.stage_flags(stage, method, vars(first))
    other = provenance.stage_flags(stage, method, vars(second))
    changed = storage.changed_settings(wanted, other, wanted)
    if changed:
        raise UserError(
            f"two cells would write {path} and differ in {changed}: give each a --saved folder, or "
            "names that differ in their last part"
        )


def dedupe_cells(cells: list[Namespace]) -> list[Namespace]:
    """Return cells of one method each without repetitions: ft does not depend on the degree.

    Each knows the largest degree of its teacher's file, so that it is sampled once.
    Raises UserError for flags that name one student where there are several cells, and for two
    that would write one file though they differ in what it depends on.
    """
    if len(cells) > 1:
        if cells[0].out or cells[0].train_key or cells[0].finetune_data:
            raise UserError(
                "--out, --train_key and --finetune_data are of one student, "
                f"and these flags make {len(cells)} of them"
            )
        cells = [one for cell in cells for one in split_methods(cell)]
    unique = {}
    degrees = {}
    teachers = {}
    for cell in cells:
        own, teacher = output_files(cell)
        check_same_result(own, unique.setdefault(own, cell), cell, cell.stage)
        degrees[teacher] = max(cell.degree, degrees.get(teacher, 0))
        if cell.method[-1] == "ft_cot":
            check_same_result(teacher, teachers.setdefault(teacher, cell), cell, "sample")
    for cell in unique.values():
        _, teacher = output_files(cell)
        cell.sample_degree = degrees[teacher]
    return list(unique.values())


# ---------------- Run them


def cell_name(cell: Namespace, cells: list[Namespace]) -> str:
    """'coin_flip ft_cot, degree 8, seed 1': task, method, and what differs among the cells"""
    parts = [f"{cell.task} {cell.method[0]}"]
    for flag in GRID[1:]:
        if len({getattr(other, flag) for other in cells}) > 1:
            parts.append(f"{flag} {getattr(cell, flag)}")
    return ", ".join(parts)


def run_cells(
    cells: list[Namespace],
    run: Callable[[Namespace], list[dict[str, Any]]],
    ranks: distributed.Ranks,
    data_dir: str,
) -> None:
    """Run every cell, then print one table.  run(cell): the scores of its methods.

    A cell that cannot be run, because its teacher's file is missing, say, stops no other: they are
    named at the end, with a UserError.  Under torchrun, where the ranks must agree, the first one
    ends the run, as an interruption does.
    """
    results = []
    left_out = []
    for i, cell in enumerate(cells, 1):
        name = cell_name(cell, cells)
        if ranks.is_rank0:
            print(f"\n==== {i} of {len(cells)}: {name}", flush=True)
        try:
            results += run(cell)
        except UserError as error:
            if ranks.world_size > 1 or isinstance(error, Interrupted):
                raise
            print(f"left out: {error}", flush=True)
            left_out.append(f"{name}: {error}")
    if results and ranks.is_rank0:
        print("\nAccuracy on the test part, %:\n")
        paths = {}
        for result in results:
            path = Path(result["file"])
            paths |= dict.fromkeys(epoch_files(path))
        table, messages = report.collect(paths, data_dir)
        report.print_table(table, messages)
    if left_out:
        raise UserError(
            f"{len(left_out)} of {len(cells)} cells were left out; the first: {left_out[0]}"
        )
