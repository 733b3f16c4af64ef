"""Qwen3 (dense): the Llama decoder with normalised query and key heads.

Source: arXiv 2505.09388.
"""

from __future__ import annotations

import torch

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.models.llama import DecoderOptions, LlamaForCausalLM


class Qwen3ForCausalLM(LlamaForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""

    def __init__(self, config: ModelConfig, parallel: ParallelState, dtype: torch.dtype) -> None:
        options = DecoderOptions(
            qkv_bias=config.attention_bias,
            output_bias=config.attention_output_bias,
            qk_norm=True,
            windows=config.layer_windows,
        )
        super().__init__(config, parallel, dtype, options)
