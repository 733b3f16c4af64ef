"""DeepSeek-V3.2 and GLM-5: DeepSeek-V3's fields, and those of the indexer of sparse attention.

Sources: DeepSeek-V3.2-Exp's report, arXiv 2603.12201 (choices that layers share), what is published
of the configurations of DeepSeek-V3.2, GLM-5 and GLM-5.2, and Hugging Face's config classes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sglang.srt.configs.families.deepseek import (
    BIASED,
    COMMON,
    NULLS,
    read_deepseek,
)
from sglang.srt.configs.model_traits import (
    Fields,
    IndexConfig,
    ModelFamily,
    ModelTraits,
    layer_types,
    positive,
    whole,
)


def _read_sparse(fields: Fields, num_layers: int) -> ModelTraits:
    traits = read_deepseek(fields, num_layers)
    latent, moe = traits.latent, traits.moe
    assert latent is not None
    if latent.q_rank is None:
        raise ValueError("q_lora_rank: sparse attention needs queries that come by way of latents")
    types = layer_types(fields, num_layers, ("dense", "sparse"), "mlp_layer_types")
    if types is not None and moe is not None:
        layers = frozenset(layer for layer, kind in enumerate(types) if kind == "sparse")
        moe = replace(moe, layers=layers)
    head_dim = positive(fields, "index_head_dim")
    if head_dim < latent.rope_dim:
        raise ValueError(
            f"index_head_dim {head_dim} is less than qk_rope_head_dim {latent.rope_dim}"
        )
    index = IndexConfig(
        num_heads=positive(fields, "index_n_heads"),
        head_dim=head_dim,
        topk=positive(fields, "index_topk"),
        interleaved=bool(fields["indexer_rope_interleave"]),
        layers=_choosing_layers(fields, num_layers),
    )
    return replace(traits, moe=moe, index=index)


def _choosing_layers(fields: Fields, num_layers: int) -> tuple[int, ...]:
    """Layers with an indexer: as listed, as a pattern of F and S has them, or every so many."""
    kinds = layer_types(fields, num_layers, ("full", "shared"), "indexer_types")
    pattern = fields.get("index_topk_pattern")
    if kinds is None and pattern is not None:
        if not isinstance(pattern, str) or len(pattern) != num_layers or set(pattern) - set("FS"):
            raise ValueError(f"index_topk_pattern must be {num_layers} letters F and S")
        kinds = tuple("full" if letter == "F" else "shared" for letter in pattern)
    if kinds is None:
        step = max(1, whole(fields, "index_topk_freq"))
        skipped = whole(fields, "index_skip_topk_offset")
        layers = range(num_layers)
        kinds = tuple("shared" if max(n - skipped + 1, 0) % step else "full" for n in layers)
    if kinds[0] != "full":
        raise ValueError("the first layer has no indexer before it whose choice it could share")
    return tuple(layer for layer, kind in enumerate(kinds) if kind == "full")


_SPARSE: dict[str, Any] = {
    **COMMON,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "topk_method": BIASED,
    "scoring_func": "sigmoid",
    "num_nextn_predict_layers": 1,
    "index_topk": 2048,
    "index_head_dim": 128,
    "index_topk_freq": 1,
    "index_skip_topk_offset": 2,
}
DEEPSEEK_V32 = ModelFamily(
    "deepseek_v32",
    {
        **_SPARSE,
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "n_group": 8,
        "topk_group": 4,
        "max_position_embeddings": 163840,
        "index_n_heads": 64,
        "indexer_rope_interleave": False,
    },
    _read_sparse,
    null_means_none=NULLS,
)
GLM_MOE_DSA = ModelFamily(
    "glm_moe_dsa",
    {
        **_SPARSE,
        "vocab_size": 154880,
        "hidden_size": 6144,
        "intermediate_size": 12288,
        "num_hidden_layers": 78,
        "num_attention_heads": 64,
        "q_lora_rank": 2048,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "rms_norm_eps": 1e-5,
        "n_group": 1,
        "topk_group": 1,
        "max_position_embeddings": 202752,
        "index_n_heads": 32,
        "indexer_rope_interleave": True,
    },
    _read_sparse,
    null_means_none=NULLS,
)
