"""Decoders whose checkpoints join projections: Phi-3 and 4-mini, GLM-4.

Their tensors are cut into those that others have, so that ranks, quantisation and adapters see
nothing new. A Phi whose heads turn in part has the rows of q and k in another order here, see
`partial_row_order`. Source: arXiv 2404.14219, 2503.01743 (Phi), 2406.12793 (GLM-4).

Shape letters: H query heads, G kv heads, D head dim, I width of the MLP.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.lora import Factors
from sglang.srt.layers.rotary_embedding import partial_row_order
from sglang.srt.layers.weights import LoadedWeight, narrow_rows
from sglang.srt.models.arranged import ArrangedForCausalLM, NormPlaces


class GlmForCausalLM(ArrangedForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""

    def load_weights(self, weights: Iterable[tuple[str, LoadedWeight]]) -> None:
        """As `CausalLM.load_weights`, of tensors that are joined or not."""
        super().load_weights(self.own_weights(weights))

    def own_factors(self, factors: Mapping[str, Factors]) -> Mapping[str, Factors]:
        """See `CausalLM.own_factors`: the parts of a joined B have an A in common."""
        own: dict[str, Factors] = {}
        for module, (a, b) in factors.items():
            for name, part in self.own_weights([(f"{module}.weight", b)]):
                assert isinstance(part, torch.Tensor)
                own[name.removesuffix(".weight")] = a, part
        return own

    def own_weights(
        self, weights: Iterable[tuple[str, LoadedWeight]]
    ) -> Iterator[tuple[str, LoadedWeight]]:
        """Tensors as the modules here have them, of those of a checkpoint."""
        return split_joined(weights, self.config)


class Phi3ForCausalLM(GlmForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""

    def own_weights(
        self, weights: Iterable[tuple[str, LoadedWeight]]
    ) -> Iterator[tuple[str, LoadedWeight]]:
        """As GLM's, with rows in the order of `partial_row_order`."""
        return _ordered(super().own_weights(weights), self.config)


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


def _ordered(
    weights: Iterable[tuple[str, LoadedWeight]], config: ModelConfig
) -> Iterator[tuple[str, LoadedWeight]]:
    """The same, rows of every head of q and k in the order of `partial_row_order`."""
    dim = config.head_dim
    turned = config.rope.turned(dim)
    order = partial_row_order(dim, turned)
    for name, tensor in weights:
        if turned == dim or (".q_proj." not in name and ".k_proj." not in name):
            yield name, tensor
            continue
        heads = torch.arange(0, tensor.shape[0], dim, device="cpu")
        rows = (heads.unsqueeze(1) + order).flatten()
        yield name, tensor[rows] if isinstance(tensor, torch.Tensor) else tensor.take(rows)
