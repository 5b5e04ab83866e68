"""Where a model comes from, and what decides a text besides its weights."""

import socket
import threading
import time
import urllib.request

import huggingface_hub.constants
import pytest
from conftest import tiny_bart, tiny_model, tiny_tokenizer

import models
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
        models.use_cache_alone("no-such/model")
    assert time.monotonic() - start < 3


def test_use_cache_alone_suggests_the_nearest_folder(no_network, tmp_path, monkeypatch):
    """A folder here with nearly that name may be what was meant."""
    tiny_model("gpt2").save_pretrained(tmp_path / "models" / "my-gpt2")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"did you mean {tmp_path}/models/my-gpt2"):
        models.use_cache_alone("someone/my_gpt2")


def test_use_cache_alone_of_a_cached_model(no_network, monkeypatch):
    """What is in the cache needs no network."""
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "config.json")
    assert models.use_cache_alone("gpt2")


def test_use_cache_alone_with_a_network(no_network, monkeypatch):
    """Where the hub answers, it is asked."""
    monkeypatch.setattr(models, "can_connect", lambda *_: True)
    assert not models.use_cache_alone("gpt2")


def test_can_connect():
    """A listening port is reached, a closed one is not."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert models.can_connect(f"http://127.0.0.1:{server.getsockname()[1]}")
    assert not models.can_connect(NOWHERE)


def test_can_connect_gives_up_on_a_silent_name_server(monkeypatch):
    """Looking up a name may take for ever."""
    silent = threading.Event()

    def look_up(*_: object) -> None:
        """Wait for an answer, which comes when the test is over, and is none."""
        silent.wait(5)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", look_up)
    start = time.monotonic()
    assert not models.can_connect("http://x", seconds=0.2)
    silent.set()
    assert time.monotonic() - start < 3


def test_ignored_settings_of_usual_models():
    """Special tokens and defaults are none."""
    for kind in ("gpt2", "llama", "t5"):
        assert models.ignored_settings(tiny_model(kind)) == {}
    assert models.ignored_settings(tiny_bart()) == {}


def test_ignored_settings_that_change_texts():
    """Each that would change what model.generate writes, token 0 included, but no neutral value."""
    model = tiny_model("gpt2")
    settings = {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "bad_words_ids": [[3]]}
    settings |= {"forced_bos_token_id": 0, "num_beams": 4, "suppress_tokens": [5]}
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    assert models.ignored_settings(model) == settings
    for name in ("repetition_penalty", "num_beams"):
        setattr(model.generation_config, name, 1)
    found = models.ignored_settings(model)
    assert "repetition_penalty" not in found
    assert "num_beams" not in found


def test_load_model_names_what_is_ignored_once(tmp_path, capsys):
    """A model whose generation_config.json sets more than counts is named, one time."""
    model = tiny_model("gpt2")
    model.generation_config.repetition_penalty = 1.2
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    for _ in range(2):
        models.load_model(str(tmp_path))
    out = capsys.readouterr().out
    assert out.count("sets repetition_penalty 1.2: that does not count here") == 1


def test_eos_token_ids_of_several():
    """The tokenizer's and those of the generation config end a text."""
    model = tiny_model("gpt2")
    model.generation_config.eos_token_id = [5, 7]
    assert models.eos_token_ids(model, tiny_tokenizer()) == {0, 5, 7}


def test_stream_seeds_of_equal_prompts():
    """The first of equal prompts has the seed that it has alone; none is there twice."""
    [alone] = models.stream_seeds(3, ["a"], range(2))
    seeds = models.stream_seeds(3, ["b", "a", "a"], range(2))
    assert seeds[1] == alone
    assert len({seed for of_prompt in seeds for seed in of_prompt}) == 6
