"""Fetch the 12 benchmarks of the paper and convert them to one format, byte for byte as the published data.

    python data/prepare.py                          # all 12 (about 60 MB to download, 48 of them for aqua)
    python data/prepare.py multiarith coin_flip     # some
    python data/prepare.py --completions FILE.tar.gz   # published completion files -> saved/, checked (data/archive.py)
    python data/prepare.py --mirror DIR             # offline: the raw files lie in DIR/<owner>/<repo>/<commit>/<path>

Writes dataset/<task>.json, split/<task>__default.json (and __template.json for two tasks) and few_shot_cot_prompts.json
into this folder.  Every raw file and every built file is checked against the sum in its row; what is there and right is
left alone, so an interrupted run just goes on.  Formats, sources, licences and known leaks: data/README.md.
"""

import argparse
import hashlib
import http.client
import json
import os
import sys
import urllib.request
from pathlib import Path, PureWindowsPath
from typing import Callable, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tasks  # in the project's root
import storage

HOST = "https://raw.githubusercontent.com/"
TIMEOUT = 30  # seconds without a byte before a download is given up
LETTERS = "ABCDEFGHIJ"
FORM = '{"metadata": {"dataset_key": "<task>"}, "data": [{"sample_index": 0, "question": "...", "answer": "..."}, ...]}'


# ---------------------------------------------------------------------------------------------------------------------
# Reading: text of a raw file -> rows.  Converting: row -> (question, answer) or (question, answer, rationale)


def json_lines(text):
    return [
        json.loads(line) for line in text.split("\n") if line.strip()
    ]  # not splitlines(): U+2028 may stand inside a string


def examples(text):
    return json.loads(text)["examples"]


def shuffled_dates(text):
    """The source mostly puts the right choice first, so choice j goes to place permutation[j], by one random state for all rows."""
    import numpy as np

    state = np.random.RandomState(0)
    rows = []
    for row in examples(text):
        places = state.permutation(len(row["target_scores"])).tolist()
        scores = [score for _, score in sorted(zip(places, row["target_scores"].items()))]
        rows.append({"input": row["input"].strip(), "target_scores": dict(scores)})
    return rows


def with_choices(question, choices):
    """('Which?', ['red', ' blue']) -> 'Which? Answer choices: (A) red, (B) blue.'"""
    return f"{question} Answer choices: {', '.join(f'({letter}) {choice.strip()}' for letter, choice in zip(LETTERS, choices))}."


def word_problem(row):
    return row["sQuestion"].strip(), str(row["lSolutions"][0])


def aqua(row):
    question = with_choices(
        row["question"].strip(), [option[2:] for option in row["options"]]
    )  # 'A)125' -> '125'
    return question, row["correct"], row["rationale"].strip()


def commonsense_qa(row):
    return with_choices(
        row["question"]["stem"], [choice["text"] for choice in row["question"]["choices"]]
    ), row["answerKey"]


def which_is_true(row):
    question = with_choices(
        row["input"] + "\nWhich choice is true?",
        [choice.removesuffix(".") for choice in row["target_scores"]],
    )
    return question, LETTERS[list(row["target_scores"].values()).index(1)]


def strategy_qa(row):
    rationale = row["target"].split(". ", 1)[1].strip()  # 'No. It was ...' -> 'It was ...'
    return row["input"].strip(), "Yes" if row["target_scores"]["Yes"] == 1 else "No", rationale


# ---------------------------------------------------------------------------------------------------------------------
# The table: where a benchmark comes from, how it is read and converted, and the sum of what has to come out


class File(NamedTuple):
    path: str  # raw: below HOST, OUT/raw and the mirror; built: below OUT
    sha256: str | None
    lines: int | None = None  # checked where no sum is known


class Recipe(NamedTuple):
    read: Callable
    convert: Callable
    sha256: str | None  # of dataset/<task>.json
    raw: list  # samples are numbered through these files in order
    template: File | None = None
    lines: int | None = None  # of dataset/<task>.json


ZERO_SHOT = "kojima-takeshi188/zero_shot_cot/5ef330fcdeec0cd26aee27943504f91f8ec1c33c/dataset/"
GRADE_SCHOOL = (
    "openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/"
)
TEACHERS = "itsnamgyu/reasoning-teacher/a2ca4d28d3bbabbd77106b76d06885d1a5eac0d9/data/"
PROMPTS = File(
    TEACHERS + "few_shot_cot_prompts.json",
    "72bb973daf1ab1217ec5bc1cc95a8be8ab78d05ff42356a3176341d848956d19",
)
RECIPES = {
    "single_eq": Recipe(
        json.loads,
        word_problem,
        "afe3b69a8d6234741b79fbb61bf1efff76f5679f987ed9f4ceabdda635de9736",
        [
            File(
                ZERO_SHOT + "SingleEq/questions.json",
                "051507bd2b489c257057b485774a83d2710c23a4bc0f4a58e1822ae2773ef05e",
            )
        ],
    ),
    "addsub": Recipe(
        json.loads,
        word_problem,
        "840729afb5a899a788525ac0c804705f24175ab0d80403c4cebba571c4776182",
        [
            File(
                ZERO_SHOT + "AddSub/AddSub.json",
                "21930fa90385c72b5a15f4b9a4dda27276b889ae9ff44285505cdd9fa0a20df8",
            )
        ],
    ),
    "multiarith": Recipe(
        json.loads,
        lambda row: (row["sQuestion"].strip(), str(int(row["lSolutions"][0]))),
        "298726f5228589ce03664c3c88e0553963609c423082b1da37ef592962c0eddf",
        [
            File(
                ZERO_SHOT + "MultiArith/MultiArith.json",
                "dc9db1b6cc68b1ecc2dec830d15aaf8c9a0932aa31d5ffce88ef3628179d36f4",
            )
        ],
        File(
            TEACHERS + "split/multiarith__template.json",
            "188abcfb1358424791e2d9c8d622ad10356283405fab11e1a58fa374cd9a48f4",
        ),
    ),
    "gsm8k": Recipe(
        json_lines,
        lambda row: (row["question"], row["answer"].split("#### ")[1]),
        "93acb07c83cd71b1a040c11ba94cdeaf0e8b9045897d93481b1a03b7b9771315",
        [
            File(
                GRADE_SCHOOL + "train.jsonl",
                "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
            ),
            File(
                GRADE_SCHOOL + "test.jsonl",
                "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
            ),
        ],
    ),
    "aqua": Recipe(
        json_lines,
        aqua,
        None,
        [  # no sum of its train file (47.6 MB) is known: the commit pins it, the lines are counted
            File(
                "google-deepmind/AQuA/26b64ed1f22208c6742f47df547dfd65088ec30d/train.json",
                None,
                lines=97467,
            ),
            File(
                ZERO_SHOT + "AQuA/test.json",
                "de41581881ef95c5588c44ddc701c77fd480839241dd422a0d181262af24520c",
            ),
        ],
        lines=7 + 6 * 97721,
    ),  # a built sample has 6 lines
    "svamp": Recipe(
        json.loads,
        lambda row: (f"{row['Body'].strip()} {row['Question'].strip()}", str(row["Answer"])),
        "3d1e707d77733c1777367f777043aaa9ee1f31586ffa007a4599eeebd5c2d91f",
        [
            File(
                ZERO_SHOT + "SVAMP/SVAMP.json",
                "5be77703a6d891ae476d7c082787ad361392aa02453b132516cdd5f4e7934e3e",
            )
        ],
    ),
    "tracking_shuffled_objects": Recipe(
        examples,
        which_is_true,
        "dd8167b269639a4bd35078e6eca90854fa271e9739e7aef43528c3224472e28b",
        [
            File(
                ZERO_SHOT + "Bigbench_object_tracking/task.json",
                "74b74d3c8827c0387a3f24ee9efa7edd90b2d53af3daacb9961341af66f750a0",
            )
        ],
    ),
    "date_understanding": Recipe(
        shuffled_dates,
        which_is_true,
        "f708413af079e84d6a0b12d2799b871ab6ad36f4192062f97ab14fca500be700",
        [
            File(
                ZERO_SHOT + "Bigbench_Date/task.json",
                "ff716f0e399109146db3a998281c39954907b78268a9b633a95582d63847822f",
            )
        ],
        File(
            TEACHERS + "split/date_understanding__template.json",
            "9b4508734ffc2ae908615e3f9f6ca3c9e27f44e4b5e714d220bd7152ddd39d89",
        ),
    ),
    "coin_flip": Recipe(
        examples,
        lambda row: (row["question"], row["answer"]),
        "f08e263c332161ee9b0f2abdd572f7e42e93cabe57f642e0ab306dcebe750f90",
        [
            File(
                ZERO_SHOT + "coin_flip/coin_flip.json",
                "68cf201737a1463ef6bed5419622805a8934d92bff6a28a9dfbf83be3135ba5a",
            )
        ],
    ),
    "last_letter_concatenation": Recipe(
        examples,
        lambda row: (row["question"], row["answer"]),
        "7fabafa2f131a3384e60323ce18351e6ea85e360a306ee48eaccbe5ae6b0bf5f",
        [
            File(
                ZERO_SHOT + "last_letters/last_letters.json",
                "60e8d092d0a6423d3256e87e0c249b69aefea4cd27985082095fa4e93931fb02",
            )
        ],
    ),
    "commonsense_qa": Recipe(
        json_lines,
        commonsense_qa,
        "badd07a51e7c850f657b309f2454b7177ba2e7158fe32d8011a744148c9ac579",
        [
            File(
                ZERO_SHOT + "CommonsenseQA/train_rand_split.jsonl",
                "58ffa3c8472410e24b8c43f423d89c8a003d8284698a6ed7874355dedd09a2fb",
            ),
            File(
                ZERO_SHOT + "CommonsenseQA/dev_rand_split.jsonl",
                "3210497fdaae614ac085d9eb873dd7f4d49b6f965a93adadc803e1229fd8a02a",
            ),
        ],
    ),
    "strategy_qa": Recipe(
        examples,
        strategy_qa,
        "4ba0d7ab1f32d5edc52ea0913763dc84f9d9c3d756005398d87dafeef133552d",
        [
            File(
                ZERO_SHOT + "StrategyQA/task.json",
                "60af9081fed20102fd8bb1e02dc7d9f12238efcba33e4c1a56b4d61cb6409803",
            )
        ],
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# Files: raw ones come from the mirror, from OUT/raw, or from the network; all are verified, then written whole or not at all


def inside(folder, name):
    """folder/name; UserError if name would lead out of folder (a Windows path knows both slashes and drive letters)."""
    if PureWindowsPath(name).anchor or ".." in PureWindowsPath(name).parts:
        raise storage.UserError(
            f"{name!r} leads out of {folder}: mend that name in tasks.py or data/prepare.py"
        )
    return Path(folder) / name


def defect(file, content):
    """What is wrong with the content of a file, in words; None if it is right."""
    if file.lines is not None:
        lines = sum(1 for line in content.split(b"\n") if line.strip())
        return None if lines == file.lines else f"has {lines} lines instead of {file.lines}"
    found = hashlib.sha256(content).hexdigest()
    return None if found == file.sha256 else f"has SHA-256 {found} instead of {file.sha256}"


def open_url(url, start):
    """-> the response that gives url from byte `start` on.  The one function that touches the network."""
    return urllib.request.urlopen(
        urllib.request.Request(url, headers={"Range": f"bytes={start}-"}), timeout=TIMEOUT
    )


def download(raw, path):
    """Fetch a raw file to path.  Until it is whole and verified it is called path.part, and the next call goes on there."""
    from tqdm import tqdm

    url = HOST + raw.path
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    start = part.stat().st_size if part.exists() else 0
    if not sys.stderr.isatty():
        print(f"downloading {url}" + (f" from byte {start}" if start else ""), file=sys.stderr)
    try:
        with open_url(url, start) as response:
            start = (
                start if response.status == 206 else 0
            )  # 200: the server sends everything, so begin anew
            total = start + int(response.headers.get("Content-Length") or 0)
            with (
                open(part, "ab" if start else "wb") as f,
                tqdm(
                    desc=path.name,
                    total=total,
                    initial=start,
                    unit="B",
                    unit_scale=True,
                    leave=False,
                    disable=None,
                ) as bar,
            ):  # None: no bar without a terminal
                while chunk := response.read(1 << 16):
                    f.write(chunk)
                    bar.update(len(chunk))
                if f.tell() < total:  # to read() an early end is an end
                    raise ConnectionError(f"{total - f.tell()} bytes are missing")
    except (
        OSError,
        http.client.HTTPException,
    ) as e:  # URLError, HTTPError and timeouts are OSErrors
        if (
            getattr(e, "code", None) != 416
        ):  # 416: nothing is left to send, the last run ended just before the renaming
            raise storage.UserError(
                f"{url} could not be downloaded to {part} ({str(e) or type(e).__name__}): run the same command again to "
                "go on, or fetch it by other means and use --mirror"
            ) from None
    if wrong := defect(raw, part.read_bytes()):
        part.unlink()
        raise storage.UserError(
            f"{url} {wrong}, so it was thrown away: run the same command again, or use --mirror with a right copy"
        )
    os.replace(part, path)


def raw_content(raw, mirror, out):
    """-> the verified bytes of a raw file."""
    path = inside(mirror or Path(out) / "raw", raw.path)
    if mirror and not path.is_file():
        raise storage.UserError(
            f"{path} is missing: run without --mirror to download it, or put {HOST}{raw.path} there"
        )
    if not path.exists():
        download(raw, path)
    content = path.read_bytes()
    if wrong := defect(raw, content):
        mend = (
            f"replace it by {HOST}{raw.path}"
            if mirror
            else "delete it and run the same command again"
        )
        raise storage.UserError(f"{path} {wrong}, so it is damaged or another version: {mend}")
    return content


def put(file, out, make):
    """Write the bytes make() to OUT/<file.path>, unless the right file is there.  -> whether it was written"""
    path = inside(out, file.path)
    if path.is_file() and not defect(file, path.read_bytes()):
        return False
    content = make()
    if wrong := defect(file, content):
        raise storage.UserError(
            f"{path} was not written because its content {wrong}: undo the change to its converter in data/prepare.py, "
            "or mend the sum in its row there"
        )
    storage.write_atomic(path, content)
    return True


def build(key, recipe, mirror, out):
    """-> the bytes of dataset/<key>.json"""
    samples = []
    for raw in recipe.raw:
        content = raw_content(raw, mirror, out)
        try:
            samples += [recipe.convert(row) for row in recipe.read(content.decode())]
        except (
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
        ) as e:  # only where no sum of the raw file is known
            raise storage.UserError(
                f"{raw.path} is not in the original's format ({type(e).__name__}: {e}): "
                f"replace it by {HOST}{raw.path}"
            ) from None
    data = [
        {"sample_index": i, **dict(zip(("question", "answer", "rationale"), sample))}
        for i, sample in enumerate(samples)
    ]
    return json.dumps(
        {"metadata": {"dataset_key": key}, "data": data}, indent=4, ensure_ascii=True
    ).encode()


def put_split(key, n, out):
    """Write the default split of n samples.  -> (whether it was written, 'train 7 / test 3')"""
    train, test = tasks.default_split(key, n)
    if not train or not test or max(train + test) >= n:
        raise storage.UserError(
            f"dataset/{key}.json has {n} samples, too few for the split of its row in tasks.py: change either"
        )
    content = json.dumps({"train": train, "test": test}).encode()
    file = File(f"split/{key}__default.json", hashlib.sha256(content).hexdigest())
    return put(file, out, lambda: content), f"train {len(train)} / test {len(test)}"


def count_samples(key, out):
    """-> the number of samples in the dataset that a user added.  Raises UserError if it is not in the form FORM."""
    path = inside(out, f"dataset/{key}.json")
    if not path.is_file():
        raise storage.UserError(
            f"{path} is missing and no source of {key} is known: put it there as {FORM} and run this again"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        if content["metadata"]["dataset_key"] != key:
            raise ValueError(f"its dataset_key is not {key!r}")
        for i, sample in enumerate(content["data"]):
            if (
                sample["sample_index"] != i
                or not isinstance(sample["question"], str)
                or not isinstance(sample["answer"], str)
            ):
                raise ValueError(
                    f"sample {i} needs sample_index {i} and texts as question and answer"
                )
            tasks.grade(
                key, None, "", sample["answer"], "flexible"
            )  # raises UserError where its kind cannot read the gold answer
        return len(content["data"])
    except (ValueError, LookupError, TypeError) as e:
        raise storage.UserError(
            f"{path} is not in the form {FORM} ({type(e).__name__}: {e}): mend it and run this again"
        ) from None


def prepare(key, mirror, out):
    """Make all files of one task.  -> a line for the user"""
    row = tasks.find_task(key)
    recipe = RECIPES.get(key)
    if key == "toy":
        return "toy: made in memory, nothing to prepare"
    n = (
        row.n if recipe else count_samples(key, out)
    )  # without a recipe: a benchmark that the user added
    written = recipe and put(
        File(f"dataset/{key}.json", recipe.sha256, recipe.lines),
        out,
        lambda: build(key, recipe, mirror, out),
    )
    split_written, sizes = put_split(key, n, out)
    copies = (
        {f"split/{key}__template.json": recipe.template, "few_shot_cot_prompts.json": PROMPTS}
        if recipe
        else {}
    )
    for path, raw in copies.items():
        written |= bool(raw) and put(
            raw._replace(path=path), out, lambda: raw_content(raw, mirror, out)
        )
    return f"{key}: {n} samples, {sizes}" + (
        "" if written or split_written else " (was there already)"
    )


def main(argv=None):
    """Prepare the tasks that are named, or all; one that fails does not keep the others from being built."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "task", nargs="*", metavar="TASK", help="keys of tasks.py (default: the 12 benchmarks)"
    )
    parser.add_argument(
        "--mirror",
        type=Path,
        metavar="DIR",
        help="read the raw files from this folder; download nothing",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path(__file__).resolve().parent,
        help="write here (default: data/)",
    )
    parser.add_argument(
        "--completions", metavar="ARCHIVE", help="import the completion files of a tar.gz instead"
    )
    parser.add_argument(
        "--saved",
        default=Path(__file__).resolve().parent.parent / "saved",
        help="with --completions (default: saved/)",
    )
    args = parser.parse_args(argv)
    storage.escape_unencodable_output()
    if args.mirror and not args.mirror.is_dir():
        parser.error(
            f"there is no folder {args.mirror}: give --mirror the folder that holds <owner>/<repo>/<commit>/<path>"
        )
    try:
        return run(args)
    except KeyboardInterrupt:
        sys.exit("\nerror: interrupted: run the same command again to go on")


def run(args):
    """Import an archive, or prepare the tasks that were named.  -> exit status"""
    if args.completions:
        from data import archive

        try:
            for line in archive.import_completions(args.completions, args.saved):
                print(line, flush=True)
        except (storage.UserError, OSError) as e:
            sys.exit(f"error: {e}")
        return 0
    failures = []
    for key in dict.fromkeys(args.task or [key for key in tasks.TASKS if key in RECIPES]):
        try:
            print(prepare(key, args.mirror, args.out), flush=True)
        except storage.UserError as e:
            failures.append(str(e))
        except OSError as e:
            failures.append(
                f"{e.filename or args.out} cannot be read or written ({e.strerror or e}): mend that and run this again"
            )
    for failure in dict.fromkeys(failures):
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
