"""RMSNorm over all heads of a token together, whose width tensor parallelism cuts.

Source: arXiv 2501.00656 (OLMo 2), section 3.2; RMSNorm, arXiv 1910.07467.

Shape letters: T tokens, H heads of the model, D head dim.
"""

from __future__ import annotations

import torch

from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.weights import copy_checked


class WideHeadNorm(RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight, the mean over the H * D numbers of all heads.

    A rank has x and the weight of its heads only; it then learns the others' squares. With more
    ranks than heads neighbouring ranks hold the same head, as in `QKVParallelLinear`.
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
        self._width = num_heads * head_dim
        self._copies = max(1, parallel.tp_size // num_heads)  # ranks that hold a head
        self._first = parallel.tp_rank // self._copies * here

    def over_heads(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, this rank's heads * D] normalised, in the weight's type."""
        if self._parallel.tp_size == 1:
            alone: torch.Tensor = self(x)
            return alone
        wide = x.float()
        squares = self._parallel.all_reduce(wide.square().sum(-1, keepdim=True))
        mean = squares / (self._copies * self._width)
        normed = wide * torch.rsqrt(mean + self.eps) * self.weight.float()
        return normed.to(self.weight.dtype)

    def weight_loader(self, param_name: str, loaded: torch.Tensor) -> None:
        """Copy this rank's part of "weight" [H * D]; ValueError for a wrong name or shape."""
        if param_name != "weight":
            raise ValueError(f"WideHeadNorm has no parameter {param_name!r}")
        if tuple(loaded.shape) != (self._width,):
            raise ValueError(
                f"weight: the checkpoint has shape {tuple(loaded.shape)}, "
                f"the model needs {(self._width,)}"
            )
        here = self.weight.data
        copy_checked(here, loaded.narrow(0, self._first, len(here)), "weight")
