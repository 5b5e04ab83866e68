"""The paper's experiments as single commands: flags that take several values make a grid of cells, a study is a row of flags.

    python finetune_cot.py --study degree --student gpt2                              # a row of STUDIES
    python finetune_cot.py --task coin_flip svamp --degree 1 8 --temperature 0.7 --seeds 0 1 2      # a grid of one's own

Cells run one after another, each resumable as ever; at the end stands one table (extras/report.py), and figures are
`python evaluate.py plot` (extras/plot.py).
"""

import argparse
import itertools
import re
from pathlib import Path

import tasks
from extras import report as look
from storage import Interrupted, UserError

USAGE = "%(prog)s [--study NAME] [--task NAME ...] [--teacher NAME] [--student NAME] [more flags: --help tells them]"
GRID = (
    "task",
    "teacher",
    "student",
    "split",
    "teacher_method",
    "filter",
    "max_rationale_words",
    "degree",
    "lr",
    "batch_size",
    "seed",
)
FOUR = "multiarith svamp date_understanding last_letter_concatenation"  # the tasks of the paper's studies
MANY = "single_eq addsub date_understanding tracking_shuffled_objects last_letter_concatenation coin_flip strategy_qa"
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
        f"--task date_understanding last_letter_concatenation --method ft_cot --split {SIZES} --degree 8 --temperature 0.7",
    ),
    "teachers": (
        f"--task {FOUR} --method ft_cot --teacher davinci text-davinci-001 text-davinci-002 text-davinci-003",
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


# ---------------- From flags to cells


def command_lines(argv):
    """-> [flags of one grid, ...]: the grids of --study NAME, each with the rest of the command line behind it."""
    finder = argparse.ArgumentParser(usage=USAGE, add_help=False, allow_abbrev=False)
    finder.add_argument("--study", choices=STUDIES)
    study = finder.parse_known_args(argv)[0].study
    return [[*flags.split(), *argv] for flags in STUDIES[study]] if study else [argv]


def expand(args):
    """-> [one Namespace a cell]: every combination of the values of the flags in GRID."""
    if args.task == ["all"] and not args.dry_run:  # a dry run adds up by itself
        args.task = [key for key in tasks.TASKS if key != "toy"]
    flags = vars(args)
    values = [flags[name] if isinstance(flags[name], list) else [flags[name]] for name in GRID]
    return [
        argparse.Namespace(**flags | dict(zip(GRID, combination)))
        for combination in itertools.product(*values)
    ]


def gather(cells, output):
    """-> the cells, where there are several a method each, without repetitions (ft does not depend on the degree).  Each knows the
    largest degree of its teacher's file, so that it is sampled once.  output(cell): -> (the file that it ends with, the teacher's file).

    Raises UserError for flags that name one student where there are several cells."""
    one = cells[0]
    if len(cells) > 1 and (one.out or one.train_key or one.finetune_data):
        raise UserError(
            f"--out, --train_key and --finetune_data are of one student, and these flags make {len(cells)} of them"
        )
    if len(cells) > 1:
        cells = [
            argparse.Namespace(**vars(cell) | {"method": [method]})
            for cell in cells
            for method in cell.method
        ]
    unique = {}
    degrees = {}
    for cell in cells:
        mine, teacher = output(cell)
        unique.setdefault(mine, cell)
        degrees[teacher] = max(cell.degree, degrees.get(teacher, 0))
    for cell in unique.values():
        cell.sample_degree = degrees[output(cell)[1]]
    return list(unique.values())


def about(args, method, questions, model):
    """-> what a figure needs to know of a student's completion file: the flags that studies vary, the training questions, the size."""
    known = {"parameters": sum(p.numel() for p in model.parameters())}
    if method.startswith("ft"):
        known |= {
            "questions": questions,
            **{
                k: getattr(args, k)
                for k in ("lr", "batch_size", "epochs", "label_style", "split", "seed")
            },
        }
    if method == "ft_cot":
        known |= {
            k: getattr(args, k)
            for k in (
                "teacher",
                "teacher_method",
                "temperature",
                "degree",
                "filter",
                "max_rationale_words",
            )
        }
    return known


# ---------------- Run them


def name_of(args, cells):
    """'coin_flip ft_cot, degree 8, seed 1': task, method, and what differs among the cells"""
    varied = [name for name in GRID[1:] if len({getattr(cell, name) for cell in cells}) > 1]
    return ", ".join(
        [f"{args.task} {args.method[0]}", *(f"{name} {getattr(args, name)}" for name in varied)]
    )


def run_cells(cells, run):
    """Run every cell, then print one table.  A cell that cannot be run, because its teacher's file is missing, say, stops no other:
    they are named at the end, with a UserError.  Under torchrun, where the ranks must agree, the first one ends the run."""
    results = []
    left_out = []
    ranks = cells[0].ranks
    for i, args in enumerate(cells, 1):
        if ranks.is_master:
            print(f"\n==== {i} of {len(cells)}: {name_of(args, cells)}", flush=True)
        try:
            results += run(args)
        except UserError as e:
            if ranks.world_size > 1 or isinstance(e, Interrupted):
                raise
            print(f"left out: {e}", flush=True)
            left_out.append(f"{name_of(args, cells)}: {e}")
    if results and ranks.is_master:
        print("\nAccuracy on the test part, %:\n")
        paths = [path for r in results for path in siblings(r["file"])]
        look.print_table(
            *look.collect(dict.fromkeys(paths), cells[0].data), look.read_paper_results()
        )
    if left_out:
        raise UserError(
            f"{len(left_out)} of {len(cells)} cells were left out; the first: {left_out[0]}"
        )


def siblings(path):
    """-> the completion files of all epochs of the training run that path belongs to."""
    path = Path(path)
    return sorted(
        p
        for p in path.parent.iterdir()
        if re.sub(r"__E_\d+", "", p.name) == re.sub(r"__E_\d+", "", path.name)
    )
