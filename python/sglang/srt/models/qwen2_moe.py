"""Qwen1.5-MoE and Qwen2-MoE: Qwen2's decoder with experts, and a shared one that a gate weighs.

Source: arXiv 2407.10671.
"""

from __future__ import annotations

from sglang.srt.models.mixture import MixtureForCausalLM, MixtureOptions


class Qwen2MoeForCausalLM(MixtureForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""

    mixture = MixtureOptions(shared="shared_expert")
