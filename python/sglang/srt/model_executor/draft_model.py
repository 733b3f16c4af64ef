"""Runs a draft model: it reads what requests have said, and says what may follow.

Called by the worker on its own thread, before the model computes the same step. Greedy: whoever
verifies takes any tokens, and gets the likeliest right most often. Owns the loaded model and
nothing of a request. See docs/speculative_decoding.md, Note [A draft model].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch

from sglang.srt.model_executor.decode_tapes import CausalLM
from sglang.srt.model_executor.forward_batch_info import DraftBatch, ForwardBatch
from sglang.srt.model_executor.model_runner import StepRecorder
from sglang.srt.utils.device import DeviceRuntime


class Drafter(Protocol):
    """`DraftModel` and `DraftHead`."""

    def propose(
        self, work: DraftBatch, input_ids: torch.Tensor, before: Callable[[], None]
    ) -> torch.Tensor | None:
        """Tokens int64 [N] of the step's drafts, on the device, those of a request in order.

        None: it had nothing to compute. Side effects: they stand in `input_ids`, the step's own,
        and K and V of what was computed are in the draft model's pool. `before` is called when
        compute begins.
        """

    def follow(self, work: DraftBatch, hidden: torch.Tensor | None) -> None:
        """Do what takes the model's `hidden` states [T, h] of the step's tokens, if anything."""


def moved_indexes(
    work: DraftBatch, runtime: DeviceRuntime
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """`said`, `places` and `rows_ahead` on the device."""
    indexes = [work.said, work.places, *work.rows_ahead]
    said, places, *rows_ahead = runtime.move([torch.from_numpy(index) for index in indexes])
    return said, places, rows_ahead


class DraftModel:
    """A model and what its steps are recorded on (None: they are not)."""

    def __init__(
        self, model: CausalLM, runtime: DeviceRuntime, recorder: StepRecorder | None = None
    ) -> None:
        self.model = model
        self._runtime = runtime
        self._recorder = recorder

    def propose(
        self, work: DraftBatch, input_ids: torch.Tensor, before: Callable[[], None]
    ) -> torch.Tensor | None:
        """See `Drafter`."""
        if work.first is None:
            return None
        said, places, rows_ahead = moved_indexes(work, self._runtime)
        tokens = self._say(work.first, before)
        table = tokens.new_zeros((1 + len(work.ahead), len(tokens)))
        table[0] = tokens
        for depth, (batch, rows) in enumerate(zip(work.ahead, rows_ahead, strict=True)):
            last = table[depth].index_select(0, rows)
            table[depth + 1].index_copy_(0, rows, self._say(batch, _nothing, last))
        drafted = table.view(-1).index_select(0, said)
        input_ids.index_copy_(0, places, drafted)
        return drafted

    def follow(self, work: DraftBatch, hidden: torch.Tensor | None) -> None:
        """See `Drafter`: nothing, tokens are all that it reads."""

    def _say(
        self, batch: ForwardBatch, before: Callable[[], None], input_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The likeliest tokens int64 [R] behind the wanted rows; `input_ids` in place of those of
        the batch, if they are not yet there."""
        if self._runtime.is_async:
            batch, _ = batch.moved(self._runtime)
        if input_ids is not None:
            batch = replace(batch, input_ids=input_ids)
        if self._recorder is not None:
            found = self._recorder.compute(batch, before)
            if found is not None:
                return found.logits.argmax(-1)
        before()
        hidden = self.model(batch)
        if not len(batch.geometry.logits_rows):
            return batch.input_ids.new_empty(0)
        logits: torch.Tensor = self.model.lm_head(hidden).float()
        return logits.argmax(-1)


def _nothing() -> None:
    """Nobody waits for the steps between the first and the model's own."""
