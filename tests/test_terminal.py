"""How a command line ends: one sentence, a failing exit, or quietly.

python -m pytest tests/test_terminal.py
"""

import errno
import subprocess
import sys

import pytest
from conftest import ROOT

import terminal
from storage import UserError


def test_escape_unencodable_output_prints_numbers(monkeypatch):
    """What the terminal cannot show is printed as its number."""
    code = "import terminal; terminal.escape_unencodable_output(); print('caf\\u00e9 \\u2028')"
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, check=True, cwd=ROOT, capture_output=True).stdout
    assert printed == b"caf\\xe9 \\u2028\n"


def test_peer_failure_message():
    """A rank whose peer has died says so; other errors are raised again."""
    message = terminal.peer_failure_message(RuntimeError("[gloo] Connection closed by peer"))
    assert message.startswith("error: another rank has ended")
    with pytest.raises(RuntimeError, match="shapes"):
        terminal.peer_failure_message(RuntimeError("shapes"))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_error_exits_names_saved_where_nothing_can_be_written(number):
    """A folder that must not be written to: the message says which flag names another."""
    with pytest.raises(SystemExit, match=r"'saved/x'.*: choose a folder .* with --saved"):
        with terminal.error_exits():
            raise OSError(number, "no", "saved/x")


def test_error_exits_of_other_errors():
    """A full disk has no such hint."""
    with pytest.raises(SystemExit) as end, terminal.error_exits():
        raise OSError(errno.ENOSPC, "No space left on device", "saved/x")
    assert end.value.code == "error: [Errno 28] No space left on device: 'saved/x'"


def test_error_exits_user_error():
    """What the user can mend is one sentence."""
    with pytest.raises(SystemExit, match="^error: mend it$"), terminal.error_exits():
        raise UserError("mend it")


def test_error_exits_is_quiet_where_the_reader_has_left():
    """`| head -1` leaves neither a traceback nor a message."""
    code = "import terminal\nwith terminal.error_exits():\n    for i in range(100000): print(i)"
    head = subprocess.Popen(["head", "-1"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    command = [sys.executable, "-c", code]
    streams = {"stdout": head.stdin, "stderr": subprocess.PIPE}
    writer = subprocess.run(command, check=False, cwd=ROOT, **streams)
    head.stdin.close()
    head.wait()
    assert writer.stderr == b""
