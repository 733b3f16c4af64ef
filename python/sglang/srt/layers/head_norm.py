"""Norms of all heads of a token, with weights that tensor parallelism cuts by heads.

Sources: RMSNorm, arXiv 1910.07467, over all heads together, arXiv 2501.00656 (OLMo 2, 3.2); layer
norm, arXiv 1607.06450, of heads, arXiv 2302.05442.

Shape letters: T tokens, H heads of the model, D head dim.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F

from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.weights import copy_checked


class HeadsNorm(RMSNorm):
    """A norm whose weight has a number for every number of every head.

    `weight` is that of this rank's heads, [their number * D]. With more ranks than heads
    neighbouring ranks hold the same head, as in `QKVParallelLinear`.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        eps: float,
        parallel: ParallelState,
        dtype: torch.dtype,
    ) -> None:
        here = max(1, num_heads // parallel.tp_size) * head_dim
        super().__init__(here, eps, dtype=dtype)
        self._parallel = parallel
        self._shape: tuple[int, ...] = (num_heads * head_dim,)  # in checkpoints
        self._copies = max(1, parallel.tp_size // num_heads)  # ranks that hold a head
        self._first = parallel.tp_rank // self._copies * here

    @abstractmethod
    def over_heads(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, this rank's heads * D] normalised, in the weight's type."""

    def weight_loader(self, param_name: str, loaded: torch.Tensor) -> None:
        """Copy this rank's part of "weight"; ValueError for a wrong name or shape."""
        if param_name != "weight":
            raise ValueError(f"{type(self).__name__} has no parameter {param_name!r}")
        if tuple(loaded.shape) != self._shape:
            raise ValueError(
                f"weight: the checkpoint has shape {tuple(loaded.shape)}, "
                f"the model needs {self._shape}"
            )
        here = self.weight.data
        copy_checked(here, loaded.flatten().narrow(0, self._first, len(here)), "weight")


class WideHeadNorm(HeadsNorm):
    """x / sqrt(mean(x^2) + eps) * weight, the mean over the numbers of all heads together.

    A rank has x of its heads only; it then learns the others' squares.
    """

    def over_heads(self, x: torch.Tensor) -> torch.Tensor:
        """See `HeadsNorm.over_heads`."""
        if self._parallel.tp_size == 1:
            alone: torch.Tensor = self(x)
            return alone
        wide = x.float()
        squares = self._parallel.all_reduce(wide.square().sum(-1, keepdim=True))
        mean = squares / (self._copies * self._shape[0])
        normed = wide * torch.rsqrt(mean + self.eps) * self.weight.float()
        return normed.to(self.weight.dtype)


class OwnHeadNorm(HeadsNorm):
    """A layer norm of every head, each with a weight of its own: [H, D] in checkpoints."""

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        eps: float,
        parallel: ParallelState,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(num_heads, head_dim, eps, parallel, dtype)
        self._shape = (num_heads, head_dim)

    def over_heads(self, x: torch.Tensor) -> torch.Tensor:
        """See `HeadsNorm.over_heads`."""
        dim = self._shape[1]
        heads = x.float().view(len(x), x.shape[1] // dim, dim)
        normed = F.layer_norm(heads, (dim,), None, None, self.eps).flatten(1)
        return (normed * self.weight.float()).to(self.weight.dtype)
