"""The families of models that can be read, one module each; the table is `FAMILIES`."""

from __future__ import annotations

from sglang.srt.configs.families.bert import BERT, ROBERTA, XLM_ROBERTA
from sglang.srt.configs.families.cohere import COHERE, COHERE2
from sglang.srt.configs.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from sglang.srt.configs.families.dense import (
    ARCEE,
    EXAONE4,
    GLM,
    GLM4,
    GRANITE,
    PHI3,
    SEED_OSS,
    SMOLLM3,
)
from sglang.srt.configs.families.gemma import GEMMA2, GEMMA3, GEMMA3_MULTIMODAL
from sglang.srt.configs.families.glm import DOTS1, EXAONE_MOE, GLM4_MOE, GLM4_MOE_LITE
from sglang.srt.configs.families.gpt_oss import GPT_OSS
from sglang.srt.configs.families.llama import LLAMA
from sglang.srt.configs.families.llama4 import LLAMA4, LLAMA4_MULTIMODAL
from sglang.srt.configs.families.mistral import (
    MINISTRAL,
    MINISTRAL3,
    MISTRAL,
    MISTRAL3_MULTIMODAL,
)
from sglang.srt.configs.families.mixtures import (
    ERNIE4_5_MOE,
    FLEX_OLMO,
    GRANITE_MOE,
    GRANITE_MOE_SHARED,
    HUNYUAN_MOE,
    MINIMAX_M2,
    MIXTRAL,
    OLMOE,
    PHIMOE,
)
from sglang.srt.configs.families.olmo import OLMO2, OLMO3
from sglang.srt.configs.families.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
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
    "MinistralForCausalLM": MINISTRAL,
    "Ministral3ForCausalLM": MINISTRAL3,
    "Mistral3ForConditionalGeneration": MISTRAL3_MULTIMODAL,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
    "Llama4ForCausalLM": LLAMA4,
    "Llama4ForConditionalGeneration": LLAMA4_MULTIMODAL,
    "Gemma2ForCausalLM": GEMMA2,
    "Gemma3ForCausalLM": GEMMA3,
    "Gemma3ForConditionalGeneration": GEMMA3_MULTIMODAL,
    "CohereForCausalLM": COHERE,
    "Cohere2ForCausalLM": COHERE2,
    "Olmo2ForCausalLM": OLMO2,
    "Olmo3ForCausalLM": OLMO3,
    "SmolLM3ForCausalLM": SMOLLM3,
    "Exaone4ForCausalLM": EXAONE4,
    "Phi3ForCausalLM": PHI3,
    "GraniteForCausalLM": GRANITE,
    "GlmForCausalLM": GLM,
    "Glm4ForCausalLM": GLM4,
    "SeedOssForCausalLM": SEED_OSS,
    "ArceeForCausalLM": ARCEE,
    "GptOssForCausalLM": GPT_OSS,
    "DeepseekV2ForCausalLM": DEEPSEEK_V2,
    "DeepseekV3ForCausalLM": DEEPSEEK_V3,
    "Glm4MoeForCausalLM": GLM4_MOE,
    "Glm4MoeLiteForCausalLM": GLM4_MOE_LITE,
    "Dots1ForCausalLM": DOTS1,
    "MixtralForCausalLM": MIXTRAL,
    "Qwen2MoeForCausalLM": QWEN2_MOE,
    "Ernie4_5_MoeForCausalLM": ERNIE4_5_MOE,
    "PhiMoEForCausalLM": PHIMOE,
    "PhimoeForCausalLM": PHIMOE,
    "MiniMaxM2ForCausalLM": MINIMAX_M2,
    "OlmoeForCausalLM": OLMOE,
    "FlexOlmoForCausalLM": FLEX_OLMO,
    "ExaoneMoeForCausalLM": EXAONE_MOE,
    "GraniteMoeForCausalLM": GRANITE_MOE,
    "GraniteMoeSharedForCausalLM": GRANITE_MOE_SHARED,
    "HunYuanMoEV1ForCausalLM": HUNYUAN_MOE,
}
