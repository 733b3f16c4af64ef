"""gpt-oss: sliding and full layers in turn, attention sinks, experts with biases.

The decoder is Llama's. Source: arXiv 2508.10925 and the published configurations; sinks,
arXiv 2309.17453.
"""

from __future__ import annotations

import torch
from torch import nn

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.model_traits import MoEConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.errors import InvariantError
from sglang.srt.layers.activation import ClampedGate
from sglang.srt.layers.expert_weights import ExpertLayout
from sglang.srt.layers.moe import Experts, Router, route_by_softmax
from sglang.srt.layers.rotary_embedding import RotaryEmbedding
from sglang.srt.layers.weights import copy_checked, frozen_parameter
from sglang.srt.models.llama import (
    DecoderOptions,
    LlamaAttention,
    LlamaForCausalLM,
)


class GptOssAttention(LlamaAttention):
    """Llama's, with a learned sink for every query head, `sinks` [H of this rank]."""

    def __init__(
        self,
        config: ModelConfig,
        options: DecoderOptions,
        layer_id: int,
        rotary_emb: RotaryEmbedding,
        parallel: ParallelState,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(config, options, layer_id, rotary_emb, parallel, dtype)
        self._num_heads = config.num_heads
        self._first_head = parallel.tp_rank * self.qkv_proj.num_heads
        # Checkpoints name it here; the layer below computes with it.
        self.sinks = frozen_parameter(self.qkv_proj.num_heads, dtype=dtype)
        self.attn.sinks = self.sinks

    def weight_loader(self, param_name: str, loaded: torch.Tensor) -> None:
        """Copy this rank's part of "sinks" [H]; ValueError for a wrong name or shape."""
        if param_name != "sinks":
            raise ValueError(f"GptOssAttention has no parameter {param_name!r}")
        if tuple(loaded.shape) != (self._num_heads,):
            raise ValueError(
                f"sinks: the checkpoint has shape {tuple(loaded.shape)}, "
                f"the model needs {(self._num_heads,)}"
            )
        here = self.sinks.data
        copy_checked(here, loaded.narrow(0, self._first_head, len(here)), "sinks")


class GptOssMoE(nn.Module):
    """Every token through its experts, weighted by the softmax over their scores alone."""

    def __init__(
        self, config: ModelConfig, moe: MoEConfig, parallel: ParallelState, dtype: torch.dtype
    ) -> None:
        super().__init__()
        gate = moe.clamped_gate
        self.num_chosen = moe.experts_per_token
        self.router = Router(config.hidden_size, moe.num_experts, bias=True, dtype=dtype)
        self.experts = Experts(
            moe.num_experts,
            config.hidden_size,
            moe.intermediate_size,
            layout=ExpertLayout.STACKED if config.stacks_experts else ExpertLayout.INTERLEAVED,
            activation=None if gate is None else ClampedGate(gate.alpha, gate.limit),
            bias=True,
            parallel=parallel,
            dtype=dtype,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        routing = route_by_softmax(self.router(x), self.num_chosen, renormalize=True)
        output: torch.Tensor = self.experts(x, routing)
        return output


class GptOssForCausalLM(LlamaForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""

    attention_class = GptOssAttention

    def __init__(self, config: ModelConfig, parallel: ParallelState, dtype: torch.dtype) -> None:
        options = DecoderOptions(
            qkv_bias=config.attention_bias,
            output_bias=config.attention_output_bias,
            windows=config.layer_windows,
        )
        super().__init__(config, parallel, dtype, options)

    def make_mlp(
        self, config: ModelConfig, layer_id: int, parallel: ParallelState, dtype: torch.dtype
    ) -> nn.Module:
        if config.moe is None or layer_id not in config.moe.layers:
            raise InvariantError(f"layer {layer_id} of gpt-oss has no experts")
        return GptOssMoE(config, config.moe, parallel, dtype)
