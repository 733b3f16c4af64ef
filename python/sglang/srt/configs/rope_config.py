"""How positions become rotation angles: one value made from any of the checkpoint spellings.

`ModelConfig` owns a `RopeConfig`; srt/layers/rotary_embedding.py turns it into angles. The two
spellings that checkpoints use are read here: `rope_theta` beside `rope_scaling` (older files) and
`rope_parameters` (newer ones). Never computes an angle, never imports torch.

Source: the Hugging Face page "Utilities for Rotary Embedding", which defines the fields; LongRoPE,
arXiv 2402.13753.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")

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
        "short_factor",
        "long_factor",
        "finetuned",
    }
)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of one model.

    `factor` is 1.0 for `default`. `original_max_position` is the length in tokens before scaling
    (the model's `max_position_embeddings` where the checkpoint does not say). `attention_factor`,
    `mscale` and `mscale_all_dim` are None where the checkpoint does not say; `attention_scaling`
    is what they come to. `freq_factors` (GGUF `rope_freqs.weight`, head_dim / 2 values, or None)
    divide the inverse frequencies after everything else. `partial` is the share of a head's
    dimensions that turn, the first ones; where halves turn, weights are put in another order for
    it (see `partial_row_order`).

    LongRoPE has a divisor for each frequency, `short_factors` for sequences of up to
    `original_max_position` tokens and `long_factors` for longer ones. Keys that were turned by the
    one are wrong for queries turned by the other, and cached prefixes are shared between
    sequences of any length, so which of them is meant is decided once, for the whole server, by the
    context length that it serves (`for_context`). transformers chooses by the length of a sequence
    instead, and computes its cache anew when it grows beyond the border. `short_magnitude` and
    `long_magnitude` are what cos and sin are multiplied with beside either (None: as computed).
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
    partial: float = 1.0
    short_factors: tuple[float, ...] | None = None
    long_factors: tuple[float, ...] | None = None
    is_long: bool = False
    short_magnitude: float | None = None
    long_magnitude: float | None = None

    def turned(self, head_dim: int) -> int:
        """How many of a head's dimensions turn."""
        return int(head_dim * self.partial)

    def for_context(self, context_length: int) -> RopeConfig:
        """The same for a server whose sequences have up to so many tokens: LongRoPE's long factors
        where they may be longer than before scaling, else its short ones."""
        if self.rope_type != "longrope":
            return self
        return replace(self, is_long=context_length > self.original_max_position)

    @property
    def attention_scaling(self) -> float:
        """What cos and sin are multiplied with: 1.0 except for yarn (arXiv 2309.00071, 3.4) and
        LongRoPE (arXiv 2402.13753; the same for short and long factors)."""
        if self.rope_type == "longrope":
            magnitude = self.long_magnitude if self.is_long else self.short_magnitude
            if magnitude is not None:
                return magnitude
            if self.attention_factor is not None:
                return self.attention_factor
            if self.factor <= 1.0:
                return 1.0
            return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_position))
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
    family_fields: frozenset[str] = frozenset(),
) -> RopeConfig:
    """Read the rotary fields of a config.json in either spelling.

    `rope_parameters` wins over `rope_scaling` where both are present. Of a file with fields per
    layer type those of `layer_type` are read (None: such a file is refused). `family_fields` are
    those that only some families have: a partial factor, and what a family reads itself. Raises
    ValueError, naming the field, for an unknown type, a missing or impossible number, or a partial
    factor where the family has none.
    """
    merged = _merge_spellings(raw, default_theta, layer_type)
    rope_type = str(merged.get("rope_type") or merged.get("type") or "default")
    rope_type = "longrope" if rope_type == "su" else rope_type  # as its first files say
    if rope_type == "mrope":
        raise ValueError("rope type 'mrope' belongs to multimodal models, which are not supported")
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"unknown rope type {rope_type!r}; supported: {', '.join(ROPE_TYPES)}")
    unknown = sorted(set(merged) - _KNOWN_FIELDS - family_fields)
    if unknown:
        raise ValueError(f"unknown rope field(s) {', '.join(unknown)} for rope type {rope_type!r}")
    partial = _number(merged, "partial_rotary_factor", 1.0)
    if partial != 1.0 and "partial_rotary_factor" not in family_fields:
        raise ValueError("partial_rotary_factor other than 1.0 is not supported")
    if not 0 < partial <= 1.0:
        raise ValueError(f"partial_rotary_factor must be above 0 and at most 1, not {partial}")
    original = merged.get("original_max_position_embeddings")
    factor = 1.0
    if rope_type == "longrope":
        original = original or raw.get("original_max_position_embeddings")
        stretch = max_position_embeddings / int(original or max_position_embeddings)
        factor = max(1.0, _number(merged, "factor", stretch))
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
        partial=partial,
        short_factors=_factors(merged, "short_factor") if rope_type == "longrope" else None,
        long_factors=_factors(merged, "long_factor") if rope_type == "longrope" else None,
        short_magnitude=_optional_number(merged, "short_mscale"),
        long_magnitude=_optional_number(merged, "long_mscale"),
    )
    _check(config)
    if rope_type == "dynamic" and merged.get("alpha") is not None:
        return _stretched(config, _number(merged, "alpha", 1.0), _number(raw, "head_dim", 0.0))
    return config.for_context(max_position_embeddings)


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
    if raw.get("rotary_dim") is not None:  # MiniMax's spelling
        turned, whole = _number(raw, "rotary_dim", 0.0), _number(raw, "head_dim", 1.0)
        merged.setdefault("partial_rotary_factor", turned / whole)
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


def _factors(fields: Mapping[str, Any], key: str) -> tuple[float, ...]:
    """LongRoPE's positive numbers, one for each pair of dimensions that turns."""
    values = fields.get(key)
    if not isinstance(values, list) or not values:
        raise ValueError(f"rope type 'longrope' needs {key!r}, a list of numbers")
    numbers = tuple(_number({key: value}, key, 0.0) for value in values)
    if min(numbers) <= 0:
        raise ValueError(f"rope field {key!r} must have positive numbers")
    return numbers


def _stretched(config: RopeConfig, alpha: float, head_dim: float) -> RopeConfig:
    """Hunyuan's rotation: a base stretched by `alpha`, whatever a sequence's length."""
    if alpha <= 0 or head_dim <= 2:
        raise ValueError(f"rope field 'alpha' must be positive, not {alpha}")
    theta = config.theta * alpha ** (head_dim / (head_dim - 2))
    return replace(config, rope_type="default", factor=1.0, theta=theta)


def _check(config: RopeConfig) -> None:
    if not 0 < config.partial <= 1:
        raise ValueError(f"partial_rotary_factor must be above 0 and at most 1: {config.partial}")
    if config.partial != 1 and config.rope_type == "dynamic":
        raise ValueError("partial_rotary_factor with rope type 'dynamic' is not supported")
    if config.theta <= 0:
        raise ValueError(f"rope_theta must be positive, not {config.theta}")
    if config.factor < 1.0:
        raise ValueError(f"rope factor must be at least 1, not {config.factor}")
    if config.original_max_position < 1:
        raise ValueError("rope original_max_position_embeddings must be positive")
    if config.rope_type == "llama3" and config.high_freq_factor < config.low_freq_factor:
        raise ValueError("rope high_freq_factor must not be less than low_freq_factor")
