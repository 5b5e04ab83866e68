"""Figures: the points of ours and of the paper's, and that each kind is drawn.

python -m pytest tests/extras/test_plot.py   (the drawing needs matplotlib)
"""

import statistics
import sys
from pathlib import Path

import pytest
from conftest import answers_file

import evaluate
from extras import paper, plot, report


def scored_files(saved: Path) -> list[report.ScoredFile]:
    """Return all completion files of a folder, scored."""
    runs, skipped = report.scored_runs(report.saved_files(saved), saved)
    assert not skipped
    return [scored for epochs in runs.values() for scored in epochs]


def middles(panels: plot.Panels) -> dict[str, dict]:
    """Return {series: {x: accuracy}} of the toy's panel."""
    found = {}
    for name, series in panels["toy"].items():
        found[name] = {x: middle for x, (middle, _, _) in series.points.items()}
    return found


def trained(saved: Path, key: str, limit: int, **run: object) -> None:
    """Write a completion file of a fine-tuned student on the small toy."""
    method = "ft"
    if key.startswith("ft_cot"):
        method = "ft_cot"
    known = {"questions": 23, "parameters": 1000}
    answers_file(
        saved,
        lambda place, k: place < limit,
        f"D_toy__T_{key}__E_001",
        train_key=key,
        completion_key=method,
        run=known | run,
    )


@pytest.fixture
def degrees(report_toy, tmp_path):
    """ft, and ft_cot with degree 1 (two seeds) and 8."""
    trained(tmp_path, "ft_cot", 4, degree=1, seed=0, temperature=0.0)
    trained(tmp_path, "ft_cot_s1", 6, degree=1, seed=1, temperature=0.0)
    trained(tmp_path, "ft_cot_8aug", 9, degree=8, seed=0, temperature=0.7)
    trained(tmp_path, "ft", 5)
    return scored_files(tmp_path)


def test_our_series_by_degree(degrees):
    """Runs that differ in the degree are points of a series; ft, which has none, is its own."""
    panels = plot.our_series(degrees, "degree")
    assert middles(panels) == {"m ft": {None: 50.0}, "m ft_cot": {8: 90.0, 1: 50.0}}


def test_our_series_bands(degrees):
    """A point of several seeds has their standard deviation, one of one seed its interval."""
    points = plot.our_series(degrees, "degree")["toy"]["m ft_cot"].points
    spread = statistics.stdev([40, 60])
    assert points[1] == pytest.approx((50, 50 - spread, 50 + spread))
    assert points[8][1:] == pytest.approx(evaluate.wilson_interval(9, 10), abs=0.01)


def test_our_series_names_what_differs(degrees):
    """Flags that are not on the x axis, and differ, are in the names of the series."""
    assert middles(plot.our_series(degrees, "student")) == {
        "m ft": {1000: 50.0},
        "m ft_cot, degree 1, temperature 0.0": {1000: 50.0},
        "m ft_cot, degree 8, temperature 0.7": {1000: 90.0},
    }


def test_our_series_of_splits(report_toy, tmp_path):
    """Two splits of a prompted method are two series, not two seeds of a point."""
    known = {"completion_key": "zs", "train_key": None, "epoch": None, "run": {"parameters": 1}}
    for limit, split in ((4, "default"), (8, "few_shot_8")):
        name = f"D_toy__S_{split}"
        # the split of the small toy is made on the spot: its few-shot part has the same test part
        answers_file(tmp_path, lambda place, k, n=limit: place < n, name, split=split, **known)
    panels = plot.our_series(scored_files(tmp_path), "train_size")
    assert middles(panels) == {
        "m zs, split default": {None: 40.0},
        "m zs, split few_shot_8": {None: 80.0},
    }


def test_model_series_without_size():
    """Sizes of a model are one series."""
    names = ("gpt2-large", "google_flan-t5-base", "gpt2", "SmolLM2-135M-Instruct")
    assert [plot.model_series(name) for name in names] == ["gpt2", "flan_t5", "gpt2", "smollm2"]


def paper_points(kind: str, task: str, name: str) -> dict:
    """Return {x: accuracy} of a series of the paper's."""
    series = plot.paper_series(kind, {"curie", "gpt2", "gpt2_large"})[task][name]
    assert not series.is_ours
    return {x: middle for x, (middle, _, _) in series.points.items()}


def test_paper_series_of_figures():
    """The paper's points are those of its figures."""
    assert paper_points("degree", "svamp", "paper: curie ft_cot diverse")[64.0] == 30.33
    assert paper_points("train_size", "svamp", "paper: curie ft")[8.0] == 1.0
    assert paper_points("teacher", "svamp", "paper: curie ft_cot")["davinci"] == 5.0
    assert plot.paper_series("curves", {"curie"}) == {}


def test_paper_series_of_students():
    """Students of several sizes are the points of one series."""
    results = paper.read_results()
    assert paper_points("student", "coin_flip", "paper: gpt2 ft_cot") == {
        124e6: results["gpt2", "fine_tune_cot", "coin_flip"],
        774e6: results["gpt2_large", "fine_tune_cot", "coin_flip"],
    }


def test_size_name_as_people_write():
    """Millions and billions, three digits."""
    sizes = (124e6, 6.7e9, 429_000)
    assert [plot.size_name(size) for size in sizes] == ["124M", "6.7B", "0.429M"]


def test_plot_without_matplotlib(monkeypatch, tmp_path):
    """Without matplotlib one sentence says so."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = "^error: figures need matplotlib, which nothing else here does"
    with pytest.raises(SystemExit, match=message):
        evaluate.main(["plot", "degree", "--out", str(tmp_path / "f.png")])


@pytest.fixture
def draw(report_toy, tmp_path):
    """-> function: kind, flags -> the bytes of the figure of two epochs of a run."""
    pytest.importorskip("matplotlib")
    run = {"degree": 2, "seed": 0, "questions": 23, "parameters": 1000, "teacher": "toy"}
    for epoch, limit in ((1, 4), (2, 9)):
        name = f"D_toy__T_ft_cot__E_{epoch:03d}"
        answers_file(tmp_path, lambda place, k, n=limit: place < n, name, epoch=epoch, run=run)

    def draw(kind: str, *flags: str, form: str = "png") -> bytes:
        """Run the command."""
        out = tmp_path / f"{kind}.{form}"
        folders = ["--saved", str(tmp_path), "--data", str(tmp_path)]
        evaluate.main(["plot", kind, *folders, "--out", str(out), *flags])
        return out.read_bytes()

    return draw


@pytest.mark.parametrize("kind", plot.KINDS)
def test_plot_draws(draw, kind, capsys):
    """Every kind of figure is drawn, with the paper's values beside ours."""
    assert draw(kind, "--paper", "curie").startswith(b"\x89PNG")
    assert "plot: " in capsys.readouterr().out


def test_plot_has_a_panel_a_task(draw, capsys):
    """--task names the panels, which stand in the paper's order; by default they are our tasks."""
    assert b"<svg" in draw("degree", form="svg")
    draw("degree", "--paper", "curie", "--task", "toy", "svamp", "multiarith")
    draw("degree", "--paper", "curie", "--task", "svamp")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" ->")[0] for line in lines] == [
        "plot: toy",
        "plot: multiarith, svamp, toy",
        "plot: svamp",
    ]


def test_plot_refuses(draw, tmp_path):
    """A file name of another format, and nothing to draw, are one sentence each."""
    with pytest.raises(SystemExit, match="the name of a figure ends in .png, .pdf, .svg$"):
        draw("degree", form="docx")
    with pytest.raises(SystemExit, match="there is no student in"):
        draw("degree", "--saved", str(tmp_path / "none"))
