"""What ranks say to each other: `Communicator`, one group's collectives, as a protocol.

Every rank calls the same collectives of a group in the same order with tensors of the same shapes;
a call returns when the ranks that it needs have come. A communicator belongs to one thread: the
scheduler's and the worker's thread of a rank have a group each, because calls of two threads
would meet in any order. There is no global group: whoever talks was given a communicator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


class TensorCommunicator(Protocol):
    """One rank's end of a group that computes. Every method raises RankLostError when another rank
    is gone or does not come in time."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, the same bits on all of them; `tensor` may be overwritten."""

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """The ranks' tensors, of one shape, one after another along `dim`."""


class Communicator(TensorCommunicator, Protocol):
    """One rank's end of a group, with what schedulers say to each other."""

    def broadcast(self, data: bytes | None) -> memoryview:
        """Rank 0's `data` on every rank; the others pass None."""

    def agree(self, votes: Sequence[int]) -> Sequence[int]:
        """The element-wise minimum of all ranks' numbers (64 bits), equally many on each."""

    def among(self, members: Sequence[int]) -> TensorCommunicator:
        """Collectives of some ranks over the same connections, this one among `members`.

        All ranks divide themselves into such parts, in the same way, and each part makes the same
        calls. Ranks of a part are numbered in the order of `members`.
        """


@dataclass(frozen=True)
class RankLinks:
    """One rank's two groups: `control` for the scheduler's thread, `compute` for the worker's."""

    control: Communicator
    compute: Communicator

    @property
    def rank(self) -> int:
        return self.control.rank

    @property
    def size(self) -> int:
        return self.control.size
