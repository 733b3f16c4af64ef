"""Runs the model over one `ForwardBatch`: hidden rows, logits, prompt log probabilities.

Owns the loaded model and nothing of a request. Called by the worker on its own thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from sglang.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, LogprobSpec


class CausalLM(Protocol):
    """What every architecture offers the runner."""

    lm_head: ParallelLMHead

    def __call__(self, forward_batch: ForwardBatch) -> torch.Tensor: ...


class ModelRunner:
    """Model plus logits processor; stateless between batches."""

    def __init__(self, model: CausalLM, logits_processor: LogitsProcessor) -> None:
        self.model = model
        self._logits_processor = logits_processor

    def forward(
        self,
        forward_batch: ForwardBatch,
        logprob_specs: Sequence[LogprobSpec | None],
        sample_rows: Sequence[int],
    ) -> LogitsProcessorOutput:
        """Compute K, V and the wanted logits of a batch.

        `sample_rows[b]` indexes `logits_rows` (-1: request b samples nothing). Returns float32
        logits [number sampled, vocabulary] and per request its prompt log probabilities.
        """
        hidden = self.model(forward_batch)
        return self._logits_processor(
            hidden, self.model.lm_head, forward_batch, logprob_specs, sample_rows
        )
