"""Models that can be planned for by name: the shape fields of their published config.json.

Only what decides memory and work is here; weights are never looked at. Each is read by the same
readers as a checkpoint's own file (`configs/families`), so what a field means is said once.
"""

from __future__ import annotations

from typing import Any

_SCOUT: dict[str, Any] = {
    "vocab_size": 202048,
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "attention_chunk_size": 8192,
    "interleave_moe_layer_step": 1,
    "num_local_experts": 16,
    "num_experts_per_tok": 1,
    "max_position_embeddings": 10_485_760,
    "torch_dtype": "bfloat16",
}
_LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
}
_GPT_OSS: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "sliding_window": 128,
    "num_experts_per_tok": 4,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "mxfp4"},
}
_DEEPSEEK_YARN: dict[str, Any] = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
}

KNOWN_MODELS: dict[str, dict[str, Any]] = {
    "llama-4-scout": {
        "architectures": ["Llama4ForConditionalGeneration"],
        "text_config": _SCOUT,
    },
    "llama-4-maverick": {
        "architectures": ["Llama4ForConditionalGeneration"],
        "text_config": {
            **_SCOUT,
            "interleave_moe_layer_step": 2,
            "num_local_experts": 128,
            "max_position_embeddings": 1_048_576,
        },
    },
    "llama-3.1-8b": {**_LLAMA_8B, "max_position_embeddings": 131_072},
    "llama-3.1-8b-ultralong-1m": {**_LLAMA_8B, "max_position_embeddings": 1_048_576},
    "llama-3.1-8b-ultralong-4m": {**_LLAMA_8B, "max_position_embeddings": 4_194_304},
    "qwen2.5-7b-1m": {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1_010_000,
        "torch_dtype": "bfloat16",
    },
    "gemma-3-27b": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {
            "vocab_size": 262208,
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "num_hidden_layers": 62,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 128,
            "query_pre_attn_scalar": 168,
            "sliding_window": 1024,
            "max_position_embeddings": 131_072,
            "torch_dtype": "bfloat16",
        },
    },
    "deepseek-v2-lite": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "q_lora_rank": None,
        "moe_intermediate_size": 1408,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 163_840,
        "rope_scaling": {**_DEEPSEEK_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        "torch_dtype": "bfloat16",
    },
    "deepseek-v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "max_position_embeddings": 163_840,
        "rope_scaling": _DEEPSEEK_YARN,
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "weight_block_size": [128, 128],
        },
    },
    "qwen3-next-80b-a3b": {
        "architectures": ["Qwen3NextForCausalLM"],
        "max_position_embeddings": 262_144,
        "rope_theta": 10_000_000,
        "torch_dtype": "bfloat16",
    },
    "deepseek-v3.2": {
        "architectures": ["DeepseekV32ForCausalLM"],
        "rope_scaling": _DEEPSEEK_YARN,
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "weight_block_size": [128, 128],
        },
    },
    "glm-5": {
        "architectures": ["GlmMoeDsaForCausalLM"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000},
        "torch_dtype": "bfloat16",
    },
    "gpt-oss-20b": {**_GPT_OSS, "num_hidden_layers": 24, "num_local_experts": 32},
    "gpt-oss-120b": {**_GPT_OSS, "num_hidden_layers": 36, "num_local_experts": 128},
}
