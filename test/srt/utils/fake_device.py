"""A device that is the host in disguise: everything comes late, and order alone makes it right.

`LateRuntime` keeps "device" tensors in host memory, but a fetched value is only there when it is
waited for, moved tensors are copies, and it counts what crosses. Used to test what an asynchronous
device asks of those above; what only hardware can tell is not tested here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy.typing as npt
import torch

from sglang.srt.utils.device import HostCopy, pack_host_tensors, unpack
from sglang.srt.utils.host_memory import HostMemory

GIB = 1 << 30


class LateCopy:
    """Values that are read at the time of the copy but only shown to who waits."""

    def __init__(self, owner: LateRuntime, values: npt.NDArray[Any]) -> None:
        self._owner = owner
        self._values = values

    def wait(self) -> npt.NDArray[Any]:
        self._owner.num_waits += 1
        return self._values


class LateRuntime:
    """See the module."""

    is_async = True
    stream_handles = (7,)

    def __init__(self, *, total: int = 80 * GIB, free: int = 70 * GIB) -> None:
        self.device = torch.device("cpu")
        self.memory = HostMemory(total, free, "cudaMemGetInfo")
        self.num_moves = self.num_fetches = self.num_waits = self.num_syncs = 0
        self.depth = 0

    @contextmanager
    def computing(self) -> Iterator[None]:
        self.depth += 1
        yield
        self.depth -= 1

    def move(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        assert self.depth, "moved outside of the compute stream"
        self.num_moves += 1
        staging, places = pack_host_tensors(tensors, pin_memory=False)
        return unpack(staging, places)

    def fetch(self, tensor: torch.Tensor) -> HostCopy:
        assert self.depth, "fetched outside of the compute stream"
        self.num_fetches += 1
        return LateCopy(self, tensor.clone().numpy())

    def read_memory(self) -> HostMemory:
        return self.memory

    def synchronize(self) -> None:
        self.num_syncs += 1
