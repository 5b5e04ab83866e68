"""Votes, paired tests and tables, each against a hand count or another formula.

python -m pytest tests/extras/test_report.py
"""

import csv
import io
import json
import re
import statistics
from pathlib import Path

import pytest
from conftest import ROOT, answers_file
from conftest import first_right as first

import evaluate
import storage
import tasks
from extras import paper, report
from extras.runs import RunKey

PUBLISHED = {
    "multiarith": 78.79,
    "coin_flip": 90.04,
    "date_understanding": 67.58,
    "strategy_qa": 53.45,
    "svamp": 64.20,
}
VOTES_LINE = (
    "maj@3 90.00% [59.6, 98.2] of 10 questions; pass@1 76.67%, pass@2 93.33%, pass@3 100.00%"
)


def collect(saved: Path, each: bool = False) -> report.Table:
    """Return the table of a folder in which every file has a score."""
    table, messages = report.collect(report.saved_files(saved), saved, each=each)
    assert not [message for message in messages if message.startswith("not in the table")]
    return table


def accuracies(saved: Path, each: bool = False) -> dict[str, float]:
    """Return {label: accuracy on the toy} of a table."""
    table = collect(saved, each)
    labels = report.row_labels(table)
    return {labels[key]: round(cells["toy"].accuracy, 2) for key, cells in table.items()}


# ---------------------------------------------------------------- which runs are one row


def test_votes_have_rows(three_answers, tmp_path):
    """Of several answers the table has the mean, the majority and pass@k."""
    label = "ft_cot, 3 samples a question, last epoch"
    assert accuracies(tmp_path) == {
        label: 76.67,
        f"{label}, maj@3": 90.0,
        f"{label}, pass@3": 100.0,
    }


def untrained(saved: Path, name: str, limit: int, **metadata: object) -> Path:
    """Write the completions of an untrained toy student."""
    known = {"completion_key": "zs", "train_key": None, "epoch": None, "run": {"parameters": 1}}
    return answers_file(saved, first(limit), name, **known | metadata)


def test_collect_splits_of_one_method(report_toy, tmp_path):
    """Two splits of a prompted method are two rows, and the labels name the split."""
    train, test = tasks.default_split("toy")
    split = {"train": train[:-1], "test": test}
    storage.write_json(tmp_path / "split" / "toy__template.json", split)
    untrained(tmp_path, "D_toy__S_default", 4)
    untrained(tmp_path, "D_toy__S_template", 7, split="template")
    assert accuracies(tmp_path) == {"zs, split default": 40.0, "zs, split template": 70.0}


def test_collect_files_of_a_task_without_a_row(report_toy, tmp_path):
    """They are counted in one sentence, however many there are."""
    for name in ("a.json", "b.json"):
        metadata = {"dataset_key": "apples"}
        storage.write_json(tmp_path / name, {"metadata": metadata, "data": {}})
    _, messages = report.collect([tmp_path / "a.json", tmp_path / "b.json"], tmp_path)
    assert messages == [
        "not in the table: 2 files of 'apples', a task that tasks.TASKS has no row for"
    ]


def test_collect_temperatures(report_toy, tmp_path):
    """Answers sampled at two temperatures are rows of their own."""
    for limit, temperature in ((4, 0.5), (7, 0.9)):
        settings = {"temperature": temperature, "seed": 0}
        name = f"D_toy__S_default__K_02_t{round(100 * temperature)}"
        untrained(tmp_path, name, limit, settings=settings, many=2)
    label = "zs, 2 samples a question"
    table = accuracies(tmp_path)
    assert table[f"{label}, eval temperature 0.5"] == 40.0
    assert table[f"{label}, maj@2, eval temperature 0.9"] == 70.0
    assert len(table) == 6


def test_collect_seeds_of_the_toy_student(report_toy, tmp_path):
    """Seeds of the untrained toy student are not epochs of one run."""
    untrained(tmp_path, "D_toy__S_default", 4)
    untrained(tmp_path, "D_toy__S_default_s1", 8)
    mean = {"zs, mean of 2 seeds": 60.0}
    assert accuracies(tmp_path) == mean
    assert accuracies(tmp_path, each=True) == mean | {"zs, seed 0": 40.0, "zs, seed 1": 80.0}


def test_collect_mean_of_one_task(report_toy, tmp_path, monkeypatch):
    """A seed that alone was run on a task keeps its row there, beside the mean of the other."""
    monkeypatch.setitem(tasks.TASKS, "coins", tasks.TASKS["toy"]._replace(key="coins"))
    samples = tasks.toy_samples(33)
    content = {"metadata": {"dataset_key": "coins"}, "data": samples}
    storage.write_json(tmp_path / "dataset/coins.json", content)
    train, test = tasks.default_split("toy")
    storage.write_json(tmp_path / "split/coins__default.json", {"train": train, "test": test})
    answers_file(tmp_path, first(4), run={"seed": 0})
    answers_file(tmp_path, first(6), train_key="ft_cot_s1", run={"seed": 1})
    name = "D_coins__T_ft_cot__E_001"
    answers_file(tmp_path, first(9), name, dataset_key="coins", run={"seed": 0})
    table = collect(tmp_path)
    shown = [{task: cell.accuracy for task, cell in cells.items()} for cells in table.values()]
    assert sorted(shown, key=str) == [{"coins": 90.0}, {"toy": 50.0}]


def test_collect_mean_over_seeds(report_toy, tmp_path):
    """Seeds have a row with mean and standard deviation."""
    for seed, limit in ((0, 4), (1, 7), (2, 10)):
        key = f"ft_cot_s{seed}".removesuffix("_s0")
        answers_file(tmp_path, first(limit), train_key=key, run={"seed": seed})
    table = collect(tmp_path)
    [mean] = [cells["toy"] for key, cells in table.items() if key.seeds == ("0", "1", "2")]
    assert mean.accuracy == pytest.approx(70)
    assert mean.spread == pytest.approx(statistics.stdev([40, 70, 100]))
    lines = report.terminal(report.table_lines(table, {}))
    at = next(i for i, line in enumerate(lines) if "ft_cot, last epoch, mean of 3 seeds" in line)
    assert lines[at].endswith("70.00")
    assert re.match(r"\s+standard deviation\s+30\.00$", lines[at + 1])


@pytest.mark.parametrize("other", [{"epochs": 20}, {"lr": 0.1}])
def test_collect_mean_needs_equal_settings(report_toy, tmp_path, other):
    """Runs whose recorded settings differ in more than the seed have no mean."""
    usual = {"epochs": 1, "lr": 0.2}
    answers_file(tmp_path, first(4), run=usual | {"seed": 0})
    run = usual | {"seed": 1} | other
    answers_file(tmp_path, first(8), train_key="ft_cot_s1", run=run)
    assert sorted(accuracies(tmp_path).values()) == [40.0, 80.0]


def test_row_labels_in_words():
    """A row is named by what it was made with; what all rows agree in is not named."""
    flags = (("degree", "2"), ("lr", "0.001"), ("batch_size", "8"))
    key = RunKey("m", "ft_cot", "ft_cot_2aug_few_shot_32_s1", "test", "few_shot_32", flags)
    key = key._replace(seed="1", epoch="last epoch")
    other = key._replace(flags=(*flags[:2], ("batch_size", "16")))
    assert list(report.row_labels([key]).values()) == [
        "ft_cot, D = 2, few-shot 32, seed 1, last epoch"
    ]
    assert list(report.row_labels([key, other]).values()) == [
        "ft_cot, D = 2, few-shot 32, seed 1, batch size 8, last epoch",
        "ft_cot, D = 2, few-shot 32, seed 1, batch size 16, last epoch",
    ]


def test_row_labels_of_means():
    """The means over seeds of two degrees both name theirs, and no seed."""
    key = RunKey("m", "ft_cot", "ft_cot", "test", "default", (("degree", "1"),), seeds=("0", "1"))
    other = key._replace(train_key="ft_cot_8aug", flags=(("degree", "8"),))
    assert list(report.row_labels([key, other]).values()) == [
        "ft_cot, D = 1, mean of 2 seeds",
        "ft_cot, D = 8, mean of 2 seeds",
    ]


def test_row_labels_are_unique():
    """Keys that differ in any one field have labels that differ, or other models."""
    key = RunKey("m", "ft", "ft", "test", "default")
    others = {
        "model": "other",
        "method": "zs",
        "train_key": "ft_s1",
        "part": "all",
        "split": "template",
        "flags": (("lr", "0.1"),),
        "data": (("finetune_data", "3f"),),
        "samples": 4,
        "seed": "1",
        "epoch": "last epoch",
        "vote": "maj@4",
        "seeds": ("0", "1"),
    }
    assert set(others) == set(RunKey._fields)
    for name, value in others.items():
        labels = report.row_labels([key, key._replace(**{name: value})])
        assert len({(key.model, label) for key, label in labels.items()}) == 2


def test_chosen_epochs_last_and_best(report_toy, tmp_path):
    """A run's epochs are named by how they were chosen."""
    for epoch, limit in ((1, 4), (2, 8), (3, 6)):
        answers_file(tmp_path, first(limit), epoch=epoch)
    assert accuracies(tmp_path) == {
        "ft_cot, last epoch": 60.0,
        "ft_cot, best test epoch (the paper's protocol)": 80.0,
    }


def test_chosen_epochs_on_validation(report_toy, tmp_path):
    """Where the files have a validation share, a row has the epoch that is best on it; the
    accuracy is of the test part alone."""
    train, test = tasks.load_split("toy")
    rest, aside = tasks.split_off_validation(train, 0.4, 0)
    for epoch, on_test, on_validation in [(1, 2, 9), (2, 8, 4), (3, 5, 3)]:
        right = [place < on_test for place in range(len(test))]
        right += [place < on_validation for place in range(len(aside))]
        answers_file(
            tmp_path,
            lambda place, k, right=right: right[place],
            epoch=epoch,
            indices=test + aside,
            validation=aside,
        )
    assert accuracies(tmp_path) == {
        "ft_cot, last epoch": 50.0,
        "ft_cot, best test epoch (the paper's protocol)": 80.0,
        "ft_cot, epoch chosen on validation": 20.0,
    }


# ---------------------------------------------------------------- the table as text


def line_of(lines: list[str], pattern: str, separator: str) -> list[str]:
    """Return the cells of the first line that matches."""
    line = next(line for line in lines if re.search(pattern, line))
    return [cell for cell in re.split(separator, line) if cell]


@pytest.mark.parametrize(
    "form, separator",
    [("terminal", r"\s{2,}"), ("markdown", r"\s*\|\s*"), ("latex", r"\s*&\s*|\s*\\\\$")],
)
def test_table_of_published_files(shared, capsys, form, separator):
    """The published files score as the paper says, in every format."""
    evaluate.main(["table", "--saved", str(shared / "saved"), "--format", form])
    lines = capsys.readouterr().out.splitlines()
    values = [f"{PUBLISHED[task]:.2f}" for task in tasks.TASKS if task in PUBLISHED]
    ours = line_of(lines, r"^\W*text-davinci-002", separator)
    assert ours[1].replace("\\", "") == "zs_cot, all questions"
    assert ours[2:] == values
    assert line_of(lines, r"^(\W|quad)*paper", separator)[1:] == values


def test_table_head_of_markdown_and_latex(shared, capsys):
    """Markdown has its line of dashes; LaTeX escapes, and its lines have as many columns."""
    for form in ("markdown", "latex"):
        evaluate.main(["table", "--saved", str(shared / "saved"), "--format", form])
    text = capsys.readouterr().out
    assert "\n|---|---|--:|--:|--:|--:|--:|\n" in text
    assert r"text-davinci-002 & zs\_cot" in text
    assert r" & \quad 95\% interval & " in text
    assert {line.count("&") for line in text.splitlines() if line.endswith(r"\\")} == {6}


def test_table_of_nothing(tmp_path):
    """A folder without completion files is one sentence."""
    with pytest.raises(
        SystemExit, match="^error: there is nothing to show under .*/completion_data$"
    ):
        evaluate.main(["table", "--saved", str(tmp_path)])


def test_table_names_what_is_left_out(report_toy, tmp_path, capsys):
    """A file without a score is named on stderr."""
    answers_file(tmp_path, first(4))
    bad = answers_file(tmp_path, first(4), indices=[0], train_key="bad")
    evaluate.main(["table", "--saved", str(tmp_path), "--data", str(tmp_path)])
    captured = capsys.readouterr()
    assert "ft_cot, last epoch" in captured.out
    assert f"not in the table: {bad} lacks 9 of the 10 samples" in captured.err


def test_tasks_in_the_paper_s_order():
    """Columns stand in the paper's order; a benchmark of one's own may stand among them."""
    with open(ROOT / "data" / "paper_results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    rows = [row for row in rows if row["table"] == "table_1" and row["method"] == "random"]
    printed = [row["dataset"] for row in rows]
    assert printed == [key for key in tasks.TASKS if key in printed]


def test_table_counts_answers_that_could_not_be_read(report_toy, tmp_path):
    """Beside 0.00 stands how many answers could not be read; where all could be, no line."""
    answers_file(tmp_path, lambda place, k: None, run={"seed": 0})
    half = [None, True] * 5
    known = {"train_key": "ft_cot_s1", "run": {"seed": 1}}
    answers_file(tmp_path, lambda place, k: half[place], **known)
    answers_file(tmp_path, first(5), train_key="ft_cot_8aug", run={"degree": 8})
    lines = report.table_lines(collect(tmp_path, each=True), {})
    below = {}
    label = ""
    for line in lines:
        if line[1].startswith("  "):
            below.setdefault(label, {})[line[1].strip()] = line[2]
        else:
            label = line[1]
    assert below["ft_cot, seed 0, last epoch"]["without an answer"] == "10/10"
    assert below["ft_cot, seed 1, last epoch"]["without an answer"] == "5/10"
    assert below["ft_cot, last epoch, mean of 2 seeds"]["without an answer"] == "15/20"
    assert list(below["ft_cot, D = 8, seed 0, last epoch"]) == ["95% interval"]


def test_collect_epochs_of_two_students(report_toy, tmp_path):
    """Files of one name and two students are no epochs of one run, and what differs is named."""
    for epoch, model in ((1, "3fa2"), (2, "9c1b")):
        answers_file(tmp_path, first(3 * epoch), epoch=epoch, settings={"model": model})
    expected = {"ft_cot, last epoch, model 3fa2": 30.0, "ft_cot, last epoch, model 9c1b": 60.0}
    assert accuracies(tmp_path) == expected


def test_collect_copies_of_a_file(report_toy, tmp_path):
    """Two files of one epoch are no epochs of one another: the names of the files tell them."""
    answers_file(tmp_path, first(3))
    answers_file(tmp_path, first(6), "D_toy__T_copy__E_001")
    expected = {
        "ft_cot, last epoch, file D_toy__T_ft_cot__E_001": 30.0,
        "ft_cot, last epoch, file D_toy__T_copy__E_001": 60.0,
    }
    assert accuracies(tmp_path) == expected


def test_collect_unfinished_run(report_toy, tmp_path):
    """The last evaluated epoch of a run that goes on is not called its last, nor averaged so."""
    for seed, epoch in ((0, 5), (1, 2)):
        key = f"ft_cot_s{seed}".removesuffix("_s0")
        run = {"seed": seed, "epochs": 5}
        answers_file(tmp_path, first(epoch), train_key=key, epoch=epoch, run=run)
    expected = {"ft_cot, seed 0, last epoch": 50.0, "ft_cot, seed 1, epoch 2 of 5": 20.0}
    assert accuracies(tmp_path) == expected


def test_collect_says_what_is_not_recorded(report_toy, tmp_path):
    """A file of an earlier version does not say all; its row is not that of one that does."""
    run = {"epochs": 1, "lr": 0.2}
    answers_file(tmp_path, first(3), run=run)
    name = "D_toy__T_ft_cot__E_001__K_01"
    answers_file(tmp_path, first(6), name, run=run | {"schedule": "cosine"})
    expected = {
        "ft_cot, last epoch, schedule not recorded": 30.0,
        "ft_cot, last epoch, schedule cosine": 60.0,
    }
    assert accuracies(tmp_path) == expected
    _, messages = report.collect(report.saved_files(tmp_path), tmp_path)
    assert re.match(
        "2 of 2 files are of an earlier version and do not record .*weight_decay, .*schedule",
        messages[-1],
    )


def test_table_lines_order(report_toy, tmp_path):
    """Teachers come first, then methods in the paper's order, and D = 2 before D = 16; what the
    files are called stands at the end."""
    for degree in (16, 2):
        key = f"ft_cot_{degree}aug"
        answers_file(tmp_path, first(10), train_key=key, run={"degree": degree})
    untrained(tmp_path, "D_toy__S_default", 10)
    teacher = {"completion_key": "zs_cot", "train_key": None, "epoch": None, "part": None}
    answers_file(tmp_path, first(33), "D_toy", "z", indices=range(33), **teacher)
    lines = report.table_lines(collect(tmp_path), {})
    assert lines[0][-1] == "key"
    assert [(line[1], line[-1]) for line in lines[2::2]] == [
        ("zs_cot, all questions", ""),
        ("zs", ""),
        ("ft_cot, D = 2, last epoch", "ft_cot_2aug"),
        ("ft_cot, D = 16, last epoch", "ft_cot_16aug"),
    ]


def test_table_lines_without_keys(report_toy, tmp_path):
    """Where the files are called by their methods there is no column for it."""
    answers_file(tmp_path, first(10))
    lines = report.table_lines(collect(tmp_path), {})
    assert [len(line) for line in lines] == [3] * 4


# ---------------------------------------------------------------- flags of table


@pytest.fixture
def table_of(report_toy, tmp_path, capsys):
    """-> function: flags -> what table prints of ft, ft_cot with two seeds, and another model."""
    answers_file(tmp_path, first(4), run={"seed": 0, "lr": 0.1})
    right = [True] * 6 + [None] * 4
    known = {"train_key": "ft_cot_s1", "run": {"seed": 1, "lr": 0.1}}
    answers_file(tmp_path, lambda place, k: right[place], **known)
    ft = {"completion_key": "ft", "train_key": "ft"}
    answers_file(tmp_path, first(3), **ft)
    answers_file(tmp_path, first(2), model="google_flan-t5-base", **ft)

    def table_of(*flags: str) -> str:
        """Run the command."""
        capsys.readouterr()
        folders = ["--saved", str(tmp_path), "--data", str(tmp_path)]
        evaluate.main(["table", *folders, *flags])
        return capsys.readouterr().out

    return table_of


def rows_of(text: str) -> list[tuple[str, str]]:
    """Return (model, label) of the rows of a table on the terminal."""
    rows = []
    for line in text.splitlines()[1:]:
        if not line.startswith(" "):
            model, label, *_ = re.split(r"\s{2,}", line)
            rows.append((model, label))
    return rows


FT = ("m", "ft, last epoch")
FLAN = ("google_flan-t5-base", "ft, last epoch")
MEAN = ("m", "ft_cot, last epoch, mean of 2 seeds")
SEEDS = [("m", "ft_cot, seed 0, last epoch"), ("m", "ft_cot, seed 1, last epoch")]


@pytest.mark.parametrize(
    "flags, rows",
    [
        ("", [FLAN, FT, MEAN]),
        ("--each", [FLAN, FT, MEAN, *SEEDS]),
        ("--method ft_cot", [MEAN]),
        ("--method ft ft_cot --student m", [FT, MEAN]),
        ("--student google/flan-t5-base --task toy", [FLAN]),
        ("--student flan_t5_base", [FLAN]),
    ],
)
def test_table_chooses_rows(table_of, flags, rows):
    """The flags choose rows by task, model and method; --each shows every seed, too."""
    assert rows_of(table_of(*flags.split())) == rows


def test_table_without_what_is_asked_for(table_of):
    """Where no file is of what is asked for, the sentence repeats it."""
    message = "^error: there is nothing of --task svamp --method zs to show under .*data$"
    with pytest.raises(SystemExit, match=message):
        table_of("--task", "svamp", "--method", "zs")


def test_table_suggests_the_nearest_task(table_of, capsys):
    """A task that is none is refused with the nearest."""
    with pytest.raises(SystemExit):
        table_of("--task", "svmp")
    assert "no 'svmp' (did you mean svamp?)" in capsys.readouterr().err


def test_table_as_json(table_of):
    """A record a run and task: the interval of a run, the standard deviation of a mean."""
    mean, *seeds = json.loads(table_of("--format", "json", "--each", "--method", "ft_cot"))
    low, high = evaluate.wilson_interval(6, 10)
    assert seeds[1] == {
        "model": "m",
        "run": "ft_cot, seed 1, last epoch",
        "key": "ft_cot_s1",
        "method": "ft_cot",
        "task": "toy",
        "split": "default",
        "seeds": "1",
        "epoch": "last epoch",
        "vote": "",
        "accuracy": 60.0,
        "low": round(low, 2),
        "high": round(high, 2),
        "standard_deviation": None,
        "n": 10,
        "no_answer": 4,
        "paper": None,
        "flags": {"lr": "0.1"},
    }
    shown = [mean[name] for name in ("seeds", "accuracy", "low", "n", "no_answer")]
    assert shown == ["0 1", 50.0, None, 20, 4]
    assert mean["standard_deviation"] == pytest.approx(statistics.stdev([40, 60]), abs=0.01)


def test_table_as_csv(table_of):
    """The same in a file of comma-separated values, without what has no column."""
    text = table_of("--format", "csv")
    rows = list(csv.DictReader(io.StringIO(text)))
    found = json.loads(table_of("--format", "json"))
    for row, record in zip(rows, found, strict=True):
        del record["flags"]
        expected = {name: "" if value is None else str(value) for name, value in record.items()}
        assert row == expected


def test_table_of_votes_as_json(three_answers, tmp_path, capsys):
    """A vote is of questions, and how many could not be read is not known of it."""
    folders = ["--saved", str(tmp_path), "--data", str(tmp_path)]
    evaluate.main(["table", *folders, "--format", "json"])
    found = json.loads(capsys.readouterr().out)
    assert [(one["vote"], one["n"], one["no_answer"]) for one in found] == [
        ("", 30, 2),
        ("maj@3", 10, None),
        ("pass@3", 10, None),
    ]


def test_table_of_published_files_as_json(shared, capsys):
    """The paper's value stands beside ours; no seed is known of a teacher."""
    evaluate.main(["table", "--saved", str(shared / "saved"), "--format", "json"])
    found = json.loads(capsys.readouterr().out)
    assert {one["seeds"] for one in found if one["model"].startswith("text-")} == {""}
    published = {one["task"]: one["paper"] for one in found if one["model"].startswith("text-")}
    assert published == PUBLISHED


# ---------------------------------------------------------------- the paper's values


def published(task: str, train_key: str, **change: object) -> float | None:
    """Return the paper's value beside a run of gpt2-large."""
    key = RunKey("gpt2-large", "ft_cot", train_key, "test", "default")
    return report.paper_value(paper.read_results(), key._replace(**change), task)


def test_paper_value_of_diverse_reasoning():
    """The paper's diverse value stands beside its own degree only."""
    results = paper.read_results()
    diverse = results["gpt2_large", "fine_tune_cot_diverse", "multiarith"]
    assert published("multiarith", "ft_cot_64aug") == diverse
    assert published("multiarith", "ft_cot") != diverse
    assert published("coin_flip", "ft_cot_8aug") is not None
    assert published("multiarith", "ft_cot_8aug") is None
    assert published("coin_flip", "ft_cot_64aug") is None


def test_paper_value_of_the_same_model():
    """Hub names and folder names are the paper's models."""
    value = paper.read_results()["t5_base", "fine_tune_cot", "coin_flip"]
    assert published("coin_flip", "ft_cot", model="google-t5_t5-base") == value


def test_paper_value_of_a_mean():
    """A mean over seeds stands in the place of the run that the paper's value is of."""
    assert published("multiarith", "ft_cot", seeds=("0", "1")) == published("multiarith", "ft_cot")


@pytest.mark.parametrize(
    "change",
    [
        {"train_key": "ft_cot_few_shot_8", "split": "few_shot_8"},
        {"train_key": "ft_cot_lr0.001"},
        {"train_key": "mine"},
        {"split": "template"},
        {"model": "gpt3"},
        {"vote": "maj@4"},
    ],
)
def test_paper_value_of_other_runs(change):
    """The paper's value stands beside the paper's own cells only."""
    assert published("multiarith", "ft_cot") is not None
    assert published("multiarith", **{"train_key": "ft_cot"} | change) is None
