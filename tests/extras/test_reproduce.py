"""reproduce.sh: the commands that it starts are understood, at the paper's size and at toy size.

python -m pytest tests/extras/test_reproduce.py     (to run it all: ./reproduce.sh toy)
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import evaluate
import flags
from extras.studies import STUDIES

STUB = """#!{python}
import json, sys
with open({log!r}, "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
sys.exit({code})
"""


def start(
    tmp_path: Path, *arguments: str, code: int = 0
) -> tuple[list, subprocess.CompletedProcess]:
    """Run reproduce.sh with a Python that only notes its commands; return these."""
    log = tmp_path / "commands"
    stub = tmp_path / "python"
    stub.write_text(STUB.format(python=sys.executable, log=str(log), code=code))
    stub.chmod(0o755)
    env = {**os.environ, "PYTHON": str(stub), "SAVED": str(tmp_path / "saved")}
    command = ["bash", "reproduce.sh", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    commands = []
    if log.exists():
        commands = [json.loads(line) for line in log.read_text().splitlines()]
    return [one for one in commands if one[0] != "-c"], done


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """The commands at each size: {"paper": [...], "toy": [...]}."""
    found = {}
    for size in ("paper", "toy"):
        found[size], done = start(tmp_path_factory.mktemp(size), size)
        assert done.returncode == 0
    return found


@pytest.mark.parametrize("size", ["paper", "toy"])
def test_reproduce_commands_parse(commands, size):
    """Every command is understood by the real parser, and its flags go together."""
    for script, *options in commands[size]:
        assert (ROOT / script).exists()
        if script == "evaluate.py":
            evaluate.parse_args(options)
        elif script == "finetune_cot.py":
            for args in flags.parse_args(options):
                flags.check(args)


@pytest.mark.parametrize("size", ["paper", "toy"])
def test_reproduce_runs_every_study(commands, size):
    """Each row of STUDIES is a command."""
    named = {one[one.index("--study") + 1] for one in commands[size] if "--study" in one}
    assert named == set(STUDIES)


def test_reproduce_toy_asks_for_nothing_from_outside(commands):
    """At toy size teacher and student are made here."""
    cells = []
    for one in commands["toy"]:
        if "--study" in one:
            cells += flags.parse_args(one[1:])
    assert {(args.task, args.teacher, args.student) for args in cells} == {("toy", "toy", "toy")}


def test_reproduce_names_what_failed(tmp_path):
    """A study that fails stops no other; the exit tells."""
    commands, done = start(tmp_path, "toy", code=1)
    assert done.returncode == 1
    assert f"{len(commands)} commands did not finish" in done.stderr


def test_reproduce_unknown_size(tmp_path):
    commands, done = start(tmp_path, "small")
    assert (commands, done.returncode) == ([], 2)
