"""Tiny fields of the dense families that are Llama's but for norms, windows, factors, rotation.

Windows are of 12 tokens and layers are few, so that prompts of a test cross everything.
"""

from typing import Any

from transformers import (
    ArceeConfig,
    ArceeForCausalLM,
    Cohere2Config,
    Cohere2ForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Exaone4Config,
    Exaone4ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Glm4Config,
    Glm4ForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    SeedOssConfig,
    SeedOssForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

DENSE_FAMILIES: dict[str, tuple[Any, type[PreTrainedModel]]] = {
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
    "cohere2": (Cohere2Config, Cohere2ForCausalLM),
    "cohere": (CohereConfig, CohereForCausalLM),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM),
    "olmo3": (Olmo3Config, Olmo3ForCausalLM),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM),
    "exaone4": (Exaone4Config, Exaone4ForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
    "granite": (GraniteConfig, GraniteForCausalLM),
    "ministral": (MinistralConfig, MinistralForCausalLM),
    "ministral3": (Ministral3Config, Ministral3ForCausalLM),
    "glm": (GlmConfig, GlmForCausalLM),
    "glm4": (Glm4Config, Glm4ForCausalLM),
    "seed_oss": (SeedOssConfig, SeedOssForCausalLM),
    "arcee": (ArceeConfig, ArceeForCausalLM),
}
WINDOW = 12
_MIXED = {
    "num_hidden_layers": 4,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_YARN = {
    "rope_type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 1e3,
}
# Of 4 or 3 pairs that turn.
LONG_ROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.2, 1.5],
    "long_factor": [1.5, 3.0, 6.0],
    "rope_theta": 1e3,
}
DENSE_FIELDS: dict[str, dict[str, Any]] = {
    "gemma2": {
        **_MIXED,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 2.5,
        "tie_word_embeddings": True,
    },
    "cohere2": {
        **_MIXED,
        "head_dim": 16,
        "logit_scale": 0.75,
        "tie_word_embeddings": True,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    },
    "cohere": {"logit_scale": 0.5, "attention_bias": True},
    "olmo2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e3}},
    "olmo3": {
        **_MIXED,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            "full_attention": _YARN,
        },
    },
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 1], "attention_bias": True},
    "exaone4": _MIXED,
    "phi3": {
        "sliding_window": WINDOW,
        "original_max_position_embeddings": 64,
        "partial_rotary_factor": 0.375,
        "rope_parameters": {**LONG_ROPE, "partial_rotary_factor": 0.375},
    },
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
        "logits_scaling": 1.7,
        "mlp_bias": True,
    },
    "ministral": {**_MIXED, "head_dim": 16},
    "ministral3": {
        "head_dim": 16,
        "rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.4, "mscale": 1.0},
    },
    "glm": {"head_dim": 16, "attention_bias": True},
    "glm4": {"head_dim": 16, "attention_bias": True},
    "seed_oss": {"head_dim": 16, "attention_out_bias": True, "mlp_bias": True},
    "arcee": {"mlp_bias": True},
}
