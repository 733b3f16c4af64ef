"""How positions become rotation angles: one value made from any of the checkpoint spellings.

`ModelConfig` owns a `RopeConfig`; srt/layers/rotary_embedding.py turns it into angles. The two
spellings that checkpoints use are read here: `rope_theta` beside `rope_scaling` (older files) and
`rope_parameters` (newer ones). Never computes an angle, never imports torch.

Source: the Hugging Face page "Utilities for Rotary Embedding", which defines the fields.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")

_FIELDS_THAT_NEED_A_FACTOR = ("linear", "dynamic", "yarn", "llama3")
_KNOWN_FIELDS = frozenset(
    {
        "type",
        "rope_type",
        "rope_theta",
        "factor",
        "original_max_position_embeddings",
        "max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "partial_rotary_factor",
        "finetuned",
    }
)
_IMAGE_FIELDS = ("mrope_section", "mrope_interleaved")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of one model.

    `factor` is 1.0 for `default`. `original_max_position` is the length in tokens before scaling
    (the model's `max_position_embeddings` where the checkpoint does not say). `attention_factor`,
    `mscale` and `mscale_all_dim` are None where the checkpoint does not say; `attention_scaling`
    is what they come to. `freq_factors` (GGUF `rope_freqs.weight`, head_dim / 2 values, or None)
    divide the inverse frequencies after everything else. `partial_factor` of a head's dimensions,
    the first ones, turn.
    """

    theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position: int = 2048
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    freq_factors: tuple[float, ...] | None = None
    partial_factor: float = 1.0

    @property
    def attention_scaling(self) -> float:
        """What cos and sin are multiplied with: 1.0 except for yarn (arXiv 2309.00071, 3.4)."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)
        return self._magnitude(1.0)

    @property
    def softmax_scaling(self) -> float:
        """What DeepSeek's attention scores are multiplied with beside (head width)^-0.5.

        1.0 except for yarn with `mscale_all_dim`, whose magnitude counts for queries and for keys.
        """
        if self.rope_type != "yarn" or not self.mscale_all_dim:
            return 1.0
        return self._magnitude(self.mscale_all_dim) ** 2

    def _magnitude(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1.0 else 0.1 * mscale * math.log(self.factor) + 1.0


def rope_config_from_hf(
    raw: Mapping[str, Any],
    *,
    max_position_embeddings: int,
    default_theta: float = 10000.0,
    layer_type: str | None = None,
    partly: bool = False,
) -> RopeConfig:
    """Read the rotary fields of a config.json in either spelling.

    `rope_parameters` wins over `rope_scaling` where both are present. Of a file with fields per
    layer type those of `layer_type` are read (None: such a file is refused). `partly`: a head may
    turn in part, and what a file says of positions in images is passed over, as that of text is
    the same. Raises ValueError, naming the field, for an unknown type, a missing or impossible
    number, or a partial factor.
    """
    merged = _merge_spellings(raw, default_theta, layer_type)
    if partly:
        merged = {key: value for key, value in merged.items() if key not in _IMAGE_FIELDS}
    rope_type = str(merged.get("rope_type") or merged.get("type") or "default")
    if rope_type == "mrope":
        raise ValueError("rope type 'mrope' belongs to multimodal models, which are not supported")
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"unknown rope type {rope_type!r}; supported: {', '.join(ROPE_TYPES)}")
    unknown = sorted(set(merged) - _KNOWN_FIELDS)
    if unknown:
        raise ValueError(f"unknown rope field(s) {', '.join(unknown)} for rope type {rope_type!r}")
    partial = _number(merged, "partial_rotary_factor", 1.0)
    if partial != 1.0 and not partly:
        raise ValueError("partial_rotary_factor other than 1.0 is not supported")
    if not 0 < partial <= 1.0:
        raise ValueError(f"partial_rotary_factor must be above 0 and at most 1, not {partial}")
    original = merged.get("original_max_position_embeddings")
    factor = 1.0
    if rope_type in _FIELDS_THAT_NEED_A_FACTOR:
        if merged.get("factor") is None:
            raise ValueError(f"rope type {rope_type!r} needs a 'factor'")
        factor = _number(merged, "factor", 1.0)
    if rope_type == "llama3" and original is None:
        raise ValueError("rope type 'llama3' needs 'original_max_position_embeddings'")
    config = RopeConfig(
        theta=_number(merged, "rope_theta", default_theta),
        rope_type=rope_type,
        factor=factor,
        original_max_position=int(original or max_position_embeddings),
        low_freq_factor=_number(merged, "low_freq_factor", 1.0),
        high_freq_factor=_number(merged, "high_freq_factor", 4.0),
        beta_fast=_number(merged, "beta_fast", 32.0),
        beta_slow=_number(merged, "beta_slow", 1.0),
        attention_factor=_optional_number(merged, "attention_factor"),
        mscale=_optional_number(merged, "mscale"),
        mscale_all_dim=_optional_number(merged, "mscale_all_dim"),
        truncate=bool(merged.get("truncate", True)),
        partial_factor=partial,
    )
    _check(config)
    return config


def _merge_spellings(
    raw: Mapping[str, Any], default_theta: float, layer_type: str | None
) -> dict[str, Any]:
    """One flat dict of rope fields out of `rope_parameters` or `rope_scaling` + `rope_theta`."""
    theta = raw.get("rope_theta")
    merged: dict[str, Any] = {"rope_theta": default_theta if theta is None else theta}
    for key in ("rope_scaling", "rope_parameters"):
        value = raw.get(key)
        if value is None:
            continue
        if not isinstance(value, Mapping):
            raise ValueError(f"{key} must be an object or null, not {value!r}")
        if any(isinstance(v, Mapping) for v in value.values()):
            value = value.get(layer_type) if layer_type is not None else None
            if not isinstance(value, Mapping):
                what = "per layer type" if layer_type is None else f"without {layer_type}"
                raise ValueError(f"{key} {what} is not supported")
        if key == "rope_parameters":
            merged = {"rope_theta": merged["rope_theta"]}
        merged.update({k: v for k, v in value.items() if v is not None})
    if "partial_rotary_factor" in raw and raw["partial_rotary_factor"] is not None:
        merged.setdefault("partial_rotary_factor", raw["partial_rotary_factor"])
    return merged


def _number(fields: Mapping[str, Any], key: str, default: float) -> float:
    value = fields.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"rope field {key!r} must be a finite number, not {value!r}")
    return float(value)


def _optional_number(fields: Mapping[str, Any], key: str) -> float | None:
    return None if fields.get(key) is None else _number(fields, key, 0.0)


def _check(config: RopeConfig) -> None:
    if config.theta <= 0:
        raise ValueError(f"rope_theta must be positive, not {config.theta}")
    if config.factor < 1.0:
        raise ValueError(f"rope factor must be at least 1, not {config.factor}")
    if config.original_max_position < 1:
        raise ValueError("rope original_max_position_embeddings must be positive")
    if config.rope_type == "llama3" and config.high_freq_factor < config.low_freq_factor:
        raise ValueError("rope high_freq_factor must not be less than low_freq_factor")
