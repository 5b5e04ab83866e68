"""Files, journals, locks, settings, completion datasets.

python -m pytest tests/test_storage.py
"""

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

import completions
import evaluate
import finetune_cot
import storage
import tasks
import terminal
from storage import UserError


def run_python(code: str, *arguments: object) -> subprocess.Popen:
    """Start python -c in the project's root."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def no_space(*_: object) -> None:
    """Fail as on a full disk."""
    raise OSError(28, "No space left on device")


# ---------------------------------------------------------------- text and JSON


def test_write_atomic_full_disk(tmp_path, monkeypatch):
    """A file is written whole or not at all, and the error names it."""
    storage.write_atomic(tmp_path / "f", "old")
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left on device: .*/f'"):
        storage.write_atomic(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("content", ["caf\u00e9\n", b"\x00\xff"])
def test_write_atomic_makes_folders(tmp_path, content):
    """Text is written as UTF-8, bytes as they are, into folders that are made."""
    storage.write_atomic(tmp_path / "a" / "b" / "f", content)
    written = (tmp_path / "a" / "b" / "f").read_bytes()
    assert written in (content, str(content).encode())
    assert (tmp_path / "a" / "b" / "f").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("name", ["missing", ".", "file/below"])
def test_read_text_missing(tmp_path, name):
    """What is no file is named."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be read"):
        storage.read_text(tmp_path / name)


def test_read_jsonl_line_ends(tmp_path):
    """Only a newline ends a line, and a byte-order mark is no part of the first."""
    (tmp_path / "f.jsonl").write_text('\ufeff{"a": "x\u2028y"}\r\n\n{"a": 2}')
    rows = storage.read_jsonl(tmp_path / "f.jsonl")
    assert [row["a"] for row in rows] == ["x\u2028y", 2]


def test_replace_lone_surrogates_makes_text_encodable():
    """Half a character becomes a question mark, a whole one stays."""
    assert storage.replace_lone_surrogates("a\ud83d \U0001f600") == "a? \U0001f600"


def test_import_is_light():
    """Importing storage and tasks imports nothing that is slow to import."""
    slow = "{'torch', 'numpy', 'transformers', 'openai', 'filelock', 'tqdm'}"
    code = f"import sys, storage, tasks; sys.exit(bool({slow} & set(sys.modules)))"
    assert run_python(code).wait() == 0


# ---------------------------------------------------------------- journals

JOURNAL_ROWS = [{"key": "a", "x": 1}, {"key": "b", "x": "\u2028\n"}, {"key": "c", "x": 4}]


VALUES = [
    "NaN",
    "-Infinity",
    "1e400",
    "-0.0",
    "1" * 40,
    r'"\ud800"',
    r'"\u2028"',
    "[" * 300 + "]" * 300,
]


@pytest.mark.parametrize("value", VALUES)
def test_journal_reads_as_json(tmp_path, value):
    """A value in a journal is what json makes of it."""
    line = f'{{"key": "a", "x": {value}}}\n'
    path = tmp_path / "journal.jsonl"
    path.write_text(line)
    journal = storage.Journal(path)
    journal.close()
    assert repr(journal.rows["a"]) == repr(json.loads(line))


@pytest.fixture
def journal_path(tmp_path):
    """A journal of JOURNAL_ROWS."""
    path = tmp_path / "journal.jsonl"
    journal = storage.Journal(path)
    journal.append([*JOURNAL_ROWS[:2], {"key": "a", "x": 2}])
    journal.append([{"key": "b", "x": 3}, JOURNAL_ROWS[2]])
    journal.close()
    return path


def test_journal_keeps_first_row_of_a_key(journal_path):
    """A journal keeps every row once."""
    assert storage.read_jsonl(journal_path) == JOURNAL_ROWS


def test_journal_torn_anywhere(journal_path):
    """Wherever a kill cuts a journal off, its whole lines are read, and it can go on."""
    whole = journal_path.read_bytes()
    for cut in range(len(whole) + 1):
        journal_path.write_bytes(whole[:cut])
        journal = storage.Journal(journal_path)
        assert list(journal.rows.values()) == JOURNAL_ROWS[: whole[:cut].count(b"\n")]
        journal.append(JOURNAL_ROWS)
        journal.close()
        assert journal_path.read_bytes() == whole


@pytest.mark.parametrize("line", [b'{"key": "b', b"[1]", b'{"x": 1}', b'{"key": [1]}', b"\xff"])
def test_journal_bad_line(journal_path, line):
    """A bad line that is not the last is refused with its number."""
    lines = journal_path.read_bytes().split(b"\n")
    journal_path.write_bytes(b"\n".join([lines[0], line, *lines[2:]]))
    with pytest.raises(UserError, match="line 2"):
        storage.Journal(journal_path)


def test_journal_second_writer(journal_path):
    """A second process is refused while a journal is open, and not after a kill."""
    code = "import storage, sys; j = storage.Journal(sys.argv[1]); print(len(j.rows)); input()"
    command = [sys.executable, "-c", code, str(journal_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout.readline() == "3\n"
        with pytest.raises(UserError, match="is being written by another run"):
            storage.Journal(journal_path)
        process.kill()
    assert len(storage.Journal(journal_path).rows) == 3


def test_journal_full_disk(tmp_path):
    """A full disk leaves a journal without a half line."""
    code = """
import resource, signal, sys, storage
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
journal = storage.Journal(sys.argv[1])
try:
    for i in range(99):
        journal.append([{"key": i}])
except OSError as e:
    print(e, list(journal.rows))
"""
    printed, _ = run_python(code, tmp_path / "j.jsonl").communicate()
    assert "j.jsonl" in printed
    assert printed.endswith(f"{list(range(9))}\n")
    assert list(storage.Journal(tmp_path / "j.jsonl").rows) == list(range(9))


def test_remove_journals_of_one_file(tmp_path):
    """The journals of a file are found by rank and removed, those of other files are left."""
    for name in ("a[1].json.journal-0", "a[1].json.journal-12", "a1.json.journal-0"):
        (tmp_path / name).write_text("")
    path = tmp_path / "a[1].json"
    assert sorted(storage.journal_paths(path)) == [0, 12]
    storage.remove_journals(path)
    assert os.listdir(tmp_path) == ["a1.json.journal-0"]


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name, key",
    [
        ("gpt2", "gpt2"),
        ("google/flan-t5-base", "google_flan-t5-base"),
        ("text-davinci-002", "text-davinci-002"),
        ("ft:gpt-4o:me::id", "ft:gpt-4o:me::id"),
        ("x" * 120, "x" * 120),
    ],
)
def test_safe_key_of_models(name, key):
    """Model names become file names."""
    assert storage.safe_key(name) == key


ESCAPES = ["..", "../x", "a/../../b", "/etc/passwd", "", "a\0b", "x" * 121, ".hidden", "-flag"]
ODD = ["a b", "caf\u00e9", "a\nb", "a\n", "C:\\x", "~/x"]


@pytest.mark.parametrize("name", ESCAPES + ODD)
def test_safe_key_refuses(name):
    """Names that would leave their folder, or are no plain text, are refused."""
    with pytest.raises(UserError, match="cannot be used as a name"):
        storage.safe_key(name)


def test_model_key_of_folders(tmp_path):
    """A folder is called by its last part, the toy student by a name of its own."""
    (tmp_path / "mine").mkdir()
    assert storage.model_key(f"{tmp_path}/mine/") == "mine"
    assert storage.model_key("toy") == "toy_student"
    assert storage.model_key("google/flan-t5-base") == "google_flan-t5-base"


def test_completion_path_is_the_published_one():
    """The paper's archives have these names."""
    path = storage.completion_path("saved", "a/b", "ft_cot", "aqua", "T_x", "E_020")
    folder = Path("saved/completion_data/B_a_b__C_ft_cot")
    assert path == folder / "D_aqua__T_x__E_020.json"


# ---------------------------------------------------------------- locks

HOLD = "import storage, sys, time\nwith storage.file_lock(sys.argv[1]):\n    print(flush=True)\n"


def test_file_lock_second_process(tmp_path):
    """Another process is refused with the path, and not after the holder was killed."""
    path = tmp_path / "folder" / "file.json"
    with run_python(HOLD + "    time.sleep(60)", path) as process:
        assert process.stdout.readline() == "\n"
        started = time.monotonic()
        message = f"^{path} is being written by another run: wait for it, stop it, or write"
        with pytest.raises(UserError, match=message), storage.file_lock(path, timeout=0.2):
            pass
        assert 0.2 <= time.monotonic() - started < 2
        with storage.file_lock(path, wanted=False):
            pass
        process.kill()
    with storage.file_lock(path, timeout=0.2):
        pass
    assert not os.listdir(path.parent)


def test_file_lock_waits(tmp_path):
    """A holder that is done in time is waited for."""
    with run_python(HOLD + "    time.sleep(0.5)", tmp_path / "file") as process:
        assert process.stdout.readline() == "\n"
        with storage.file_lock(tmp_path / "file"):
            assert process.wait() == 0
    assert not os.listdir(tmp_path)


def test_file_lock_is_reentrant(tmp_path):
    """The stages of a process may lock one file, by any path; it stays locked to the end."""
    path = tmp_path / "file"
    with storage.file_lock(path):
        with storage.file_lock(tmp_path / "." / "file"):
            pass
        assert os.listdir(tmp_path) == [".file.lock"]
        assert run_python("import storage, sys\n" + TRY_LOCK, path).wait() == 3
    assert run_python("import storage, sys\n" + TRY_LOCK, path).wait() == 0


TRY_LOCK = """
try:
    with storage.file_lock(sys.argv[1], timeout=0.1):
        pass
except storage.UserError:
    sys.exit(3)
"""
COUNT = """
import sys, storage
from pathlib import Path
path = Path(sys.argv[1])
for _ in range(100):
    with storage.file_lock(path, timeout=60):
        path.write_text(str(int(path.read_text()) + 1))
"""


def test_file_lock_excludes(tmp_path):
    """Of processes that lock and unlock all the time, never two are within the block."""
    path = tmp_path / "count"
    path.write_text("0")
    processes = [run_python(COUNT, path) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert path.read_text() == "300"


# ---------------------------------------------------------------- what libraries raise


class OutOfMemoryError(RuntimeError):
    """Has the name of torch's."""


OUT_OF_MEMORY = [
    (MemoryError(), "MemoryError"),
    (OutOfMemoryError("CUDA out of memory.\n Tried"), "CUDA out of memory. Tried"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "DefaultCPUAllocator"),
]


@pytest.mark.parametrize("error, reason", OUT_OF_MEMORY)
def test_out_of_memory_hint(error, reason):
    """An allocation that fails is one sentence with advice."""
    with pytest.raises(UserError, match=rf"^out of memory at step 3: lower it \({reason}"):
        with storage.out_of_memory_hint(" at step 3: lower it"):
            raise error


def test_out_of_memory_hint_other_errors():
    """Other errors pass."""
    with pytest.raises(RuntimeError, match="^shapes$"), storage.out_of_memory_hint(""):
        raise RuntimeError("shapes")


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        Exception("No space left on device (os error 28)"),
        RuntimeError("[enforce fail] unexpected pos 64 vs 0"),
        RuntimeError("PytorchStreamWriter failed writing file data/0"),
    ],
)
def test_write_errors_names_the_path(error):
    """What libraries raise on a full disk becomes an OSError that names the path."""
    with pytest.raises(OSError, match="folder/x"), storage.write_errors("folder/x"):
        raise error


@pytest.mark.parametrize("error", [ValueError("(os error 28)"), Exception("other"), KeyError("x")])
def test_write_errors_other_errors(error):
    """Other errors pass."""
    with pytest.raises(type(error)) as caught, storage.write_errors("folder/x"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("error", [KeyError("model"), EOFError(), pickle.UnpicklingError("a\nb")])
def test_corrupt_file_errors(error):
    """A damaged file is named with the remedy, in one line."""
    message = r"^x.pt is damaged, or not what it should be \(\w+ .*\): delete it$"
    with pytest.raises(UserError, match=message), storage.corrupt_file_errors("x.pt", "delete it"):
        raise error


# ---------------------------------------------------------------- settings


def test_fingerprint_is_stable():
    """Files of today must be recognized tomorrow: the digits are those of the first version."""
    template = [["{q} ###", " {a}"], "\nTherefore, the answer is"]
    assert storage.fingerprint(template) == "5d5f8d982d70ca04"
    assert storage.fingerprint({"b": 1, "a": 2}) == storage.fingerprint({"a": 2, "b": 1})


def test_settings_match_prints_changes(capsys):
    """The user is told what is skipped and which settings changed."""
    assert storage.settings_match("train", "x", {"lr": 1, "a": 2}, {"a": 2, "lr": 1})
    assert not storage.settings_match("train", "x", {"lr": 1, "a": 2}, {"b": 3, "lr": 1})
    assert not storage.settings_match("train", "x", None, {"b": 3})
    assert capsys.readouterr().out == (
        "train: x is there, made with the same settings: skipped\n"
        "train: settings changed (a 2 -> None, b None -> 3) since x was made\n"
    )


def test_check_settings_names_changes():
    """Only the wanted settings count."""
    storage.check_settings("x", {"lr": 1, "old": 2}, {"lr": 1})
    with pytest.raises(UserError, match=r"x was made with other settings \(lr 1 -> 2\)"):
        storage.check_settings("x", {"lr": 1}, {"lr": 2})


def test_move_to_backup_takes_a_free_name(tmp_path, capsys):
    """Nothing that is kept is replaced."""
    for content in ("1", "2"):
        (tmp_path / "a.json").write_text(content)
        storage.move_to_backup(tmp_path / "a.json")
    assert sorted(os.listdir(tmp_path)) == ["a.json.old1", "a.json.old2"]
    assert (tmp_path / "a.json.old2").read_text() == "2"
    assert f"is kept as {tmp_path}/a.json.old2" in capsys.readouterr().out


def test_prepare_output_dir_of_own_runs(tmp_path):
    """A folder is new, then unfinished, then finished; with other settings it goes to a backup."""
    out = tmp_path / "out"
    settings = {"lr": 1}
    assert storage.prepare_output_dir(out, settings) == "new"
    assert storage.prepare_output_dir(out, settings) == "unfinished"
    storage.write_json(out / "run.json", {"finished": True, "settings": settings})
    assert storage.prepare_output_dir(out, settings) == "finished"
    assert storage.prepare_output_dir(out, {"lr": 2}) == "new"
    kept = storage.read_json(tmp_path / "out.old1" / "run.json")
    assert kept["settings"] == settings


def test_prepare_output_dir_refuses(tmp_path):
    """Neither a folder of something else nor an unfinished run of other settings is touched."""
    out = tmp_path / "out"
    storage.write_atomic(out / "mine.txt", "")
    with pytest.raises(UserError, match="holds no run of this program"):
        storage.prepare_output_dir(out, {"lr": 1})
    storage.write_json(out / "run.json", {"finished": False, "settings": {"lr": 2}})
    storage.write_atomic(out / "checkpoint_00000001.pt", "")
    with pytest.raises(UserError, match="holds an unfinished run with other settings"):
        storage.prepare_output_dir(out, {"lr": 1})


# ---------------------------------------------------------------- data files


def test_read_finetune_data_both_forms(tmp_path):
    """A JSON file and GPT-3's JSON lines give the same lists."""
    columns = {"sample_index": [0, 1], "input": ["a", "\ud800"], "label": ["b", "d"]}
    storage.write_json(tmp_path / "f.json", columns)
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "\ud800", "completion": "d"}]
    storage.write_atomic(tmp_path / "f.jsonl", "\n".join(map(json.dumps, rows)))
    expected = {"sample_index": [0, 1], "input": ["a", "?"], "label": ["b", "d"]}
    assert storage.read_finetune_data(tmp_path / "f.json") == expected
    assert storage.read_finetune_data(tmp_path / "f.jsonl") == expected


CHAT = [{"role": "system", "content": "Add."}, {"role": "user", "content": "2 + 3?"}]
FINETUNE_LINES = [  # what JSON lines may be, and the prompt and label that they give
    ({"prompt": "2 + 3 ###", "completion": " 5"}, "2 + 3 ###", " 5"),
    ({"messages": [*CHAT, {"role": "assistant", "content": "5"}]}, "Add.\n2 + 3?\n", "5"),
]


@pytest.mark.parametrize("line, prompt, label", FINETUNE_LINES)
def test_read_finetune_data_json_lines(tmp_path, line, prompt, label):
    """Ordinary JSON lines are fine-tuning data; samples without a number are numbered."""
    path = tmp_path / "f.jsonl"
    path.write_text(f"{json.dumps(line)}\n" * 2)
    data = storage.read_finetune_data(path)
    assert data == {"sample_index": [0, 1], "input": [prompt] * 2, "label": [label] * 2}


def test_read_finetune_data_keeps_the_numbers_of_json_lines(tmp_path):
    """A sample_index of the user's own is kept."""
    path = tmp_path / "f.jsonl"
    path.write_text('{"prompt": "a", "completion": "b", "sample_index": 7}')
    assert storage.read_finetune_data(path)["sample_index"] == [7]


def test_read_finetune_data_columns_without_numbers(tmp_path):
    """Columns need no sample_index either."""
    (tmp_path / "f.json").write_text('{"input": ["a", "b"], "label": ["c", "d"]}')
    assert storage.read_finetune_data(tmp_path / "f.json")["sample_index"] == [0, 1]


def test_changed_settings_says_hashes_in_words():
    """What is only a hash in settings is named by what it is of."""
    old = {"source": "ab12", "lr": 0.1, "seed": 0}
    new = {"source": "cd34", "lr": 0.2, "seed": 0}
    text = storage.changed_settings(old, new, sorted(new))
    assert text == "lr 0.1 -> 0.2, source (the file it was made from)"


def completion(i: int, k: int, **changes: object) -> dict:
    """A row of a completion file."""
    row = {"sample_index": i, "completion_index": k, "question": "q", "answer": "1"}
    return row | {"completion": " 1"} | changes


def write_dataset(path: Path, rows: dict[str, object], **metadata: object) -> Path:
    """Write a completion file of the task multiarith."""
    content = {"metadata": {"dataset_key": "multiarith", **metadata}, "data": rows}
    storage.write_json(path, content)
    return path


def test_read_completions_in_order(tmp_path):
    """Rows come in order of sample and completion, settings of null count as none."""
    rows = {"10": [completion(10, 1), completion(10, 0)], "9": [completion(9, 0, completion=None)]}
    path = write_dataset(tmp_path / "c.json", rows, settings=None, epoch=None)
    metadata, rows = completions.read_completions(path, "multiarith")
    assert [(row["sample_index"], row["completion_index"]) for row in rows] == [
        (9, 0),
        (10, 0),
        (10, 1),
    ]
    assert metadata == {"dataset_key": "multiarith", "epoch": None}


BAD_ROWS = [  # what stands where the rows of a sample should
    [completion(1, 0, sample_index=True)],
    [completion(1, 0, sample_index=2)],
    [completion(1, 0, completion_index="0")],
    [completion(1, 0, question=None)],
    [completion(1, 0, answer=1)],
    [completion(1, 0, completion=1)],
    [completion(1, 0, reasoning_completion=1)],
    {},
    [1],
    [{"sample_index": 1}],
]


@pytest.mark.parametrize("rows", BAD_ROWS)
def test_read_completions_bad_row(tmp_path, rows):
    """A row that lacks what every completion has is refused with its sample."""
    path = write_dataset(tmp_path / "c.json", {"1": rows})
    with pytest.raises(UserError, match="a completion of sample 1 lacks"):
        completions.read_completions(path)


def test_read_completions_twice(tmp_path):
    """A completion that is there twice would count twice."""
    rows = {"1": [completion(1, 0), completion(1, 1), completion(1, 0)]}
    with pytest.raises(UserError, match="completion 0 of sample 1 is there twice"):
        completions.read_completions(write_dataset(tmp_path / "c.json", rows))


METADATA_ERRORS = [
    ({"dataset_key": 1}, "dataset_key in its metadata is 1"),
    ({"epoch": True}, "epoch in its metadata is true"),
    ({"settings": []}, r"settings in its metadata is \[\]"),
    ({"validation": "x"}, 'validation in its metadata is "x"'),
    ({"prediction_template": 3}, "prediction_template in its metadata is 3"),
    ({"prediction_template": ["zs"]}, "prediction_template in its metadata is"),
    ({"epoch": "3"}, "epoch in its metadata is"),
    ({"dataset_key": ["toy"]}, "dataset_key in its metadata is"),
    ({"dataset_key": "aqua"}, "holds completions of the task aqua, not multiarith"),
]


@pytest.mark.parametrize("metadata, message", METADATA_ERRORS)
def test_read_completions_metadata(tmp_path, metadata, message):
    """Metadata of the wrong type, or of another task, is refused."""
    path = write_dataset(tmp_path / "c.json", {}, **metadata)
    with pytest.raises(UserError, match=message):
        completions.read_completions(path, "multiarith")


def test_write_completions_keeps_what_was_there(tmp_path, capsys):
    """Completions made with other settings go to a backup, and the journals go."""
    path = tmp_path / "c.json"
    (tmp_path / "c.json.journal-0").write_text("")
    assert not completions.completions_match("sample", path, "toy", {"seed": 1})
    for seed in (1, 2):
        metadata = {"dataset_key": "toy", "settings": {"seed": seed}}
        completions.write_completions(path, metadata, {"1": [completion(1, 0)]})
    assert sorted(os.listdir(tmp_path)) == ["c.json", "c.json.old1"]
    assert completions.completions_match("sample", path, "toy", {"seed": 2})
    assert not completions.completions_match("sample", path, "toy", {"seed": 1})
    assert "settings changed (seed 2 -> 1)" in capsys.readouterr().out


def test_read_prompts_limits(tmp_path):
    """A line may have a limit of its own."""
    text = '{"prompt": "a", "max_new_tokens": 3, "id": 7}\n{"prompt": "b"}\n'
    (tmp_path / "p.jsonl").write_text(text)
    rows, prompts, limits = storage.read_prompts(tmp_path / "p.jsonl", 9)
    assert (rows[0]["id"], prompts, limits) == (7, ["a", "b"], [3, 9])


def read_prompts(path: Path) -> tuple:
    return storage.read_prompts(path, 9)


NO_REPLY = b'{"messages": [{"role": "user", "content": "a"}]}'
NO_DATA = b'{"metadata": {"dataset_key": "toy"}, "data": []}'
NO_FINETUNE = "is not a fine-tuning file"
NO_COMPLETIONS = r'c\.json is not a completion file, {"metadata"'
REFUSED = [  # what reads a file, its name and content, what is said
    (storage.read_json, "f.json", b'{"a": 1', r"f\.json.*not valid JSON"),
    (storage.read_json, "f.json", b"", r"f\.json.*not valid JSON"),
    (storage.read_json, "f.json", b"[" * 100_000, r"f\.json.*not valid JSON"),
    (storage.read_json, "f.json", b"\xff\xfe\x00", r"f\.json.*not UTF-8"),
    (storage.read_json, "f.json", b'{"a": {"b": 1, "b": 2}}', r"f\.json.*'b' is there twice"),
    (storage.read_json, "f.json", b"[1]", r"f\.json.*holds a JSON list, not an object"),
    (storage.read_jsonl, "f.jsonl", b'{"a": 1}\n{"a": \n', r"f\.jsonl, line 2 is not valid JSON"),
    (storage.read_finetune_data, "f.jsonl", NO_REPLY, "row 1 needs"),
    (storage.read_finetune_data, "f.jsonl", b'{"messages": [1, 2]}', "row 1 needs"),
    (storage.read_finetune_data, "f.json", b'{"input": ["a"]}', NO_FINETUNE),
    (storage.read_finetune_data, "f.json", b'{"input": ["a"], "label": []}', NO_FINETUNE),
    (storage.read_finetune_data, "f.json", b'{"input": [1], "label": ["a"]}', NO_FINETUNE),
    (storage.read_finetune_data, "f.json", b'{"input": [], "label": []}', "holds no sample"),
    (storage.read_finetune_data, "f.jsonl", b'{"prompt": "", "completion": ""}\n[]', NO_FINETUNE),
    (storage.read_finetune_data, "f.jsonl", b"", "holds no sample"),
    (completions.read_completions, "c.json", b'{"data": {}}', NO_COMPLETIONS),
    (completions.read_completions, "c.json", b'{"metadata": {}, "data": {}}', NO_COMPLETIONS),
    (completions.read_completions, "c.json", b"{}", NO_COMPLETIONS),
    (completions.read_completions, "c.json", NO_DATA, NO_COMPLETIONS),
    (read_prompts, "p.jsonl", b"[]", "row 1: it needs"),
    (read_prompts, "p.jsonl", b"{}", "row 1: it needs"),
    (read_prompts, "p.jsonl", b'{"prompt": 3}', "row 1: it needs"),
]
for limit in (b"0", b"true", b"null", b"1.5", b'"3"'):
    rows = b'{"prompt": "a"}\n{"prompt": "b", "max_new_tokens": %b}' % limit
    REFUSED.append((read_prompts, "p.jsonl", rows, "row 2: it needs"))


@pytest.mark.parametrize("read, name, content, message", REFUSED)
def test_readers_refuse(tmp_path, read, name, content, message):
    """What is malformed, another file or empty is refused in a sentence that names it."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


# ---------------------------------------------------------------- progress


def test_progress_without_a_terminal(capsys, monkeypatch):
    """A line every ten seconds, and all items."""
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    assert list(terminal.progress(iter("abcde"), "sample", total=5)) == list("abcde")
    assert capsys.readouterr().err == "sample: 1 of 5, 12 s\nsample: 3 of 5, 24 s\n"
    assert list(terminal.progress("abcde", "sample", show=False)) == list("abcde")
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- files of an older version

OLD_FILES = json.loads((ROOT / "tests" / "old_files.json").read_text())
OLD_FLAGS = "--method ft_cot --epochs 1 --degree 1 --max_new_tokens 4 --temperature 0".split()
NOWHERE = "--base_url http://127.0.0.1:9/v1 --teacher gpt-test --teacher_method zs_cot".split()
NEEDS_EXTRAS = pytest.mark.skipif(not (ROOT / "extras").exists(), reason="extras/ is not here")
CURATE_CHAT = "--stage curate --label_style chat --rules flexible".split()
TEACHER_FILE = "completion_data/B_gpt-test__C_zs_cot/D_toy.json"


@pytest.fixture
def old_saved(tmp_path, monkeypatch):
    """What the version before the files moved wrote for 4 toy samples, less the weights."""
    monkeypatch.setitem(tasks.TASKS, "toy", tasks.TASKS["toy"]._replace(n=4, train=3, test=1))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")
    for name, text in OLD_FILES.items():
        storage.write_atomic(tmp_path / name, text)
    return tmp_path


def texts_below(folder: Path) -> dict[str, str]:
    """Return {path: text} of all files."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_text() for path in files}


@pytest.mark.parametrize("flags", [["--stage", "sample"], ["--stage", "sample", *NOWHERE]])
def test_old_files_are_current(old_saved, flags, capsys):
    """A teacher's file is found with the settings it was made with, and all is left as it is."""
    finetune_cot.main([*OLD_FLAGS, "--saved", str(old_saved), *flags])
    assert "is there, made with the same settings: skipped" in capsys.readouterr().out
    assert texts_below(old_saved) == OLD_FILES


@pytest.mark.parametrize(
    "flags",
    [
        ["--stage", "curate"],
        ["--stage", "curate", "--method", "ft"],
        pytest.param(CURATE_CHAT, marks=NEEDS_EXTRAS),
    ],
)
def test_old_curated_files_are_made_again(old_saved, flags, capsys):
    """They do not say which code chose their samples, so it chooses anew: here, the same bytes."""
    finetune_cot.main([*OLD_FLAGS, "--saved", str(old_saved), *flags])
    assert (
        "settings changed (code (the code that chooses and writes samples))"
        in capsys.readouterr().out
    )
    texts = texts_below(old_saved)
    assert texts.keys() == OLD_FILES.keys()
    changed = [name for name in texts if texts[name] != OLD_FILES[name]]
    assert [name.endswith(".made_from.json") for name in changed] == [True]


def test_old_journal_is_read(old_saved):
    """The completion file of an API teacher is made from its journal again, without a request."""
    (old_saved / TEACHER_FILE).unlink()
    finetune_cot.main([*OLD_FLAGS, "--saved", str(old_saved), "--stage", "sample", *NOWHERE])
    made = json.loads((old_saved / TEACHER_FILE).read_text())
    assert made["data"] == json.loads(OLD_FILES[TEACHER_FILE])["data"]


@pytest.mark.parametrize("name", [name for name in OLD_FILES if "__T_" in name and "B_" in name])
def test_old_files_of_students_are_read(old_saved, name):
    """Completions are scored, a finished run is finished, metadata of a job are an object."""
    path = old_saved / name
    if name.startswith("completion_data") and name.endswith(".json"):
        assert evaluate.score(path, "test")["n"] == 1
    elif name.endswith("run.json"):
        settings = storage.read_json(path)["settings"]
        assert storage.prepare_output_dir(path.parent, settings) == "finished"
    elif name.endswith(".jsonl"):
        assert len(storage.Journal(path).rows) == 1
    else:
        assert storage.read_json(path)["model"] == "ft:gpt-small:x"


@pytest.mark.parametrize("name", [n for n in OLD_FILES if "/P_" in n and "made" not in n])
def test_old_finetune_files_are_read(old_saved, name):
    """Fine-tuning files of open and of API students are read."""
    if name.endswith("_chat.jsonl"):
        assert [len(row["messages"]) for row in storage.read_jsonl(old_saved / name)] == [2, 2]
    else:
        data = storage.read_finetune_data(old_saved / name)
        assert len(data["input"]) == len(data["label"]) >= 2
