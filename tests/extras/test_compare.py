"""Votes, paired tests and what is read, each against a hand count or another formula.

python -m pytest tests/extras/test_compare.py
"""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import answers_file
from conftest import first_right as first

import evaluate
import storage
import tasks
from extras import compare, report, runs

VOTES_LINE = (
    "maj@3 90.00% [59.6, 98.2] of 10 questions; pass@1 76.67%, pass@2 93.33%, pass@3 100.00%"
)


# ---------------------------------------------------------------- majority, pass@k


@pytest.mark.parametrize(
    "n, correct, k", [(5, 2, 3), (5, 0, 2), (5, 5, 1), (6, 1, 6), (7, 3, 1), (8, 4, 5)]
)
def test_pass_at_k_counts_draws(n, correct, k):
    """pass@k is the share of draws with a right answer."""
    draws = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
    assert compare.pass_at_k(n, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


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
    assert compare.majority(answers) is right


def test_votes_counted_by_hand(three_answers, tmp_path):
    """Votes of a file are those counted by hand."""
    score = compare.score_with_votes(three_answers, "test", "default", tmp_path, "paper", False)
    votes = score["votes"]
    assert (votes["k"], votes["questions"], votes["maj"]) == (3, 10, 90.0)
    pass_2 = (5 + 3 * 1 + 2 * (1 - math.comb(2, 2) / math.comb(3, 2))) / 10
    assert votes["pass"] == {1: 76.67, 2: round(100 * pass_2, 2), 3: 100.0}
    interval = evaluate.wilson_interval(9, 10)
    assert (votes["maj_low"], votes["maj_high"]) == pytest.approx(interval, abs=0.01)


def test_votes_of_one_answer(report_toy, tmp_path):
    """A file with one answer a question has no votes."""
    path = answers_file(tmp_path, first(5))
    score = compare.score_with_votes(path, "test", "default", tmp_path, "paper", False)
    assert "votes" not in score
    assert score == evaluate.score(path, data_dir=tmp_path)


def test_score_interval_is_over_questions(three_answers, tmp_path):
    """Ten questions with three answers each are ten observations, not thirty."""
    score = evaluate.score(three_answers, data_dir=tmp_path)
    assert (score["n"], score["questions"], score["correct"]) == (30, 10, 23)
    interval = evaluate.wilson_interval(23 / 3, 10)
    assert (score["low"], score["high"]) == pytest.approx(interval, abs=0.01)


def test_describe_votes_line(three_answers, tmp_path, capsys):
    """`score` prints the votes in one line, which describe_votes gives too."""
    score = evaluate.score(three_answers, data_dir=tmp_path)
    assert compare.describe_votes(score, tmp_path) == VOTES_LINE
    evaluate.main(["score", str(three_answers), "--data", str(tmp_path)])
    assert f"\n          {VOTES_LINE}\n" in capsys.readouterr().out


# ---------------------------------------------------------------- McNemar


@pytest.mark.parametrize("first, second", [(0, 0), (1, 5), (0, 7), (3, 3), (4, 6), (9, 1)])
def test_mcnemar_counts_coin_tosses(first, second):
    """p is the share of coin tosses that are at least as uneven."""
    n = first + second
    heads = [sum(toss) for toss in itertools.product((0, 1), repeat=n)]
    uneven = [abs(2 * count - n) >= abs(first - second) for count in heads]
    assert compare.mcnemar(first, second) == pytest.approx(sum(uneven) / 2**n)


def test_mcnemar_by_hand():
    """Two values from the binomial distribution."""
    assert compare.mcnemar(1, 5) == 2 * (1 + 6) / 64
    assert compare.mcnemar(10, 0) == 2 / 1024


def test_diff_tests_questions(report_toy, tmp_path, capsys):
    """diff counts completions, and tests questions by their majority."""
    # question 0: one of three right, outvoted
    a = answers_file(tmp_path / "a", lambda place, k: place > 0 or k == 0, many=3)
    b = answers_file(tmp_path / "b", lambda place, k: place > 3, many=3)
    evaluate.main(["diff", str(a), str(b), "--limit", "1"])
    text = capsys.readouterr().out
    counts = "18 right in both, 10 in the first alone, 0 in the second alone, 2 in neither"
    assert f"30 completions in both files: {counts}" in text
    shares = "10 questions: 90.00% and 60.00% right by the majority of 3 and 3 answers"
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
    assert f"right (sample {test[0]}, completion 0)\n  question:   {question[:80]}" in text
    assert f"right (sample {test[2]}," not in text
    assert "paper:      None is wrong, of []" in text


# ---------------------------------------------------------------- what all commands agree on


EXPECTED = {"default": (10, 8, 5), "template": (23, 20, 11)}  # questions, right of two runs
LAST = "last epoch"
SHIFT = 2  # of the second run's right questions, so that each is right alone somewhere


def write_run(saved: Path, split: str, run: int) -> Path:
    """Write three answers to each question of a split, and to four of its validation share.

    By majority EXPECTED are right; validation questions are all right in one run, wrong in the
    other, so that counting them shows.
    """
    parts = dict(zip(("default", "template"), tasks.default_split("toy")[::-1], strict=True))
    others = {"default": "template", "template": "default"}
    aside = parts[others[split]][:4]
    count = EXPECTED[split][1 + run]
    first_place = SHIFT * run
    n = len(parts[split])

    def right(place: int, k: int) -> bool:
        """Two answers of three are right, or one."""
        if place >= n:
            return run == 1
        if first_place <= place < first_place + count:
            return k < 2
        return k < 1

    return answers_file(
        saved,
        right,
        f"D_toy__T_run{run}_{split}__E_001__K_03_t70",
        many=3,
        indices=[*parts[split], *aside],
        validation=aside,
        split=split,
        train_key=f"run{run}_{split}",
    )


@pytest.fixture
def two_runs(report_toy, tmp_path) -> dict[str, list[Path]]:
    """Two runs on each of two splits."""
    train, test = tasks.default_split("toy")
    storage.write_json(tmp_path / "split/toy__template.json", {"train": test, "test": train})
    return {split: [write_run(tmp_path, split, run) for run in (0, 1)] for split in EXPECTED}


def printed(capsys: pytest.CaptureFixture[str], *command: Any) -> str:
    """Run evaluate.py; return what it prints."""
    capsys.readouterr()
    evaluate.main(list(map(str, command)))
    return capsys.readouterr().out


@pytest.mark.parametrize("split", EXPECTED)
def test_diff_score_and_table_agree(two_runs, tmp_path, capsys, split):
    """Majority, interval and test are of the same questions in diff, score and table."""
    n, *right = EXPECTED[split]
    shares = [100 * count / n for count in right]
    table, _ = report.collect(runs.saved_files(tmp_path), tmp_path)
    for run, path in enumerate(two_runs[split]):
        low, high = evaluate.wilson_interval(right[run], n)
        line = f"maj@3 {shares[run]:.2f}% [{low:.1f}, {high:.1f}] of {n} questions"
        assert line in printed(capsys, "score", path, "--data", tmp_path)
        rows = {key: cells["toy"] for key, cells in table.items() if key.vote == "maj@3"}
        train_key = f"run{run}_{split}"
        cell = next(rows[key] for key in rows if (key.train_key, key.epoch) == (train_key, LAST))
        assert cell[:3] == pytest.approx((shares[run], low, high), abs=0.006)
    text = printed(capsys, "diff", *two_runs[split], "--limit", 0)
    right_in_first = set(range(right[0]))
    right_in_second = set(range(SHIFT, SHIFT + right[1]))
    only_first = len(right_in_first - right_in_second)
    only_second = len(right_in_second - right_in_first)
    p = compare.mcnemar(only_first, only_second)
    assert f"{n} questions: {shares[0]:.2f}% and {shares[1]:.2f}% right" in text
    assert f"{only_first} against {only_second}, p = {p:.3g}" in text
    assert text.count("its 4 validation questions are left out") == 2


@pytest.mark.parametrize("split", EXPECTED)
def test_show_leaves_validation_out(two_runs, capsys, split):
    """show counts the answers that a score counts."""
    n, _, _ = EXPECTED[split]
    text = printed(capsys, "show", two_runs[split][0], "--limit", 1)
    assert f" of {3 * n} are right" in text


def test_mean_pass_at_1_is_the_accuracy():
    """One rounding: of 178 questions with 5 answers each, 710 right, both are 79.78."""
    answers = []
    for i in range(178):
        count = 4 if i < 176 else 3
        answers.append([compare.Answer("x", k < count) for k in range(5)])
    right = sum(answer.is_right for of_question in answers for answer in of_question)
    assert compare.mean_pass_at_k(answers, 1) == round(100 * right / (178 * 5), 2)


@pytest.mark.parametrize("n, k", [(178, 5), (60, 4), (89, 8), (30, 3)])
def test_mean_pass_at_1_rounds_like_the_accuracy(n, k):
    """For every number of right answers, pass@1 and accuracy are the same digits."""
    for right in range(0, n * k, 7):
        whole, more = divmod(right, n)
        answers = []
        for i in range(n):
            count = whole + (i < more)
            answers.append([compare.Answer("x", j < count) for j in range(k)])
        expected = round(100 * right / (n * k), 2)
        assert compare.mean_pass_at_k(answers, 1) == expected


# ---------------------------------------------------------------- where the rules differ

TEXTS = [  # of the toy's first questions: "yes" by both rules, by flexible alone, ...
    "yes",
    '"Yep."',
    "It is not a no; yes",
    "I do not know",
]


@pytest.fixture
def four_answers(tmp_path):
    """Return a completion file of four answers to a question whose answer is yes."""
    row = {"sample_index": 0, "question": "Is it?", "answer": "yes"}
    rows = [row | {"completion_index": k, "completion": text} for k, text in enumerate(TEXTS)]
    path = tmp_path / "D_toy.json"
    metadata = {"dataset_key": "toy", "prediction_template": None}
    path.write_text(json.dumps({"metadata": metadata, "data": {"0": rows}}))
    return path


def test_show_disagree(four_answers, capsys):
    """show --disagree prints the completions that one set of rules alone calls right."""
    evaluate.main(["show", str(four_answers), "--disagree"])
    text = capsys.readouterr().out
    assert "1 of 4 are right by the flexible rules alone" in text
    assert "0 of 4 are right by the paper's rules alone" in text
    assert 'completion: "Yep."' in text
    assert "flexible:   yes is right" in text


def test_show_disagree_limit(four_answers, capsys):
    """--limit holds for every kind."""
    evaluate.main(["show", str(four_answers), "--disagree", "--limit", "0"])
    assert "1 of 4 are right by the flexible rules alone; the first 0:" in capsys.readouterr().out


OTHERS = [  # two predictions, whether they differ
    ("18.00", 18.0, False),
    ("18", 19.0, True),
    (None, "", False),
    (None, "no", True),
    ("Yes", "yes", False),
]


@pytest.mark.parametrize("a, b, differ", OTHERS)
def test_is_other_answer(a, b, differ):
    """Predictions are compared by value."""
    assert compare.is_other_answer(a, b) == differ
