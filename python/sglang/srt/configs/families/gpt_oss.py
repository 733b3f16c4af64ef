"""gpt-oss: what its fields mean.

Source: the published configurations of gpt-oss-20b and gpt-oss-120b, arXiv 2508.10925.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.configs.families.llama import sliding_windows
from sglang.srt.configs.model_traits import (
    ClampedGateConfig,
    Fields,
    ModelFamily,
    ModelTraits,
    MoEConfig,
    plain_traits,
    positive,
    positive_number,
)


def _read_gpt_oss(fields: Fields, num_layers: int) -> ModelTraits:
    bias = bool(fields["attention_bias"])
    return plain_traits(
        num_layers,
        attention_bias=bias,
        attention_output_bias=bias,
        layer_windows=_layer_windows(fields, num_layers),
        moe=_moe(fields, num_layers),
    )


def _layer_windows(fields: Fields, num_layers: int) -> tuple[int | None, ...]:
    """As `layer_types` says, else every other layer from the first."""
    if fields.get("layer_types") is None:
        kinds = ("sliding_attention", "full_attention")
        fields = {**fields, "layer_types": [kinds[layer % 2] for layer in range(num_layers)]}
    return sliding_windows(fields, num_layers, first=0)


def _moe(fields: Fields, num_layers: int) -> MoEConfig:
    num_experts = positive(fields, "num_local_experts")
    chosen = positive(fields, "num_experts_per_tok")
    if chosen > num_experts:
        raise ValueError(f"num_experts_per_tok {chosen} is more than {num_experts} experts")
    return MoEConfig(
        layers=frozenset(range(num_layers)),
        num_experts=num_experts,
        experts_per_token=chosen,
        intermediate_size=positive(fields, "intermediate_size"),
        renormalize=True,
        clamped_gate=ClampedGateConfig(
            alpha=positive_number(fields, "swiglu_alpha"),
            limit=positive_number(fields, "swiglu_limit"),
        ),
    )


_DEFAULTS: dict[str, Any] = {
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "sliding_window": 128,
    "attention_bias": True,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}

GPT_OSS = ModelFamily("gpt_oss", _DEFAULTS, _read_gpt_oss, rope_theta=150000.0)
