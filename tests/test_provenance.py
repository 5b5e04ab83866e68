"""What made a result: flags, code, models.   python -m pytest tests/test_provenance.py"""

import os
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, run

import completions
import flags
import parser
import provenance
import storage
import tasks
from storage import UserError

# ---------------------------------------------------------------- flags


def test_every_flag_is_in_one_list():
    """A flag either changes a result or does not; one added later belongs into a list."""
    actions = parser.make_parser("")._actions
    names = {action.dest for action in actions} - {"help", "help_all"}
    listed = [*provenance.RESULT_FLAGS, *provenance.NEUTRAL_FLAGS]
    assert sorted(listed) == sorted(names)


def effective(method: str, line: str) -> set[str]:
    """Return the names of the flags that a result depends on."""
    [args] = flags.parse_args(line.split())
    return set(provenance.effective_flags(method, vars(args)))


def test_effective_flags_of_methods():
    """A method depends on its own flags: ft on no teacher, zs on no training."""
    assert "degree" in effective("ft_cot", "")
    assert "degree" not in effective("ft", "")
    assert "lr" in effective("ft", "")
    assert "lr" not in effective("zs", "")


def test_effective_flags_of_sampled_answers():
    """A temperature matters where answers are sampled, and so does the seed of any student."""
    assert "eval_temperature" not in effective("zs", "--student gpt2")
    assert "seed" not in effective("zs", "--student gpt2")
    assert {"eval_temperature", "seed"} <= effective("zs", "--student gpt2 --eval_samples 2")
    assert "seed" in effective("zs", "")  # each makes another toy student


def test_with_notes_of_another_file():
    """Of a student that learnt from another file than the flags name, its curation is unknown."""
    known = {"student": "a", "rules": "paper", "lr": 1.0, "split": "default"}
    made_with = {"student": "3f", "finetune_data": "9c" * 32, "lr": 0.1}
    expected = {"student": "3f", "lr": 0.1, "split": "default", "finetune_data": "9c" * 8}
    assert provenance.with_notes(known, made_with, {}) == expected


def test_with_notes_of_its_file():
    """What stands beside the file goes over the flags; what the teacher's file says is added."""
    known = {"student": "a", "rules": None, "api": "chat", "lr": 1.0}
    made_with = {"student": "3f", "finetune_data": "9c" * 32, "lr": 0.1}
    note = {"sha256": "9c" * 32, "settings": {"rules": "flexible"}}
    found = provenance.with_notes(known, made_with, note | {"taught": {"api": "completions"}})
    assert (found["rules"], found["api"], found["lr"]) == ("flexible", "completions", 0.1)
    assert "api" not in provenance.with_notes(known, made_with, note)


# ---------------------------------------------------------------- code

EDITS = [  # (old text, new one) of a source, the tasks whose files it changes
    ("NUMBER = AnswerType(", 'NUMBER = AnswerType("new", *[', "multiarith"),
    (r"-?\d+(?:\.\d+)?", r"-?\d+", "svamp"),
    ('"""Choose what is learnt from', '"""Choose', "toy"),
    ("pairs = [\n", "pairs = 2 * [\n", "coin_flip"),
    ('STATED_ANSWER = "The answer is"', 'STATED_ANSWER = "So"', "aqua"),
]


@pytest.mark.parametrize("old, new, task", EDITS)
def test_code_fingerprint_changes_with_code(monkeypatch, old, new, task):
    """Answers, cleansing, the choice and the format of samples: each edit is noticed."""
    before = provenance.code_fingerprint(task)
    assert any(old in source for source in provenance.SOURCES)
    edited = [source.replace(old, new) for source in provenance.SOURCES]
    if new.endswith("["):
        edited = [
            source.replace('"number", PAPER_NUMBER, NUMBER_BY_VALUE)', "])") for source in edited
        ]
    monkeypatch.setattr(provenance, "SOURCES", tuple(edited))
    assert provenance.code_fingerprint(task) != before


UNRELATED = [
    ("# ------", "# more ------"),  # a comment
    ('Task("svamp",', 'Task("other", "Other", NUMBER, 1, 1, 1, 0.0),\n    Task("svamp",'),
    ('"ft_token": {', '"ft_steps": {"decoder": ("{q}", "{a}")},\n    "ft_token": {'),
    ('["*`] ([^"*`', '["*] ([^"*`'),  # the strings of another kind of answer
]


@pytest.mark.parametrize("old, new", UNRELATED)
def test_code_fingerprint_of_other_code(monkeypatch, old, new):
    """Comments, other tasks, other templates and other kinds of answer change nothing."""
    before = provenance.code_fingerprint("svamp")
    assert any(old in source for source in provenance.SOURCES)
    edited = tuple(source.replace(old, new) for source in provenance.SOURCES)
    monkeypatch.setattr(provenance, "SOURCES", edited)
    assert provenance.code_fingerprint("svamp") == before


def copy_project(folder: Path) -> Path:
    """Copy the modules of the project."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for name in ("data", "extras"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("raw"))
    return folder


def curate_after(folder: Path, module: str, old: str, new: str) -> str:
    """Edit a module of the copy and curate again; return what is printed."""
    path = folder / module
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    done = run("finetune_cot.py", "--stage", "curate", "--method", "ft_cot", cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


OBJECTIVE = """
    rows = rows * 2
    pairs += [(f"answer: {prompt}", f" {row['answer']}") for (prompt, _), row in zip(pairs, rows)]
"""


def test_curate_after_an_edit(tmp_path):
    """A file that other code made is made again, whatever its other settings, and only once."""
    folder = copy_project(tmp_path)
    task = 'Task("toy",                       "Toy Coins",     YES_NO, 2000,  1400,  600,  50.0)'
    small = task.replace("2000,  1400,  600", "20, 14, 6")
    path = folder / "tasks.py"
    path.write_text(path.read_text().replace(task, small))
    run("finetune_cot.py", "--stage", "sample", cwd=folder)
    first = curate_after(folder, "curation.py", '"""', '"""')
    assert "of 28 rationales" in first
    anchor = "    if family in API_FAMILIES.values():\n"
    again = curate_after(folder, "curation.py", anchor, OBJECTIVE + anchor)
    assert "curate: settings changed (code " in again
    [made] = (folder / "saved/finetune_data/P_decoder").glob("F_zs*toy_2aug.json")
    assert len(storage.read_finetune_data(made)["input"]) % 2 == 0
    assert "made with the same settings: skipped" in curate_after(folder, "tasks.py", "#", "# so")


LOOP_EDITS = [  # (old text, new one), whether a student would be another one
    ("loss / label_tokens", "loss / len(batch)", True),
    ("generator=generator", "generator=None", True),  # of the order of samples
    ("# ------", "# more ------", False),
]


@pytest.mark.parametrize("old, new, is_other", LOOP_EDITS)
def test_training_fingerprint_changes_with_code(monkeypatch, old, new, is_other):
    """An edit of the loss, or of the order of samples, is noticed; a comment is none."""
    before = provenance.training_fingerprint()
    assert any(old in source for source in provenance.TRAINING_SOURCES)
    edited = tuple(source.replace(old, new) for source in provenance.TRAINING_SOURCES)
    monkeypatch.setattr(provenance, "TRAINING_SOURCES", edited)
    assert (provenance.training_fingerprint() != before) == is_other


@pytest.mark.parametrize(
    "code, is_noted", [(None, False), ("0123", True), (provenance.training_fingerprint(), False)]
)
def test_note_other_code(tmp_path, capsys, code, is_noted):
    """A finished student is kept, and it is said that the loop has changed; None: not recorded."""
    storage.write_json(tmp_path / "run.json", {"finished": True, "code": code})
    provenance.note_other_code(tmp_path)
    assert ("add --redo train" in capsys.readouterr().out) == is_noted


# ---------------------------------------------------------------- models


def test_model_fingerprint_of_a_folder(tmp_path):
    """It changes with any byte of a model's files, the middle ones too, and with no other file."""
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(5 << 20))
    first = provenance.model_fingerprint(str(tmp_path), tmp_path / "saved")
    (tmp_path / "notes.txt").write_text("x")
    assert provenance.model_fingerprint(str(tmp_path), tmp_path / "saved") == first
    content = bytearray(5 << 20)
    content[len(content) // 2] = 1
    weights.write_bytes(content)
    assert provenance.model_fingerprint(str(tmp_path), tmp_path / "saved") != first


def test_model_fingerprint_of_a_hub_name(tmp_path):
    """A model of the hub is known by its name."""
    assert provenance.model_fingerprint("google/flan-t5-base", tmp_path) == "google/flan-t5-base"


def test_content_hash_is_remembered(tmp_path, monkeypatch):
    """A large file is read again when its size, time or inode has changed, else not."""
    monkeypatch.setattr(provenance, "LARGE", 3)
    read = []
    monkeypatch.setattr(storage, "file_sha256", lambda path: read.append(1) or f"hash {len(read)}")
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    known = [provenance.content_hash(path, tmp_path) for _ in range(2)]
    assert known == ["hash 1", "hash 1"]
    os.utime(path, ns=(1, 1))
    assert provenance.content_hash(path, tmp_path) == "hash 2"
    copy = tmp_path / "copy"
    copy.write_bytes(b"Weights")
    os.utime(copy, ns=(1, 1))
    os.replace(copy, path)
    assert provenance.content_hash(path, tmp_path) == "hash 3"


# ---------------------------------------------------------------- --redo


@pytest.mark.parametrize(
    "redo, stage, sentence",
    [
        ("sample", "all", "--redo sample: a teacher's completions cost money or hours"),
        ("train", "curate", "--redo train does nothing with --stage curate"),
    ],
)
def test_check_redo_refuses(redo, stage, sentence):
    """What would pay again, or do nothing, is refused."""
    with pytest.raises(UserError, match=sentence):
        provenance.check_redo(redo, stage, is_api_student=False)


def test_check_redo_of_an_api_student():
    """A student behind an API is not paid for twice; its file is curated again."""
    provenance.check_redo("curate", "curate", is_api_student=True)
    with pytest.raises(UserError, match="is not paid twice"):
        provenance.check_redo("train", "all", is_api_student=True)


REDONE = {"curate": 1, "train": 2, "evaluate": 2}  # stage: how often "skipped" is printed
# with --eval_every the evaluation at the end finds that of the last epoch, made a moment ago


@pytest.mark.parametrize("stage", REDONE)
def test_redo_makes_a_stage_and_what_follows(small_toy, tmp_path, method, stage):
    """--redo runs a stage and the later ones again, and keeps what was there aside."""
    flags_of_run = f"--saved {tmp_path} {SMALL} --method ft --eval_every 1"
    method(flags_of_run)
    _, out = method(f"{flags_of_run} --redo {stage}")
    assert out.count("made with the same settings: skipped") == REDONE[stage]
    student = tmp_path / "models/B_toy_student/D_toy__T_ft.old1"
    assert student.exists() == (stage != "evaluate")
    evaluation = tmp_path / "completion_data/B_toy_student__C_ft/D_toy__T_ft__E_002.json.old1"
    assert evaluation.exists()


def test_redo_goes_on_with_an_unfinished_run(tmp_path):
    """An unfinished run is not begun anew, so that the command can be started again."""
    storage.write_json(tmp_path / "run.json", {"finished": False, "settings": {"lr": 1}})
    assert storage.prepare_output_dir(tmp_path, {"lr": 1}, redo=True) == "unfinished"


# ---------------------------------------------------------------- a local teacher's degree


def rationales(saved: Path) -> list[str]:
    """Return what the toy teacher wrote, by sample and number."""
    path = saved / "completion_data/B_toy_teacher__C_zs_cot_t70/D_toy.json"
    return [row["reasoning_completion"] for row in completions.read_completions(path)[1]]


def test_sample_adds_and_keeps_rationales(small_toy, tmp_path, method, monkeypatch):
    """8, then 4, then 8 rationales are sampled once; 4, then 8 are what 8 at once are."""
    for degree in (8, 4, 8):
        _, out = method(f"--saved {tmp_path}/a --stage sample --degree {degree}")
    assert "made with the same settings: skipped" in out
    whole = rationales(tmp_path / "a")
    assert len(whole) == 60 * 8
    assert not list((tmp_path / "a").rglob("*.old1"))
    method(f"--saved {tmp_path}/b --stage sample --degree 4")
    _, out = method(f"--saved {tmp_path}/b --stage sample --degree 8")
    assert "asking for 4 more" in out
    assert rationales(tmp_path / "b") == whole
    assert (tmp_path / "a/completion_data/B_toy_teacher__C_zs_cot_t70/D_toy.json").read_bytes() == (
        tmp_path / "b/completion_data/B_toy_teacher__C_zs_cot_t70/D_toy.json"
    ).read_bytes()


def test_tasks_have_a_row_in_the_code():
    """code_fingerprint finds the row of every task."""
    definitions = provenance.read_definitions(provenance.SOURCES)
    assert all(len(provenance.task_row(definitions, key)) == 1 for key in tasks.TASKS)
