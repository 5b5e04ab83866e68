"""Which completions are learnt from.   python -m pytest tests/test_curation.py"""

from pathlib import Path

import pytest

import completions
import curation
import storage
import tasks
from storage import UserError


def plan_of(rows: list[dict], degree: int) -> curation.CurationPlan:
    """Return a plan of the toy with two training questions, 0 and 1."""
    samples = tasks.toy_samples(3)
    benchmark = tasks.Benchmark("toy", samples, [0, 1], [], [2])
    settings = {"degree": degree, "rules": "paper"}
    path = Path("teacher.json")
    return curation.CurationPlan(path, settings, benchmark, path, rows, "zs_cot")


def rows_at(*places: tuple[int, int]) -> list[dict]:
    """Return right completions with these (sample_index, completion_index)."""
    samples = tasks.toy_samples(3)
    rows = []
    for i, k in places:
        text = {"completion": samples[i]["answer"], "reasoning_completion": f"because {k}"}
        rows.append({**samples[i], "completion_index": k, **text})
    return rows


def test_training_rows_with_gaps(capsys):
    """The first so many that are there count, whatever their numbers."""
    rows = rows_at((0, 0), (0, 5), (0, 6), (1, 3), (2, 0))
    found = curation.training_rows(plan_of(rows, 2))
    places = [(row["sample_index"], row["completion_index"]) for row in found]
    assert places == [(0, 0), (0, 5), (1, 3)]
    assert "has 3 of the 4 rationales of 2 questions x 2" in capsys.readouterr().out


def test_training_rows_without_gaps(capsys):
    """A larger file gives its first completions, and there is nothing to say."""
    rows = rows_at((0, 0), (0, 1), (0, 2), (1, 0), (1, 1))
    assert len(curation.training_rows(plan_of(rows, 2))) == 4
    assert capsys.readouterr().out == ""


def test_describe_right():
    """What each set of rules calls right is said only where that is not what is kept."""
    rows = rows_at((0, 0), (0, 1), (1, 0))
    verdicts = curation.grade_rows(plan_of(rows, 2), rows, "paper")
    by_rules = {"paper": verdicts, "flexible": verdicts[1:]}
    right = "; right are 3 by the paper rules, 2 by the flexible rules"
    assert curation.describe_right(by_rules, 3) == right
    assert curation.describe_right({"paper": verdicts, "flexible": verdicts}, 3) == ""


def test_read_completions_refuses_negative_indices(tmp_path):
    """A completion before the first is none."""
    [row] = rows_at((0, -1))
    path = tmp_path / "D_toy.json"
    storage.write_json(path, {"metadata": {"dataset_key": "toy"}, "data": {"0": [row]}})
    with pytest.raises(UserError, match="a completion of sample 0 lacks its sample_index, comp"):
        completions.read_completions(path)


def test_describe_fallback_of_api_styles():
    """The styles of API files are the token template of every method: nothing to say."""
    assert curation.describe_fallback("ft", "gpt3") == ""
    assert curation.describe_fallback("ft", "token") == ""
    assert "there is no template ft_steps" in curation.describe_fallback("ft", "steps")
