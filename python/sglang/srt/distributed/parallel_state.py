"""`ParallelState`: which part of a tensor-parallel model this process computes.

Passed to the constructors of parallel layers; there is no global group. Size 1 is the only size
with a communicator today: collectives of a larger group are refused, sharding is not, so that
shards can be loaded and tested before the communicator exists.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ParallelState:
    """Rank `tp_rank` of `tp_size` tensor-parallel ranks.

    Raises ValueError when the rank does not belong to the group.
    """

    tp_rank: int = 0
    tp_size: int = 1

    def __post_init__(self) -> None:
        if self.tp_size < 1 or not 0 <= self.tp_rank < self.tp_size:
            raise ValueError(f"tp_rank {self.tp_rank} does not belong to tp_size {self.tp_size}")

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over the ranks; the tensor itself at size 1.

        Raises NotImplementedError at a larger size.
        """
        self._require_single("all_reduce")
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Concatenate the ranks' tensors along `dim`; the tensor itself at size 1.

        Raises NotImplementedError at a larger size.
        """
        del dim  # only a larger group concatenates
        self._require_single("all_gather")
        return tensor

    def shard_size(self, total: int, what: str) -> int:
        """This rank's share of `total` units; ValueError naming `what` when it does not divide."""
        if total % self.tp_size:
            raise ValueError(f"{what} ({total}) cannot be divided by tp_size {self.tp_size}")
        return total // self.tp_size

    def _require_single(self, operation: str) -> None:
        if self.tp_size != 1:
            raise NotImplementedError(
                f"{operation} over {self.tp_size} ranks: this build has no communicator, "
                "run with --tp-size 1"
            )
