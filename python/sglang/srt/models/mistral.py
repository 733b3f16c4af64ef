"""Mistral and its heirs: the Llama decoder with sliding windows, and with sharper far attention.

Layers with a window are a group of the KV cache whose old pages are recycled. In checkpoints of
the multimodal models the text part's names begin with `language_model.`; vision weights are passed
over. Source: arXiv 2310.06825; the temperature of queries, arXiv 2501.19399.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.attention_temperature import AttentionTemperature
from sglang.srt.layers.rotary_embedding import RotaryEmbedding
from sglang.srt.layers.weights import LoadedWeight
from sglang.srt.models.arranged import ArrangedForCausalLM
from sglang.srt.models.llama import DecoderOptions, LlamaAttention, LlamaModel
from sglang.srt.models.multimodal import text_weights


class MistralForCausalLM(ArrangedForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""


class MinistralForCausalLM(MistralForCausalLM):
    """The same, with windows on some layers."""


class TemperedAttention(LlamaAttention):
    """Llama's, whose queries are scaled by their positions once they are turned, or not.

    `temperature` is one module for all layers; None: nothing is scaled.
    """

    rotates_last = False

    def __init__(
        self,
        config: ModelConfig,
        options: DecoderOptions,
        layer_id: int,
        rotary_emb: RotaryEmbedding | None,
        parallel: ParallelState,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(config, options, layer_id, rotary_emb, parallel, dtype)
        self.temperature: AttentionTemperature | None = None

    def place(
        self, qkv: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `LlamaAttention.place`; queries and keys are not placed alike here."""
        if self.temperature is None:
            return super().place(qkv, positions)
        q, k, v = self.qkv_proj.split(qkv)
        return self.place_queries(q, positions), self.place_keys(k, positions), v

    def place_queries(self, q: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        q = super().place_queries(q, positions)
        return q if self.temperature is None else self.temperature(positions, q)


class Ministral3ForCausalLM(ArrangedForCausalLM):
    """The whole text model; arguments and errors as for `LlamaForCausalLM`."""

    attention_class = TemperedAttention

    def make_model(
        self,
        config: ModelConfig,
        options: DecoderOptions,
        parallel: ParallelState,
        dtype: torch.dtype,
    ) -> LlamaModel:
        model = super().make_model(config, options, parallel, dtype)
        if config.query_temperature is not None:
            temperature = AttentionTemperature(config.query_temperature)
            for module in model.modules():
                if isinstance(module, TemperedAttention):
                    module.temperature = temperature
        return model


class Mistral3ForConditionalGeneration(Ministral3ForCausalLM):
    """The text part of a multimodal checkpoint."""

    def load_weights(self, weights: Iterable[tuple[str, LoadedWeight]]) -> None:
        """As `CausalLM.load_weights`, without the prefix of text names and without vision."""
        super().load_weights(text_weights(weights))
