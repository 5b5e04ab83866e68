"""Files: read with an error that names the line, written whole or not at all, and known by what they were made from.

Used by all modules; needs the standard library alone.
"""
import collections
import contextlib
import glob
import hashlib
import json
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


def write_whole(path, text):
    """Write text (str or bytes) to path through a temporary file and a rename, so no reader ever sees half of it.

    Raises OSError that names the path: that of a full disk does not by itself."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.", suffix=".tmp")
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
    write_whole(path, json.dumps(value, indent=4))


def print_anything():
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
        return Path(path).read_bytes().decode("utf-8-sig")  # -sig: editors on Windows put a byte-order mark first
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text ({e.reason} at byte {e.start})") from None
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from None


def read_json(path):
    """-> the JSON object in a file.  Raises UserError where it is not JSON or not an object."""
    value = parse_json(read_text(path), path)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not an object: mend or delete it")
    return value


def whole_characters(text):
    """'a\\ud83d' -> 'a?': JSON may hold half a character (servers that stream send such), which no file or tokenizer takes."""
    return text.encode("utf-8", "replace").decode()


def read_jsonl(path):
    """-> the values of a JSON-lines file, in order.  Lines end at "\\n" alone: U+2028 may stand inside a string."""
    lines = read_text(path).split("\n")
    return [parse_json(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]


class Journal:
    """An append-only file of JSON lines {"key": ..., ...}: what it holds survives any kill, and no key stands in it twice.

    self.rows is {key: row}.  A second writer is refused (UserError), a torn last line dropped, a bad line elsewhere refused."""

    def __init__(self, path):
        import fcntl
        self.path, self.rows = Path(path), {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.path, "ab+")  # held until close() or the end of the process, however it comes
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.path} is being written by another run: wait for it or stop it") from None
        end = self.lock.seek(0)
        for i, line in enumerate(self.lock, 1):
            if not line.endswith(b"\n"):
                break  # torn
            end += len(line)
            if line.isspace():
                continue
            row = parse_json(line, f"{self.path}, line {i}")
            if not isinstance(row, dict) or not isinstance(row.get("key"), str | int):
                raise UserError(f"{self.path}, line {i} is not a row of a journal: mend or delete that line")
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


DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.I)  # no file on Windows, nor on a disk that it shares


def safe_key(name):
    """A name that becomes part of a path: google/flan-t5-base -> google_flan-t5-base.  Raises UserError for `..` and the like."""
    key = str(name).replace("/", "_")
    if str(name).startswith(("/", ".", "-")) or ".." in key or DEVICE.fullmatch(key) \
            or not re.fullmatch(r"[\w.+=@:-]{1,120}", key, re.ASCII):
        raise UserError(f"{str(name)[:80]!r} cannot be used as a name: it becomes part of a path, so use letters, digits, "
                        "'_', '-', '.' (120 at most, no '..', not an absolute path, no name of a device)")
    return key


def journal_paths(path):
    """-> {rank: path} of the journals beside a file that is yet to be written."""
    return {int(p.name.rpartition("-")[2]): p for p in Path(path).parent.glob(f"{glob.escape(Path(path).name)}.journal-*")}


def remove_journals(path):
    """To be called when the file is written."""
    for old in journal_paths(path).values():
        old.unlink(missing_ok=True)


# ---------------- Names of files (saved/README.md), from the flags of a run

def teacher_key(args):
    """zs_cot at temperature 0, zs_cot_t70 at 0.7; zs_cot_t70_s1 with --data_seed 1, where the teacher is one of ours and so has a seed"""
    seed = args.data_seed if args.teacher == "toy" or args.teacher.startswith("hf:") else 0
    return args.teacher_method + (f"_t{round(100 * args.temperature)}" if args.temperature else "") + (f"_s{seed}" if seed else "")


def teacher_metadata(args):
    return {"dataset_key": args.task, "base_model": teacher_name(args), "completion_key": teacher_key(args), "finetune_key": None,
            "train_key": None, "epoch": None, "prediction_template": args.teacher_method}


CURATION = {  # flag that chooses rationales: (its default, which is the paper's, what stands in names where it is another)
    "filter": ("right", "{}"), "max_rationale_words": (0, "{}words"), "max_per_question": (0, "{}each"),
    "max_similarity": (1.0, "similar{:g}"), "drop_unfinished": (False, "finished"), "drop_duplicates": (False, "unique")}


def curation_options(args):
    """-> {flag: value} of the flags of CURATION that are not at their default."""
    return {flag: getattr(args, flag) for flag, (default, _) in CURATION.items() if getattr(args, flag) != default}


def run_suffix(args, method="ft_cot"):
    """What distinguishes two curated sets or students of one task besides the method: of those who learn from rationales
    degree, teacher and choice; split and validation share."""
    parts = []
    if method != "ft":
        parts += [f"{args.degree}aug"] if args.degree > 1 else []
        parts += [f"by_{base_model(args.teacher.removeprefix('hf:'))}"] if args.teacher != args.usual["teacher"] else []
        parts += [CURATION[flag][1].format(value) for flag, value in curation_options(args).items()]
    share = f"v{args.validation:g}" + (f"s{args.data_seed}" if args.data_seed else "")  # the seed chooses the share
    parts += [part for part, is_there in ((args.split, args.split != "default"), (share, args.validation)) if is_there]
    return "".join(f"_{part}" for part in parts)


def finetune_key(args, method):
    if method == "ft":
        return f"ft_{args.task}{run_suffix(args, method)}"
    return f"{teacher_key(args)}_{args.task}{run_suffix(args)}"


def train_key(args, method):
    """--train_key, or the method and whatever distinguishes this training from the usual one of the task."""
    if args.train_key:
        return safe_key(args.train_key)
    usual_temperature = 0.7 if args.degree > 1 else 0.0  # the paper's
    parts = ((args.label_style, args.label_style != "token"), (args.teacher_method, method != "ft" and args.teacher_method != "zs_cot"),
             (f"t{round(100 * args.temperature)}", method != "ft" and args.temperature != usual_temperature))
    late = ((f"lr{args.lr:g}", args.lr != args.usual["lr"]), (f"b{args.batch_size}", args.batch_size != args.usual["batch_size"]),
            (f"s{args.seed}", args.seed))
    before, after = ("".join(f"_{part}" for part, is_there in some if is_there) for some in (parts, late))
    return safe_key(method + before + run_suffix(args, method) + after)


def base_model(name):
    """What a model is called in file names: a folder by its last part, a hub name with its owner and without the slash."""
    return safe_key(Path(name).resolve().name if Path(name).is_dir() else "toy_student" if name == "toy" else name)


def completion_path(saved, model, key, task, *parts):
    folder = Path(saved) / "completion_data" / f"B_{safe_key(model)}__C_{safe_key(key)}"
    return folder / f"{'__'.join([f'D_{task}', *parts])}.json"


def finetune_path(args, method, family):
    suffix = {"openai": ".jsonl", "chat": "_chat.jsonl"}.get(family, ".json")
    folder = "P_openai" if family in ("openai", "chat") else f"P_{family}"
    return Path(args.saved) / "finetune_data" / folder / f"F_{safe_key(finetune_key(args, method))}{suffix}"


def teacher_name(args):
    return "toy_teacher" if args.teacher == "toy" else base_model(args.teacher.removeprefix("hf:"))


def teacher_file(args):
    return completion_path(args.saved, teacher_name(args), teacher_key(args), args.task)


def test_file(args, method, epoch):
    """The completion file of a student: of an epoch of a training run, or of the untrained student on a split's test part."""
    seed = f"_s{args.seed}" if args.student == "toy" and args.seed else ""  # each seed makes a toy student of its own
    parts = [f"T_{train_key(args, method)}", f"E_{epoch:03d}"] if method.startswith("ft") else [f"S_{args.split}{seed}"]
    return completion_path(args.saved, base_model(args.student), method, args.task, *parts, *samples_suffix(args))


def samples_suffix(args):
    """K sampled answers a question instead of one greedy answer"""
    return [f"K_{args.eval_samples:02d}_t{round(100 * args.eval_temperature)}"] if args.eval_samples > 1 else []


def student_path(args, method):
    if args.out:
        return Path(args.out)
    return Path(args.saved) / "models" / f"B_{base_model(args.student)}" / f"D_{args.task}__T_{train_key(args, method)}"


# ---------------- One run at a time

PATIENCE = 3.0  # seconds that a run waits for another one, which may only be looking what is there
HELD = {}  # path -> the open lock file beside it


@contextlib.contextmanager
def held(path, wanted=True, patience=None):
    """Within this, no other process holds path, a file or folder that is written here (unless not wanted).

    The lock is flock's on a hidden file beside it, so it is gone with its process, however that ends.  Waits `patience`
    seconds (None: PATIENCE) for another holder, then raises UserError."""
    path, ours = Path(path).resolve(), False
    if wanted and path not in HELD:  # the stages of one process may share a file
        HELD[path], ours = lock_file(path.with_name(f".{path.name[:200]}.lock"), path, patience or PATIENCE), True
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
            raise UserError(f"{path} is being written by another run: wait for it, stop it, or write elsewhere (another --seed, "
                            "--train_key, --out or --saved)")
        time.sleep(0.05)


@contextlib.contextmanager
def within_memory(advice):
    """Turn an allocation that fails, on a GPU or CPU, into a UserError that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:  # torch.OutOfMemoryError is a RuntimeError, and so is what a CPU's allocator raises
        if not isinstance(e, MemoryError) and type(e).__name__ != "OutOfMemoryError" and "can't allocate memory" not in str(e):
            raise
        raise UserError(f"out of memory{advice} ({' '.join(str(e).split())[:120] or type(e).__name__})") from None


LOST_RANK = re.compile(r"Connection (closed|reset) by peer|Broken pipe|Socket closed|remote process exited|recvBytes")  # gloo; NCCL


def lost_rank(error):
    """-> what a rank says when another one has died.  Raises every other error again."""
    if not LOST_RANK.search(str(error)):
        raise error
    return "error: another rank has ended, so this one ends too: what is finished is kept; start the same command again to go on"


NOT_WRITTEN = re.compile(r"\(os error \d+\)|PytorchStreamWriter failed|unexpected pos")  # safetensors and tokenizers; torch


def writing(path):
    """Within this, what a library raises where it cannot write becomes an OSError that names path (a full disk's does not by itself).

    Not an `except`: tokenizers raise Exception itself, and an `except` of that would take all others too."""
    def name_it(kind, error, _):
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from None
        if error and kind.__name__ in ("Exception", "RuntimeError", "SafetensorError") and NOT_WRITTEN.search(str(error)):
            raise OSError(f"{path} could not be written ({str(error).splitlines()[0]}): make room; what was there before is kept") from None
    stack = contextlib.ExitStack()
    stack.push(name_it)
    return stack


UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RuntimeError, EOFError, pickle.UnpicklingError)  # what libraries raise


@contextlib.contextmanager
def damaged(path, remedy):
    """Turn what reading a damaged file raises into a UserError that names it and says what to do."""
    try:
        yield
    except UNREADABLE as e:
        raise UserError(f"{path} is damaged, or not what it should be ({type(e).__name__} {' '.join(str(e).split())[:80]}): {remedy}") from None


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
    for file in sorted(p for p in Path(name).iterdir() if p.suffix in (".safetensors", ".json", ".bin", ".model")):
        with open(file, "rb") as f:
            head = f.read(1 << 20)
            f.seek(max(0, file.stat().st_size - (1 << 20)))
            seen[file.name] = [file.stat().st_size, hashlib.sha256(head + f.read()).hexdigest()]
    return fingerprint(seen)


def is_current(stage, path, old, new):
    """Whether path was made with the settings `new`; says that it is skipped, or which settings changed."""
    if old == new:
        print(f"{stage}: {path} is there, made with the same settings: skipped")
        return True
    if isinstance(old, dict):
        changed = [f"{k} {old.get(k)} -> {new.get(k)}" for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
        print(f"{stage}: settings changed ({', '.join(changed)}) since {path} was made")
    return False


def check_settings(path, old, wanted):
    """Raise UserError where path was made with other settings than those that are wanted; it names them."""
    if changed := [f"{k} {old.get(k)} -> {v}" for k, v in wanted.items() if old.get(k) != v]:
        raise UserError(f"{path} was made with other settings ({', '.join(changed)}): make it again with --stage train, or give the flags "
                        "that it was made with")


def keep_aside(path):
    """Move what is in the way, and cost something to make, to a free name beside it."""
    aside = next(p for i in range(1, 10**6) if not (p := path.with_name(f"{path.name}.old{i}")).exists())
    os.replace(path, aside)
    print(f"what lay at {path} is kept as {aside}")


def claim_student_folder(out, settings):
    """Ready the folder of a student; -> "finished", "unfinished" (it can be resumed) or "new".  A finished student of other
    settings is kept aside; a stranger's folder, or an unfinished run with other settings, is refused."""
    note = read_json(out / "run.json") if (out / "run.json").exists() else None
    if note is None and out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and holds no run of this program: choose another --out")
    if note is not None and note.get("settings") == settings and not note.get("finished"):
        print(f"train: going on with the unfinished run in {out}")
        return "unfinished"
    if note is not None:
        if is_current("train", out, note.get("settings"), settings):
            return "finished"
        if not note.get("finished") and any(out.glob("checkpoint_*.pt")):
            raise UserError(f"{out} holds an unfinished run with other settings (above): go on with its flags, choose another --train_key "
                            "or --out, or delete that folder")
        keep_aside(out)
    write_json(out / "run.json", {"finished": False, "settings": settings})
    return "new"


# ---------------- A fine-tuning file, and a progress bar

def read_finetune_data(path):
    """-> {"sample_index", "input", "label": lists of equal length} of a fine-tuning file, JSON or the openai JSON lines.

    Raises UserError where it is no such file or holds no sample."""
    if Path(path).suffix == ".jsonl":
        rows = [row if isinstance(row, dict) else {} for row in read_jsonl(path)]
        columns = [list(range(len(rows))), *([row.get(k) for row in rows] for k in ("prompt", "completion"))]
    else:
        columns = list(map(read_json(path).get, ("sample_index", "input", "label")))
    if not all(isinstance(c, list) for c in columns) or len({len(c) for c in columns}) != 1 \
            or not all(isinstance(x, kind) for c, kind in zip(columns, (int, str, str)) for x in c):
        raise UserError(f'{path} is not a fine-tuning file, {{"sample_index": [...], "input": [texts], "label": [texts]}} of equal length')
    if not columns[0]:
        raise UserError(f"{path} holds no sample: there is nothing to train on")
    return dict(zip(("sample_index", "input", "label"), [columns[0], *(list(map(whole_characters, c)) for c in columns[1:])]))


def start_worker():
    """Ctrl-C is for the parent to answer; and rows, which hold no cycles, are not searched for any again and again."""
    import gc
    import signal
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.disable()


def over_cores(function, paths):
    """-> [function(path)] in order, over all cores where there is enough to do.  A worker holds one file at a time.

    Raises what function raises for the first path that fails, and UserError where a worker was killed (for want of memory)."""
    cores = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, len(paths))
    if cores < 2 or sum(Path(path).stat().st_size for path in paths if Path(path).exists()) < 1 << 25:
        return [function(path) for path in paths]
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    pool = ProcessPoolExecutor(cores, multiprocessing.get_context("fork"), start_worker)
    try:
        return list(progress(pool.map(function, paths), "scoring", total=len(paths)))
    except BrokenProcessPool:
        raise UserError("a worker was killed, perhaps for want of memory: name fewer files at a time") from None
    finally:
        pool.shutdown(cancel_futures=True)


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
            print(f"{what}: {i} of {total or len(items)}, {said - start:.0f} s", file=sys.stderr, flush=True)
        yield item
