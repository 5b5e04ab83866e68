"""Where a model comes from: a folder with all it needs, the cache, or the hub.

Said within seconds: a library tries for half a minute to reach a network that is not there.
"""

import difflib
import queue
import socket
import threading
from pathlib import Path
from urllib.parse import urlsplit

import storage
from storage import UserError

SECONDS = 2.5  # to reach the hub
TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json vocab.json spiece.model tokenizer.model".split()
)


def use_cache_alone(name: str) -> bool:
    """Tell whether a model by this hub name must come from the cache, as the hub is out of reach.

    Raises UserError, with the nearest folder that holds a model, where it is not in the cache.
    """
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False  # no hub name: what loads it says so
    if not constants.HF_HUB_OFFLINE and can_connect(constants.ENDPOINT):
        return False
    if cached:
        return True
    near = nearest_model_folder(name)
    hint = ""
    if near:
        hint = f" (did you mean {near}?)"
    raise UserError(
        f"the model {name} is neither a folder here{hint} nor in the cache, and "
        f"{constants.ENDPOINT} cannot be reached: give the path of a folder with the model, or "
        "download it where there is a network and set HF_HUB_OFFLINE=1"
    )


def can_connect(url: str, seconds: float = SECONDS) -> bool:
    """Tell whether the host of a URL accepts a connection in time; true behind a proxy."""
    from urllib.request import getproxies  # slow to import, and --help needs none of it

    address = urlsplit(url)
    if address.scheme in getproxies():
        return True
    port = address.port or {"http": 80}.get(address.scheme, 443)
    answers = queue.SimpleQueue()

    def connect() -> None:
        """Put the outcome into the queue."""
        try:
            socket.create_connection((address.hostname, port), seconds).close()
            answers.put(True)
        except OSError:
            answers.put(False)

    threading.Thread(target=connect, daemon=True).start()  # looking up a name knows no timeout
    try:
        return answers.get(timeout=seconds)
    except queue.Empty:
        return False


def nearest_model_folder(name: str) -> str | None:
    """Return the folder with a model, here or in the project, whose name is nearest to `name`."""
    folders = {}
    for root in {Path.cwd(), storage.ROOT}:
        for pattern in ("*/config.json", "*/*/config.json", "saved/models/*/*/config.json"):
            folders |= {path.parent.name.lower(): path.parent for path in root.glob(pattern)}
    close = difflib.get_close_matches(name.rpartition("/")[2].lower(), folders, 1)
    if not close:
        return None
    return str(folders[close[0]].resolve())


def check_model_folder(folder: Path) -> None:
    """Raise UserError where a folder lacks a config or a tokenizer."""
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is not a model folder: it has no config.json")
    if not any((folder / file).exists() for file in TOKENIZER_FILES):
        raise UserError(
            f"{folder} has no tokenizer: save one beside the model with "
            f"tokenizer.save_pretrained({str(folder)!r})"
        )
