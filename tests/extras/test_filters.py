"""Filters beyond the paper's rule.   python -m pytest tests/extras/test_filters.py"""

import re

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
        row = {"sample_index": i, "answer": "7", "reasoning_completion": f"so{text}"}
        graded.append((row, verdict))
    rows = filters.choose_rationales(FilterConfig(filter=name, seed=seed), graded)
    return [(row["sample_index"], row["answer"]) for row in rows]


def test_choose_rationales_keeps_the_teachers_answer(capsys):
    """Wrong rationales keep their teacher's answer, written as people write it."""
    assert selected("right") == [(0, "7"), (3, "7")]
    assert capsys.readouterr().out == ""
    assert selected("all") == [(0, "7"), (1, "8"), (3, "7"), (4, "9.5")]
    assert selected("wrong") == [(1, "8"), (4, "9.5")]
    counts = "2 of 5 rationales are right, 2 wrong, 1 have no readable answer"
    assert f"curate: --filter wrong: {counts}" in capsys.readouterr().out


def test_choose_rationales_random():
    """random draws as many as are right, of all, by the seed."""
    assert len(selected("random")) == 2
    assert selected("random") == selected("random")
    assert len({tuple(selected("random", seed)) for seed in range(9)}) > 1


def graded_rows() -> list[tuple[dict, tasks.Verdict]]:
    """Return 30 completions of ten questions: a third right, half of these cut off or long."""
    graded = []
    for i in range(30):
        answer = 7 + i % 3
        text = " ".join(["word"] * (5 + 10 * (i % 2)))
        row = {"sample_index": i // 3, "completion_index": i % 3, "answer": "7"}
        row |= {"reasoning_completion": f"{text} {i}", "reasoning_finish_reason": "stop"}
        if i % 2:
            row["reasoning_finish_reason"] = "length"
        graded.append((row, tasks.grade("svamp", "zs_cot", f" {answer}.", "7")))
    return graded


OTHERS = [{"max_rationale_words": 8}, {"drop_unfinished": True}, {"max_per_question": 1}, {}]


@pytest.mark.parametrize("others", OTHERS)
@pytest.mark.parametrize("seed", [0, 1])
def test_choose_rationales_random_is_size_matched(others, seed, capsys):
    """As many are drawn as right ones are left by the other filters, of what these leave."""
    right = filters.choose_rationales(FilterConfig(**others), graded_rows())
    config = FilterConfig(filter="random", seed=seed, **others)
    drawn = filters.choose_rationales(config, graded_rows())
    assert len(drawn) == len(right)
    assert filters.split_by_filters(config, drawn).kept == drawn
    assert f"drew {len(right)} of " in capsys.readouterr().out


def test_draw_rows_of_fewer(capsys):
    """Where fewer are left than right ones, all are taken, and that is said."""
    assert filters.draw_rows([{"a": 1}], 2, 0) == [{"a": 1}]
    assert "1 are left, fewer than the 2 right ones" in capsys.readouterr().out


@pytest.mark.parametrize("flags", ["--max_rationale_words 32", "--drop_unfinished"])
def test_curate_random_of_published_completions(published, flags):
    """The study compares equal numbers: random keeps as many as right does."""
    kept = []
    for name in ("right", "random"):
        _, out = published(f"--method ft_cot --filter {name} {flags}")
        kept.append(re.search(r"curate: keeping the ([\d,]+) of", out)[1])
    assert kept[0] == kept[1]


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
