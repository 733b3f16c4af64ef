"""Decoders whose checkpoints join projections: Phi-3 and 4-mini, GLM-4.

Their tensors are cut into those that others have, so that ranks, quantisation and adapters see
nothing new. Source: arXiv 2404.14219, 2503.01743 (Phi), 2406.12793 (GLM-4).

Shape letters: H query heads, G kv heads, D head dim, I width of the MLP.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.lora import Factors
from sglang.srt.layers.weights import LoadedWeight, narrow_rows
from sglang.srt.models.arranged import ArrangedForCausalLM, NormPlaces


class GlmForCausalLM(ArrangedForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""

    def load_weights(self, weights: Iterable[tuple[str, LoadedWeight]]) -> None:
        """As `CausalLM.load_weights`, of tensors that are joined or not."""
        super().load_weights(split_joined(weights, self.config))

    def own_factors(self, factors: Mapping[str, Factors]) -> Mapping[str, Factors]:
        """See `CausalLM.own_factors`: the parts of a joined B have an A in common."""
        own: dict[str, Factors] = {}
        for module, (a, b) in factors.items():
            for name, part in split_joined([(f"{module}.weight", b)], self.config):
                assert isinstance(part, torch.Tensor)
                own[name.removesuffix(".weight")] = a, part
        return super().own_factors(own)


class Phi3ForCausalLM(GlmForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""


class Glm4ForCausalLM(GlmForCausalLM):
    """The same, with norms behind attention and MLP too."""

    norm_places = NormPlaces(
        "input_layernorm",
        "post_self_attn_layernorm",
        "post_attention_layernorm",
        "post_mlp_layernorm",
    )


def split_joined(
    weights: Iterable[tuple[str, LoadedWeight]], config: ModelConfig
) -> Iterator[tuple[str, LoadedWeight]]:
    """(name, tensor) with `qkv_proj` [(H + 2 G) * D, *] as q, k and v, and `gate_up_proj` [2 I, *]
    as gate and up; others as they are. Raises ValueError for other numbers of rows."""
    q, kv, width = config.q_size, config.kv_size, config.intermediate_size
    parts = {
        "qkv_proj": (("q_proj", q), ("k_proj", kv), ("v_proj", kv)),
        "gate_up_proj": (("gate_proj", width), ("up_proj", width)),
    }
    for name, tensor in weights:
        owner, _, kind = name.rpartition(".")
        parent, _, leaf = owner.rpartition(".")
        if leaf not in parts:
            yield name, tensor
            continue
        needed = sum(rows for _, rows in parts[leaf])
        if tensor.shape[0] != needed:
            raise ValueError(
                f"weight {name}: the checkpoint has {tensor.shape[0]} rows, "
                f"the model needs {needed}"
            )
        first = 0
        for part, rows in parts[leaf]:
            yield f"{parent}.{part}.{kind}", narrow_rows(tensor, first, rows)
            first += rows
