"""The method from its command line with what stands in extras/: filters, files for an API, tables.

    python -m pytest tests/extras/test_pipeline_extras.py

Grids and studies: test_studies.py; the Batch API: test_batch_api.py.
"""

import re

import pytest

import evaluate
import storage
import tasks


def test_curate_published_api_file(shared, published, tmp_path):
    """Curating the published completions for GPT-3 gives the published file, byte for byte."""
    message, out = published("--label_style gpt3")
    assert message is None
    assert "keeping the 323 of 420 rationales whose answer is right" in out
    name = "finetune_data/P_openai/F_zs_cot_multiarith.jsonl"
    assert (tmp_path / name).read_bytes() == (shared / "saved" / name).read_bytes()


def test_curate_filter_of_nothing(unanswered):
    """Where no completion gives an answer, --filter all says so."""
    message, _ = unanswered("--method ft_cot --filter all")
    assert message.startswith("error: no rationale is left for multiarith")
    assert "in none of them can an answer be read" in message


FILTERED = [  # flags, whether the labels' answers are right
    ("--filter all", {True, False}),
    ("--filter wrong", {False}),
    ("--filter random", {True, False}),
    ("--max_rationale_words 45", {True}),
]


@pytest.mark.parametrize("flags, right", FILTERED)
def test_curate_filter(small_toy, tmp_path, method, flags, right):
    """A filter other than the paper's keeps wrong rationales with their own answers."""
    method(f"--saved {tmp_path} --stage sample")
    message, _ = method(f"--saved {tmp_path} --stage curate --method ft_cot {flags}")
    assert message is None
    files = tmp_path.glob("finetune_data/P_decoder/F_zs_cot_t70_toy_2aug_*.json")
    [path] = [file for file in files if not file.name.endswith(".made_from.json")]
    data = storage.read_finetune_data(path)
    gold = {sample["sample_index"]: sample["answer"] for sample in tasks.toy_samples(60)}
    labels = zip(data["sample_index"], data["label"], strict=True)
    assert {label.endswith(f"--> {gold[i]}") for i, label in labels} == right


def test_table_after_a_run(small_toy, trained_toy, capsys):
    """The table has a row a method, with its accuracy on the toy."""
    evaluate.main(["table", "--saved", str(trained_toy)])
    out = capsys.readouterr().out
    assert len(re.findall(r"^toy_student +ft, last epoch +\d+\.\d\d", out, re.M)) == 1
    assert len(re.findall(r"^toy_student +ft_cot.*, last epoch +\d+\.\d\d", out, re.M)) == 1


def test_show_after_a_run(small_toy, trained_toy, capsys):
    """A student's completions can be read with their verdicts."""
    [path] = trained_toy.glob("completion_data/B_toy_student__C_ft_cot/*.json")
    evaluate.main(["show", str(path)])
    assert "A coin is heads up." in capsys.readouterr().out


def test_diff_after_a_run(small_toy, trained_toy, capsys):
    """Two students can be compared question by question."""
    paths = sorted(trained_toy.glob("completion_data/B_toy_student__C_ft*/*.json"))
    evaluate.main(["diff", *map(str, paths)])
    assert "18" in capsys.readouterr().out


def test_train_shard_needs_torchrun(small_toy, tmp_path, method):
    """--shard on one process is refused with the command to start."""
    message, _ = method(f"--saved {tmp_path} --method ft --shard gpu")
    assert message.startswith("error: ")
    assert "start it with torchrun" in message
