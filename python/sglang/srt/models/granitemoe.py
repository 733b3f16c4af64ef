"""GraniteMoe: Granite's factors, and experts whose gates and ups checkpoints have in one tensor.

Source: the published configurations and documentation of Granite 3.

Shape letters: E experts, I an expert's width, H hidden width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.expert_weights import ExpertLayout
from sglang.srt.layers.weights import LoadedWeight, narrow_rows
from sglang.srt.models.mixture import MixtureForCausalLM, MixtureOptions

_SHARED, _JOINED, _DOWN = (
    ".shared_experts.input_linear.",
    ".mlp.input_linear.",
    ".mlp.output_linear.",
)


class GraniteMoeForCausalLM(MixtureForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""

    mixture = MixtureOptions(layout=ExpertLayout.STACKED)

    def load_weights(self, weights: Iterable[tuple[str, LoadedWeight]]) -> None:
        """As `CausalLM.load_weights`, of joined tensors."""
        super().load_weights(_split(weights, self.config))


class GraniteMoeSharedForCausalLM(GraniteMoeForCausalLM):
    """The same, with a shared expert."""


def _split(
    weights: Iterable[tuple[str, LoadedWeight]], config: ModelConfig
) -> Iterator[tuple[str, LoadedWeight]]:
    """(name, tensor) with gates and ups apart, in the layout of stacked experts.

    Raises ValueError for experts that are not [E, 2 I, H], and for those that are quantised.
    """
    for given, tensor in weights:
        name = config.own_weight_name(given)
        if _SHARED in name:
            half = tensor.shape[0] // 2
            for part, first in (("gate_proj", 0), ("up_proj", half)):
                own = name.replace("input_linear", part)
                yield own, narrow_rows(tensor, first, half)
        elif _DOWN in name:
            yield name.replace(_DOWN, ".mlp.experts.down_proj."), tensor
        elif _JOINED in name:
            if not isinstance(tensor, torch.Tensor) or tensor.dim() != 3:
                raise ValueError(f"weight {given}: shape {tuple(tensor.shape)} is not [E, 2 I, H]")
            for part, half_tensor in zip(("gate", "up"), tensor.chunk(2, 1), strict=True):
                yield name.replace(_JOINED, f".mlp.experts.{part}_proj."), half_tensor
        else:
            yield given, tensor
