"""Files that are damaged anywhere are read or refused with one sentence: no traceback, no hang, no
wrong score.  The damage comes from a generator of its own, with fixed seeds.

python -m pytest tests/test_broken_input.py           # a short form, seconds
python -m pytest tests/test_broken_input.py --slow    # more than 10,000 cases, and files of 10 MB
"""

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, amount, timed

import completions
import evaluate
import finetune_cot
import storage
import tasks
import terminal
from storage import UserError

QUESTIONS = [
    {"sample_index": i, "question": f"What is {i} + 1? \u2028", "answer": str(i + 1)}
    for i in range(6)
]
RUN = {"finished": True, "settings": {"lr": 1.0, "epochs": 3}}
OLD_FILES = json.loads((ROOT / "tests" / "old_files.json").read_text())
JOURNAL = "completion_data/B_gpt-test__C_zs_cot/D_toy.journal.jsonl"
COMPLETIONS = "completion_data/B_m__C_zs_cot/D_multiarith.json"


def completion_content() -> dict:
    """A completion file of two rationales a question, the first of them right."""
    data = {}
    for q in QUESTIONS:
        row = {**q, "prompt": "Q", "finish_reason": "stop", "reasoning_completion": "so"}
        rows = []
        for k in range(2):
            completion = f" r --> {q['sample_index'] + 1 + k}"
            rows.append({**row, "completion_index": k, "completion": completion, "api": "chat"})
        data[str(q["sample_index"])] = rows
    metadata = {
        "dataset_key": "multiarith",
        "base_model": "m",
        "completion_key": "zs_cot",
        "train_key": "ft_cot",
        "epoch": 3,
        "prediction_template": "ft_cot_token",
        "settings": {"api": "chat", "missing": 0},
    }
    return {"metadata": metadata, "data": data}


# ---------------------------------------------------------------- what reads a file


def curate(saved: Path, *flags: object) -> storage.FinetuneData:
    """Curate by the command line; return the fine-tuning data.  Raises UserError."""
    usual = ["--stage", "curate", "--method", "ft_cot", "--temperature", 0, "--data", saved]
    student = ["--student", "gpt2", "--saved", saved]
    try:
        finetune_cot.main([*map(str, [*usual, *student, *flags])])
    except SystemExit as e:
        raise UserError(str(e.code)) from None
    files = (saved / "finetune_data" / "P_decoder").glob("F_*.json")
    [path] = [path for path in files if "made_from" not in path.name]
    return storage.read_finetune_data(path)


def read_scores(path: Path) -> dict:
    """Score a completion file and curate from it; return the score."""
    score = evaluate.score(path, "all", data_dir=path.parents[2], allow_partial=True)
    flags = ["--task", "multiarith", "--degree", 2, "--teacher", "m", "--rules", "paper"]
    answers = {q["question"].strip(): q["answer"] for q in QUESTIONS}
    kept = curate(path.parents[2], *flags)
    for question, label in zip(kept["input"], kept["label"], strict=True):
        assert label.endswith(f"--> {answers[question.removesuffix(' ###')]}")
    return score


def read_journal(path: Path) -> int:
    """Curate from a journal; return how many of the 4 completions it lacks."""
    published = path.with_name("D_toy.json")
    published.unlink(missing_ok=True)
    nowhere = ["--base_url", "http://127.0.0.1:9/v1", "--teacher", "gpt-test"]
    try:
        curate(path.parents[2], *nowhere, "--degree", 1, "--rules", "flexible")
    except UserError as e:
        if "no correct rationale is left" not in str(e):
            raise
    return completions.read_completions(published)[0]["settings"]["missing"]


def read_split(path: Path) -> list:
    """Read a split in both ways."""
    names = ("default", "few_shot_2")
    return [tasks.load_split("multiarith", name, path.parents[1]) for name in names]


def read_run(path: Path) -> str:
    """Ready the folder of a finished run."""
    return storage.prepare_output_dir(path.parent, RUN["settings"])


FINETUNE_DATA = {"sample_index": [0, 1], "input": ["a ###", "b ###"], "label": [" c", " d"]}
READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {  # file: (its text, what reads it)
    COMPLETIONS: (json.dumps(completion_content(), indent=1), read_scores),
    "finetune.json": (json.dumps(FINETUNE_DATA), storage.read_finetune_data),
    "finetune.jsonl": ('{"prompt": "a", "completion": " b END"}\n' * 3, storage.read_finetune_data),
    JOURNAL: (OLD_FILES[JOURNAL], read_journal),
    "dataset/multiarith.json": (
        json.dumps({"metadata": {"dataset_key": "multiarith"}, "data": QUESTIONS}),
        lambda path: tasks.load("multiarith", path.parents[1]),
    ),
    "split/multiarith__default.json": ('{"train": [0, 1, 2], "test": [3, 4, 5]}', read_split),
    "few_shot_cot_prompts.json": (
        '{"multiarith": {"prompt": "Q: 1\\nA: 1"}}',
        lambda path: completions.few_shot_prompt("multiarith", path.parent),
    ),
    "prompts.jsonl": (
        '{"prompt": "a", "max_new_tokens": 3}\n{"prompt": "b"}\n',
        lambda path: storage.read_prompts(path, 9),
    ),
    "run/run.json": (json.dumps(RUN), read_run),
}

# ---------------------------------------------------------------- damage

RAW = [  # what a JSON value is replaced by
    *("null", "true", "false", "-1", "0.5", "1e999", "-1e999", "NaN", "7", "9" * 5000, "9" * 300),
    *("[]", "{}", '""', '"x"', '["a"]', '{"a": 1}', '"7"', '".."', '"/etc/passwd"'),
    *('"\\ud800"', '"\\u0000"', '"\\ud83d\\ude00"', '"\u2028\u0085"', f'"{"y " * 20_000}"'),
    *("[" * 500 + "]" * 500, '{"a":' * 300 + "1" + "}" * 300),
]
INSERTED = [
    *(b"\0", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r\n", b"\n", b"\xff\xfe"),
    *(b"{", b"}", b'"', b"\\", b","),
]
DEPTHS = [50, 200, 900, 940, 960, 975, 985, 990, 995, 1000, 20_000]
NEW_KEYS = ["", "\0", "x" * 9999, "-1", "\ud800", "True"]


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the path of every place in a JSON value."""
    yield path
    items = []
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        yield from places(inner, (*path, key))


def replace_value(box: Any, key: Any, chance: random.Random) -> None:
    """Mark one value of a JSON object or list for replacement, or remove, rename or double it."""
    how = chance.choice(["replace", "replace", "replace", "remove", "rename", "double"])
    if how == "remove":
        del box[key]
    elif how == "rename" and isinstance(box, dict):
        box[chance.choice(NEW_KEYS)] = box.pop(key)
    elif how == "double" and isinstance(box, list):
        box.append(box[key])
    else:
        box[key] = "@@"


def spoil_value(chance: random.Random, text: str) -> bytes:
    """Change one JSON value somewhere in the text."""
    lines = [text]
    if "\n{" in text:
        lines = text.rstrip().split("\n")
    at = chance.randrange(len(lines))
    value = box = {"": json.loads(lines[at])}
    *path, last = ("", *chance.choice(list(places(value[""]))))
    for key in path:
        box = box[key]
    replace_value(box, last, chance)
    raw = chance.choice(RAW)
    if chance.random() < 0.1:
        depth = chance.choice(DEPTHS)
        raw = "[" * depth + "]" * depth
    lines[at] = json.dumps(value.get("")).replace('"@@"', raw)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def spoil_bytes(chance: random.Random, text: str) -> bytes:
    """Change, insert, remove or recode bytes."""
    content = bytearray(text.encode())
    at = chance.randrange(len(content))
    how = chance.choice(
        ["change", "change", "change", "noise", "insert", "remove", "recode", "other"]
    )
    if how == "change":
        for _ in range(chance.randrange(1, 9)):
            content[chance.randrange(len(content))] = chance.randrange(256)
    elif how == "noise":
        content[at:at] = chance.randbytes(chance.randrange(1, 30))
    elif how == "insert":
        content[at:at] = chance.choice(INSERTED)
    elif how == "remove":
        del content[at : at + chance.randrange(1, 40)]
    elif how == "other":
        return chance.randbytes(chance.randrange(200))
    else:
        marked = b"\xef\xbb\xbf" + content
        recoded = text.encode("utf-16")
        windows = content.replace(b"\n", b"\r\n")
        return bytes(chance.choice([marked, windows, content * 2, content + b"\n\n\n", recoded]))
    return bytes(content)


def spoil(chance: random.Random, text: str) -> bytes:
    """Damage a file in one of both ways."""
    if chance.random() < 0.6:
        return spoil_value(chance, text)
    return spoil_bytes(chance, text)


# ---------------------------------------------------------------- tests


@pytest.fixture
def folder(tmp_path, monkeypatch, capsys) -> Iterator[Path]:
    """A folder with all files, whole, and two small tasks."""
    small = {"multiarith": (6, 3, 3), "toy": (4, 3, 1)}
    for key, (n, train, test) in small.items():
        row = tasks.TASKS[key]._replace(n=n, train=train, test=test)
        monkeypatch.setitem(tasks.TASKS, key, row)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")
    for name, (text, _) in READERS.items():
        storage.write_atomic(tmp_path / name, text)
    yield tmp_path
    capsys.readouterr()


def try_to_read(folder: Path, name: str, content: bytes) -> Any:
    """Return what the reader gives, or None where it refused with one sentence.

    Anything else that it raises fails the test.
    """
    terminal.escape_unencodable_output()  # as the command lines do
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    try:
        return timed(READERS[name][1], path)
    except (UserError, OSError) as e:
        assert "\n" not in str(e), str(e)[:300]
        assert len(str(e)) < 1000
        return None


def count_right(content: bytes) -> tuple[int, int]:
    """Return (completions, right ones) by plain code: what ft_cot_token's first number says."""
    data = json.loads(content.decode("utf-8-sig"))["data"]
    rows = [row for rows in data.values() for row in rows]
    right = 0
    for row in rows:
        before, arrow, after = (row["completion"] or "").replace(",", "").partition("-->")
        numbers = re.findall(r"-?\d+(?:\.\d+)?", after)[:1]
        if not arrow:
            numbers = re.findall(r"-?\d+(?:\.\d+)?", before)[-1:]
        right += numbers == [QUESTIONS[row["sample_index"]]["answer"]]
    return len(rows), right


@pytest.mark.parametrize("name", READERS)
@amount(150, 1_500)
def test_spoilt_files(name, cases, folder):
    """Spoilt files are read or refused with one sentence, and what is scored is scored right."""
    whole = READERS[name][0]
    assert try_to_read(folder, name, whole.encode()) is not None
    refused = 0
    for i in range(cases):
        content = spoil(random.Random(f"{name} {i}"), whole)
        got = try_to_read(folder, name, content)
        refused += got is None
        if name == COMPLETIONS and got and got["template"] == "ft_cot_token":
            assert (got["n"], got["correct"]) == count_right(content), content
    assert refused > cases / 4


@pytest.mark.parametrize("name", READERS)
def test_files_cut_off_anywhere(name, folder):
    """A file that is cut off is refused; of JSON lines and journals the whole lines may be read."""
    whole = READERS[name][0].encode()
    step = 1 + 6 * (len(whole) > 1500)
    for end in range(0, len(whole.rstrip()), step):
        got = try_to_read(folder, name, whole[:end])
        assert got is None or name.endswith(".jsonl"), end
        finished = whole[:end].count(b"\n") - 4  # first step 1 of all four
        if name == JOURNAL and finished > 0:
            assert got == 4 - finished


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_lines_of_ten_megabytes(name, folder):
    """A line of ten megabytes is read or refused within two seconds."""
    whole = READERS[name][0].encode()
    for filler in (b"x", b"[", b'{"a":', b"\0", b" ", b"1,", b"\n", b'"'):
        long = filler * (10_000_000 // len(filler))
        for content in (long, whole + long, whole[:-9] + long + whole[-9:]):
            try_to_read(folder, name, content)


UNKNOWN_TASK = {"metadata": {"dataset_key": "no_task"}, "data": {}}


def test_score_of_an_unknown_task(folder):
    """A completion file of an unknown task is refused by name, with those that are known."""
    storage.write_json(folder / "c.json", UNKNOWN_TASK)
    with pytest.raises(SystemExit, match="^error: there is no task 'no_task'.*choose from"):
        evaluate.main(["score", str(folder / "c.json")])
