"""Whether the Hugging Face Hub can be reached, asked before its client asks five times for half a minute."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

#: Name resolution may hang for longer than connecting takes.
_SECONDS = 3.0


@contextmanager
def offline_if_unreachable(name: str) -> Iterator[str]:
    """Context in which the Hub is not asked for a name if it cannot be reached: what is in its cache is found at once.

    Args:
        name: A model; a folder or a file that is here needs no Hub.

    Yields:
        The address that cannot be reached; empty where it can, or is not needed.
    """
    constants = None if Path(name).exists() else _constants()
    if constants is None or constants.HF_HUB_OFFLINE or _is_reachable(str(constants.ENDPOINT)):
        yield ""
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield str(constants.ENDPOINT)
    finally:
        constants.HF_HUB_OFFLINE = False


def _constants() -> Any:
    try:
        from huggingface_hub import constants
    except ImportError:
        return None
    return constants


def _is_reachable(address: str) -> bool:
    """Connect to a server, and no more; where a proxy does that, only it can say."""
    parts = urlsplit(address)
    if parts.hostname is None or parts.scheme in getproxies():
        return True
    found = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection(
                (parts.hostname, parts.port or {"http": 80}.get(parts.scheme, 443)), timeout=_SECONDS
            ).close()
        except OSError:
            return
        found.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_SECONDS)
    return found.is_set()
