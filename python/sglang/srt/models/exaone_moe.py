"""K-EXAONE: DeepSeek-V3's experts; windows, and global layers that don't turn.

Source: the published configuration and model card.
"""

from __future__ import annotations

from sglang.srt.models.mixture import MixtureForCausalLM


class ExaoneMoeForCausalLM(MixtureForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""
