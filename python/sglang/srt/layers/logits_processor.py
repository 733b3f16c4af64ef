"""From hidden rows to logits to sample from, and to the log probabilities of prompt tokens.

Called by the model runner with the rows that the last layer kept. Prompt rows may be many (a
prompt of 100k tokens times a vocabulary is 20 GB), so their logits are made and reduced in row
blocks under a byte bound and never exist together.

Legend: R kept rows, V vocabulary, h hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sglang.srt.errors import InvariantError
from sglang.srt.layers.logprobs import Highest, pack_logprobs, reduce_logits
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead
from sglang.srt.managers.io_struct import LogprobArrays
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, LogprobSpec


@dataclass(frozen=True, slots=True)
class LogitsProcessorOutput:
    """`next_token_logits` float32 [rows to sample, V] in the order of the requests that sample;
    `input_logprobs[b]` for request b, None when it wants none in this step. `highest`: that of
    the logits, where the step has found it already."""

    next_token_logits: torch.Tensor
    input_logprobs: list[LogprobArrays | None]
    highest: Highest | None = None


class LogitsProcessor:
    """Stateless. `max_bytes` bounds the logits of a row block with the temporaries they need."""

    def __init__(self, max_bytes: int = 256 << 20) -> None:
        self._max_bytes = max_bytes

    def __call__(
        self,
        hidden: torch.Tensor,
        lm_head: ParallelLMHead,
        forward_batch: ForwardBatch,
        logprob_specs: Sequence[LogprobSpec | None],
        sample_rows: Sequence[int],
    ) -> LogitsProcessorOutput:
        """Compute what the step wants of `hidden` [R, h], the rows `logits_rows` of the batch.

        `logprob_specs` and `sample_rows` have one entry per request; `sample_rows[b]` indexes the
        R rows, -1 when b samples nothing. Ticks the batch's progress once a block. Raises
        InvariantError when a wanted row was not kept.
        """
        logits = lm_head(_chosen(hidden, [row for row in sample_rows if row >= 0])).float()
        input_logprobs = [
            self._prompt_logprobs(hidden, lm_head, forward_batch, spec) for spec in logprob_specs
        ]
        return LogitsProcessorOutput(logits, input_logprobs)

    def _prompt_logprobs(
        self,
        hidden: torch.Tensor,
        lm_head: ParallelLMHead,
        forward_batch: ForwardBatch,
        spec: LogprobSpec | None,
    ) -> LogprobArrays | None:
        if spec is None or not len(spec.input_targets):
            return None
        count = len(spec.input_targets)
        kept = forward_batch.geometry.logits_rows
        first = int(np.searchsorted(kept, spec.input_row))
        wanted = np.arange(spec.input_row, spec.input_row + count)
        if not np.array_equal(kept[first : first + count], wanted):
            raise InvariantError(f"rows {spec.input_row}+{count} are not among the kept rows")
        targets = torch.from_numpy(spec.input_targets.astype(np.int64)).to(hidden.device)
        picked = torch.from_numpy(spec.picked_ids.astype(np.int64)).to(hidden.device)
        blocks = []
        step = self._rows_per_block(lm_head)
        for start in range(0, count, step):
            end = min(count, start + step)
            logits = lm_head(hidden[first + start : first + end]).float()
            blocks.append(reduce_logits(logits, targets[start:end], spec.top_num, picked))
            forward_batch.progress.tick()
        return pack_logprobs(spec.input_targets, blocks, spec.picked_ids)

    def _rows_per_block(self, lm_head: ParallelLMHead) -> int:
        # Alive at once: the logits as computed, as float32, and logsumexp's temporary.
        per_entry = lm_head.weight.element_size() + 4 + 4
        return max(1, self._max_bytes // (lm_head.num_embeddings * per_entry))


def _chosen(hidden: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Rows of hidden [R, h]; all of them in order, the usual case, need no index on the device."""
    if rows == list(range(len(hidden))):
        return hidden
    return hidden[torch.tensor(rows, dtype=torch.int64).to(hidden.device)]
