"""Qwen3-MoE: Qwen3's decoder with experts in place of most MLPs.

Source: arXiv 2505.09388.
"""

from __future__ import annotations

from sglang.srt.models.mixture import MixtureForCausalLM


class Qwen3MoeForCausalLM(MixtureForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""
