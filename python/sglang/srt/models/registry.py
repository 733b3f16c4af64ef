"""Which class computes which architecture: one explicit table, imported on demand."""

from __future__ import annotations

import importlib

from sglang.srt.models.causal_lm import CausalLM

MODEL_CLASSES = {
    "LlamaForCausalLM": "sglang.srt.models.llama:LlamaForCausalLM",
    "MistralForCausalLM": "sglang.srt.models.mistral:MistralForCausalLM",
    "Qwen2ForCausalLM": "sglang.srt.models.qwen2:Qwen2ForCausalLM",
    "Qwen3ForCausalLM": "sglang.srt.models.qwen3:Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM": "sglang.srt.models.qwen3_moe:Qwen3MoeForCausalLM",
    "Qwen3NextForCausalLM": "sglang.srt.models.qwen3_next:Qwen3NextForCausalLM",
    "Qwen3_5ForCausalLM": "sglang.srt.models.qwen3_5:Qwen3_5ForCausalLM",
    "Qwen3_5ForConditionalGeneration": "sglang.srt.models.qwen3_5:Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForCausalLM": "sglang.srt.models.qwen3_5:Qwen3_5MoeForCausalLM",
    "Qwen3_5MoeForConditionalGeneration": (
        "sglang.srt.models.qwen3_5:Qwen3_5MoeForConditionalGeneration"
    ),
    "Llama4ForCausalLM": "sglang.srt.models.llama4:Llama4ForCausalLM",
    "Llama4ForConditionalGeneration": "sglang.srt.models.llama4:Llama4ForConditionalGeneration",
    "Gemma3ForCausalLM": "sglang.srt.models.gemma3:Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration": "sglang.srt.models.gemma3:Gemma3ForConditionalGeneration",
    "GptOssForCausalLM": "sglang.srt.models.gpt_oss:GptOssForCausalLM",
    "DeepseekV2ForCausalLM": "sglang.srt.models.deepseek_v2:DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM": "sglang.srt.models.deepseek_v2:DeepseekV3ForCausalLM",
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
