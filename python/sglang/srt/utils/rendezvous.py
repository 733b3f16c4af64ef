"""Where the ranks of one server meet, and the board on which each notes how far it has come.

The parent makes a `Rendezvous` and hands it to every rank's process; the communicator connects
through it. The board is a small file that all ranks map: when one of them waits in vain, it reads
there who has not come. Nothing here knows tensors or what ranks talk about.
"""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Rendezvous:
    """What one rank needs to find the others.

    `port` on the loopback interface is rank 0's; `listener` is the socket that already listens
    there, None on all other ranks. `board_path` names the board's file.
    """

    port: int
    listener: socket.socket | None
    board_path: str

    @classmethod
    def for_ranks(cls, size: int, directory: str) -> tuple[Rendezvous, ...]:
        """One for each rank. Side effects: binds a free port, makes the board's file.

        The listener is the first one's to close; the file goes with its directory.
        """
        path = str(Path(directory) / "ranks")
        RankBoard.create(path, size)
        listener = socket.create_server((LOOPBACK, 0))
        port = listener.getsockname()[1]
        return tuple(cls(port, listener if rank == 0 else None, path) for rank in range(size))


class RankBoard:
    """Numbers in a file that all ranks map: how many collectives each rank has begun, per group.

    A rank writes its own numbers only, one machine word each, so that no lock is needed. Made
    anew by `create`, opened by the constructor with the same `size`.
    """

    NUM_GROUPS = 2

    def __init__(self, path: str, size: int) -> None:
        self.size = size
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), size * self.NUM_GROUPS * 8)
        self._counts: memoryview = memoryview(self._map).cast("q")

    @classmethod
    def create(cls, path: str, size: int) -> None:
        """Make the file with all numbers 0; readable by its owner alone."""
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            os.ftruncate(descriptor, size * cls.NUM_GROUPS * 8)
        finally:
            os.close(descriptor)

    def begin(self, rank: int, group: int) -> int:
        """Rank `rank` enters its next collective of `group`; returns its number, from 1."""
        at = rank * self.NUM_GROUPS + group
        self._counts[at] += 1
        number: int = self._counts[at]
        return number

    def behind(self, group: int, number: int) -> Sequence[int]:
        """The ranks that have not begun collective `number` of `group`."""
        return [
            rank
            for rank in range(self.size)
            if self._counts[rank * self.NUM_GROUPS + group] < number
        ]
