"""DeepSeek-V2, V3 and R1, and models with their config such as Kimi-K2: what its fields mean.

Sources: arXiv 2405.04434 and 2412.19437, the published configurations of DeepSeek-V2-Lite, V2 and
V3, and the Hugging Face pages of the two config classes.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.configs.model_traits import (
    ExpertChoice,
    Fields,
    LatentConfig,
    ModelFamily,
    ModelTraits,
    MoEConfig,
    layer_types,
    plain_traits,
    positive,
    positive_number,
    whole,
)

_GREEDY, _IN_GROUPS, BIASED = "greedy", "group_limited_greedy", "noaux_tc"


def read_deepseek(fields: Fields, num_layers: int) -> ModelTraits:
    """Traits of V2 and V3; ValueError naming an impossible field."""
    if fields.get("mlp_bias"):
        raise ValueError("mlp_bias is not supported in DeepSeek's models")
    bias = bool(fields["attention_bias"])
    return plain_traits(
        num_layers,
        attention_bias=bias,
        attention_output_bias=bias,
        interleaved_rope=bool(fields["rope_interleave"]),
        latent=_latent(fields),
        moe=grouped_experts(fields, num_layers),
        num_draft_layers=whole(fields, "num_nextn_predict_layers"),
    )


def _latent(fields: Fields) -> LatentConfig:
    rope_dim = positive(fields, "qk_rope_head_dim")
    if rope_dim % 2:
        raise ValueError(f"qk_rope_head_dim {rope_dim} must be even for rotary embeddings")
    return LatentConfig(
        q_rank=None if fields.get("q_lora_rank") is None else positive(fields, "q_lora_rank"),
        kv_rank=positive(fields, "kv_lora_rank"),
        nope_dim=positive(fields, "qk_nope_head_dim"),
        rope_dim=rope_dim,
        v_dim=positive(fields, "v_head_dim"),
    )


def grouped_experts(fields: Fields, num_layers: int) -> MoEConfig | None:
    """The mixtures of DeepSeek's fields, which other families have too; None without experts.

    Those layers have one that `mlp_layer_types` calls sparse, else every `moe_layer_freq`-th from
    `first_k_dense_replace` on. Raises ValueError naming an impossible field.
    """
    if fields.get("n_routed_experts") is None:
        return None
    num_experts = positive(fields, "n_routed_experts")
    chosen = positive(fields, "num_experts_per_tok")
    choice = _choice(fields, num_experts)
    candidates = num_experts // choice.num_groups * choice.kept_groups
    if chosen > candidates:
        raise ValueError(
            f"num_experts_per_tok {chosen} is more than {candidates} experts to choose from"
        )
    width = positive(fields, "moe_intermediate_size")
    shared = None
    if fields.get("n_shared_experts"):
        shared = width * positive(fields, "n_shared_experts")
    return MoEConfig(
        layers=_sparse_layers(fields, num_layers),
        num_experts=num_experts,
        experts_per_token=chosen,
        intermediate_size=width,
        shared_intermediate_size=shared,
        renormalize=bool(fields["norm_topk_prob"]) and chosen > 1,
        choice=choice,
    )


def _sparse_layers(fields: Fields, num_layers: int) -> frozenset[int]:
    types = layer_types(fields, num_layers, ("dense", "sparse"), "mlp_layer_types")
    if types is not None:
        return frozenset(layer for layer, kind in enumerate(types) if kind == "sparse")
    first, step = whole(fields, "first_k_dense_replace"), positive(fields, "moe_layer_freq")
    return frozenset(layer for layer in range(first, num_layers) if layer % step == 0)


def _choice(fields: Fields, num_experts: int) -> ExpertChoice:
    method, scoring = fields["topk_method"], fields["scoring_func"]
    if method not in (_GREEDY, _IN_GROUPS, BIASED):
        raise ValueError(
            f"topk_method {method!r} is not supported; {_GREEDY}, {_IN_GROUPS}, {BIASED} are"
        )
    if scoring not in ("softmax", "sigmoid"):
        raise ValueError(f"scoring_func {scoring!r} is not supported; softmax and sigmoid are")
    num_groups = kept = 1
    if method != _GREEDY and fields.get("n_group") is not None:
        num_groups, kept = positive(fields, "n_group"), positive(fields, "topk_group")
    group_best = 2 if method == BIASED else 1
    if num_experts % num_groups or kept > num_groups:
        raise ValueError(f"topk_group {kept} of n_group {num_groups} over {num_experts} experts")
    if num_groups > 1 and num_experts // num_groups < group_best:
        raise ValueError(f"n_group {num_groups} leaves groups of one of {num_experts} experts")
    return ExpertChoice(
        sigmoid=scoring == "sigmoid",
        biased=method == BIASED,
        num_groups=num_groups,
        kept_groups=kept,
        group_best=group_best,
        scaling=positive_number(fields, "routed_scaling_factor"),
    )


# Of families whose routers are DeepSeek-V3's and whose files have its fields only in part.
BIASED_EXPERTS: dict[str, Any] = {
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "topk_method": BIASED,
    "scoring_func": "sigmoid",
}
COMMON: dict[str, Any] = {
    "num_hidden_layers": 32,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rope_interleave": True,
    "attention_bias": False,
    "moe_layer_freq": 1,
    "max_position_embeddings": 4096,
}
NULLS = frozenset(
    {"q_lora_rank", "bos_token_id", "eos_token_id"}
    | {"n_routed_experts", "n_shared_experts", "n_group", "topk_group"}
)

DEEPSEEK_V2 = ModelFamily(
    "deepseek_v2",
    {
        **COMMON,
        "vocab_size": 102400,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "intermediate_size": 11008,
        "moe_intermediate_size": 1407,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 0,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "topk_method": _GREEDY,
        "scoring_func": "softmax",
        "max_position_embeddings": 2048,
        "num_nextn_predict_layers": 0,
    },
    read_deepseek,
    null_means_none=NULLS,
)
DEEPSEEK_V3 = ModelFamily(
    "deepseek_v3",
    {
        **COMMON,
        "vocab_size": 129280,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "topk_method": BIASED,
        "scoring_func": "sigmoid",
        "num_nextn_predict_layers": 1,
    },
    read_deepseek,
    null_means_none=NULLS,
)
