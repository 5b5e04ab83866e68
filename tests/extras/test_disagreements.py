"""Where the two sets of answer rules differ.

python -m pytest tests/extras/test_disagreements.py
"""

import json

import pytest

import evaluate
from extras import disagreements

COMPLETIONS = [  # of the toy's first questions: "yes" by both rules, by flexible alone, ...
    "yes",
    '"Yep."',
    "It is not a no; yes",
    "I do not know",
]


@pytest.fixture
def file(tmp_path):
    """Return a completion file of four answers to a question whose answer is yes."""
    row = {"sample_index": 0, "question": "Is it?", "answer": "yes"}
    rows = [row | {"completion_index": k, "completion": text} for k, text in enumerate(COMPLETIONS)]
    path = tmp_path / "D_toy.json"
    metadata = {"dataset_key": "toy", "prediction_template": None}
    path.write_text(json.dumps({"metadata": metadata, "data": {"0": rows}}))
    return path


def test_show_disagree(file, capsys):
    """show --disagree prints the completions that one set of rules alone calls right."""
    evaluate.main(["show", str(file), "--disagree"])
    text = capsys.readouterr().out
    assert "1 of 4 are right by the flexible rules alone" in text
    assert "0 of 4 are right by the paper's rules alone" in text
    assert 'completion: "Yep."' in text
    assert "flexible:   yes is right" in text


def test_show_disagree_limit(file, capsys):
    """--limit holds for every kind."""
    evaluate.main(["show", str(file), "--disagree", "--limit", "0"])
    assert "1 of 4 are right by the flexible rules alone; the first 0:" in capsys.readouterr().out


OTHERS = [
    ("18.00", 18.0, False),
    ("18", 19.0, True),
    (None, "", False),
    (None, "no", True),
    ("Yes", "yes", False),
]


@pytest.mark.parametrize("a, b, differ", OTHERS)
def test_is_other_answer(a, b, differ):
    """Predictions are compared by value."""
    assert disagreements.is_other_answer(a, b) == differ
