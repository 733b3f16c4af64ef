"""OLMoE: Llama's decoder with experts, and a norm over all heads of q and of k together.

Source: arXiv 2409.02060.
"""

from __future__ import annotations

from sglang.srt.models.mixture import MixtureForCausalLM


class OlmoeForCausalLM(MixtureForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""
