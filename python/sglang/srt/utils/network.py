"""Ports of this machine."""

from __future__ import annotations

import socket


def get_free_port() -> int:
    """A TCP port of the loopback interface that nobody uses at this moment.

    For whoever starts a server and has to say its port: it may be taken before it is bound.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
