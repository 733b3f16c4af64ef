"""Qwen2, Qwen2-MoE, Qwen3 and Qwen3-MoE: what their fields mean."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sglang.srt.configs.families.llama import sliding_windows
from sglang.srt.configs.model_traits import (
    Fields,
    ModelFamily,
    ModelTraits,
    MoEConfig,
    plain_traits,
    positive,
)

_DENSE_DEFAULTS: dict[str, Any] = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def _windows(fields: Fields, num_layers: int) -> tuple[int | None, ...]:
    if not fields.get("use_sliding_window"):
        return (None,) * num_layers
    return sliding_windows(fields, num_layers, first=int(fields["max_window_layers"]))


def _read_qwen2(fields: Fields, num_layers: int) -> ModelTraits:
    # There is no switch: q, k and v have a bias, the output has none.
    return plain_traits(
        num_layers,
        layer_windows=_windows(fields, num_layers),
        attention_bias=True,
        attention_output_bias=bool(fields.get("attention_output_bias", False)),
    )


def _read_qwen3(fields: Fields, num_layers: int) -> ModelTraits:
    bias = bool(fields.get("attention_bias", False))
    return plain_traits(
        num_layers,
        layer_windows=_windows(fields, num_layers),
        attention_bias=bias,
        attention_output_bias=bool(fields.get("attention_output_bias", bias)),
        qk_norm=True,
    )


def _read_qwen3_moe(fields: Fields, num_layers: int) -> ModelTraits:
    return replace(_read_qwen3(fields, num_layers), moe=read_moe(fields, num_layers))


def _read_qwen2_moe(fields: Fields, num_layers: int) -> ModelTraits:
    return plain_traits(
        num_layers,
        layer_windows=_windows(_with_layer_types(fields, num_layers), num_layers),
        attention_bias=bool(fields["qkv_bias"]),
        moe=replace(
            read_moe(fields, num_layers),
            shared_intermediate_size=positive(fields, "shared_expert_intermediate_size"),
            gates_shared=True,
        ),
    )


def _with_layer_types(fields: Fields, num_layers: int) -> Fields:
    """Where the file has none, every other layer below `max_window_layers` has the window."""
    if not fields["use_sliding_window"] or fields.get("layer_types") is not None:
        return fields
    below = int(fields["max_window_layers"])
    kinds = [
        "sliding_attention" if layer < below and layer % 2 == 0 else "full_attention"
        for layer in range(num_layers)
    ]
    return {**fields, "layer_types": kinds}


def read_moe(fields: Fields, num_layers: int) -> MoEConfig:
    """Every `decoder_sparse_step`-th layer has experts, except `mlp_only_layers`."""
    # Newer files count the experts under the second name.
    name = "num_experts" if fields.get("num_experts") is not None else "num_local_experts"
    num_experts, chosen = positive(fields, name), positive(fields, "num_experts_per_tok")
    if chosen > num_experts:
        raise ValueError(f"num_experts_per_tok {chosen} is more than {name} {num_experts}")
    step = positive(fields, "decoder_sparse_step")
    dense = fields["mlp_only_layers"]
    if not isinstance(dense, list):
        raise ValueError(f"mlp_only_layers must be a list of layers, not {dense!r}")
    layers = frozenset(
        layer for layer in range(num_layers) if layer not in dense and (layer + 1) % step == 0
    )
    return MoEConfig(
        layers=layers,
        num_experts=num_experts,
        experts_per_token=chosen,
        intermediate_size=positive(fields, "moe_intermediate_size"),
        renormalize=bool(fields["norm_topk_prob"]),
    )


QWEN2 = ModelFamily("qwen2", _DENSE_DEFAULTS, _read_qwen2)
QWEN3 = ModelFamily("qwen3", {**_DENSE_DEFAULTS, "head_dim": 128}, _read_qwen3)
QWEN2_MOE = ModelFamily(
    "qwen2_moe",
    {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "qkv_bias": True,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "num_experts": 60,
        "norm_topk_prob": False,
        "mlp_only_layers": [],
    },
    _read_qwen2_moe,
)
QWEN3_MOE = ModelFamily(
    "qwen3_moe",
    {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "max_window_layers": 0,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_local_experts": 128,
        "norm_topk_prob": False,
        "mlp_only_layers": [],
    },
    _read_qwen3_moe,
)
