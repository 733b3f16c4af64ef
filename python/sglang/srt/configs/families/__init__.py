"""The families of models that can be read, one module each; the table is `FAMILIES`."""

from __future__ import annotations

from sglang.srt.configs.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from sglang.srt.configs.families.gemma3 import GEMMA3, GEMMA3_MULTIMODAL
from sglang.srt.configs.families.gpt_oss import GPT_OSS
from sglang.srt.configs.families.llama import LLAMA, MISTRAL
from sglang.srt.configs.families.llama4 import LLAMA4, LLAMA4_MULTIMODAL
from sglang.srt.configs.families.qwen import QWEN2, QWEN3, QWEN3_MOE
from sglang.srt.configs.model_traits import ModelFamily

FAMILIES: dict[str, ModelFamily] = {  # by architecture
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
    "Llama4ForCausalLM": LLAMA4,
    "Llama4ForConditionalGeneration": LLAMA4_MULTIMODAL,
    "Gemma3ForCausalLM": GEMMA3,
    "Gemma3ForConditionalGeneration": GEMMA3_MULTIMODAL,
    "GptOssForCausalLM": GPT_OSS,
    "DeepseekV2ForCausalLM": DEEPSEEK_V2,
    "DeepseekV3ForCausalLM": DEEPSEEK_V3,
}
