"""Qwen3.5, the text models: Qwen3-Next's decoder with other projections, dense or with experts.

In checkpoints of the multimodal models the text part's names begin with `model.language_model.`;
vision weights are passed over. Source: the published configurations, and the names and shapes of
published weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import ClassVar

import torch

from sglang.srt.layers.weights import LoadedWeight
from sglang.srt.models.causal_lm import MergedProjections
from sglang.srt.models.multimodal import text_weights
from sglang.srt.models.qwen3_next import Qwen3NextForCausalLM


class Qwen3_5ForCausalLM(Qwen3NextForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""

    merged_projections: ClassVar[MergedProjections] = {
        **Qwen3NextForCausalLM.merged_projections,
        "in_proj_ba": (("in_proj_b", 0), ("in_proj_a", 1)),
    }


class Qwen3_5MoeForCausalLM(Qwen3_5ForCausalLM):
    """The same with experts."""

    def load_weights(self, weights: Iterable[tuple[str, LoadedWeight]]) -> None:
        """As `CausalLM.load_weights`; a layer's experts may come in one tensor or one by one."""
        super().load_weights(_each_expert(weights))


class Qwen3_5ForConditionalGeneration(Qwen3_5ForCausalLM):
    """The text part of a multimodal checkpoint."""

    def load_weights(self, weights: Iterable[tuple[str, LoadedWeight]]) -> None:
        """As `CausalLM.load_weights`, without the prefix of text names and without vision."""
        super().load_weights(text_weights(weights))


class Qwen3_5MoeForConditionalGeneration(Qwen3_5MoeForCausalLM):
    """The text part of a multimodal checkpoint with experts."""

    def load_weights(self, weights: Iterable[tuple[str, LoadedWeight]]) -> None:
        """As `CausalLM.load_weights`, without the prefix of text names and without vision."""
        super().load_weights(text_weights(weights))


def _each_expert(
    weights: Iterable[tuple[str, LoadedWeight]],
) -> Iterator[tuple[str, LoadedWeight]]:
    """`gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I] of all experts as each one's own."""
    for name, tensor in weights:
        prefix, _, leaf = name.rpartition(".")
        if not prefix.endswith(".experts") or not isinstance(tensor, torch.Tensor):
            yield name, tensor
            continue
        for expert, matrix in enumerate(tensor):
            if leaf == "gate_up_proj":
                gate, up = matrix.chunk(2)
                yield f"{prefix}.{expert}.gate_proj.weight", gate
                yield f"{prefix}.{expert}.up_proj.weight", up
            else:
                yield f"{prefix}.{expert}.{leaf}.weight", matrix
