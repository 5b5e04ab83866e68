"""Files: read with an error that names the line, written whole or not at all, and known by what they were made from.

Used by all modules; needs the standard library alone.
"""

import collections
import contextlib
import glob
import hashlib
import itertools
import json
import operator
import os
import pickle
import re
import sys
import tempfile
import time
from pathlib import Path


class UserError(Exception):
    """Something the user can mend; the message is one sentence: what is wrong, where, and what to do."""


class Interrupted(UserError):
    """The run was told to stop: nothing else is to be started."""


def write_atomic(path, text):
    """Write text (str or bytes) to path through a temporary file and a rename, so no reader ever sees half of it.

    Raises OSError that names the path: that of a full disk does not by itself."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name[:100]}.", suffix=".tmp"
    )
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(text.encode() if isinstance(text, str) else text)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from None
    finally:
        Path(temporary).unlink(missing_ok=True)


def write_json(path, value):
    """The style of the published files: four spaces, ASCII only."""
    write_atomic(path, json.dumps(value, indent=4))


def escape_unencodable_output():
    """Whatever the terminal's encoding: what it cannot show is printed as its number, not a reason to stop."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")


def without_doubles(pairs):
    """An object of JSON; two halves of a file, joined by hand, may hold a key twice, of which json would drop the first."""
    value = dict(pairs)
    if len(value) < len(pairs):
        [(key, _)] = collections.Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key[:80]!r} is there twice in an object")
    return value


def parse_json(text, where):
    """-> the JSON value in text.  Raises UserError that names the place."""
    try:
        return json.loads(text, object_pairs_hook=without_doubles)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where} is not valid JSON ({e}): mend or delete it") from None


def read_text(path):
    """-> the text of a UTF-8 file.  Raises UserError that names it."""
    try:
        return (
            Path(path).read_bytes().decode("utf-8-sig")
        )  # -sig: editors on Windows put a byte-order mark first
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text ({e.reason} at byte {e.start})") from None
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from None


def read_json(path):
    """-> the JSON object in a file.  Raises UserError where it is not JSON or not an object."""
    value = parse_json(read_text(path), path)
    if not isinstance(value, dict):
        raise UserError(
            f"{path} holds a JSON {type(value).__name__}, not an object: mend or delete it"
        )
    return value


def replace_lone_surrogates(text):
    """'a\\ud83d' -> 'a?': JSON may hold half a character (servers that stream send such), which no file or tokenizer takes."""
    return text.encode("utf-8", "replace").decode()


def read_jsonl(path):
    """-> the values of a JSON-lines file, in order.  Lines end at "\\n" alone: U+2028 may stand inside a string."""
    lines = read_text(path).split("\n")
    return [
        parse_json(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()
    ]


class Journal:
    """An append-only file of JSON lines {"key": ..., ...}: what it holds survives any kill, and no key stands in it twice.

    self.rows is {key: row}.  A second writer is refused (UserError), a torn last line dropped, a bad line elsewhere refused."""

    def __init__(self, path):
        import fcntl

        self.path = Path(path)
        self.rows = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = open(
            self.path, "ab+"
        )  # held until close() or the end of the process, however it comes
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.path} is being written by another run: wait for it or stop it"
            ) from None
        end = self.lock.seek(0)
        for i, line in enumerate(self.lock, 1):
            if not line.endswith(b"\n"):
                break  # torn
            end += len(line)
            if line.isspace():
                continue
            row = parse_json(line, f"{self.path}, line {i}")
            if not isinstance(row, dict) or not isinstance(row.get("key"), str | int):
                raise UserError(
                    f"{self.path}, line {i} is not a row of a journal: mend or delete that line"
                )
            self.rows.setdefault(row["key"], row)
        os.truncate(self.path, end)

    def append(self, rows):
        """Add rows whose keys are new; they are on the disk when this returns.  Raises OSError where they cannot be."""
        self.write(self.add(rows))

    def add(self, rows):
        """Take rows whose keys are new into self.rows; -> these rows, for write()."""
        return [row for row in rows if self.rows.setdefault(row["key"], row) is row]

    def write(self, rows):
        """Put rows that add() took on the disk.  Raises OSError, and forgets them, where there is no room."""
        end = self.path.stat().st_size
        try:
            with open(self.path, "ab") as f:
                f.write("".join(json.dumps(row) + "\n" for row in rows).encode())
                f.flush()
                os.fsync(f.fileno())
        except OSError as e:
            os.truncate(self.path, end)  # a full disk: no half line stays
            for row in rows:
                del self.rows[row["key"]]
            raise OSError(e.errno, e.strerror, str(self.path)) from None

    def close(self):
        self.lock.close()


DEVICE = re.compile(
    r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.I
)  # no file on Windows, nor on a disk that it shares


def safe_key(name):
    """A name that becomes part of a path: google/flan-t5-base -> google_flan-t5-base.  Raises UserError for `..` and the like."""
    key = str(name).replace("/", "_")
    if (
        str(name).startswith(("/", ".", "-"))
        or ".." in key
        or DEVICE.fullmatch(key)
        or not re.fullmatch(r"[\w.+=@:-]{1,120}", key, re.ASCII)
    ):
        raise UserError(
            f"{str(name)[:80]!r} cannot be used as a name: it becomes part of a path, so use letters, digits, "
            "'_', '-', '.' (120 at most, no '..', not an absolute path, no name of a device)"
        )
    return key


def journal_paths(path):
    """-> {rank: path} of the journals beside a file that is yet to be written."""
    return {
        int(p.name.rpartition("-")[2]): p
        for p in Path(path).parent.glob(f"{glob.escape(Path(path).name)}.journal-*")
    }


def remove_journals(path):
    """To be called when the file is written."""
    for old in journal_paths(path).values():
        old.unlink(missing_ok=True)


# ---------------- Names of files (saved/README.md), from the flags of a run


def model_key(name):
    """What a model is called in file names: a folder by its last part, a hub name with its owner and without the slash."""
    return safe_key(
        Path(name).resolve().name
        if Path(name).is_dir()
        else "toy_student"
        if name == "toy"
        else name
    )


def completion_path(saved, model, key, task, *parts):
    folder = Path(saved) / "completion_data" / f"B_{safe_key(model)}__C_{safe_key(key)}"
    return folder / f"{'__'.join([f'D_{task}', *parts])}.json"


# ---------------- One run at a time

PATIENCE = 3.0  # seconds that a run waits for another one, which may only be looking what is there
HELD = {}  # path -> the open lock file beside it


@contextlib.contextmanager
def file_lock(path, wanted=True, patience=None):
    """Within this, no other process holds path, a file or folder that is written here (unless not wanted).

    The lock is flock's on a hidden file beside it, so it is gone with its process, however that ends.  Waits `patience`
    seconds (None: PATIENCE) for another holder, then raises UserError."""
    path = Path(path).resolve()
    ours = False
    if wanted and path not in HELD:  # the stages of one process may share a file
        HELD[path], ours = (
            lock_file(path.with_name(f".{path.name[:200]}.lock"), path, patience or PATIENCE),
            True,
        )
    try:
        yield
    finally:
        if ours:
            lock = HELD.pop(path)
            Path(lock.name).unlink(missing_ok=True)
            lock.close()


def lock_file(name, path, patience):
    """-> the lock file, open and locked."""
    import fcntl

    name.parent.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + patience
    while True:
        lock = open(name, "a")
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(name)):
                return lock  # and not one that its holder has just removed
        lock.close()
        if time.monotonic() > until:
            raise UserError(
                f"{path} is being written by another run: wait for it, stop it, or write elsewhere (another --seed, "
                "--train_key, --out or --saved)"
            )
        time.sleep(0.05)


@contextlib.contextmanager
def out_of_memory_hint(advice):
    """Turn an allocation that fails, on a GPU or CPU, into a UserError that says what to do."""
    try:
        yield
    except (
        MemoryError,
        RuntimeError,
    ) as e:  # torch.OutOfMemoryError is a RuntimeError, and so is what a CPU's allocator raises
        if (
            not isinstance(e, MemoryError)
            and type(e).__name__ != "OutOfMemoryError"
            and "can't allocate memory" not in str(e)
        ):
            raise
        raise UserError(
            f"out of memory{advice} ({' '.join(str(e).split())[:120] or type(e).__name__})"
        ) from None


LOST_RANK = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|Socket closed|remote process exited|recvBytes"
)  # gloo; NCCL


def peer_failure_message(error):
    """-> what a rank says when another one has died.  Raises every other error again."""
    if not LOST_RANK.search(str(error)):
        raise error
    return "error: another rank has ended, so this one ends too: what is finished is kept; start the same command again to go on"


NOT_WRITTEN = re.compile(
    r"\(os error \d+\)|PytorchStreamWriter failed|unexpected pos"
)  # safetensors and tokenizers; torch


def write_errors(path):
    """Within this, what a library raises where it cannot write becomes an OSError that names path (a full disk's does not by itself).

    Not an `except`: tokenizers raise Exception itself, and an `except` of that would take all others too."""

    def name_it(kind, error, _):
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from None
        if (
            error
            and kind.__name__ in ("Exception", "RuntimeError", "SafetensorError")
            and NOT_WRITTEN.search(str(error))
        ):
            raise OSError(
                f"{path} could not be written ({str(error).splitlines()[0]}): make room; what was there before is kept"
            ) from None

    stack = contextlib.ExitStack()
    stack.push(name_it)
    return stack


UNREADABLE = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    EOFError,
    pickle.UnpicklingError,
)  # what libraries raise


@contextlib.contextmanager
def corrupt_file_errors(path, remedy):
    """Turn what reading a damaged file raises into a UserError that names it and says what to do."""
    try:
        yield
    except UNREADABLE as e:
        raise UserError(
            f"{path} is damaged, or not what it should be ({type(e).__name__} {' '.join(str(e).split())[:80]}): {remedy}"
        ) from None


# ---------------- What a file was made from


def fingerprint(value):
    """16 hex digits that change when the value changes: what a derived file was made from, in one word."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def file_sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def model_fingerprint(name):
    """What a student is before training: of a folder its files' sizes and the ends of each; of a hub name, the name."""
    if not Path(name).is_dir():
        return name
    seen = {}
    for file in sorted(
        p for p in Path(name).iterdir() if p.suffix in (".safetensors", ".json", ".bin", ".model")
    ):
        with open(file, "rb") as f:
            head = f.read(1 << 20)
            f.seek(max(0, file.stat().st_size - (1 << 20)))
            seen[file.name] = [file.stat().st_size, hashlib.sha256(head + f.read()).hexdigest()]
    return fingerprint(seen)


def settings_match(stage, path, old, new):
    """Whether path was made with the settings `new`; says that it is skipped, or which settings changed."""
    if old == new:
        print(f"{stage}: {path} is there, made with the same settings: skipped")
        return True
    if isinstance(old, dict):
        changed = [
            f"{k} {old.get(k)} -> {new.get(k)}"
            for k in sorted({*old, *new})
            if old.get(k) != new.get(k)
        ]
        print(f"{stage}: settings changed ({', '.join(changed)}) since {path} was made")
    return False


def check_settings(path, old, wanted):
    """Raise UserError where path was made with other settings than those that are wanted; it names them."""
    if changed := [f"{k} {old.get(k)} -> {v}" for k, v in wanted.items() if old.get(k) != v]:
        raise UserError(
            f"{path} was made with other settings ({', '.join(changed)}): make it again with --stage train, or give the flags "
            "that it was made with"
        )


def move_to_backup(path):
    """Move what is in the way, and cost something to make, to a free name beside it."""
    aside = next(
        p for i in range(1, 10**6) if not (p := path.with_name(f"{path.name}.old{i}")).exists()
    )
    os.replace(path, aside)
    print(f"what lay at {path} is kept as {aside}")


def prepare_output_dir(out, settings):
    """Ready the folder of a student; -> "finished", "unfinished" (it can be resumed) or "new".  A finished student of other
    settings is kept aside; a stranger's folder, or an unfinished run with other settings, is refused."""
    note = read_json(out / "run.json") if (out / "run.json").exists() else None
    if note is None and out.exists() and any(out.iterdir()):
        raise UserError(
            f"{out} is not empty and holds no run of this program: choose another --out"
        )
    if note is not None and note.get("settings") == settings and not note.get("finished"):
        print(f"train: going on with the unfinished run in {out}")
        return "unfinished"
    if note is not None:
        if settings_match("train", out, note.get("settings"), settings):
            return "finished"
        if not note.get("finished") and any(out.glob("checkpoint_*.pt")):
            raise UserError(
                f"{out} holds an unfinished run with other settings (above): go on with its flags, choose another --train_key "
                "or --out, or delete that folder"
            )
        move_to_backup(out)
    write_json(out / "run.json", {"finished": False, "settings": settings})
    return "new"


# ---------------- A fine-tuning file, and a progress bar


def read_finetune_data(path):
    """-> {"sample_index", "input", "label": lists of equal length} of a fine-tuning file, JSON or the openai JSON lines.

    Raises UserError where it is no such file or holds no sample."""
    if Path(path).suffix == ".jsonl":
        rows = [row if isinstance(row, dict) else {} for row in read_jsonl(path)]
        columns = [
            list(range(len(rows))),
            *([row.get(k) for row in rows] for k in ("prompt", "completion")),
        ]
    else:
        columns = list(map(read_json(path).get, ("sample_index", "input", "label")))
    if (
        not all(isinstance(c, list) for c in columns)
        or len({len(c) for c in columns}) != 1
        or not all(isinstance(x, kind) for c, kind in zip(columns, (int, str, str)) for x in c)
    ):
        raise UserError(
            f'{path} is not a fine-tuning file, {{"sample_index": [...], "input": [texts], "label": [texts]}} of equal length'
        )
    if not columns[0]:
        raise UserError(f"{path} holds no sample: there is nothing to train on")
    return dict(
        zip(
            ("sample_index", "input", "label"),
            [columns[0], *(list(map(replace_lone_surrogates, c)) for c in columns[1:])],
        )
    )


def progress(items, what, show=True, total=None):
    """Iterate over items (total: how many, where they have no length) with a progress bar; without a terminal, print a line
    every 10 seconds instead."""
    if show and sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, desc=what, leave=False, total=total)
        return
    start = said = time.monotonic()
    for i, item in enumerate(items):
        if show and time.monotonic() - said > 10:
            said = time.monotonic()
            print(
                f"{what}: {i} of {total or len(items)}, {said - start:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        yield item


# ---------------- A completion dataset: a model and a prompting method on the samples of a task (saved/README.md)

METADATA_TYPES = {
    "dataset_key": str,
    "epoch": int | None,
    "validation": list | None,
    "settings": dict | None,
} | {
    k: str | None
    for k in (
        "base_model",
        "completion_key",
        "finetune_key",
        "train_key",
        "prediction_template",
        "split",
        "part",
    )
}


TEXT_OR_NOT = [str, type(None)]


ROW_TYPES = {
    "sample_index": [int],
    "completion_index": [int],
    "question": [str],
    "answer": [str],
    "completion": TEXT_OR_NOT,
    "reasoning_completion": TEXT_OR_NOT,
}


KINDS_OF_ROW = set(
    itertools.product(*ROW_TYPES.values())
)  # compared as one, which is quick; a bool is no int


PLACE = operator.itemgetter("sample_index", "completion_index")


def read_completions(path, task=None):
    """-> (metadata, rows in order of sample and completion) of a completion file.

    Raises UserError where it is not one, is another task's, or holds a completion twice."""
    content = read_json(path)
    metadata = content.get("metadata")
    data = content.get("data")
    if (
        not isinstance(metadata, dict)
        or not isinstance(data, dict)
        or "dataset_key" not in metadata
    ):
        raise UserError(
            f'{path} is not a completion file, {{"metadata": {{"dataset_key": ...}}, "data": {{"<sample_index>": [rows]}}}}'
        )
    for k, kind in METADATA_TYPES.items():
        if not isinstance(metadata.get(k), kind) or isinstance(metadata.get(k), bool):
            raise UserError(
                f"{path}: {k} in its metadata is {json.dumps(metadata.get(k))[:80]}, which it cannot be: mend it"
            )
    if metadata.get("settings") is None:
        metadata.pop("settings", None)
    key = metadata["dataset_key"]
    if task and key != task:
        raise UserError(f"{path} holds completions of the task {key}, not {task}")
    rows = []
    for index, many in data.items():
        for row in many if isinstance(many, list) else [None]:
            if (
                not isinstance(row, dict)
                or tuple(map(type, map(row.get, ROW_TYPES))) not in KINDS_OF_ROW
                or str(row["sample_index"]) != index
                or "completion" not in row
            ):
                raise UserError(
                    f"{path}: a completion of sample {index} lacks its sample_index, completion_index, question, answer or "
                    "completion, or one is not what it should be"
                )
            rows.append(row)
    rows.sort(key=PLACE)
    for (i, k), following in itertools.pairwise(map(PLACE, rows)):
        if (i, k) == following:
            raise UserError(f"{path}: completion {k} of sample {i} is there twice")
    return metadata, rows


def completions_match(stage, args, path, settings):
    """Whether a completion file is there and was made with these settings."""
    return path.exists() and settings_match(
        stage, path, read_completions(path, args.task)[0].get("settings"), settings
    )


def write_completions(path, metadata, data):
    """Completions cost GPU hours or money: those made with other settings are kept aside."""
    if path.exists():
        move_to_backup(path)
    write_json(path, {"metadata": metadata, "data": data})
    remove_journals(path)


def read_prompts(path, max_new_tokens):
    """-> (rows, prompts, limits) of a JSON-lines file with a "prompt" and perhaps a "max_new_tokens" on each line."""
    rows = read_jsonl(path)
    for i, row in enumerate(rows, 1):
        limit = row.get("max_new_tokens", max_new_tokens) if isinstance(row, dict) else None
        if type(limit) is not int or limit < 1 or not isinstance(row.get("prompt"), str):
            raise UserError(
                f'{path}, row {i}: it needs {{"prompt": "text"}}, and max_new_tokens, if given, a number above 0'
            )
    return (
        rows,
        [row["prompt"] for row in rows],
        [row.get("max_new_tokens", max_new_tokens) for row in rows],
    )
