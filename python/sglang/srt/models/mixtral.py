"""Mixtral: Llama's decoder with two of eight experts for every token, and windows where asked for.

Source: arXiv 2401.04088.
"""

from __future__ import annotations

from sglang.srt.models.mixture import MixtureForCausalLM


class MixtralForCausalLM(MixtureForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""
