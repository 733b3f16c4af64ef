"""OLMo 2 and 3: norms behind attention and MLP, and over all heads of q and of k together.

OLMo 3 has windows. Source: arXiv 2501.00656 and the published documentation of OLMo 3.
"""

from __future__ import annotations

from sglang.srt.models.arranged import POST_NORMS, ArrangedForCausalLM


class Olmo2ForCausalLM(ArrangedForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""

    norm_places = POST_NORMS


class Olmo3ForCausalLM(Olmo2ForCausalLM):
    """The same, with windows."""
