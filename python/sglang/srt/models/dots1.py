"""dots.llm1: DeepSeek-V3's experts under attention with normalised heads.

Source: arXiv 2506.05767.
"""

from __future__ import annotations

from sglang.srt.models.mixture import MixtureForCausalLM


class Dots1ForCausalLM(MixtureForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""
