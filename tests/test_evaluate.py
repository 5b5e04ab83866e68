"""Completion datasets, scores against published numbers, the command line.

python -m pytest tests/test_evaluate.py
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PROMPTS, run

import evaluate
import storage
import tasks
from storage import UserError

PUBLISHED = {
    "multiarith": 78.79,
    "coin_flip": 90.04,
    "date_understanding": 67.58,
    "strategy_qa": 53.45,
    "svamp": 64.20,
}


def completion_file(
    path: Path, n: int = 2000, correct: Callable[[int], object] = lambda i: True, **metadata: object
) -> Path:
    """Write a completion file on the toy task; correct(i) says which samples are right."""
    data = {}
    for sample in reversed(tasks.toy_samples(n)):
        i = sample["sample_index"]
        completion = "?"
        if correct(i):
            completion = sample["answer"]
        row = {**sample, "completion_index": 0, "finish_reason": "stop", "completion": completion}
        data[str(i)] = [row]
    known = {"dataset_key": "toy", "base_model": "m", "completion_key": "zs"}
    known |= {"prediction_template": "zs", **metadata}
    storage.write_json(path, {"metadata": known, "data": data})
    return path


# ---------------------------------------------------------------- completion datasets


def test_rows_of_part_missing(tmp_path):
    """A file that lacks samples is no result, unless that is asked for."""
    path = completion_file(tmp_path / "f.json", n=1500)
    missing = sum(i >= 1500 for i in tasks.load_split("toy")[1])
    message = rf"lacks {missing} of the 600 samples of part 'test'.*--allow_partial"
    with pytest.raises(UserError, match=message):
        evaluate.score(path)
    assert evaluate.score(path, allow_partial=True)["n"] == 600 - missing


def test_rows_of_part_validation(tmp_path):
    """The validation part is the one that the metadata names."""
    path = completion_file(tmp_path / "f.json", validation=[3, 4, 5], correct=lambda i: i != 4)
    scored = evaluate.score(path, part="validation")
    assert scored["n"] == 3
    assert scored["correct"] == 2


OTHER = "sample 5 is not sample 5 of toy"
LACKS = "a completion of sample 5 lacks"
BROKEN = {  # what is wrong: how a file comes to it, by its metadata, data and a row; what is said
    "answer": (lambda meta, data, row: row.update(answer="maybe"), OTHER),
    "question": (lambda meta, data, row: row.update(question="Who?"), OTHER),
    "foreign": (
        lambda meta, data, row: data.update({"9999": [{**row, "sample_index": 9999}]}),
        "sample 9999 is not",
    ),
    "twice": (
        lambda meta, data, row: data["5"].append(row),
        "completion 0 of sample 5 is there twice",
    ),
    "no answer": (lambda meta, data, row: row.pop("answer"), LACKS),
    "no rows": (lambda meta, data, row: data.update({"5": "x"}), LACKS),
    "other index": (lambda meta, data, row: row.update(sample_index=6), LACKS),
    "no task": (lambda meta, data, row: meta.pop("dataset_key"), "is not a completion file"),
    "unknown task": (lambda meta, data, row: meta.update(dataset_key="coin"), "no task 'coin'"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_score_of_what_does_not_belong(tmp_path, how):
    """Completions that do not belong are found and named."""
    path = completion_file(tmp_path / "f.json")
    content = storage.read_json(path)
    spoil, message = BROKEN[how]
    spoil(content["metadata"], content["data"], content["data"]["5"][0])
    storage.write_json(path, content)
    with pytest.raises(UserError, match=message):
        evaluate.score(path)


def test_score_of_two_halves(tmp_path):
    """A sample that both halves of a joined file hold is not dropped silently."""
    path = completion_file(tmp_path / "f.json", n=9)
    path.write_text(path.read_text().replace('"data": {', '"data": {"5": [],', 1))
    message = "f.json is not valid JSON .the key '5' is there twice in an object"
    with pytest.raises(UserError, match=message):
        evaluate.score(path)


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("task, accuracy", PUBLISHED.items())
def test_score_published(shared, task, accuracy):
    """Published completions score as published."""
    folder = shared / "saved/completion_data/B_text-davinci-002__C_zs_cot"
    assert evaluate.score(folder / f"D_{task}.json", part="all")["accuracy"] == accuracy


def test_score_counts(tmp_path):
    """A score counts what it says."""
    path = completion_file(tmp_path / "f.json", correct=lambda i: i % 4)
    scored = evaluate.score(path, part="all")
    wanted = {"n": 2000, "questions": 2000, "correct": 1500, "accuracy": 75.0, "no_answer": 500}
    wanted |= {"complete": 100.0, "correct_format": 100.0, "paper": 75.0, "task": "toy"}
    assert {key: scored[key] for key in wanted} == wanted


def test_score_parts(tmp_path):
    """A part is the samples of the split."""
    path = completion_file(tmp_path / "f.json", correct=lambda i: i % 4)
    train, test = tasks.load_split("toy")
    assert evaluate.score(path)["n"] == len(test)
    right = sum(bool(i % 4) for i in train)
    assert evaluate.score(path, part="train")["correct"] == right


@pytest.mark.parametrize("correct, n", [(0, 10), (3, 10), (10, 10), (159, 300), (1, 1)])
def test_wilson_interval_solves_its_equation(correct, n):
    """|observed - p| = z sqrt(p (1 - p) / n) at both ends, or p is the end of the scale."""
    for end in evaluate.wilson_interval(correct, n):
        p = end / 100
        distance = 1.959964 * math.sqrt(p * (1 - p) / n)
        at_end = p in (0.0, 1.0)
        assert at_end or abs(correct / n - p) == pytest.approx(distance, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("correct, interval", [(5, (23.66, 76.34)), (0, (0.0, 27.75))])
def test_wilson_interval_known(correct, interval):
    """Known values for 10 questions."""
    assert evaluate.wilson_interval(correct, 10) == pytest.approx(interval, abs=0.01)


@pytest.mark.parametrize(
    "completion, outcome", [("yes", "right"), ("no", "wrong"), ("?", "unreadable")]
)
def test_grade_rows_outcome(completion, outcome):
    """An outcome is right, wrong or unreadable by the rules that were asked for."""
    metadata = {"dataset_key": "toy", "prediction_template": "zs"}
    row = {"completion": completion, "answer": "yes"}
    [graded] = evaluate.grade_rows(metadata, [row], "paper")
    assert graded.row is row
    assert graded.outcome == outcome
    assert set(graded.verdicts) == {"paper", "flexible"}


# ---------------------------------------------------------------- what is printed


def test_print_report(tmp_path, capsys):
    """The last table has a line for each method, then completions of the last one to read."""
    results = []
    for method in ("ft", "ft_cot"):
        file = completion_file(tmp_path / f"{method}.json", correct=lambda i: i % 3)
        results.append(evaluate.score(file) | {"method": method})
        storage.write_json(
            file, storage.parse_json(file.read_text().replace('"?"', '"no, yes"'), file)
        )
    evaluate.print_report(results, "gpt2", 0, "saved")
    text = capsys.readouterr().out
    assert "Toy Coins, 600 test questions, student gpt2, seed 0 (a random guess: 50.0%)" in text
    accuracy = f"{results[0]['accuracy']:.1f}%"
    for label in ("ft (answers alone)", "ft_cot (rationales)"):
        assert [accuracy in line for line in text.splitlines() if line.startswith(label)] == [True]
    assert "A right completion of ft_cot: (sample 1, completion 0)" in text
    assert "A wrong completion of ft_cot: (sample " in text
    assert "Everything is under saved/" in text


def test_print_report_counts_questions(tmp_path, capsys):
    """Several answers to a question are no more questions."""
    file = completion_file(tmp_path / "a.json")
    content = storage.read_json(file)
    for rows in content["data"].values():
        rows += [rows[0] | {"completion_index": k} for k in (1, 2, 3)]
    storage.write_json(file, content)
    evaluate.print_report([evaluate.score(file)], "gpt2", 0, "saved")
    text = capsys.readouterr().out
    assert "Toy Coins, 600 test questions x 4 answers, student gpt2" in text


def test_score_of_the_split_of_a_file(tmp_path):
    """Without --split a file is scored on the split that it was made for."""
    train, test = tasks.default_split("toy")
    split = {"train": train + test[3:], "test": test[:3]}
    storage.write_json(tmp_path / "split/toy__template.json", split)
    file = completion_file(tmp_path / "a.json")
    content = storage.read_json(file)
    content["metadata"]["split"] = "template"
    storage.write_json(file, content)
    assert evaluate.score(file, data_dir=tmp_path)["n"] == 3
    assert evaluate.score(file, split="default", data_dir=tmp_path)["n"] == 600


def test_score_command_json(tmp_path, capsys):
    """`score --json` prints an object for each file."""
    paths = [str(completion_file(tmp_path / f"{i}.json")) for i in (1, 2)]
    evaluate.main(["score", *paths, "--json"])
    scores = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [scored["accuracy"] for scored in scores] == [100.0, 100.0]
    assert [scored["file"] for scored in scores] == paths
    wanted = "file task model method train_key epoch template run part split rules n questions"
    wanted += " correct accuracy low high paper flexible contains_answer correct_format complete"
    assert [*scores[0]] == [*wanted.split(), "no_answer"]


def test_score_command_lines(tmp_path, capsys):
    """`score` prints a line for each file."""
    paths = [str(completion_file(tmp_path / f"{i}.json")) for i in (1, 2)]
    evaluate.main(["score", *paths, "--rules", "flexible"])
    assert capsys.readouterr().out.count("100.00  [99.36, 100.00]") == 2


def test_score_command_missing_file(tmp_path):
    """An error is one sentence and a failing exit."""
    done = run("evaluate.py", "score", tmp_path / "none.json")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


# ---------------------------------------------------------------- `generate`


def generate_command(tmp_path: Path, model: Path, rows: list[dict], *flags: str) -> list[dict]:
    """Run `generate` on rows; return the rows it wrote."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    files = ["--model", str(model), "--prompts", str(prompts), "--out", str(out)]
    evaluate.main(["generate", *files, *flags])
    return storage.read_jsonl(out)


def test_generate_command_rows(tmp_path, model_folder):
    """Rows are written as they were read, in order, with completion and reason."""
    rows = [{"prompt": p, "id": i, "max_new_tokens": i + 1} for i, p in enumerate(PROMPTS)]
    written = generate_command(tmp_path, model_folder("gpt2"), rows)
    for row, out in zip(rows, written, strict=True):
        assert [*out] == [*row, "completion", "finish_reason"]
        assert {key: out[key] for key in row} == row
        assert out["finish_reason"] in ("stop", "length")


def test_generate_command_plain(tmp_path, model_folder):
    """--plain writes the same file."""
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    flags = "--max_new_tokens", "9"
    fast = generate_command(tmp_path, model_folder("t5"), rows, *flags)
    assert fast == generate_command(tmp_path, model_folder("t5"), rows, *flags, "--plain")


@pytest.mark.parametrize(
    "flags, name",
    [
        (("--batch_size", "0"), "--batch_size"),
        (("--max_new_tokens", "0"), "--max_new_tokens"),
        (("--samples", "2"), "--samples"),
        (("--temperature", "nan"), "--temperature"),
        (("--top_p", "0"), "--top_p"),
        (("--stop", ""), "--stop"),
        (("--device", "foo"), "--device foo cannot be used here"),
    ],
)
def test_generate_command_refuses(flags, name, tmp_path, model_folder):
    """Flags that make no sense are refused."""
    with pytest.raises(SystemExit, match=f"error: .*{name}"):
        generate_command(tmp_path, model_folder("gpt2"), [{"prompt": "fine"}], *flags)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("command", ["table", "plot", "show", "diff"])
def test_parse_args_without_extras(command, monkeypatch):
    """Without extras/ the commands that look at results say what is missing."""
    monkeypatch.setattr(evaluate, "has_extra", lambda name: False)
    sentence = f"error: evaluate.py {command} needs extras/report.py, which is not here"
    with pytest.raises(SystemExit, match=sentence):
        evaluate.main([command, "--saved", "saved"])
