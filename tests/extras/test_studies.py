"""Grids, and every study of the paper at toy size.

python -m pytest tests/extras/test_studies.py   (--slow: as commands, too)
"""

import re
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, run

import completions
import distributed
import finetune_cot
import flags
import storage
import tasks
from extras import paper, plot, report, studies
from storage import UserError


@pytest.fixture
def tiny_toy(monkeypatch):
    """The toy task with 14 training and 6 test questions."""
    monkeypatch.setitem(tasks.TASKS, "toy", tasks.TASKS["toy"]._replace(n=20, train=14, test=6))


def grid(command: str) -> list[Namespace]:
    """Return the cells of a command line."""
    return studies.dedupe_cells(flags.parse_args(command.split()))


# ---------------------------------------------------------------- from flags to cells

FT_COT_GRID = "--method ft_cot --degree 1 8 --temperature 0.7 --seeds 0 1"


def test_expand_every_combination_once():
    """Flags with several values make every combination once."""
    cells = grid(f"--task coin_flip svamp {FT_COT_GRID}")
    found = [(cell.task, cell.degree, cell.seed) for cell in cells]
    assert len(found) == 8
    assert set(found) == {
        (task, degree, seed)
        for task in ("coin_flip", "svamp")
        for degree in (1, 8)
        for seed in (0, 1)
    }


def test_expand_names_of_cells():
    """The cells of a task have training runs of their own."""
    cells = grid(f"--task coin_flip svamp {FT_COT_GRID}")
    assert len({flags.train_key(cell, "ft_cot") for cell in cells}) == 4
    assert flags.train_key(cells[0], "ft_cot") == "ft_cot_t70"


def test_expand_single_cell():
    """Without a flag of several values there is one cell, of all methods."""
    [cell] = grid("--task svamp --seed 3")
    assert cell.method == ["ft", "ft_cot"]
    assert (cell.degree, cell.sample_degree, cell.lr) == (1, 1, 3e-4)


def test_expand_all_tasks():
    """all is the twelve benchmarks, each with its own defaults."""
    cells = grid("--task all --method ft")
    assert [cell.task for cell in cells] == [key for key in tasks.TASKS if key != "toy"]
    assert {cell.lr for cell in cells} == {3e-4}


def test_expand_all_tasks_of_a_dry_run():
    """A dry run adds up all benchmarks by itself."""
    [cell] = flags.parse_args("--task all --dry_run".split())
    assert cell.task == "all"


def test_dedupe_cells_runs_once():
    """What does not depend on a flag is run once."""
    cells = grid(f"--task svamp {FT_COT_GRID} --method zs ft ft_cot")
    methods = [cell.method[0] for cell in cells]
    assert sorted(methods) == ["ft"] * 2 + ["ft_cot"] * 4 + ["zs"]


def test_dedupe_cells_samples_once():
    """Each cell knows the largest degree of its teacher's file."""
    for degrees in ("1 8", "8 1"):
        cells = grid(f"--task svamp --method ft_cot --temperature 0.7 --degree {degrees}")
        assert {cell.sample_degree for cell in cells} == {8}


@pytest.mark.parametrize("flag", ["--out", "--train_key", "--finetune_data"])
def test_dedupe_cells_refuses_one_student(flag):
    """What names one student is refused for several."""
    with pytest.raises(UserError, match="are of one student, and these flags make 2 of them"):
        grid(f"--degree 2 4 --method ft_cot {flag} x")


@pytest.mark.parametrize("flag, prefix", [("--student", ""), ("--teacher", "hf:")])
def test_dedupe_cells_refuses_two_of_one_name(tmp_path, flag, prefix):
    """Folders of one name would write one file: the second is not passed over in silence."""
    names = []
    for folder in ("a", "b"):
        (tmp_path / folder / "model").mkdir(parents=True)
        names.append(f"{prefix}{tmp_path / folder / 'model'}")
    with pytest.raises(UserError, match="two cells would write .* and differ in") as caught:
        grid(f"--task svamp --method ft_cot {flag} {names[0]} {names[1]}")
    assert f"{flag.strip('-')} {names[0]} -> {names[1]}" in str(caught.value)


def test_dedupe_cells_of_sampled_seeds():
    """Answers sampled with two seeds are two files, of a student with weights of its own too."""
    cells = grid("--task svamp --method zs --student gpt2 --eval_samples 4 --seeds 0 1")
    assert len({studies.output_files(cell)[0] for cell in cells}) == 2
    assert len(grid("--task svamp --method zs --student gpt2 --seeds 0 1")) == 1


@pytest.mark.parametrize("name", studies.STUDIES)
def test_studies_are_valid_grids(name):
    """A study is a grid of valid cells with a file each."""
    student = "--student gpt2"
    if name == "students":
        student = ""
    cells = grid(f"--study {name} {student}")
    for cell in cells:
        flags.check(cell)
    assert len(cells) >= 4
    assert len({studies.output_files(cell)[0] for cell in cells}) == len(cells)


def test_studies_degrees_are_the_papers():
    """The paper's degrees are 64 for two tasks and 8 elsewhere."""
    diverse = {cell.task: cell.degree for cell in grid("--study table_1") if cell.degree > 1}
    assert diverse.pop("multiarith") == diverse.pop("svamp") == 64
    assert set(diverse.values()) == {8}
    results = paper.read_results()
    printed = {task for _, method, task in results if method == "fine_tune_cot_diverse"}
    assert printed == {"multiarith", "svamp", *diverse}


def test_studies_are_in_the_readme():
    """The README has every study in a command."""
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"python finetune_cot\.py --study (\w+)", readme)
    assert set(commands) == set(studies.STUDIES)


# ---------------------------------------------------------------- runs


def test_run_cells_names_what_cannot_run(tiny_toy, tmp_path, capsys):
    """A cell that cannot run stops no other and is named."""
    command = "--method ft --split template default --epochs 1 --max_new_tokens 4 --saved"
    message = (
        "^error: 1 of 2 cells were left out; the first: toy ft, split template: "
        ".*toy__template.json is missing"
    )
    with pytest.raises(SystemExit, match=message):
        finetune_cot.main([*command.split(), str(tmp_path)])
    out = capsys.readouterr().out
    assert "==== 2 of 2: toy ft, split default" in out
    assert re.search(r"toy_student +ft, last epoch +\d+\.\d\d", out)


def test_run_cells_stops_when_interrupted():
    """An interruption starts nothing else."""
    started = []

    def run(cell: Namespace) -> list:
        """Be interrupted."""
        started.append(cell.seed)
        raise storage.Interrupted("stopped by SIGTERM")

    cells = grid("--method ft --seeds 0 1")
    with pytest.raises(storage.Interrupted):
        studies.run_cells(cells, run, distributed.Ranks(), "data")
    assert started == [0]


def test_run_cells_stops_on_several_ranks():
    """Under torchrun the first cell that cannot run ends the run, for the ranks must agree."""
    started = []

    def run(cell: Namespace) -> list:
        """Fail."""
        started.append(cell.seed)
        raise UserError("no")

    cells = grid("--method ft --seeds 0 1")
    with pytest.raises(UserError, match="^no$"):
        studies.run_cells(cells, run, distributed.Ranks(rank=1, world_size=2), "data")
    assert started == [0]


def test_run_cells_twice(tiny_toy, tmp_path, capsys):
    """A grid's second run skips everything and prints the same table."""
    command = "--method ft ft_cot --degree 1 4 --seeds 0 1 --epochs 1 --max_new_tokens 8 --saved"
    tables = []
    for _ in range(2):
        finetune_cot.main([*command.split(), str(tmp_path)])
        out = capsys.readouterr().out
        tables.append(out.partition("Accuracy on the test part")[2])
    assert tables[0] == tables[1]
    assert "mean of 2 seeds" in tables[0]
    assert "train: ft" not in out
    assert not list(tmp_path.rglob("*.old1"))
    # curate, train, evaluate of 6 cells; sample of the 4 of ft_cot
    assert out.count("made with the same settings: skipped") == 6 * 3 + 4
    teachers = tmp_path / "completion_data/B_toy_teacher__C_zs_cot_t70/D_toy.json"
    assert len(completions.read_completions(teachers)[1]) == 20 * 4


@pytest.mark.parametrize("method", ["zs_cot", "ft_cot"])
def test_run_votes_on_several_answers(tiny_toy, tmp_path, capsys, method):
    """Several answers a question are sampled, kept apart and voted on."""
    usual = ["--method", method, "--epochs", "1", "--max_new_tokens", "8", "--saved", str(tmp_path)]
    finetune_cot.main(usual)
    finetune_cot.main([*usual, "--eval_samples", "4", "--eval_temperature", "0.5"])
    shares = r"pass@1 [\d.]+%, pass@2 [\d.]+%, pass@4 [\d.]+%"
    line = rf"evaluate: maj@4 [\d.]+% \[.*\] of 6 questions; {shares}"
    assert re.search(line, capsys.readouterr().out)
    files = tmp_path.glob(f"completion_data/B_toy_student__C_{method}/*.json")
    greedy, sampled = sorted(files, key=lambda path: len(path.name))
    assert sampled.stem == greedy.stem + "__K_04_t50"
    _, rows = completions.read_completions(sampled)
    assert len(rows) == 24
    _, greedy_rows = completions.read_completions(greedy)
    texts = {row["completion"] for row in rows}
    assert len(texts) > len({row["completion"] for row in greedy_rows})


def test_epoch_files_of_one_run(tmp_path):
    """The files of all epochs of a run, and no other's."""
    names = ["D_toy__T_ft__E_001.json", "D_toy__T_ft__E_002.json", "D_toy__T_ft_s1__E_001.json"]
    for name in names:
        (tmp_path / name).touch()
    found = studies.epoch_files(tmp_path / names[1])
    assert [path.name for path in found] == names[:2]


# ---------------------------------------------------------------- the paper's studies at toy size

AT_TOY_SIZE = {  # study: (flags over its own, rows of its table, the figure it belongs to)
    "table_1": ("--degree 2", 5, None),
    "degree": ("--degree 1 2", 2, "degree"),
    "train_size": ("--degree 2", 8, "train_size"),
    "teachers": ("--teacher one two --degree 1 --temperature 0", 2, "teacher"),
    "students": ("--student toy {t5}", 8, "student"),
    "template": ("", 4, None),
    "filter": ("", 3, None),
    "rationale_length": ("--max_rationale_words 45 0", 2, None),
    "lr_batch": ("--lr 1e-3 3e-3 --batch_size 4 8", 4, None),
    "few_shot_teachers": ("", 2, None),
}
QUICK = ("degree", "filter", "template")
QUICK_OR_SLOW = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in studies.STUDIES
]


def at_toy_size(name: str, folder: Path, model_folder: Callable[[str], Path]) -> list[str]:
    """Return the flags of a study on the toy task, with a template split and two teachers whose
    completions lie in folder."""
    train, test = tasks.default_split("toy")
    for split in ("template", "default"):
        storage.write_json(folder / "split" / f"toy__{split}.json", {"train": train, "test": test})
    if name == "teachers":
        command = "--stage sample --degree 1 --temperature 0 --saved"
        finetune_cot.main([*command.split(), str(folder)])
        sampled = folder / "completion_data/B_toy_teacher__C_zs_cot"
        for teacher in ("one", "two"):
            shutil.copytree(sampled, folder / f"completion_data/B_{teacher}__C_zs_cot")
    own = AT_TOY_SIZE[name][0].replace("{t5}", str(model_folder("t5")))
    command = f"--study {name} --task toy --epochs 1 --max_new_tokens 4 --max_length 999 {own}"
    if name != "teachers":
        command += " --teacher toy"
    if name != "students":
        command += " --student toy"
    return [*command.split(), "--saved", str(folder), "--data", str(folder)]


def check_study(name: str, out: str, folder: Path) -> None:
    """Check that the study's table has its rows, and its figure its points."""
    head, *lines = out.partition("Accuracy on the test part, %:\n\n")[2].splitlines()
    rows = [line for line in lines if not line.startswith(" ")]
    _, count, kind = AT_TOY_SIZE[name]
    assert head.split()[:4] == ["model", "method", "Toy", "Coins"]
    assert len(rows) == count, out[-3000:]
    assert all(re.search(r" \d+\.\d\d( +\w\S*)?$", row) for row in rows)
    if kind:
        runs, _ = report.scored_runs(report.saved_files(folder), folder)
        panels = plot.our_series(plot.plotted_files(kind, runs), kind)
        xs = set().union(*(series.points for series in panels["toy"].values()))
        assert len(xs) >= 2, panels


@pytest.mark.parametrize("name", QUICK_OR_SLOW)
def test_study_at_toy_size(name, tiny_toy, tmp_path, capsys, model_folder):
    """A study runs at toy size and gives its table."""
    command = at_toy_size(name, tmp_path, model_folder)
    capsys.readouterr()
    finetune_cot.main(command)
    check_study(name, capsys.readouterr().out, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", studies.STUDIES)
def test_study_as_a_command(name, tmp_path, model_folder):
    """A study runs as a command, on the whole toy, of which few questions are trained on."""
    command = at_toy_size(name, tmp_path, model_folder)
    if name not in ("train_size", "template"):
        command += ["--split", "few_shot_64"]
    done = run("finetune_cot.py", *command)
    assert done.returncode == 0, done.stderr[-2000:]
    check_study(name, done.stdout, tmp_path)


def test_command_lines_suggest_the_nearest_study(capsys):
    """A study that is nearly a known one is answered with that one."""
    with pytest.raises(SystemExit):
        studies.command_lines(["--study", "table1"])
    assert "no 'table1' (did you mean table_1?)" in capsys.readouterr().err
