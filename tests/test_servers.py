"""Addresses, proxies, secrets, parameters of requests.   python -m pytest tests/test_servers.py"""

import json

import pytest

import flags
import servers
from storage import UserError

# ---- addresses

REFUSED_ADDRESSES = [
    ("http://[::1:9/v1", "is not valid"),
    ("http://h:abc/v1", "is not valid"),
    ("http://127.0.0.1:99999/v1", "is not valid"),
    ("http://127.0.0.1:0/v1", "must begin with http"),
    ("http://a..b/v1", "is not valid"),
    (f"http://{'a' * 70}.test/v1", "is not valid"),
    ("http://127.0.0.1:9/v1\n", "a control character"),
    ("http://127.0.0.1:9/ v1", "holds a space"),
    ("http://h/v1\x1b[31m", "a control character"),
    ("ftp://h/v1", "must begin with http"),
    ("127.0.0.1:8000/v1", "must begin with http"),
    ("http:///v1", "must begin with http"),
    ("http://me:secret@h/v1", "must hold no name and no password"),
    ("http://@h/v1", "must hold no name and no password"),
    ("https://h/v1?key=sk-1", "may end in ?api-version="),
    ("https://h/v1?api-version=1&sig=x", "may end in ?api-version="),
    ("https://h/v1?x", "may end in ?api-version="),
    ("https://h/v1#part", "may end in ?api-version="),
]


@pytest.mark.parametrize("url, sentence", REFUSED_ADDRESSES)
def test_read_address_refused(url, sentence):
    """What is no base URL is refused in one sentence that does not repeat a secret."""
    with pytest.raises(UserError) as caught:
        flags.check(flags.parse_args(["--base_url", url])[0])
    assert sentence in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "sk-1" not in str(caught.value)


def test_read_address_azure():
    """Azure's api-version is a query, not a part of the path."""
    url = "https://r.openai.azure.com/openai/deployments/d?api-version=2024-10-21"
    address = servers.read_address(url)
    assert address.url == "https://r.openai.azure.com/openai/deployments/d"
    assert address.query == {"api-version": "2024-10-21"}


@pytest.mark.parametrize(
    "host, expected",
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("localhost", True),
        ("LOCALHOST", True),
        ("127.0.0.1.evil.test", False),
        ("127.evil.test", False),
        ("localhost.evil.test", False),
        ("10.0.0.1", False),
    ],
)
def test_is_loopback(host, expected):
    """Only this machine is."""
    assert servers.is_loopback(host) == expected


# ---- proxies


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    """The environment names no proxy."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


PROXIES = [
    ("http://127.0.0.1:8/v1", {"http_proxy": "http://p:1"}, None),
    ("http://localhost:8/v1", {"all_proxy": "socks5://p:1"}, None),
    ("http://h.test/v1", {"http_proxy": "http://p:1"}, "http://p:1"),
    ("http://h.test/v1", {"http_proxy": "p:1"}, "http://p:1"),
    ("https://h.test/v1", {"http_proxy": "http://p:1"}, None),
    ("https://h.test/v1", {"all_proxy": "http://p:1"}, "http://p:1"),
    ("https://h.test/v1", {"https_proxy": "http://p:1", "no_proxy": "h.test"}, None),
]


@pytest.mark.parametrize("url, environment, proxy", PROXIES)
def test_find_proxy(url, environment, proxy, monkeypatch):
    """A proxy of the environment is used, but not to reach this machine."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert servers.find_proxy(servers.read_address(url)) == proxy


@pytest.mark.parametrize("proxy", ["socks5://p:1", "http://p:abc", "http://[::1", "ftp://p"])
def test_find_proxy_refused(proxy, monkeypatch):
    """A proxy that cannot be used is named by its variable."""
    monkeypatch.setenv("all_proxy", proxy)
    with pytest.raises(UserError, match="ALL_PROXY"):
        servers.find_proxy(servers.read_address("https://h.test/v1"))


def test_proxy_name_hides_password():
    """The name of a proxy holds no password."""
    assert servers.proxy_name("http://me:secret@p:1") == "http://p:1"


# ---- what requests carry


def carried(**changes):
    usual = dict.fromkeys(("top_p", "reasoning_effort", "extra_body", "system"))
    return servers.read_parameters(**usual | {"api": "chat", "extra_headers": ""} | changes)


def test_read_parameters_unset():
    """Without flags nothing is added, so that keys are those of earlier versions."""
    assert set(carried().values()) == {""}


def test_read_parameters_all():
    """Flags and --extra_body are sent together."""
    text = carried(top_p=0.9, reasoning_effort="low", extra_body='{"top_k": 20}')["parameters"]
    assert json.loads(text) == {"reasoning_effort": "low", "top_k": 20, "top_p": 0.9}


REFUSED_PARAMETERS = [
    ({"extra_body": "{"}, "--extra_body is not JSON"),
    ({"extra_body": '{"a": NaN}'}, "--extra_body is not JSON"),
    ({"extra_body": "[1]"}, "must be a JSON object"),
    ({"extra_body": '{"n": 2, "model": "x"}'}, "--extra_body may not set model, n"),
    ({"top_p": 0.0}, "--top_p 0.0 must be above 0"),
    ({"top_p": float("nan")}, "--top_p nan must be above 0"),
    ({"system": "Be brief.", "api": "completions"}, "--system is a turn of a chat"),
    ({"extra_headers": "api-key"}, "must be the name of an environment variable"),
    ({"extra_headers": "api-key=NO_SUCH_VARIABLE"}, "must be the name of an environment variable"),
    ({"extra_headers": "api key=X"}, "takes NAME=ENV_VARIABLE"),
]


@pytest.mark.parametrize("changes, sentence", REFUSED_PARAMETERS)
def test_read_parameters_refused(changes, sentence):
    """What cannot be sent is refused before anything is asked."""
    with pytest.raises(UserError) as caught:
        carried(**changes)
    assert sentence in str(caught.value)


def test_read_headers_bad_value(monkeypatch):
    """A value that no header can carry is refused without showing it."""
    monkeypatch.setenv("AZURE_KEY", "sk\n-\u00e9")
    with pytest.raises(UserError) as caught:
        servers.read_headers("api-key=AZURE_KEY")
    assert "\u00e9" not in str(caught.value)


def test_read_parameters_system_file(tmp_path):
    """--system may name a file."""
    file = tmp_path / "system.txt"
    file.write_text("Be brief.\n")
    assert carried(system=str(file))["system"] == "Be brief."
    assert carried(system="Be brief.")["system"] == "Be brief."
