"""Qwen2 and Qwen2.5: the Llama decoder with biases on q, k and v, and windows on some layers.

Source: arXiv 2407.10671.
"""

from __future__ import annotations

import torch

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.models.llama import DecoderOptions, LlamaForCausalLM


class Qwen2ForCausalLM(LlamaForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""

    def __init__(self, config: ModelConfig, parallel: ParallelState, dtype: torch.dtype) -> None:
        options = DecoderOptions(qkv_bias=True, windows=config.layer_windows)
        super().__init__(config, parallel, dtype, options)
