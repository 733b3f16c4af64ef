"""Ranks as threads of one process: communicators that meet at barriers. For tests only.

A rank that ends by an error breaks every barrier, so that the others end too instead of waiting.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from sglang.srt.distributed.communicator import RankLinks
from sglang.srt.errors import RankLostError

WAIT_S = 60.0

T = TypeVar("T")


class ThreadGroup:
    """What the ranks of one group share: a place for each and a barrier."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.calls: list[list[str]] = [[] for _ in range(size)]  # what each rank called, in order
        self._places: list[Any] = [None] * size
        self._barrier = threading.Barrier(size, timeout=WAIT_S)

    def exchange(self, rank: int, what: str, value: Any) -> list[Any]:
        """Everybody's value; all must have called the same."""
        self.calls[rank].append(what)
        self._places[rank] = (what, value)
        self._meet()
        places = list(self._places)
        self._meet()
        assert len({name for name, _ in places}) == 1, f"ranks call different things: {places}"
        return [value for _, value in places]

    def leave(self) -> None:
        self._barrier.abort()

    def _meet(self) -> None:
        try:
            self._barrier.wait()
        except threading.BrokenBarrierError as error:
            raise RankLostError("another rank has left or does not come") from error


class ThreadCommunicator:
    """One rank's end of a `ThreadGroup`; sums in the order of ranks, so all get the same bits."""

    def __init__(self, group: ThreadGroup, rank: int) -> None:
        self.group = group
        self.rank = rank
        self.size = group.size

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        parts = self.group.exchange(self.rank, f"all_reduce {tuple(tensor.shape)}", tensor.clone())
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        tensor.copy_(total)  # the argument is the communicator's to overwrite
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        what = f"all_gather {tuple(tensor.shape)} {dim}"
        return torch.cat(self.group.exchange(self.rank, what, tensor.clone()), dim)

    def among(self, members: Sequence[int]) -> ThreadMembers:
        return ThreadMembers(self, members)

    def broadcast(self, data: bytes | None) -> memoryview:
        assert (data is not None) == (self.rank == 0)
        first = self.group.exchange(self.rank, "broadcast", data)[0]
        return memoryview(bytearray(first))  # memory of its own, as over a wire

    def agree(self, votes: Sequence[int]) -> list[int]:
        everyones = self.group.exchange(self.rank, f"agree on {len(votes)}", list(votes))
        return [min(column) for column in zip(*everyones, strict=True)]


class ThreadMembers:
    """Some ranks of a group: all its ranks meet, each takes what its own members said."""

    def __init__(self, whole: ThreadCommunicator, members: Sequence[int]) -> None:
        self._whole = whole
        self._members = tuple(members)
        self.rank = self._members.index(whole.rank)
        self.size = len(self._members)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        parts = self._exchange(f"all_reduce {tuple(tensor.shape)} of {self.size}", tensor)
        return torch.stack(parts).sum(0)

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        what = f"all_gather {tuple(tensor.shape)} {dim} of {self.size}"
        return torch.cat(self._exchange(what, tensor), dim)

    def _exchange(self, what: str, tensor: torch.Tensor) -> list[torch.Tensor]:
        everyones = self._whole.group.exchange(self._whole.rank, what, tensor.clone())
        return [everyones[member] for member in self._members]


class ThreadRanks:
    """`size` ranks with a thread and two groups each."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.control, self.compute = ThreadGroup(size), ThreadGroup(size)
        self._threads = [ThreadPoolExecutor(1) for _ in range(size)]

    def links(self, rank: int) -> RankLinks:
        return RankLinks(
            ThreadCommunicator(self.control, rank), ThreadCommunicator(self.compute, rank)
        )

    def run(self, act: Callable[[int], T]) -> list[T]:
        """`act(rank)` on every rank's thread at once; the first cause of an error is raised."""
        runs = [
            thread.submit(self._or_leave, act, rank) for rank, thread in enumerate(self._threads)
        ]
        errors = [error for run in runs if (error := run.exception()) is not None]
        # Who only waited for a rank that has left has nothing to say.
        errors.sort(key=lambda error: isinstance(error.__cause__, threading.BrokenBarrierError))
        if errors:
            raise errors[0]
        return [run.result() for run in runs]

    def close(self) -> None:
        for thread in self._threads:
            thread.shutdown()

    def _or_leave(self, act: Callable[[int], T], rank: int) -> T:
        try:
            return act(rank)
        except BaseException:
            self.control.leave()
            self.compute.leave()
            raise
