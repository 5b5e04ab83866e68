"""The method's figure: that it is drawn from a run, stays in its frame, and follows the theme.

python -m pytest tests/extras/test_figure.py
"""

from xml.etree import ElementTree

import pytest

import evaluate
from completions import read_completions
from extras import figure

EXAMPLE = figure.Example(
    question="A coin & a <b>?",
    dropped="It is " + "long " * 200,
    dropped_answer="no.",
    kept="It is short.",
    prompt="A coin & a <b>? ###",
    label="It is short. --> yes",
)
STORY = figure.Story(
    example=EXAMPLE,
    asked="Another?",
    completion="It is so. --> yes",
    guessed="no",
    accuracies={"ft": 50.7, "ft_cot": 100.0},
    questions=600,
    random=50.0,
)


@pytest.fixture
def drawing():
    """The root element of a figure of long texts and of markup in texts."""
    return ElementTree.fromstring(figure.draw_method(STORY))


def test_draw_method_writes_markup_as_text(drawing):
    texts = ["".join(node.itertext()) for node in drawing.findall(".//{*}text")]
    assert "A coin & a <b>?" in texts


def test_draw_method_stays_in_its_frame(drawing):
    """A text is broken into lines and, where it is too long, cut: no card leaves the ground."""
    ground, *rects = drawing.findall(".//{*}rect")
    for rect in rects:
        right = float(rect.get("x")) + float(rect.get("width"))
        bottom = float(rect.get("y")) + float(rect.get("height"))
        assert right <= float(ground.get("width"))
        assert bottom <= float(ground.get("height")) <= 900


def test_draw_method_has_both_themes(drawing):
    style = drawing.find("{*}style").text
    assert "prefers-color-scheme: dark" in style


def test_draw_method_bars_are_the_accuracies(drawing):
    full, half, _, whole = [rect for rect in drawing.findall(".//{*}rect") if rect.get("rx") == "3"]
    assert float(half.get("width")) / float(full.get("width")) == pytest.approx(0.507, abs=1e-3)
    assert float(whole.get("width")) == float(full.get("width"))


@pytest.mark.parametrize(
    "text, tidied", [("Start : heads . ", "Start: heads."), ("a  b\nc", "a b c")]
)
def test_tidy(text, tidied):
    assert figure.tidy(text) == tidied


def test_plot_method_without_a_run(tmp_path):
    """The command that makes one is named."""
    with pytest.raises(SystemExit, match="python finetune_cot.py --task toy"):
        evaluate.main(["plot", "method", "--out", "m.svg", "--saved", str(tmp_path)])


def test_plot_method_of_another_form(tmp_path):
    with pytest.raises(SystemExit, match=r"m.png: the method's figure is drawn as .svg"):
        evaluate.main(["plot", "method", "--out", "m.png", "--saved", str(tmp_path)])


def test_training_example_is_of_the_run(small_toy, trained_toy):
    """A right and a wrong rationale of one question, and the sample of the right one."""
    path = next(trained_toy.glob("completion_data/B_toy_student__C_ft_cot/*.json"))
    metadata = read_completions(path)[0]
    run = {"path": path, "metadata": metadata, "task": "toy", "split": "default"}
    example = figure.training_example(run, str(trained_toy), "data")
    assert example.prompt == f"{example.question} ###"
    assert example.label.startswith(example.kept.rstrip())
    assert example.dropped != example.kept
    assert example.label.rpartition("--> ")[2] != example.dropped_answer.strip(" .")
