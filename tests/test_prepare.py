"""data/prepare.py: what it builds, and what it does when something is wrong.

    python -m pytest tests/test_prepare.py

No network: the one function that touches it is replaced.  The tests against the real benchmark
files need a folder with mirror/ (the raw files, as for --mirror) and dataset_SHA256SUMS, named by
the environment variable FINETUNE_COT_SHARED.
"""

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT

import evaluate
import storage
import tasks
from data import prepare

SHARED = os.environ.get("FINETUNE_COT_SHARED")
needs_mirror = pytest.mark.skipif(
    not SHARED, reason="FINETUNE_COT_SHARED is not set: no raw benchmark files to build from"
)

IN_MIRROR = [
    key for key in prepare.RECIPES if key != "aqua"
]  # aqua's train file is too big for a mirror


def digest(content: bytes) -> str:
    """Return the SHA-256 of some bytes."""
    return hashlib.sha256(content).hexdigest()


def known_sums(name: str) -> dict[str, str]:
    """Return {path: SHA-256} of a file as sha256sum writes it."""
    lines = (Path(SHARED) / name).read_text().splitlines()
    return {path: known for known, path in map(str.split, lines)}


def files_under(folder: Path) -> list[str]:
    """Return the paths of all files, sorted."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(str(path.relative_to(folder)) for path in files)


# ---------------------------------------------------------------- three small tasks and a server

TURNS = [(f"Tails up, turned {i} times. Tails now?", ["yes", "no"][i % 2]) for i in range(10)]
EXAMPLES = [{"question": question, "answer": answer} for question, answer in TURNS]
COINS = json.dumps({"examples": EXAMPLES}).encode()
PLUMS = [(f"{i} plums and one more ?", f"{i + 1}.0") for i in range(10)]
RAW_SUMS = [{"sQuestion": f" {text} ", "lSolutions": [float(sum)]} for text, sum in PLUMS]
SUMS = json.dumps(RAW_SUMS).encode()
PROMPTS = b'{"coin_flip": {"prompt": "Q: ...\\nA: ..."}}'
AQUA_ROW = {"options": ["A)1", "B) 2 ", "C)x)", "D)4", "E)none"], "correct": "B"}
AQUA_TRAIN = b""
for i in range(3):
    aqua_row = AQUA_ROW | {"question": f" Half of {i}? ", "rationale": f" It is {i}/2.\n"}
    AQUA_TRAIN += json.dumps(aqua_row).encode() + b"\n"
AQUA_TEST = AQUA_TRAIN[: AQUA_TRAIN.index(b"\n") + 1] * 2
RAW = {
    "me/coins/c0ffee/coins.json": COINS,
    "me/sums/c0ffee/sums.json": SUMS,
    "me/prompts/c0ffee/prompts.json": PROMPTS,
    "me/aqua/c0ffee/train.json": AQUA_TRAIN,
    "me/aqua/c0ffee/test.json": AQUA_TEST,
}


def built(key: str, rows: list[tuple[str, str]]) -> bytes:
    """Return the bytes of a dataset."""
    data = []
    for i, (question, answer) in enumerate(rows):
        data.append({"sample_index": i, "question": question, "answer": answer})
    return json.dumps({"metadata": {"dataset_key": key}, "data": data}, indent=4).encode()


COINS_BUILT = built("coin_flip", TURNS)
SUMS_BUILT = built("single_eq", PLUMS)


@pytest.fixture
def world(monkeypatch) -> None:
    """Put our own small files into the tables of prepare.py and tasks.py."""

    def file(name: str, **more: int) -> prepare.File:
        """Find the raw file whose path ends in name."""
        path = next(path for path in RAW if path.endswith(name))
        return prepare.File(path, None if more else digest(RAW[path]), **more)

    aqua_files = [file("aqua/c0ffee/train.json", lines=3), file("aqua/c0ffee/test.json")]
    changes = {
        "single_eq": {"sha256": digest(SUMS_BUILT), "raw": [file("sums.json")]},
        "coin_flip": {"sha256": digest(COINS_BUILT), "raw": [file("coins.json")]},
        "aqua": {"raw": aqua_files, "lines": 7 + 6 * 5},
    }
    recipes = {key: prepare.RECIPES[key]._replace(**new) for key, new in changes.items()}
    monkeypatch.setattr(prepare, "PROMPTS", file("prompts.json"))
    monkeypatch.setattr(prepare, "RECIPES", recipes)
    for key, n, train, test in ("single_eq", 10, 7, 3), ("coin_flip", 10, 7, 3), ("aqua", 5, 2, 2):
        row = tasks.TASKS[key]._replace(n=n, train=train, test=test)
        monkeypatch.setitem(tasks.TASKS, key, row)


@pytest.fixture
def mirror(world, tmp_path) -> Path:
    """A mirror with all raw files."""
    for path, content in RAW.items():
        storage.write_atomic(tmp_path / "mirror" / path, content)
    return tmp_path / "mirror"


class Reply(io.BytesIO):
    """A response that may announce more than it gives, and raise `then` after its last byte."""

    def __init__(
        self, content: bytes, announced: int, status: int, then: BaseException | None = None
    ) -> None:
        super().__init__(content)
        self.headers = {"Content-Length": str(announced)}
        self.status = status
        self.then = then

    def read(self, size: int = -1) -> bytes:
        """Read, and at the end raise."""
        chunk = super().read(size)
        if not chunk and self.then:
            raise self.then
        return chunk


@pytest.fixture
def server(world, monkeypatch) -> dict:
    """What steers a server, and the list of (file name, first byte) that it was asked for."""
    state = {"cut": None, "then": None, "ranges": True, "files": dict(RAW), "asked": []}

    def open_url(url: str, start: int) -> Reply:
        """Reply as the test wants it."""
        path = url.removeprefix(prepare.HOST)
        content = state["files"][path]
        state["asked"].append((path.split("/")[-1], start))
        if start and state["ranges"] and start >= len(content):
            raise urllib.error.HTTPError(url, 416, "Range Not Satisfiable", {}, None)
        rest = content[start:] if state["ranges"] else content
        sent = rest[: state["cut"]]
        return Reply(sent, len(rest), 206 if state["ranges"] else 200, state["then"])

    monkeypatch.setattr(prepare, "open_url", open_url)
    return state


def run(out: Path, *arguments: str) -> int:
    """Run the command line; return its exit status."""
    return prepare.main([*arguments, "--out", str(out)])


@pytest.fixture
def from_mirror(mirror, tmp_path):
    """Return a function: tasks -> exit status of preparing them in tmp_path/out."""
    return lambda *keys: run(tmp_path / "out", *keys, "--mirror", str(mirror))


def error_of(capsys) -> str:
    """Return the one line that stderr holds besides notes about downloads."""
    lines = capsys.readouterr().err.splitlines()
    [error] = [line for line in lines if not line.startswith("downloading ")]
    assert error.startswith("error: ")
    return error


# ---------------------------------------------------------------- the real benchmarks


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder with all benchmarks that the mirror holds."""
    out = tmp_path_factory.mktemp("data")
    assert run(out, *IN_MIRROR, "--mirror", str(Path(SHARED) / "mirror")) == 0
    return out


@needs_mirror
@pytest.mark.parametrize("key", IN_MIRROR)
def test_prepare_dataset_sum(prepared, key):
    """Built dataset has the published sum."""
    content = (prepared / "dataset" / f"{key}.json").read_bytes()
    assert digest(content) == known_sums("dataset_SHA256SUMS")[f"{key}.json"]


@needs_mirror
def test_recipes_sums():
    """Every sum of the table is the known one."""
    files = [prepare.PROMPTS]
    for recipe in prepare.RECIPES.values():
        files += [*recipe.raw, recipe.template]
    listed = {file.path: file.sha256 for file in files if file and file.sha256}
    assert listed == known_sums("mirror/SHA256SUMS")
    built_sums = known_sums("dataset_SHA256SUMS")
    for key in IN_MIRROR:
        assert prepare.RECIPES[key].sha256 == built_sums[f"{key}.json"]


@needs_mirror
@pytest.mark.parametrize("key", IN_MIRROR)
def test_prepare_split_sizes(prepared, key):
    """Default split file has the published sizes, those of TASKS."""
    split = json.loads((prepared / "split" / f"{key}__default.json").read_text())
    row = tasks.TASKS[key]
    assert {part: len(indices) for part, indices in split.items()} == {
        "train": row.train,
        "test": row.test,
    }
    assert sorted(split["train"] + split["test"]) == list(range(row.n))


@needs_mirror
@pytest.mark.parametrize(
    "key, train, test", [("multiarith", 413, 187), ("date_understanding", 261, 108)]
)
def test_prepare_template_split(prepared, key, train, test):
    """Template split is the published file."""
    content = (prepared / "split" / f"{key}__template.json").read_bytes()
    assert digest(content) == known_sums("mirror/SHA256SUMS")[prepare.RECIPES[key].template.path]
    assert [len(json.loads(content)[part]) for part in ("train", "test")] == [train, test]


@needs_mirror
def test_prepare_few_shot_prompts(prepared):
    """Few-shot prompts are copied verbatim."""
    content = (prepared / "few_shot_cot_prompts.json").read_bytes()
    assert digest(content) == known_sums("mirror/SHA256SUMS")[prepare.PROMPTS.path]


@needs_mirror
def test_prepare_writes_nothing_else(prepared):
    """Nothing else is written and all of it loads."""
    expected = ["few_shot_cot_prompts.json"]
    expected += ["split/date_understanding__template.json", "split/multiarith__template.json"]
    for key in IN_MIRROR:
        expected += [f"dataset/{key}.json", f"split/{key}__default.json"]
        assert len(tasks.load(key, prepared)) == tasks.TASKS[key].n
    assert files_under(prepared) == sorted(expected)


@needs_mirror
def test_aqua_real_test_part():
    """Real AQuA test part converts."""
    recipe = prepare.RECIPES["aqua"]
    rows = recipe.read((Path(SHARED) / "mirror" / recipe.raw[1].path).read_text(encoding="utf-8"))
    converted = [recipe.convert(row) for row in rows]
    assert len(converted) == 254
    assert all(f" ({letter}) " in question for question, _, _ in converted for letter in "ABCDE")
    assert {answer for _, answer, _ in converted} == set("ABCDE")
    assert all(rationale == rationale.strip() != "" for _, _, rationale in converted)


def test_recipes_cover_all_tasks():
    """Every benchmark of tasks.py has a recipe."""
    assert len(prepare.RECIPES) == 12
    assert set(prepare.RECIPES) <= set(tasks.TASKS)
    # what json.dumps(..., indent=4) makes of its samples
    assert prepare.RECIPES["aqua"].lines == 7 + 6 * tasks.TASKS["aqua"].n


# ---------------------------------------------------------------- converters


def test_build_aqua(from_mirror, tmp_path):
    """AQuA puts train before test and keeps rationales."""
    assert from_mirror("aqua") == 0
    data = tasks.load("aqua", tmp_path / "out")
    assert data[1] == {
        "sample_index": 1,
        "question": "Half of 1? Answer choices: (A) 1, (B) 2, (C) x), (D) 4, (E) none.",
        "answer": "B",
        "rationale": "It is 1/2.",
    }
    assert [sample["sample_index"] for sample in data] == list(range(5))
    assert data[3]["question"] == data[0]["question"]
    train, test = tasks.load_split("aqua", data_dir=tmp_path / "out")
    assert len(train) == 2
    assert set(train) < {0, 1, 2}
    assert test == [3, 4]


def test_with_choices():
    """Choices are lettered stripped and closed by a point."""
    assert (
        prepare.with_choices("Warm?", [" tea", "ice "]) == "Warm? Answer choices: (A) tea, (B) ice."
    )


def test_which_is_true():
    """A choice loses one point at its end and the input is kept."""
    row = {"input": "Who waves? ", "target_scores": {"Ann.": 0, "Ben..": 1}}
    assert prepare.which_is_true(row) == (
        "Who waves? \nWhich choice is true? Answer choices: (A) Ann, (B) Ben..",
        "B",
    )


def test_shuffled_dates():
    """Dates are shuffled by one state for all rows."""
    rows = [{"input": " When? ", "target_scores": {"mon": 1, "tue": 0, "wed": 0}}] * 2
    shuffled = prepare.shuffled_dates(json.dumps({"examples": rows}))
    # RandomState(0).permutation(3) is [2, 1, 0], then [2, 0, 1]: j goes to place permutation[j]
    assert [list(row["target_scores"]) for row in shuffled] == [
        ["wed", "tue", "mon"],
        ["tue", "wed", "mon"],
    ]
    assert shuffled[0]["input"] == "When?"
    assert prepare.which_is_true(shuffled[0])[1] == "C"


def test_strategy_qa():
    """Strategy rationale begins after the answer."""
    row = {
        "input": " Do owls knit? ",
        "target": "No. Owls have no hands. They hunt.",
        "target_scores": {"Yes": 0, "No": 1},
    }
    assert prepare.strategy_qa(row) == ("Do owls knit?", "No", "Owls have no hands. They hunt.")


def test_recipe_of_gsm8k():
    """GSM8K answer keeps its commas."""
    assert prepare.RECIPES["gsm8k"].convert(
        {"question": "How many?", "answer": "500 * 3\n#### 1,500"}
    ) == ("How many?", "1,500")


def test_json_lines():
    """Json lines may hold a line separator character."""
    assert prepare.json_lines('{"a": "x\u2028y"}\n\n{"a": "z"}\n') == [
        {"a": "x\u2028y"},
        {"a": "z"},
    ]


# ---------------------------------------------------------------- mirror


def test_mirror_without_network(from_mirror, tmp_path, monkeypatch):
    """Mirror is read without network and not copied."""
    monkeypatch.setattr(prepare, "open_url", None)
    assert from_mirror() == 0
    assert (tmp_path / "out/dataset/coin_flip.json").read_bytes() == COINS_BUILT
    assert not (tmp_path / "out/raw").exists()


def test_mirror_wrong_sum(from_mirror, mirror, tmp_path, capsys):
    """Wrong sum in the mirror names the file and the other task is prepared."""
    path = mirror / "me/sums/c0ffee/sums.json"
    path.write_bytes(SUMS + b" ")
    assert from_mirror("single_eq", "coin_flip") == 1
    error = error_of(capsys)
    assert str(path) in error
    assert digest(SUMS) in error
    assert f"replace it by {prepare.HOST}me/sums" in error
    assert files_under(tmp_path / "out") == [
        "dataset/coin_flip.json",
        "few_shot_cot_prompts.json",
        "split/coin_flip__default.json",
    ]


def test_mirror_missing_file(from_mirror, mirror, tmp_path, capsys):
    """Missing file in the mirror is named."""
    (mirror / "me/coins/c0ffee/coins.json").unlink()
    assert from_mirror("coin_flip") == 1
    error = error_of(capsys)
    assert str(mirror / "me/coins/c0ffee/coins.json") in error
    assert "without --mirror" in error
    assert files_under(tmp_path / "out") == []


def test_mirror_without_aqua(from_mirror, mirror, tmp_path, capsys):
    """AQuA without its train file says both ways to get it."""
    (mirror / "me/aqua/c0ffee/train.json").unlink()
    assert from_mirror() == 1
    error = error_of(capsys)
    assert "run without --mirror" in error
    assert f"put {prepare.HOST}me/aqua/c0ffee/train.json there" in error
    assert not (tmp_path / "out/dataset/aqua.json").exists()
    assert (tmp_path / "out/dataset/single_eq.json").exists()


@pytest.mark.parametrize(
    "content, expected",
    [
        (AQUA_TRAIN + AQUA_TEST, "has 5 lines instead of 3"),
        (b"{}\n" * 3, "KeyError"),
        (b"\xff\n" * 3, "UnicodeDecodeError"),
    ],
)
def test_mirror_wrong_aqua(from_mirror, mirror, tmp_path, capsys, content, expected):
    """Wrong AQuA train file is refused."""
    (mirror / "me/aqua/c0ffee/train.json").write_bytes(content)
    assert from_mirror("aqua") == 1
    assert expected in error_of(capsys)
    assert files_under(tmp_path / "out") == []


def test_mirror_no_folder(world, tmp_path, capsys):
    """Mirror that is no folder is refused."""
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "out", "--mirror", str(tmp_path / "nowhere"))
    assert stopped.value.code != 0
    assert str(tmp_path / "nowhere") in capsys.readouterr().err


def test_put_changed_converter(from_mirror, tmp_path, capsys, monkeypatch):
    """Changed converter is noticed and nothing is written."""
    changed = prepare.RECIPES["coin_flip"]._replace(
        convert=lambda row: (row["question"].upper(), row["answer"])
    )
    monkeypatch.setitem(prepare.RECIPES, "coin_flip", changed)
    assert from_mirror("coin_flip") == 1
    assert "converter" in error_of(capsys)
    assert files_under(tmp_path / "out") == []


# ---------------------------------------------------------------- network


def test_download_once(server, tmp_path, capsys):
    """Downloads are kept and a second run asks for nothing."""
    assert run(tmp_path) == 0
    assert sorted(name for name, _ in server["asked"]) == [
        "coins.json",
        "prompts.json",
        "sums.json",
        "test.json",
        "train.json",
    ]
    assert files_under(tmp_path / "raw") == sorted(RAW)
    assert (tmp_path / "raw/me/coins/c0ffee/coins.json").read_bytes() == COINS
    assert (
        capsys.readouterr().err.count(f"downloading {prepare.HOST}") == 5
    )  # without a terminal: a line per file
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in files_under(tmp_path)}
    server["files"] = {}
    assert run(tmp_path) == 0
    assert capsys.readouterr().out.count("was there already") == 3
    assert before == {name: (tmp_path / name).stat().st_mtime_ns for name in files_under(tmp_path)}


def test_put_damaged_results(server, tmp_path):
    """Damaged results are made again."""
    run(tmp_path)
    for name in (
        "dataset/coin_flip.json",
        "dataset/aqua.json",
        "split/aqua__default.json",
        "few_shot_cot_prompts.json",
    ):
        right = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(right[:-40])
        assert run(tmp_path) == 0
        assert (tmp_path / name).read_bytes() == right


def test_download_no_network(world, tmp_path, capsys, monkeypatch):
    """No network is one sentence per task."""

    def open_url(url: str, start: int) -> Reply:
        """Reply as the test wants it."""
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(prepare, "open_url", open_url)
    assert run(tmp_path, "coin_flip") == 1
    error = error_of(capsys)
    assert "could not be downloaded" in error
    assert "Name or service not known" in error
    assert "--mirror" in error
    assert files_under(tmp_path) == []
    assert run(tmp_path) == 1
    assert capsys.readouterr().err.count("error: ") == 3


@pytest.mark.parametrize(
    "then, problem",
    [
        (None, "bytes are missing"),
        (TimeoutError("timed out"), "timed out"),
        (ConnectionResetError(), "ConnectionResetError"),
    ],
)
def test_download_broken_connection(server, tmp_path, capsys, then, problem):
    """Broken connection leaves only a part and the next run goes on there."""
    server.update(cut=100, then=then)
    assert run(tmp_path, "coin_flip") == 1
    assert problem in error_of(capsys)
    assert files_under(tmp_path) == ["raw/me/coins/c0ffee/coins.json.part"]
    server.update(cut=None, then=None)
    assert run(tmp_path, "coin_flip") == 0
    assert (tmp_path / "dataset/coin_flip.json").read_bytes() == COINS_BUILT
    assert "from byte 100" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.part"))


def test_download_without_ranges(server, tmp_path):
    """Server without ranges is read from the start."""
    server.update(cut=100)
    run(tmp_path, "coin_flip")
    server.update(cut=None, ranges=False)
    assert run(tmp_path, "coin_flip") == 0
    assert server["asked"][:2] == [("coins.json", 0), ("coins.json", 100)]
    assert (tmp_path / "dataset/coin_flip.json").read_bytes() == COINS_BUILT


def test_download_whole_part(server, tmp_path):
    """Whole part is taken when the last run stopped before the renaming."""
    storage.write_atomic(tmp_path / "raw/me/coins/c0ffee/coins.json.part", COINS)
    assert run(tmp_path, "coin_flip") == 0
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("part", [b"", b"rubbish", b"x" * (len(COINS) + 1)])
def test_download_wrong_content(server, tmp_path, capsys, part):
    """Wrong download is thrown away and the next run begins anew."""
    server["files"]["me/coins/c0ffee/coins.json"] = COINS if part else COINS[::-1]
    storage.write_atomic(tmp_path / "raw/me/coins/c0ffee/coins.json.part", part)
    assert run(tmp_path, "coin_flip") == 1
    assert "thrown away" in error_of(capsys)
    assert files_under(tmp_path) == []
    server["files"] = dict(RAW)
    assert run(tmp_path, "coin_flip") == 0


def test_raw_content_damaged(server, tmp_path, capsys):
    """Damaged raw file of an earlier run is named."""
    path = tmp_path / "raw/me/coins/c0ffee/coins.json"
    storage.write_atomic(path, COINS[:-1])
    assert run(tmp_path, "coin_flip") == 1
    assert f"{path} has SHA-256" in (error := error_of(capsys)) and "delete it" in error


def test_open_url_range_and_timeout(monkeypatch):
    """Real downloads have a timeout and ask for the rest."""
    seen = []
    monkeypatch.setattr(
        prepare.urllib.request,
        "urlopen",
        lambda request, timeout: seen.append(
            (request.full_url, request.get_header("Range"), timeout)
        ),
    )
    prepare.open_url("https://example.org/a", 7)
    assert seen == [("https://example.org/a", "bytes=7-", prepare.TIMEOUT)]
    assert 0 < prepare.TIMEOUT <= 60


# ---------------------------------------------------------------- interruption


def test_interrupt_download(server, tmp_path):
    """Ctrl-C during a download leaves nothing half written."""
    server.update(cut=50, then=KeyboardInterrupt())
    with pytest.raises(SystemExit, match="interrupted"):
        run(tmp_path)
    assert files_under(tmp_path) == ["raw/me/sums/c0ffee/sums.json.part"]
    server.update(cut=None, then=None)
    assert run(tmp_path) == 0
    assert (tmp_path / "dataset/single_eq.json").read_bytes() == SUMS_BUILT


def test_interrupt_import(monkeypatch, tmp_path):
    """Ctrl-C while an archive is imported is one sentence."""

    def stop(*_: object) -> None:
        """Press Ctrl-C."""
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "import_completions", stop)
    with pytest.raises(SystemExit, match="interrupted: .* start the same command again"):
        prepare.main(["--completions", str(tmp_path / "a.tar.gz")])


def test_interrupt_writing(from_mirror, tmp_path, monkeypatch):
    """Stop while writing leaves nothing half written."""

    def stop(*_: object) -> None:
        """Press Ctrl-C."""
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", stop)
        with pytest.raises(SystemExit, match="interrupted"):
            from_mirror("coin_flip")
    assert files_under(tmp_path / "out") == []
    assert from_mirror("coin_flip") == 0


def test_prepare_full_disk(from_mirror, capsys, monkeypatch):
    """Full disk is one sentence."""

    def full(path: Path, content: bytes) -> None:
        """Fail as on a full disk."""
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(storage, "write_atomic", full)
    assert from_mirror("coin_flip") == 1
    assert "coin_flip.json cannot be read or written (No space left on device)" in error_of(capsys)


# ---------------------------------------------------------------- other tasks than the twelve


@pytest.fixture
def riddles(world, monkeypatch, tmp_path) -> Path:
    """A benchmark that a user added: a row in tasks.py and a file of 20 samples."""
    monkeypatch.setitem(
        tasks.TASKS,
        "riddles",
        tasks.TASKS["toy"]._replace(key="riddles", n=20, train=14, test=6, split="random"),
    )
    path = tmp_path / "dataset/riddles.json"
    storage.write_atomic(path, built("riddles", [(f"Riddle {i}?", "yes") for i in range(20)]))
    return path


def test_added_task_split(riddles, tmp_path, monkeypatch):
    """Added task gets the default split of its file."""
    monkeypatch.setattr(prepare, "open_url", None)
    before = riddles.read_bytes()
    assert run(tmp_path, "riddles") == 0
    train, test = tasks.load_split("riddles", data_dir=tmp_path)
    assert (len(train), len(test)) == (14, 6)
    assert sorted(train + test) == list(range(20))
    assert riddles.read_bytes() == before
    assert files_under(tmp_path) == ["dataset/riddles.json", "split/riddles__default.json"]


def test_added_task_ordered_split(riddles, tmp_path, monkeypatch):
    """Added task may have an ordered split."""
    monkeypatch.setitem(
        tasks.TASKS, "riddles", tasks.TASKS["riddles"]._replace(train=15, test=5, split="ordered")
    )
    assert run(tmp_path, "riddles") == 0
    assert tasks.load_split("riddles", data_dir=tmp_path) == (list(range(15)), list(range(15, 20)))


def test_added_task_too_few_samples(riddles, tmp_path, capsys, monkeypatch):
    """Added task with too few samples for its row is refused."""
    monkeypatch.setitem(
        tasks.TASKS, "riddles", tasks.TASKS["riddles"]._replace(train=30, split="ordered")
    )
    assert run(tmp_path, "riddles") == 1
    assert "has 20 samples" in error_of(capsys)
    assert not (tmp_path / "split").exists()


def test_added_task_of_other_sizes(riddles, tmp_path, capsys, monkeypatch):
    """A row of TASKS that says other sizes than the file has is named, with both."""
    row = tasks.TASKS["riddles"]._replace(n=60, train=42, test=18)
    monkeypatch.setitem(tasks.TASKS, "riddles", row)
    assert run(tmp_path, "riddles") == 1
    error = error_of(capsys)
    assert "riddles.json has 20 samples, 14 to train and 6 to test" in error
    assert "its row of TASKS says 60, 42 and 18" in error
    assert not (tmp_path / "split").exists()


def test_added_task_without_file(riddles, tmp_path, capsys):
    """Added task without a file says where and in which form."""
    riddles.unlink()
    assert run(tmp_path, "riddles") == 1
    error = error_of(capsys)
    assert str(riddles) in error
    assert "sample_index" in error
    assert "question" in error


ODD_SAMPLE = b'{"metadata": {"dataset_key": "riddles"}, "data": [{"question": "?"}]}'
WRONG_FORMS = [  # more of them in test_tasks.py
    (b"[1, 2", "not valid JSON"),
    (ODD_SAMPLE, "sample 0 needs sample_index"),
]


@pytest.mark.parametrize("content, expected", WRONG_FORMS)
def test_added_task_wrong_form(riddles, tmp_path, capsys, content, expected):
    """Added task in a wrong form is refused."""
    riddles.write_bytes(content)
    assert run(tmp_path, "riddles") == 1
    assert expected in error_of(capsys)
    assert not (tmp_path / "split").exists()


def test_added_task_wrong_gold_answer(riddles, tmp_path, capsys, monkeypatch):
    """Added task with a gold answer of another kind is refused."""
    monkeypatch.setitem(
        tasks.TASKS, "riddles", tasks.TASKS["riddles"]._replace(answer_type=tasks.NUMBER)
    )
    assert run(tmp_path, "riddles") == 1
    assert error_of(capsys) == "error: the gold answer 'yes' of riddles is not a number"
    assert not (tmp_path / "split").exists()


def test_added_task_must_be_named(riddles, mirror, tmp_path, capsys):
    """Added task is not prepared unless named."""
    assert run(tmp_path, "--mirror", str(mirror)) == 0
    assert "riddles" not in (shown := capsys.readouterr().out) and "toy" not in shown


@pytest.mark.parametrize("key", ["../riddles", "/etc/riddles", "a/../../b"])
def test_prepare_key_leads_out(world, monkeypatch, tmp_path, capsys, key):
    """A key that leads out of the folder is refused."""
    monkeypatch.setitem(tasks.TASKS, key, tasks.TASKS["toy"]._replace(key=key))
    assert run(tmp_path / "out", key) == 1
    assert "cannot be used as a name" in error_of(capsys)
    assert files_under(tmp_path) == []


def test_prepare_toy(world, tmp_path, capsys):
    """Toy task needs nothing."""
    assert run(tmp_path, "toy") == 0
    assert "nothing to prepare" in capsys.readouterr().out
    assert files_under(tmp_path) == []


def test_prepare_unknown_task(from_mirror, tmp_path, capsys):
    """Unknown task is an error and the others are prepared."""
    assert from_mirror("coinflip", "coin_flip") == 1
    assert "coinflip" in error_of(capsys)
    assert (tmp_path / "out/dataset/coin_flip.json").exists()


def test_main_from_any_folder(tmp_path):
    """The command runs from any folder."""
    command = [sys.executable, str(ROOT / "data/prepare.py"), "toy"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "toy" in done.stdout


# ---------------------------------------------------------------- published completion files

GOOD = "saved/completion_data/B_m__C_zs_cot/D_toy.json"
TARGET = "completion_data/B_m__C_zs_cot/D_toy.json"
TOY_ROWS = {
    str(s["sample_index"]): [{**s, "completion_index": 0, "completion": "yes"}]
    for s in tasks.toy_samples(3)
}
TOY = json.dumps({"metadata": {"dataset_key": "toy"}, "data": TOY_ROWS}).encode()


def pack(path: Path, *entries: tuple[str, bytes], **changes: object) -> Path:
    """Make a tar.gz of (name, content), with changes to the header of the last."""
    with tarfile.open(path, "w:gz") as tar:
        for i, (name, content) in enumerate(entries, 1):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if i == len(entries):
                for key, value in changes.items():
                    setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content))
    return path


def import_archive(path: Path, capsys) -> tuple[str | None, str]:
    """Import into saved/ beside the archive; return (error, what was printed)."""
    message = None
    try:
        prepare.main(["--completions", str(path), "--saved", str(path.parent / "saved")])
    except SystemExit as e:
        message = e.code
    return message, capsys.readouterr().out


@pytest.fixture
def imported(tmp_path, capsys) -> str:
    """Import good, torn and other files; give what was printed."""
    path = pack(
        tmp_path / "a.tar.gz",
        (GOOD, TOY),
        ("saved/README.md", b"hello"),
        ("x/B_m__C_ft/F_ft__D_toy.json", TOY),  # as in older archives
        ("/y/B_m__C_fs/T_x.json", TOY),
        ("B_m__C_zs/D_toy.json", b"torn {"),
        ("z/B_m__C_zs_cot/D_toy.json", TOY.replace(b"yes", b"no")),  # a second one of that name
    )
    message, out = import_archive(path, capsys)
    assert message is None
    return out


def test_import_completions_of_an_archive(imported, tmp_path):
    """Completion files are taken, wherever they are in the archive, and score."""
    assert "B_m__C_zs/D_toy.json was left out: it is not valid JSON" in imported
    assert files_under(tmp_path / "saved") == [
        "completion_data/B_m__C_fs/T_x.json",
        "completion_data/B_m__C_ft/F_ft__D_toy.json",
        TARGET,
    ]
    assert (tmp_path / "saved" / TARGET).read_bytes() == TOY
    score = evaluate.score(tmp_path / "saved" / TARGET, part="all", allow_partial=True)
    assert score["n"] == 3


def test_import_completions_again(imported, tmp_path, capsys):
    """A file with other content is kept, one with the same content is named."""
    (tmp_path / "saved" / TARGET).write_text("mine")
    message, out = import_archive(tmp_path / "a.tar.gz", capsys)
    assert message is None
    assert f"{TARGET} is there already, with other content: it was kept" in out
    assert "F_ft__D_toy.json is there already\n" in out
    assert (tmp_path / "saved" / TARGET).read_text() == "mine"


HOSTILE = [
    ("../../B_m__C_zs/D_toy.json", {}, "outside the destination"),
    ("B_m__C_zs/D_toy.json", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "absolute path"),
    ("B_m__C_zs/D_toy.json", {"type": tarfile.LNKTYPE, "linkname": "../../x"}, "outside"),
    ("fifo", {"type": tarfile.FIFOTYPE}, "is a special file"),
    ("disk", {"type": tarfile.BLKTYPE}, "is a special file"),
]


@pytest.mark.parametrize("name, changes, reason", HOSTILE)
def test_import_completions_hostile(name, changes, reason, tmp_path, capsys):
    """Of an archive with one hostile entry nothing is taken."""
    pack(tmp_path / "a.tar.gz", (GOOD, TOY), (name, TOY), **changes)
    message, _ = import_archive(tmp_path / "a.tar.gz", capsys)
    assert "cannot be imported" in message
    assert reason in message
    assert os.listdir(tmp_path) == ["a.tar.gz"]


def test_import_completions_links_are_left(tmp_path, capsys):
    """A link within the archive is no completion file."""
    link = {"type": tarfile.SYMTYPE, "linkname": "D_x.json"}
    pack(tmp_path / "a.tar.gz", (GOOD, TOY), ("B_m__C_zs/D_toy.json", b""), **link)
    message, _ = import_archive(tmp_path / "a.tar.gz", capsys)
    assert message is None
    assert files_under(tmp_path / "saved") == [TARGET]


BIG = [
    [("saved/completion_data/B_m__C_zs/D_toy.json", bytes(2 << 20))],
    [(GOOD, TOY), *((f"{i}", bytes(1 << 20)) for i in range(5))],
]


@pytest.mark.parametrize("entries", BIG)
def test_import_completions_bomb(entries, tmp_path, capsys, monkeypatch):
    """An archive that unpacks to too much, in one file or in all, is stopped before it does."""
    monkeypatch.setattr(prepare, "MAX_FILE_BYTES", 1 << 20)
    monkeypatch.setattr(prepare, "MAX_ARCHIVE_BYTES", 3 << 20)
    message, _ = import_archive(pack(tmp_path / "a.tar.gz", *entries), capsys)
    assert "it unpacks to more than 1,048,576 bytes a file, or 3,145,728 in all" in message
    assert os.listdir(tmp_path) == ["a.tar.gz"]


def test_import_completions_false_size(tmp_path, capsys):
    """A header may claim any size: nothing is unpacked for it."""
    header = tarfile.TarInfo(GOOD)
    header.size = 1 << 50
    packed = gzip.compress(header.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20))
    (tmp_path / "a.tar.gz").write_bytes(packed)
    message, _ = import_archive(tmp_path / "a.tar.gz", capsys)
    assert "it unpacks to more than" in message


def test_import_completions_none(tmp_path, capsys):
    """An archive without completion files is told what one is called."""
    pack(tmp_path / "a.tar.gz", ("README.md", b"hello"))
    message, _ = import_archive(tmp_path / "a.tar.gz", capsys)
    assert "it holds no completion file, B_<model>__C_<completion_key>/D_<task>.json" in message


def test_import_completions_torn_anywhere(tmp_path, capsys):
    """An archive that is cut off anywhere leaves whole files or none."""
    whole = pack(tmp_path / "a.tar.gz", (GOOD, TOY)).read_bytes()
    for end in range(0, len(whole) - 1, 5):
        (tmp_path / "b.tar.gz").write_bytes(whole[:end])
        message, _ = import_archive(tmp_path / "b.tar.gz", capsys)
        assert message.startswith("error: ")
        assert "\n" not in message
        assert files_under(tmp_path / "saved") in ([], [TARGET])


def test_import_completions_changed_byte(tmp_path, capsys):
    """A byte that changed on the way is noticed before anything is taken."""
    whole = bytearray(pack(tmp_path / "a.tar.gz", (GOOD, TOY)).read_bytes())
    for at in range(30, len(whole), 3):  # from the end of gzip's header on
        changed = bytes([*whole[:at], whole[at] ^ 1, *whole[at + 1 :]])
        (tmp_path / "b.tar.gz").write_bytes(changed)
        message, _ = import_archive(tmp_path / "b.tar.gz", capsys)
        assert message
        assert files_under(tmp_path / "saved") == []
