"""`ParallelState`: which part of a tensor-parallel model this process computes, and with whom.

Passed to the constructors of parallel layers; there is no global group. Without a communicator a
part of a larger group can be built, loaded and counted, but not computed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from sglang.srt.distributed.communicator import TensorCommunicator
from sglang.srt.errors import InvariantError


@dataclass(frozen=True)
class ParallelState:
    """Rank `tp_rank` of `tp_size` tensor-parallel ranks, `group` their compute group.

    Raises ValueError when the rank does not belong to the group.
    """

    tp_rank: int = 0
    tp_size: int = 1
    group: TensorCommunicator | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.tp_size < 1 or not 0 <= self.tp_rank < self.tp_size:
            raise ValueError(f"tp_rank {self.tp_rank} does not belong to tp_size {self.tp_size}")
        if self.group is not None and (self.group.rank, self.group.size) != (
            self.tp_rank,
            self.tp_size,
        ):
            raise ValueError(f"{self.group} is not the group of {self.tp_rank} of {self.tp_size}")

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over the ranks, with the same bits on each; it may be overwritten.

        The tensor itself at size 1. Raises InvariantError without a group.
        """
        return tensor if self.tp_size == 1 else self._require_group().all_reduce(tensor)

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Concatenate the ranks' tensors along `dim`; the tensor itself at size 1.

        Raises InvariantError without a group.
        """
        return tensor if self.tp_size == 1 else self._require_group().all_gather(tensor, dim)

    def shard_size(self, total: int, what: str) -> int:
        """This rank's share of `total` units; ValueError naming `what` when it does not divide."""
        if total % self.tp_size:
            raise ValueError(f"{what} ({total}) cannot be divided by tp_size {self.tp_size}")
        return total // self.tp_size

    def _require_group(self) -> TensorCommunicator:
        if self.group is None:
            raise InvariantError(f"rank {self.tp_rank} of {self.tp_size} was given no communicator")
        return self.group
