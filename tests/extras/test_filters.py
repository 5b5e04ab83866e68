"""Filters beyond the paper's rule.   python -m pytest tests/extras/test_filters.py"""

import pytest

import finetune_cot
import flags
import tasks
from extras import filters
from extras.filters import FilterConfig
from storage import UserError

TEXTS = [  # (sample_index, completion_index, rationale, finish reason)
    (0, 0, "one two three four five six", "stop"),
    (0, 1, "one two three four five six ", "stop"),
    (0, 2, "one two three four five seven", "stop"),
    (0, 3, "a wholly different way to say it", "length"),
    (1, 0, "one two three four five six", "stop"),
    (1, 1, "a b c d e f g h i j k l m n o p q r s t", "stop"),
]
NAMES = ("sample_index", "completion_index", "reasoning_completion", "reasoning_finish_reason")
ROWS = [dict(zip(NAMES, values, strict=True)) for values in TEXTS]


@pytest.mark.parametrize(
    "config, kept, said",
    [
        ({}, [0, 1, 2, 3, 4, 5], ""),
        ({"drop_unfinished": True}, [0, 1, 2, 4, 5], "1 of 6 rationales: unfinished"),
        ({"drop_duplicates": True}, [0, 2, 3, 4, 5], "1 of 6 rationales: a duplicate"),
        # 3 of 5 trigrams shared: 0.6
        ({"max_similarity": 0.5}, [0, 3, 4, 5], "2 of 6 rationales: similar to another"),
        ({"max_similarity": 0.7}, [0, 2, 3, 4, 5], "1 of 6 rationales: similar to another"),
        ({"max_per_question": 1}, [0, 4], "4 of 6 rationales: one too many of its question"),
        ({"max_rationale_words": 10}, [0, 1, 2, 3, 4], "1 of 6 rationales: too long"),
        (
            {"drop_duplicates": True, "max_per_question": 2},
            [0, 2, 4, 5],
            "1 of 6 rationales: one too many",
        ),
    ],
)
def test_apply_filters_drops_and_counts(config, kept, said, capsys):
    """A filter drops what it says, and says how many."""
    assert filters.apply_filters(FilterConfig(**config), ROWS) == [ROWS[i] for i in kept]
    out = capsys.readouterr().out
    assert said in out
    assert ("curate: dropped" in out) == bool(said)


def test_apply_filters_leaves_nothing():
    """Filters that leave nothing are refused."""
    with pytest.raises(UserError, match=r"none of 6 rationales is left \(6 too long\)"):
        filters.apply_filters(FilterConfig(max_rationale_words=1), ROWS)


def test_word_trigrams_of_short_texts():
    """Texts of fewer than three words are compared by their words."""
    assert filters.word_trigrams("a B") == {"a", "b"}
    assert filters.similarity("yes", "Yes") == 1
    assert filters.similarity("", "") == 0


def selected(name: str, seed: int = 0) -> list[tuple[int, str]]:
    """Return (sample_index, answer) of what a filter selects of five completions."""
    graded = []
    for i, text in enumerate([" 7.", " 8.", " no idea", " 7", " 9.5"]):
        verdict = tasks.grade("svamp", "zs_cot", text, "7")
        graded.append(({"sample_index": i, "answer": "7"}, verdict))
    rows = filters.select_rationales(FilterConfig(filter=name, seed=seed), graded)
    return [(row["sample_index"], row["answer"]) for row in rows]


def test_select_rationales_keeps_the_teachers_answer(capsys):
    """Wrong rationales keep their teacher's answer, written as people write it."""
    assert selected("right") == [(0, "7"), (3, "7")]
    assert capsys.readouterr().out == ""
    assert selected("all") == [(0, "7"), (1, "8"), (3, "7"), (4, "9.5")]
    assert selected("wrong") == [(1, "8"), (4, "9.5")]
    counts = "2 of 5 rationales are right, 2 wrong, 1 have no readable answer"
    assert f"curate: --filter wrong: {counts}" in capsys.readouterr().out


def test_select_rationales_random():
    """random draws as many as are right, of all, by the seed."""
    assert len(selected("random")) == 2
    assert selected("random") == selected("random")
    assert len({tuple(selected("random", seed)) for seed in range(9)}) > 1


def parse(*more: object) -> object:
    """Return the flags of one cell."""
    [cell] = flags.parse_args(["--stage", "curate", *map(str, more)])
    return cell


def test_flags_default_to_the_papers_rule():
    """The defaults of the flags are those of FilterConfig, and stand in no name."""
    cell = parse()
    for name, value in FilterConfig._field_defaults.items():
        assert getattr(cell, {"seed": "data_seed"}.get(name, name)) == value
    assert flags.train_key(cell, "ft_cot") == "ft_cot_2aug"
    assert flags.curation_options(cell) == {}


def test_flags_stand_in_names_and_settings():
    """Filters stand in file names and in the settings of what they make."""
    chosen = {"filter": "all", "max_per_question": 3, "drop_unfinished": True}
    cell = parse("--filter", "all", "--max_per_question", 3, "--drop_unfinished")
    assert flags.train_key(cell, "ft_cot") == "ft_cot_2aug_all_3each_finished"
    assert flags.train_key(cell, "ft") == "ft"
    assert flags.finetune_key(cell, "ft_cot") == "zs_cot_t70_toy_2aug_all_3each_finished"
    assert flags.curation_options(cell) == chosen


def test_flags_of_training_follow_in_names():
    """What training varies stands behind the filters."""
    cell = parse("--filter", "all", "--lr", 0.01, "--seed", 4)
    assert flags.train_key(cell, "ft_cot") == "ft_cot_2aug_all_lr0.01_s4"
    assert flags.train_key(cell, "ft") == "ft_lr0.01_s4"


def test_show_samples_to_be_read(report_toy, tmp_path, capsys):
    """--show prints samples as the student reads them, of files for open and for API models."""
    saved = ["--saved", str(tmp_path)]
    finetune_cot.main(["--stage", "sample", *saved])
    curate = ["--stage", "curate", "--method", "ft_cot", "--show", "3", *saved]
    for label_style in ("token", "gpt3"):
        finetune_cot.main([*curate, "--label_style", label_style])
    text = capsys.readouterr().out
    assert text.count("  input: 'A coin is heads up.") == 3
    assert text.count("  label: ' ") == 3
    assert text.count('"completion": " ') == 3


def test_show_needs_curate(tmp_path):
    """--show goes with --stage curate."""
    with pytest.raises(SystemExit, match="--show goes with --stage curate"):
        finetune_cot.main(["--show", "3", "--saved", str(tmp_path)])
