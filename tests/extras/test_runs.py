"""Two runs that differ in one flag: never skipped, averaged, or called epochs or seeds of another.

python -m pytest tests/extras/test_runs.py
"""

import io
import shlex
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import answers_file

import completions
import finetune_cot
import flags
import provenance
import storage
import tasks
from data import toy
from extras import plot, report, runs

# ---------------------------------------------------------------- a run and its twin, for each flag

BASE = """--task coins --method ft_cot --teacher toy --student toy --degree 1 --temperature 0.7
    --epochs 1 --batch_size 16 --lr 1e-3 --max_new_tokens 4 --train_key k"""
CHANGES = {  # flag: (flags of both runs, those of the second)
    "task": ("", "--task pennies"),
    "method": ("", "--method ft"),
    "student": ("", "--student {folder}/other"),
    "split": ("", "--split few_shot_8"),
    "seed": ("", "--seed 1"),
    "max_new_tokens": ("", "--max_new_tokens 5"),
    "eval_samples": ("", "--eval_samples 2"),
    "eval_temperature": ("--eval_samples 2", "--eval_temperature 0.5"),
    "label_style": ("", "--label_style natural"),
    "validation": ("", "--validation 0.2"),
    "data_seed": ("", "--data_seed 1"),
    "epochs": ("", "--epochs 2"),
    "batch_size": ("", "--batch_size 8"),
    "lr": ("", "--lr 1e-2"),
    "weight_decay": ("", "--weight_decay 0.02"),
    "precision": ("", "--precision bf16"),
    "max_length": ("", "--max_length 400"),
    "schedule": ("", "--schedule linear"),
    "warmup": ("", "--warmup 1"),
    "max_grad_norm": ("", "--max_grad_norm 1"),
    "teacher": ("", "--teacher gpt-x"),
    "teacher_method": ("", "--teacher_method fs_cot"),
    "degree": ("", "--degree 2"),
    "temperature": ("", "--temperature 0"),
    "teacher_max_new_tokens": ("", "--teacher_max_new_tokens 99"),
    "rules": ("", "--rules flexible"),
    "rationale": ("", "--rationale both"),
    "filter": ("", "--filter all"),
    "max_rationale_words": ("", "--max_rationale_words 60"),
    "max_per_question": ("", "--max_per_question 1"),
    "max_similarity": ("", "--max_similarity 0.9"),
    "drop_unfinished": ("", "--drop_unfinished"),
    "drop_duplicates": ("", "--drop_duplicates"),
    # of a teacher behind an API, whose file is there
    "api": ("--teacher gpt-x", "--api completions"),
    "no_temperature": ("--teacher gpt-x", "--no_temperature"),
}
BY_HAND = {  # flags that no two such runs differ in: what their files record of them
    "family": ("decoder", "encoder_decoder"),  # follows from the student
    "finetune_data": ("3f2a", "9c1b"),  # a file of one's own
    # of a teacher that is asked now
    "chat": (False, True),
    "thinking": (None, True),
    "system": ("", "Be brief."),
    "reasoning_effort": (None, "low"),
    "top_p": (None, 0.9),
    "extra_body": (None, '{"min_p": 0.1}'),
    "extra_headers": ("", "api-key=KEY"),
}
TEACHER_FILES = {  # what stands in the file of the teacher behind an API
    "--api completions": {"api": "completions", "temperature": 0.7},
    "--no_temperature": {"api": "chat", "temperature": None},
}


class Twins(NamedTuple):
    """The metadata of two runs that differ in one flag, and what the second one printed."""

    before: dict[str, Any]
    after: dict[str, Any]
    output: str
    is_same_file: bool


def add_tasks(data: Path, patch: pytest.MonkeyPatch) -> None:
    """Add two tasks with 14 training and 6 test questions of the toy."""
    for shift, key in enumerate(("coins", "pennies")):
        row = tasks.TASKS["toy"]._replace(key=key, n=20, train=14, test=6)
        patch.setitem(tasks.TASKS, key, row)
        samples = tasks.toy_samples(20 + shift)[shift:]
        for i, sample in enumerate(samples):
            sample["sample_index"] = i
        content = {"metadata": {"dataset_key": key}, "data": samples}
        storage.write_json(data / f"dataset/{key}.json", content)
        train, test = tasks.default_split(key)
        storage.write_json(data / f"split/{key}__default.json", {"train": train, "test": test})
    examples = {key: {"prompt": tasks.TOY_EXAMPLES} for key in ("coins", "pennies")}
    storage.write_json(data / "few_shot_cot_prompts.json", examples)


def add_api_teacher(saved: Path, line: str) -> None:
    """Write the completion file of a teacher behind an API, from the toy teacher's."""
    source = saved / "completion_data/B_toy_teacher__C_zs_cot_t70/D_coins.json"
    if not source.exists() or "gpt-x" not in line:
        return
    settings = {"api": "chat", "temperature": 0.7}
    for flag, other in TEACHER_FILES.items():
        if flag in line:
            settings = other
    content = storage.read_json(source)
    content["metadata"]["settings"] = settings | {"max_new_tokens": 128}
    storage.write_json(saved / "completion_data/B_gpt-x__C_zs_cot_t70/D_coins.json", content)


def run_flags(line: str, saved: Path, data: Path) -> tuple[Path, str]:
    """Run the method; return the student's completion file and what was printed."""
    line = f"{line} --saved {saved} --data {data}"
    add_api_teacher(saved, line)
    printed = io.TextIOWrapper(io.BytesIO(), write_through=True)
    with redirect_stdout(printed):
        finetune_cot.main(shlex.split(line))
    [args] = flags.parse_args(shlex.split(line))
    path = flags.test_file(args, args.method[0], args.epochs)
    return path, printed.buffer.getvalue().decode()


@pytest.fixture(scope="module")
def twins(tmp_path_factory) -> Callable[[str], Twins]:
    """-> function: flag -> the runs of CHANGES, each made once; the second finds the first's."""
    folder = tmp_path_factory.mktemp("twins")
    toy.make_toy_student(folder / "other", 7)
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        add_tasks(folder, patch)
        run_flags(BASE, folder / "saved/base", folder)

        def make(flag: str) -> Twins:
            """Make the two runs of a flag."""
            both, second = CHANGES[flag]
            saved = folder / "saved" / flag
            shutil.copytree(folder / "saved/base", saved)
            path, _ = run_flags(f"{BASE} {both}", saved, folder)
            before = completions.read_completions(path)[0]
            changed = second.format(folder=folder)
            other, output = run_flags(f"{BASE} {both} {changed}", saved, folder)
            after = completions.read_completions(other)[0]
            return Twins(before, after, output, other == path)

        def get(flag: str) -> Twins:
            """Return the two runs of a flag."""
            if flag not in made:
                made[flag] = make(flag)
            return made[flag]

        yield get


def test_changes_name_every_flag():
    """A flag that changes a result has a pair of runs here; one added later fails this."""
    assert {*CHANGES, *BY_HAND} == set(provenance.RESULT_FLAGS)
    assert not set(CHANGES) & set(BY_HAND)


SKIPPED = "is there, made with the same settings: skipped"


@pytest.mark.parametrize("flag", CHANGES)
def test_changed_flag_is_not_skipped(twins, flag):
    """Of sample, curate, train and evaluate one runs again, and evaluate, where it need not,
    notes the flag."""
    pair = twins(flag)
    assert pair.output.count(SKIPPED) < 4
    if pair.is_same_file:
        assert f"__E_001.json {SKIPPED}" not in pair.output


@pytest.mark.parametrize("flag", set(CHANGES) - {"task", "method", "split"})
def test_changed_flag_is_recorded(twins, flag):
    """Both files name the flag's value, and not the same."""
    pair = twins(flag)
    assert pair.before["run"].get(flag) != pair.after["run"][flag]


# ---------------------------------------------------------------- in tables and figures


def metadata_of(twins: Callable[[str], Twins], flag: str) -> tuple[dict, dict]:
    """Return the metadata of two runs that differ in a flag, on the small toy."""
    if flag in BY_HAND:
        before = twins("lr").before
        pair = [before | {"run": before["run"] | {flag: value}} for value in BY_HAND[flag]]
    else:
        pair = [twins(flag).before, twins(flag).after]
    return tuple(one | {"dataset_key": "toy", "validation": []} for one in pair)


def write_pair(saved: Path, pair: tuple[dict, dict], **changes: list) -> None:
    """Write a file of each, 4 and 8 of 10 right.  changes: {name: (of one, of the other)}."""
    for i, (metadata, limit) in enumerate(zip(pair, (4, 8), strict=True)):
        run = dict(metadata["run"])
        own = dict(metadata)
        for name, values in changes.items():
            if name == "seed":
                run["seed"] = values[i]
            else:
                own[name] = values[i]
        known = own | {"run": run}
        many = run["eval_samples"]
        name = f"D_toy__T_{i}"
        answers_file(saved, lambda place, k, n=limit: place < n, name, many=many, **known)


@pytest.mark.parametrize("flag", [f for f in [*CHANGES, *BY_HAND] if f not in ("seed", "task")])
def test_changed_flag_is_not_averaged(twins, report_toy, tmp_path, flag):
    """Runs of two seeds that differ in a flag besides have no mean."""
    write_pair(tmp_path, metadata_of(twins, flag), seed=[0, 1])
    table, _ = report.collect(runs.saved_files(tmp_path), tmp_path)
    assert [key for key in table if key.seeds] == []


@pytest.mark.parametrize("flag", [f for f in [*CHANGES, *BY_HAND] if f != "task"])
def test_changed_flag_is_no_epoch(twins, report_toy, tmp_path, flag):
    """Files of two epochs that differ in a flag are two runs."""
    write_pair(tmp_path, metadata_of(twins, flag), epoch=[1, 2])
    found, _ = runs.scored_runs(runs.saved_files(tmp_path), tmp_path)
    assert [len(epochs) for epochs in found.values()] == [1, 1]


@pytest.mark.parametrize("flag", [f for f in [*CHANGES, *BY_HAND] if f not in ("seed", "task")])
@pytest.mark.parametrize("kind", plot.KINDS)
def test_changed_flag_is_no_point(twins, report_toy, tmp_path, flag, kind):
    """Two such runs are never one point of a figure, of one seed or of two."""
    write_pair(tmp_path, metadata_of(twins, flag), seed=[0, 1])
    found, _ = runs.scored_runs(runs.saved_files(tmp_path), tmp_path)
    files = [scored for epochs in found.values() for scored in epochs]
    panels = plot.our_series(files, kind)
    middles = []
    for series in panels["toy"].values():
        middles += [middle for middle, _, _ in series.points.values()]
    assert sorted(middles) == [40, 80]


def test_equal_runs_of_two_seeds_are_averaged(twins, report_toy, tmp_path):
    """What the tests above exclude is there where nothing but the seed differs."""
    before, after = metadata_of(twins, "seed")
    write_pair(tmp_path, (before, after), train_key=["k", "k_s1"])
    table, _ = report.collect(runs.saved_files(tmp_path), tmp_path)
    [mean] = [cells["toy"] for key, cells in table.items() if key.seeds]
    assert mean.accuracy == pytest.approx(60)


@pytest.mark.parametrize("flag", [f for f in [*CHANGES, *BY_HAND] if f != "task"])
def test_changed_flag_is_named(twins, report_toy, tmp_path, flag):
    """Two such runs are rows whose labels, or models, differ."""
    write_pair(tmp_path, metadata_of(twins, flag))
    table, _ = report.collect(runs.saved_files(tmp_path), tmp_path, each=True)
    labels = report.row_labels(table)
    whole = [(key.model, labels[key]) for key in table]
    assert len(set(whole)) == len(whole) >= 2
