"""Gemma 2, and Gemma 3 alone or as the text part of its multimodal checkpoints: their fields.

Source: arXiv 2408.00118, 2503.19786, the published configurations and their documentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sglang.srt.configs.families.llama import patterned_windows
from sglang.srt.configs.model_traits import (
    Fields,
    ModelFamily,
    ModelTraits,
    plain_traits,
    positive,
    positive_number,
)
from sglang.srt.configs.rope_config import RopeConfig, rope_config_from_hf

_FULL, _SLIDING = "full_attention", "sliding_attention"


def _read_gemma3(fields: Fields, num_layers: int) -> ModelTraits:
    common = _read_gemma2(fields, num_layers)
    return replace(common, qk_norm=True, window_rope=_window_rope(fields))


def _read_gemma2(fields: Fields, num_layers: int) -> ModelTraits:
    if fields["use_bidirectional_attention"]:
        raise ValueError("use_bidirectional_attention is not supported")
    bias = bool(fields["attention_bias"])
    return plain_traits(
        num_layers,
        attention_bias=bias,
        attention_output_bias=bias,
        layer_windows=patterned_windows(fields, num_layers),
        attention_scaling=positive_number(fields, "query_pre_attn_scalar") ** -0.5,
        attention_logit_cap=_cap(fields, "attn_logit_softcapping"),
        final_logit_cap=_cap(fields, "final_logit_softcapping"),
    )


def _window_rope(fields: Fields) -> RopeConfig:
    """Unscaled by `rope_local_base_freq`, unless the file has a rotation per layer type."""
    per_type = fields.get("rope_parameters")
    if not isinstance(per_type, Mapping) or _SLIDING not in per_type:
        per_type = {"rope_theta": positive_number(fields, "rope_local_base_freq")}
    return rope_config_from_hf(
        {"rope_parameters": per_type},
        max_position_embeddings=positive(fields, "max_position_embeddings"),
        layer_type=_SLIDING,
    )


def _cap(fields: Fields, key: str) -> float:
    return 0.0 if fields.get(key) is None else positive_number(fields, key)


_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "_sliding_window_pattern": 6,
    "rope_local_base_freq": 10000.0,
    "use_bidirectional_attention": False,
}

_GEMMA2_DEFAULTS: dict[str, Any] = {
    **_DEFAULTS,
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    "_sliding_window_pattern": 2,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}

GEMMA2 = ModelFamily(
    "gemma2",
    _GEMMA2_DEFAULTS,
    _read_gemma2,
    hidden_acts=("gelu_pytorch_tanh",),
    act_field="hidden_activation",
    null_means_none=frozenset(
        {
            "sliding_window",
            "bos_token_id",
            "eos_token_id",
            "attn_logit_softcapping",
            "final_logit_softcapping",
        }
    ),
)
GEMMA3 = ModelFamily(
    "gemma3_text",
    _DEFAULTS,
    _read_gemma3,
    rope_theta=1000000.0,
    hidden_acts=("gelu_pytorch_tanh",),
    act_field="hidden_activation",
    rope_layer_type=_FULL,
    length_is_scaled=True,
)
GEMMA3_MULTIMODAL = replace(GEMMA3, model_type="gemma3", text_part="text_config")
