"""SmolLM3, EXAONE 4, Granite, Seed-OSS, Arcee, GLM-4 and Phi-3: what their fields mean.

Source: the published configurations and their documentation; EXAONE 4, arXiv 2507.11407; Phi-3,
arXiv 2404.14219; Phi-4-mini, arXiv 2503.01743; GLM-4, arXiv 2406.12793.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.configs.families.llama import (
    layer_rope,
    patterned_windows,
    read_llama,
    sliding_windows,
)
from sglang.srt.configs.model_traits import (
    Fields,
    ModelFamily,
    ModelTraits,
    plain_traits,
    positive,
    positive_number,
)

_PARTIAL = frozenset({"partial_rotary_factor"})


def _read_smollm3(fields: Fields, num_layers: int) -> ModelTraits:
    """Without `layer_types` the layers with windows are those that don't turn."""
    turns = layer_rope(fields, num_layers)
    if not fields["use_sliding_window"]:
        fields = {**fields, "sliding_window": None}
    elif fields.get("layer_types") is None:
        kinds = ["full_attention" if turn else "sliding_attention" for turn in turns]
        fields = {**fields, "layer_types": kinds}
    bias = bool(fields["attention_bias"])
    return plain_traits(
        num_layers,
        attention_bias=bias,
        attention_output_bias=bias,
        mlp_bias=bool(fields["mlp_bias"]),
        layer_windows=sliding_windows(fields, num_layers, first=0),
        layer_rope=turns,
    )


def _read_exaone4(fields: Fields, num_layers: int) -> ModelTraits:
    """Where some layers have windows the others know no positions."""
    windows = patterned_windows(fields, num_layers)
    has_windows = fields.get("sliding_window") is not None
    return plain_traits(
        num_layers,
        qk_norm=True,
        layer_windows=windows,
        layer_rope=tuple(window is not None or not has_windows for window in windows),
    )


def _read_granite(fields: Fields, num_layers: int) -> ModelTraits:
    bias = bool(fields["attention_bias"])
    return plain_traits(
        num_layers,
        attention_bias=bias,
        attention_output_bias=bias,
        mlp_bias=bool(fields["mlp_bias"]),
        attention_scaling=positive_number(fields, "attention_multiplier"),
        embedding_factor=positive_number(fields, "embedding_multiplier"),
        residual_factor=positive_number(fields, "residual_multiplier"),
        logit_factor=1.0 / positive_number(fields, "logits_scaling"),
    )


def _read_seed_oss(fields: Fields, num_layers: int) -> ModelTraits:
    return plain_traits(
        num_layers,
        attention_bias=bool(fields["attention_bias"]),
        attention_output_bias=bool(fields["attention_out_bias"]),
        mlp_bias=bool(fields["mlp_bias"]),
    )


def _read_glm(fields: Fields, num_layers: int) -> ModelTraits:
    return plain_traits(
        num_layers, attention_bias=bool(fields["attention_bias"]), interleaved_rope=True
    )


def _read_phi3(fields: Fields, num_layers: int) -> ModelTraits:
    """A window that holds the longest text, as Phi-4-mini's does, is none."""
    window, length = fields.get("sliding_window"), positive(fields, "max_position_embeddings")
    if isinstance(window, int) and window >= length:
        fields = {**fields, "sliding_window": None}
    return plain_traits(num_layers, layer_windows=sliding_windows(fields, num_layers, first=0))


_GLM_DEFAULTS: dict[str, Any] = {
    "vocab_size": 151552,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-07,
    "partial_rotary_factor": 0.5,
    "eos_token_id": [151329, 151336, 151338],
    "attention_bias": True,
}

SMOLLM3 = ModelFamily(
    "smollm3",
    {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "use_sliding_window": False,
        "no_rope_layer_interval": 4,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
    },
    _read_smollm3,
    rope_theta=2000000.0,
)
EXAONE4 = ModelFamily(
    "exaone4",
    {
        "vocab_size": 102400,
        "intermediate_size": 16384,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "sliding_window": 4096,
        "_sliding_window_pattern": 4,
    },
    _read_exaone4,
)
GRANITE = ModelFamily(
    "granite",
    {
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_bias": False,
        "mlp_bias": False,
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
    },
    _read_granite,
)
SEED_OSS = ModelFamily(
    "seed_oss",
    {
        "vocab_size": 155136,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 80,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 524288,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "attention_bias": True,
        "attention_out_bias": False,
        "mlp_bias": False,
    },
    _read_seed_oss,
)
ARCEE = ModelFamily(
    "arcee",
    {
        "hidden_size": 2560,
        "intermediate_size": 18432,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "hidden_act": "relu2",
    },
    read_llama,
    hidden_acts=("relu2",),
)
GLM = ModelFamily("glm", _GLM_DEFAULTS, _read_glm, rope_fields=_PARTIAL)
GLM4 = ModelFamily("glm4", _GLM_DEFAULTS, _read_glm, rope_fields=_PARTIAL)
PHI3 = ModelFamily(
    "phi3",
    {
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 32000,
    },
    _read_phi3,
    rope_fields=_PARTIAL,
)
