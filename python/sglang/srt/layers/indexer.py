"""`Indexer`: what a layer of sparse attention keeps of tokens to choose them by, and what it asks.

A token's index key is one row for all index heads. Every tensor-parallel rank has all of the
indexer and computes it of the same hidden rows, so that all choose the same tokens. The sparse
attention backend scores and chooses (docs/kv_segments.md, Note [Sparse attention]).

In published form queries and keys are multiplied by a Hadamard matrix before they are rounded to
fp8. It is orthogonal, so that products are what they were; nothing is multiplied here. Weights are
not scaled by the number of heads and their width either, which changes no order.

Legend: T tokens, R rows whose queries are wanted, I index heads, X numbers of an index key, P those
that turn, which are the first. Source: DeepSeek-V3.2-Exp's report, section 2.1.
"""

from __future__ import annotations

import torch
from torch import nn

from sglang.srt.configs.model_traits import IndexConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.attention.token_choice import IndexQuery
from sglang.srt.layers.layernorm import LayerNorm
from sglang.srt.layers.linear import ColumnParallelLinear
from sglang.srt.layers.rotary_embedding import RotaryEmbedding

_WHOLE = ParallelState()
_NORM_EPS = 1e-6


class Indexer(nn.Module):
    """The indexer of one layer; `rotary_emb` turns P numbers a head."""

    def __init__(
        self,
        hidden_size: int,
        q_rank: int,
        index: IndexConfig,
        rotary_emb: RotaryEmbedding,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.index, self.rotary_emb = index, rotary_emb
        heads, width = index.num_heads, index.head_dim
        self.wq_b = ColumnParallelLinear(q_rank, heads * width, parallel=_WHOLE, dtype=dtype)
        self.wk = ColumnParallelLinear(hidden_size, width, parallel=_WHOLE, dtype=dtype)
        self.k_norm = LayerNorm(width, _NORM_EPS, dtype=dtype)
        # In float32 as published: 16 bits of a weight would change which tokens are chosen.
        self.weights_proj = ColumnParallelLinear(
            hidden_size, heads, parallel=_WHOLE, dtype=torch.float32
        )

    def keys(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Index keys of tokens x [T, hidden] at int64 `positions` [T]: [T, X]."""
        return self._turn(positions, self.k_norm(self.wk(x)).unsqueeze(1)).squeeze(1)

    def query(
        self, q_latents: torch.Tensor, x: torch.Tensor, positions: torch.Tensor
    ) -> IndexQuery:
        """What rows x [R, hidden] at int64 `positions` [R] ask.

        `q_latents` [R, rank] are those that the layer's queries are made of too.
        """
        heads = self.wq_b(q_latents).view(len(x), self.index.num_heads, self.index.head_dim)
        weights: torch.Tensor = self.weights_proj(x.float())
        return IndexQuery(self._turn(positions, heads), weights)

    def _turn(self, positions: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        """Heads [T, *, X] with their first P numbers turned."""
        width = self.rotary_emb.head_dim
        turning, still = torch.split(heads, [width, heads.shape[-1] - width], -1)
        turned = self.rotary_emb.rotate(positions, turning.flatten(1)).view(turning.shape)
        return torch.cat((turned, still), -1)
