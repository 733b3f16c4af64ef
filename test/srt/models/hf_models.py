"""Tiny random transformers models of every family, saved where our loader can read them."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from srt.models.hf_dense import DENSE_FAMILIES, DENSE_FIELDS
from srt.models.hf_mixtures import MIXTURE_FAMILIES, MIXTURE_FIELDS

FAMILIES: dict[str, tuple[Any, type[PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
MOE_FAMILIES: dict[str, tuple[Any, type[PreTrainedModel]]] = {
    "llama4": (Llama4TextConfig, Llama4ForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}
MIXED_FAMILIES: dict[str, tuple[Any, type[PreTrainedModel]]] = {
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
    "gpt_oss": (GptOssConfig, GptOssForCausalLM),
}
LATENT_FAMILIES: dict[str, tuple[Any, type[PreTrainedModel]]] = {
    "deepseek_v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
}
SPARSE_FAMILIES: dict[str, tuple[Any, type[PreTrainedModel]]] = {
    "deepseek_v32": (DeepseekV32Config, DeepseekV32ForCausalLM),
    "glm_moe_dsa": (GlmMoeDsaConfig, GlmMoeDsaForCausalLM),
}
HYBRID_FAMILIES: dict[str, tuple[Any, type[PreTrainedModel]]] = {
    "qwen3_5": (Qwen3_5TextConfig, Qwen3_5ForCausalLM),
    "qwen3_5_moe": (Qwen3_5MoeTextConfig, Qwen3_5MoeForCausalLM),
    "qwen3_next": (Qwen3NextConfig, Qwen3NextForCausalLM),
}
CHUNK = 24
WINDOW = 20
MOE_FIELDS: dict[str, dict[str, Any]] = {
    "llama4": {
        "intermediate_size": 40,
        "intermediate_size_mlp": 96,
        "num_hidden_layers": 4,
        "num_local_experts": 4,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": CHUNK,
        "floor_scale": 16,
        "attn_scale": 0.3,
        "head_dim": 16,
    },
    "qwen3_moe": {
        "moe_intermediate_size": 24,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
        "head_dim": 16,
    },
}
MIXED_FIELDS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "head_dim": 16,
        "num_hidden_layers": 4,
        "query_pre_attn_scalar": 24,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5},
        },
        "tie_word_embeddings": True,
    },
    "gpt_oss": {
        "head_dim": 16,
        "num_hidden_layers": 4,
        "intermediate_size": 40,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "sliding_window": WINDOW,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 8.0,
            "beta_fast": 8.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
            "rope_theta": 1e3,
        },
    },
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 4.0,
        "beta_fast": 8.0,
        "beta_slow": 1.0,
        "mscale": 0.707,
        "mscale_all_dim": 0.5,
        "original_max_position_embeddings": 64,
        "rope_theta": 1e3,
    },
}
LATENT_FIELDS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        **_LATENT,
        "n_shared_experts": 2,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 3.0,
    },
    "deepseek_v3": {**_LATENT, "n_shared_experts": 1, "n_group": 4, "topk_group": 2},
}
# A query sees 12 tokens; so many index heads that no score is exactly 0, where ties would be.
_INDEX: dict[str, Any] = {
    "kv_lora_rank": 40,  # rows of 48 numbers, which the native kernels serve
    "index_topk": 12,
    "index_head_dim": 16,
    "index_n_heads": 16,
}
SPARSE_FIELDS: dict[str, dict[str, Any]] = {
    "deepseek_v32": {**_LATENT, **_INDEX, "n_shared_experts": 1, "n_group": 4, "topk_group": 2},
    "glm_moe_dsa": {
        **_LATENT,
        **_INDEX,
        "n_shared_experts": 1,
        "num_hidden_layers": 4,
        "indexer_types": ["full", "full", "shared", "shared"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e3},
    },
}
_HYBRID: dict[str, Any] = {
    "head_dim": 16,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
_HYBRID_EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
    "num_experts": 6,
    "num_experts_per_tok": 2,
}
HYBRID_FIELDS: dict[str, dict[str, Any]] = {
    "qwen3_5": _HYBRID,
    "qwen3_5_moe": {**_HYBRID, **_HYBRID_EXPERTS},
    "qwen3_next": {
        **_HYBRID,
        **_HYBRID_EXPERTS,
        "num_hidden_layers": 4,
        "layer_types": [*["linear_attention"] * 3, "full_attention"],
        "mlp_only_layers": [1],
    },
}
LITE: dict[str, Any] = {  # as DeepSeek-V2-Lite differs from V2
    "q_lora_rank": None,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
}
VOCAB = 160


def make_hf_model(family: str, **changes: Any) -> PreTrainedModel:
    """A random model in float32 with biases and norms that matter; same arguments, same weights.

    Weights are larger than a fresh model's, so that attention and logits are far from uniform.
    """
    families = {
        **FAMILIES,
        **MOE_FAMILIES,
        **MIXED_FAMILIES,
        **LATENT_FAMILIES,
        **DENSE_FAMILIES,
        **MIXTURE_FAMILIES,
        **SPARSE_FAMILIES,
        **HYBRID_FAMILIES,
    }
    config_class, model_class = families[family]
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "attn_implementation": "eager",
        **MOE_FIELDS.get(family, {}),
        **MIXED_FIELDS.get(family, {}),
        **LATENT_FIELDS.get(family, {}),
        **DENSE_FIELDS.get(family, {}),
        **MIXTURE_FIELDS.get(family, {}),
        **SPARSE_FIELDS.get(family, {}),
        **HYBRID_FIELDS.get(family, {}),
        **changes,
    }
    if family == "qwen3":
        fields.setdefault("head_dim", 16)
    generator = torch.Generator().manual_seed(20)
    with torch.random.fork_rng():
        torch.manual_seed(20)
        model = model_class(config_class(**fields)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                scale = 1.0 if "embed_tokens" in name else 1.2 / parameter.shape[-1] ** 0.5
                if family.startswith("gemma") and "embed_tokens" in name:
                    # The model scales it up again; larger, the input's own token always wins.
                    scale = 3.0 / parameter.shape[-1]
                elif family == "cohere2" and "embed_tokens" in name:
                    scale = 0.2  # it is the head, too
                parameter.copy_(noise * scale)
            else:
                parameter.copy_(noise * 0.2 + (0.0 if name.endswith("bias") else 1.0))
            if name.endswith("A_log"):
                parameter.sub_(4.0)  # states that remember tens of tokens
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # so that some experts are chosen by it
                last = buffer.shape[-1]
                buffer.copy_(torch.linspace(-0.2, 0.2, last).roll(len(name) % 5).expand_as(buffer))
    return model


def hf_greedy(model: PreTrainedModel, prompt: list[int], num_new: int) -> list[int]:
    """transformers' own cached decoding, one request at a time, past any end-of-text token."""
    ids = torch.tensor([prompt])
    answer: torch.Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_new,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
    )
    return answer[0, len(prompt) :].tolist()


def best_next(model: PreTrainedModel, prompt: list[int], output: list[int]) -> list[int]:
    """What transformers takes for the best after every token before an output's, in one pass.

    An output that equals it is the greedy one, token by token, of a model without a cache.
    """
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + output]), use_cache=False).logits[0]
    best: list[int] = logits.argmax(-1)[len(prompt) - 1 : -1].tolist()
    return best


def save(model: PreTrainedModel, folder: Path, **arguments: Any) -> str:
    """save_pretrained, returning the path as a string."""
    model.save_pretrained(folder, **arguments)
    return str(folder)
