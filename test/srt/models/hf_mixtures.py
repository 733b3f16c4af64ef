"""Families of mixtures that test_mixtures.py compares with transformers, in tiny shapes."""

from __future__ import annotations

from typing import Any

from transformers import (
    Dots1Config,
    Dots1ForCausalLM,
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    GraniteMoeSharedConfig,
    GraniteMoeSharedForCausalLM,
    HunYuanMoEV1Config,
    HunYuanMoEV1ForCausalLM,
    MiniMaxM2Config,
    MiniMaxM2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

MIXTURE_FAMILIES: dict[str, tuple[Any, type[PreTrainedModel]]] = {
    "glm4_moe": (Glm4MoeConfig, Glm4MoeForCausalLM),
    "glm4_moe_lite": (Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM),
    "dots1": (Dots1Config, Dots1ForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM),
    "ernie4_5_moe": (Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM),
    "phimoe": (PhimoeConfig, PhimoeForCausalLM),
    "minimax_m2": (MiniMaxM2Config, MiniMaxM2ForCausalLM),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM),
    "granitemoe": (GraniteMoeConfig, GraniteMoeForCausalLM),
    "granitemoeshared": (GraniteMoeSharedConfig, GraniteMoeSharedForCausalLM),
    "hunyuan_v1_moe": (HunYuanMoEV1Config, HunYuanMoEV1ForCausalLM),
}
_GRANITE: dict[str, Any] = {
    "intermediate_size": 40,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "attention_multiplier": 0.3,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 1.5,
}
_IN_GROUPS: dict[str, Any] = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
}
MIXTURE_FIELDS: dict[str, dict[str, Any]] = {
    "glm4_moe": {**_IN_GROUPS, "head_dim": 16, "use_qk_norm": True, "attention_bias": True},
    "glm4_moe_lite": {
        **_IN_GROUPS,
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
    },
    "dots1": {**_IN_GROUPS, "head_dim": 16, "n_shared_experts": 2},
    "mixtral": {"num_local_experts": 6, "sliding_window": None},
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "mlp_only_layers": [1],
    },
    "ernie4_5_moe": {
        "moe_intermediate_size": 24,
        "moe_num_experts": 6,
        "moe_k": 2,
        "moe_num_shared_experts": 2,
    },
    "phimoe": {
        "intermediate_size": 40,
        "num_local_experts": 6,
        "router_jitter_noise": 0.3,  # so that weights are not all 1
        "attention_bias": True,
        "lm_head_bias": True,
    },
    "minimax_m2": {
        "intermediate_size": 40,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e3,
            "partial_rotary_factor": 0.5,
        },
    },
    "olmoe": {"intermediate_size": 40, "num_experts": 6, "num_experts_per_tok": 2},
    "granitemoe": _GRANITE,
    "granitemoeshared": {**_GRANITE, "shared_intermediate_size": 24},
    "hunyuan_v1_moe": {
        "intermediate_size": 40,
        "num_experts": 6,
        "moe_topk": 2,
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "dynamic",
            "factor": 1.0,
            "alpha": 50.0,
            "rope_theta": 1e3,
        },
    },
}
