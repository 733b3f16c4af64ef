"""OLMo 2 and 3: what their fields mean.

Source: arXiv 2501.00656, the published configurations of OLMo 3 and their documentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sglang.srt.configs.families.llama import patterned_windows
from sglang.srt.configs.model_traits import Fields, ModelFamily, ModelTraits, plain_traits, positive
from sglang.srt.configs.rope_config import RopeConfig, rope_config_from_hf

_SLIDING, _THETA3 = "sliding_attention", 500000.0


def _read_olmo2(fields: Fields, num_layers: int) -> ModelTraits:
    bias = bool(fields["attention_bias"])
    return plain_traits(
        num_layers,
        attention_bias=bias,
        attention_output_bias=bias,
        heads_norm=True,
    )


def _read_olmo3(fields: Fields, num_layers: int) -> ModelTraits:
    return replace(
        _read_olmo2(fields, num_layers),
        layer_windows=patterned_windows(fields, num_layers),
        window_rope=_window_rope(fields),
    )


def _window_rope(fields: Fields) -> RopeConfig:
    """That of a file with a rotation per layer type, else the model's base without scaling."""
    per_type = fields.get("rope_parameters")
    if not isinstance(per_type, Mapping) or _SLIDING not in per_type:
        base = (per_type or {}).get("rope_theta", fields.get("rope_theta"))
        per_type = {"rope_theta": _THETA3 if base is None else base}
    return rope_config_from_hf(
        {"rope_parameters": per_type},
        max_position_embeddings=positive(fields, "max_position_embeddings"),
        layer_type=_SLIDING,
    )


_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50304,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "eos_token_id": 50279,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
}

OLMO2 = ModelFamily("olmo2", _DEFAULTS, _read_olmo2)
OLMO3 = ModelFamily(
    "olmo3",
    {**_DEFAULTS, "sliding_window": 4096, "_sliding_window_pattern": 4},
    _read_olmo3,
    rope_theta=_THETA3,
    rope_layer_type="full_attention",
)
