"""A server's address, the proxy on the way to it, secrets, and what each request carries.

Standard library alone: flags.py checks all this before anything else is loaded.
"""

import ipaddress
import json
import os
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit, urlunsplit

import storage
from storage import UserError

OPENAI = "https://api.openai.com/v1"
EXAMPLE = "like http://127.0.0.1:8000/v1"


class Address(NamedTuple):
    """A base URL in parts."""

    url: str  # without its query
    host: str
    is_https: bool
    query: dict[str, str]  # Azure's api-version, or nothing


def read_address(base_url: str) -> Address:
    """Return a base URL in parts.  Raises UserError for what is none, or holds a secret."""
    if not base_url.isprintable() or " " in base_url:
        raise UserError("the base URL holds a space or a control character: write it again")
    try:
        url = urlsplit(base_url)
        port = url.port
        host = url.hostname or ""
        host.encode("idna")
    except ValueError as e:  # UnicodeError is one
        raise UserError(f"the base URL is not valid ({e}): write it {EXAMPLE}") from None
    if url.scheme not in ("http", "https") or not host or port == 0:
        raise UserError(f"the base URL must begin with http:// or https:// and a host, {EXAMPLE}")
    if url.username or url.password or "@" in url.netloc:
        raise UserError(
            "the base URL must hold no name and no password: put the key into OPENAI_API_KEY"
        )
    query = dict(parse_qsl(url.query, keep_blank_values=True))
    if query.keys() - {"api-version"} or url.fragment or (url.query and not query):
        raise UserError(
            "the base URL may end in ?api-version=... (Azure) and in nothing else behind its "
            "path: a key goes into OPENAI_API_KEY, a header into --extra_headers"
        )
    return Address(
        urlunsplit((url.scheme, url.netloc, url.path, "", "")), host, url.scheme == "https", query
    )


def is_loopback(host: str) -> bool:
    """Tell whether a host is this machine: 127.0.0.1.evil.test is not."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_base_url(base_url: str | None) -> None:
    """Refuse what is no base URL; warn where the key would travel in clear."""
    if not base_url:
        return
    address = read_address(base_url)
    if not address.is_https and not is_loopback(address.host):
        print(
            f"warning: plain http to {address.host}: the key and all texts travel unencrypted; "
            "use https",
            file=sys.stderr,
        )


def find_proxy(address: Address) -> str | None:
    """Return the proxy that the environment names for a server; None for this machine.

    Raises UserError for a proxy of a kind that is not supported.
    """
    import urllib.request  # slow, for --help

    if is_loopback(address.host) or urllib.request.proxy_bypass(address.host):
        return None
    scheme = "https" if address.is_https else "http"
    proxies = urllib.request.getproxies()
    proxy = proxies.get(scheme) or proxies.get("all")
    if not proxy:
        return None
    if "://" not in proxy:
        proxy = f"http://{proxy}"
    try:
        parts = urlsplit(proxy)
        is_known = parts.scheme in ("http", "https") and bool(parts.hostname)
        is_known = is_known and parts.port != 0
    except ValueError:
        is_known = False
    if not is_known:
        raise UserError(
            f"the proxy of {scheme}:// in the environment ({scheme.upper()}_PROXY or ALL_PROXY) "
            "is none of http:// or https://: name another, or list the host in NO_PROXY"
        )
    return proxy


def proxy_name(proxy: str) -> str:
    """Return a proxy without the name and the password that its URL may hold."""
    parts = urlsplit(proxy)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


# ---------------- Secrets: from the environment alone, since `ps` shows flags


def api_key() -> str:
    """Return the key of the environment; "" where there is none."""
    return os.environ.get("OPENAI_API_KEY", "").strip()


def read_headers(extra_headers: str) -> dict[str, str]:
    """Return {header: value} of "NAME=ENV_VARIABLE,...".  Raises UserError."""
    headers = {}
    for name, variable in header_pairs(extra_headers):
        if not name.isascii() or not name.replace("-", "").replace("_", "").isalnum():
            raise UserError(
                "--extra_headers takes NAME=ENV_VARIABLE, like api-key=AZURE_OPENAI_API_KEY"
            )
        value = os.environ.get(variable, "").strip()
        if not value or not value.isascii() or not value.isprintable():
            raise UserError(
                f"--extra_headers {name}: the part behind = must be the name of an environment "
                "variable that holds the value, in printable ASCII"
            )
        headers[name] = value
    return headers


def header_pairs(extra_headers: str) -> list[tuple[str, str]]:
    """Return the pairs of "NAME=ENV_VARIABLE,..."."""
    pairs = [pair.partition("=") for pair in extra_headers.split(",") if pair.strip()]
    return [(name.strip(), variable.strip()) for name, _, variable in pairs]


def secrets(extra_headers: str = "") -> list[str]:
    """Return what must not be shown: the key, and the values of the extra headers."""
    values = [os.environ.get(variable, "").strip() for _, variable in header_pairs(extra_headers)]
    return [value for value in (api_key(), *values) if len(value) >= 4]


# ---------------- What each request carries

OF_APIS = "dry_run batch top_p reasoning_effort extra_body extra_headers".split()
OF_LOCAL_MODELS = ("chat", "thinking")
SENT_BY_FLAGS = """model messages prompt n stop stream temperature max_tokens max_completion_tokens
    top_p reasoning_effort""".split()


def check_given(flags: Mapping[str, Any], is_remote: bool) -> None:
    """Refuse flags that a teacher of this kind would not see."""
    names, whose = OF_APIS, "teachers behind an API"
    if is_remote:
        names, whose = OF_LOCAL_MODELS, "local models"
    for name in names:
        if flags[name] not in (None, False, "") or (is_remote and flags[name] is False):
            raise UserError(f"--{name} is for {whose}, and --teacher {flags['teacher']} is not one")


def read_parameters(
    *,
    api: str,
    top_p: float | None,
    reasoning_effort: str | None,
    extra_body: str | None,
    system: str | None,
    extra_headers: str,
) -> dict[str, str]:
    """Return what a request carries besides its text, of SamplingConfig's columns.

    system: a text, or the name of a file that holds it.  Raises UserError for what cannot be sent.
    """
    if system and api == "completions":
        raise UserError("--system is a turn of a chat: leave out --api completions")
    read_headers(extra_headers)
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"--top_p {top_p} must be above 0, and 1 at most")
    parameters = read_object(extra_body or "{}")
    values = {"top_p": top_p, "reasoning_effort": reasoning_effort}
    parameters |= {name: value for name, value in values.items() if value is not None}
    carried = {"parameters": "", "system": text_or_file(system), "extra_headers": extra_headers}
    if parameters:
        carried["parameters"] = json.dumps(parameters, sort_keys=True)
    return carried


def text_or_file(text: str | None) -> str:
    """Return a text, or what stands in the file of that name."""
    if text and len(text) < 250 and os.path.isfile(text):
        return storage.read_text(text).strip()
    return text or ""


def read_object(extra_body: str) -> dict[str, Any]:
    """Return --extra_body.  Raises UserError where it is no object or sets what a flag sets."""
    try:
        parameters = json.loads(extra_body)
        json.dumps(parameters, ensure_ascii=False, allow_nan=False).encode()  # as it is sent
    except (ValueError, RecursionError) as e:
        raise UserError(f"--extra_body is not JSON ({e}): quote it for the shell") from None
    if not isinstance(parameters, dict):
        raise UserError("--extra_body must be a JSON object, like '{\"top_k\": 20}'")
    if known := sorted(parameters.keys() & set(SENT_BY_FLAGS)):
        raise UserError(f"--extra_body may not set {', '.join(known)}: flags of their own do")
    return parameters
