"""gpt-oss: sliding and full layers in turn, attention sinks, experts with biases.

The decoder is Llama's. Source: arXiv 2508.10925 and the published configurations; sinks,
arXiv 2309.17453.
"""

from __future__ import annotations

import torch

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.expert_weights import ExpertLayout
from sglang.srt.layers.rotary_embedding import RotaryEmbedding
from sglang.srt.layers.weights import copy_checked, frozen_parameter
from sglang.srt.models.llama import DecoderOptions, LlamaAttention
from sglang.srt.models.mixture import MixtureForCausalLM, MixtureOptions


class GptOssAttention(LlamaAttention):
    """Llama's, with a learned sink for every query head, `sinks` [H of this rank]."""

    def __init__(
        self,
        config: ModelConfig,
        options: DecoderOptions,
        layer_id: int,
        rotary_emb: RotaryEmbedding,
        parallel: ParallelState,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(config, options, layer_id, rotary_emb, parallel, dtype)
        self._num_heads = config.num_heads
        self._first_head = parallel.tp_rank * self.qkv_proj.num_heads
        # Checkpoints name it here; the layer below computes with it.
        self.sinks = frozen_parameter(self.qkv_proj.num_heads, dtype=dtype)
        self.attn.sinks = self.sinks

    def weight_loader(self, param_name: str, loaded: torch.Tensor) -> None:
        """Copy this rank's part of "sinks" [H]; ValueError for a wrong name or shape."""
        if param_name != "sinks":
            raise ValueError(f"GptOssAttention has no parameter {param_name!r}")
        if tuple(loaded.shape) != (self._num_heads,):
            raise ValueError(
                f"sinks: the checkpoint has shape {tuple(loaded.shape)}, "
                f"the model needs {(self._num_heads,)}"
            )
        here = self.sinks.data
        copy_checked(here, loaded.narrow(0, self._first_head, len(here)), "sinks")


class GptOssForCausalLM(MixtureForCausalLM):
    """The whole model; arguments and errors as for `LlamaForCausalLM`."""

    attention_class = GptOssAttention
    mixture = MixtureOptions("router", layout=ExpertLayout.INTERLEAVED, bias=True)
