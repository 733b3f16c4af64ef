"""Cohere and Cohere 2: attention and MLP side by side behind one layer norm.

Dimensions turn in neighbouring pairs; Command R+ has a norm for every head. Of Cohere 2 only the
layers with windows turn at all. Source: the published configurations and documentation of Command R
and Command R7B, arXiv 2504.00698.
"""

from __future__ import annotations

from sglang.srt.layers.centred_norm import BiaslessLayerNorm
from sglang.srt.layers.head_norm import OwnHeadNorm
from sglang.srt.models.arranged import ArrangedForCausalLM, NormPlaces


class CohereForCausalLM(ArrangedForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""

    norm_places = NormPlaces(before_attention="input_layernorm")
    norm_class = BiaslessLayerNorm
    heads_norm = OwnHeadNorm
    side_by_side = True


class Cohere2ForCausalLM(CohereForCausalLM):
    """The same, with windows and global layers without positions."""
