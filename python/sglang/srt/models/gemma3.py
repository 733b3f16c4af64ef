"""Gemma 3, the text model: five sliding layers to a global one, each kind with its own rotation.

The decoder is Llama's with norms before and after attention and MLP. In checkpoints of the
multimodal model the text part's names begin with `language_model.`; vision weights are passed
over. Source: arXiv 2503.19786; normalised heads, arXiv 2302.05442.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.activation import GeluTanhAndMul
from sglang.srt.layers.layernorm import GemmaRMSNorm
from sglang.srt.layers.rotary_embedding import get_rope
from sglang.srt.layers.rows import take_rows
from sglang.srt.layers.scaled import scaled
from sglang.srt.layers.weights import LoadedWeight
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.models.llama import (
    DecoderOptions,
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
)
from sglang.srt.models.multimodal import text_weights


class Gemma3Attention(LlamaAttention):
    """Llama's, with Gemma's norm on heads."""

    norm_class = GemmaRMSNorm


class Gemma3DecoderLayer(LlamaDecoderLayer):
    """Attention and MLP, each between two norms, each added to the residual stream."""

    norm_class = GemmaRMSNorm

    def __init__(
        self, config: ModelConfig, self_attn: nn.Module, mlp: nn.Module, dtype: torch.dtype
    ) -> None:
        super().__init__(config, self_attn, mlp, dtype)
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.pre_feedforward_layernorm = GemmaRMSNorm(hidden, eps, dtype=dtype)
        self.post_feedforward_layernorm = GemmaRMSNorm(hidden, eps, dtype=dtype)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        forward_batch: ForwardBatch,
        *,
        rows_pruned: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `LlamaDecoderLayer.forward`."""
        if residual is None:
            x, residual = self.input_layernorm.begin(x)
        else:
            x, residual = self.input_layernorm(x, residual)
        attention = self.get_submodule(self.attention_name)
        x = self.post_attention_layernorm(attention(x, forward_batch, rows_pruned=rows_pruned))
        if rows_pruned:
            residual = take_rows(residual, forward_batch.logits_rows)
        x, residual = self.pre_feedforward_layernorm(x, residual)
        return self.post_feedforward_layernorm(self.get_submodule(self.mlp_name)(x)), residual


class Gemma3Model(LlamaModel):
    """Llama's, with scaled embeddings."""

    norm_class = GemmaRMSNorm

    def __init__(
        self,
        config: ModelConfig,
        layers: Iterable[LlamaDecoderLayer],
        parallel: ParallelState,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(config, layers, parallel, dtype)
        # The model knows the factor in its weights' type.
        self.embed_factor = torch.tensor(config.hidden_size**0.5, dtype=dtype, device="cpu").item()

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings times sqrt(hidden)."""
        return scaled(super().embed(input_ids), self.embed_factor)


class Gemma3ForCausalLM(LlamaForCausalLM):
    """The whole text model; arguments and errors as for `LlamaForCausalLM`."""

    def __init__(self, config: ModelConfig, parallel: ParallelState, dtype: torch.dtype) -> None:
        options = DecoderOptions(
            qkv_bias=config.attention_bias,
            output_bias=config.attention_output_bias,
            qk_norm=config.qk_norm,
            windows=config.layer_windows,
            scaling=config.attention_scaling,
            logit_cap=config.attention_logit_cap,
        )
        super().__init__(config, parallel, dtype, options)

    def make_model(
        self,
        config: ModelConfig,
        options: DecoderOptions,
        parallel: ParallelState,
        dtype: torch.dtype,
    ) -> LlamaModel:
        head_dim, length = config.head_dim, config.max_position_embeddings
        global_rope = get_rope(head_dim, config.rope, length, dtype)
        window_rope = get_rope(head_dim, config.window_rope or config.rope, length, dtype)
        layers = []
        for layer_id, window in enumerate(config.layer_windows):
            rotary_emb = global_rope if window is None else window_rope
            attention = Gemma3Attention(config, options, layer_id, rotary_emb, parallel, dtype)
            mlp = self.make_mlp(config, layer_id, parallel, dtype)
            layers.append(Gemma3DecoderLayer(config, attention, mlp, dtype))
        return Gemma3Model(config, layers, parallel, dtype)

    def make_mlp(
        self, config: ModelConfig, layer_id: int, parallel: ParallelState, dtype: torch.dtype
    ) -> nn.Module:
        del layer_id  # here all are alike
        width = config.intermediate_size
        return LlamaMLP(config.hidden_size, width, False, parallel, dtype, GeluTanhAndMul())


class Gemma3ForConditionalGeneration(Gemma3ForCausalLM):
    """The text part of a multimodal checkpoint."""

    def load_weights(self, weights: Iterable[tuple[str, LoadedWeight]]) -> None:
        """As `CausalLM.load_weights`, without the prefix of text names and without vision."""
        super().load_weights(text_weights(weights))
