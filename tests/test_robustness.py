"""Stale, mixed, full, locked, hostile: nothing is lost, and no result is wrong.

    python -m pytest tests/test_robustness.py [--slow]

All goes through the command line of finetune_cot.py; what fails is made to fail from outside.
"""

import ast
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import kill_anywhere
import pytest
import torch
from conftest import ROOT, SMALL, contents, run
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_hook
from transformers import GenerationMixin

import curation
import storage
import tasks

ON_SMALL_TOY = """
import sys
import finetune_cot, tasks
tasks.TASKS["toy"] = tasks.TASKS["toy"]._replace(n=60, train=42, test=18)
finetune_cot.main(sys.argv[1:])
"""


# ---- stale and mixed


@pytest.mark.slow
def test_main_each_seed_has_files_of_its_own(small_toy, tmp_path, method):
    """Another seed writes other files, from the teacher's to the test, and changes none."""
    flags = f"--saved {tmp_path} --method ft_cot {SMALL}"
    method(flags)
    before = contents(tmp_path)
    message, _ = method(f"{flags} --seed 1 --data_seed 1")
    after = contents(tmp_path)
    assert message is None
    assert before == {name: after[name] for name in before}
    assert len(after) > 2 * len(before) - 3
    assert (tmp_path / "completion_data/B_toy_teacher__C_zs_cot_t70_s1/D_toy.json").exists()


@pytest.fixture
def small_benchmark(tmp_path, monkeypatch):
    """multiarith with 4 questions of which a teacher t answered all; return its samples."""
    task = tasks.TASKS["multiarith"]._replace(n=4, train=3, test=1)
    monkeypatch.setitem(tasks.TASKS, "multiarith", task)
    samples = []
    rows = {}
    for i in range(4):
        sample = {"sample_index": i, "question": f"What is {i} + 1?", "answer": str(i + 1)}
        said = {"completion_index": 0, "completion": str(i + 1), "reasoning_completion": "so"}
        samples.append(sample)
        rows[str(i)] = [sample | said]
    metadata = {"dataset_key": "multiarith"}
    split = {"train": [0, 1, 2], "test": [3]}
    teacher = tmp_path / "completion_data/B_t__C_zs_cot/D_multiarith.json"
    storage.write_json(tmp_path / "split/multiarith__default.json", split)
    storage.write_json(teacher, {"metadata": metadata, "data": rows})
    return samples


def test_curate_changed_benchmark(small_benchmark, tmp_path, method):
    """A changed benchmark is curated again, and completions of the old one are refused."""
    path = tmp_path / "dataset/multiarith.json"
    content = {"metadata": {"dataset_key": "multiarith"}, "data": small_benchmark}
    storage.write_json(path, content)
    flags = f"--saved {tmp_path} --data {tmp_path} --task multiarith --teacher t --method ft_cot"
    message, _ = method(f"{flags} --stage curate")
    assert message is None
    small_benchmark[2]["answer"] = "4"
    storage.write_json(path, content)
    message, out = method(f"{flags} --stage curate")
    assert "settings changed (samples" in out
    assert "sample 2 is not sample 2 of multiarith" in message


EDITS = [  # template, stage that uses it, method, another text
    ("zs_cot", "sample", "ft_cot", ("{q} Think.", "")),
    ("ft_cot_token", "curate", "ft_cot", ("{q} ###", " {r} ==> {a}")),
    ("zs", "evaluate", "zs", ("{q} =", "")),
]


@pytest.mark.parametrize("template, stage, name, text", EDITS)
def test_main_edited_template(
    small_toy, tmp_path, method, monkeypatch, template, stage, name, text
):
    """An edited template is another one, to the teacher, the student and the test."""
    flags = f"--saved {tmp_path} --method {name} --max_new_tokens 2"
    method(f"{flags} --stage sample")
    method(f"{flags} --stage {stage}")
    message, out = method(f"{flags} --stage {stage}")
    assert message is None
    assert "skipped" in out
    changed = tasks.TEMPLATES[template] | {"decoder": text}
    monkeypatch.setitem(tasks.TEMPLATES, template, changed)
    message, out = method(f"{flags} --stage {stage}")
    assert message is None
    assert f"{stage}: settings changed (texts" in out
    assert "skipped" not in out


def test_sample_changed_few_shot_examples(small_toy, tmp_path, method, model_folder):
    """Other few-shot examples make other completions."""
    path = tmp_path / "few_shot_cot_prompts.json"
    teacher = f"--teacher hf:{model_folder('gpt2')} --teacher_method fs_cot --degree 1"
    flags = f"--data {tmp_path} {teacher} --temperature 0 --teacher_max_new_tokens 2"
    storage.write_json(path, {"toy": {"prompt": "Q: 1\nA: 1"}})
    message, _ = method(f"--saved {tmp_path} --stage sample {flags}")
    assert message is None
    storage.write_json(path, {"toy": {"prompt": "Q: 2\nA: 2"}})
    _, out = method(f"--saved {tmp_path} --stage sample {flags}")
    assert "settings changed (examples" in out


OTHER_STUDENTS = [
    ("--weight_decay 0.5", "weight_decay 0.01 -> 0.5"),
    ("--rules flexible", "was made with other settings"),
    ("--label_style natural --train_key ft_cot_2aug", "was made with other settings"),
]


def test_evaluate_refuses_a_student_of_other_settings(small_toy, tmp_path, method):
    """Evaluating alone takes no student that was made with other settings than the flags'."""
    flags = f"--saved {tmp_path} --method ft_cot {SMALL}"
    method(flags)
    for change, said in OTHER_STUDENTS:
        message, _ = method(f"{flags} --stage evaluate {change}")
        assert said in message
    message, _ = method(f"{flags} --stage evaluate")
    assert message is None


def test_train_killed_before_old_completions_are_moved(small_toy, tmp_path, method):
    """An old student's completions are moved away even where a kill came before that."""
    flags = f"--saved {tmp_path} --method ft --max_new_tokens 4"
    method(f"{flags} --epochs 2")
    student = tmp_path / "models/B_toy_student/D_toy__T_ft"
    old = storage.read_json(student / "run.json")["settings"]
    storage.move_to_backup(student)
    storage.prepare_output_dir(student, old | {"epochs": 1})  # and here the kill
    method(f"{flags} --epochs 1")
    names = os.listdir(tmp_path / "completion_data/B_toy_student__C_ft")
    assert sorted(names) == ["D_toy__T_ft__E_001.json", "D_toy__T_ft__E_002.json.old1"]


def test_train_refuses_a_file_that_another_run_replaced(small_toy, tmp_path, method, monkeypatch):
    """A run trains on the file that it curated, or not at all."""
    curate = curation.curate
    folder = tmp_path / "finetune_data/P_decoder"

    def curate_beside_another_run(*values: Any, **options: Any) -> Any:
        result = curate(*values, **options)
        if (folder / "F_zs_cot_t70_toy_2aug.json").exists():
            (folder / "F_ft_toy.json").write_text("another's")
        return result

    monkeypatch.setattr(curation, "curate", curate_beside_another_run)
    message, _ = method(f"--saved {tmp_path} {SMALL}")
    assert "F_ft_toy.json was replaced by another run since it was curated" in message


# ---- a student that fails


@pytest.fixture
def on_forward():
    """Return a function: (n, action) -> action on the output of a student's n-th pass, and later.

    Counted are forward passes of training or, with training=False, of decoding.
    """
    handles = []

    def register(
        n: int, action: Callable[[Any], None], training: bool = True
    ) -> Callable[[], None]:
        passes = []

        def hook(module: torch.nn.Module, inputs: tuple, output: Any) -> None:
            if not isinstance(module, GenerationMixin) or module.training != training:
                return
            if torch.is_grad_enabled() == training:
                passes.append(1)
                if len(passes) >= n:
                    action(output)

        handles.append(register_module_forward_hook(hook))
        return handles[-1].remove

    yield register
    for handle in handles:
        handle.remove()


def raising(error: BaseException) -> Callable[[Any], None]:
    """Return an action for on_forward that raises."""

    def action(output: Any) -> None:
        raise error

    return action


@pytest.fixture
def train(tmp_path, method, model_folder):
    """Return a function: (out, flags) -> method's result of 3 steps an epoch on uneven samples."""
    data = {
        "sample_index": list(range(20)),
        "input": [f"count to {i} ###" for i in range(20)],
        "label": [" " + "so " * (i % 7 * 3) + f"--> {i}" for i in range(20)],
    }
    storage.write_json(tmp_path / "data.json", data)
    files = f"--student {model_folder('gpt2')} --finetune_data {tmp_path}/data.json"
    flags = f"--stage train {files} --batch_size 8 --lr 1e-3 --device cpu"
    return lambda out, more: method(f"{flags} --out {tmp_path / out} {more}")


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint_*"))


PATHS = ["", "--plain"]
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu", "python"])
def test_train_out_of_memory(train, on_forward, tmp_path, error):
    """A step without memory names the flags that help; with them the run resumes."""
    repair = on_forward(5, raising(error))
    message, _ = train("out", "--epochs 3")
    advice = "lower --micro_tokens or --micro_batch_size .*--gradient_checkpointing"
    assert re.search(f"out of memory at step 5: {advice}", message)
    assert checkpoints(tmp_path / "out") == ["checkpoint_00000003.pt"]
    repair()
    train("whole", "--epochs 3")
    message, out = train("out", "--epochs 3 --micro_batch_size 4")
    assert message is None
    assert "going on after step 3 of 9" in out
    resumed = load_file(tmp_path / "out/model.safetensors")
    for name, weight in load_file(tmp_path / "whole/model.safetensors").items():
        if "c_attn.bias" not in name:  # a key's bias has no gradient: Adam scales its rounding up
            torch.testing.assert_close(resumed[name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("path", PATHS, ids=["fast", "plain"])
def test_evaluate_out_of_memory(small_toy, tmp_path, method, on_forward, path):
    """Decoding without memory names the flag that helps."""
    on_forward(3, raising(OUT_OF_MEMORY[0]), training=False)
    message, _ = method(f"--saved {tmp_path} --method zs --max_new_tokens 8 --device cpu {path}")
    assert "out of memory: lower --eval_batch_size" in message


def test_main_lost_rank(train, on_forward):
    """A rank whose peer has died says so instead of showing gloo's error."""
    text = "[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer"
    on_forward(1, raising(RuntimeError(text)))
    message, _ = train("out", "--epochs 1")
    assert "another rank has ended" in message


def test_main_other_errors_stay(train, on_forward):
    """An error that no user can mend is not turned into a sentence."""
    on_forward(1, raising(RuntimeError("shape mismatch")))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        train("out", "--epochs 1")


def spoil_loss(output: Any) -> None:
    output.logits = output.logits * float("nan")


def spoil_gradient(output: Any) -> None:
    output.logits.register_hook(lambda gradient: gradient * float("inf"))


@pytest.mark.parametrize("path", PATHS, ids=["fast", "plain"])
@pytest.mark.parametrize("what, spoil", [("loss", spoil_loss), ("gradient", spoil_gradient)])
def test_train_nan(train, on_forward, tmp_path, what, spoil, path):
    """A loss or gradient that is not finite stops at its step; the last checkpoint is sound."""
    on_forward(5, spoil)
    message, _ = train("out", f"--epochs 3 {path}")
    where = r"at step 5 \(sample_index (\d+(, )?)+\)"
    assert re.search(rf"the {what} is (nan|inf) {where}: .* last checkpoint is kept", message)
    assert checkpoints(tmp_path / "out") == ["checkpoint_00000003.pt"]
    state = torch.load(tmp_path / "out/checkpoint_00000003.pt", weights_only=True)
    assert all(value.isfinite().all() for value in state["model"].values())


# ---- damaged and hostile files


class Evil:
    """What runs code when it is unpickled."""

    def __reduce__(self) -> tuple:
        return print, ("foreign code ran",)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 999)


def write_code(path: Path) -> None:
    torch.save({"model": Evil(), "step": 1}, path)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "junk": lambda path: path.write_bytes(b"junk" * 99),
    "truncated": truncate,
    "code": write_code,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_train_damaged_checkpoint(train, on_forward, tmp_path, method, damage):
    """A damaged checkpoint is named, runs no code, and the one before it serves."""
    repair = on_forward(7, raising(KeyboardInterrupt()))
    train("out", "--epochs 4 --keep 2")
    repair()
    newest = tmp_path / "out/checkpoint_00000006.pt"
    damage(newest)
    message, out = train("out", "--epochs 4 --keep 2")
    assert "foreign code ran" not in out
    advice = "delete it, and the run goes on from the one before it"
    assert re.search(f"checkpoint_00000006.pt is damaged.*: {advice}", message)
    newest.unlink()
    train("out", "--epochs 4 --keep 2")
    train("whole", "--epochs 4")
    weights = (tmp_path / "out/model.safetensors").read_bytes()
    assert weights == (tmp_path / "whole/model.safetensors").read_bytes()


def write_pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Evil()}, folder / "pytorch_model.bin")


def write_own_class(folder: Path) -> None:
    config = storage.read_json(folder / "config.json")
    classes = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    config |= {"model_type": "mine", "auto_map": classes}
    storage.write_json(folder / "config.json", config)
    (folder / "mine.py").write_text('print("foreign code ran")')


@pytest.mark.parametrize("damage", [write_pickled_weights, write_own_class])
def test_train_hostile_student(train, tmp_path, model_folder, damage):
    """A model folder that holds code is refused, and the code does not run."""
    shutil.copytree(model_folder("gpt2"), tmp_path / "student")
    damage(tmp_path / "student")
    message, out = train("out", f"--epochs 1 --student {tmp_path}/student")
    assert "could not be loaded" in message
    assert "foreign code ran" not in out


BAD_NAMES = ["..", "../x", "a/../../b", "/etc/passwd", "~/../x/..", "a\0b", "x" * 121]
BAD_NAMES += ["C:\\x", "\\\\host\\x", "-rf", "a\nb"]


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("flag", ["--train_key", "--split"])
def test_main_bad_name(tmp_path, method, flag, name):
    """What leads out of a folder, or is no name, is no part of a file name."""
    saved = tmp_path / "saved"
    message, _ = method(f"--saved {saved} --stage sample --method ft", f"{flag}={name}")
    assert message.startswith("error: ")
    assert "cannot be used as a name" in message
    assert "\n" not in message
    assert not saved.exists()


# ---- full disks, kills, interruptions


def limit_file_size(size: int) -> Callable[[], None]:
    """Return what a child does first; to a program a full disk looks like this limit."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, -1))


SLOW_SIZES = [0, 300, 3_000, 30_000, 60_000, 300_000, 2_000_000]
SIZES = [(10_000, "sample")]
SIZES += [pytest.param(size, "all", marks=pytest.mark.slow) for size in SLOW_SIZES]


@pytest.mark.parametrize("size, stage", SIZES)
def test_main_full_disk(tmp_path, size, stage):
    """A disk that is full at any write is named; the same command goes on when there is room."""
    flags = f"--stage {stage} {SMALL} --checkpoint_steps 2 --saved".split()
    command = ("-c", ON_SMALL_TOY, *flags)
    done = run(*command, tmp_path / "full", preexec_fn=limit_file_size(size))
    assert done.returncode == 1
    assert re.fullmatch(r"error: .*(File too large|could not be written).*\n", done.stderr)
    assert str(tmp_path) in done.stderr
    for folder in ("full", "whole"):
        assert run(*command, tmp_path / folder).returncode == 0
    found = contents(tmp_path / "full")
    left = {name: content for name, content in found.items() if not name.endswith(".tmp")}
    assert left == contents(tmp_path / "whole")


AS_NOBODY = """
import os, sys
from finetune_cot import main
main(["--stage", "sample", "--saved", sys.argv[1]])  # once as root, nobody may be unable to import
os.setuid(65534)
main(["--stage", "sample", "--saved", sys.argv[2]])
"""


def test_main_from_another_folder(tmp_path):
    """Wherever it is started, what is missing is named by its whole path."""
    command = [ROOT / "finetune_cot.py", "--task", "multiarith", "--stage", "curate"]
    done = run(*command, "--data", "d", "--method", "ft", cwd=tmp_path)
    assert f"error: {tmp_path}/d/split/multiarith__default.json is missing" in done.stderr
    assert "`python data/prepare.py multiarith --data d`" in done.stderr


def test_main_no_permission(tmp_path):
    """A folder that cannot be written to is named."""
    if os.geteuid() != 0:
        (tmp_path / "saved").mkdir(mode=0o555)
        done = run("finetune_cot.py", "--stage", "sample", "--saved", tmp_path / "saved")
    else:  # permissions do not bind root: write as nobody into a folder of root's
        with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
            os.chmod(folder, 0o755)
            done = run("-c", AS_NOBODY, tmp_path, f"{folder}/saved")
    assert done.returncode == 1
    assert re.fullmatch(
        r"error: .*Permission denied: '.*saved.*': choose .* --saved .*\n", done.stderr
    ), done.stderr


def test_main_killed_twice(tmp_path):
    """A pipeline that is killed twice ends as if left alone (more in tests/kill_anywhere.py)."""
    flags = "--method ft_cot --epochs 1 --max_new_tokens 8 --checkpoint_steps 1 --device cpu"
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    ended = []
    with open(tmp_path / "log", "w+") as log:
        began = time.monotonic()
        assert kill_anywhere.wait_for_end(kill_anywhere.start(whole, log, flags=flags), 60) == 0
        takes = time.monotonic() - began
        for share in (0.5, 0.3):
            pid = kill_anywhere.start(killed, log, flags=flags)
            time.sleep(share * takes)
            os.kill(pid, signal.SIGKILL)
            ended.append(kill_anywhere.wait_for_end(pid, 60))
        assert kill_anywhere.wait_for_end(kill_anywhere.start(killed, log, flags=flags), 60) == 0
    assert -signal.SIGKILL in ended
    assert kill_anywhere.contents(killed) == kill_anywhere.contents(whole)


def start(*command: Any, **options: Any) -> subprocess.Popen:
    """Start a script of the project in the background."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, text=True, **options
    )


@pytest.mark.slow
def test_main_interrupted(tmp_path, method, model_folder):
    """Ctrl-C ends with one line, and the same command goes on."""
    data = {"sample_index": list(range(160)), "input": ["a ###"] * 160, "label": [" b"] * 160}
    storage.write_json(tmp_path / "data.json", data)
    files = f"--student {model_folder('gpt2')} --finetune_data {tmp_path}/data.json"
    flags = f"--stage train {files} --out {tmp_path}/out --epochs 4"
    process = start("finetune_cot.py", *flags.split(), stderr=subprocess.PIPE)
    for line in process.stdout:
        if line.startswith("    epoch 1 of 4"):
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.strip().splitlines()[-1].startswith("interrupted: what is finished is kept")
    assert "Traceback" not in errors
    message, out = method(flags)
    assert message is None
    assert re.search(r"going on after step \d+ of 80", out)


# ---- two at once

HOLDER = """
import sys, time
import storage
with storage.file_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""
LOCKED = [  # stage, what it writes
    ("train", "models/B_toy_student/D_toy__T_ft"),
    ("sample", "completion_data/B_toy_teacher__C_zs_cot_t70/D_toy.json"),
]


@pytest.fixture
def impatient(monkeypatch):
    """A run waits 0.2 s for a lock instead of 3 s."""
    monkeypatch.setattr(storage.file_lock.__wrapped__, "__defaults__", (True, 0.2))


@pytest.mark.parametrize("stage, name", LOCKED)
def test_main_locked_output(small_toy, impatient, tmp_path, method, stage, name):
    """A second run on the same output is refused; a killed first one leaves no lock."""
    flags = f"--saved {tmp_path} --method ft {SMALL}"
    method(f"{flags} --stage curate")
    process = start("-c", HOLDER, tmp_path / name)
    assert process.stdout.readline() == "held\n"
    before = contents(tmp_path)
    message, _ = method(f"{flags} --stage {stage}")
    advice = "wait for it, stop it, or write elsewhere"
    assert f"{tmp_path / name} is being written by another run: {advice}" in message
    assert contents(tmp_path) == before
    process.kill()
    process.wait()
    message, _ = method(f"{flags} --stage {stage}")
    assert message is None
    assert not list(tmp_path.rglob("*.lock"))


def run_two(saved: Path, first: str, second: str) -> list[tuple[int, str]]:
    """Run the small toy with two sets of flags at once; return [(exit status, output)]."""
    runs = []
    for flags in (first, second):
        command = ("-c", ON_SMALL_TOY, "--saved", saved, *f"{SMALL} {flags}".split())
        runs.append(start(*command, stderr=subprocess.STDOUT))
    outputs = [process.communicate(timeout=120)[0] for process in runs]
    return [(process.returncode, out) for process, out in zip(runs, outputs, strict=True)]


@pytest.mark.slow
def test_main_two_seeds_at_once(tmp_path):
    """Runs with different seeds side by side write what each writes alone."""
    done = run_two(tmp_path / "both", "", "--seed 1")
    assert [status for status, _ in done] == [0, 0], done
    for flags in ("", "--seed 1"):
        command = ("-c", ON_SMALL_TOY, "--saved", tmp_path / "alone", *SMALL.split())
        assert run(*command, *flags.split()).returncode == 0
    assert contents(tmp_path / "both") == contents(tmp_path / "alone")


@pytest.mark.slow
def test_main_same_output_at_once(tmp_path):
    """Of two runs with one output, one writes it and the other says so."""
    flags = "--method ft --epochs 60"
    winner, loser = sorted(run_two(tmp_path, flags, flags))
    assert winner[0] == 0
    assert loser[0] == 1
    assert "is being written by another run" in loser[1]


@pytest.mark.slow
def test_torchrun_two_at_once(tmp_path, model_folder):
    """Two runs under torchrun on one machine choose ports of their own."""
    data = {"sample_index": list(range(40)), "input": ["a ###"] * 40, "label": [" b"] * 40}
    storage.write_json(tmp_path / "data.json", data)
    launcher = "-m torch.distributed.run --standalone --nproc_per_node=2 finetune_cot.py"
    files = f"--student {model_folder('gpt2')} --finetune_data {tmp_path}/data.json"
    runs = []
    for seed in (0, 1):
        flags = f"--stage train {files} --out {tmp_path}/{seed} --seed {seed} --epochs 3"
        runs.append(start(*launcher.split(), *flags.split(), "--device", "cpu"))
    for seed, process in enumerate(runs):
        process.communicate(timeout=120)
        assert process.returncode == 0
        assert storage.read_json(tmp_path / str(seed) / "run.json")["finished"]


# ---- what the sources may call


class Call(NamedTuple):
    """A call in a source of the project."""

    place: str  # file:line
    function: str  # as written: torch.load
    options: dict[str, str]  # keyword: value as written


def calls() -> Iterator[Call]:
    for pattern in ("*.py", "data/*.py", "extras/*.py"):
        for path in ROOT.glob(pattern):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    options = {str(k.arg): ast.unparse(k.value) for k in node.keywords}
                    yield Call(f"{path.name}:{node.lineno}", ast.unparse(node.func), options)


CALLS = list(calls())
FORBIDDEN = {"eval", "exec", "os.system", "os.popen", "subprocess.Popen", "subprocess.getoutput"}
FORBIDDEN |= {"pickle.load", "pickle.loads", "marshal.loads", "dill.loads", "shelve.open"}
REQUIRED = [  # end of a function's name, an option it must have, its value
    (".from_pretrained", "trust_remote_code", "False"),
    ("torch.load", "weights_only", "True"),
    (".extractall", "filter", "'data'"),
]


@pytest.mark.parametrize("name, option, value", REQUIRED)
def test_sources_load_no_code(name, option, value):
    """Models, checkpoints and archives are loaded as data."""
    loads = [call for call in CALLS if call.function.endswith(name)]
    assert [call for call in loads if call.options.get(option) != value] == []


def test_sources_call_no_shell():
    """No text reaches a shell or an interpreter."""
    assert [call for call in CALLS if call.function in FORBIDDEN or "shell" in call.options] == []


def test_sources_have_loads_to_check():
    """The names that these tests look for are those of the sources."""
    names = {call.function for call in CALLS}
    assert "torch.load" in names
    assert any(name.endswith(".from_pretrained") for name in names)
