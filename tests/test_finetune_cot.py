"""The whole method from the command line, at toy size, and what it says to bad input.   python -m pytest tests/test_finetune_cot.py"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import evaluate
import finetune_cot
import tasks
import storage as files
from conftest import ROOT, run, tiny_model


@pytest.fixture
def small_toy(monkeypatch):
    """The toy task with 60 samples instead of 2,000."""
    monkeypatch.setitem(tasks.TASKS, "toy", tasks.TASKS["toy"]._replace(n=60, train=42, test=18))


def method(capsys, *flags):
    """Run finetune_cot.py in this process; -> (exit message or None, what it printed)."""
    try:
        finetune_cot.main([*map(str, flags)])
        message = None
    except SystemExit as e:
        message = e.code
    return message, capsys.readouterr().out


SMALL = ("--epochs", 2, "--max_new_tokens", 48)


def contents(folder):
    """Every file below folder with its bytes, but for logs (they hold times)."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != "log.jsonl"
    }


# ---------------------------------------------------------------- the default run


def test_the_default_run_goes_through_all_stages_and_reports_both_methods(
    small_toy, tmp_path, capsys
):
    message, out = method(capsys, "--saved", tmp_path, *SMALL)
    assert message is None
    rows = re.findall(
        r"^(ft|ft_cot) \(.*?\)\s+([\d.]+)%\s+\[[\d.]+, [\d.]+\]\s+\d+/18\s+\d+$", out, re.M
    )
    assert [name for name, _ in rows] == ["ft", "ft_cot"]
    kept, total = map(int, re.search(r"kept (\d+) of (\d+) rationales", out).groups())
    assert total == 84
    assert 50 < kept < 84
    assert "completion of" in out
    assert f"Everything is under {tmp_path}/" in out
    for name in (
        "completion_data/B_toy_teacher__C_zs_cot_t70/D_toy.json",
        "finetune_data/P_decoder/F_ft_toy.json",
        "finetune_data/P_decoder/F_zs_cot_t70_toy_2aug.json",
        "models/B_toy_student/D_toy__T_ft_cot_2aug/model.safetensors",
        "models/B_toy_student/D_toy__T_ft_cot_2aug/log.jsonl",
        "completion_data/B_toy_student__C_ft_cot/D_toy__T_ft_cot_2aug__E_002.json",
    ):
        assert (tmp_path / name).exists(), name


def test_a_second_run_skips_what_is_there_and_changes_nothing(small_toy, tmp_path, capsys):
    method(capsys, "--saved", tmp_path, *SMALL)
    before = contents(tmp_path)
    message, out = method(capsys, "--saved", tmp_path, *SMALL)
    assert message is None
    assert contents(tmp_path) == before
    assert (
        out.count("made with the same settings: skipped") == 7
    )  # sample, 2 x curate, train, evaluate
    assert "ft_cot (rationales)" in out


def test_a_run_with_the_same_seed_writes_the_same_bytes_elsewhere(small_toy, tmp_path, capsys):
    for name in ("a", "b"):
        method(capsys, "--saved", tmp_path / name, *SMALL, "--method", "ft_cot")
    a = contents(tmp_path / "a")
    b = contents(tmp_path / "b")
    assert a == b
    assert len(a) > 8


@pytest.mark.parametrize(
    "flags, stage, change",
    [
        (("--teacher_max_new_tokens", 64), "sample", "max_new_tokens 128 -> 64"),
        (("--lr", 0.01), "train", "lr 0.001 -> 0.01"),
        (("--max_new_tokens", 40), "evaluate", "max_new_tokens 48 -> 40"),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in [
                (("--seed", 1), "train", "seed 0 -> 1"),
                (("--rules", "flexible"), "curate", "rules paper -> flexible"),
                (("--epochs", 1), "train", "epochs 2 -> 1"),
            ]
        ),
    ],
)
def test_changed_settings_make_a_stage_again_and_are_named(
    small_toy, tmp_path, capsys, flags, stage, change
):
    method(capsys, "--saved", tmp_path, *SMALL, "--method", "ft_cot", "--train_key", "k")
    message, out = method(
        capsys, "--saved", tmp_path, *SMALL, "--method", "ft_cot", "--train_key", "k", *flags
    )
    assert message is None and re.search(
        rf"^{stage}: settings changed \(.*{re.escape(change)}", out, re.M
    ), out


def test_changed_toy_data_is_not_mixed_with_old_completions(
    small_toy, tmp_path, capsys, monkeypatch
):
    method(capsys, "--saved", tmp_path, "--stage", "sample")
    monkeypatch.setattr(tasks, "NAMES", tasks.NAMES[::-1])
    _, out = method(capsys, "--saved", tmp_path, "--stage", "sample")
    assert "settings changed (samples" in out


def test_a_retrained_student_leaves_the_old_one_aside(small_toy, tmp_path, capsys):
    flags = ("--saved", tmp_path, "--method", "ft", "--stage")
    for stage in ("curate", "train"):
        method(capsys, *flags, stage, "--epochs", 1)
    student = tmp_path / "models/B_toy_student/D_toy__T_ft"
    old = (student / "model.safetensors").read_bytes()
    _, out = method(capsys, *flags, "train", "--epochs", 2)
    assert f"is kept as {student}.old1" in out
    assert (
        (student.with_name("D_toy__T_ft.old1") / "model.safetensors").read_bytes()
        == old
        != (student / "model.safetensors").read_bytes()
    )


def test_a_retrained_student_s_old_completions_are_not_mixed_with_the_new_ones(
    small_toy, tmp_path, capsys
):
    flags = ("--saved", tmp_path, "--method", "ft", "--max_new_tokens", 4)
    method(capsys, *flags, "--epochs", 3)
    method(capsys, *flags, "--epochs", 1)
    folder = tmp_path / "completion_data/B_toy_student__C_ft"
    assert sorted(p.name for p in folder.iterdir()) == [
        "D_toy__T_ft__E_001.json",
        "D_toy__T_ft__E_003.json.old1",
    ]


def test_completions_of_another_degree_are_kept_aside_not_overwritten(small_toy, tmp_path, capsys):
    for degree in (3, 1):
        method(capsys, "--saved", tmp_path, "--stage", "sample", "--degree", degree)
    path = tmp_path / "completion_data/B_toy_teacher__C_zs_cot_t70/D_toy.json"
    assert [
        len(evaluate.read_completions(p)[1]) for p in (path, path.with_name("D_toy.json.old1"))
    ] == [60, 180]


def test_training_alone_refuses_a_file_that_was_curated_with_other_settings(
    small_toy, tmp_path, capsys
):
    flags = ("--saved", tmp_path, "--method", "ft_cot")
    for stage in ("sample", "curate"):
        method(capsys, *flags, "--stage", stage)
    message, out = method(capsys, *flags, "--stage", "train", "--label_style", "natural")
    assert "was made with other settings: make it with --stage curate" in message
    assert "template ft_cot_token -> ft_cot_natural" in out


def test_stages_run_one_by_one_as_they_do_in_one_go(small_toy, tmp_path, capsys):
    method(capsys, "--saved", tmp_path / "whole", *SMALL)
    for stage in ("sample", "curate", "train", "evaluate"):
        assert method(capsys, "--saved", tmp_path / "parts", *SMALL, "--stage", stage)[0] is None
    whole = contents(tmp_path / "whole")
    parts = contents(tmp_path / "parts")
    assert whole == parts


def test_evaluation_while_training_writes_every_epoch(small_toy, tmp_path, capsys):
    method(capsys, "--saved", tmp_path, *SMALL, "--method", "ft", "--eval_every", 1)
    assert (
        len(list(tmp_path.glob("completion_data/B_toy_student__C_ft/D_toy__T_ft__E_*.json"))) == 2
    )


def test_prompting_methods_run_on_the_untrained_student(small_toy, tmp_path, capsys):
    message, out = method(
        capsys, "--saved", tmp_path, "--method", "zs", "zs_cot", "--max_new_tokens", 100
    )
    assert message is None
    assert len(re.findall(r"^zs(?:_cot)? +[\d.]+%", out, re.M)) == 2
    rows = evaluate.read_completions(
        tmp_path / "completion_data/B_toy_student__C_zs_cot/D_toy__S_default.json"
    )[1]
    assert rows[0]["prompt"].endswith("Therefore, the answer is")
    assert rows[0]["reasoning_prompt"].endswith("step by step.")


def test_a_local_model_can_be_the_teacher(small_toy, tmp_path, capsys, model_folder):
    message, out = method(
        capsys,
        "--saved",
        tmp_path,
        "--teacher",
        f"hf:{model_folder('gpt2')}",
        "--stage",
        "sample",
        "--teacher_max_new_tokens",
        4,
    )
    assert message is None, message
    [file] = (tmp_path / "completion_data").glob("B_*/D_toy.json")
    metadata, rows = evaluate.read_completions(file)
    assert len(rows) == 120
    assert metadata["settings"]["temperature"] == 0.7


# ---------------------------------------------------------------- published files


@pytest.fixture
def published(shared, tmp_path):
    """A saved/ and a data/ with the published completions and the multiarith benchmark."""
    if not (shared / "mirror").is_dir():
        pytest.skip("no mirror of the benchmarks")
    shutil.copytree(shared / "saved" / "completion_data", tmp_path / "saved" / "completion_data")
    done = run(
        "data/prepare.py",
        "multiarith",
        "coin_flip",
        "--mirror",
        shared / "mirror",
        "--out",
        tmp_path / "data",
    )
    assert done.returncode == 0, done.stderr
    return (
        "--saved",
        tmp_path / "saved",
        "--data",
        tmp_path / "data",
        "--task",
        "multiarith",
        "--teacher",
        "text-davinci-002",
    )


def test_curating_the_published_completions_gives_the_published_fine_tuning_file(
    shared, published, capsys
):
    message, out = method(capsys, "--stage", "curate", "--label_style", "gpt3", *published)
    ours = Path(published[1]) / "finetune_data/P_openai/F_zs_cot_multiarith.jsonl"
    assert message is None
    assert (
        ours.read_bytes()
        == (shared / "saved/finetune_data/P_openai/F_zs_cot_multiarith.jsonl").read_bytes()
    )
    assert "kept 323 of 420 rationales (76.9%)" in out


def test_a_correct_rationale_is_kept_whole_and_labelled_with_the_gold_answer(published, capsys):
    method(capsys, "--stage", "curate", "--method", "ft_cot", *published)
    data = files.read_json(Path(published[1]) / "finetune_data/P_decoder/F_zs_cot_multiarith.json")
    gold = {s["sample_index"]: s["answer"] for s in tasks.load("multiarith", published[3])}
    assert all(
        label.endswith(f" --> {gold[i]}") and text.endswith(" ###")
        for i, text, label in zip(*data.values())
    )


def test_a_fine_tuning_file_edited_by_hand_is_kept_aside(published, capsys):
    path = Path(published[1]) / "finetune_data/P_decoder/F_zs_cot_multiarith.json"
    method(capsys, "--stage", "curate", "--method", "ft_cot", *published)
    whole = path.read_bytes()
    path.write_text("mine")
    _, out = method(capsys, "--stage", "curate", "--method", "ft_cot", *published)
    assert path.read_bytes() == whole
    assert path.with_name(path.name + ".old1").read_text() == "mine"
    assert "is kept as" in out


def test_degree_takes_that_many_rationales_of_a_question(published, capsys):
    _, out = method(capsys, "--stage", "curate", "--method", "ft_cot", "--degree", 25, *published)
    assert re.search(
        r"of 612 rationales", out
    )  # 420 training samples, 8 of which have 25 completions


def test_completions_of_another_task_are_refused(published, capsys):
    folder = Path(published[1]) / "completion_data/B_text-davinci-002__C_zs_cot"
    shutil.copy(folder / "D_coin_flip.json", folder / "D_multiarith.json")
    message, _ = method(capsys, "--stage", "curate", *published)
    assert re.search(
        r"D_multiarith.json holds completions of the task coin_flip, not multiarith", message
    )


def test_completions_whose_questions_are_not_the_benchmark_s_are_refused(published, capsys):
    path = Path(published[1]) / "completion_data/B_text-davinci-002__C_zs_cot/D_multiarith.json"
    content = files.read_json(path)
    content["data"]["7"][0]["question"] = "What is 3 + 4?"
    files.write_json(path, content)
    message, _ = method(capsys, "--stage", "curate", "--method", "ft_cot", *published)
    assert "sample 7 is not sample 7 of multiarith" in message


def test_an_empty_set_after_curation_is_refused_and_leaves_no_file(published, capsys):
    path = Path(published[1]) / "completion_data/B_text-davinci-002__C_zs_cot/D_multiarith.json"
    content = files.read_json(path)
    for rows in content["data"].values():
        for row in rows:
            row["completion"] = "no idea"
    files.write_json(path, content)
    message, _ = method(capsys, "--stage", "curate", "--method", "ft_cot", *published)
    assert message.startswith("error: no correct rationale is left for multiarith")
    assert not [
        path for path in (Path(published[1]) / "finetune_data").rglob("*") if path.is_file()
    ]


def test_samples_that_are_too_long_are_dropped_and_counted(tmp_path, capsys, model_folder):
    data = tmp_path / "data.json"
    data.write_text(
        json.dumps({"sample_index": [4, 7], "input": ["a", "b" * 99], "label": ["c", "d"]})
    )
    message, out = method(
        capsys,
        "--stage",
        "train",
        "--student",
        model_folder("gpt2"),
        "--finetune_data",
        data,
        "--out",
        tmp_path / "o",
        "--epochs",
        1,
        "--max_length",
        50,
    )
    assert message is None
    assert (
        "dropped 1 of 2 samples that are longer than 50 tokens (or than the model): sample_index 7"
        in out
    )


# ---------------------------------------------------------------- bad input: one sentence, a non-zero exit, nothing lost


def finetune_file(path, **changes):
    path.write_text(
        json.dumps({"sample_index": [0], "input": ["a ###"], "label": [" b"], **changes})
    )
    return path


BAD = [
    (("--task", "multi"), "there is no task 'multi'"),
    (("--task", "../x"), "there is no task '../x'"),
    (
        ("--task", "multiarith", "--stage", "curate", "--data", "{tmp}"),
        "dataset/multiarith.json is missing: make it with `python data/prepare.py multiarith`|split/multi",
    ),
    (
        ("--task", "multiarith", "--stage", "sample"),
        "no completions of text-davinci-002 for multiarith at",
    ),
    (("--teacher", "../x"), "'../x' cannot be used as a name"),
    (("--teacher", "/etc/passwd"), "cannot be used as a name"),
    (("--train_key", "../x"), "'../x' cannot be used as a name"),
    (("--split", "../x", "--stage", "curate"), "'../x' cannot be used as a name"),
    (("--split", "nope", "--stage", "curate"), "toy__nope.json is missing"),
    (("--student", "{tmp}/no-such-folder/x", "--stage", "train"), "cannot be used as a name"),
    (
        (
            "--student",
            "{tmp}/empty",
            "--stage",
            "train",
            "--finetune_data",
            "{tmp}/good.json",
            "--out",
            "{tmp}/o",
        ),
        "is not a model folder: it has no config.json",
    ),
    (
        (
            "--student",
            "{tmp}/bare",
            "--stage",
            "train",
            "--finetune_data",
            "{tmp}/good.json",
            "--out",
            "{tmp}/o",
        ),
        "has no tokenizer",
    ),
    (
        ("--stage", "train", "--finetune_data", "{tmp}/none.json", "--out", "{tmp}/o"),
        "none.json cannot be read: No such file",
    ),
    (
        ("--stage", "train", "--finetune_data", "{tmp}/torn.json", "--out", "{tmp}/o"),
        "torn.json is not valid JSON",
    ),
    (
        ("--stage", "train", "--finetune_data", "{tmp}/torn.jsonl", "--out", "{tmp}/o"),
        "torn.jsonl, line 2 is not valid JSON",
    ),
    (
        ("--stage", "train", "--finetune_data", "{tmp}/uneven.json", "--out", "{tmp}/o"),
        "uneven.json is not a fine-tuning file",
    ),
    (
        ("--stage", "train", "--finetune_data", "{tmp}/types.json", "--out", "{tmp}/o"),
        "types.json is not a fine-tuning file",
    ),
    (
        ("--stage", "train", "--finetune_data", "{tmp}/zero.json", "--out", "{tmp}/o"),
        "zero.json holds no sample",
    ),
    (
        ("--stage", "train", "--finetune_data", "{tmp}/good.json", "--out", "{tmp}/stranger"),
        "is not empty and holds no run of this program",
    ),
    (
        ("--stage", "train"),
        "the fine-tuning file .* is missing or was made with other settings: make it with --stage curate",
    ),
    (("--stage", "evaluate"), "there is no finished student in"),
    (("--train_key", "k"), "name one --method"),
    (("--shard", "gpu", "--eval_every", "1"), "leave out --eval_every"),
    (("--shard", "gpu"), "start it with torchrun"),
    (("--label_style", "gpt3"), "use it with --stage curate"),
    (("--degree", "3", "--temperature", "0"), "3 identical rationales: use --temperature"),
    (("--temperature", "nan"), "--temperature nan must be 0 or more"),
    (("--seed", "20000000000"), "--seed 20000000000 must be"),
    (("--micro_batch_size", "0"), "--micro_batch_size 0 must be 1 or more"),
    (("--device", "foo"), "--device foo cannot be used here"),
    (("--split", "few_shot_0", "--stage", "curate"), "few_shot_0.json is missing"),
    (
        (
            "--student",
            "{tmp}/bare",
            "--stage",
            "train",
            "--finetune_data",
            "{tmp}/good.json",
            "--out",
            "{tmp}/bare",
        ),
        "is the student itself",
    ),
    (
        ("--stage", "train", "--finetune_data", "{tmp}/list.json", "--out", "{tmp}/o"),
        "list.json holds a JSON list, not an object",
    ),
    (
        ("--stage", "train", "--finetune_data", "{tmp}/good.json", "--out", "{tmp}/odd"),
        "run.json holds a JSON list, not an object",
    ),
    (("--finetune_data", "x.json"), "--finetune_data goes with --stage train"),
    (("--out", "x"), "name one --method"),
    (("--batch_size", "0"), "--batch_size 0 must be 1 or more"),
    (("--lr", "-1"), "--lr -1.0 must be above 0"),
    (("--lr", "nan"), "--lr nan must be above 0"),
    (("--temperature", "-1"), "--temperature -1.0 must be 0 or more"),
    (("--saved", "{tmp}/good.json"), "Not a directory|File exists"),
]


@pytest.mark.parametrize("flags, sentence", BAD)
def test_bad_input_gets_one_clear_sentence_and_a_failing_exit(
    flags, sentence, tmp_path, capsys, small_toy
):
    (tmp_path / "empty").mkdir()
    tiny_model("gpt2").save_pretrained(tmp_path / "bare")
    (tmp_path / "stranger").mkdir()
    (tmp_path / "stranger" / "thesis.txt").write_text("precious")
    finetune_file(tmp_path / "good.json")
    (tmp_path / "list.json").write_text("[1]")
    files.write_json(tmp_path / "odd" / "run.json", [1])
    (tmp_path / "torn.json").write_text('{"sample_index": [0')
    (tmp_path / "torn.jsonl").write_text('{"prompt": "a", "completion": " b"}\n{"prompt"\n')
    finetune_file(tmp_path / "uneven.json", label=[])
    finetune_file(tmp_path / "types.json", label=[5])
    finetune_file(tmp_path / "zero.json", sample_index=[], input=[], label=[])
    flags = [f.replace("{tmp}", str(tmp_path)) for f in flags]
    if "--saved" not in flags:
        flags += ["--saved", str(tmp_path / "saved")]
    if "--student" not in flags:
        flags += ["--student", "toy"]
    message, _ = method(capsys, *flags)
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message, (
        message
    )
    assert re.search(sentence, message), message
    assert (tmp_path / "stranger" / "thesis.txt").read_text() == "precious"
    assert os.listdir(tmp_path / "stranger") == ["thesis.txt"]


@pytest.mark.skipif(os.name != "posix", reason="needs another user to run as")
def test_a_folder_without_write_permission_is_named(tmp_path):
    if os.geteuid() != 0:
        (tmp_path / "saved").mkdir(mode=0o555)
        done = run("finetune_cot.py", "--stage", "sample", "--saved", tmp_path / "saved")
    else:  # permissions do not bind root: write as nobody into a folder of root's, of which the way there is open
        import tempfile

        with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
            os.chmod(folder, 0o755)
            code = (
                "import os, sys; from finetune_cot import main; run = lambda saved: main(['--stage', 'sample', '--saved', saved])\n"
                "run(sys.argv[1]); os.setuid(65534); run(sys.argv[2])"
            )  # once before, since later nothing can be imported
            done = run("-c", code, tmp_path, f"{folder}/saved")
    assert done.returncode == 1 and re.fullmatch(
        r"error: .*Permission denied: '.*saved.*'\n", done.stderr
    ), done.stderr


@pytest.mark.slow
def test_ctrl_c_ends_with_one_line_and_the_same_command_goes_on(tmp_path, capsys, model_folder):
    data = tmp_path / "data.json"
    data.write_text(
        json.dumps(
            {"sample_index": list(range(160)), "input": ["a ###"] * 160, "label": [" b"] * 160}
        )
    )
    command = [
        sys.executable,
        "finetune_cot.py",
        "--stage",
        "train",
        "--student",
        model_folder("gpt2"),
        "--finetune_data",
        data,
        "--out",
        tmp_path / "o",
        "--epochs",
        "4",
    ]
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("epoch   1  step"):
            process.send_signal(2)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.strip().splitlines()[-1].startswith("interrupted: what is finished is kept")
    assert "Traceback" not in errors
    message, out = method(capsys, *command[2:])
    assert message is None
    assert re.search(r"going on after step \d+ of 80", out)


# ---------------------------------------------------------------- start-up


def test_help_answers_within_half_a_second_and_names_every_flag_with_its_default():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = run("finetune_cot.py", "--help")
        seconds.append(time.perf_counter() - start)
    assert done.returncode == 0
    assert min(seconds) < 0.5
    for flag in (
        "--task",
        "--teacher",
        "--student",
        "--method",
        "--degree",
        "--temperature",
        "--epochs",
        "--lr",
        "--batch_size",
        "--seed",
        "--precision",
        "--stage",
        "--saved",
        "--data",
    ):
        assert flag in done.stdout


def test_the_paper_s_setting_is_the_default_for_every_benchmark():
    [args] = finetune_cot.parse_args(["--task", "gsm8k"])
    assert (
        args.lr,
        args.batch_size,
        args.epochs,
        args.weight_decay,
        args.precision,
        args.max_length,
        args.degree,
        args.temperature,
    ) == (3e-4, 8, 20, 0.01, "fp32", 512, 1, 0.0)
    assert (
        finetune_cot.parse_args(["--stage", "train", "--finetune_data", "f", "--out", "o"])[0].lr
        == 3e-4
    )  # a file of one's own, too


@pytest.mark.parametrize("validation", [0, 0.2])
def test_the_best_epoch_is_kept_beside_the_last(
    validation, small_toy, tmp_path, capsys, monkeypatch
):
    shares = iter([50.0, 75.0, 75.0, 60.0])
    score = evaluate.score

    def scored(path, part="test", *where, **more):
        if (
            part == ("validation" if validation else "test")
            and sys._getframe(1).f_code.co_name == "train"
        ):
            return score(path, part, *where, **more) | {"accuracy": next(shares)}
        return score(path, part, *where, **more)

    monkeypatch.setattr(evaluate, "score", scored)
    flags = (
        "--saved",
        tmp_path,
        "--method",
        "ft",
        "--max_new_tokens",
        4,
        "--epochs",
        4,
        "--eval_every",
        1,
        "--keep_best",
        "--validation",
        validation,
    )
    assert method(capsys, *flags)[0] is None
    [best] = (tmp_path / "models").glob("B_toy_student/D_*/best*")
    assert best.name == "best_epoch_002"  # the first of the two that are best
    assert json.loads((best / "best.json").read_text()) == {
        "epoch": 2,
        "part": "validation" if validation else "test",
        "accuracy": 75.0,
        "n": 8 if validation else 18,
    }
    model, _, _ = evaluate.load_model(str(best))
    last, _, _ = evaluate.load_model(str(best.parent))
    assert any((a != b).any() for a, b in zip(model.parameters(), last.parameters()))
    path = tmp_path / f"completion_data/B_toy_student__C_ft/{best.parent.name}__E_002.json"
    rows = [row for many in json.loads(path.read_text())["data"].values() for row in many]
    done = evaluate.generate(*evaluate.load_model(str(best)), [row["prompt"] for row in rows], 4)
    assert [row["completion"] for row in rows] == [
        one["completion"] for [one] in done
    ]  # it is the student of that epoch


def test_keeping_the_best_epoch_needs_evaluations(tmp_path, capsys):
    assert "--keep_best compares epochs" in method(capsys, "--saved", tmp_path, "--keep_best")[0]
