"""Which class computes which architecture: one explicit table, imported on demand."""

from __future__ import annotations

import importlib

from sglang.srt.models.causal_lm import CausalLM

MODEL_CLASSES = {
    "LlamaForCausalLM": "sglang.srt.models.llama:LlamaForCausalLM",
    "MistralForCausalLM": "sglang.srt.models.mistral:MistralForCausalLM",
    "MinistralForCausalLM": "sglang.srt.models.mistral:MinistralForCausalLM",
    "Ministral3ForCausalLM": "sglang.srt.models.mistral:Ministral3ForCausalLM",
    "Mistral3ForConditionalGeneration": (
        "sglang.srt.models.mistral:Mistral3ForConditionalGeneration"
    ),
    "Qwen2ForCausalLM": "sglang.srt.models.qwen2:Qwen2ForCausalLM",
    "Qwen3ForCausalLM": "sglang.srt.models.qwen3:Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM": "sglang.srt.models.qwen3_moe:Qwen3MoeForCausalLM",
    "Llama4ForCausalLM": "sglang.srt.models.llama4:Llama4ForCausalLM",
    "Llama4ForConditionalGeneration": "sglang.srt.models.llama4:Llama4ForConditionalGeneration",
    "Gemma2ForCausalLM": "sglang.srt.models.gemma:Gemma2ForCausalLM",
    "Gemma3ForCausalLM": "sglang.srt.models.gemma:Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration": "sglang.srt.models.gemma:Gemma3ForConditionalGeneration",
    "CohereForCausalLM": "sglang.srt.models.cohere:CohereForCausalLM",
    "Cohere2ForCausalLM": "sglang.srt.models.cohere:Cohere2ForCausalLM",
    "Olmo2ForCausalLM": "sglang.srt.models.olmo2:Olmo2ForCausalLM",
    "Olmo3ForCausalLM": "sglang.srt.models.olmo2:Olmo3ForCausalLM",
    "SmolLM3ForCausalLM": "sglang.srt.models.dense:SmolLM3ForCausalLM",
    "Exaone4ForCausalLM": "sglang.srt.models.dense:Exaone4ForCausalLM",
    "Phi3ForCausalLM": "sglang.srt.models.fused:Phi3ForCausalLM",
    "GraniteForCausalLM": "sglang.srt.models.dense:GraniteForCausalLM",
    "GlmForCausalLM": "sglang.srt.models.fused:GlmForCausalLM",
    "Glm4ForCausalLM": "sglang.srt.models.fused:Glm4ForCausalLM",
    "SeedOssForCausalLM": "sglang.srt.models.dense:SeedOssForCausalLM",
    "ArceeForCausalLM": "sglang.srt.models.dense:ArceeForCausalLM",
    "GptOssForCausalLM": "sglang.srt.models.gpt_oss:GptOssForCausalLM",
    "DeepseekV2ForCausalLM": "sglang.srt.models.deepseek_v2:DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM": "sglang.srt.models.deepseek_v2:DeepseekV3ForCausalLM",
    "Glm4MoeForCausalLM": "sglang.srt.models.glm4_moe:Glm4MoeForCausalLM",
    "Glm4MoeLiteForCausalLM": "sglang.srt.models.glm4_moe:Glm4MoeLiteForCausalLM",
    "Dots1ForCausalLM": "sglang.srt.models.dots1:Dots1ForCausalLM",
    "MixtralForCausalLM": "sglang.srt.models.mixtral:MixtralForCausalLM",
    "Qwen2MoeForCausalLM": "sglang.srt.models.qwen2_moe:Qwen2MoeForCausalLM",
    "Ernie4_5_MoeForCausalLM": "sglang.srt.models.ernie4_5_moe:Ernie4_5_MoeForCausalLM",
    "PhimoeForCausalLM": "sglang.srt.models.phimoe:PhimoeForCausalLM",
    "PhiMoEForCausalLM": "sglang.srt.models.phimoe:PhiMoEForCausalLM",
    "MiniMaxM2ForCausalLM": "sglang.srt.models.minimax_m2:MiniMaxM2ForCausalLM",
    "OlmoeForCausalLM": "sglang.srt.models.olmoe:OlmoeForCausalLM",
    "FlexOlmoForCausalLM": "sglang.srt.models.olmoe:FlexOlmoForCausalLM",
    "ExaoneMoeForCausalLM": "sglang.srt.models.exaone_moe:ExaoneMoeForCausalLM",
    "GraniteMoeForCausalLM": "sglang.srt.models.granitemoe:GraniteMoeForCausalLM",
    "GraniteMoeSharedForCausalLM": "sglang.srt.models.granitemoe:GraniteMoeSharedForCausalLM",
    "HunYuanMoEV1ForCausalLM": "sglang.srt.models.hunyuan_moe:HunYuanMoEV1ForCausalLM",
}


def resolve_model_class(architecture: str) -> type[CausalLM]:
    """The class of `architecture`; ValueError, naming the known ones, when there is none."""
    place = MODEL_CLASSES.get(architecture)
    if place is None:
        raise ValueError(
            f"unsupported architecture {architecture!r}; supported: {', '.join(MODEL_CLASSES)}"
        )
    module_name, _, class_name = place.partition(":")
    model_class: type[CausalLM] = getattr(importlib.import_module(module_name), class_name)
    return model_class
