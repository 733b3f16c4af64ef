"""What GGUF files of DeepSeek-V2 and V3 say of latents and experts, in Hugging Face's shape.

Such files come in two ages. Older ones have the weight between latents and heads whole
(`attn_kv_b`) and the widths of heads as `key_length` and `value_length`; newer ones have it in two
parts (`attn_k_b`, `attn_v_b`), say what is kept of a token under these keys, and the widths of
heads under `key_length_mla` and `value_length_mla`. `gguf_config` calls this.

Sources: the names and keys of the gguf package, metadata of published files, and the descriptions
of the two ages (llama.cpp's pull requests 12772 and 12801).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gguf

from sglang.srt.configs.gguf_file import GGUFTensorInfo

LATENT = frozenset({"deepseek2"})  # architectures

_GATING = {
    gguf.ExpertGatingFuncType.SOFTMAX: "softmax",
    gguf.ExpertGatingFuncType.SIGMOID: "sigmoid",
}
_BIAS = ".exp_probs_b.bias"


def latent_fields(get: Callable[[str, Any], Any], need: Callable[[str], int]) -> dict[str, Any]:
    """Ranks and widths. `get` (key, default) and `need` look keys up; a lack is a ValueError."""
    rope_dim = need("rope.dimension_count")
    key = get("attention.key_length_mla", None) or need("attention.key_length")
    value = get("attention.value_length_mla", None) or need("attention.value_length")
    rank = get("attention.q_lora_rank", None)
    return {
        "q_lora_rank": None if not rank else int(rank),
        "kv_lora_rank": need("attention.kv_lora_rank"),
        "qk_nope_head_dim": int(key) - rope_dim,
        "qk_rope_head_dim": rope_dim,
        "v_head_dim": int(value),
    }


def latent_expert_fields(
    get: Callable[[str, Any], Any],
    need: Callable[[str], int],
    tensors: Mapping[str, GGUFTensorInfo],
) -> dict[str, Any]:
    """How experts are chosen, and their widths. Files that name no groups have one.

    Raises ValueError for a way to choose that no published model has.
    """
    if not get("expert_count", 0):
        return {"n_routed_experts": None}
    function = get("expert_gating_func", 0) or 1
    gating = _GATING.get(function)
    if gating is None:
        raise ValueError(f"expert_gating_func {function} is neither softmax nor sigmoid")
    groups = int(get("expert_group_count", 0) or 1)
    method = "greedy" if groups == 1 else "group_limited_greedy"
    if any(name.endswith(_BIAS) for name in tensors):
        method = "noaux_tc"
    return {
        "n_routed_experts": need("expert_count"),
        "num_experts_per_tok": need("expert_used_count"),
        "moe_intermediate_size": need("expert_feed_forward_length"),
        "n_shared_experts": int(get("expert_shared_count", 0)) or None,
        "first_k_dense_replace": int(get("leading_dense_block_count", 0)),
        "routed_scaling_factor": float(get("expert_weights_scale", 0.0)) or 1.0,
        "norm_topk_prob": bool(get("expert_weights_norm", False)),
        "scoring_func": gating,
        "topk_method": method,
        "n_group": groups,
        "topk_group": int(get("expert_group_used_count", 0) or 1),
    }


def latent_yarn_fields(get: Callable[[str, Any], Any]) -> dict[str, float]:
    """The two magnitudes, which are one in these files: a tenth of it is what they say."""
    if get("rope.scaling.attn_factor", None) or get("rope.scaling.yarn_attn_factor", None):
        raise ValueError("rope.scaling.attn_factor of latent attention is not supported")
    tenth = get("rope.scaling.yarn_log_multiplier", None)
    if not tenth:
        return {}
    magnitude = round(10.0 * float(tenth), 6)  # a float32 in the file
    return {"mscale": magnitude, "mscale_all_dim": magnitude}
