"""A decoder that is pooled: any causal model without its head, with that of a classifier or none.

The checkpoints of embedding models often name the decoder's tensors without the `model.` before
them, and bring no head; those that bring one have it passed over, so it never takes memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.pooling_config import PoolingConfig, causal_name
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.pooler import HeadLinear, Pooler
from sglang.srt.layers.weights import LoadedWeight
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.models.causal_lm import CausalLM
from sglang.srt.models.registry import resolve_model_class


class PooledModel(CausalLM):
    """Prompts in, hidden rows out; it has a `pooler` in place of `lm_head`."""

    def __init__(self, config: ModelConfig, pooler: Pooler) -> None:
        super().__init__()
        self.config = config
        self.pooler = pooler


class PooledDecoder(PooledModel):
    """Parameters are uninitialised until `load_weights`.

    Raises ValueError as the decoder's own class does.
    """

    def __init__(
        self,
        config: ModelConfig,
        parallel: ParallelState,
        dtype: torch.dtype,
        pooling: PoolingConfig,
    ) -> None:
        score = None
        if pooling.labels is not None:
            score = HeadLinear(config.hidden_size, len(pooling.labels), dtype=dtype)
        super().__init__(config, Pooler(score))
        decoder_class = resolve_model_class(causal_name(config.architecture))
        self.decoder = decoder_class(config, parallel, dtype)
        del self.decoder.lm_head
        self.score = score

    def forward(self, forward_batch: ForwardBatch) -> torch.Tensor:
        """See `CausalLM.forward`."""
        hidden: torch.Tensor = self.decoder(forward_batch)
        return hidden

    def load_weights(self, weights: Iterable[tuple[str, LoadedWeight]]) -> None:
        """See `CausalLM.load_weights`."""
        is_missing = self.score is not None

        def others() -> Iterator[tuple[str, LoadedWeight]]:
            nonlocal is_missing
            for name, tensor in weights:
                if self.score is not None and name.startswith("score."):
                    self.score.weight_loader(name.removeprefix("score."), tensor)
                    is_missing = False
                elif name.startswith("model."):
                    yield name, tensor
                elif not name.startswith("lm_head."):
                    yield f"model.{name}", tensor

        self.decoder.load_weights(others())
        if is_missing:
            raise ValueError(f"{self.config.architecture}: missing weight score.weight")
