"""MiniMax-M2: experts by DeepSeek-V3's router, a norm over all heads, half of each of which turns.

Source: the published configuration and model card.
"""

from __future__ import annotations

from sglang.srt.models.mixture import MixtureForCausalLM


class MiniMaxM2ForCausalLM(MixtureForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""
