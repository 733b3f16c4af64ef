"""ERNIE 4.5 MoE: neighbouring dimensions turn together, and a bias helps to choose experts.

Source: the ERNIE 4.5 technical report.
"""

from __future__ import annotations

from sglang.srt.models.mixture import MixtureForCausalLM


class Ernie4_5_MoeForCausalLM(MixtureForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""
