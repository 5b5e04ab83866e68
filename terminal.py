"""How a command line ends: an error that the user can mend is one sentence and a failing exit."""

import contextlib
import errno
import os
import re
import signal
import sys
import time
from collections.abc import Iterable, Iterator

from storage import UserError

PEER_FAILURE = re.compile("Connection (closed|reset) by peer|Broken pipe|Socket closed|"
                          "remote process exited|recvBytes")  # fmt: skip


@contextlib.contextmanager
def error_exits() -> Iterator[None]:
    """Turn what a command raises into one sentence and a failing exit; see it all printed."""
    escape_unencodable_output()
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        end_quietly()
    except OSError as e:
        sys.exit(f"error: {e}{read_only_hint(e)}")
    except UserError as e:
        sys.exit(f"error: {e}")
    except ModuleNotFoundError as e:
        sys.exit(missing_extras_message(e))
    except RuntimeError as e:
        sys.exit(peer_failure_message(e))
    except KeyboardInterrupt:
        sys.exit("interrupted: what is finished is kept; start the same command again to go on")


def end_quietly() -> None:
    """End as a program does whose reader, `| head`, has seen enough."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still buffered
    sys.exit(128 + signal.SIGPIPE)


def read_only_hint(error: OSError) -> str:
    """Return what to do about a folder that cannot be written to; '' of other errors."""
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ": choose a folder that you may write to, with --saved (or --out)"
    return ""


def escape_unencodable_output() -> None:
    """Print what the terminal's encoding lacks as an escape sequence, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's own streams take any text
            stream.reconfigure(errors="backslashreplace")


def missing_extras_message(error: ModuleNotFoundError) -> str:
    """Return what to say where a door leads to a deleted extras/.  Raises every other error."""
    if (error.name or "").split(".")[0] != "extras":
        raise error
    return f"error: this needs {error.name.replace('.', '/')}, which is not here: put it back"


def peer_failure_message(error: RuntimeError) -> str:
    """Return what a rank says when another one has died.  Raises every other error again."""
    if not PEER_FAILURE.search(str(error)):
        raise error
    kept = "what is finished is kept; start the same command again to go on"
    return f"error: another rank has ended, so this one ends too: {kept}"


# ---------------- Progress


def has_terminal() -> bool:
    """Tell whether errors go to a terminal wide enough for a bar; a notebook's has no width."""
    if not sys.stderr.isatty():
        return False
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):  # a stream that only says it is one
        return False


def progress(items: Iterable, description: str, show: bool = True, total: int = 0) -> Iterator:
    """Yield items (total: how many) with a progress bar; without a terminal, a line every 10 s."""
    if show and has_terminal():
        from tqdm import tqdm

        yield from tqdm(items, desc=description, leave=False, total=total or None)
        return
    start = printed = time.monotonic()
    for i, item in enumerate(items):
        now = time.monotonic()
        if show and now - printed > 10:
            printed = now
            done = f"{i} of {total or len(items)}, {now - start:.0f} s"
            print(f"{description}: {done}", file=sys.stderr, flush=True)
        yield item
