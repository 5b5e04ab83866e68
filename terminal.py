"""A command line for people: help, near names for wrong ones, progress, one sentence for an error.

    parser = Parser(basic=["task", "seed"])  # what --help shows; --help-all shows every flag
    add = parser.group("what to run")
    add("--task", nargs="+", help="...")  # that is all that a new flag needs

Standard library alone, so that `--help` answers at once.
"""

import argparse
import contextlib
import difflib
import errno
import os
import re
import signal
import sys
import time
from argparse import SUPPRESS, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from storage import UserError

# ---------------- Flags

METAVARS = {int: "N", float: "X"}  # by type; else NAME, or the choices where they are short


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """('ft-cot', ['ft', 'ft_cot']) -> ' (did you mean ft_cot?)'; '' where nothing is near."""
    close = difflib.get_close_matches(name, list(known), 1)
    if not close or close[0] == name:
        return ""
    return f" (did you mean {close[0]}?)"


def one_of(choices: Sequence[str]) -> Callable[[str], str]:
    """Return a type for argparse that takes one of these names and suggests the nearest."""

    def name(text: str) -> str:
        """Return the text.  Raises ArgumentTypeError, which argparse prints behind the flag."""
        if text in choices:
            return text
        known = ", ".join(choices)
        hint = did_you_mean(text, choices)
        raise ArgumentTypeError(f"no {text!r}{hint}: choose from {known}")

    return name


def short_metavar(choices: Sequence[str], options: dict[str, Any]) -> str:
    """Return what stands for the value of a flag in the help: N, X, NAME or fp32|bf16."""
    names = "|".join(choices)
    if names and len(names) <= 32 and "nargs" not in options:
        return names
    return METAVARS.get(options.get("type"), "NAME")


class Parser(argparse.ArgumentParser):
    """An argparse parser whose --help shows the flags named in `basic`, and --help-all all."""

    def __init__(self, basic: Sequence[str], show_all: bool = False, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.basic = basic
        self.show_all = show_all
        self.flags: list[str] = []
        self.lists: list[str] = []  # flags that take several values
        self.other_names: dict[str, str] = {}  # of flags, in other programs
        self.add_argument("--help-all", action="help", help="show all flags")

    def group(self, title: str) -> Callable:
        """Begin a titled group of flags; return its add(*names, help=..., ...)."""
        group = self.add_argument_group(title)

        def add(*names: str, **options: Any) -> None:
            """Add a flag as argparse does, with a short metavar, and shown where it should be."""
            choices = options.pop("choices", [])
            if "action" not in options:
                options.setdefault("metavar", short_metavar(choices, options))
            if choices:
                options["type"] = one_of(choices)
            self.flags += names
            if options.get("nargs") == "+":
                self.lists += names
            is_basic = names[0].removeprefix("--") in self.basic
            if not is_basic and not self.show_all:
                options["help"] = SUPPRESS
            group.add_argument(*names, **options)

        return add

    def parse(self, argv: Sequence[str]) -> Namespace:
        """Parse a command line; a wrong flag ends it with the nearest right one."""
        words = self.split_lists(argv)
        args, unknown = self.parse_known_args(words)
        if unknown:
            flags = [word for word in unknown if word.startswith("-")]
            hints = " ".join(map(self.with_hint, flags or unknown))
            self.error(f"unrecognized arguments: {hints}; --help-all shows all flags")
        return args

    def with_hint(self, word: str) -> str:
        """'--degre' -> '--degre (did you mean --degree?)'"""
        name = word.partition("=")[0]
        if name in self.other_names:
            return f"{word} (did you mean {self.other_names[name]}?)"
        return word + did_you_mean(name, self.flags)

    def split_lists(self, argv: Sequence[str]) -> list[str]:
        """['--degree', '1,2', '--seed=0,1'] -> ['--degree', '1', '2', '--seed', '0', '1']"""
        words = []
        flag = ""
        for word in argv:
            values = word
            if word.startswith("--"):
                flag, _, values = word.partition("=")
            if flag not in self.lists or "," not in values or Path(word).exists():
                words.append(word)
                continue
            if word.startswith("--"):
                words.append(flag)
            words += [value for value in values.split(",") if value]
        return words


# ---------------- How a command ends

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
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())  # for what is still buffered
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
            seconds = now - start
            done = f"{i} of {total or len(items)}, {seconds:.0f} s"
            print(f"{description}: {done}", file=sys.stderr, flush=True)
        yield item
