"""Ports of this machine."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack
from pathlib import Path

_LOWEST = 10_000
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_TRIES = 1000


def get_free_port(count: int = 1) -> int:
    """The first of `count` neighbouring TCP ports of the loopback interface that nobody uses now.

    For whoever starts a server and has to say its port: it may be taken before it is bound. Not
    among those that connections are made from, where Linux tells which: a client that waits for
    its server may be given the very port that it connects to, and holds it from then on. Raises
    OSError when none is found.
    """
    end = _first_of_connections()
    dice = random.SystemRandom()
    for _ in range(_TRIES):
        first = (
            0 if end is None and count == 1 else dice.randrange(_LOWEST, (end or 65_536) - count)
        )
        with ExitStack() as stack:
            try:
                ports = [
                    _bind(stack.enter_context(socket.socket()), first and first + step)
                    for step in range(count)
                ]
            except OSError:
                continue
            return ports[0]
    raise OSError(f"no {count} neighbouring ports are free")


def _bind(probe: socket.socket, port: int) -> int:
    probe.bind(("127.0.0.1", port))
    bound: int = probe.getsockname()[1]
    return bound


def _first_of_connections() -> int | None:
    """The first port that connections are made from; None where it isn't told or leaves no room."""
    try:
        first = int(_RANGE.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return first if first >= _LOWEST + _TRIES else None
