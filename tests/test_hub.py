"""Where a model comes from.   python -m pytest tests/test_hub.py"""

import socket
import threading
import time
import urllib.request

import huggingface_hub.constants
import pytest
from conftest import tiny_model

import hub
from storage import UserError

NOWHERE = "http://127.0.0.1:9"  # nothing listens there


@pytest.fixture
def no_network(monkeypatch):
    """The hub is out of reach."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", NOWHERE)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "getproxies", dict)


def test_use_cache_alone_says_within_seconds_that_there_is_no_network(no_network):
    """One sentence with HF_HUB_OFFLINE, before a library has tried its five times."""
    start = time.monotonic()
    with pytest.raises(UserError, match="cannot be reached: .* set HF_HUB_OFFLINE=1"):
        hub.use_cache_alone("no-such/model")
    assert time.monotonic() - start < 3


def test_use_cache_alone_suggests_the_nearest_folder(no_network, tmp_path, monkeypatch):
    """A folder here with nearly that name may be what was meant."""
    tiny_model("gpt2").save_pretrained(tmp_path / "models" / "my-gpt2")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"did you mean {tmp_path}/models/my-gpt2"):
        hub.use_cache_alone("someone/my_gpt2")


def test_use_cache_alone_of_a_cached_model(no_network, monkeypatch):
    """What is in the cache needs no network."""
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "config.json")
    assert hub.use_cache_alone("gpt2")


def test_use_cache_alone_with_a_network(no_network, monkeypatch):
    """Where the hub answers, it is asked."""
    monkeypatch.setattr(hub, "can_connect", lambda *_: True)
    assert not hub.use_cache_alone("gpt2")


def test_can_connect():
    """A listening port is reached, a closed one is not."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert hub.can_connect(f"http://127.0.0.1:{server.getsockname()[1]}")
    assert not hub.can_connect(NOWHERE)


def test_can_connect_gives_up_on_a_silent_name_server(monkeypatch):
    """Looking up a name may take for ever."""
    silent = threading.Event()

    def look_up(*_: object) -> None:
        """Wait for an answer, which comes when the test is over, and is none."""
        silent.wait(5)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", look_up)
    start = time.monotonic()
    assert not hub.can_connect("http://x", seconds=0.2)
    silent.set()
    assert time.monotonic() - start < 3
