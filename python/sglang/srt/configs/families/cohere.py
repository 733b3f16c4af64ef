"""Cohere and Cohere 2 (Command R, Command A, Aya): what their fields mean.

Source: the published configurations and their documentation, arXiv 2504.00698.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.configs.families.llama import patterned_windows
from sglang.srt.configs.model_traits import (
    Fields,
    ModelFamily,
    ModelTraits,
    plain_traits,
    positive_number,
)


def _read_cohere(fields: Fields, num_layers: int) -> ModelTraits:
    bias = bool(fields["attention_bias"])
    return plain_traits(
        num_layers,
        attention_bias=bias,
        attention_output_bias=bias,
        heads_norm=bool(fields.get("use_qk_norm")),
        interleaved_rope=True,
        logit_factor=positive_number(fields, "logit_scale"),
    )


def _read_cohere2(fields: Fields, num_layers: int) -> ModelTraits:
    """Global layers know no positions."""
    windows = patterned_windows(fields, num_layers)
    bias = bool(fields["attention_bias"])
    return plain_traits(
        num_layers,
        attention_bias=bias,
        attention_output_bias=bias,
        layer_windows=windows,
        layer_rope=tuple(window is not None for window in windows),
        interleaved_rope=True,
        logit_factor=positive_number(fields, "logit_scale"),
    )


_DEFAULTS: dict[str, Any] = {
    "vocab_size": 256000,
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "logit_scale": 0.0625,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-5,
    "bos_token_id": 5,
    "eos_token_id": 255001,
    "tie_word_embeddings": True,
    "attention_bias": False,
}

COHERE = ModelFamily(
    "cohere", _DEFAULTS, _read_cohere, rope_theta=500000.0, norm_field="layer_norm_eps"
)
COHERE2 = ModelFamily(
    "cohere2",
    {**_DEFAULTS, "sliding_window": 4096, "_sliding_window_pattern": 4},
    _read_cohere2,
    norm_field="layer_norm_eps",
)
