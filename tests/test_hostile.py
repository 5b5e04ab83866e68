"""Stale, mixed, full, locked, hostile: nothing is lost, nothing lies.   python -m pytest tests/test_hostile.py [--slow]"""

import ast
import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import traceback

import pytest
import torch

import evaluate
import finetune_cot
import kill_anywhere
import tasks
import train_loop
from api_server import batch_line
from conftest import KEY, ROOT, run, tiny_model, tiny_tokenizer
from data import archive
from extras import batch_api as batch
import storage as files
from data import prepare
import teacher
from storage import UserError
from test_finetune_cot import SMALL, contents, method, small_toy  # noqa: F401 (a fixture)
from test_train_loop import ONE_RANK, arguments, toy_data, train_all

PYTHON = [sys.executable]


# ---------------------------------------------------------------- stale and mixed


@pytest.mark.slow
def test_each_seed_has_files_of_its_own_from_the_teacher_to_the_test(small_toy, tmp_path, capsys):
    flags = ("--saved", tmp_path, "--method", "ft_cot", *SMALL)
    method(capsys, *flags)
    before = contents(tmp_path)
    assert method(capsys, *flags, "--seed", 1, "--data_seed", 1)[0] is None
    after = contents(tmp_path)
    assert before == {name: after[name] for name in before}
    assert len(after) > 2 * len(before) - 3
    assert (tmp_path / "completion_data/B_toy_teacher__C_zs_cot_t70_s1/D_toy.json").exists()


def test_a_changed_benchmark_is_curated_again_and_its_old_completions_are_refused(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(
        tasks.TASKS, "multiarith", tasks.TASKS["multiarith"]._replace(n=4, train=3, test=1)
    )
    samples = [
        {"sample_index": i, "question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(4)
    ]
    data = tmp_path / "data"
    teacher = tmp_path / "completion_data/B_t__C_zs_cot/D_multiarith.json"
    files.write_json(
        data / "dataset/multiarith.json",
        {"metadata": {"dataset_key": "multiarith"}, "data": samples},
    )
    files.write_json(data / "split/multiarith__default.json", {"train": [0, 1, 2], "test": [3]})
    files.write_json(
        teacher,
        {
            "metadata": {"dataset_key": "multiarith"},
            "data": {
                str(s["sample_index"]): [
                    {
                        **s,
                        "completion_index": 0,
                        "completion": s["answer"],
                        "reasoning_completion": "so",
                    }
                ]
                for s in samples
            },
        },
    )
    flags = (
        "--saved",
        tmp_path,
        "--data",
        data,
        "--task",
        "multiarith",
        "--teacher",
        "t",
        "--stage",
        "curate",
        "--method",
        "ft_cot",
    )
    assert method(capsys, *flags)[0] is None
    samples[2]["answer"] = "4"
    files.write_json(
        data / "dataset/multiarith.json",
        {"metadata": {"dataset_key": "multiarith"}, "data": samples},
    )
    message, out = method(capsys, *flags)
    assert "settings changed (samples" in out
    assert "sample 2 is not sample 2 of multiarith" in message


def test_an_edited_template_is_another_one_to_teacher_student_and_test(
    small_toy, tmp_path, capsys, monkeypatch
):
    for template, stage, name, words in (
        ("zs_cot", "sample", "ft_cot", ("{q} Think.", "")),
        ("ft_cot_token", "curate", "ft_cot", ("{q} ###", " {r} ==> {a}")),
        ("zs", "evaluate", "zs", ("{q} =", "")),
    ):
        flags = ("--saved", tmp_path, "--method", name, "--stage", stage, "--max_new_tokens", 2)
        for words_changed in (None, False, True):
            if words_changed:
                monkeypatch.setitem(
                    tasks.TEMPLATES, template, tasks.TEMPLATES[template] | {"decoder": words}
                )
            message, out = method(capsys, *flags)
            assert (
                message is None
                and (f"{stage}: settings changed (texts" in out) == bool(words_changed)
                and ("skipped" in out) == (words_changed is False)
            ), out


def test_changed_few_shot_examples_make_completions_again(
    small_toy, tmp_path, capsys, model_folder
):
    flags = (
        "--saved",
        tmp_path,
        "--data",
        tmp_path,
        "--teacher",
        f"hf:{model_folder('gpt2')}",
        "--teacher_method",
        "fs_cot",
        "--stage",
        "sample",
        "--degree",
        1,
        "--temperature",
        0,
        "--teacher_max_new_tokens",
        2,
    )
    for examples, said in (("Q: 1\nA: 1", ""), ("Q: 2\nA: 2", "settings changed (examples")):
        files.write_json(tmp_path / "few_shot_cot_prompts.json", {"toy": {"prompt": examples}})
        message, out = method(capsys, *flags)
        assert message is None
        assert said in out


def test_evaluating_alone_refuses_a_student_that_was_made_with_other_settings(
    small_toy, tmp_path, capsys
):
    flags = ("--saved", tmp_path, "--method", "ft_cot", *SMALL)
    method(capsys, *flags)
    for changed, said in (
        (("--weight_decay", 0.5), "weight_decay 0.01 -> 0.5"),
        (("--rules", "flexible"), "was made with other settings"),
        (
            ("--label_style", "natural", "--train_key", "ft_cot_2aug"),
            "was made with other settings",
        ),
    ):
        message, out = method(capsys, *flags, "--stage", "evaluate", *changed)
        assert message and said in message, (message, out)
    assert method(capsys, *flags, "--stage", "evaluate")[0] is None


def test_completions_of_an_older_student_are_put_aside_even_where_a_kill_came_between(
    small_toy, tmp_path, capsys
):
    flags = ("--saved", tmp_path, "--method", "ft", "--max_new_tokens", 4)
    method(capsys, *flags, "--epochs", 2)
    student = tmp_path / "models/B_toy_student/D_toy__T_ft"
    folder = tmp_path / "completion_data/B_toy_student__C_ft"
    old = files.read_json(student / "run.json")["settings"]
    files.move_to_backup(student)
    files.prepare_output_dir(student, old | {"epochs": 1})  # and here the kill
    method(capsys, *flags, "--epochs", 1)
    assert sorted(p.name for p in folder.iterdir()) == [
        "D_toy__T_ft__E_001.json",
        "D_toy__T_ft__E_002.json.old1",
    ]


def test_the_file_trained_on_is_the_one_that_was_curated(small_toy, tmp_path, capsys, monkeypatch):
    curate = finetune_cot.curate

    def and_then_another_run_writes(args, method, write=True):
        path = curate(args, method, write)
        if method == "ft_cot":
            (tmp_path / "finetune_data/P_decoder/F_ft_toy.json").write_text("another's")
        return path

    monkeypatch.setattr(finetune_cot, "curate", and_then_another_run_writes)
    message, _ = method(capsys, "--saved", tmp_path, *SMALL)
    assert "F_ft_toy.json was replaced by another run since it was curated" in message


# ---------------------------------------------------------------- resources


@pytest.mark.parametrize(
    "size, stage",
    [
        (10_000, "sample"),
        *(
            pytest.param(n, "all", marks=pytest.mark.slow)
            for n in (0, 300, 3_000, 30_000, 60_000, 300_000, 2_000_000)
        ),
    ],
)
def test_a_disk_that_is_full_at_any_write_is_named_and_the_same_command_goes_on(
    size, stage, tmp_path
):
    code = (
        "import resource, signal, sys, tasks, finetune_cot\ntasks.TASKS['toy'] = tasks.TASKS['toy']._replace(n=60, train=42, test=18)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a limit on the size of files is what a full disk looks like to a program\n"
        "if (size := int(sys.argv[1])) >= 0: resource.setrlimit(resource.RLIMIT_FSIZE, (size, -1))\nfinetune_cot.main(sys.argv[2:])"
    )
    flags = [*SMALL, "--checkpoint_steps", 2, "--stage", stage, "--saved"]
    done = run("-c", code, size, *flags, tmp_path / "s")
    assert (
        done.returncode == 1
        and re.fullmatch(r"error: .*(File too large|could not be written).*\n", done.stderr)
        and str(tmp_path) in done.stderr
    ), done.stderr
    assert all(
        run("-c", code, -1, *flags, tmp_path / folder).returncode == 0 for folder in ("s", "whole")
    )
    assert {
        k: v for k, v in contents(tmp_path / "s").items() if not k.endswith(".tmp")
    } == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"
        ),
        MemoryError(),
    ],
)
def test_memory_that_runs_out_in_a_step_names_the_flags_and_keeps_the_checkpoint(
    error, tmp_path, monkeypatch
):
    micro_loss = train_loop.micro_loss
    calls = []

    def runs_out(*arguments):
        calls.append(1)
        if len(calls) > 4:
            raise error
        return micro_loss(*arguments)

    monkeypatch.setattr(train_loop, "micro_loss", runs_out)
    with pytest.raises(
        UserError,
        match=r"out of memory at step 5: lower --micro_tokens or --micro_batch_size .*--gradient_checkpointing",
    ):
        train_all(tiny_model("gpt2"), tiny_tokenizer(), tmp_path, epochs=3)
    assert [p.name for p in tmp_path.glob("checkpoint*")] == ["checkpoint_00000003.pt"]
    monkeypatch.setattr(train_loop, "micro_loss", micro_loss)
    train_all(tiny_model("gpt2"), tiny_tokenizer(), tmp_path / "whole", epochs=3)
    train_all(tiny_model("gpt2"), tiny_tokenizer(), tmp_path, epochs=3, micro_batch_size=4)
    for a, b in zip(*(train_loop_weights(out) for out in (tmp_path, tmp_path / "whole"))):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def train_loop_weights(out):
    from safetensors.torch import load_file

    return [
        tensor
        for name, tensor in sorted(load_file(out / "model.safetensors").items())
        if "c_attn.bias" not in name
    ]


def test_memory_that_runs_out_in_decoding_names_the_flag(monkeypatch):
    def runs_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(evaluate, "decode", runs_out)
    with pytest.raises(UserError, match="out of memory: lower --eval_batch_size"):
        evaluate.generate(tiny_model("gpt2"), tiny_tokenizer(), "decoder", ["a"], 3)


def test_a_cache_there_is_no_memory_for_names_the_flag_too(monkeypatch):
    monkeypatch.setattr(evaluate, "token_budget", lambda *_: 10**15)
    with pytest.raises(UserError, match="out of memory: lower --eval_batch_size.*can't allocate"):
        evaluate.generate(tiny_model("gpt2"), tiny_tokenizer(), "decoder", ["a"], 3)


def test_other_errors_are_not_taken_for_want_of_memory():
    with pytest.raises(RuntimeError, match="shape"), files.out_of_memory_hint(""):
        raise RuntimeError("shape mismatch")


def test_a_rank_whose_peer_has_died_says_so_and_other_errors_stay(monkeypatch, capsys):
    for text, said in (
        (
            "[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer",
            "another rank has ended",
        ),
        ("shape", None),
    ):

        def fails(args):
            raise RuntimeError(text)

        monkeypatch.setattr(finetune_cot, "run", fails)
        if said:
            assert said in method(capsys, "--stage", "curate")[0]
        else:
            with pytest.raises(RuntimeError, match=text):
                method(capsys, "--stage", "curate")


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_no_number_stops_at_its_step_and_the_last_checkpoint_stays(
    what, tmp_path, monkeypatch
):
    micro_loss = train_loop.micro_loss
    calls = []

    def breaks(*arguments):
        loss, size = micro_loss(*arguments)
        calls.append(1)
        if len(calls) > 4:
            loss = loss * float("nan") if what == "loss" else loss * 1
            if what == "gradient":
                loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss, size

    monkeypatch.setattr(train_loop, "micro_loss", breaks)
    with pytest.raises(
        UserError,
        match=rf"the {what} is (nan|inf) at step 5 \(sample_index (\d+(, )?)+\): .* the last checkpoint is kept",
    ):
        train_all(tiny_model("gpt2"), tiny_tokenizer(), tmp_path, epochs=3)
    assert [p.name for p in tmp_path.glob("checkpoint*")] == ["checkpoint_00000003.pt"]
    state = torch.load(tmp_path / "checkpoint_00000003.pt", weights_only=True)
    assert all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.parametrize("content", [b"", b"junk" * 99, None])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(content, tmp_path):
    run = train_loop.train(
        tiny_model("gpt2"),
        tiny_tokenizer(),
        "decoder",
        toy_data(),
        tmp_path,
        arguments(epochs=4, keep=2),
        {"test": True},
        ONE_RANK,
    )
    next(run), next(run)
    run.close()
    newest = tmp_path / "checkpoint_00000006.pt"
    newest.write_bytes(newest.read_bytes()[:-999] if content is None else content)
    with pytest.raises(
        UserError,
        match=r"checkpoint_00000006.pt is damaged.*: delete it, and the run goes on from the one before it",
    ):
        train_all(tiny_model("gpt2"), tiny_tokenizer(), tmp_path, epochs=4)
    newest.unlink()
    train_all(tiny_model("gpt2"), tiny_tokenizer(), tmp_path, epochs=4, keep=2)
    train_all(tiny_model("gpt2"), tiny_tokenizer(), tmp_path / "whole", epochs=4)
    assert (tmp_path / "model.safetensors").read_bytes() == (
        tmp_path / "whole/model.safetensors"
    ).read_bytes()


def test_a_pipeline_that_is_killed_twice_ends_as_if_left_alone(tmp_path, monkeypatch):
    """The short form of tests/kill_anywhere.py."""
    monkeypatch.setattr(
        kill_anywhere,
        "FLAGS",
        [
            "--method",
            "ft_cot",
            "--epochs",
            "1",
            "--max_new_tokens",
            "8",
            "--checkpoint_steps",
            "1",
            "--device",
            "cpu",
        ],
    )
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    with open(tmp_path / "log", "w+") as log:
        began = time.monotonic()
        ended = []
        assert kill_anywhere.end(kill_anywhere.start(whole, 1, log), 60) == 0
        takes = time.monotonic() - began
        for share in (0.5, 0.3):
            pid = kill_anywhere.start(killed, 1, log)
            time.sleep(share * takes)
            os.kill(pid, signal.SIGKILL)
            ended.append(kill_anywhere.end(pid, 60))
        assert -signal.SIGKILL in ended
        assert kill_anywhere.end(kill_anywhere.start(killed, 1, log), 60) == 0
    assert kill_anywhere.contents(killed) == kill_anywhere.contents(whole)


# ---------------------------------------------------------------- two at once

HOLDER = "import sys, time\nimport storage as files\nwith files.file_lock(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(60)"


def test_a_second_run_on_the_same_output_is_refused_and_a_killed_first_one_leaves_no_lock(
    small_toy, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(files, "PATIENCE", 0.2)
    flags = ("--saved", tmp_path, "--method", "ft", *SMALL)
    method(capsys, *flags, "--stage", "curate")
    for path, stage in (
        (tmp_path / "models/B_toy_student/D_toy__T_ft", "train"),
        (tmp_path / "completion_data/B_toy_teacher__C_zs_cot_t70/D_toy.json", "sample"),
    ):
        process = subprocess.Popen(
            [*PYTHON, "-c", HOLDER, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "held\n"
        before = contents(tmp_path)
        message, _ = method(capsys, *flags, "--stage", stage)
        assert (
            f"{path} is being written by another run: wait for it, stop it, or write elsewhere"
            in message
        )
        assert contents(tmp_path) == before
        process.kill()
        process.wait()
        assert method(capsys, *flags, "--stage", stage)[0] is None
    assert not list(tmp_path.rglob("*.lock"))


def two_runs(flags, other, tmp_path):
    """Start the toy with both sets of flags at once; -> [(exit status, output)]."""
    code = "import tasks, sys\ntasks.TASKS['toy'] = tasks.TASKS['toy']._replace(n=60, train=42, test=18)\nimport finetune_cot\nfinetune_cot.main(sys.argv[1:])"
    runs = [
        subprocess.Popen(
            [*PYTHON, "-c", code, "--saved", str(tmp_path), *map(str, [*SMALL, *f])],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for f in (flags, other)
    ]
    return [(p.wait(120), p.stdout.read()) for p in runs]


@pytest.mark.slow
def test_runs_with_different_seeds_side_by_side_are_both_as_if_alone(tmp_path):
    done = two_runs([], ["--seed", 1], tmp_path / "both")
    assert [status for status, _ in done] == [0, 0], done
    for flags in ([], ["--seed", 1]):
        code = "import tasks, sys\ntasks.TASKS['toy'] = tasks.TASKS['toy']._replace(n=60, train=42, test=18)\nimport finetune_cot\nfinetune_cot.main(sys.argv[1:])"
        assert run("-c", code, "--saved", tmp_path / "alone", *SMALL, *flags).returncode == 0
    assert contents(tmp_path / "both") == contents(tmp_path / "alone")


@pytest.mark.slow
def test_two_runs_with_the_same_output_never_both_write_it(tmp_path):
    done = two_runs(
        ["--method", "ft", "--epochs", 60], ["--method", "ft", "--epochs", 60], tmp_path
    )
    assert (
        sorted(status for status, _ in done) == [0, 1]
        and "is being written by another run" in max(done)[1]
    ), done


@pytest.mark.slow
def test_two_torchruns_on_one_machine_choose_their_own_ports(tmp_path, model_folder):
    data = tmp_path / "data.json"
    data.write_text(json.dumps(toy_data(40)))
    start = [
        *PYTHON,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "finetune_cot.py",
        "--stage",
        "train",
        "--student",
        model_folder("gpt2"),
        "--finetune_data",
        data,
        "--epochs",
        3,
        "--device",
        "cpu",
    ]
    runs = [
        subprocess.Popen(
            [*map(str, start), "--seed", str(seed), "--out", str(tmp_path / str(seed))],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
        )
        for seed in (0, 1)
    ]
    assert [p.wait(120) for p in runs] == [0, 0]
    assert all(files.read_json(tmp_path / seed / "run.json")["finished"] for seed in "01")


# ---------------------------------------------------------------- security

PROJECT = [*ROOT.glob("*.py"), *(ROOT / "data").glob("*.py")]
TREES = {path.name: list(ast.walk(ast.parse(path.read_text()))) for path in PROJECT}


def calls(name):
    """-> [(file, {keyword: value})] of every call of a function or method of that name in the project."""
    for file, nodes in TREES.items():
        for node in nodes:
            if (
                isinstance(node, ast.Call)
                and getattr(node.func, "attr", getattr(node.func, "id", None)) == name
            ):
                yield file, {k.arg: getattr(k.value, "value", None) for k in node.keywords}


def test_weights_run_no_code_and_no_shell_sees_text():
    loads = [k for name in ("from_pretrained",) for _, k in calls(name)]
    assert len(loads) == 3
    assert all(k.get("trust_remote_code") is False for k in loads)
    assert [k["weights_only"] for _, k in calls("load") if "map_location" in k] == [True]
    assert not [
        call
        for name in ("system", "popen", "Popen", "getoutput", "extractall", "compile_command")
        for call in calls(name)
    ]
    assert not any(re.search(r"(?<![.\w])(?:eval|exec)\(", path.read_text()) for path in PROJECT)
    assert all("shell" not in k for name in ("run", "check_output", "call") for _, k in calls(name))
    assert not any(
        re.search(
            r"^\s*(?:import|from) (?:shelve|marshal|dill)\b|pickle\.loads?\(",
            path.read_text(),
            re.M,
        )
        for path in PROJECT
    )


class Evil:
    def __reduce__(self):
        return print, ("code of a stranger's ran",)


def test_a_checkpoint_or_model_that_holds_code_is_refused_and_the_code_does_not_run(
    tmp_path, capsys, model_folder
):
    torch.save({"model": Evil(), "step": 1}, tmp_path / "checkpoint_00000001.pt")
    with pytest.raises(UserError, match="is damaged, or not what it should be"):
        train_loop.load_checkpoint(tmp_path, None)
    for name in os.listdir(model_folder("gpt2")):
        if name != "model.safetensors":
            (tmp_path / name).write_bytes((model_folder("gpt2") / name).read_bytes())
    torch.save({"transformer.wte.weight": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="could not be loaded"):
        evaluate.load_model(str(tmp_path))
    config = files.read_json(tmp_path / "config.json")
    files.write_json(
        tmp_path / "config.json",
        config
        | {
            "model_type": "mine",
            "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"},
        },
    )
    (tmp_path / "mine.py").write_text('print("code of a stranger\'s ran")')
    with pytest.raises(UserError, match="could not be loaded"):
        evaluate.load_model(str(tmp_path))
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    [
        "nul",
        "CON",
        "com1",
        "LPT9.txt",
        "aux.json",
        "..",
        "../x",
        "a/../../b",
        "/etc/passwd",
        "~/../x/..",
        "a\0b",
        "x" * 121,
        "C:\\x",
        "\\\\host\\x",
        "-rf",
        "a\nb",
    ],
)
def test_names_of_devices_and_ways_out_are_no_keys(name, tmp_path, capsys):
    with pytest.raises(UserError, match="cannot be used as a name"):
        files.safe_key(name)
    for flag in ("--train_key", "--split"):
        message, _ = method(
            capsys,
            "--saved",
            tmp_path / "saved",
            "--stage",
            "sample",
            "--method",
            "ft",
            f"{flag}={name}",
        )
        assert (
            message
            and message.startswith("error: ")
            and "\n" not in message
            and not (tmp_path / "saved").exists()
        ), message


def test_the_api_key_is_in_no_file_no_output_and_no_traceback_of_the_whole_program(
    ask, server, tmp_path, capsys, monkeypatch
):
    """Every stage with an API teacher, here and there; `ask` looks at what it prints and, in the end, into every file."""
    monkeypatch.setattr(batch, "POLL", 0.01)
    server.batch_output = lambda made, lines: server.finish_batch(
        made, [batch_line(line) for line in lines], "completed", None
    )
    small = ("--method", "ft_cot", "--epochs", 1, "--max_new_tokens", 4, "--rules", "paper")
    for flags in (
        ("--batch", "submit"),
        ("--batch", "status"),
        ("--batch", "fetch"),
        ("--dry_run",),
        ("--stage", "all", "--student", "toy", *small),
        *(
            ("--stage", stage, "--label_style", "chat", "--student", "gpt-small", *small)
            for stage in ("curate", "train", "evaluate")
        ),
    ):
        message, out = ask("--teacher_method", "zs_cot", *flags)
        assert message is None, (flags, message)
    written = sorted(map(str, (tmp_path / "completion_data").glob("*/*.json")))
    assert len(written) == 3
    assert (tmp_path / "model_metadata").exists()
    assert (tmp_path / "models").exists()
    for command in (
        ["score", *written, "--part", "all", "--allow_partial"],
        ["table", "--saved", str(tmp_path), "--allow_partial"],
        ["show", written[0]],
    ):
        evaluate.main(command)
        assert KEY not in f"{capsys.readouterr()}"

    def crashes(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(teacher, "read_reply", crashes)
    with pytest.raises(ZeroDivisionError) as caught:
        ask("--teacher", "gpt-other")
    assert KEY not in "".join(traceback.format_exception(caught.value))
    assert KEY not in f"{capsys.readouterr()}"


# ---------------------------------------------------------------- archives

TOY = json.dumps(
    {
        "metadata": {"dataset_key": "toy"},
        "data": {
            str(s["sample_index"]): [{**s, "completion_index": 0, "completion": "yes"}]
            for s in tasks.toy_samples(3)
        },
    }
)
GOOD = "saved/completion_data/B_m__C_zs_cot/D_toy.json"


def pack(path, *entries, **changes):
    """A tar.gz of (name, content) with a change to the header of the last."""
    with tarfile.open(path, "w:gz") as tar:
        for i, (name, content) in enumerate(entries):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for k, v in changes.items() if i == len(entries) - 1 else ():
                setattr(info, k, v)
            tar.addfile(info, io.BytesIO(content))
    return path


def importing(path, saved, capsys):
    try:
        prepare.main(["--completions", str(path), "--saved", str(saved)])
        message = None
    except SystemExit as e:
        message = e.code
    return message, capsys.readouterr().out


def test_completion_files_of_an_archive_are_taken_and_score(tmp_path, capsys):
    pack(
        tmp_path / "a.tar.gz",
        (GOOD, TOY.encode()),
        ("saved/README.md", b"hello"),
        ("x/B_m__C_ft/F_ft__D_toy.json", TOY.encode()),
        ("B_m__C_zs/D_toy.json", b"torn {"),
    )
    message, out = importing(tmp_path / "a.tar.gz", tmp_path / "saved", capsys)
    assert message is None
    assert "B_m__C_zs/D_toy.json was left out: it is not valid JSON" in out
    assert sorted(contents(tmp_path / "saved")) == [
        "completion_data/B_m__C_ft/F_ft__D_toy.json",
        "completion_data/B_m__C_zs_cot/D_toy.json",
    ]
    assert evaluate.score(tmp_path / GOOD, part="all", allow_partial=True)["n"] == 3
    (tmp_path / GOOD).write_text("mine")
    assert (
        "with other content: it was kept"
        in importing(tmp_path / "a.tar.gz", tmp_path / "saved", capsys)[1]
    )
    assert (tmp_path / GOOD).read_text() == "mine"


@pytest.mark.parametrize(
    "name, changes, said",
    [
        ("../../B_m__C_zs/D_toy.json", {}, "leads out"),
        ("/B_m__C_zs/D_toy.json", {}, "leads out"),
        ("C:/B_m__C_zs/D_toy.json", {}, "leads out"),
        ("..\\B_m__C_zs/D_toy.json", {}, "leads out"),
        (
            "a/B_m__C_zs/D_toy.json",
            {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
            "not a plain file",
        ),
        ("a/B_m__C_zs/D_toy.json", {"type": tarfile.LNKTYPE, "linkname": GOOD}, "not a plain file"),
        ("fifo", {"type": tarfile.FIFOTYPE}, "not a plain file"),
        ("disk", {"type": tarfile.BLKTYPE}, "not a plain file"),
        ("a/B_m__C_..x/D_toy.json", {}, "cannot be used as a name"),
    ],
)
def test_of_an_archive_with_one_hostile_entry_nothing_is_taken(
    name, changes, said, tmp_path, capsys
):
    pack(tmp_path / "a.tar.gz", (GOOD, TOY.encode()), (name, TOY.encode()), **changes)
    message, _ = importing(tmp_path / "a.tar.gz", tmp_path / "in/saved", capsys)
    assert said in message
    assert os.listdir(tmp_path) == ["a.tar.gz"]


def test_an_archive_that_unpacks_to_too_much_is_stopped(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(archive, "LARGEST", 1 << 20)
    monkeypatch.setattr(archive, "IN_ALL", 3 << 20)
    monkeypatch.setattr(archive, "MOST", 50)
    big = ("saved/completion_data/B_m__C_zs/D_toy.json", bytes(2 << 20))
    for entries, said in (
        ((big,), "bytes: "),
        ([(f"{i}", bytes(1 << 20)) for i in range(5)], "unpacks to more"),
        ([(f"{i}", b"") for i in range(60)], "entries"),
    ):
        message, _ = importing(pack(tmp_path / "a.tar.gz", *entries), tmp_path / "saved", capsys)
        assert said in message and not (tmp_path / "saved").exists(), message
    header = tarfile.TarInfo("././@LongLink")  # a name of 4 MB
    header.type = tarfile.GNUTYPE_LONGNAME
    header.size = 4 << 20
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(header.tobuf() + b"x" * (4 << 20)))
    message, _ = importing(tmp_path / "a.tar.gz", tmp_path / "saved", capsys)
    assert "unpacks to more" in message


def test_an_archive_cut_off_anywhere_leaves_whole_files_or_none(tmp_path, capsys):
    whole = pack(tmp_path / "a.tar.gz", (GOOD, TOY.encode())).read_bytes()
    for end in range(0, len(whole) - 1, 5):
        (tmp_path / "b.tar.gz").write_bytes(whole[:end])
        message, _ = importing(tmp_path / "b.tar.gz", tmp_path / "saved", capsys)
        assert message
        assert message.startswith("error: ")
        assert "\n" not in message
        assert not contents(tmp_path / "saved") or (tmp_path / GOOD).read_text() == TOY
