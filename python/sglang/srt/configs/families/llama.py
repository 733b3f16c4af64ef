"""Llama (1 to 3) and Mistral: what their fields mean."""

from __future__ import annotations

from sglang.srt.configs.model_traits import (
    Fields,
    ModelFamily,
    ModelTraits,
    layer_types,
    plain_traits,
    positive,
)


def _read_llama(fields: Fields, num_layers: int) -> ModelTraits:
    bias = bool(fields.get("attention_bias", False))
    return plain_traits(
        num_layers,
        attention_bias=bias,
        attention_output_bias=bool(fields.get("attention_output_bias", bias)),
        mlp_bias=bool(fields.get("mlp_bias", False)),
    )


def _read_mistral(fields: Fields, num_layers: int) -> ModelTraits:
    return plain_traits(num_layers, layer_windows=sliding_windows(fields, num_layers, first=0))


def sliding_windows(fields: Fields, num_layers: int, *, first: int) -> tuple[int | None, ...]:
    """Sliding window of every layer: `layer_types` where given, else of all layers from `first`."""
    if fields.get("sliding_window") is None:
        return (None,) * num_layers
    window = positive(fields, "sliding_window")
    types = layer_types(fields, num_layers, ("full_attention", "sliding_attention"))
    if types is not None:
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    return tuple(window if layer >= first else None for layer in range(num_layers))


LLAMA = ModelFamily(
    "llama",
    {
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    _read_llama,
)
MISTRAL = ModelFamily(
    "mistral",
    {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    _read_mistral,
)
