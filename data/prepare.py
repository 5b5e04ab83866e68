"""Fetch the 12 benchmarks of the paper and convert them to one format, byte for byte as published.

    python data/prepare.py                             # all 12 (60 MB to download, 48 for aqua)
    python data/prepare.py multiarith coin_flip        # some
    python data/prepare.py --mirror DIR                # raw files: DIR/<owner>/<repo>/...
    python data/prepare.py --completions FILE.tar.gz   # published completion files -> saved/

Writes dataset/<task>.json, split/<task>__default.json (and __template.json for two tasks) and
few_shot_cot_prompts.json into this folder.  Every raw and every built file is checked against its
row's sum; what is there and right is left alone, so that an interrupted run can be repeated.
Formats, sources, licences and known leaks: data/README.md.
"""

import argparse
import filecmp
import functools
import hashlib
import http.client
import json
import os
import re
import sys
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import completions
import storage
import tasks
import terminal
from storage import UserError

ROOT = Path(__file__).resolve().parent.parent
HOST = "https://raw.githubusercontent.com/"
TIMEOUT = 30  # seconds without a byte until a download is given up
LETTERS = "ABCDEFGHIJ"
PARTS = ("question", "answer", "rationale")  # of a sample; few benchmarks have the last
Row = dict[str, Any]  # of a raw file
Converted = tuple[str, ...]  # the PARTS that a benchmark has


# ---------------- Reading: text of a raw file -> rows
def json_lines(text: str) -> list[Row]:
    r"""Read JSON lines, which end at \n alone: strings may hold U+2028."""
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def examples(text: str) -> list[Row]:
    """Read {"examples": [rows]}."""
    return json.loads(text)["examples"]


def shuffled_dates(text: str) -> list[Row]:
    """Move choice j to place permutation[j]: the source mostly puts the right choice first.

    One random state serves all rows, as in the published data.
    """
    import numpy as np

    state = np.random.RandomState(0)
    rows = []
    for row in examples(text):
        scores = row["target_scores"]
        places = state.permutation(len(scores)).tolist()
        placed = sorted(zip(places, scores.items(), strict=True))
        shuffled = dict(item for _, item in placed)
        rows.append({"input": row["input"].strip(), "target_scores": shuffled})
    return rows


# ---------------- Converting: row -> (question, answer) or (question, answer, rationale)
def with_choices(question: str, choices: list[str]) -> str:
    """('Which?', ['red', ' blue']) -> 'Which? Answer choices: (A) red, (B) blue.'"""
    lettered = []
    for letter, choice in zip(LETTERS, choices, strict=False):
        lettered.append(f"({letter}) {choice.strip()}")
    listed = ", ".join(lettered)
    return f"{question} Answer choices: {listed}."


def word_problem(row: Row) -> Converted:
    """SingleEq and AddSub: the answer is a float, 43.0."""
    return row["sQuestion"].strip(), str(row["lSolutions"][0])


def aqua(row: Row) -> Converted:
    """An option is 'A)125'."""
    choices = [option[2:] for option in row["options"]]
    question = with_choices(row["question"].strip(), choices)
    return question, row["correct"], row["rationale"].strip()


def svamp(row: Row) -> Converted:
    """The question has two parts."""
    question = f"{row['Body'].strip()} {row['Question'].strip()}"
    return question, str(row["Answer"])


def commonsense_qa(row: Row) -> Converted:
    """A choice is {"label": "A", "text": "bank"}."""
    question = row["question"]
    choices = [choice["text"] for choice in question["choices"]]
    return with_choices(question["stem"], choices), row["answerKey"]


def which_is_true(row: Row) -> Converted:
    """The right choice has score 1; each loses one full stop at its end."""
    scores = row["target_scores"]
    choices = [choice.removesuffix(".") for choice in scores]
    asked = row["input"] + "\nWhich choice is true?"
    question = with_choices(asked, choices)
    right = list(scores.values()).index(1)
    return question, LETTERS[right]


def strategy_qa(row: Row) -> Converted:
    """The target is answer and rationale: 'No. It was ...'"""
    _, rationale = row["target"].split(". ", 1)
    answer = "No"
    if row["target_scores"]["Yes"] == 1:
        answer = "Yes"
    return row["input"].strip(), answer, rationale.strip()


# ---------------- The table: where a benchmark comes from, how it is made, what has to come out
class File(NamedTuple):  # known by its SHA-256, or else by its number of lines
    path: str  # raw: below HOST, OUT/raw and the mirror; built: below OUT
    sha256: str | None
    lines: int | None = None


class Recipe(NamedTuple):  # samples are numbered through the raw files in order
    read: Callable[[str], list[Row]]
    convert: Callable[[Row], Converted]
    sha256: str | None  # of dataset/<task>.json
    raw: list[File]
    template: File | None = None  # the template split
    lines: int | None = None  # of dataset/<task>.json


ZERO_SHOT = "kojima-takeshi188/zero_shot_cot/5ef330fcdeec0cd26aee27943504f91f8ec1c33c/dataset/"
GSM8K = "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/"
TEACHERS = "itsnamgyu/reasoning-teacher/a2ca4d28d3bbabbd77106b76d06885d1a5eac0d9/data/"
PROMPTS = File(TEACHERS + "few_shot_cot_prompts.json",
               "72bb973daf1ab1217ec5bc1cc95a8be8ab78d05ff42356a3176341d848956d19")  # fmt: skip
RECIPES = {
    "single_eq": Recipe(
        json.loads, word_problem,
        "afe3b69a8d6234741b79fbb61bf1efff76f5679f987ed9f4ceabdda635de9736",
        [File(ZERO_SHOT + "SingleEq/questions.json",
              "051507bd2b489c257057b485774a83d2710c23a4bc0f4a58e1822ae2773ef05e")]),
    "addsub": Recipe(
        json.loads, word_problem,
        "840729afb5a899a788525ac0c804705f24175ab0d80403c4cebba571c4776182",
        [File(ZERO_SHOT + "AddSub/AddSub.json",
              "21930fa90385c72b5a15f4b9a4dda27276b889ae9ff44285505cdd9fa0a20df8")]),
    "multiarith": Recipe(
        json.loads, lambda row: (row["sQuestion"].strip(), str(int(row["lSolutions"][0]))),
        "298726f5228589ce03664c3c88e0553963609c423082b1da37ef592962c0eddf",
        [File(ZERO_SHOT + "MultiArith/MultiArith.json",
              "dc9db1b6cc68b1ecc2dec830d15aaf8c9a0932aa31d5ffce88ef3628179d36f4")],
        File(TEACHERS + "split/multiarith__template.json",
             "188abcfb1358424791e2d9c8d622ad10356283405fab11e1a58fa374cd9a48f4")),
    "gsm8k": Recipe(
        json_lines, lambda row: (row["question"], row["answer"].split("#### ")[1]),
        "93acb07c83cd71b1a040c11ba94cdeaf0e8b9045897d93481b1a03b7b9771315",
        [File(GSM8K + "train.jsonl",
              "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
         File(GSM8K + "test.jsonl",
              "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14")]),
    "aqua": Recipe(  # no sum of its train file is known: the commit pins it, its lines are counted
        json_lines, aqua,
        None,
        [File("google-deepmind/AQuA/26b64ed1f22208c6742f47df547dfd65088ec30d/train.json",
              None, lines=97467),
         File(ZERO_SHOT + "AQuA/test.json",
              "de41581881ef95c5588c44ddc701c77fd480839241dd422a0d181262af24520c")],
        lines=7 + 6 * 97721),  # a built sample has 6 lines
    "svamp": Recipe(
        json.loads, svamp,
        "3d1e707d77733c1777367f777043aaa9ee1f31586ffa007a4599eeebd5c2d91f",
        [File(ZERO_SHOT + "SVAMP/SVAMP.json",
              "5be77703a6d891ae476d7c082787ad361392aa02453b132516cdd5f4e7934e3e")]),
    "tracking_shuffled_objects": Recipe(
        examples, which_is_true,
        "dd8167b269639a4bd35078e6eca90854fa271e9739e7aef43528c3224472e28b",
        [File(ZERO_SHOT + "Bigbench_object_tracking/task.json",
              "74b74d3c8827c0387a3f24ee9efa7edd90b2d53af3daacb9961341af66f750a0")]),
    "date_understanding": Recipe(
        shuffled_dates, which_is_true,
        "f708413af079e84d6a0b12d2799b871ab6ad36f4192062f97ab14fca500be700",
        [File(ZERO_SHOT + "Bigbench_Date/task.json",
              "ff716f0e399109146db3a998281c39954907b78268a9b633a95582d63847822f")],
        File(TEACHERS + "split/date_understanding__template.json",
             "9b4508734ffc2ae908615e3f9f6ca3c9e27f44e4b5e714d220bd7152ddd39d89")),
    "coin_flip": Recipe(
        examples, lambda row: (row["question"], row["answer"]),
        "f08e263c332161ee9b0f2abdd572f7e42e93cabe57f642e0ab306dcebe750f90",
        [File(ZERO_SHOT + "coin_flip/coin_flip.json",
              "68cf201737a1463ef6bed5419622805a8934d92bff6a28a9dfbf83be3135ba5a")]),
    "last_letter_concatenation": Recipe(
        examples, lambda row: (row["question"], row["answer"]),
        "7fabafa2f131a3384e60323ce18351e6ea85e360a306ee48eaccbe5ae6b0bf5f",
        [File(ZERO_SHOT + "last_letters/last_letters.json",
              "60e8d092d0a6423d3256e87e0c249b69aefea4cd27985082095fa4e93931fb02")]),
    "commonsense_qa": Recipe(
        json_lines, commonsense_qa,
        "badd07a51e7c850f657b309f2454b7177ba2e7158fe32d8011a744148c9ac579",
        [File(ZERO_SHOT + "CommonsenseQA/train_rand_split.jsonl",
              "58ffa3c8472410e24b8c43f423d89c8a003d8284698a6ed7874355dedd09a2fb"),
         File(ZERO_SHOT + "CommonsenseQA/dev_rand_split.jsonl",
              "3210497fdaae614ac085d9eb873dd7f4d49b6f965a93adadc803e1229fd8a02a")]),
    "strategy_qa": Recipe(
        examples, strategy_qa,
        "4ba0d7ab1f32d5edc52ea0913763dc84f9d9c3d756005398d87dafeef133552d",
        [File(ZERO_SHOT + "StrategyQA/task.json",
              "60af9081fed20102fd8bb1e02dc7d9f12238efcba33e4c1a56b4d61cb6409803")]),
}  # fmt: skip


# ---------------- Files: raw ones come from the mirror, OUT/raw or the network; all are verified
def defect(file: File, content: bytes) -> str | None:
    """Return what is wrong with the content of a file, in words; None if it is right."""
    if file.lines is None:
        found = hashlib.sha256(content).hexdigest()
        if found != file.sha256:
            return f"has SHA-256 {found} instead of {file.sha256}"
        return None
    filled = [line for line in content.split(b"\n") if line.strip()]
    lines = len(filled)
    if lines != file.lines:
        return f"has {lines} lines instead of {file.lines}"
    return None


def open_url(url: str, start: int) -> Any:
    """Return the response that gives url from byte `start` on; nothing else touches the network."""
    headers = {"Range": f"bytes={start}-"}
    request = urllib.request.Request(url, headers=headers)
    return urllib.request.urlopen(request, timeout=TIMEOUT)


def receive(url: str, part: Path) -> None:
    """Append what `part` lacks of url.  Raises ConnectionError where the reply ends early."""
    from tqdm import tqdm

    start = 0
    if part.exists():
        start = part.stat().st_size
    has_terminal = terminal.has_terminal()
    if not has_terminal:
        print(f"downloading {url} from byte {start}", file=sys.stderr)
    with open_url(url, start) as response, open(part, "ab") as f:
        if response.status != 206:  # the server sends everything
            f.seek(0)
            f.truncate()
        total = f.tell() + int(response.headers.get("Content-Length") or 0)
        options = {"total": total, "initial": f.tell(), "unit": "B", "unit_scale": True}
        with tqdm(desc=part.name, leave=False, disable=not has_terminal, **options) as bar:
            while chunk := response.read(1 << 16):
                f.write(chunk)
                bar.update(len(chunk))
        missing = total - f.tell()
        if missing > 0:
            raise ConnectionError(f"{missing} bytes are missing")


def download(raw: File, path: Path) -> None:
    """Fetch a raw file.  Until it is verified it is path.part, which the next call completes."""
    url = HOST + raw.path
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        receive(url, part)
    except (OSError, http.client.HTTPException) as e:  # timeouts and urllib's are OSErrors
        if getattr(e, "code", None) != 416:  # 416: no byte was missing
            raise UserError(
                f"{url} could not be downloaded to {part} ({str(e) or type(e).__name__}): run the "
                "same command again to go on, or fetch it by other means and use --mirror"
            ) from None
    if wrong := defect(raw, part.read_bytes()):
        part.unlink()
        raise UserError(
            f"{url} {wrong}, so it was thrown away: run the same command again, or use --mirror "
            "with a right copy"
        )
    os.replace(part, path)


def raw_content(raw: File, mirror: Path | None, out: Path) -> bytes:
    """Return the verified bytes of a raw file."""
    path = (mirror or out / "raw") / raw.path
    remedy = "delete it and run the same command again"
    if mirror:
        remedy = f"replace it by {HOST}{raw.path}"
        if not path.is_file():
            raise UserError(
                f"{path} is missing: run without --mirror to download it, or put {HOST}{raw.path} "
                "there"
            )
    elif not path.exists():
        download(raw, path)
    content = path.read_bytes()
    if wrong := defect(raw, content):
        raise UserError(f"{path} {wrong}, so it is damaged or another version: {remedy}")
    return content


def put(file: File, out: Path, make: Callable[[], bytes]) -> bool:
    """Write make() to OUT/<file.path> unless the right file is there; return whether it did."""
    path = out / file.path
    if path.is_file() and not defect(file, path.read_bytes()):
        return False
    content = make()
    if wrong := defect(file, content):
        raise UserError(
            f"{path} was not written because its content {wrong}: undo the change to its converter "
            "in data/prepare.py, or mend the sum in its row there"
        )
    storage.write_atomic(path, content)
    return True


# ---------------- Tasks
def build(key: str, recipe: Recipe, mirror: Path | None, out: Path) -> bytes:
    """Return the bytes of dataset/<key>.json."""
    data = []
    for raw in recipe.raw:
        content = raw_content(raw, mirror, out)
        try:
            for row in recipe.read(content.decode()):
                sample = {"sample_index": len(data)}
                sample |= zip(PARTS, recipe.convert(row), strict=False)
                data.append(sample)
        except storage.UNREADABLE as e:  # only where no sum of the raw file is known
            raise UserError(
                f"{raw.path} is not in the original's format ({type(e).__name__}: {e}): replace it "
                f"by {HOST}{raw.path}"
            ) from None
    dataset = {"metadata": {"dataset_key": key}, "data": data}
    return json.dumps(dataset, indent=4).encode()


def put_split(key: str, n: int, out: Path) -> tuple[bool, str]:
    """Write the default split of n samples; return (whether it was written, 'train 7 / test 3').

    Raises UserError where the row of TASKS has other sizes.
    """
    row = tasks.find_task(key)
    train, test = tasks.default_split(key, n)
    n_train = len(train)
    n_test = len(test)
    sizes = (n, n_train, n_test)
    if sizes != (row.n, row.train, row.test) or 0 in sizes:
        raise UserError(
            f"dataset/{key}.json has {n} samples, {n_train} to train and {n_test} to test, "
            f"but its row of TASKS says {row.n}, {row.train} and {row.test}: change either"
        )
    split = json.dumps({"train": train, "test": test})
    content = split.encode()
    sha256 = hashlib.sha256(content).hexdigest()
    file = File(f"split/{key}__default.json", sha256)
    is_written = put(file, out, lambda: content)
    return is_written, f"train {n_train} / test {n_test}"


def count_samples(key: str, out: Path) -> int:
    """Return the number of samples of a dataset that a user added, whose gold answers are all read.

    Raises UserError where there is no such file or it is not in the form of data/README.md.
    """
    path = tasks.dataset_path(key, out)
    if not path.is_file():
        raise UserError(
            f"{path} is missing and no source of {key} is known: put it there in the form of "
            "data/README.md, with sample_index, question and answer, and run this again"
        )
    samples = tasks.load(key, out)
    for sample in samples:
        tasks.grade(key, None, "", sample["answer"], "flexible")
    return len(samples)


def prepare(key: str, mirror: Path | None, out: Path) -> str:
    """Make all files of one task; return a line for the user."""
    row = tasks.find_task(key)
    storage.safe_key(key)
    if key == "toy":
        return "toy: made in memory, nothing to prepare"
    recipe = RECIPES.get(key)
    if recipe:
        n = row.n
        dataset = File(f"dataset/{key}.json", recipe.sha256, recipe.lines)
        make = functools.partial(build, key, recipe, mirror, out)
        written = [put(dataset, out, make)]
        copies = {"few_shot_cot_prompts.json": PROMPTS}
        if recipe.template:
            copies[f"split/{key}__template.json"] = recipe.template
        for path, raw in copies.items():
            make = functools.partial(raw_content, raw, mirror, out)
            copy = raw._replace(path=path)
            written.append(put(copy, out, make))
    else:  # of a benchmark that the user added
        n = count_samples(key, out)
        written = []
    split_written, sizes = put_split(key, n, out)
    if any([*written, split_written]):
        return f"{key}: {n} samples, {sizes}"
    return f"{key}: {n} samples, {sizes} (was there already)"


# ---------------- Published completion files (saved/README.md)

MAX_FILE_BYTES = 512 << 20
MAX_ARCHIVE_BYTES = 8 << 30  # of all files: a few kilobytes can unpack to terabytes
COMPLETION_FILE = re.compile(  # or, in older archives, B_<model>__C_<key>/F_<key>__D_<task>.json
    r"(?:^|/)(B_[\w.+=@:-]{1,100}__C_[\w.+=@:-]{1,100}/(?:F_[\w.+=@:-]{1,100}__)?"
    r"[DT]_[\w.+=@:-]{1,150}\.json)\Z",
    re.ASCII,
)


def completion_members(tar: tarfile.TarFile) -> dict[str, tarfile.TarInfo]:
    """Check all entries of an archive; return those of completion files by their name for us."""
    found = {}
    total = 0
    for member in tar:
        total += member.size
        if not 0 <= member.size <= MAX_FILE_BYTES or total > MAX_ARCHIVE_BYTES:
            limits = f"{MAX_FILE_BYTES:,} bytes a file, or {MAX_ARCHIVE_BYTES:,} in all"
            raise UserError(f"with {member.name[:80]!r} it unpacks to more than {limits}")
        tarfile.data_filter(member, ".")
        name = COMPLETION_FILE.search(member.name)
        if name and member.isreg():
            found.setdefault(name[1], member)
    while tar.fileobj.read(1 << 20):  # to the end, where the checksum is
        pass
    if not found:
        raise UserError("it holds no completion file, B_<model>__C_<completion_key>/D_<task>.json")
    return found


def take_file(file: Path, path: Path) -> str:
    """Move a file to path if it is a completion file and none is there; return a line about it."""
    if path.exists():
        if filecmp.cmp(file, path, shallow=False):
            return f"{path} is there already"
        remedy = "it was kept; move it away to take the archive's"
        return f"{path} is there already, with other content: {remedy}"
    try:
        completions.read_completions(file)
    except UserError as e:
        return f"{path} was left out: {str(e).replace(str(file), 'it')}"
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(file, path)
    return f"{path}: {path.stat().st_size:,} bytes"


def import_completions(archive: Path, saved: Path) -> Iterator[str]:
    """Take the completion files of a tar.gz into saved/completion_data; yield a line about each.

    All entries are checked before any is extracted, and each file before it gets its name.  Raises
    UserError for an archive that is damaged or not to be trusted.
    """
    folder = saved / "completion_data"
    try:
        with tarfile.open(archive, "r:gz") as tar:
            members = completion_members(tar)
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".import-") as temporary:
                for name, member in members.items():
                    renamed = member.replace(name=name)
                    tar.extract(renamed, temporary, filter="data")
                    yield take_file(Path(temporary) / name, folder / name)
    except (UserError, tarfile.TarError, zlib.error, OverflowError, *storage.UNREADABLE) as e:
        reason = storage.one_line(e) or type(e).__name__
        taken = "nothing of it was taken that is not named above"
        raise UserError(f"{archive} cannot be imported, and {taken}: {reason}") from None


# ---------------- Command line
def prepare_all(keys: list[str], mirror: Path | None, out: Path) -> int:
    """Prepare tasks; one that fails does not keep back the others.  Return the exit status."""
    errors = []
    for key in dict.fromkeys(keys):
        try:
            print(prepare(key, mirror, out), flush=True)
        except UserError as e:
            errors.append(str(e))
        except OSError as e:
            reason = f"cannot be read or written ({e.strerror or e}): mend that and run this again"
            where = e.filename or out
            errors.append(f"{where} {reason}")
    for error in dict.fromkeys(errors):
        print(f"error: {error}", file=sys.stderr)
    return int(bool(errors))


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    benchmarks = [key for key in tasks.TASKS if key in RECIPES]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("task", nargs="*", default=benchmarks, help="keys of tasks.py (default: the 12 benchmarks)")
    add("--mirror", type=Path, help="read the raw files from this folder; download nothing")
    add("--data", "--out", type=Path, dest="out", default=ROOT / "data", help="default: data/")
    add("--completions", type=Path, help="import the completion files of this tar.gz instead")
    add("--saved", type=Path, default=ROOT / "saved", help="with --completions (default: saved/)")
    options = parser.parse_args(argv)
    mirror = options.mirror
    if mirror and not mirror.is_dir():
        form = "<owner>/<repo>/<commit>/<path>"
        parser.error(f"there is no folder {mirror}: give --mirror the folder that holds {form}")
    with terminal.error_exits():
        if not options.completions:
            return prepare_all(options.task, mirror, options.out)
        for line in import_completions(options.completions, options.saved):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
