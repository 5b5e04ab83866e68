"""Votes, paired tests and tables, each against a hand count or another formula.

python -m pytest tests/extras/test_report.py
"""

import csv
import itertools
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, answers_file

import evaluate
import storage
import tasks
from extras import paper, report
from extras.report import RunKey

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


def first(limit: int) -> Callable[[int, int], bool]:
    """Return `right` for answers_file: the first so many questions are answered rightly."""
    return lambda place, k: place < limit


def collect(saved: Path) -> report.Table:
    """Return the table of a folder in which every file has a score."""
    table, skipped = report.collect(report.saved_files(saved), saved)
    assert not skipped
    return table


def accuracies(saved: Path) -> dict[str, float]:
    """Return {label: accuracy on the toy} of a table."""
    table = collect(saved)
    labels = report.row_labels(table)
    return {labels[key]: round(cells["toy"].accuracy, 2) for key, cells in table.items()}


# ---------------------------------------------------------------- majority, pass@k


@pytest.mark.parametrize(
    "n, correct, k", [(5, 2, 3), (5, 0, 2), (5, 5, 1), (6, 1, 6), (7, 3, 1), (8, 4, 5)]
)
def test_pass_at_k_counts_draws(n, correct, k):
    """pass@k is the share of draws with a right answer."""
    draws = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
    assert report.pass_at_k(n, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize(
    "answers, right",
    [
        ([("7", True), ("8", False), ("8", False)], False),
        ([("8", False), ("7", True), ("7", True)], True),
        ([("7", True), ("8", False)], True),
        ([("8", False), ("7", True)], False),  # the first of two equals
        ([(None, False), (None, False), ("7", True)], True),
        ([("", False), ("7", True)], True),  # no answer, no vote
        ([(None, False)], False),
        ([], False),
    ],
)
def test_majority_of_readable_answers(answers, right):
    """The majority is of the answers that can be read."""
    assert report.majority(answers) is right


@pytest.fixture
def three_answers(report_toy, tmp_path):
    """Three answers to ten questions: 0-4 all right; 5-7 two right; 8 one right, two unreadable;
    9 one right, two wrong."""
    right = [[True] * 3] * 5 + [[True, True, False]] * 3
    right += [[True, None, None], [True, False, False]]
    name = "D_toy__T_ft_cot__E_001__K_03_t70"
    return answers_file(tmp_path, lambda place, k: right[place][k], name, many=3)


def test_votes_counted_by_hand(three_answers, tmp_path):
    """Votes of a file are those counted by hand."""
    score = report.score_with_votes(three_answers, "test", "default", tmp_path, "paper", False)
    votes = score["votes"]
    assert (votes["k"], votes["questions"], votes["maj"]) == (3, 10, 90.0)
    pass_2 = (5 + 3 * 1 + 2 * (1 - math.comb(2, 2) / math.comb(3, 2))) / 10
    assert votes["pass"] == {1: 76.67, 2: round(100 * pass_2, 2), 3: 100.0}
    interval = evaluate.wilson_interval(9, 10)
    assert (votes["maj_low"], votes["maj_high"]) == pytest.approx(interval, abs=0.01)


def test_votes_of_one_answer(report_toy, tmp_path):
    """A file with one answer a question has no votes."""
    path = answers_file(tmp_path, first(5))
    score = report.score_with_votes(path, "test", "default", tmp_path, "paper", False)
    assert "votes" not in score
    assert score == evaluate.score(path, data_dir=tmp_path)


def test_score_interval_is_over_questions(three_answers, tmp_path):
    """Ten questions with three answers each are ten observations, not thirty."""
    score = evaluate.score(three_answers, data_dir=tmp_path)
    assert (score["n"], score["questions"], score["correct"]) == (30, 10, 23)
    interval = evaluate.wilson_interval(23 / 3, 10)
    assert (score["low"], score["high"]) == pytest.approx(interval, abs=0.01)


def test_votes_have_rows(three_answers, tmp_path):
    """Of several answers the table has the mean, the majority and pass@k."""
    label = "ft_cot, 3 samples a question, last epoch"
    assert accuracies(tmp_path) == {
        label: 76.67,
        f"{label}, maj@3": 90.0,
        f"{label}, pass@3": 100.0,
    }


def test_describe_votes_line(three_answers, tmp_path, capsys):
    """`score` prints the votes in one line, which describe_votes gives too."""
    score = evaluate.score(three_answers, data_dir=tmp_path)
    assert report.describe_votes(score, tmp_path) == VOTES_LINE
    evaluate.main(["score", str(three_answers), "--data", str(tmp_path)])
    assert f"\n          {VOTES_LINE}\n" in capsys.readouterr().out


# ---------------------------------------------------------------- McNemar


@pytest.mark.parametrize("first, second", [(0, 0), (1, 5), (0, 7), (3, 3), (4, 6), (9, 1)])
def test_mcnemar_counts_coin_tosses(first, second):
    """p is the share of coin tosses that are at least as uneven."""
    n = first + second
    heads = [sum(toss) for toss in itertools.product((0, 1), repeat=n)]
    uneven = [abs(2 * count - n) >= abs(first - second) for count in heads]
    assert report.mcnemar(first, second) == pytest.approx(sum(uneven) / 2**n)


def test_mcnemar_by_hand():
    """Two values from the binomial distribution."""
    assert report.mcnemar(1, 5) == 2 * (1 + 6) / 64
    assert report.mcnemar(10, 0) == 2 / 1024


def test_diff_tests_questions(report_toy, tmp_path, capsys):
    """diff counts completions, and tests questions by their majority."""
    # question 0: one of three right, outvoted
    a = answers_file(tmp_path / "a", lambda place, k: place > 0 or k == 0, many=3)
    b = answers_file(tmp_path / "b", lambda place, k: place > 3, many=3)
    evaluate.main(["diff", str(a), str(b), "--limit", "1"])
    text = capsys.readouterr().out
    counts = "18 right in both, 10 in the first alone, 0 in the second alone, 2 in neither"
    assert f"30 completions in both files: {counts}" in text
    shares = "10 questions: 90.00% and 60.00% right"
    assert f"{shares}; exact McNemar test: 3 against 0, p = 0.25" in text
    assert text.count(f"right in {a}") == 1
    assert "and 9 more" in text


def test_diff_prints_pairs(report_toy, tmp_path, capsys):
    """diff prints both completions of a question where one is right, and no others."""
    a = answers_file(tmp_path / "a", first(4))
    b = answers_file(tmp_path / "b", lambda place, k: True if place in (0, 7) else None)
    _, test = tasks.load_split("toy")
    evaluate.main(["diff", str(a), str(b)])
    text = capsys.readouterr().out
    assert f"right in {a} (sample {test[1]}," in text
    assert f"wrong in {b} (sample {test[1]}," in text
    assert f"right in {b} (sample {test[7]}," in text
    assert f"(sample {test[0]}," not in text
    assert f"(sample {test[9]}," not in text
    counts = "1 right in both, 3 in the first alone, 1 in the second alone, 5 in neither"
    assert f"10 completions in both files: {counts}" in text


def test_diff_of_other_questions(report_toy, tmp_path):
    """Files in which a question differs are not compared."""
    a = answers_file(tmp_path / "a", first(4))
    b = answers_file(tmp_path / "b", first(4))
    b.write_text(b.read_text().replace("A coin is heads up", "A coin is tails up", 1))
    with pytest.raises(SystemExit, match="compare two files of one task$"):
        evaluate.main(["diff", str(a), str(b)])


def test_show_each_kind(report_toy, tmp_path, capsys):
    """show prints some completions of each kind, and how many there are."""
    outcomes = [True] * 6 + [None] * 4
    path = answers_file(tmp_path, lambda place, k: outcomes[place])
    evaluate.main(["show", str(path), "--limit", "2"])
    text = capsys.readouterr().out
    assert "6 of 10 are right; the first 2:" in text
    assert "4 of 10 are unreadable" in text
    assert "0 of 10 are wrong" in text
    _, test = tasks.load_split("toy")
    question = tasks.toy_samples(33)[test[0]]["question"]
    assert f"right (sample {test[0]}, completion 0)\n  question:   {question}" in text
    assert f"right (sample {test[2]}," not in text
    assert "paper:      None is wrong, of []" in text


# ---------------------------------------------------------------- which runs are one row


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


def test_collect_temperatures(report_toy, tmp_path):
    """Answers sampled at two temperatures are rows of their own."""
    for limit, temperature in ((4, 0.5), (7, 0.9)):
        settings = {"temperature": temperature, "seed": 0}
        name = f"D_toy__S_default__K_02_t{round(100 * temperature)}"
        untrained(tmp_path, name, limit, settings=settings, many=2)
    label = "zs, 2 samples a question"
    table = accuracies(tmp_path)
    assert table[f"{label}, temperature 0.5"] == 40.0
    assert table[f"{label}, maj@2, temperature 0.9"] == 70.0
    assert len(table) == 6


def test_collect_seeds_of_the_toy_student(report_toy, tmp_path):
    """Seeds of the untrained toy student are not epochs of one run."""
    untrained(tmp_path, "D_toy__S_default", 4)
    untrained(tmp_path, "D_toy__S_default_s1", 8)
    expected = {"zs, seed 0": 40.0, "zs, seed 1": 80.0, "zs, mean of 2 seeds": 60.0}
    assert accuracies(tmp_path) == expected


def test_collect_mean_over_seeds(report_toy, tmp_path):
    """Seeds have a row with mean and standard deviation."""
    for seed, limit in ((0, 4), (1, 7), (2, 10)):
        key = f"ft_cot_s{seed}".removesuffix("_s0")
        name = f"D_toy__T_{key}__E_001"
        answers_file(tmp_path, first(limit), name, train_key=key, run={"seed": seed})
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
    name = "D_toy__T_ft_cot_s1__E_001"
    run = usual | {"seed": 1} | other
    answers_file(tmp_path, first(8), name, train_key="ft_cot_s1", run=run)
    expected = {"ft_cot, last epoch": 40.0, "ft_cot_s1, last epoch": 80.0}
    assert accuracies(tmp_path) == expected


def test_row_labels_are_unique():
    """Keys that differ in any one field have labels that differ, or other models."""
    key = RunKey("m", "ft", "ft", "test", "default")
    others = {
        "model": "other",
        "method": "zs",
        "train_key": "ft_s1",
        "part": "all",
        "split": "template",
        "samples": 4,
        "temperature": "0.7",
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
        answers_file(tmp_path, first(limit), f"D_toy__T_ft_cot__E_{epoch:03d}", epoch=epoch)
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
            f"D_toy__T_ft_cot__E_{epoch:03d}",
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
    [
        ("terminal", r"\s{2,}"),
        ("markdown", r"\s*\|\s*"),
        ("latex", r"\s*&\s*|\s*\\\\$"),
    ],
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
    bad = answers_file(tmp_path, first(4), "D_toy__T_bad__E_001", indices=[0], train_key="bad")
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


def test_table_lines_order(report_toy, tmp_path):
    """Teachers come first, then methods in the paper's order, and 2aug before 16aug."""
    for key in ("ft_cot_16aug", "ft_cot_2aug"):
        answers_file(tmp_path, first(10), f"D_toy__T_{key}__E_001", train_key=key)
    untrained(tmp_path, "D_toy__S_default", 10)
    teacher = {"completion_key": "zs_cot", "train_key": None, "epoch": None, "part": None}
    answers_file(tmp_path, first(33), "D_toy", "z", indices=range(33), **teacher)
    lines = report.table_lines(collect(tmp_path), {})
    assert [line[1] for line in lines[2::2]] == [
        "zs_cot, all questions",
        "zs",
        "ft_cot_2aug, last epoch",
        "ft_cot_16aug, last epoch",
    ]


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


@pytest.mark.parametrize(
    "change",
    [
        {"train_key": "ft_cot_few_shot_8", "split": "few_shot_8"},
        {"train_key": "ft_cot_lr0.001"},
        {"train_key": "mine"},
        {"split": "template"},
        {"model": "gpt3"},
        {"vote": "maj@4"},
        {"seeds": ("0", "1")},
    ],
)
def test_paper_value_of_other_runs(change):
    """The paper's value stands beside the paper's own cells only."""
    assert published("multiarith", "ft_cot") is not None
    assert published("multiarith", **{"train_key": "ft_cot"} | change) is None
