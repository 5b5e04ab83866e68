"""A command line for people: short help, the nearest name where one is wrong, lists with commas.

    parser = Parser(basic=["task", "seed"])  # what --help shows; --help-all shows every flag
    add = parser.group("what to run")
    add("--task", nargs="+", help="...")  # that is all that a new flag needs

Standard library alone, so that `--help` answers at once.
"""

import argparse
import difflib
from argparse import SUPPRESS, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

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
        raise ArgumentTypeError(f"no {text!r}{did_you_mean(text, choices)}: choose from {known}")

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
            if names[0].removeprefix("--") not in self.basic and not self.show_all:
                options["help"] = SUPPRESS
            group.add_argument(*names, **options)

        return add

    def parse(self, argv: Sequence[str]) -> Namespace:
        """Parse a command line; a wrong flag ends it with the nearest right one."""
        args, unknown = self.parse_known_args(self.split_lists(argv))
        if unknown:
            wrong = [word for word in unknown if word.startswith("-")] or unknown
            hints = [word + did_you_mean(word.partition("=")[0], self.flags) for word in wrong]
            self.error(f"unrecognized arguments: {' '.join(hints)}; --help-all shows all flags")
        return args

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
