"""Hunyuan-A13B: heads are normalised after they turned; experts, and a shared one for every token.

Source: the published configuration and documentation of Hunyuan-A13B.
"""

from __future__ import annotations

import torch

from sglang.srt.models.llama import LlamaAttention
from sglang.srt.models.mixture import MixtureForCausalLM


class HunYuanAttention(LlamaAttention):
    """Llama's, with norms of heads behind the rotation."""

    rotates_last = False

    def place_queries(self, q: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        assert self.rotary_emb is not None  # all layers turn
        return self._norm_heads(self.rotary_emb.rotate(positions, q), self.q_norm)

    def place_keys(self, k: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        assert self.rotary_emb is not None
        return self._norm_heads(self.rotary_emb.rotate(positions, k), self.k_norm)


class HunYuanMoEV1ForCausalLM(MixtureForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""

    attention_class = HunYuanAttention
