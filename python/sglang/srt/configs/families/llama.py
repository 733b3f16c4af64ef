"""Llama (1 to 3): what its fields mean, and what families read alike."""

from __future__ import annotations

from sglang.srt.configs.model_traits import (
    Fields,
    ModelFamily,
    ModelTraits,
    layer_types,
    plain_traits,
    positive,
)


def read_llama(fields: Fields, num_layers: int) -> ModelTraits:
    """Traits of a plain Llama, with the biases that the file says."""
    bias = bool(fields.get("attention_bias", False))
    return plain_traits(
        num_layers,
        attention_bias=bias,
        attention_output_bias=bool(fields.get("attention_output_bias", bias)),
        mlp_bias=bool(fields.get("mlp_bias", False)),
    )


def sliding_windows(fields: Fields, num_layers: int, *, first: int) -> tuple[int | None, ...]:
    """Sliding window of every layer: `layer_types` where given, else of all layers from `first`."""
    if fields.get("sliding_window") is None:
        return (None,) * num_layers
    window = positive(fields, "sliding_window")
    types = layer_types(fields, num_layers, ("full_attention", "sliding_attention"))
    if types is not None:
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    return tuple(window if layer >= first else None for layer in range(num_layers))


def patterned_windows(fields: Fields, num_layers: int) -> tuple[int | None, ...]:
    """As `sliding_windows`; without `layer_types` every n-th layer is global.

    n is `sliding_window_pattern`, which newer files and defaults write `_sliding_window_pattern`;
    that may also be a word such as "LLLG", repeated, whose G are the global layers.
    """
    if fields.get("layer_types") is None and fields.get("sliding_window") is not None:
        older = fields.get("sliding_window_pattern") is not None
        name = "sliding_window_pattern" if older else "_sliding_window_pattern"
        pattern = fields[name]
        if not isinstance(pattern, str):
            pattern = "L" * (positive(fields, name) - 1) + "G"
        if not pattern or set(pattern) - set("LG"):
            raise ValueError(f"{name} {pattern!r} is not one of L and G")
        kinds = {"L": "sliding_attention", "G": "full_attention"}
        types = [kinds[pattern[layer % len(pattern)]] for layer in range(num_layers)]
        fields = {**fields, "layer_types": types}
    return sliding_windows(fields, num_layers, first=0)


def layer_rope(fields: Fields, num_layers: int) -> tuple[bool, ...]:
    """Which layers turn: `no_rope_layers` has 1 for those (and is not named well); left out or
    empty, every `no_rope_layer_interval`-th does not."""
    listed = fields.get("no_rope_layers")
    if not listed:
        interval = positive(fields, "no_rope_layer_interval")
        return tuple((layer + 1) % interval != 0 for layer in range(num_layers))
    if not isinstance(listed, list) or len(listed) != num_layers or set(listed) - {0, 1}:
        raise ValueError(f"no_rope_layers must list {num_layers} of 0 or 1, not {listed!r}")
    return tuple(bool(turns) for turns in listed)


LLAMA = ModelFamily(
    "llama",
    {
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    read_llama,
)
