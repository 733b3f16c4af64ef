"""What GGUF files of the dense families beside Llama and Qwen say, in Hugging Face's shape.

Files have no keys for some of what a family is (which layers have windows or turn): that is then
as in the published models, which the family's defaults are. `gguf_config` calls this.

Sources: the names and keys of the gguf package, and the descriptions of how files are made
(llama.cpp's pull requests 5631 and 8197 for Gemma, 9412 for Granite).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sglang.srt.configs.gguf_file import GGUFHeader, read_gguf_rows

# By architecture: that of Hugging Face, and the model type.
DENSE: dict[str, tuple[str, str]] = {
    "gemma2": ("Gemma2ForCausalLM", "gemma2"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
    "cohere2": ("Cohere2ForCausalLM", "cohere2"),
    "command-r": ("CohereForCausalLM", "cohere"),
    "olmo2": ("Olmo2ForCausalLM", "olmo2"),
    "phi3": ("Phi3ForCausalLM", "phi3"),
    "granite": ("GraniteForCausalLM", "granite"),
    "glm4": ("Glm4ForCausalLM", "glm4"),
    "smollm3": ("SmolLM3ForCausalLM", "smollm3"),
    "exaone4": ("Exaone4ForCausalLM", "exaone4"),
    "seed_oss": ("SeedOssForCausalLM", "seed_oss"),
    "arcee": ("ArceeForCausalLM", "arcee"),
}
WINDOWED = frozenset({"gemma2", "gemma3", "cohere2", "olmo2", "phi3", "exaone4"})
PARTIAL = frozenset({"phi3", "glm4"})  # of whose heads a part may turn
_GRANITE_KEYS = frozenset({"attention.scale", "embedding_scale", "residual_scale", "logit_scale"})
_CAPS = frozenset({"attn_logit_softcapping", "final_logit_softcapping"})
# Keys that change the answer and that are read here, of those that other families refuse.
READ_KEYS: dict[str, frozenset[str]] = {
    "gemma2": _CAPS,
    "gemma3": _CAPS,
    "cohere2": frozenset({"logit_scale"}),
    "command-r": frozenset({"logit_scale"}),
    "granite": _GRANITE_KEYS,
    "granitemoe": _GRANITE_KEYS,
}
_GRANITE_FIELDS = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
# Layers of the 27B, whose scores go by hidden / heads, the others' by the width of a head.
_LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}
_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
LONG_ROPE_TENSORS = frozenset({_LONG, _SHORT})

Get = Callable[..., Any]  # (key, default): a scalar, or what all layers have in common


def dense_fields(name: str, header: GGUFHeader, get: Get, raw: Mapping[str, Any]) -> dict[str, Any]:
    """What architecture `name` has beside `raw`; ValueError for what is not supported."""
    fields: dict[str, Any] = {}
    if name in WINDOWED:
        fields |= _window_fields(name, header, get)
    if name in ("cohere2", "command-r"):
        fields["use_qk_norm"] = "blk.0.attn_q_norm.weight" in header.tensors
        fields["layer_norm_eps"] = float(get("attention.layer_norm_epsilon", 1e-5))
        fields["logit_scale"] = float(get("logit_scale", 1.0))
    if name in ("granite", "granitemoe"):
        found = {ours: get(key) for key, ours in _GRANITE_FIELDS.items()}
        fields |= {ours: float(value) for ours, value in found.items() if value}
    if name in _LARGEST_GEMMA:
        scalar = raw["head_dim"]
        if raw["num_hidden_layers"] == _LARGEST_GEMMA[name]:
            scalar = raw["hidden_size"] // raw["num_attention_heads"]
        fields["query_pre_attn_scalar"] = scalar
        fields |= {key: float(get(key, 0.0)) or None for key in _CAPS}
        fields["rope_local_base_freq"] = float(get("rope.freq_base_swa", 10000.0))
    if name == "arcee":
        fields["mlp_bias"] = "blk.0.ffn_up.bias" in header.tensors
    if name == "seed_oss":
        fields["attention_out_bias"] = raw["attention_output_bias"]
    return fields


def _window_fields(name: str, header: GGUFHeader, get: Get) -> dict[str, Any]:
    """The window, and of which layers where the file says so: a truth value for each."""
    window = int(get("attention.sliding_window", 0)) or None
    fields: dict[str, Any] = {"sliding_window": window}
    pattern = header.metadata.get(f"{name}.attention.sliding_window_pattern")
    if window is not None and isinstance(pattern, np.ndarray):
        kinds = ("full_attention", "sliding_attention")
        fields["layer_types"] = [kinds[bool(slides)] for slides in pattern.tolist()]
    if name == "olmo2" and window is not None:  # the files of both are called so
        fields |= {"architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3"}
    return fields


def long_rope_fields(header: GGUFHeader, get: Get) -> dict[str, Any]:
    """The factors of LongRoPE, of a file that has them, else nothing; ValueError for one list."""
    tensors = [header.tensors.get(name) for name in (_SHORT, _LONG)]
    if tensors == [None, None]:
        return {}
    short, long = (
        None if info is None else read_gguf_rows(header.path, info, 0, 1)[0].tolist()
        for info in tensors
    )
    original = get("rope.scaling.original_context_length")
    if short is None or long is None or not original:
        raise ValueError(f"longrope needs tensors {_SHORT} and {_LONG} and the original length")
    fields = {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": int(original),
    }
    factor = get("rope.scaling.attn_factor")
    return fields if factor is None else {**fields, "attention_factor": float(factor)}
