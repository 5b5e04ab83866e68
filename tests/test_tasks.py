"""Cleansing, templates, splits and files.   python -m pytest tests/test_tasks.py"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import tasks
import storage as files
from data import toy
from conftest import ROOT
from storage import UserError

SIZES = {
    "single_eq": (356, 152),
    "addsub": (276, 119),
    "multiarith": (420, 180),
    "gsm8k": (7473, 1319),
    "aqua": (10000, 254),
    "svamp": (700, 300),
    "tracking_shuffled_objects": (525, 225),
    "date_understanding": (258, 111),
    "coin_flip": (350, 150),
    "last_letter_concatenation": (350, 150),
    "commonsense_qa": (9741, 1221),
    "strategy_qa": (1603, 687),
}


# ---------------------------------------------------------------- the paper's rules


def test_paper_rules_agree_with_the_published_evaluator_on_every_vector(shared):
    rows = [
        json.loads(line)
        for line in (shared / "vectors" / "cleansing_paper.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 4000
    for row in rows:
        verdict = tasks.grade(
            row["dataset_key"], row["prediction_template"], row["completion"], row["answer"]
        )
        for field in tasks.Verdict._fields:
            assert getattr(verdict, field) == row[field], (field, row)


@pytest.mark.parametrize(
    "task, template, completion, answer, prediction, correct",
    [
        ("gsm8k", "ft_cot_token", "5 - 8 = -3 --> -3", "-3", "-3", True),
        ("gsm8k", "ft_cot_token", "3 --> 4 --> 5", "4", "4", True),  # the first arrow counts
        (
            "gsm8k",
            "ft_cot_token",
            "bags of 3, 4 each, so 12 apples",
            "12",
            "12",
            True,
        ),  # no arrow: the last candidate
        ("gsm8k", "zs_cot", " 39, not 40", "39", "39", True),  # none expected: the first
        ("gsm8k", "zs", "18.00", "18", "18.00", False),  # compared as strings
        ("svamp", "zs", "18.00", "18.0", 18.0, True),  # compared as floats
        ("aqua", None, "Because 3<4, the answer is C", "C", "B", False),  # even inside a word
        ("coin_flip", None, "no; yes", "yes", "yes", True),  # 'no;' is not seen
        ("coin_flip", None, "Yes.", "Yes", "yes", False),  # gold is not lower-cased here
        ("strategy_qa", None, "Yes.", "Yes", "yes", True),  # but here
        ("last_letter_concatenation", "zs", ' "y a j o".', "yajo", "yajo", True),
        ("last_letter_concatenation", "zs", "", "yajo", "", False),
        ("multiarith", "fs_cot", "3 + 4. The answer is 7.", "7", "7", True),
    ],
)
def test_paper_rules_on_the_quirks_one_should_know(
    task, template, completion, answer, prediction, correct
):
    verdict = tasks.grade(task, template, completion, answer)
    assert (verdict.prediction, verdict.correct) == (prediction, correct)


# ---------------------------------------------------------------- the flexible rules: what a careful person reads

ARROW = "ft_cot_token"
NONE = None
NUMBERS = [  # template, completion, what a careful person reads
    (ARROW, "5 - 8 = -3 --> -3", -3),
    (NONE, "5 - 8 = -3 --> -3", -3),
    (ARROW, "bags of 3, 4 each, so 12 apples", 12),
    (NONE, "bags of 3, 4 each, so 12 apples", 12),
    (ARROW, "3 --> 4 --> 5", 5),
    (NONE, "The answer is 12", 12),
    ("fs_cot", "The answer is 12", 12),
    (NONE, " 39.", 39),
    (NONE, " $51 for ONE pack", 51),
    (NONE, " 18.00", 18),
    (NONE, " $1,234.50.", 1234.5),
    (NONE, " 1,000,000 people", 1000000),
    (NONE, " \n\n24 + 24 = 48", 48),
    (NONE, " 9-6=3 cups of flour.", 3),
    (NONE, " 8 (3 + 5)", 8),
    (NONE, "x = 3.\nSo the answer is x = 6.", 6),
    (NONE, "**18** dollars", 18),
    ("ft_cot_natural", "Therefore, the answer is 7.", 7),
    (ARROW, "so 3 + 4 = 7 apples in all.", 7),
    (NONE, "The answer (arabic numerals) is 12.", 12),
    (NONE, "\\boxed{42}", 42),
    (ARROW, "He has 9 left.\n#### 9", 9),
    (NONE, " -5 degrees", -5),
    (NONE, " \u22124", -4),
    (NONE, " .5", 0.5),
    (NONE, "1e3", 1000),
    (NONE, "7\n\nQ: What is 3 + 4?\nA: 99", 7),
    (ARROW, "The final answer: 20%", 20),
    (ARROW, "--> 12 END", 12),
    (NONE, "none at all", None),
    (NONE, "", None),
    (ARROW, "I do not know -->", None),
    (NONE, " 3-4 apples, so 4", 3),
    (ARROW, "from 10-3 he gets 7", 7),
    (NONE, "The answer is that 11 + 11 makes a total of 22 eggs.", 22),
]
LETTERS = [
    (NONE, "Because 3<4, the answer is C", "C"),
    (NONE, " (F).", "F"),
    (NONE, "(b)", "B"),
    (NONE, "c.", "C"),
    (NONE, "A dog is an animal, so (D)", "D"),
    (ARROW, "(A) is wrong, (B) is right", "B"),
    (NONE, "The answer is A because B is wrong.", "A"),
    (NONE, "The answer is not A, it is E.", "E"),
    (ARROW, "The days pass. --> D", "D"),
    (NONE, "[E]", "E"),
    (NONE, "DEC", None),
    (NONE, "Answer: C) printer", "C"),
    (NONE, "An office", None),
    (NONE, "**B**", "B"),
    (NONE, "The correct answer is:\n(C)", "C"),
    (ARROW, "So the answer is D.\n\nQ: next? (A)", "D"),
]
YES_NO = [
    (NONE, ' "Yes, the coin is heads up."', "yes"),
    (NONE, '"No;"', "no"),
    (NONE, " yes- he could.", "yes"),
    (NONE, "yes!", "yes"),
    (NONE, "NO", "no"),
    (NONE, "No, there is no evidence, yes?", "no"),
    (NONE, "There is no evidence for this", None),
    (NONE, "no longer", None),
    (NONE, "unknown", None),
    (ARROW, "It is not true, so no.", "no"),
    (ARROW, "no --> yes", "yes"),
    (NONE, "The answer is (yes)", "yes"),
    (NONE, "no because it fell", "no"),
    (NONE, "Yesterday", None),
    (ARROW, "The answer is no. Or was it yes? The answer is yes.", "yes"),
]
STRINGS = [
    (NONE, ' "y a j o".', "yajo"),
    (NONE, "yajo", "yajo"),
    (NONE, " y-a-j-o", "yajo"),
    (NONE, "The answer is yajo.", "yajo"),
    (ARROW, "so --> YAJO", "yajo"),
    (NONE, 'The answer is the string "yajo", as above.', "yajo"),
    (ARROW, "The last letters are y, a, j, o --> yajo", "yajo"),
    (NONE, "**yajo**", "yajo"),
    (NONE, "the string yajo, as above", "yajo"),
    (NONE, " y, a, j, o", "yajo"),
    (NONE, "12 --", None),
    (NONE, "", None),
]
CASES = [
    (task, *case)
    for task, cases in [
        ("gsm8k", NUMBERS),
        ("svamp", NUMBERS),
        ("date_understanding", LETTERS),
        ("strategy_qa", YES_NO),
        ("coin_flip", YES_NO),
        ("last_letter_concatenation", STRINGS),
    ]
    for case in cases
]


def test_there_are_at_least_sixty_flexible_cases_over_the_four_kinds():
    assert len(NUMBERS) + len(LETTERS) + len(YES_NO) + len(STRINGS) >= 60
    assert all(map(len, (NUMBERS, LETTERS, YES_NO, STRINGS)))


@pytest.mark.parametrize("task, template, completion, expected", CASES)
def test_flexible_rules_read_what_a_careful_person_would(task, template, completion, expected):
    gold = {
        "gsm8k": "1,234",
        "svamp": "43.0",
        "date_understanding": "A",
        "strategy_qa": "Yes",
        "coin_flip": "yes",
        "last_letter_concatenation": "yajo",
    }[task]
    verdict = tasks.grade(task, template, completion, gold, rules="flexible")
    assert verdict.prediction == expected
    if expected is None:
        assert not verdict.correct  # no answer is wrong, and never 0 or ""


@pytest.mark.parametrize(
    "task, completion, answer",
    [
        ("gsm8k", "18.00", "18"),
        ("multiarith", "$1,234.50", "1234.5"),
        ("gsm8k", "1234", "1,234"),
        ("coin_flip", "yes!", "Yes"),
        ("strategy_qa", "NO", "No"),
        ("last_letter_concatenation", "Y.A.J.O.", "yajo"),
    ],
)
def test_flexible_rules_compare_by_value(task, completion, answer):
    assert tasks.grade(task, None, completion, answer, rules="flexible").correct


def test_a_null_completion_is_no_answer():
    assert tasks.grade("gsm8k", "zs", None, "5").prediction is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("nope", None, "", ""), "no task 'nope'"),
        (("gsm8k", "zero", "", ""), "no prediction template 'zero'"),
        (("gsm8k", None, "", "1", "lax"), "no 'lax' rules"),
        (("svamp", None, "1", "many"), "gold answer 'many'"),
    ],
)
def test_judge_refuses_what_it_does_not_know(arguments, message):
    with pytest.raises(UserError, match=message):
        tasks.grade(*arguments)


# ---------------------------------------------------------------- the table, splits, templates


def test_an_unknown_task_is_answered_with_the_nearest_name():
    with pytest.raises(UserError, match="did you mean multiarith"):
        tasks.find_task("multi_arith")


@pytest.mark.parametrize("task, sizes", SIZES.items())
def test_default_splits_have_the_published_sizes_and_cover_their_part_once(task, sizes):
    train, test = tasks.default_split(task)
    row = tasks.TASKS[task]
    assert (len(train), len(test)) == sizes == (row.train, row.test)
    assert train == sorted(set(train))
    assert test == sorted(set(test))
    assert not set(train) & set(test)
    if task != "aqua":
        assert sorted(train + test) == list(range(row.n))


def test_the_split_rule_is_numpys_permutation():
    order = np.random.RandomState(0).permutation(600)
    assert tasks.default_split("multiarith")[0] == sorted(order[:420].tolist())


def test_few_shot_splits_are_nested_parts_of_the_training_set():
    train, test = tasks.load_split("toy", "default")
    parts = [tasks.load_split("toy", f"few_shot_{n}") for n in (8, 32, 128)]
    assert [len(part[0]) for part in parts] == [8, 32, 128]
    assert all(part[1] == test for part in parts)
    assert set(parts[0][0]) < set(parts[1][0]) < set(parts[2][0]) < set(train)


def test_the_eight_few_shot_indices_are_those_the_published_file_samples_repeatedly(
    shared, tmp_path
):
    train, _ = tasks.default_split("multiarith")
    files.write_json(
        tmp_path / "split" / "multiarith__default.json",
        {"train": train, "test": tasks.default_split("multiarith")[1]},
    )
    data = json.loads(
        (
            shared / "saved/completion_data/B_text-davinci-002__C_zs_cot/D_multiarith.json"
        ).read_text()
    )["data"]
    assert tasks.load_split("multiarith", "few_shot_8", tmp_path)[0] == sorted(
        int(i) for i, rows in data.items() if len(rows) > 1
    )


@pytest.mark.parametrize(
    "template, family, prompt, label",
    [
        ("zs", "decoder", "Q: q?\n\nA:", ""),
        ("zs", "encoder_decoder", "question: q?", ""),
        ("zs_cot", "decoder", "Q: q?\nA: Let's think step by step.", ""),
        ("zs_cot", "encoder_decoder", "Q: q?\nA: Let's think step by step.", ""),
        ("fs_cot", "decoder", "E\nQ: q?\nA:", ""),
        ("ft_token", "decoder", "q? ###", " a"),
        ("ft_token", "encoder_decoder", "q?", "a"),
        ("ft_natural", "decoder", "Q: q?\n\nA:", " a"),
        ("ft_natural", "encoder_decoder", "Q: q?", "a"),
        ("ft_cot_token", "decoder", "q? ###", " r --> a"),
        ("ft_cot_token", "encoder_decoder", "q?", "r --> a"),
        (
            "ft_cot_natural",
            "decoder",
            "Q: q?\n\nA: Let's think step by step.\n\n",
            " r\n\nTherefore, the answer is a",
        ),
        ("ft_cot_token", "openai", "q?\n\n###\n\n", " r\n\n-->\n\na END"),
        ("ft_token", "openai", "q?\n\n###\n\n", " a END"),
    ],
)
def test_templates_are_the_papers(template, family, prompt, label):
    assert tasks.format_sample(template, family, " q?\n", "\n r ", " a ", "E\n") == (prompt, label)


def test_braces_in_a_question_are_left_alone():
    assert tasks.format_sample("ft_token", "decoder", "{x} {q}", answer="{a}") == (
        "{x} {q} ###",
        " {a}",
    )


def test_a_family_without_a_template_is_told_which_there_are():
    with pytest.raises(UserError, match="no template 'ft_cot_natural' for encoder_decoder"):
        tasks.format_sample("ft_cot_natural", "encoder_decoder", "q")


@pytest.mark.parametrize("template, prefix", [(t, p) for t, p in tasks.PREFIXES.items() if p])
def test_labels_hold_the_prefix_that_scoring_looks_for(template, prefix):
    if template in ("ft_cot_token", "ft_cot_natural"):
        assert tasks.grade(
            "gsm8k", template, tasks.format_sample(template, "decoder", "q", "r 1", "2")[1], "2"
        ).correct_format


# ---------------------------------------------------------------- the toy task and its teacher


def test_a_toy_question_does_not_give_its_answer_away_by_length():
    samples = tasks.toy_samples(400)
    lengths = {
        answer: {len(s["question"].split()) for s in samples if s["answer"] == answer}
        for answer in ("yes", "no")
    }
    assert lengths["yes"] == lengths["no"]
    assert len(lengths["yes"]) == 1
    assert 0.4 < sum(s["answer"] == "yes" for s in samples) / 400 < 0.6


def test_the_toy_teacher_is_wrong_once_in_five_varies_with_temperature_and_repeats_itself_with_its_seed():
    prompts = [
        tasks.format_sample("zs_cot", "decoder", s["question"])[0] for s in tasks.toy_samples(500)
    ]
    sampled = toy.toy_teacher(prompts, n=2, temperature=0.7, seed=1)
    assert (
        sampled
        == toy.toy_teacher(prompts, n=2, temperature=0.7, seed=1)
        != toy.toy_teacher(prompts, n=2, temperature=0.7, seed=2)
    )
    assert sum(a != b for a, b in sampled) > 300
    answers = toy.toy_teacher(
        [p + rows[0]["completion"] + tasks.COT_ANSWER for p, rows in zip(prompts, sampled)]
    )
    right = sum(s["answer"] in a[0]["completion"] for s, a in zip(tasks.toy_samples(500), answers))
    assert 0.74 < right / 500 < 0.86
    greedy = toy.toy_teacher(prompts, n=2)
    assert all(a == b for a, b in greedy)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    "name, key",
    [
        ("gpt2", "gpt2"),
        ("google/flan-t5-base", "google_flan-t5-base"),
        ("text-davinci-002", "text-davinci-002"),
        ("ft:gpt-4o:me::id", "ft:gpt-4o:me::id"),
    ],
)
def test_model_names_become_file_names(name, key):
    assert files.safe_key(name) == key


@pytest.mark.parametrize(
    "name",
    [
        "..",
        "../x",
        "a/../../b",
        "/etc/passwd",
        "",
        "a\0b",
        "x" * 200,
        ".hidden",
        "-flag",
        "a b",
        "caf\u00e9",
        "a\nb",
    ],
)
def test_names_that_would_leave_their_folder_are_refused(name):
    with pytest.raises(UserError, match="cannot be used as a name"):
        files.safe_key(name)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    files.write_atomic(tmp_path / "f", "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        files.write_atomic(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"a": 1', "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_malformed_json_is_named(tmp_path, content, message):
    (tmp_path / "f.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"f\.json.*{message}"):
        files.read_json(tmp_path / "f.json")


def test_malformed_json_lines_are_named_with_their_line_and_only_newlines_end_a_line(tmp_path):
    (tmp_path / "f.jsonl").write_text('\ufeff{"a": "x\u2028y"}\r\n\n{"a": 2}')
    assert [row["a"] for row in files.read_jsonl(tmp_path / "f.jsonl")] == ["x\u2028y", 2]
    (tmp_path / "f.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(UserError, match=r"f\.jsonl, line 2 is not valid JSON"):
        files.read_jsonl(tmp_path / "f.jsonl")


@pytest.mark.parametrize(
    "content, message",
    [
        ({"data": []}, "is not a dataset"),
        ([1], "holds a JSON list, not an object"),
        ({"metadata": {"dataset_key": "svamp"}, "data": [{}]}, "holds the task 'svamp'"),
        (
            {"metadata": {}, "data": [{"sample_index": 0, "question": "q", "answer": 5}]},
            "sample 0 needs",
        ),
        (
            {"metadata": {}, "data": [{"sample_index": 1, "question": "q", "answer": "5"}]},
            "sample 0 needs",
        ),
    ],
)
def test_a_dataset_of_the_wrong_form_is_refused(tmp_path, content, message):
    files.write_json(tmp_path / "dataset" / "multiarith.json", content)
    with pytest.raises(UserError, match=message):
        tasks.load("multiarith", tmp_path)


@pytest.mark.parametrize(
    "split",
    [
        {"train": [0, 600], "test": [1]},
        {"train": [-1], "test": [1]},
        {"train": [], "test": [1]},
        {"train": [1], "test": []},
        {"train": [0, 0], "test": [1]},
        {"train": [0], "test": [0]},
        {"train": ["0"], "test": [1]},
        {"train": 3, "test": [1]},
        {},
    ],
)
def test_a_split_of_the_wrong_form_is_refused(tmp_path, split):
    files.write_json(tmp_path / "split" / "multiarith__default.json", split)
    with pytest.raises(UserError, match="is not a split of multiarith: .* from 0 to 599"):
        tasks.load_split("multiarith", "default", tmp_path)


def test_a_missing_dataset_or_split_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(
        UserError,
        match=r"dataset/multiarith.json is missing: make it with `python data/prepare.py multiarith`",
    ):
        tasks.load("multiarith", tmp_path)
    with pytest.raises(
        UserError,
        match=r"multiarith__template.json is missing: make it with `python data/prepare.py multiarith`",
    ):
        tasks.load_split("multiarith", "template", tmp_path)


def test_importing_tasks_imports_neither_torch_nor_numpy():
    code = "import sys, tasks; sys.exit(bool({'torch', 'numpy', 'transformers', 'openai'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ---------------------------------------------------------------- the journal


def test_a_journal_keeps_every_row_once_drops_a_torn_line_and_refuses_a_second_writer(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = files.Journal(path)
    journal.append([{"key": "a", "x": 1}, {"key": "b", "x": "\u2028\n"}, {"key": "a", "x": 2}])
    journal.append([{"key": "b", "x": 3}, {"key": "c", "x": 4}])
    with pytest.raises(UserError, match="another run"):
        files.Journal(path)
    journal.close()
    whole = path.read_bytes()
    rows = {
        "a": {"key": "a", "x": 1},
        "b": {"key": "b", "x": "\u2028\n"},
        "c": {"key": "c", "x": 4},
    }
    for cut in range(len(whole) + 1):  # wherever a kill tears it
        path.write_bytes(whole[:cut])
        journal = files.Journal(path)
        assert list(journal.rows.items()) == list(rows.items())[: whole[:cut].count(b"\n")]
        journal.append(list(rows.values()))
        journal.close()
        assert path.read_bytes() == whole
    path.write_bytes(whole.replace(b'"b"', b'"b'))
    with pytest.raises(UserError, match="line 2"):
        files.Journal(path)


def test_a_full_disk_leaves_a_journal_without_a_half_line(tmp_path):
    code = (
        "import resource, signal, sys\nimport storage as files\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\njournal = files.Journal(sys.argv[1])\n"
        "for i in range(99): journal.append([{'key': i}])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "j.jsonl")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "OSError" in done.stderr
    assert list(files.Journal(tmp_path / "j.jsonl").rows) == list(range(9))
