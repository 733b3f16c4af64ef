"""Qwen3-MoE: Qwen3's decoder with experts in place of most MLPs.

Source: arXiv 2505.09388.
"""

from __future__ import annotations

import torch
from torch import nn

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.model_traits import MoEConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.expert_weights import ExpertLayout
from sglang.srt.layers.moe import Experts, Router, route_by_softmax
from sglang.srt.models.llama import LlamaMLP
from sglang.srt.models.qwen3 import Qwen3ForCausalLM


class Qwen3MoeBlock(nn.Module):
    """Every token through its experts, weighted by the router's softmax."""

    def __init__(
        self, config: ModelConfig, moe: MoEConfig, parallel: ParallelState, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.num_chosen, self.renormalize = moe.experts_per_token, moe.renormalize
        self.gate = Router(config.hidden_size, moe.num_experts, dtype=dtype)
        self.experts = Experts(
            moe.num_experts,
            config.hidden_size,
            moe.intermediate_size,
            layout=ExpertLayout.STACKED if config.stacks_experts else ExpertLayout.SEPARATE,
            parallel=parallel,
            dtype=dtype,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        routing = route_by_softmax(self.gate(x), self.num_chosen, renormalize=self.renormalize)
        output: torch.Tensor = self.experts(x, routing)
        return output


class Qwen3MoeForCausalLM(Qwen3ForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""

    def make_mlp(
        self, config: ModelConfig, layer_id: int, parallel: ParallelState, dtype: torch.dtype
    ) -> nn.Module:
        if config.moe is not None and layer_id in config.moe.layers:
            return Qwen3MoeBlock(config, config.moe, parallel, dtype)
        return LlamaMLP(config.hidden_size, config.intermediate_size, False, parallel, dtype)
