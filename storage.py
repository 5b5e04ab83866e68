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
from typing import Any, TypedDict

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
    if isinstance(text, str):
        text = text.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name[:100]}."
    handle, temporary = tempfile.mkstemp(".tmp", prefix, path.parent)
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(text)
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
    value = {}
    for key, member in pairs:
        if key in value:
            raise ValueError(f"the key {key[:80]!r} is there twice in an object")
        value[key] = member
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
    kind = type(value).__name__
    raise UserError(f"{path} holds a JSON {kind}, not an object: mend or delete it")


def read_jsonl(path: AnyPath) -> list[Any]:
    r"""Return the values of a JSON-lines file.  Lines end at \n alone: strings may hold U+2028."""
    values = []
    lines = read_text(path).split("\n")
    for i, line in enumerate(lines, 1):
        if line.strip():
            value = parse_json(line, f"{path}, line {i}")
            values.append(value)
    return values


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
        import jiter  # json takes three times as long

        size = self.lock.seek(0)
        for i, line in enumerate(self.lock, 1):
            if not line.endswith(b"\n"):
                break
            size += len(line)
            if line.isspace():
                continue
            try:
                row = jiter.from_json(line, catch_duplicate_keys=True)
            except ValueError:  # json takes halves of characters, and says what is wrong
                row = parse_json(line, f"{self.path}, line {i}")
            if not isinstance(row, dict) or not isinstance(row.get("key"), (str, int)):
                where = f"{self.path}, line {i}"
                raise UserError(f"{where} is not a row of a journal: mend or delete that line")
            self.rows.setdefault(row["key"], row)
        return size

    def append(self, rows: Iterable[JsonObject]) -> None:
        """Add rows whose keys are new; they are on the disk when this returns.  Raises OSError."""
        self.write(self.add(rows))

    def add(self, rows: Iterable[JsonObject]) -> list[JsonObject]:
        """Take rows whose keys are new into `rows`; return these, for write()."""
        new = []
        for row in rows:
            key = row["key"]
            if key not in self.rows:
                self.rows[key] = row
                new.append(row)
        return new

    def write(self, rows: list[JsonObject]) -> None:
        """Put rows that add() took on the disk; where it is full, forget them and raise OSError."""
        size = self.path.stat().st_size
        lines = [json.dumps(row) + "\n" for row in rows]
        text = "".join(lines)
        try:
            with open(self.path, "ab") as f:
                f.write(text.encode())
                f.flush()
                os.fsync(f.fileno())
        except OSError as e:
            os.truncate(self.path, size)  # no half line stays
            for row in rows:
                key = row["key"]
                del self.rows[key]
            raise OSError(e.errno, e.strerror, str(self.path)) from None

    def close(self) -> None:
        """Let other processes open the journal."""
        self.lock.close()


def journal_paths(path: AnyPath) -> dict[int, Path]:
    """Return {rank: path} of the journals beside a file that is not written yet."""
    path = Path(path)
    name = glob.escape(path.name)
    found = {}
    for journal in path.parent.glob(f"{name}.journal-*"):
        rank = journal.name.rpartition("-")[2]
        found[int(rank)] = journal
    return found


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
        shown = name[:80]
        raise UserError(f"{shown!r} cannot be used as a name: {reason}")
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
    model = safe_key(model)
    key = safe_key(key)
    name = "__".join([f"D_{task}", *parts])
    folder = Path(saved) / "completion_data" / f"B_{model}__C_{key}"
    return folder / f"{name}.json"


@contextlib.contextmanager
def file_lock(path: AnyPath, wanted: bool = True, timeout: float = 3.0) -> Iterator[None]:
    """Keep other processes from writing path in this block; re-entrant.  Raises UserError."""
    if not wanted:
        yield
        return
    import filelock

    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock_path = path.with_name(f".{path.name[:200]}.lock")
    lock = filelock.FileLock(lock_path, is_singleton=True)
    try:
        lock.acquire(timeout)
    except filelock.Timeout:
        remedy = "wait for it, stop it, or write elsewhere"
        flags = "another --seed, --train_key, --out or --saved"
        what = f"{path} is being written by another run"
        raise UserError(f"{what}: {remedy} ({flags})") from None
    try:
        yield
    finally:
        if lock.lock_counter == 1:  # still held: a process that waits for it will notice
            lock_path.unlink(missing_ok=True)
        lock.release()


# ---------------- What libraries raise, as one sentence

WRITE_FAILURE = re.compile(r"\(os error \d+\)|PytorchStreamWriter failed|unexpected pos")
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError,
              pickle.UnpicklingError)  # fmt: skip


def one_line(error: BaseException) -> str:
    """Return the beginning of an error's message."""
    words = str(error).split()
    return " ".join(words)[:160]


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an allocation failed, on a GPU or CPU."""
    kind = type(error).__name__
    is_known = kind in ("MemoryError", "OutOfMemoryError")  # the second is torch's
    return is_known or "can't allocate memory" in str(error)  # its allocator for CPUs


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
        """Raise an error that names the file in the place of one that does not."""
        if error is None:
            return
        message = str(error)
        if isinstance(error, OSError):
            reason = error.strerror or message
            raise OSError(error.errno, reason, str(path)) from None
        is_known = kind.__name__ in ("Exception", "RuntimeError", "SafetensorError")
        if is_known and WRITE_FAILURE.search(message):
            what = f"{path} could not be written ({message.splitlines()[0]})"
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
        kind = type(e).__name__
        message = one_line(e)[:80]
        what = f"is damaged, or not what it should be ({kind} {message})"
        raise UserError(f"{path} {what}: {remedy}") from None


# ---------------- What a file was made from
def fingerprint(value: Any) -> str:
    """Return 16 hex digits that change when the value does."""
    text = json.dumps(value, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode())
    return digest.hexdigest()[:16]


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
        before = old.get(key)
        after = new.get(key)
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
        keys = sorted({*old, *new})
        changed = changed_settings(old, new, keys)
        print(f"{stage}: settings changed ({changed}) since {path} was made")
    return False


def check_settings(path: AnyPath, old: JsonObject, wanted: JsonObject) -> None:
    """Raise UserError where path was made with other settings than the wanted ones."""
    changed = changed_settings(old, wanted, wanted)
    if changed:
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
        what = "is not empty and holds no run of this program: choose another --out"
        raise UserError(f"{out} {what}")
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
        data = read_finetune_lines(path)
    else:
        data = read_json(path)
    inputs = data.get("input")
    if isinstance(inputs, list):
        numbers = list(range(len(inputs)))
        data.setdefault("sample_index", numbers)
    types = {"sample_index": int, "input": str, "label": str}
    columns = {name: data.get(name) for name in types}
    values = columns.values()
    are_lists = all(map(is_list_of, types.values(), values))
    if not are_lists or len(set(map(len, values))) > 1:
        form = '{"sample_index": [...], "input": [texts], "label": [texts]} of equal length'
        raise UserError(f"{path} is not a fine-tuning file, {form}")
    if not inputs:
        raise UserError(f"{path} holds no sample: there is nothing to train on")
    for name in ("input", "label"):
        texts = columns[name]
        columns[name] = list(map(replace_lone_surrogates, texts))
    return FinetuneData(**columns)


def is_list_of(kind: type, value: Any) -> bool:
    if not isinstance(value, list):
        return False
    return all(isinstance(item, kind) for item in value)


def read_finetune_lines(path: AnyPath) -> JsonObject:
    """Return the columns of JSON lines of fine-tuning data."""
    rows = read_jsonl(path)
    prompts = []
    labels = []
    for i, row in enumerate(rows, 1):
        prompt, label = prompt_and_label(row, path, i)
        prompts.append(prompt)
        labels.append(label)
    data = {"input": prompts, "label": labels}
    if all("sample_index" in row for row in rows):
        data["sample_index"] = [row["sample_index"] for row in rows]
    return data


def prompt_and_label(row: Any, path: AnyPath, number: int) -> tuple[str, str]:
    """Return the texts of a JSON line of fine-tuning data.  Raises UserError that names the line.

    {"messages": [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]}
    -> ("2 + 3?\\n", "5")
    """
    if not find_wrong_type(row, {"messages": list}):
        texts = turn_texts(row["messages"])
        if len(texts) > 1:
            label = texts.pop()
            lines = [f"{text}\n" for text in texts]
            return "".join(lines), label
    elif not find_wrong_type(row, {"prompt": str, "completion": str}):
        return row["prompt"], row["completion"]
    form = '{"prompt": text, "completion": text} or {"messages": [{"role", "content"}, ...]}'
    raise UserError(f"{path} is not a fine-tuning file: row {number} needs {form}")


def turn_texts(turns: list) -> list[str]:
    """Return the texts of a chat; [] where a turn has none."""
    texts = []
    for turn in turns:
        if find_wrong_type(turn, {"content": str}):
            return []
        texts.append(turn["content"])
    return texts


def find_wrong_type(value: Any, types: JsonObject) -> str | None:
    """Return the first key of a JSON object whose value is not of its type; a bool is no int."""
    if not isinstance(value, dict):
        return "not an object"
    for key, kind in types.items():
        member = value.get(key)
        if isinstance(member, bool) or not isinstance(member, kind):
            return key
    return None


def read_prompts(path: AnyPath, max_new_tokens: int) -> tuple[list, list[str], list[int]]:
    """Return (rows, prompts, token limits) of JSON lines {"prompt", "max_new_tokens"?}."""
    rows = read_jsonl(path)
    prompts = []
    limits = []
    for i, row in enumerate(rows, 1):
        limit = 0
        if not find_wrong_type(row, {"prompt": str}):
            limit = row.get("max_new_tokens", max_new_tokens)
        if type(limit) is not int or limit <= 0:
            form = '{"prompt": "text"}, and max_new_tokens, if given, a number above 0'
            raise UserError(f"{path}, row {i}: it needs {form}")
        prompts.append(row["prompt"])
        limits.append(limit)
    return rows, prompts, limits
