"""Decoders that are Llama's but for tables: SmolLM3, Granite, Seed-OSS, EXAONE 4, Arcee.

SmolLM3: some layers don't turn. Granite: embeddings, what is added to the residual stream, scores
and logits have factors. EXAONE 4: norms behind attention and MLP and on heads, windows, and global
layers that don't turn. Arcee: an MLP without a gate. Source: the published configurations and
documentation; arXiv 2507.11407; relu squared, arXiv 2109.08668.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.linear import ColumnParallelLinear, RowParallelLinear
from sglang.srt.models.arranged import POST_NORMS, ArrangedForCausalLM


class SmolLM3ForCausalLM(ArrangedForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""


class GraniteForCausalLM(ArrangedForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""


class SeedOssForCausalLM(ArrangedForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""


class Exaone4ForCausalLM(ArrangedForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""

    norm_places = POST_NORMS


class UngatedMLP(nn.Module):
    """down(relu(up(x))^2)."""

    def __init__(
        self, hidden: int, width: int, bias: bool, parallel: ParallelState, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.up_proj = ColumnParallelLinear(
            hidden, width, bias=bias, parallel=parallel, dtype=dtype
        )
        self.down_proj = RowParallelLinear(width, hidden, bias=bias, parallel=parallel, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.down_proj(F.relu(self.up_proj(x)).square())
        return output


class ArceeForCausalLM(ArrangedForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""

    def make_mlp(
        self, config: ModelConfig, layer_id: int, parallel: ParallelState, dtype: torch.dtype
    ) -> nn.Module:
        del layer_id  # here all are alike
        width, bias = config.intermediate_size, self.options.mlp_bias
        return UngatedMLP(config.hidden_size, width, bias, parallel, dtype)
