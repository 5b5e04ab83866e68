"""Grids, and every study of the paper at toy size.   python -m pytest tests/test_studies.py   (--slow: as commands, too)"""

import argparse
import re
import shutil

import pytest

import evaluate
import finetune_cot
import flags as flags_module
import tasks
import storage as files
from extras import report as look
from extras import plot
from extras import studies
from storage import UserError
from conftest import ROOT, run


@pytest.fixture
def tiny_toy(monkeypatch):
    """The toy task with 14 training and 6 test questions."""
    monkeypatch.setitem(tasks.TASKS, "toy", tasks.TASKS["toy"]._replace(n=20, train=14, test=6))


def grid(*flags):
    return studies.gather(finetune_cot.parse_args([*map(str, flags)]), finetune_cot.ends_with)


# ---------------------------------------------------------------- from flags to cells


def test_flags_with_several_values_make_every_combination_once():
    cells = grid(
        "--task",
        "coin_flip",
        "svamp",
        "--method",
        "ft_cot",
        "--degree",
        1,
        8,
        "--temperature",
        0.7,
        "--seeds",
        0,
        1,
    )
    assert {(c.task, c.degree, c.seed) for c in cells} == {
        (t, d, s) for t in ("coin_flip", "svamp") for d in (1, 8) for s in (0, 1)
    }
    assert len(cells) == 8
    assert {c.sample_degree for c in cells} == {8}
    assert len({flags_module.train_key(c, "ft_cot") for c in cells}) == 4
    assert flags_module.train_key(cells[0], "ft_cot") == "ft_cot_t70"


def test_a_single_cell_is_the_run_of_old():
    [cell] = grid("--task", "svamp", "--seed", 3)
    assert (cell.method, cell.degree, cell.sample_degree, cell.lr) == (["ft", "ft_cot"], 1, 1, 3e-4)


def test_what_does_not_depend_on_a_flag_is_run_once():
    cells = grid(
        "--task",
        "svamp",
        "--method",
        "zs",
        "ft",
        "ft_cot",
        "--degree",
        1,
        8,
        "--temperature",
        0.7,
        "--seeds",
        0,
        1,
    )
    assert sorted(c.method[0] for c in cells) == ["ft"] * 2 + ["ft_cot"] * 4 + ["zs"]


def test_all_is_the_twelve_benchmarks_each_with_its_own_defaults():
    cells = grid("--task", "all", "--method", "ft")
    assert [c.task for c in cells] == [key for key in tasks.TASKS if key != "toy"]
    assert {c.lr for c in cells} == {3e-4}
    [dry] = finetune_cot.parse_args(["--task", "all", "--dry_run"])
    assert dry.task == "all"


@pytest.mark.parametrize("flag", ["--out", "--train_key", "--finetune_data"])
def test_what_names_one_student_is_refused_for_several(flag):
    with pytest.raises(UserError, match="are of one student, and these flags make 2 of them"):
        grid("--degree", 2, 4, "--method", "ft_cot", flag, "x")


@pytest.mark.parametrize("name", studies.STUDIES)
def test_a_study_is_a_grid_of_valid_cells_with_a_file_each(name):
    cells = (
        grid("--study", name, "--student", "gpt2") if name != "students" else grid("--study", name)
    )
    for cell in cells:
        finetune_cot.check(cell)
    assert len({finetune_cot.ends_with(c)[0] for c in cells}) == len(cells) >= 4


def test_the_paper_s_degrees_are_64_for_two_tasks_and_8_elsewhere():
    diverse = {c.task: c.degree for c in grid("--study", "table_1") if c.degree > 1}
    assert {task for task, degree in diverse.items() if degree == 64} == {
        "multiarith",
        "svamp",
    }
    assert set(diverse.values()) == {64, 8}
    printed = {
        task
        for (model, method, task) in look.read_paper_results()
        if method == "fine_tune_cot_diverse"
    }
    assert printed == set(diverse)


def test_the_readme_has_every_study_in_a_command_of_two_lines_at_most():
    commands = re.findall(
        r"^python finetune_cot\.py --study (\w+)", (ROOT / "README.md").read_text(), re.M
    )
    assert set(commands) == set(studies.STUDIES)


# ---------------------------------------------------------------- runs


def test_a_cell_that_cannot_run_stops_no_other_and_is_named(tiny_toy, tmp_path, capsys):
    with pytest.raises(
        SystemExit,
        match="^error: 1 of 2 cells were left out; the first: toy ft, split template: .*toy__template.json is missing",
    ):
        finetune_cot.main(
            [
                "--method",
                "ft",
                "--split",
                "template",
                "default",
                "--epochs",
                "1",
                "--max_new_tokens",
                "4",
                "--saved",
                str(tmp_path),
            ]
        )
    out = capsys.readouterr().out
    assert "==== 2 of 2: toy ft, split default" in out
    assert re.search(r"toy_student +ft, last epoch +\d+\.\d\d", out)


def test_an_interruption_starts_nothing_else():
    started = []

    def run(args):
        started.append(args.seed)
        raise files.Interrupted("stopped by SIGTERM")

    cells = grid("--method", "ft", "--seeds", 0, 1)
    for cell in cells:
        cell.ranks = argparse.Namespace(world_size=1, is_master=True)
    with pytest.raises(files.Interrupted):
        studies.run_cells(cells, run)
    assert started == [0]


def test_a_grid_s_second_run_skips_everything_and_prints_the_same_table(tiny_toy, tmp_path, capsys):
    command = [
        "--method",
        "ft",
        "ft_cot",
        "--degree",
        "1",
        "4",
        "--seeds",
        "0",
        "1",
        "--epochs",
        "1",
        "--max_new_tokens",
        "8",
        "--saved",
        str(tmp_path),
    ]
    tables = []
    for _ in range(2):
        finetune_cot.main(command)
        out = capsys.readouterr().out
        tables.append(out.partition("Accuracy on the test part")[2])
    assert tables[0] == tables[1]
    assert "mean of 2 seeds" in tables[0]
    assert "train: ft" not in out
    assert not list(tmp_path.rglob("*.old1"))
    assert (
        out.count("made with the same settings: skipped") == 6 * 3 + 4
    )  # curate, train, evaluate; sample for ft_cot
    rows = evaluate.read_completions(
        tmp_path / "completion_data/B_toy_teacher__C_zs_cot_t70/D_toy.json"
    )[1]
    assert len(rows) == 20 * 4


@pytest.mark.parametrize("method", ["zs_cot", "ft_cot"])
def test_several_answers_a_question_are_sampled_kept_apart_and_voted_on(
    tiny_toy, tmp_path, capsys, method
):
    usual = ["--method", method, "--epochs", "1", "--max_new_tokens", "8", "--saved", str(tmp_path)]
    finetune_cot.main(usual)
    finetune_cot.main([*usual, "--eval_samples", "4", "--eval_temperature", "0.5"])
    assert re.search(
        r"evaluate: maj@4 [\d.]+% \[.*\] of 6 questions; pass@1 [\d.]+%, pass@2 [\d.]+%, pass@4 [\d.]+%",
        capsys.readouterr().out,
    )
    greedy, sampled = sorted(
        tmp_path.glob(f"completion_data/B_toy_student__C_{method}/*.json"),
        key=lambda p: len(p.name),
    )
    assert sampled.stem == greedy.stem + "__K_04_t50"
    rows = evaluate.read_completions(sampled)[1]
    assert len(rows) == 24
    assert len({row["completion"] for row in rows}) > len(
        {row["completion"] for row in evaluate.read_completions(greedy)[1]}
    )


# ---------------------------------------------------------------- the paper's studies at toy size

AT_TOY_SIZE = {  # study: (flags over its own, rows of its table, the figure it belongs to)
    "table_1": (["--degree", "2"], 5, None),
    "degree": (["--degree", "1", "2"], 2, "degree"),
    "train_size": (["--degree", "2"], 8, "train_size"),
    "teachers": (["--teacher", "one", "two", "--degree", "1", "--temperature", "0"], 2, "teacher"),
    "students": (["--student", "toy", "{t5}"], 8, "student"),
    "template": ([], 4, None),
    "filter": ([], 3, None),
    "rationale_length": (["--max_rationale_words", "45", "0"], 2, None),
    "lr_batch": (["--lr", "1e-3", "3e-3", "--batch_size", "4", "8"], 4, None),
    "few_shot_teachers": ([], 2, None),
}


def at_toy_size(name, folder, model_folder):
    """-> flags of a study on the toy task, with a template split and two teachers whose completions lie in folder."""
    train, test = tasks.default_split("toy")
    files.write_json(folder / "split" / "toy__template.json", {"train": train, "test": test})
    files.write_json(folder / "split" / "toy__default.json", {"train": train, "test": test})
    if name == "teachers":
        finetune_cot.main(
            ["--stage", "sample", "--degree", "1", "--temperature", "0", "--saved", str(folder)]
        )
        for teacher in ("one", "two"):
            shutil.copytree(
                folder / "completion_data/B_toy_teacher__C_zs_cot",
                folder / f"completion_data/B_{teacher}__C_zs_cot",
            )
    teacher = [] if name == "teachers" else ["--teacher", "toy"]
    student = [] if name == "students" else ["--student", "toy"]
    own = [flag.replace("{t5}", str(model_folder("t5"))) for flag in AT_TOY_SIZE[name][0]]
    return [
        "--study",
        name,
        "--task",
        "toy",
        "--epochs",
        "1",
        "--max_new_tokens",
        "4",
        "--max_length",
        "999",
        "--saved",
        str(folder),
        "--data",
        str(folder),
        *teacher,
        *student,
        *own,
    ]


def check_study(name, out, folder):
    """The study's table has its rows, and its figure its points."""
    head, *lines = out.partition("Accuracy on the test part, %:\n\n")[2].splitlines()
    rows = [line for line in lines if not line.startswith(" ")]
    assert (
        head.split() == ["model", "method", "Toy", "Coins"] and len(rows) == AT_TOY_SIZE[name][1]
    ), out[-3000:]
    assert all(re.search(r"\d+\.\d\d$", row) for row in rows)
    runs, _ = look.scored_runs(look.saved_files(folder), folder)
    scores = [s for many in runs.values() for s in many if s["run"]]
    kind = AT_TOY_SIZE[name][2]
    if kind:
        figure = plot.ours(scores, kind)["toy"]
        assert len({x for points in figure.values() for x in points}) >= 2, figure


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("degree", "filter", "template")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in studies.STUDIES
    ],
)
def test_a_study_runs_at_toy_size_and_gives_its_table(
    name, tiny_toy, tmp_path, capsys, model_folder
):
    flags = at_toy_size(name, tmp_path, model_folder)
    capsys.readouterr()
    finetune_cot.main(flags)
    check_study(name, capsys.readouterr().out, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", studies.STUDIES)
def test_a_study_runs_as_a_command(name, tmp_path, model_folder):
    few = (
        [] if name in ("train_size", "template") else ["--split", "few_shot_64"]
    )  # the whole toy, but for the training of it
    done = run("finetune_cot.py", *at_toy_size(name, tmp_path, model_folder), *few)
    assert done.returncode == 0, done.stderr[-2000:]
    check_study(name, done.stdout, tmp_path)
