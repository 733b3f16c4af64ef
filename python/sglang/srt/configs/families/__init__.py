"""The families of models that can be read, one module each; the table is `FAMILIES`."""

from __future__ import annotations

from sglang.srt.configs.families.llama import LLAMA, MISTRAL
from sglang.srt.configs.families.qwen import QWEN2, QWEN3
from sglang.srt.configs.model_traits import ModelFamily

FAMILIES: dict[str, ModelFamily] = {  # by architecture
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
}
