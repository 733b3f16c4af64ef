"""Llama 4, alone or as the text part of the multimodal checkpoints: what its fields mean.

Source: the published configuration of Llama-4-Scout and Llama-4-Maverick and its documentation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sglang.srt.configs.families.llama import layer_rope
from sglang.srt.configs.model_traits import (
    Fields,
    ModelFamily,
    ModelTraits,
    MoEConfig,
    TemperatureConfig,
    layer_types,
    positive,
    positive_number,
)

_CHUNKED = "chunked_attention"


def _read_llama4(fields: Fields, num_layers: int) -> ModelTraits:
    bias = bool(fields.get("attention_bias", False))
    rope = layer_rope(fields, num_layers)
    return ModelTraits(
        attention_bias=bias,
        attention_output_bias=bias,
        weightless_qk_norm=bool(fields["use_qk_norm"]),
        layer_windows=(None,) * num_layers,
        layer_chunks=_layer_chunks(fields, rope),
        layer_rope=rope,
        interleaved_rope=True,
        temperature=_temperature(fields),
        moe=_moe(fields, num_layers),
    )


def _layer_chunks(fields: Fields, rope: tuple[bool, ...]) -> tuple[int | None, ...]:
    """Chunk of every layer: as `layer_types` says, else of the layers that turn."""
    if fields.get("attention_chunk_size") is None:
        return (None,) * len(rope)
    chunk = positive(fields, "attention_chunk_size")
    types = layer_types(fields, len(rope), ("full_attention", _CHUNKED))
    chunked = rope if types is None else tuple(kind == _CHUNKED for kind in types)
    return tuple(chunk if yes else None for yes in chunked)


def _temperature(fields: Fields) -> TemperatureConfig | None:
    if not fields["attn_temperature_tuning"]:
        return None
    return TemperatureConfig(
        attn_scale=positive_number(fields, "attn_scale"),
        floor_scale=positive_number(fields, "floor_scale"),
    )


def _moe(fields: Fields, num_layers: int) -> MoEConfig | None:
    """Experts in `moe_layers`, else in every `interleave_moe_layer_step`-th layer."""
    listed = fields.get("moe_layers")
    if listed is None:
        step = positive(fields, "interleave_moe_layer_step")
        listed = list(range(step - 1, num_layers, step))
    if not isinstance(listed, list) or set(listed) - set(range(num_layers)):
        raise ValueError(f"moe_layers must list layers below {num_layers}, not {listed!r}")
    if not listed:
        return None
    num_experts = positive(fields, "num_local_experts")
    chosen = positive(fields, "num_experts_per_tok")
    if chosen > num_experts:
        raise ValueError(f"num_experts_per_tok {chosen} is more than {num_experts} experts")
    width = positive(fields, "intermediate_size")
    return MoEConfig(
        layers=frozenset(listed),
        num_experts=num_experts,
        experts_per_token=chosen,
        intermediate_size=width,
        shared_intermediate_size=width,
        scales_inputs=True,
    )


_DEFAULTS: dict[str, Any] = {
    "vocab_size": 202048,
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": 1,
    "num_local_experts": 16,
    "interleave_moe_layer_step": 1,
    "use_qk_norm": True,
    "no_rope_layer_interval": 4,
    "attention_chunk_size": 8192,
    "attn_temperature_tuning": True,
    "attn_scale": 0.1,
    "floor_scale": 8192,
}

LLAMA4 = ModelFamily(
    "llama4_text",
    _DEFAULTS,
    _read_llama4,
    rope_theta=500000.0,
    mlp_field="intermediate_size_mlp",
    null_means_none=frozenset({"attention_chunk_size", "bos_token_id", "eos_token_id"}),
)
LLAMA4_MULTIMODAL = replace(LLAMA4, model_type="llama4", text_part="text_config")
