"""Qwen3-Next and the text parts of Qwen3.5, which attend in every fourth layer only.

Source: the published configurations and transformers' documentation of their classes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sglang.srt.configs.families.qwen import read_moe
from sglang.srt.configs.model_traits import (
    Fields,
    LinearConfig,
    ModelFamily,
    ModelTraits,
    layer_types,
    plain_traits,
    positive,
)

_LINEAR, _FULL = "linear_attention", "full_attention"


def _read(fields: Fields, num_layers: int, *, interleaved: bool) -> ModelTraits:
    if not fields.get("attn_output_gate", True):
        raise ValueError("attention without a gate on its output is not supported")
    bias = bool(fields["attention_bias"])
    return plain_traits(
        num_layers,
        attention_bias=bias,
        attention_output_bias=bias,
        qk_norm=True,
        linear=_linear(fields, num_layers, interleaved=interleaved),
        draft_prefix="mtp.",
    )


def _linear(fields: Fields, num_layers: int, *, interleaved: bool) -> LinearConfig | None:
    """None where all layers attend."""
    kinds = layer_types(fields, num_layers, (_LINEAR, _FULL))
    if kinds is None:
        interval = positive(fields, "full_attention_interval")
        kinds = tuple(_LINEAR if (n + 1) % interval else _FULL for n in range(num_layers))
    if _FULL not in kinds:
        raise ValueError("layer_types without full_attention is not supported")
    layers = frozenset(n for n, kind in enumerate(kinds) if kind == _LINEAR)
    if not layers:
        return None
    keys, values = (
        positive(fields, "linear_num_key_heads"),
        positive(fields, "linear_num_value_heads"),
    )
    if values % keys:
        raise ValueError(
            f"linear_num_value_heads {values} is not a multiple of linear_num_key_heads {keys}"
        )
    size = positive(fields, "linear_conv_kernel_dim")
    if size < 2:
        raise ValueError(f"linear_conv_kernel_dim must be at least 2, not {size}")
    return LinearConfig(
        layers=layers,
        key_heads=keys,
        value_heads=values,
        key_dim=positive(fields, "linear_key_head_dim"),
        value_dim=positive(fields, "linear_value_head_dim"),
        conv_size=size,
        interleaved=interleaved,
    )


def _read_next(fields: Fields, num_layers: int) -> ModelTraits:
    traits = _read(fields, num_layers, interleaved=True)
    if not fields["num_experts"]:
        return traits
    return _with_experts(traits, fields, num_layers)


def _read_dense(fields: Fields, num_layers: int) -> ModelTraits:
    return _read(fields, num_layers, interleaved=False)


def _read_moe(fields: Fields, num_layers: int) -> ModelTraits:
    return _with_experts(_read_dense(fields, num_layers), fields, num_layers)


def _with_experts(traits: ModelTraits, fields: Fields, num_layers: int) -> ModelTraits:
    moe = replace(
        read_moe(fields, num_layers),
        shared_intermediate_size=positive(fields, "shared_expert_intermediate_size"),
        gates_shared=True,
    )
    return replace(traits, moe=moe)


# A head turns in part. What files say of positions in images is passed over: those of text are the
# same without.
_ROPE_FIELDS = frozenset({"partial_rotary_factor", "mrope_section", "mrope_interleaved"})
_COMMON: dict[str, Any] = {
    "head_dim": 256,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "partial_rotary_factor": 0.25,
    "attention_bias": False,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
_EXPERTS: dict[str, Any] = {
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}

QWEN3_NEXT = ModelFamily(
    "qwen3_next",
    {
        **_COMMON,
        **_EXPERTS,
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 48,
        "num_experts": 512,
        "num_experts_per_tok": 10,
    },
    _read_next,
    rope_fields=_ROPE_FIELDS,
)
QWEN3_5_TEXT = ModelFamily(
    "qwen3_5_text",
    {
        **_COMMON,
        "vocab_size": 248320,
        "intermediate_size": 12288,
        "num_key_value_heads": 4,
    },
    _read_dense,
    rope_fields=_ROPE_FIELDS,
)
QWEN3_5_MOE_TEXT = ModelFamily(
    "qwen3_5_moe_text",
    {
        **_COMMON,
        **_EXPERTS,
        "vocab_size": 248320,
        "hidden_size": 2048,
        "intermediate_size": 512,
        "num_hidden_layers": 40,
        "num_experts": 256,
        "num_experts_per_tok": 8,
    },
    _read_moe,
    rope_fields=_ROPE_FIELDS,
)
QWEN3_5 = replace(QWEN3_5_TEXT, model_type="qwen3_5", text_part="text_config")
QWEN3_5_MOE = replace(QWEN3_5_MOE_TEXT, model_type="qwen3_5_moe", text_part="text_config")
