"""PhiMoE: layer norms and biases around experts that are chosen one after the other.

Source: arXiv 2404.14219 (Phi-3.5-MoE), 2409.12136 (its router).
"""

from __future__ import annotations

from sglang.srt.layers.centred_norm import BiasedLayerNorm
from sglang.srt.models.mixture import MixtureForCausalLM


class PhimoeForCausalLM(MixtureForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""

    norm_class = BiasedLayerNorm


class PhiMoEForCausalLM(PhimoeForCausalLM):
    """The same, by the name that published checkpoints have."""
