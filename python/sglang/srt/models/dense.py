"""Decoders that are Llama's but for tables: SmolLM3, Granite, Seed-OSS, EXAONE 4.

SmolLM3: some layers don't turn. Granite: embeddings, what is added to the residual stream, scores
and logits have factors. EXAONE 4: norms behind attention and MLP and on heads, windows, and global
layers that don't turn. Source: the published configurations and documentation; arXiv 2507.11407.
"""

from __future__ import annotations

from sglang.srt.models.arranged import POST_NORMS, ArrangedForCausalLM


class SmolLM3ForCausalLM(ArrangedForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""


class GraniteForCausalLM(ArrangedForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""


class SeedOssForCausalLM(ArrangedForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""


class Exaone4ForCausalLM(ArrangedForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""

    norm_places = POST_NORMS
