"""Mistral, Ministral, and Mistral 3 alone or as the text part of its multimodal checkpoints.

Source: arXiv 2310.06825, the published configurations of Ministral 8B, Ministral 3 and Mistral
Small 3.1 and their documentation.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.configs.families.llama import sliding_windows
from sglang.srt.configs.model_traits import (
    Fields,
    ModelFamily,
    ModelTraits,
    TemperatureConfig,
    plain_traits,
    positive,
    positive_number,
)

_BETA = "llama_4_scaling_beta"
# Their temperature steps at position n * original; Llama 4's formula, of position + 1, would step
# one before, but for a length that is this much longer.
_LATER = 2.0**-20


def _read_mistral(fields: Fields, num_layers: int) -> ModelTraits:
    return plain_traits(
        num_layers,
        layer_windows=sliding_windows(fields, num_layers, first=0),
        query_temperature=_query_temperature(fields),
    )


def _query_temperature(fields: Fields) -> TemperatureConfig | None:
    """1 + beta * ln(1 + floor(position / original length)), of a rotation that has a beta."""
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(rope, dict) or not rope.get(_BETA):
        return None
    return TemperatureConfig(
        attn_scale=positive_number(rope, _BETA),
        floor_scale=positive(rope, "original_max_position_embeddings") + _LATER,
    )


_COMMON: dict[str, Any] = {
    "num_key_value_heads": 8,
    "sliding_window": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

MISTRAL = ModelFamily(
    "mistral",
    {
        **_COMMON,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    _read_mistral,
    rope_fields=frozenset({_BETA}),
)
MINISTRAL = ModelFamily("ministral", MISTRAL.defaults, _read_mistral)
MINISTRAL3 = ModelFamily(
    "ministral3",
    {
        **_COMMON,
        "vocab_size": 131072,
        "intermediate_size": 14336,
        "num_hidden_layers": 34,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 262144,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            _BETA: 0.1,
        },
    },
    _read_mistral,
    rope_theta=1000000.0,
    rope_fields=frozenset({_BETA}),
)
MISTRAL3_MULTIMODAL = ModelFamily(
    "mistral3",
    {
        **_COMMON,
        "vocab_size": 131072,
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_hidden_layers": 40,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
    },
    _read_mistral,
    rope_theta=1000000000.0,
    rope_fields=frozenset({_BETA}),
    text_part="text_config",
)
