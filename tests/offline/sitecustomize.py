"""On the path of a command that tests run: whom else it talks to is written down, and prevented.

``CLINFUSE_TALKED_TO`` names the file. What stays on this machine does not count.
"""

import os
import socket

_LOCAL = ("127.", "localhost", "::1", "0.0.0.0")
_connect, _getaddrinfo = socket.socket.connect, socket.getaddrinfo


def _refuse(whom: object) -> None:
    with open(os.environ["CLINFUSE_TALKED_TO"], "a", encoding="utf-8") as file:
        file.write(f"{whom}\n")
    raise OSError(f"no network in tests: {whom}")


def connect(self: socket.socket, address: object) -> None:
    is_local = self.family == socket.AF_UNIX or (
        isinstance(address, tuple) and str(address[0]).startswith(_LOCAL)
    )
    if not is_local:
        _refuse(address)
    _connect(self, address)  # type: ignore[arg-type]


def getaddrinfo(host: object, *args: object, **kwargs: object) -> object:
    name = host.decode() if isinstance(host, bytes) else host
    if name not in (None, "", socket.gethostname()) and not str(name).startswith(_LOCAL):
        _refuse(name)
    return _getaddrinfo(host, *args, **kwargs)  # type: ignore[arg-type]


if "CLINFUSE_TALKED_TO" in os.environ:
    socket.socket.connect, socket.getaddrinfo = connect, getaddrinfo  # type: ignore[method-assign,assignment]
