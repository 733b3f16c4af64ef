"""Ranks of one machine show each other small tensors in memory that all of them map.

Over sockets a step of a small model is mostly system calls: some sixty sums of a few kilobytes for
each token. Here a rank writes its tensor into its own place, says so with a number, and reads the
others' places once their numbers have come. Used by `GroupCommunicator` for the compute group; what
is large, or comes from another machine, goes over sockets.

Every rank has two places, used in turns. When it writes to one of them again, all others have
finished reading: they have since said that they wrote to the other place. Numbers are written
after what they stand for, which only processors that keep the order of stores (x86) show in this
order to others; elsewhere `is_served` is False.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import sys
import time

import torch

# Above this sockets are as fast (benchmark/ranks/bench_all_reduce.py).
PLACE_BYTES = 256 << 10

_LINE_BYTES = 64  # each number has a cache line of its own
_HEAD_BYTES = mmap.PAGESIZE
_PLACES = 2

# How a rank waits: it lets others run, and after so many times (a few milliseconds) it sleeps.
_YIELDS = 4000
_SLEEP_S = 2e-4


def is_served() -> bool:
    """Whether ranks of this machine can use it."""
    return sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")


class SharedExchange:
    """One rank's view of the memory in the file at `path`, which the first to come makes.

    All ranks call `exchange` equally often with tensors of one shape and type. `place_bytes` is the
    largest of them. The file is removed by who owns its directory.
    """

    def __init__(
        self, path: str, rank: int, size: int, timeout_s: float, place_bytes: int = PLACE_BYTES
    ) -> None:
        self.place_bytes = place_bytes
        self._rank = rank
        self._timeout_s = timeout_s
        self._others = [other for other in range(size) if other != rank]
        total = _HEAD_BYTES + size * _PLACES * place_bytes
        if size * _LINE_BYTES > _HEAD_BYTES:
            raise ValueError(f"{size} ranks are more than one page has numbers for")
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            os.ftruncate(descriptor, total)
            self._map = mmap.mmap(descriptor, total)
        finally:
            os.close(descriptor)
        self._numbers: memoryview = memoryview(self._map).cast("q")
        data = torch.frombuffer(self._map, dtype=torch.uint8, offset=_HEAD_BYTES)
        self._data = data.view(size, _PLACES, place_bytes)
        self._number = 0
        # Unlike Python's own, a call by ctypes lets other threads run.
        self._yield = ctypes.CDLL(None).sched_yield

    def exchange(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's tensor in the order of ranks, the own one itself.

        The others are windows that are good until the next call. Raises RuntimeError when a rank
        does not come in time.
        """
        self._number += 1
        place = self._number % _PLACES
        self._window(self._rank, place, tensor).copy_(tensor)
        self._numbers[self._rank * (_LINE_BYTES // 8)] = self._number
        self._wait()
        parts = [tensor] * (1 + len(self._others))
        for other in self._others:
            parts[other] = self._window(other, place, tensor)
        return parts

    def _window(self, rank: int, place: int, like: torch.Tensor) -> torch.Tensor:
        window = self._data[rank, place, : like.nbytes]
        return window.view(like.dtype).view(like.shape)

    def _wait(self) -> None:
        """Until all others have written what belongs to this number."""
        number, numbers = self._number, self._numbers
        turns, deadline = 0, 0.0
        for other in self._others:
            at = other * (_LINE_BYTES // 8)
            while numbers[at] < number:
                self._yield()
                turns += 1
                if turns < _YIELDS:
                    continue
                now = time.monotonic()
                deadline = deadline or now + self._timeout_s
                if now > deadline:
                    raise RuntimeError(f"rank {other} did not write within {self._timeout_s:g} s")
                time.sleep(_SLEEP_S)
