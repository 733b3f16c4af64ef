"""Runs the model over one `ForwardBatch`: hidden rows, logits, prompt log probabilities.

Owns the loaded model and nothing of a request. Called by the worker on its own thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from sglang.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from sglang.srt.model_executor.decode_tapes import CausalLM as CausalLM
from sglang.srt.model_executor.decode_tapes import StepLogits
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, LogprobSpec
from sglang.srt.model_executor.lora_places import AdapterPlaces


class StepRecorder(Protocol):
    """Recorded steps: `DecodeTapes` on a host, `CudaGraphRunner` on a device."""

    def compute(
        self, batch: ForwardBatch, before: Callable[[], None] = ...
    ) -> StepLogits | None: ...

    def times(self, rows: int) -> list[tuple[str, float]]: ...


class ModelRunner:
    """Model plus logits processor.

    `tapes` None: every step is computed call by call. `adapters` None: there are none.
    """

    def __init__(
        self,
        model: CausalLM,
        logits_processor: LogitsProcessor,
        tapes: StepRecorder | None = None,
        adapters: AdapterPlaces | None = None,
    ) -> None:
        self.model = model
        self._adapters = adapters
        self.tapes = tapes
        self._logits_processor = logits_processor

    def forward(
        self,
        forward_batch: ForwardBatch,
        logprob_specs: Sequence[LogprobSpec | None],
        sample_rows: Sequence[int],
        before: Callable[[], None] = lambda: None,
    ) -> LogitsProcessorOutput:
        """Compute K, V and the wanted logits of a batch.

        `sample_rows` index those of `logits_rows` that are sampled from. Returns float32 logits
        [number sampled, vocabulary], to be read before the next call, and per request its
        prompt log probabilities. `before` is called when all is prepared and compute begins.
        """
        if self._adapters is not None:
            self._adapters.change(forward_batch)
        # Both ascend without repeats: as many sampled as wanted means that no others are wanted.
        samples_all = len(sample_rows) == len(forward_batch.geometry.logits_rows)
        states = forward_batch.layer_states
        is_plain = states is None and not forward_batch.image_parts
        if self.tapes is not None and samples_all and is_plain:
            found = self.tapes.compute(forward_batch, before)
            if found is not None:
                return LogitsProcessorOutput(
                    found.logits,
                    [None] * forward_batch.batch_size,
                    found.highest,
                    hidden=found.hidden,
                )
        if self._adapters is not None:
            self._adapters.group(forward_batch)
        before()
        hidden = self.model(forward_batch)
        output = self._logits_processor(
            hidden, self.model.lm_head, forward_batch, logprob_specs, sample_rows
        )
        return replace(output, hidden=hidden if states is None else states.joined())
