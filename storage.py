"""Files: written whole or not at all, read with errors that name the place, and known by what they
were made from.  Also what all stages share: names below saved/ (saved/README.md), locks and ranks.
What is not in the standard library is imported where it is needed, so that `--help` stays fast.
"""

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import pickle
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    pass

AnyPath = str | Path
JsonObject = dict[str, Any]


ROOT = Path(__file__).resolve().parent  # the folder of the project


def default_folder(name: str) -> str:
    """Return the project's own data/ or saved/, in whatever folder a command is started."""
    if Path.cwd() == ROOT:
        return name
    return str(ROOT / name)


class UserError(Exception):
    """Something the user can fix; the message is one sentence: what is wrong, where, what to do."""


class Interrupted(UserError):
    """The run was told to stop, so nothing else must be started."""


def write_atomic(path: AnyPath, text: str | bytes) -> None:
    """Write a file whole or not at all, by a temporary one.  Raises OSError that names the path."""
    path = Path(path)
    content = text.encode() if isinstance(text, str) else text
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(".tmp", f".{path.name[:100]}.", path.parent)
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from None
    finally:
        Path(temporary).unlink(missing_ok=True)


def sync_file(path: AnyPath) -> None:
    """Wait until a file that a library wrote is on the disk."""
    with open(path, "rb") as f:
        os.fsync(f.fileno())


def write_json(path: AnyPath, value: Any) -> None:
    """Write JSON in the style of the published files: indented by four spaces, ASCII only."""
    write_atomic(path, json.dumps(value, indent=4))


def read_text(path: AnyPath) -> str:
    """Return the text of a UTF-8 file, less a byte-order mark.  Raises UserError that names it."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text ({e.reason} at byte {e.start})") from None
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from None


def reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> JsonObject:
    """Build a JSON object; of a key that is in it twice, json would silently drop the first."""
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:80]!r} is there twice in an object")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=reject_duplicate_keys)  # made once: it takes long


def parse_json(text: str | bytes, where: object) -> Any:
    """Return the JSON value in text.  Raises UserError that names the place."""
    try:
        if isinstance(text, bytes):
            text = text.decode(json.detect_encoding(text))
        return DECODER.decode(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where} is not valid JSON ({e}): mend or delete it") from None


def read_json(path: AnyPath) -> JsonObject:
    """Return the JSON object in a file.  Raises UserError where it is not JSON or not an object."""
    value = parse_json(read_text(path), path)
    if isinstance(value, dict):
        return value
    raise UserError(f"{path} holds a JSON {type(value).__name__}, not an object: mend or delete it")


def read_jsonl(path: AnyPath) -> list[Any]:
    r"""Return the values of a JSON-lines file.  Lines end at \n alone: strings may hold U+2028."""
    lines = enumerate(read_text(path).split("\n"), 1)
    return [parse_json(line, f"{path}, line {i}") for i, line in lines if line.strip()]


def replace_lone_surrogates(text: str) -> str:
    r"""Make text encodable: 'a\ud83d' -> 'a?'.  JSON may hold halves of characters."""
    return text.encode("utf-8", "replace").decode()


# ---------------- Journals
class Journal:
    """An append-only file of JSON lines {"key": ..., ...} that survives a kill at any moment.

    `rows` maps each key to its first row.  A last line that was cut off is dropped; another bad
    line is refused (UserError), as is a second process before close() or the end of this one.
    """

    def __init__(self, path: AnyPath) -> None:
        self.path = Path(path)
        self.rows: dict[str | int, JsonObject] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.path, "ab+")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"{self.path} is being written by another run: wait for it or stop it"
            raise UserError(message) from None
        os.truncate(self.path, self._read_rows())

    def _read_rows(self) -> int:
        """Fill `rows`; return the size, in bytes, of the lines that are whole."""
        size = self.lock.seek(0)
        name = str(self.path)
        for i, line in enumerate(self.lock, 1):
            if not line.endswith(b"\n"):
                break
            size += len(line)
            if line.isspace():
                continue
            where = f"{name}, line {i}"
            row = parse_json(line, where)
            if not isinstance(row, dict) or not isinstance(row.get("key"), str | int):
                raise UserError(f"{where} is not a row of a journal: mend or delete that line")
            self.rows.setdefault(row["key"], row)
        return size

    def append(self, rows: Iterable[JsonObject]) -> None:
        """Add rows whose keys are new; they are on the disk when this returns.  Raises OSError."""
        self.write(self.add(rows))

    def add(self, rows: Iterable[JsonObject]) -> list[JsonObject]:
        """Take rows whose keys are new into `rows`; return these, for write()."""
        return [row for row in rows if self.rows.setdefault(row["key"], row) is row]

    def write(self, rows: list[JsonObject]) -> None:
        """Put rows that add() took on the disk; where it is full, forget them and raise OSError."""
        size = self.path.stat().st_size
        try:
            with open(self.path, "ab") as f:
                f.write("".join(json.dumps(row) + "\n" for row in rows).encode())
                f.flush()
                os.fsync(f.fileno())
        except OSError as e:
            os.truncate(self.path, size)  # no half line stays
            for row in rows:
                del self.rows[row["key"]]
            raise OSError(e.errno, e.strerror, str(self.path)) from None

    def close(self) -> None:
        """Let other processes open the journal."""
        self.lock.close()


def journal_paths(path: AnyPath) -> dict[int, Path]:
    """Return {rank: path} of the journals beside a file that is not written yet."""
    found = Path(path).parent.glob(f"{glob.escape(Path(path).name)}.journal-*")
    return {int(journal.name.rpartition("-")[2]): journal for journal in found}


def remove_journals(path: AnyPath) -> None:
    """Delete the journals beside a file, once it is written."""
    for journal in journal_paths(path).values():
        journal.unlink(missing_ok=True)


# ---------------- Names below saved/, and one run at a time

NAME = re.compile(r"(?![/.-])(?!.*\.\.)[\w.+=@:/-]{1,120}", re.ASCII)


def safe_key(name: str) -> str:
    """Make a name part of a path: google/flan-t5-base -> google_flan-t5-base.  Raises UserError."""
    if not NAME.fullmatch(name):
        form = "letters, digits, '_', '-', '.' (120 at most, no '..', not an absolute path)"
        reason = f"it becomes part of a path, so use {form}"
        raise UserError(f"{name[:80]!r} cannot be used as a name: {reason}")
    return name.replace("/", "_")


def model_key(name: str) -> str:
    """Return a model's part of file names: of a folder its last part, of a hub name owner_name."""
    if Path(name).is_dir():
        return safe_key(Path(name).resolve().name)
    if name == "toy":
        return "toy_student"
    return safe_key(name)


def completion_path(saved: AnyPath, model: str, key: str, task: str, *parts: str) -> Path:
    """Return where the completions of a model are, prompted as `key` says, for a task."""
    folder = f"B_{safe_key(model)}__C_{safe_key(key)}"
    name = "__".join([f"D_{task}", *parts])
    return Path(saved) / "completion_data" / folder / f"{name}.json"


@contextlib.contextmanager
def file_lock(path: AnyPath, wanted: bool = True, timeout: float = 3.0) -> Iterator[None]:
    """Keep other processes from writing path in this block; re-entrant.  Raises UserError."""
    if not wanted:
        yield
        return
    import filelock

    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path.with_name(f".{path.name[:200]}.lock"), is_singleton=True)
    try:
        lock.acquire(timeout)
    except filelock.Timeout:
        raise UserError(
            f"{path} is being written by another run: wait for it, stop it, or write elsewhere "
            "(another --seed, --train_key, --out or --saved)"
        ) from None
    try:
        yield
    finally:
        if lock.lock_counter == 1:  # still held: a process that waits for it will notice
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


# ---------------- What libraries raise, as one sentence

WRITE_FAILURE = re.compile(r"\(os error \d+\)|PytorchStreamWriter failed|unexpected pos")
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError,
              pickle.UnpicklingError)  # fmt: skip


def one_line(error: BaseException) -> str:
    """Return the beginning of an error's message."""
    return " ".join(str(error).split())[:160]


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an allocation failed, on a GPU or CPU."""
    known = type(error).__name__ in ("MemoryError", "OutOfMemoryError")  # the second is torch's
    return known or "can't allocate memory" in str(error)  # its allocator for CPUs


@contextlib.contextmanager
def out_of_memory_hint(advice: str) -> Iterator[None]:
    """Turn an allocation that fails into a UserError that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        if not is_out_of_memory(e):
            raise
        reason = one_line(e) or type(e).__name__
        raise UserError(f"out of memory{advice} ({reason})") from None


def write_errors(path: AnyPath) -> contextlib.ExitStack:
    """Turn what libraries raise where they cannot write into an OSError that names path.

    Not an `except`: tokenizers raise Exception itself, and that would catch everything else too.
    """

    def name_path(kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from None
        is_known = error and kind.__name__ in ("Exception", "RuntimeError", "SafetensorError")
        if is_known and WRITE_FAILURE.search(str(error)):
            what = f"{path} could not be written ({str(error).splitlines()[0]})"
            raise OSError(f"{what}: make room; what was there before is kept") from None

    stack = contextlib.ExitStack()
    stack.push(name_path)
    return stack


@contextlib.contextmanager
def corrupt_file_errors(path: AnyPath, remedy: str) -> Iterator[None]:
    """Turn what reading a damaged file raises into a UserError that names it and the remedy."""
    try:
        yield
    except UNREADABLE as e:
        reason = f"{type(e).__name__} {' '.join(str(e).split())[:80]}"
        what = f"is damaged, or not what it should be ({reason})"
        raise UserError(f"{path} {what}: {remedy}") from None


# ---------------- What a file was made from
def fingerprint(value: Any) -> str:
    """Return 16 hex digits that change when the value does."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_sha256(path: AnyPath) -> str:
    """Return the SHA-256 of a file as hex digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


HASHED = {  # settings that are hashes, in words
    "source": "the file it was made from",
    "samples": "the benchmark's questions",
    "train": "the training questions",
    "texts": "the words of the template",
    "examples": "the few-shot examples",
    "finetune_data": "the fine-tuning data",
    "code": "the code that chooses and writes samples",
}


def changed_settings(old: JsonObject, new: JsonObject, keys: Iterable[str]) -> str:
    """Return 'lr 0.1 -> 0.2, samples (the benchmark's questions)', of the keys that differ."""
    changed = []
    for key in keys:
        before, after = old.get(key), new.get(key)
        if before != after:
            change = f"{before} -> {after}"
            if key in HASHED:
                change = f"({HASHED[key]})"
            changed.append(f"{key} {change}")
    return ", ".join(changed)


def settings_match(stage: str, path: AnyPath, old: Any, new: JsonObject) -> bool:
    """Tell whether path was made with the settings `new`; print "skipped" or what changed."""
    if old == new:
        print(f"{stage}: {path} is there, made with the same settings: skipped")
        return True
    if isinstance(old, dict):
        changed = changed_settings(old, new, sorted({*old, *new}))
        print(f"{stage}: settings changed ({changed}) since {path} was made")
    return False


def check_settings(path: AnyPath, old: JsonObject, wanted: JsonObject) -> None:
    """Raise UserError where path was made with other settings than the wanted ones."""
    if changed := changed_settings(old, wanted, wanted):
        remedy = "make it again with --stage train, or give the flags that it was made with"
        raise UserError(f"{path} was made with other settings ({changed}): {remedy}")


def move_to_backup(path: Path) -> None:
    """Rename what is in the way, and cost something to make, to <name>.old1 or the next free."""
    number = 1
    while (backup := path.with_name(f"{path.name}.old{number}")).exists():
        number += 1
    os.replace(path, backup)
    print(f"what lay at {path} is kept as {backup}")


def prepare_output_dir(out: Path, settings: JsonObject, redo: bool = False) -> str:
    """Ready a student's folder; return "finished", "unfinished" or "new".  Raises UserError.

    redo: train a finished student again, all the same; an unfinished run goes on.
    """
    note_path = out / "run.json"
    if note_path.exists():
        note = read_json(note_path)
        finished = note.get("finished")
        if note.get("settings") == settings and not finished:
            print(f"train: going on with the unfinished run in {out}")
            return "unfinished"
        if redo and finished:
            print(f"train: the student in {out} is trained again (--redo)")
        elif settings_match("train", out, note.get("settings"), settings):
            return "finished"
        if not finished and any(out.glob("checkpoint_*.pt")):
            raise UserError(
                f"{out} holds an unfinished run with other settings (above): go on with its flags, "
                "choose another --train_key or --out, or delete that folder"
            )
        move_to_backup(out)
    elif out.exists() and any(out.iterdir()):
        message = f"{out} is not empty and holds no run of this program: choose another --out"
        raise UserError(message)
    write_json(note_path, {"finished": False, "settings": settings})
    return "new"


# ---------------- Fine-tuning data, prompts


class FinetuneData(TypedDict):  # lists of equal length, an entry a training sample
    sample_index: list[int]
    input: list[str]  # the prompt, as the student reads it
    label: list[str]  # without EOS


def read_finetune_data(path: AnyPath) -> FinetuneData:
    """Return what a fine-tuning file holds: JSON columns or JSON lines.  Raises UserError.

    A line is {"prompt", "completion"} or {"messages": [{"role", "content"}, ...]}, of which the
    last is the label.  Without a sample_index samples are numbered.
    """
    if Path(path).suffix == ".jsonl":
        rows = read_jsonl(path)
        pairs = [prompt_and_label(row, path, i) for i, row in enumerate(rows, 1)]
        data = {"input": [prompt for prompt, _ in pairs], "label": [label for _, label in pairs]}
        if all("sample_index" in row for row in rows):
            data["sample_index"] = [row["sample_index"] for row in rows]
    else:
        data = read_json(path)
    if "sample_index" not in data and isinstance(data.get("input"), list):
        data["sample_index"] = list(range(len(data["input"])))
    for name, kind in (("sample_index", int), ("input", str), ("label", str)):
        column = data.get(name)
        valid = isinstance(column, list) and all(isinstance(x, kind) for x in column)
        if not valid or len(column) != len(data["sample_index"]):
            form = '{"sample_index": [...], "input": [texts], "label": [texts]} of equal length'
            raise UserError(f"{path} is not a fine-tuning file, {form}")
    if not data["input"]:
        raise UserError(f"{path} holds no sample: there is nothing to train on")
    for name in ("input", "label"):
        data[name] = list(map(replace_lone_surrogates, data[name]))
    return FinetuneData(**{name: data[name] for name in FinetuneData.__annotations__})


def prompt_and_label(row: Any, path: AnyPath, number: int) -> tuple[str, str]:
    """Return the texts of a JSON line of fine-tuning data.  Raises UserError that names the line.

    {"messages": [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]}
    -> ("2 + 3?\\n", "5")
    """
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        texts = [None if find_wrong_type(m, {"content": str}) else m for m in row["messages"]]
        if len(texts) > 1 and None not in texts:
            *prompt, label = [message["content"] for message in texts]
            return "".join(f"{text}\n" for text in prompt), label
    elif not find_wrong_type(row, {"prompt": str, "completion": str}):
        return row["prompt"], row["completion"]
    form = '{"prompt": text, "completion": text} or {"messages": [{"role", "content"}, ...]}'
    raise UserError(f"{path} is not a fine-tuning file: row {number} needs {form}")


def find_wrong_type(value: Any, types: JsonObject) -> str | None:
    """Return the first key of a JSON object whose value is not of its type; a bool is no int."""
    if not isinstance(value, dict):
        return "not an object"
    for key, kind in types.items():
        if isinstance(value.get(key), bool) or not isinstance(value.get(key), kind):
            return key
    return None


def read_prompts(path: AnyPath, max_new_tokens: int) -> tuple[list, list[str], list[int]]:
    """Return (rows, prompts, token limits) of JSON lines {"prompt", "max_new_tokens"?}."""
    rows = read_jsonl(path)
    limits = []
    for i, row in enumerate(rows, 1):
        if not find_wrong_type(row, {"prompt": str}):
            limits.append(row.get("max_new_tokens", max_new_tokens))
        if len(limits) < i or type(limits[-1]) is not int or limits[-1] < 1:
            form = '{"prompt": "text"}, and max_new_tokens, if given, a number above 0'
            raise UserError(f"{path}, row {i}: it needs {form}")
    return rows, [row["prompt"] for row in rows], limits
