"""Take completion files out of a published archive (tar.gz), of which nothing is believed: not its names, its sizes, nor its storage.

python data/prepare.py --completions ARCHIVE.tar.gz [--saved saved]
"""

import gzip
import os
import re
import tarfile
import zlib
from pathlib import Path

import storage
from storage import UserError, read_completions

# bytes of a file, bytes that come out of the archive, entries
LARGEST = 512 << 20
IN_ALL = 8 << 30
MOST = 20_000
# What is taken, wherever it lies in the archive: B_<model>__C_<key>/D_<task>....json, and the names of older archives, F_<key>__D_<task>.json
NAME = re.compile(
    r"(?:[^\0]*/)?(B_[\w.+=@:-]{1,100}__C_[\w.+=@:-]{1,100})/((?:F_[\w.+=@:-]{1,100}__)?[DT]_[\w.+=@:-]{1,150}\.json)",
    re.ASCII,
)


class Bounded(gzip.GzipFile):
    """The unpacked archive, which may unpack to no more than the bounds above: a few kilobytes can unpack to terabytes."""

    def read(self, size=-1):
        if not 0 <= size <= LARGEST or self.tell() + size > IN_ALL:
            raise UserError(
                f"it unpacks to more than {LARGEST >> 20} MB in a piece, or {IN_ALL >> 30} GB in all"
            )
        return super().read(size)


def checked(member):
    """-> (folder, name) of a completion file, None for what is left alone.  Raises UserError for what no honest archive holds."""
    parts = member.name.replace("\\", "/").split("/")
    if (
        member.name.startswith(("/", "\\"))
        or ".." in parts
        or "\0" in member.name
        or re.match(r"[A-Za-z]:", member.name)
    ):
        raise UserError(f"its entry {member.name[:80]!r} leads out of the folder")
    if member.isdir():
        return None
    if not member.isreg() or member.issparse():
        raise UserError(
            f"its entry {member.name[:80]!r} is a link, a device or the like, not a plain file"
        )
    if member.size > LARGEST:
        raise UserError(
            f"its entry {member.name[:80]!r} has {member.size:,} bytes: {LARGEST:,} at most"
        )
    found = NAME.fullmatch(member.name)
    return tuple(map(storage.safe_key, found.groups())) if found else None


def entries(archive):
    """Yield (member, open tar) of every entry, with all that a broken or hostile archive does turned into a UserError."""
    try:
        with (
            open(archive, "rb") as f,
            Bounded(fileobj=f) as unpacked,
            tarfile.open(fileobj=unpacked, mode="r:", errorlevel=2) as tar,
        ):
            for i, member in enumerate(tar):
                if i >= MOST:
                    raise UserError(f"it has more than {MOST:,} entries")
                yield member, tar
            while unpacked.read(1 << 20):  # to its end, where the sum is
                pass
    except (
        UserError,
        tarfile.TarError,
        EOFError,
        zlib.error,
        gzip.BadGzipFile,
        ValueError,
        OverflowError,
        RecursionError,
    ) as e:
        raise UserError(
            f"{archive} cannot be imported, and nothing of it was taken that is not named above: "
            f"{' '.join(str(e).split())[:200] or type(e).__name__}"
        ) from None


def import_completions(archive, saved):
    """Put the completion files of a tar.gz below saved/completion_data; yield a line about each.

    All names, kinds and sizes are checked before the first file is taken, and each file's format before it gets its name.  A
    file that is there with other content is kept.  Raises UserError for an archive that is not to be trusted."""
    wanted = {member.name: target for member, _ in entries(archive) if (target := checked(member))}
    if not wanted:
        raise UserError(
            f"{archive} holds no completion file, B_<model>__C_<completion_key>/D_<task>.json"
        )
    for member, tar in entries(archive):
        if member.name not in wanted:
            continue
        folder, name = wanted.pop(
            member.name
        )  # the first of a name: a second one must not replace it
        path = Path(saved) / "completion_data" / folder / name
        content = tar.extractfile(member).read(member.size)
        if path.exists():
            same = path.read_bytes() == content
            yield f"{path} is there already" + (
                ""
                if same
                else ", with other content: it was kept; move it away to take the archive's"
            )
            continue
        part = path.with_name(f".{name}.part")
        try:
            storage.write_atomic(part, content)
            read_completions(part)
            os.replace(part, path)
            yield f"{path}: {len(content):,} bytes"
        except UserError as e:
            yield f"{member.name} was left out: {str(e).replace(str(part), 'it')}"
        finally:
            part.unlink(missing_ok=True)
