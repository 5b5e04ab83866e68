"""Figures: the points of ours and of the paper's, and that each kind is drawn.

python -m pytest tests/extras/test_plot.py   (the drawing needs matplotlib)
"""

import json
import statistics
import sys
from pathlib import Path

import pytest
from conftest import answers_file

import evaluate
import storage
from extras import paper, plot, runs, series


def scored_files(saved: Path) -> list[runs.ScoredFile]:
    """Return all completion files of a folder, scored."""
    found, skipped = runs.scored_runs(runs.saved_files(saved), saved)
    assert not skipped
    return [scored for epochs in found.values() for scored in epochs]


def middles(panels: series.Panels) -> dict[str, dict]:
    """Return {series: {x: accuracy}} of the toy's panel."""
    found = {}
    for name, line in panels["toy"].items():
        found[name] = {x: middle for x, (middle, _, _) in line.points.items()}
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
    panels = series.our_series(degrees, "degree")
    assert middles(panels) == {"m ft": {None: 50.0}, "m ft_cot": {8: 90.0, 1: 50.0}}


def test_our_series_bands(degrees):
    """A point of several seeds has their standard deviation, one of one seed its interval."""
    points = series.our_series(degrees, "degree")["toy"]["m ft_cot"].points
    spread = statistics.stdev([40, 60])
    assert points[1] == pytest.approx((50, 50 - spread, 50 + spread))
    assert points[8][1:] == pytest.approx(evaluate.wilson_interval(9, 10), abs=0.01)


def test_our_series_names_what_differs(degrees):
    """Flags that are not on the x axis, and differ, are in the names of the series."""
    assert middles(series.our_series(degrees, "student")) == {
        "m ft": {1000: 50.0},
        "m ft_cot, D = 1, temperature 0.0": {1000: 50.0},
        "m ft_cot, D = 8, temperature 0.7": {1000: 90.0},
    }


def test_our_series_without_usual_settings(report_toy, tmp_path):
    """The paper's own filter is not named where others are, nor is a flag that is merely off."""
    trained(tmp_path, "ft_cot", 4, filter="right", drop_duplicates=False)
    trained(tmp_path, "ft_cot_all", 6, filter="all", drop_duplicates=True)
    panels = series.our_series(scored_files(tmp_path), "student")
    assert middles(panels) == {
        "m ft_cot": {1000: 40.0},
        "m ft_cot, drop duplicates, filter all": {1000: 60.0},
    }


def test_our_series_of_splits(report_toy, tmp_path):
    """Two splits of a prompted method are two series, not two seeds of a point."""
    known = {"completion_key": "zs", "train_key": None, "epoch": None, "run": {"parameters": 1}}
    for limit, split in ((4, "default"), (8, "few_shot_8")):
        name = f"D_toy__S_{split}"
        # the split of the small toy is made on the spot: its few-shot part has the same test part
        answers_file(tmp_path, lambda place, k, n=limit: place < n, name, split=split, **known)
    panels = series.our_series(scored_files(tmp_path), "train_size")
    assert middles(panels) == {
        "m zs, split default": {None: 40.0},
        "m zs, few-shot 8": {None: 80.0},
    }


def test_model_series_without_size():
    """Sizes of a model are one series."""
    names = ("gpt2-large", "google_flan-t5-base", "gpt2", "SmolLM2-135M-Instruct")
    assert [series.model_series(name) for name in names] == ["gpt2", "flan_t5", "gpt2", "smollm2"]


def paper_points(kind: str, task: str, name: str) -> dict:
    """Return {x: accuracy} of a series of the paper's."""
    line = series.paper_series(kind, {"curie", "gpt2", "gpt2_large"})[task][name]
    assert not line.is_ours
    return {x: middle for x, (middle, _, _) in line.points.items()}


def test_paper_series_of_figures():
    """The paper's points are those of its figures."""
    assert paper_points("degree", "svamp", "paper: curie ft_cot diverse")[64.0] == 30.33
    assert paper_points("train_size", "svamp", "paper: curie ft")[8.0] == 1.0
    assert paper_points("teacher", "svamp", "paper: curie ft_cot")["davinci"] == 5.0
    assert series.paper_series("curves", {"curie"}) == {}


def test_paper_series_of_students():
    """Students of several sizes are the points of one series."""
    results = paper.read_results()
    assert paper_points("student", "coin_flip", "paper: gpt2 ft_cot") == {
        124e6: results["gpt2", "fine_tune_cot", "coin_flip"],
        774e6: results["gpt2_large", "fine_tune_cot", "coin_flip"],
    }


def test_paper_series_of_a_method():
    """Diverse reasoning is ft_cot, too."""
    found = series.paper_series("degree", {"curie"}, ["ft_cot"])
    assert list(found["svamp"]) == ["paper: curie ft_cot diverse"]
    assert series.paper_series("degree", {"curie"}, ["zs"]) == {}


# ---------------------------------------------------------------- losses


def write_log(saved: Path, key: str, losses: list[float], **settings: object) -> None:
    """Write what a training run leaves of its losses, an epoch each, and of its settings."""
    student = saved / "models/B_m" / f"D_toy__T_{key}"
    rows = [{"step": 8 * i, "epoch": i, "epoch_loss": loss} for i, loss in enumerate(losses, 1)]
    lines = [json.dumps(row) + "\n" for row in rows]
    storage.write_atomic(student / "log.jsonl", "".join(lines))
    storage.write_json(student / "run.json", {"settings": settings})


def losses_of(saved: Path) -> dict[str, dict]:
    """Return {series: {epoch: (mean, low, high)}} of the toy's losses."""
    panels = series.loss_series(scored_files(saved))
    return {name: line.points for name, line in panels.get("toy", {}).items()}


def test_loss_series_of_seeds(report_toy, tmp_path):
    """The losses of seeds are one line: mean and standard deviation, never below 0."""
    for seed, key in enumerate(("ft", "ft_s1")):
        trained(tmp_path, key, 5, seed=seed, lr=0.1)
        write_log(tmp_path, key, [2.0, 0.5 + seed], seed=seed, lr=0.1)
    spread = statistics.stdev([0.5, 1.5])
    expected = {1: (2.0, 2.0, 2.0), 2: pytest.approx((1.0, 1 - spread, 1 + spread))}
    assert losses_of(tmp_path) == {"m ft": expected}
    assert list(series.our_series(scored_files(tmp_path), "curves")["toy"]) == ["m ft"]


@pytest.mark.parametrize("made", [{"lr": 0.2}, {"seed": 1}, {"finetune_data": "9c" * 32}])
def test_loss_series_of_another_run(report_toy, tmp_path, made):
    """The log of a student that was made anew with other settings is not this run's."""
    trained(tmp_path, "ft", 5, seed=0, lr=0.1, finetune_data="3f" * 8)
    usual = {"lr": 0.1, "seed": 0, "finetune_data": "3f" * 32}
    write_log(tmp_path, "ft", [2.0], **usual)
    assert losses_of(tmp_path) == {"m ft": {1: (2.0, 2.0, 2.0)}}
    write_log(tmp_path, "ft", [2.0], **usual | made)
    assert losses_of(tmp_path) == {}


def test_loss_series_after_a_run(small_toy, trained_toy):
    """Both methods of a real run have the loss of each of its epochs."""
    found, _ = runs.scored_runs(runs.saved_files(trained_toy), "data")
    files = plot.plotted_files("curves", found)
    epochs = {name: list(line.points) for name, line in series.loss_series(files)["toy"].items()}
    assert epochs == {"toy_student ft": [1], "toy_student ft_cot": [1]}


def test_loss_series_without_log(report_toy, tmp_path):
    """A run whose folder is gone has no loss."""
    trained(tmp_path, "ft", 5)
    assert losses_of(tmp_path) == {}


# ---------------------------------------------------------------- panels

LINE = series.Series(True, {1: (50, 40, 60), 2: (70, 60, 80)})
LEVEL = series.Series(True, {None: (50, 40, 60)})


def test_drop_empty_axes():
    """A task where nothing has a place on the x axis is left out, and named."""
    panels = {"svamp": {"a": LINE, "b": LEVEL}, "toy": {"b": LEVEL}}
    kept, messages = plot.drop_empty_axes(panels, "degree")
    assert list(kept) == ["svamp"]
    assert messages == [
        "not in the figure: toy, where no run has a value of 'D, rationales a question'"
    ]


def test_separate_figures_of_the_toy():
    """Beside real tasks the toy has a file of its own, unless tasks were named."""
    both = {"svamp": {"a": LINE}, "toy": {"a": LINE}}
    real = {"svamp": {"a": LINE}}
    toy = {"toy": {"a": LINE}}
    assert plot.separate_figures(both, "a/f.png", False) == {"a/f.png": real, "a/f_toy.png": toy}
    assert plot.separate_figures(both, "a/f.png", True) == {"a/f.png": both}
    assert plot.separate_figures(toy, "a/f.png", False) == {"a/f.png": toy}
    assert plot.separate_figures(real, "a/f.png", False) == {"a/f.png": real}


def test_panel_rows_with_losses():
    """A task's loss stands beside its accuracy, over the same epochs; without, it stands alone."""
    loss = series.Series(True, {3: (1, 1, 1)})
    rows = plot.panel_rows({"svamp": {"a": LINE}, "toy": {"a": LINE}}, {"toy": {"a": loss}})
    shown = [[(panel.task, panel.is_loss, panel.xs) for panel in row] for row in rows]
    assert shown == [
        [("svamp", False, [1, 2])],
        [("toy", False, [1, 2, 3]), ("toy", True, [1, 2, 3])],
    ]


@pytest.mark.parametrize("count, widths", [(1, [1]), (3, [3]), (4, [2, 2]), (5, [3, 2])])
def test_panel_rows_without_losses(count, widths):
    """Three tasks stand in a row, or two of four."""
    panels = {str(i): {"a": LINE} for i in range(count)}
    assert list(map(len, plot.panel_rows(panels, {}))) == widths


def test_choose_panels_of_what_is_asked_for(degrees, tmp_path):
    """--student, --method and --task choose runs, and the paper's values of methods."""
    wanted = runs.Wanted(students=("m",), methods=("ft",))
    found, _ = runs.scored_runs(runs.saved_files(tmp_path), tmp_path, wanted=wanted)
    files = plot.plotted_files("degree", found)
    assert list(plot.choose_panels("degree", files, wanted, [])["toy"]) == ["m ft"]
    assert "svamp" not in plot.choose_panels("degree", files, wanted, ["curie"])
    every = runs.Wanted(tasks=("svamp",))
    panels = plot.choose_panels("degree", files, every, ["curie"])
    assert {task: list(lines) for task, lines in panels.items()} == {
        "svamp": ["paper: curie ft_cot diverse"]
    }


# ---------------------------------------------------------------- the command


def test_size_name_as_people_write():
    """Millions and billions, three digits."""
    sizes = (124e6, 6.7e9, 429_000)
    assert [plot.size_name(size) for size in sizes] == ["124M", "6.7B", "0.429M"]


def test_side_by_side_stays_beside_its_tick():
    """Few marks stand 0.1 apart; many are nearer, so that none leaves the axes."""
    assert plot.side_by_side(3) == pytest.approx([-0.1, 0, 0.1])
    assert max(plot.side_by_side(17)) < 0.45


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
        answers_file(tmp_path, lambda place, k, n=limit: place < n, epoch=epoch, run=run)

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


def test_plot_draws_the_loss(draw, tmp_path):
    """Curves with losses have two panels, each with its legend, and one note on the bars."""
    write_log(tmp_path, "ft_cot", [2.0, 1.0], seed=0)
    text = draw("curves", form="svg").decode()
    assert text.count('<g id="axes_') == 2
    assert text.count('<g id="legend_') == 2
    assert "training loss" in text
    assert "test accuracy" in text


def test_plot_draws_the_toy_apart(draw, tmp_path, capsys):
    """The paper's tasks and the toy are two files."""
    draw("student", "--paper", "gpt2")
    *_, real, toy = capsys.readouterr().out.splitlines()
    assert real.startswith("plot: single_eq, addsub, ")
    assert real.endswith("student.png")
    assert toy == f"plot: toy -> {tmp_path}/student_toy.png"


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
    with pytest.raises(SystemExit, match="there is no student of --method ft in"):
        draw("degree", "--method", "ft")
