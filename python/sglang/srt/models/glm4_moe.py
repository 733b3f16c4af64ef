"""GLM-4.5 to 4.7: DeepSeek-V3's experts, under attention that keeps heads or, in Flash, latents.

One half of a head's dimensions turns. Layers of token prediction behind the last one are passed
over. Source: arXiv 2508.06471.
"""

from __future__ import annotations

from sglang.srt.models.deepseek_v2 import DeepseekV2ForCausalLM
from sglang.srt.models.mixture import MixtureForCausalLM


class Glm4MoeForCausalLM(MixtureForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""


class Glm4MoeLiteForCausalLM(DeepseekV2ForCausalLM):
    """GLM-4.7-Flash, which has DeepSeek's attention, too."""
