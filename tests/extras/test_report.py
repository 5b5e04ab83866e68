"""Votes, paired tests, tables and figures, each against a hand count or another formula.   python -m pytest tests/test_look.py"""

import csv
import itertools
import math
import re
import statistics
import sys

import pytest

import evaluate
import finetune_cot
import flags as flags_module
import tasks
import storage as files
from extras import filters
from extras import report as look
from extras import plot
from storage import UserError
from conftest import ROOT

PUBLISHED = {
    "multiarith": 78.79,
    "coin_flip": 90.04,
    "date_understanding": 67.58,
    "strategy_qa": 53.45,
    "svamp": 64.20,
}


@pytest.fixture
def small_toy(monkeypatch):
    """The toy task with 10 test questions."""
    monkeypatch.setitem(tasks.TASKS, "toy", tasks.TASKS["toy"]._replace(n=33, train=23, test=10))


def answers_file(saved, right, name="D_toy__T_ft_cot__E_001", model="m", many=1, **metadata):
    """A student's completion file on the small toy: right(question, k) says which of `many` answers are right; None: unreadable."""
    _, test = tasks.load_split("toy")
    samples = tasks.toy_samples(33)
    data = {}
    for place, i in enumerate(test):
        wrong = "no" if samples[i]["answer"] == "yes" else "yes"
        data[str(i)] = [
            {
                **{k: samples[i][k] for k in ("sample_index", "question", "answer")},
                "completion_index": k,
                "finish_reason": "stop",
                "completion": {True: samples[i]["answer"], False: wrong, None: "?"}[
                    right(place, k)
                ],
            }
            for k in range(many)
        ]
    known = {
        "dataset_key": "toy",
        "base_model": model,
        "completion_key": "ft_cot",
        "train_key": "ft_cot",
        "epoch": 1,
        "part": "test",
        "prediction_template": "ft_cot_token",
        **metadata,
    }
    path = saved / "completion_data" / f"B_{model}__C_ft_cot" / f"{name}.json"
    files.write_json(path, {"metadata": known, "data": data})
    return path


def cells(saved):
    table, skipped = look.collect(look.saved_files(saved), saved)
    assert not skipped
    return {row: one["toy"] for (_, row), one in table.items()}


# ---------------------------------------------------------------- majority, pass@k


@pytest.mark.parametrize(
    "n, correct, k", [(5, 2, 3), (5, 0, 2), (5, 5, 1), (6, 1, 6), (7, 3, 1), (8, 4, 5)]
)
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(n, correct, k):
    draws = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
    assert look.pass_at_k(n, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize(
    "outcomes, right",
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
def test_the_majority_is_of_the_answers_that_can_be_read(outcomes, right):
    assert look.majority(outcomes) is right


def test_votes_of_a_file_are_those_counted_by_hand(small_toy, tmp_path, capsys):
    # questions 0-4: all three right; 5-7: two right; 8: one right, two unreadable; 9: one right, two wrong
    def right(place, k):
        return (
            place < 5
            or (place < 8 and k < 2)
            or (k == 0 if place == 9 else True if k == 0 else False if place < 8 else None)
        )

    path = answers_file(tmp_path, right, many=3, name="D_toy__T_ft_cot__E_001__K_03_t70")
    s = evaluate.score(path, data_dir=tmp_path)
    v = look.score_with_votes(
        path, part="test", split="default", data_dir=tmp_path, rules="paper", allow_partial=False
    )["votes"]
    assert (s["n"], s["questions"], s["correct"]) == (30, 10, 23)
    assert (
        v["k"],
        v["questions"],
        v["maj"],
    ) == (3, 10, 90.0)
    pass_2 = (5 + 3 * 1 + 2 * (1 - math.comb(2, 2) / math.comb(3, 2))) / 10
    assert v["pass"] == {1: pytest.approx(76.67, abs=0.01), 2: round(100 * pass_2, 2), 3: 100.0}
    assert (v["maj_low"], v["maj_high"]) == pytest.approx(evaluate.wilson(9, 10), abs=0.01)
    assert [s["low"], s["high"]] == pytest.approx(
        evaluate.wilson(23 / 3, 10), abs=0.01
    )  # 10 questions are 10, not 30
    assert {row: round(one["accuracy"], 2) for row, one in cells(tmp_path).items()} == {
        f"ft_cot, 3 samples a question, last epoch{vote}": x
        for vote, x in (("", 76.67), (", maj@3", 90.0), (", pass@3", 100.0))
    }
    evaluate.main(["score", str(path), "--data", str(tmp_path)])
    assert re.search(
        r"maj@3 90\.00% \[59\.6, 98\.2\] of 10 questions; pass@1 76\.67%, pass@2 93\.33%, pass@3 100\.00%",
        capsys.readouterr().out,
    )


# ---------------------------------------------------------------- McNemar


@pytest.mark.parametrize("first, second", [(0, 0), (1, 5), (0, 7), (3, 3), (4, 6), (9, 1)])
def test_mcnemar_counts_the_coin_tosses_that_are_as_uneven(first, second):
    n = first + second
    tosses = [sum(toss) for toss in itertools.product((0, 1), repeat=n)]
    assert look.mcnemar(first, second) == pytest.approx(
        sum(abs(2 * heads - n) >= abs(first - second) for heads in tosses) / 2**n
    )


def test_mcnemar_by_hand():
    assert look.mcnemar(1, 5) == 2 * (1 + 6) / 64
    assert look.mcnemar(10, 0) == 2 / 1024


def test_diff_tests_questions_not_completions(small_toy, tmp_path, capsys):
    a = answers_file(
        tmp_path / "a", lambda place, k: place > 0 or k == 0, many=3
    )  # question 0: one of three right, outvoted
    b = answers_file(tmp_path / "b", lambda place, k: place > 3, many=3)
    evaluate.main(["diff", str(a), str(b), "--limit", "1"])
    text = capsys.readouterr().out
    assert (
        "30 completions in both files: 18 right in both, 10 in the first alone, 0 in the second alone, 2 in neither"
        in text
    )
    assert (
        "10 questions: 90.00% and 60.00% right; exact McNemar test: 3 against 0, p = 0.25" in text
    )
    assert text.count(f"right in {a}") == 1
    assert "and 9 more" in text


# ---------------------------------------------------------------- the table


def test_the_published_files_score_as_the_paper_says_in_every_format(shared, capsys):
    texts = {}
    for form in look.FORMATS:
        evaluate.main(["table", "--saved", str(shared / "saved"), "--format", form])
        texts[form] = capsys.readouterr().out.splitlines()
    values = [f"{PUBLISHED[task]:.2f}" for task in tasks.TASKS if task in PUBLISHED]
    for form, separator in (
        ("terminal", r"\s{2,}"),
        ("markdown", r"\s*\|\s*"),
        ("latex", r"\s*&\s*|\s*\\\\$"),
    ):
        ours, paper = (
            [
                cell
                for cell in re.split(
                    separator, next(line for line in texts[form] if re.search(word, line))
                )
                if cell
            ]
            for word in (r"^\W*text-davinci-002", r"^(\W|quad)*paper")
        )
        assert ours[2:] == paper[1:] == values, form
    assert texts["markdown"][1] == "|---|---|--:|--:|--:|--:|--:|"
    assert r"text-davinci-002 & zs\_cot" in "\n".join(texts["latex"])
    assert {line.count("&") for line in texts["latex"] if line.endswith(r"\\")} == {6}


def test_columns_stand_in_the_paper_s_order():
    with open(ROOT / "data" / "paper_results.csv", newline="") as f:
        printed = [
            r["dataset"]
            for r in csv.DictReader(f)
            if r["table"] == "table_1" and r["method"] == "random"
        ]
    assert printed == [
        key for key in tasks.TASKS if key in printed
    ]  # a benchmark of one's own may stand among them


def test_a_run_s_epochs_are_named_by_how_they_were_chosen(small_toy, tmp_path):
    for epoch, limit in ((1, 4), (2, 8), (3, 6)):
        answers_file(
            tmp_path, lambda place, k: place < limit, f"D_toy__T_ft_cot__E_{epoch:03d}", epoch=epoch
        )
    rows = cells(tmp_path)
    assert {row: s["accuracy"] for row, s in rows.items()} == {
        "ft_cot, last epoch": 60.0,
        "ft_cot, best test epoch (the paper's protocol)": 80.0,
    }


def test_rows_are_in_the_order_of_methods_and_numbers_and_teachers_come_first(small_toy, tmp_path):
    for key in ("ft_cot_16aug", "ft_cot_2aug"):
        answers_file(tmp_path, lambda place, k: True, f"D_toy__T_{key}__E_001", train_key=key)
    answers_file(
        tmp_path,
        lambda place, k: True,
        "D_toy__S_default",
        completion_key="zs",
        train_key=None,
        epoch=None,
    )
    path = answers_file(
        tmp_path,
        lambda place, k: True,
        "D_toy",
        "z",
        completion_key="zs_cot",
        train_key=None,
        epoch=None,
        part=None,
    )
    content = files.read_json(path)  # a teacher has answered all questions
    content["data"] = {
        str(s["sample_index"]): [{**s, "completion_index": 0, "completion": "yes"}]
        for s in tasks.toy_samples(33)
    }
    files.write_json(path, content)
    lines = look.table_lines(look.collect(look.saved_files(tmp_path), tmp_path)[0], {})
    assert [line[1] for line in lines[2::2]] == [
        "zs_cot, all questions",
        "zs",
        "ft_cot_2aug, last epoch",
        "ft_cot_16aug, last epoch",
    ]


def test_seeds_have_a_row_with_mean_and_standard_deviation(small_toy, tmp_path):
    for seed, limit in ((0, 4), (1, 7), (2, 10)):
        key = "ft_cot" + (f"_s{seed}" if seed else "")
        answers_file(
            tmp_path,
            lambda place, k: place < limit,
            f"D_toy__T_{key}__E_001",
            train_key=key,
            run={"seed": seed},
        )
    mean = cells(tmp_path)["ft_cot, last epoch, mean of 3 seeds"]
    assert mean["accuracy"] == pytest.approx(70)
    assert mean["spread"] == pytest.approx(statistics.stdev([40, 70, 100]))
    lines = look.terminal(
        look.table_lines(look.collect(look.saved_files(tmp_path), tmp_path)[0], {})
    )
    at = next(i for i, line in enumerate(lines) if "mean of 3 seeds" in line)
    assert lines[at].endswith("70.00")
    assert re.match(r"\s+standard deviation\s+30\.00$", lines[at + 1])


def test_the_paper_s_diverse_value_stands_beside_its_own_degree_only():
    results = look.read_paper_results()
    cell = {"model": "gpt2-large", "method": "ft_cot", "split": "default"}

    def value(task, key, **change):
        return look.paper_value(results, {**cell, "task": task, "train_key": key, **change})

    assert value("multiarith", "ft_cot_64aug") is not None
    assert value("coin_flip", "ft_cot_8aug") is not None
    assert (
        value("multiarith", "ft_cot_8aug")
        is value("coin_flip", "ft_cot_64aug")
        is value("coin_flip", "ft_cot_lr0.001")
        is None
    )
    assert (
        value("coin_flip", "ft_cot", model="google-t5_t5-base")
        == results["t5_base", "fine_tune_cot", "coin_flip"]
    )
    assert value("coin_flip", "ft_cot", measure="maj") is None


# ---------------------------------------------------------------- figures


def test_a_figure_s_points_are_the_runs_by_what_a_study_varied(small_toy, tmp_path):
    for degree, seed, limit in ((1, 0, 4), (1, 1, 6), (8, 0, 9)):
        key = f"ft_cot_{degree}aug_s{seed}"
        answers_file(
            tmp_path,
            lambda place, k: place < limit,
            f"D_toy__T_{key}__E_001",
            train_key=key,
            run={
                "seed": seed,
                "degree": degree,
                "questions": 23,
                "temperature": 0.7 * (degree > 1),
                "parameters": 1000,
            },
        )
    answers_file(
        tmp_path,
        lambda place, k: place < 5,
        "D_toy__T_ft__E_001",
        train_key="ft",
        completion_key="ft",
        run={"questions": 23, "parameters": 1000},
    )
    runs, _ = look.scored_runs(look.saved_files(tmp_path), tmp_path)
    figure = plot.ours([s for many in runs.values() for s in many], "degree")["toy"]
    assert {
        name: {x: [s["accuracy"] for s in many] for x, many in points.items()}
        for name, points in figure.items()
    } == {"m ft_cot": {1: [40.0, 60.0], 8: [90.0]}, "m ft": {None: [50.0]}}
    assert plot.band(figure["m ft_cot"][1]) == pytest.approx(
        (50, 50 - statistics.stdev([40, 60]), 50 + statistics.stdev([40, 60]))
    )
    assert plot.band(figure["m ft_cot"][8])[1:] == pytest.approx(evaluate.wilson(9, 10), abs=0.01)
    by_size = plot.ours([s for many in runs.values() for s in many], "student")["toy"]
    assert {name: set(points) for name, points in by_size.items()} == {
        "m ft": {1000},
        "m ft_cot, degree 1, temperature 0.0": {1000},
        "m ft_cot, degree 8, temperature 0.7": {1000},
    }


def test_the_paper_s_points_are_those_of_its_figures_and_tables():
    assert (
        plot.published("degree", {"curie"})["svamp"]["paper: curie ft_cot diverse"][64.0] == 30.33
    )
    assert plot.published("train_size", {"curie"})["svamp"]["paper: curie ft"][8.0] == 1.0
    assert plot.published("teacher", {"curie"})["svamp"]["paper: curie ft_cot"]["davinci"] == 5.0
    points = plot.published("student", {"gpt2", "gpt2_large"})["coin_flip"]["paper: gpt2 ft_cot"]
    assert points == {
        124e6: look.read_paper_results()["gpt2", "fine_tune_cot", "coin_flip"],
        774e6: look.read_paper_results()["gpt2_large", "fine_tune_cot", "coin_flip"],
    }
    assert plot.published("curves", {"curie"}) == {}


def test_sizes_are_written_as_people_do():
    assert [plot.size_name(n) for n in (124e6, 6.7e9, 429_000)] == ["124M", "6.7B", "0.429M"]


def test_without_matplotlib_one_sentence_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        SystemExit, match="^error: figures need matplotlib, which nothing else here does"
    ):
        evaluate.main(["plot", "degree", "--out", str(tmp_path / "f.png")])


def test_every_figure_is_drawn(small_toy, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for epoch, limit in ((1, 4), (2, 9)):
        answers_file(
            tmp_path,
            lambda place, k: place < limit,
            f"D_toy__T_ft_cot__E_{epoch:03d}",
            epoch=epoch,
            run={"degree": 2, "seed": 0, "questions": 23, "parameters": 1000, "teacher": "toy"},
        )
    for kind in plot.KINDS:
        evaluate.main(
            [
                "plot",
                kind,
                "--saved",
                str(tmp_path),
                "--data",
                str(tmp_path),
                "--out",
                str(tmp_path / f"{kind}.png"),
                "--paper",
                "curie",
            ]
        )
        assert (tmp_path / f"{kind}.png").read_bytes().startswith(b"\x89PNG")
        assert "plot: " in capsys.readouterr().out
    with pytest.raises(SystemExit, match="the name of a figure ends in .png, .pdf, .svg$"):
        evaluate.main(
            ["plot", "degree", "--saved", str(tmp_path), "--out", str(tmp_path / "f.docx")]
        )
    with pytest.raises(SystemExit, match="there is no student in"):
        evaluate.main(
            ["plot", "degree", "--saved", str(tmp_path / "none"), "--out", str(tmp_path / "f.png")]
        )


# ---------------------------------------------------------------- filters beyond the paper's


def flags(*more):
    [args] = finetune_cot.parse_args(["--stage", "curate", *map(str, more)])
    return args


ROWS = [
    {
        "sample_index": i,
        "completion_index": k,
        "reasoning_completion": text,
        "reasoning_finish_reason": reason,
    }
    for i, k, text, reason in [
        (0, 0, "one two three four five six", "stop"),
        (0, 1, "one two three four five six ", "stop"),
        (0, 2, "one two three four five seven", "stop"),
        (0, 3, "a wholly different way to say it", "length"),
        (1, 0, "one two three four five six", "stop"),
        (1, 1, "a b c d e f g h i j k l m n o p q r s t", "stop"),
    ]
]


@pytest.mark.parametrize(
    "options, kept, said",
    [
        ((), [0, 1, 2, 3, 4, 5], ""),
        (("--drop_unfinished",), [0, 1, 2, 4, 5], "dropped 1 of 6 rationales: unfinished"),
        (("--drop_duplicates",), [0, 2, 3, 4, 5], "dropped 1 of 6 rationales: a duplicate"),
        (
            ("--max_similarity", 0.5),
            [0, 3, 4, 5],
            "dropped 2 of 6 rationales: similar to another",
        ),  # 3 of 5 triples shared: 0.6
        (
            ("--max_similarity", 0.7),
            [0, 2, 3, 4, 5],
            "dropped 1 of 6 rationales: similar to another",
        ),
        (
            ("--max_per_question", 1),
            [0, 4],
            "dropped 4 of 6 rationales: one too many of its question",
        ),
        (("--max_rationale_words", 10), [0, 1, 2, 3, 4], "dropped 1 of 6 rationales: too long"),
        (
            ("--drop_duplicates", "--max_per_question", 2),
            [0, 2, 4, 5],
            "dropped 1 of 6 rationales: one too many",
        ),
    ],
)
def test_a_filter_drops_what_it_says_and_says_how_many(options, kept, said, capsys):
    assert filters.leave_out(flags(*options), ROWS) == [ROWS[i] for i in kept]
    assert said in capsys.readouterr().out


def test_filters_that_leave_nothing_are_refused():
    with pytest.raises(UserError, match=r"none of 6 rationales is left \(6 too long\)"):
        filters.leave_out(flags("--max_rationale_words", 1), ROWS)


def test_unfiltered_rationales_keep_their_teacher_s_answer(capsys):
    judged = [
        ({"sample_index": i, "answer": "7"}, tasks.grade("svamp", "zs_cot", text, "7"))
        for i, text in enumerate([" 7.", " 8.", " no idea", " 7", " 9.5"])
    ]

    def chosen(name, *more):
        return [
            (row["sample_index"], row["answer"])
            for row in filters.choose(flags("--filter", name, *more), judged)
        ]

    assert chosen("right") == [(0, "7"), (3, "7")]
    assert chosen("all") == [(0, "7"), (1, "8"), (3, "7"), (4, "9.5")]
    assert chosen("wrong") == [
        (1, "8"),
        (4, "9.5"),
    ]
    assert (
        "2 of 5 rationales are right, 2 wrong, 1 have no readable answer" in capsys.readouterr().out
    )
    assert len(chosen("random")) == 2
    assert chosen("random") == chosen("random")
    assert len({tuple(chosen("random", "--data_seed", s)) for s in range(9)}) > 1


def test_filters_stand_in_names_and_settings_and_the_default_changes_neither():
    assert flags_module.train_key(flags(), "ft_cot") == "ft_cot_2aug"
    assert flags_module.curation_options(flags()) == {}
    args = flags(
        "--filter", "all", "--max_per_question", 3, "--drop_unfinished", "--lr", 0.01, "--seed", 4
    )
    assert flags_module.train_key(args, "ft_cot") == "ft_cot_2aug_all_3each_finished_lr0.01_s4"
    assert flags_module.train_key(args, "ft") == "ft_lr0.01_s4"
    assert flags_module.finetune_key(args, "ft_cot") == "zs_cot_t70_toy_2aug_all_3each_finished"
    assert flags_module.curation_options(args) == {
        "filter": "all",
        "max_per_question": 3,
        "drop_unfinished": True,
    }


def test_curation_shows_samples_to_be_read(small_toy, tmp_path, capsys):
    for label_style in ("token", "gpt3"):
        finetune_cot.main(["--stage", "sample", "--saved", str(tmp_path)])
        finetune_cot.main(
            [
                "--stage",
                "curate",
                "--saved",
                str(tmp_path),
                "--method",
                "ft_cot",
                "--show",
                "3",
                "--label_style",
                label_style,
            ]
        )
    text = capsys.readouterr().out
    assert text.count("  input: 'A coin is heads up.") == text.count("  label: ' ") == 3
    assert text.count('"completion": " ') == 3
    with pytest.raises(SystemExit, match="--show goes with --stage curate"):
        finetune_cot.main(["--show", "3", "--saved", str(tmp_path)])
