"""`LatentUpProjection`: the weight between latents and heads, taken to the queries' side.

Latent attention's keys and values are products of a kept latent with one weight. Here that weight
multiplies queries and results instead, so that attention reads the latents as they are kept and no
head's key or value is ever made. See docs/kv_segments.md, Note [Latent attention].

Tensor parallel: heads are split as in layers/linear.py, latents are whole on every rank.

Legend: T tokens, H query heads of this rank, N head width without rotation, V value width, C
latent width. Source: arXiv 2405.04434, section 2.1.2 and appendix C.
"""

from __future__ import annotations

import torch
from torch import nn

from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.products import cpu_multiplies
from sglang.srt.layers.weights import copy_checked, frozen_parameter


class LatentUpProjection(nn.Module):
    """`weight` [H * (N + V), C]: what makes keys of a latent, head by head, then what makes values.

    In checkpoints the two take turns, head by head. Apart each is one block of memory, which
    PyTorch multiplies with in place: a single query's products of 16 heads took 70 us so, and
    876 us with what makes values taken out of turns. Raises ValueError when the heads can't be
    divided over the ranks.
    """

    def __init__(
        self,
        num_heads: int,
        nope_dim: int,
        v_dim: int,
        latent_dim: int,
        *,
        parallel: ParallelState,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.num_heads = parallel.shard_size(num_heads, "attention heads")
        self.nope_dim, self.v_dim = nope_dim, v_dim
        self._first_head = parallel.tp_rank * self.num_heads
        self._whole_rows = num_heads * (nope_dim + v_dim)
        self._key_rows = self.num_heads * nope_dim
        rows = self.num_heads * (nope_dim + v_dim)
        self.weight = frozen_parameter(rows, latent_dim, dtype=dtype)

    def queries(self, q: torch.Tensor) -> torch.Tensor:
        """q [T, H, N] as queries of latents, [T, H, C]: q times the keys' part."""
        heads = self.weight[: self._key_rows].view(self.num_heads, self.nope_dim, -1)
        return _products(q.transpose(0, 1), heads).transpose(0, 1)

    def values(self, attended: torch.Tensor) -> torch.Tensor:
        """Averages of latents [T, H, C] as heads, [T, H * V]: times the values' part."""
        heads = self.weight[self._key_rows :].view(self.num_heads, self.v_dim, -1)
        mixed = _products(attended.transpose(0, 1), heads.transpose(1, 2))
        return mixed.transpose(0, 1).flatten(1)

    def weight_loader(self, param_name: str, loaded: torch.Tensor) -> None:
        """Copy this rank's heads of the whole "weight"; ValueError for a wrong name or shape."""
        if param_name != "weight":
            raise ValueError(f"LatentUpProjection has no parameter {param_name!r}")
        if loaded.shape[0] != self._whole_rows:
            raise ValueError(
                f"weight: the checkpoint has {loaded.shape[0]} rows, the model needs "
                f"{self._whole_rows}"
            )
        rows = self.nope_dim + self.v_dim
        own = loaded.narrow(0, self._first_head * rows, len(self.weight))
        heads = own.view(self.num_heads, rows, -1)
        parts = torch.split(heads, [self.nope_dim, self.v_dim], 1)
        places = torch.split(self.weight.data, [self._key_rows, self.num_heads * self.v_dim])
        for place, part in zip(places, parts, strict=True):
            copy_checked(place, part.flatten(0, 1), "weight")


def _products(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [H, T, A] times weight [H, A, B], head by head: [H, T, B] in the type of x."""
    if x.device.type == "cpu" and not cpu_multiplies(x.dtype):
        # Of a type without instructions PyTorch makes such products element by element.
        return torch.bmm(x.float(), weight.float()).to(x.dtype)
    return torch.bmm(x, weight)
