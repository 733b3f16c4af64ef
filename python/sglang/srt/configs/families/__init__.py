"""The families of models that can be read, one module each; the table is `FAMILIES`."""

from __future__ import annotations

from sglang.srt.configs.families.bert import BERT, ROBERTA, XLM_ROBERTA
from sglang.srt.configs.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from sglang.srt.configs.families.gemma3 import GEMMA3, GEMMA3_MULTIMODAL
from sglang.srt.configs.families.gpt_oss import GPT_OSS
from sglang.srt.configs.families.llama import LLAMA, MISTRAL
from sglang.srt.configs.families.llama4 import LLAMA4, LLAMA4_MULTIMODAL
from sglang.srt.configs.families.qwen import QWEN2, QWEN3, QWEN3_MOE
from sglang.srt.configs.families.qwen_hybrid import (
    QWEN3_5,
    QWEN3_5_MOE,
    QWEN3_5_MOE_TEXT,
    QWEN3_5_TEXT,
    QWEN3_NEXT,
)
from sglang.srt.configs.model_traits import ModelFamily

# Decoders with no head that writes: with one that classifies, or with none at all.
POOLED_FAMILIES: dict[str, ModelFamily] = {
    "LlamaModel": LLAMA,
    "LlamaForSequenceClassification": LLAMA,
    "MistralModel": MISTRAL,
    "MistralForSequenceClassification": MISTRAL,
    "Qwen2Model": QWEN2,
    "Qwen2ForSequenceClassification": QWEN2,
    "Qwen3Model": QWEN3,
    "Qwen3ForSequenceClassification": QWEN3,
}
ENCODER_FAMILIES: dict[str, ModelFamily] = {
    "BertModel": BERT,
    "BertForSequenceClassification": BERT,
    "RobertaModel": ROBERTA,
    "RobertaForSequenceClassification": ROBERTA,
    "XLMRobertaModel": XLM_ROBERTA,
    "XLMRobertaForSequenceClassification": XLM_ROBERTA,
}
# By architecture. Of several of one type the last is what a file that names none means.
FAMILIES: dict[str, ModelFamily] = {
    **POOLED_FAMILIES,
    **ENCODER_FAMILIES,
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
    "Qwen3NextForCausalLM": QWEN3_NEXT,
    "Qwen3_5ForCausalLM": QWEN3_5_TEXT,
    "Qwen3_5ForConditionalGeneration": QWEN3_5,
    "Qwen3_5MoeForCausalLM": QWEN3_5_MOE_TEXT,
    "Qwen3_5MoeForConditionalGeneration": QWEN3_5_MOE,
    "Llama4ForCausalLM": LLAMA4,
    "Llama4ForConditionalGeneration": LLAMA4_MULTIMODAL,
    "Gemma3ForCausalLM": GEMMA3,
    "Gemma3ForConditionalGeneration": GEMMA3_MULTIMODAL,
    "GptOssForCausalLM": GPT_OSS,
    "DeepseekV2ForCausalLM": DEEPSEEK_V2,
    "DeepseekV3ForCausalLM": DEEPSEEK_V3,
}
