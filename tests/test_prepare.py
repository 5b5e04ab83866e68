"""data/prepare.py: what it builds, and what it does when something is wrong.

    pytest tests/test_prepare.py

No network: the one function that touches it is replaced.  The tests against the real benchmark files need a folder with
mirror/ (the raw files, as for --mirror) and dataset_SHA256SUMS, named by the environment variable FINETUNE_COT_SHARED.
"""

import hashlib
import io
import json
import os
import subprocess
import sys
import urllib.error
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import prepare  # noqa: E402
import tasks  # noqa: E402
import storage as files  # noqa: E402

SHARED = os.environ.get("FINETUNE_COT_SHARED")
needs_mirror = pytest.mark.skipif(
    not SHARED, reason="FINETUNE_COT_SHARED is not set: no raw benchmark files to build from"
)

SIZES = {  # n, train, test of the default split
    "single_eq": (508, 356, 152),
    "addsub": (395, 276, 119),
    "multiarith": (600, 420, 180),
    "gsm8k": (8792, 7473, 1319),
    "aqua": (97721, 10000, 254),
    "svamp": (1000, 700, 300),
    "tracking_shuffled_objects": (750, 525, 225),
    "date_understanding": (369, 258, 111),
    "coin_flip": (500, 350, 150),
    "last_letter_concatenation": (500, 350, 150),
    "commonsense_qa": (10962, 9741, 1221),
    "strategy_qa": (2290, 1603, 687),
}
IN_MIRROR = [
    key for key in SIZES if key != "aqua"
]  # aqua's train file is too big for a mirror that travels with tests


def digest(content):
    return hashlib.sha256(content).hexdigest()


def known_sums(name):
    """-> {path: SHA-256} of a file as sha256sum writes it"""
    return {
        path: known
        for known, path in (line.split() for line in (Path(SHARED) / name).read_text().splitlines())
    }


def files_under(folder):
    return sorted(
        str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()
    )


# ---------------------------------------------------------------------------------------------------------------------
# A small world of our own: two tasks with one raw file each, aqua with five lines, and a server that can fail

COINS = json.dumps(
    {
        "examples": [
            {"question": f"Tails up, turned {i} times. Tails now?", "answer": ["yes", "no"][i % 2]}
            for i in range(10)
        ]
    }
).encode()
SUMS = json.dumps(
    [{"sQuestion": f" {i} plums and one more ? ", "lSolutions": [float(i + 1)]} for i in range(10)]
).encode()
PROMPTS = b'{"coin_flip": {"prompt": "Q: ...\\nA: ..."}}'
CHOICES = ["A)1", "B) 2 ", "C)x)", "D)4", "E)none"]
AQUA_TRAIN = "".join(
    json.dumps(
        {
            "question": f" Half of {i}? ",
            "options": CHOICES,
            "rationale": f" It is {i}/2.\n",
            "correct": "B",
        }
    )
    + "\n"
    for i in range(3)
).encode()
AQUA_TEST = AQUA_TRAIN[: AQUA_TRAIN.index(b"\n") + 1] * 2
RAW = {
    "me/coins/c0ffee/coins.json": COINS,
    "me/sums/c0ffee/sums.json": SUMS,
    "me/prompts/c0ffee/prompts.json": PROMPTS,
    "me/aqua/c0ffee/train.json": AQUA_TRAIN,
    "me/aqua/c0ffee/test.json": AQUA_TEST,
}


def built(key, rows):
    data = [
        {"sample_index": i, "question": question, "answer": answer}
        for i, (question, answer) in enumerate(rows)
    ]
    return json.dumps({"metadata": {"dataset_key": key}, "data": data}, indent=4).encode()


COINS_BUILT = built(
    "coin_flip", [(row["question"], row["answer"]) for row in json.loads(COINS)["examples"]]
)
SUMS_BUILT = built("single_eq", [(f"{i} plums and one more ?", f"{i + 1}.0") for i in range(10)])


@pytest.fixture
def world(monkeypatch):
    """The tables of prepare.py and tasks.py with our own small files in place of the benchmarks'."""

    def file(name, **more):
        path = next(path for path in RAW if path.endswith(name))
        return prepare.File(path, None if more else digest(RAW[path]), **more)

    real = prepare.RECIPES
    monkeypatch.setattr(prepare, "PROMPTS", file("prompts.json"))
    monkeypatch.setattr(
        prepare,
        "RECIPES",
        {
            "single_eq": real["single_eq"]._replace(
                sha256=digest(SUMS_BUILT), raw=[file("sums.json")]
            ),
            "coin_flip": real["coin_flip"]._replace(
                sha256=digest(COINS_BUILT), raw=[file("coins.json")]
            ),
            "aqua": real["aqua"]._replace(
                raw=[file("aqua/c0ffee/train.json", lines=3), file("aqua/c0ffee/test.json")],
                lines=7 + 6 * 5,
            ),
        },
    )
    for key, n, train, test in ("single_eq", 10, 7, 3), ("coin_flip", 10, 7, 3), ("aqua", 5, 2, 2):
        monkeypatch.setitem(
            tasks.TASKS, key, tasks.TASKS[key]._replace(n=n, train=train, test=test)
        )


@pytest.fixture
def mirror(world, tmp_path):
    for path, content in RAW.items():
        files.write_atomic(tmp_path / "mirror" / path, content)
    return tmp_path / "mirror"


class Reply(io.BytesIO):
    """A response: it announces more than it gives when it is cut, and raises `then` after its last byte."""

    def __init__(self, content, announced, status, then=None):
        super().__init__(content)
        self.headers = {"Content-Length": str(announced)}
        self.status = status
        self.then = then

    def read(self, size=-1):
        chunk = super().read(size)
        if not chunk and self.then:
            raise self.then
        return chunk


@pytest.fixture
def server(world, monkeypatch):
    """-> a dictionary to steer the server with, and the list of (file name, first byte) that were asked for"""
    state = {"cut": None, "then": None, "ranges": True, "files": dict(RAW), "asked": []}

    def open_url(url, start):
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


def run(out, *arguments):
    return prepare.main([*arguments, "--out", str(out)])


def error_of(capsys):
    """-> the one line that stderr holds besides notes about downloads"""
    lines = [
        line for line in capsys.readouterr().err.splitlines() if not line.startswith("downloading ")
    ]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


# ---------------------------------------------------------------------------------------------------------------------
# The real benchmarks


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    out = tmp_path_factory.mktemp("data")
    assert run(out, *IN_MIRROR, "--mirror", str(Path(SHARED) / "mirror")) == 0
    return out


@needs_mirror
@pytest.mark.parametrize("key", IN_MIRROR)
def test_built_dataset_has_the_published_sum(prepared, key):
    assert (
        digest((prepared / "dataset" / f"{key}.json").read_bytes())
        == known_sums("dataset_SHA256SUMS")[f"{key}.json"]
    )


@needs_mirror
def test_every_sum_of_the_table_is_the_known_one():
    files = [
        file
        for recipe in prepare.RECIPES.values()
        for file in [*recipe.raw, recipe.template]
        if file
    ]
    listed = {file.path: file.sha256 for file in files if file.sha256}
    assert listed | {prepare.PROMPTS.path: prepare.PROMPTS.sha256} == known_sums(
        "mirror/SHA256SUMS"
    )
    assert all(
        prepare.RECIPES[key].sha256 == known_sums("dataset_SHA256SUMS")[f"{key}.json"]
        for key in IN_MIRROR
    )


@needs_mirror
@pytest.mark.parametrize("key", IN_MIRROR)
def test_default_split_file_has_the_published_sizes(prepared, key):
    split = json.loads((prepared / "split" / f"{key}__default.json").read_text())
    n, train, test = SIZES[key]
    assert (len(split["train"]), len(split["test"])) == (train, test)
    assert set(split) == {
        "train",
        "test",
    }
    assert sorted(split["train"] + split["test"]) == list(range(n))


@needs_mirror
@pytest.mark.parametrize(
    "key, train, test", [("multiarith", 413, 187), ("date_understanding", 261, 108)]
)
def test_template_split_is_the_published_file(prepared, key, train, test):
    content = (prepared / "split" / f"{key}__template.json").read_bytes()
    assert digest(content) == known_sums("mirror/SHA256SUMS")[prepare.RECIPES[key].template.path]
    assert [len(json.loads(content)[part]) for part in ("train", "test")] == [train, test]


@needs_mirror
def test_few_shot_prompts_are_copied_verbatim(prepared):
    assert (
        digest((prepared / "few_shot_cot_prompts.json").read_bytes())
        == known_sums("mirror/SHA256SUMS")[prepare.PROMPTS.path]
    )


@needs_mirror
def test_nothing_else_is_written_and_all_of_it_loads(prepared):
    expected = (
        [f"dataset/{key}.json" for key in IN_MIRROR]
        + [f"split/{key}__default.json" for key in IN_MIRROR]
        + [
            "few_shot_cot_prompts.json",
            "split/date_understanding__template.json",
            "split/multiarith__template.json",
        ]
    )
    assert files_under(prepared) == sorted(expected)
    assert all(len(tasks.load(key, prepared)) == SIZES[key][0] for key in IN_MIRROR)


@needs_mirror
def test_real_aqua_test_part_converts():
    recipe = prepare.RECIPES["aqua"]
    rows = recipe.read((Path(SHARED) / "mirror" / recipe.raw[1].path).read_text(encoding="utf-8"))
    converted = [recipe.convert(row) for row in rows]
    assert len(converted) == 254
    assert all(f" ({letter}) " in question for question, _, _ in converted for letter in "ABCDE")
    assert {answer for _, answer, _ in converted} == set("ABCDE")
    assert all(rationale == rationale.strip() != "" for _, _, rationale in converted)


@pytest.mark.parametrize("key", SIZES)
def test_default_split_rule_gives_the_published_sizes(key):
    n, train, test = SIZES[key]
    parts = tasks.default_split(key)
    assert [len(part) for part in parts] == [train, test]
    assert not set(parts[0]) & set(parts[1])
    assert max(parts[0] + parts[1]) < n
    assert all(part == sorted(part) for part in parts)


def test_every_benchmark_of_tasks_has_a_recipe():
    assert set(SIZES) == set(prepare.RECIPES) <= set(tasks.TASKS)
    assert (
        prepare.RECIPES["aqua"].lines == 7 + 6 * tasks.TASKS["aqua"].n
    )  # what json.dumps(..., indent=4) makes of its samples


# ---------------------------------------------------------------------------------------------------------------------
# Converters


def test_aqua_puts_train_before_test_and_keeps_rationales(mirror, tmp_path):
    assert run(tmp_path / "out", "aqua", "--mirror", str(mirror)) == 0
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


def test_choices_are_lettered_stripped_and_closed_by_a_point():
    assert (
        prepare.with_choices("Warm?", [" tea", "ice "]) == "Warm? Answer choices: (A) tea, (B) ice."
    )


def test_a_choice_loses_one_point_at_its_end_and_the_input_is_kept():
    row = {"input": "Who waves? ", "target_scores": {"Ann.": 0, "Ben..": 1}}
    assert prepare.which_is_true(row) == (
        "Who waves? \nWhich choice is true? Answer choices: (A) Ann, (B) Ben..",
        "B",
    )


def test_dates_are_shuffled_by_one_state_for_all_rows():
    rows = [{"input": " When? ", "target_scores": {"mon": 1, "tue": 0, "wed": 0}}] * 2
    shuffled = prepare.shuffled_dates(json.dumps({"examples": rows}))
    # RandomState(0).permutation(3) is [2, 1, 0] and then [2, 0, 1]: choice j goes to place permutation[j]
    assert [list(row["target_scores"]) for row in shuffled] == [
        ["wed", "tue", "mon"],
        ["tue", "wed", "mon"],
    ]
    assert shuffled[0]["input"] == "When?"
    assert prepare.which_is_true(shuffled[0])[1] == "C"


def test_strategy_rationale_begins_after_the_answer():
    row = {
        "input": " Do owls knit? ",
        "target": "No. Owls have no hands. They hunt.",
        "target_scores": {"Yes": 0, "No": 1},
    }
    assert prepare.strategy_qa(row) == ("Do owls knit?", "No", "Owls have no hands. They hunt.")


def test_gsm8k_answer_keeps_its_commas():
    assert prepare.RECIPES["gsm8k"].convert(
        {"question": "How many?", "answer": "500 * 3\n#### 1,500"}
    ) == ("How many?", "1,500")


def test_json_lines_may_hold_a_line_separator_character():
    assert prepare.json_lines('{"a": "x\u2028y"}\n\n{"a": "z"}\n') == [
        {"a": "x\u2028y"},
        {"a": "z"},
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Mirror


def test_mirror_is_read_without_network_and_not_copied(mirror, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "open_url", None)
    assert run(tmp_path / "out", "--mirror", str(mirror)) == 0
    assert (tmp_path / "out/dataset/coin_flip.json").read_bytes() == COINS_BUILT
    assert not (tmp_path / "out/raw").exists()


def test_wrong_sum_in_the_mirror_names_the_file_and_the_other_task_is_prepared(
    mirror, tmp_path, capsys
):
    path = mirror / "me/sums/c0ffee/sums.json"
    path.write_bytes(SUMS + b" ")
    assert run(tmp_path / "out", "single_eq", "coin_flip", "--mirror", str(mirror)) == 1
    error = error_of(capsys)
    assert str(path) in error
    assert digest(SUMS) in error
    assert f"replace it by {prepare.HOST}me/sums" in error
    assert files_under(tmp_path / "out") == [
        "dataset/coin_flip.json",
        "few_shot_cot_prompts.json",
        "split/coin_flip__default.json",
    ]


def test_missing_file_in_the_mirror_is_named(mirror, tmp_path, capsys):
    (mirror / "me/coins/c0ffee/coins.json").unlink()
    assert run(tmp_path / "out", "coin_flip", "--mirror", str(mirror)) == 1
    error = error_of(capsys)
    assert str(mirror / "me/coins/c0ffee/coins.json") in error
    assert "without --mirror" in error
    assert files_under(tmp_path / "out") == []


def test_aqua_without_its_train_file_says_both_ways_to_get_it(mirror, tmp_path, capsys):
    (mirror / "me/aqua/c0ffee/train.json").unlink()
    assert run(tmp_path / "out", "--mirror", str(mirror)) == 1
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
def test_wrong_aqua_train_file_is_refused(mirror, tmp_path, capsys, content, expected):
    (mirror / "me/aqua/c0ffee/train.json").write_bytes(content)
    assert run(tmp_path / "out", "aqua", "--mirror", str(mirror)) == 1
    assert expected in error_of(capsys)
    assert files_under(tmp_path / "out") == []


def test_mirror_that_is_no_folder_is_refused(world, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "out", "--mirror", str(tmp_path / "nowhere"))
    assert stopped.value.code != 0
    assert str(tmp_path / "nowhere") in capsys.readouterr().err


def test_changed_converter_is_noticed_and_nothing_is_written(mirror, tmp_path, capsys, monkeypatch):
    changed = prepare.RECIPES["coin_flip"]._replace(
        convert=lambda row: (row["question"].upper(), row["answer"])
    )
    monkeypatch.setitem(prepare.RECIPES, "coin_flip", changed)
    assert run(tmp_path / "out", "coin_flip", "--mirror", str(mirror)) == 1
    assert "converter" in error_of(capsys)
    assert files_under(tmp_path / "out") == []


# ---------------------------------------------------------------------------------------------------------------------
# Network


def test_downloads_are_kept_and_a_second_run_asks_for_nothing(server, tmp_path, capsys):
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


def test_damaged_results_are_made_again(server, tmp_path):
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


def test_no_network_is_one_sentence_per_task(world, tmp_path, capsys, monkeypatch):
    def open_url(url, start):
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
def test_broken_connection_leaves_only_a_part_and_the_next_run_goes_on_there(
    server, tmp_path, capsys, then, problem
):
    server.update(cut=100, then=then)
    assert run(tmp_path, "coin_flip") == 1
    assert problem in error_of(capsys)
    assert files_under(tmp_path) == ["raw/me/coins/c0ffee/coins.json.part"]
    server.update(cut=None, then=None)
    assert run(tmp_path, "coin_flip") == 0
    assert (tmp_path / "dataset/coin_flip.json").read_bytes() == COINS_BUILT
    assert "from byte 100" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.part"))


def test_server_without_ranges_is_read_from_the_start(server, tmp_path):
    server.update(cut=100)
    run(tmp_path, "coin_flip")
    server.update(cut=None, ranges=False)
    assert run(tmp_path, "coin_flip") == 0
    assert server["asked"][:2] == [
        ("coins.json", 0),
        ("coins.json", 100),
    ]
    assert (tmp_path / "dataset/coin_flip.json").read_bytes() == COINS_BUILT


def test_whole_part_is_taken_when_the_last_run_stopped_before_the_renaming(server, tmp_path):
    files.write_atomic(tmp_path / "raw/me/coins/c0ffee/coins.json.part", COINS)
    assert run(tmp_path, "coin_flip") == 0
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("part", [b"", b"rubbish", b"x" * (len(COINS) + 1)])
def test_wrong_download_is_thrown_away_and_the_next_run_begins_anew(server, tmp_path, capsys, part):
    server["files"]["me/coins/c0ffee/coins.json"] = COINS if part else COINS[::-1]
    files.write_atomic(tmp_path / "raw/me/coins/c0ffee/coins.json.part", part)
    assert run(tmp_path, "coin_flip") == 1
    assert "thrown away" in error_of(capsys)
    assert files_under(tmp_path) == []
    server["files"] = dict(RAW)
    assert run(tmp_path, "coin_flip") == 0


def test_damaged_raw_file_of_an_earlier_run_is_named(server, tmp_path, capsys):
    path = tmp_path / "raw/me/coins/c0ffee/coins.json"
    files.write_atomic(path, COINS[:-1])
    assert run(tmp_path, "coin_flip") == 1
    assert f"{path} has SHA-256" in (error := error_of(capsys)) and "delete it" in error


def test_real_downloads_have_a_timeout_and_ask_for_the_rest(monkeypatch):
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


# ---------------------------------------------------------------------------------------------------------------------
# Interruption


def test_ctrl_c_during_a_download_leaves_nothing_half_written(server, tmp_path):
    server.update(cut=50, then=KeyboardInterrupt())
    with pytest.raises(SystemExit, match="interrupted"):
        run(tmp_path)
    assert files_under(tmp_path) == ["raw/me/sums/c0ffee/sums.json.part"]
    server.update(cut=None, then=None)
    assert run(tmp_path) == 0
    assert (tmp_path / "dataset/single_eq.json").read_bytes() == SUMS_BUILT


def test_ctrl_c_while_an_archive_is_imported_is_one_sentence(monkeypatch, tmp_path):
    from data import archive

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(archive, "import_completions", stop)
    with pytest.raises(SystemExit, match="interrupted: run the same command again"):
        prepare.main(["--completions", str(tmp_path / "a.tar.gz")])


def test_stop_while_writing_leaves_nothing_half_written(mirror, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", stop)
        with pytest.raises(SystemExit, match="interrupted"):
            run(tmp_path / "out", "coin_flip", "--mirror", str(mirror))
    assert files_under(tmp_path / "out") == []
    assert run(tmp_path / "out", "coin_flip", "--mirror", str(mirror)) == 0


def test_full_disk_is_one_sentence(mirror, tmp_path, capsys, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(files, "write_atomic", full)
    assert run(tmp_path / "out", "coin_flip", "--mirror", str(mirror)) == 1
    assert "coin_flip.json cannot be read or written (No space left on device)" in error_of(capsys)


# ---------------------------------------------------------------------------------------------------------------------
# Other tasks than the twelve


@pytest.fixture
def riddles(world, monkeypatch, tmp_path):
    """A benchmark that a user added: a row in tasks.py and a file of 20 samples."""
    monkeypatch.setitem(
        tasks.TASKS,
        "riddles",
        tasks.TASKS["toy"]._replace(key="riddles", n=999, train=0, test=0, split="random"),
    )
    path = tmp_path / "dataset/riddles.json"
    files.write_atomic(path, built("riddles", [(f"Riddle {i}?", "yes") for i in range(20)]))
    return path


def test_added_task_gets_the_default_split_of_its_file(riddles, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "open_url", None)
    before = riddles.read_bytes()
    assert run(tmp_path, "riddles") == 0
    train, test = tasks.load_split("riddles", data_dir=tmp_path)
    assert (len(train), len(test)) == (14, 6)
    assert sorted(train + test) == list(range(20))
    assert riddles.read_bytes() == before
    assert files_under(tmp_path) == [
        "dataset/riddles.json",
        "split/riddles__default.json",
    ]


def test_added_task_may_have_an_ordered_split(riddles, tmp_path, monkeypatch):
    monkeypatch.setitem(
        tasks.TASKS, "riddles", tasks.TASKS["riddles"]._replace(train=15, split="ordered")
    )
    assert run(tmp_path, "riddles") == 0
    assert tasks.load_split("riddles", data_dir=tmp_path) == (list(range(15)), list(range(15, 20)))


def test_added_task_with_too_few_samples_for_its_row_is_refused(
    riddles, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(
        tasks.TASKS, "riddles", tasks.TASKS["riddles"]._replace(train=30, split="ordered")
    )
    assert run(tmp_path, "riddles") == 1
    assert "has 20 samples" in error_of(capsys)
    assert not (tmp_path / "split").exists()


def test_added_task_without_a_file_says_where_and_in_which_form(riddles, tmp_path, capsys):
    riddles.unlink()
    assert run(tmp_path, "riddles") == 1
    error = error_of(capsys)
    assert str(riddles) in error
    assert "sample_index" in error
    assert "question" in error


@pytest.mark.parametrize(
    "content, expected",
    [
        ("[1, 2", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"data": []}', "metadata"),
        ('{"metadata": {"dataset_key": "other"}, "data": []}', "its dataset_key is not"),
        ('{"metadata": {"dataset_key": "riddles"}, "data": [{"question": "?"}]}', "sample_index"),
        (
            '{"metadata": {"dataset_key": "riddles"}, "data": [{"sample_index": 1, "question": "?", "answer": "a"}]}',
            "sample 0",
        ),
        (
            '{"metadata": {"dataset_key": "riddles"}, "data": [{"sample_index": 0, "question": "?", "answer": 7}]}',
            "sample 0",
        ),
        ('{"metadata": {"dataset_key": "riddles"}, "data": []}', "0 samples"),
    ],
)
def test_added_task_in_a_wrong_form_is_refused(riddles, tmp_path, capsys, content, expected):
    riddles.write_text(content)
    assert run(tmp_path, "riddles") == 1
    assert expected in error_of(capsys)
    assert not (tmp_path / "split").exists()


def test_added_task_with_a_gold_answer_of_another_kind_is_refused(
    riddles, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(
        tasks.TASKS, "riddles", tasks.TASKS["riddles"]._replace(kind=tasks.KIND_NUMBER)
    )
    assert run(tmp_path, "riddles") == 1
    assert error_of(capsys) == "error: the gold answer 'yes' of riddles is not a number"
    assert not (tmp_path / "split").exists()


def test_added_task_is_not_prepared_unless_named(riddles, mirror, tmp_path, capsys):
    assert run(tmp_path, "--mirror", str(mirror)) == 0
    assert "riddles" not in (shown := capsys.readouterr().out) and "toy" not in shown


@pytest.mark.parametrize("key", ["../riddles", "/etc/riddles", "..\\riddles", "c:riddles"])
def test_key_that_leads_out_of_the_folder_is_refused(world, monkeypatch, tmp_path, capsys, key):
    monkeypatch.setitem(tasks.TASKS, key, tasks.TASKS["toy"]._replace(key=key))
    assert prepare.inside(tmp_path, "dataset/x..y.json") == tmp_path / "dataset/x..y.json"
    with pytest.raises(files.UserError, match="leads out of"):
        prepare.inside(tmp_path, key)
    assert run(tmp_path / "out", key) == 1
    error_of(capsys)
    assert files_under(tmp_path) == []


def test_toy_task_needs_nothing(world, tmp_path, capsys):
    assert run(tmp_path, "toy") == 0
    assert "nothing to prepare" in capsys.readouterr().out
    assert files_under(tmp_path) == []


def test_unknown_task_is_an_error_and_the_others_are_prepared(mirror, tmp_path, capsys):
    assert run(tmp_path / "out", "coinflip", "coin_flip", "--mirror", str(mirror)) == 1
    assert "coinflip" in error_of(capsys)
    assert (tmp_path / "out/dataset/coin_flip.json").exists()


def test_command_runs_from_any_folder(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "data/prepare.py"), "toy"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "toy" in done.stdout
