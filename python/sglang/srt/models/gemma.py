"""Gemma 2 and 3, the text models: sliding and global layers, norms before and after each part.

Gemma 3 normalises heads and turns either kind of layers in its own way; Gemma 2 caps scores and
logits. In checkpoints of the multimodal model the text part's names begin with `language_model.`;
vision weights are passed over. Source: arXiv 2408.00118, 2503.19786; normalised heads, arXiv
2302.05442.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.layernorm import GemmaRMSNorm
from sglang.srt.layers.weights import LoadedWeight
from sglang.srt.models.arranged import SANDWICH_NORMS, ArrangedForCausalLM
from sglang.srt.models.llama import LlamaAttention
from sglang.srt.models.multimodal import text_weights


class GemmaAttention(LlamaAttention):
    """Llama's, with Gemma's norm on heads."""

    norm_class = GemmaRMSNorm


class Gemma2ForCausalLM(ArrangedForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""

    attention_class = GemmaAttention
    norm_places = SANDWICH_NORMS
    norm_class = GemmaRMSNorm

    def embed_factor(self, config: ModelConfig, dtype: torch.dtype) -> float:
        """sqrt(hidden), which the model knows in its weights' type."""
        return torch.tensor(config.hidden_size**0.5, dtype=dtype, device="cpu").item()


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    """The whole text model; arguments and errors as for `LlamaForCausalLM`."""


class Gemma3ForConditionalGeneration(Gemma3ForCausalLM):
    """The text part of a multimodal checkpoint."""

    def load_weights(self, weights: Iterable[tuple[str, LoadedWeight]]) -> None:
        """As `CausalLM.load_weights`, without the prefix of text names and without vision."""
        super().load_weights(text_weights(weights))
