"""Where the schedulers of one server meet, and the board on which each notes how far it has come.

The parent makes a `Rendezvous` and a `RankPlace` for every scheduler's process; the communicator
connects through them. The board is a small file that all processes of one machine map: when one of
them waits in vain, it reads there who has not come. Nothing here knows tensors or what is said.
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
class RankPlace:
    """Which of a server's schedulers a process is.

    Rank `tp_rank` of the `tp_size` that compute one replica of the model together (with
    `--kv-parallel-size` all of its grid, see `RankGrid`); replica `dp_rank` of `dp_size`.
    `num_here` of all of them share its machine.
    """

    tp_rank: int = 0
    tp_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    num_here: int = 1

    @property
    def first(self) -> int:
        """The number of its replica's rank 0 among all schedulers."""
        return self.dp_rank * self.tp_size

    @property
    def number(self) -> int:
        """Its own number among all schedulers."""
        return self.first + self.tp_rank

    @property
    def device_index(self) -> int:
        """Which of its machine's GPUs it computes on: each scheduler there has one of its own."""
        return self.number % self.num_here

    @property
    def num_all(self) -> int:
        """How many schedulers the server has."""
        return self.dp_size * self.tp_size

    @property
    def name(self) -> str:
        """As logs and errors call it: "scheduler", "scheduler TP1", "scheduler DP0 TP1"."""
        words = ["scheduler"]
        if self.dp_size > 1:
            words.append(f"DP{self.dp_rank}")
        if self.tp_size > 1:
            words.append(f"TP{self.tp_rank}")
        return " ".join(words)


ALONE = RankPlace()


@dataclass(frozen=True)
class NodeMeeting:
    """Where the nodes of one server meet: at `host` and `port` of node 0.

    `has_store`: who started the nodes serves a store there already (torchrun's agent does), and
    `attempt` tells this start from earlier ones in the same store. `processes_here` launchers
    share this machine. `interface` names the network device to talk through, None: the one
    towards the host.
    """

    node_rank: int
    host: str
    port: int
    has_store: bool = False
    attempt: str = ""
    processes_here: int = 1
    interface: str | None = None


@dataclass(frozen=True)
class Rendezvous:
    """What one scheduler needs to find the others.

    A store of keys listens at `host` and `port`; `listener` is that socket for who serves the
    store, None for everybody else. `board_path` names the board's file, None when the schedulers
    do not share a machine. Keys begin with `attempt`, so that a store may outlive a server.
    `has_own_store`: the first scheduler serves the store, and nobody outside. `interface` as in
    `NodeMeeting`.
    """

    host: str
    port: int
    listener: socket.socket | None
    board_path: str | None
    attempt: str = ""
    has_own_store: bool = True
    interface: str | None = None

    @classmethod
    def for_ranks(cls, size: int, directory: str) -> tuple[Rendezvous, ...]:
        """One for each of `size` schedulers on this machine; the first serves the store.

        Side effects: binds a free port, makes the board's file. The listener is the first one's to
        close; the file goes with its directory.
        """
        path = str(Path(directory) / "ranks")
        RankBoard.create(path, size)
        listener = socket.create_server((LOOPBACK, 0))
        port = listener.getsockname()[1]
        return tuple(
            cls(LOOPBACK, port, listener if number == 0 else None, path) for number in range(size)
        )

    @classmethod
    def across_nodes(cls, meeting: NodeMeeting, count: int) -> tuple[Rendezvous, ...]:
        """One for each of this node's `count` schedulers, the others being elsewhere.

        Side effect: where this node has the store, its port is listened on from now on. Raises
        OSError when it can't be.
        """
        host, port = meeting.host, meeting.port
        listener = None
        if meeting.node_rank == 0 and not meeting.has_store:
            listener = socket.create_server((host, port), family=_family(host))
        return tuple(
            cls(
                host,
                port,
                listener if number == 0 else None,
                None,
                meeting.attempt,
                not meeting.has_store,
                meeting.interface,
            )
            for number in range(count)
        )


class RankBoard:
    """Numbers in a file that all schedulers map: how many collectives each has begun, per group.

    A scheduler writes its own numbers only, one machine word each, so that no lock is needed. Made
    anew by `create`, opened by the constructor with the same `size`.
    """

    NUM_GROUPS = 3

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

    def begin(self, who: int, group: int) -> int:
        """Scheduler `who` enters its next collective of `group`; returns its number, from 1."""
        at = who * self.NUM_GROUPS + group
        self._counts[at] += 1
        number: int = self._counts[at]
        return number

    def missing(
        self, group: int, number: int, among: Sequence[int]
    ) -> tuple[Sequence[int], Sequence[int]]:
        """Those of `among` that have not begun collective `number` of `group`, and those that give
        no signs of life: here nobody, as the parent watches the processes of its machine."""
        at = [who * self.NUM_GROUPS + group for who in among]
        return [who for who, i in zip(among, at, strict=True) if self._counts[i] < number], ()


def address_towards(host: str, port: int) -> str:
    """This machine's address on the way to `host`. Raises OSError when there is no way."""
    with socket.socket(_family(host), socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # sends nothing
        address: str = probe.getsockname()[0]
    return address


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
