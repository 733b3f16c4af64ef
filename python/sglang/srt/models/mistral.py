"""Mistral: the Llama decoder with sliding-window attention and no biases.

Its layers are a group of the KV cache whose old pages are recycled. Source: arXiv 2310.06825.
"""

from __future__ import annotations

import torch

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.models.llama import DecoderOptions, LlamaForCausalLM


class MistralForCausalLM(LlamaForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""

    def __init__(self, config: ModelConfig, parallel: ParallelState, dtype: torch.dtype) -> None:
        super().__init__(config, parallel, dtype, DecoderOptions(windows=config.layer_windows))
