"""`Communicator` over a process group of torch.distributed, and how schedulers connect.

The group is an object that was passed in: nothing is registered with torch.distributed, so
there is no default group to pick by mistake. The device decides what the compute group is made
of: gloo on a CPU, NCCL on CUDA, which has the same methods and has not been run on hardware yet.
Control and start talk of host memory, over gloo everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from sglang.srt.distributed.communicator import Communicator, RankLinks
from sglang.srt.distributed.shared_exchange import SharedExchange, is_served
from sglang.srt.distributed.store_board import LOOK_TIMEOUT_S, StoreBoard
from sglang.srt.errors import RankLostError
from sglang.srt.utils.rendezvous import (
    RankBoard,
    RankPlace,
    Rendezvous,
    address_towards,
)

_dist: Any = dist  # its type stubs lack half of what is used here

# Bytes of a broadcast's first frame, its length included: a usual message is one frame.
FRAME_BYTES = 4096
_LENGTH_BYTES = 8

# Over loopback sockets latency counts: below this a direct exchange was 2 to 4 times as fast as
# gloo's rings (2 and 3 ranks, 256 bytes to 512 KiB).
GLOO_DIRECT_BYTES = 1 << 20

CONTROL, COMPUTE, START = 0, 1, 2
_GROUP_NAMES = ("control", "compute", "start")


class Roll(Protocol):
    """Where a collective is announced, so that a missing rank can be named; see `RankBoard`."""

    def begin(self, who: int, group: int) -> int: ...

    def missing(
        self, group: int, number: int, among: Sequence[int]
    ) -> tuple[Sequence[int], Sequence[int]]: ...


@dataclass(frozen=True)
class Connections:
    """Whom a scheduler talks to.

    `links` are the ranks of its own replica, None when it is the only one. `everyone` are all
    schedulers of the server; they talk at start only.
    """

    links: RankLinks | None
    everyone: Communicator


class GroupCommunicator:
    """The collectives of one process group, `group` (CONTROL, COMPUTE or START) on the `roll`.

    `first` is the number of its rank 0 on the roll. `timeout_s` is the group's own, told in
    errors. Where a rank would send no more than `direct_bytes`, ranks send each other their
    tensors and each adds up for itself. `shared` is memory that all ranks map, for what fits in its
    places; None: there is none.
    """

    def __init__(
        self,
        process_group: Any,
        roll: Roll,
        group: int,
        timeout_s: float,
        direct_bytes: int,
        first: int = 0,
        shared: SharedExchange | None = None,
    ) -> None:
        self._group = process_group
        self._direct_bytes = direct_bytes
        self._shared = shared
        self._roll = roll
        self._number = group
        self._timeout_s = timeout_s
        self._first = first
        self.rank: int = process_group.rank()
        self.size: int = process_group.size()
        self._minimum = _dist.AllreduceOptions()
        self._minimum.reduceOp = _dist.ReduceOp.MIN
        self._from_first = _dist.BroadcastOptions()
        self._from_first.rootRank = 0
        self._from_first.rootTensor = 0

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Communicator`; may be in place."""
        tensor = tensor.contiguous()
        if not tensor.numel():
            return tensor
        with self._announced("all_reduce"):
            if self._is_direct(tensor):
                return _sum_in_order(self._exchange(tensor))
            self._group.allreduce([tensor]).wait()
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """See `Communicator`."""
        tensor = tensor.contiguous()
        if not tensor.numel():
            return torch.cat([tensor] * self.size, dim)
        with self._announced("all_gather"):
            if self._is_direct(tensor):
                return torch.cat(self._exchange(tensor), dim)
            parts = [torch.empty_like(tensor) for _ in range(self.size)]
            self._group.allgather([parts], [tensor]).wait()
        return torch.cat(parts, dim)

    def broadcast(self, data: bytes | None) -> memoryview:
        """See `Communicator`; one frame, and a second one for what does not fit in it."""
        frame = torch.zeros(FRAME_BYTES, dtype=torch.uint8)
        head = frame.numpy().data
        room = FRAME_BYTES - _LENGTH_BYTES
        if self.rank == 0:
            if data is None:
                raise ValueError("rank 0 broadcasts something")
            head[:_LENGTH_BYTES] = len(data).to_bytes(_LENGTH_BYTES, "little")
            head[_LENGTH_BYTES : _LENGTH_BYTES + min(room, len(data))] = data[:room]
        self._send_from_first(frame)
        length = int.from_bytes(head[:_LENGTH_BYTES], "little")
        if length <= room:
            return memoryview(data) if data is not None else head[_LENGTH_BYTES:][:length]
        whole = torch.empty(length, dtype=torch.uint8)
        view = whole.numpy().data
        if data is not None:
            view[:] = data
        else:
            view[:room] = head[_LENGTH_BYTES:]
        self._send_from_first(whole[room:])
        return view

    def agree(self, votes: Sequence[int]) -> Sequence[int]:
        """See `Communicator`."""
        numbers = torch.tensor(votes, dtype=torch.int64)
        if len(votes):
            with self._announced("agreement"):
                self._group.allreduce([numbers], self._minimum).wait()
        agreed: list[int] = numbers.tolist()
        return agreed

    def among(self, members: Sequence[int]) -> MemberCommunicator:
        """See `Communicator`."""
        return MemberCommunicator(self, members)

    def exchange(
        self, what: str, tensor: torch.Tensor, members: Sequence[int]
    ) -> list[torch.Tensor]:
        """The tensors of `members` in their order, sent straight from each to each."""
        with self._announced(what):
            return self._exchange(tensor.contiguous(), members)

    def _is_direct(self, tensor: torch.Tensor) -> bool:
        return self._fits(tensor) or tensor.nbytes * (self.size - 1) <= self._direct_bytes

    def _fits(self, tensor: torch.Tensor) -> bool:
        return self._shared is not None and tensor.nbytes <= self._shared.place_bytes

    def _exchange(
        self, tensor: torch.Tensor, members: Sequence[int] | None = None
    ) -> list[torch.Tensor]:
        """Every rank's tensor, each sent straight to all others: one hop instead of a ring's."""
        ranks = range(self.size) if members is None else members
        if self._shared is not None and self._fits(tensor) and list(ranks) == [*range(self.size)]:
            return self._shared.exchange(tensor)
        others = [rank for rank in ranks if rank != self.rank]
        parts = {rank: torch.empty_like(tensor) for rank in others}
        works = [self._group.recv([parts[rank]], rank, 0) for rank in others]
        works += [self._group.send([tensor], rank, 0) for rank in others]
        for work in works:
            work.wait()
        return [parts.get(rank, tensor) for rank in ranks]

    def _send_from_first(self, tensor: torch.Tensor) -> None:
        with self._announced("broadcast"):
            self._group.broadcast([tensor], self._from_first).wait()

    @contextmanager
    def _announced(self, what: str) -> Iterator[None]:
        """Note the collective on the roll; say who is missing when it fails."""
        number = self._roll.begin(self._first + self.rank, self._number)
        try:
            yield
        except RuntimeError as error:
            among = range(self._first, self._first + self.size)
            behind, silent = self._roll.missing(self._number, number, among)
            named = [f"rank {one - self._first}" for one in behind or silent]
            who = ", ".join(named) or "another rank"
            missing = "has not come to" if behind else "was lost during"
            raise RankLostError(
                f"{who} {missing} {what} {number} of the {_GROUP_NAMES[self._number]} group, "
                f"in which rank {self.rank} waits (--dist-timeout is {self._timeout_s:g} s): "
                f"{str(error).splitlines()[0]}"
            ) from error


class MemberCommunicator:
    """Collectives of some ranks of a group: always direct, over the connections that it has.

    A ring would send less of a large sum from four members on; it would take groups of its own.
    """

    def __init__(self, whole: GroupCommunicator, members: Sequence[int]) -> None:
        self._whole = whole
        self._members = tuple(members)
        self.rank = self._members.index(whole.rank)
        self.size = len(self._members)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Communicator`."""
        if not tensor.numel():
            return tensor
        return _sum_in_order(self._whole.exchange("all_reduce", tensor, self._members))

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """See `Communicator`."""
        if not tensor.numel():
            return torch.cat([tensor] * self.size, dim)
        return torch.cat(self._whole.exchange("all_gather", tensor, self._members), dim)


def _sum_in_order(parts: list[torch.Tensor]) -> torch.Tensor:
    """The sum in the order of ranks, the same bits on all; 16-bit numbers are rounded once."""
    dtype = parts[0].dtype
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    total = parts[0].to(wide, copy=True)
    for part in parts[1:]:
        total += part
    return total.to(dtype)


def connect_ranks(
    rendezvous: Rendezvous,
    place: RankPlace,
    timeout_s: float,
    *,
    device: str = "cpu",
    shared_memory: bool = True,
) -> Connections:
    """Connect the scheduler at `place` with the others; blocks until every one has come.

    `device` is where tensors of the compute group are; of "cuda" the one that is current counts.
    `shared_memory`: ranks of one machine show each other small tensors there. Raises RankLostError
    when one does not come within `timeout_s` seconds.
    """
    timeout = timedelta(seconds=timeout_s)
    listener = rendezvous.listener
    try:
        store = _dist.TCPStore(
            rendezvous.host,
            rendezvous.port,
            place.num_all,
            is_master=listener is not None,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=None if listener is None else listener.detach(),
        )
        store = _dist.PrefixStore(f"sglang/{rendezvous.attempt}", store)
        roll = _make_roll(rendezvous, place)
        make = _gloo_maker(store, rendezvous, timeout)
        replica = f"replica {place.dp_rank} "

        def group(number: int) -> GroupCommunicator:
            if number == START:
                made = make(_GROUP_NAMES[number], place.number, place.num_all)
                return GroupCommunicator(made, roll, number, timeout_s, GLOO_DIRECT_BYTES)
            name = replica + _GROUP_NAMES[number]
            if number == COMPUTE and compute_backend(device) == "nccl":
                made = _nccl_group(_dist.PrefixStore(name, store), place, timeout)
                return GroupCommunicator(made, roll, number, timeout_s, 0, place.first)
            made = make(name, place.tp_rank, place.tp_size)
            shared = None
            if number == COMPUTE and shared_memory:
                shared = _shared_exchange(rendezvous, place, timeout_s)
            return GroupCommunicator(
                made, roll, number, timeout_s, GLOO_DIRECT_BYTES, place.first, shared
            )

        links = RankLinks(group(CONTROL), group(COMPUTE)) if place.tp_size > 1 else None
        return Connections(links, group(START))
    except (RuntimeError, OSError) as error:
        text = str(error).splitlines()[0]
        raise RankLostError(
            f"rank {place.number} found not all of {place.num_all} ranks: {text}"
        ) from error


def compute_backend(device: str) -> str:
    """What carries tensors of a device: "gloo" or "nccl". ValueError for a device without any."""
    backends = {"cpu": "gloo", "cuda": "nccl"}
    kind = device.partition(":")[0]
    if kind not in backends:
        raise ValueError(f"ranks have no way to exchange tensors of --device {device}")
    return backends[kind]


def _nccl_group(store: Any, place: RankPlace, timeout: timedelta) -> Any:
    """Unverified: written from torch's documentation, never run on a GPU."""
    options = _dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return _dist.ProcessGroupNCCL(store, place.tp_rank, place.tp_size, options)


def _shared_exchange(
    rendezvous: Rendezvous, place: RankPlace, timeout_s: float
) -> SharedExchange | None:
    """None where ranks don't share a machine, or it can't be done on this one."""
    if rendezvous.board_path is None or not is_served():
        return None
    path = f"{rendezvous.board_path}-{place.dp_rank}"
    return SharedExchange(path, place.tp_rank, place.tp_size, timeout_s)


def _make_roll(rendezvous: Rendezvous, place: RankPlace) -> Roll:
    if rendezvous.board_path is not None:
        return RankBoard(rendezvous.board_path, place.num_all)

    def connect() -> Any:
        """A client of its own: the thread that posts and who looks must not wait for each other."""
        soon = timedelta(seconds=LOOK_TIMEOUT_S)
        client = _dist.TCPStore(
            rendezvous.host, rendezvous.port, is_master=False, timeout=soon, wait_for_workers=False
        )
        return _dist.PrefixStore(f"sglang/{rendezvous.attempt}", client)

    return StoreBoard(connect, place.number, server=0 if rendezvous.has_own_store else None)


def _gloo_maker(
    store: Any, rendezvous: Rendezvous, timeout: timedelta
) -> Callable[[str, int, int], Any]:
    """Makes a group of `size` by its name. Raises OSError when the others' host is unreachable."""
    if rendezvous.interface is None:
        where = {"hostname": address_towards(rendezvous.host, rendezvous.port)}
    else:
        where = {"interface": rendezvous.interface}

    def make(name: str, rank: int, size: int) -> Any:
        options = _dist.ProcessGroupGloo._Options()
        options._devices = [_dist.ProcessGroupGloo.create_device(**where)]
        options._timeout = timeout
        return _dist.ProcessGroupGloo(_dist.PrefixStore(name, store), rank, size, options)

    return make
