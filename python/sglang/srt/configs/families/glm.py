"""GLM-4.5, 4.6 and 4.7, dots.llm1 and K-EXAONE: DeepSeek-V3's experts under other attention.

Sources: arXiv 2508.06471 and 2506.05767, the published configurations of GLM-4.5, GLM-4.5-Air,
GLM-4.7-Flash, dots.llm1 and K-EXAONE, and the Hugging Face pages of the config classes.
"""

from __future__ import annotations

from dataclasses import replace

from sglang.srt.configs.families.deepseek import (
    BIASED_EXPERTS,
    DEEPSEEK_V3,
    grouped_experts,
)
from sglang.srt.configs.families.dense import EXAONE4
from sglang.srt.configs.families.llama import sliding_windows
from sglang.srt.configs.model_traits import (
    Fields,
    ModelFamily,
    ModelTraits,
    plain_traits,
    whole,
)


def _read_glm4_moe(fields: Fields, num_layers: int) -> ModelTraits:
    return plain_traits(
        num_layers,
        attention_bias=bool(fields["attention_bias"]),  # there is none of the output
        qk_norm=bool(fields["use_qk_norm"]),
        moe=grouped_experts(fields, num_layers),
        num_draft_layers=whole(fields, "num_nextn_predict_layers"),
    )


def _read_dots1(fields: Fields, num_layers: int) -> ModelTraits:
    bias = bool(fields["attention_bias"])
    return plain_traits(
        num_layers,
        attention_bias=bias,
        attention_output_bias=bias,
        qk_norm=True,
        layer_windows=sliding_windows(fields, num_layers, first=whole(fields, "max_window_layers")),
        moe=grouped_experts(fields, num_layers),
    )


def _read_exaone_moe(fields: Fields, num_layers: int) -> ModelTraits:
    named = {
        **fields,
        "n_routed_experts": fields["num_experts"],
        "n_shared_experts": fields["num_shared_experts"],
    }
    return replace(
        EXAONE4.read_traits(fields, num_layers),
        moe=grouped_experts(named, num_layers),
        draft_prefix="mtp.",
        weight_names=((".mlp.e_score_correction_bias", ".mlp.gate.e_score_correction_bias"),),
    )


GLM4_MOE = ModelFamily(
    "glm4_moe",
    {
        **BIASED_EXPERTS,
        "vocab_size": 151552,
        "intermediate_size": 10944,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,  # as published; hidden_size is no multiple of the heads
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "partial_rotary_factor": 0.5,
        "attention_bias": False,
        "use_qk_norm": False,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "num_nextn_predict_layers": 1,
    },
    _read_glm4_moe,
    rope_fields=frozenset({"partial_rotary_factor"}),
)
# GLM-4.7-Flash has DeepSeek's attention, too.
GLM4_MOE_LITE = replace(
    DEEPSEEK_V3,
    model_type="glm4_moe_lite",
    defaults={
        **DEEPSEEK_V3.defaults,
        **BIASED_EXPERTS,
        "vocab_size": 154880,
        "hidden_size": 2048,
        "intermediate_size": 10240,
        "num_hidden_layers": 47,
        "num_attention_heads": 20,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 202752,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "moe_intermediate_size": 1536,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "routed_scaling_factor": 1.8,
    },
)
DOTS1 = ModelFamily(
    "dots1",
    {
        **BIASED_EXPERTS,
        "vocab_size": 152064,
        "hidden_size": 4608,
        "intermediate_size": 10944,
        "num_hidden_layers": 62,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "sliding_window": 4096,
        "max_window_layers": 62,
        "moe_intermediate_size": 1408,
        "first_k_dense_replace": 0,
        "norm_topk_prob": False,
    },
    _read_dots1,
)
EXAONE_MOE = ModelFamily(
    "exaone_moe",
    {
        **BIASED_EXPERTS,
        "vocab_size": 102400,
        "intermediate_size": 16384,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 53,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "moe_intermediate_size": 1024,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_shared_experts": 1,
        "routed_scaling_factor": 2.5,
    },
    _read_exaone_moe,
)
