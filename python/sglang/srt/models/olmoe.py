"""OLMoE and FlexOlmo: decoders with experts, and a norm over all heads of q and of k together.

OLMoE has Llama's norms, FlexOlmo those of OLMo 2. Source: arXiv 2409.02060 and 2507.07024.
"""

from __future__ import annotations

from sglang.srt.models.arranged import POST_NORMS
from sglang.srt.models.mixture import MixtureForCausalLM


class OlmoeForCausalLM(MixtureForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""


class FlexOlmoForCausalLM(MixtureForCausalLM):
    """The same, with norms behind attention and MLP."""

    norm_places = POST_NORMS
