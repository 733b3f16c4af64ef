"""From hidden rows to logits to sample from, and to the log probabilities of prompt tokens.

Called by the model runner with the rows that the last layer kept. Prompt rows may be many (a
prompt of 100k tokens times a vocabulary is 20 GB), so their logits are made and reduced in row
blocks under a byte bound and never exist together. On a device that runs behind the host what is
left of them stays there, to be copied with the step's results.

Legend: R kept rows, V vocabulary, h hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from sglang.srt.errors import InvariantError
from sglang.srt.layers.late_results import LatePrompts, PromptRows, reduce_late
from sglang.srt.layers.logprobs import Highest, pack_logprobs, reduce_logits
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead
from sglang.srt.managers.io_struct import LogprobArrays
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, LogprobSpec
from sglang.srt.utils.device import CpuRuntime, DeviceRuntime

# An entry's copy without a sign of zero, its rank in 32 bits and a copy of that, and two keys.
_RANKING_BYTES: Final = 4 + 4 + 4 + 8 + 8


@dataclass(frozen=True, slots=True)
class LogitsProcessorOutput:
    """`next_token_logits` float32 [rows to sample, V] in the order of the requests that sample;
    `input_logprobs[b]` for request b, None when it wants none in this step; where looking would
    wait, `late` tells them when it has come (None: nobody wants any). `highest`: that of the
    logits, where the step has found it already. `hidden` [R, h] are the states of the wanted rows,
    where they are kept, to be read before the next step."""

    next_token_logits: torch.Tensor
    input_logprobs: list[LogprobArrays | None]
    highest: Highest | None = None
    late: LatePrompts | None = None
    hidden: torch.Tensor | None = None


class LogitsProcessor:
    """Stateless. `max_bytes` bounds the logits of a row block with the temporaries they need.

    `runtime` is that of the device where hidden rows lie; None: the host.
    """

    def __init__(self, max_bytes: int = 256 << 20, runtime: DeviceRuntime | None = None) -> None:
        self._max_bytes = max_bytes
        self._runtime: DeviceRuntime = runtime or CpuRuntime()

    def __call__(
        self,
        hidden: torch.Tensor,
        lm_head: ParallelLMHead,
        forward_batch: ForwardBatch,
        logprob_specs: Sequence[LogprobSpec | None],
        sample_rows: Sequence[int],
    ) -> LogitsProcessorOutput:
        """Compute what the step wants of `hidden` [R, h], the rows `logits_rows` of the batch.

        `logprob_specs` has one entry per request, `sample_rows` index those of the R rows that are
        sampled from. Ticks the batch's progress once a block. Raises
        InvariantError when a wanted row was not kept.
        """
        logits = lm_head(self._chosen(hidden, list(sample_rows))).float()
        wanted = [
            (request, spec, _first_kept(forward_batch, spec))
            for request, spec in enumerate(logprob_specs)
            if spec is not None and len(spec.input_targets)
        ]
        told: list[LogprobArrays | None] = [None] * len(logprob_specs)
        if not self._comes_late([spec for _, spec, _ in wanted], lm_head.num_embeddings):
            for request, spec, first in wanted:
                told[request] = self._prompt_logprobs(hidden, lm_head, forward_batch, spec, first)
            return LogitsProcessorOutput(logits, told)
        values, blocks = [], []
        for request, spec, first in wanted:
            parts = self._late_logprobs(hidden, lm_head, forward_batch, spec, first)
            for num_rows, top_num, part in parts:
                values.append(part)
                blocks.append(PromptRows(request, spec, num_rows, top_num))
        late = LatePrompts(torch.cat(values), len(told), tuple(blocks)) if blocks else None
        return LogitsProcessorOutput(logits, told, late=late)

    def _prompt_logprobs(
        self,
        hidden: torch.Tensor,
        lm_head: ParallelLMHead,
        forward_batch: ForwardBatch,
        spec: LogprobSpec,
        first: int,
    ) -> LogprobArrays:
        targets, picked = self._runtime.move(_ids_of(spec))
        blocks = [
            reduce_logits(logits, targets[rows], spec.top_num, picked)
            for rows, logits in self._row_blocks(hidden, lm_head, forward_batch, spec, first)
        ]
        return pack_logprobs(spec.input_targets, blocks, spec.picked_ids)

    def _late_logprobs(
        self,
        hidden: torch.Tensor,
        lm_head: ParallelLMHead,
        forward_batch: ForwardBatch,
        spec: LogprobSpec,
        first: int,
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Rows, largest numbers of a row, and what `reduce_late` makes of each block."""
        targets, picked = self._runtime.move(_ids_of(spec))
        for rows, logits in self._row_blocks(hidden, lm_head, forward_batch, spec, first):
            top_num = min(spec.top_num, logits.shape[-1])
            yield len(logits), top_num, reduce_late(logits, targets[rows], top_num, picked)

    def _row_blocks(
        self,
        hidden: torch.Tensor,
        lm_head: ParallelLMHead,
        forward_batch: ForwardBatch,
        spec: LogprobSpec,
        first: int,
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Float32 logits [N, V] of the rows `first` on of `hidden`, block by block.

        The slice names a block's rows among those that are wanted.
        """
        count = len(spec.input_targets)
        step = self._rows_per_block(lm_head, spec)
        for start in range(0, count, step):
            end = min(count, start + step)
            yield slice(start, end), lm_head(hidden[first + start : first + end]).float()
            forward_batch.progress.tick()

    def _comes_late(self, specs: Sequence[LogprobSpec], vocab_size: int) -> bool:
        """Whether what is wanted stays on the device until it is copied whole.

        More than a row block's bytes (thousands of the largest for each of many rows) don't: they
        are waited for block by block.
        """
        numbers = sum(
            len(spec.input_targets) * (1 + 2 * min(spec.top_num, vocab_size) + len(spec.picked_ids))
            for spec in specs
        )
        return self._runtime.is_async and 4 * numbers <= self._max_bytes

    def _rows_per_block(self, lm_head: ParallelLMHead, spec: LogprobSpec) -> int:
        # Alive at once: the logits as computed, as float32, and logsumexp's temporary; or, where
        # the largest are found without looking, what is sorted instead of them.
        per_entry = lm_head.weight.element_size() + 4 + 4
        if self._runtime.is_async and spec.top_num:
            per_entry += _RANKING_BYTES
        return max(1, self._max_bytes // (lm_head.num_embeddings * per_entry))

    def _chosen(self, hidden: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """Rows of hidden [R, h]; all in order, the usual case, need no index on the device."""
        if rows == list(range(len(hidden))):
            return hidden
        (index,) = self._runtime.move([torch.tensor(rows, dtype=torch.int64)])
        return hidden.index_select(0, index)


def _first_kept(forward_batch: ForwardBatch, spec: LogprobSpec) -> int:
    """Where the spec's rows begin among the kept ones, beside each other."""
    count = len(spec.input_targets)
    kept = forward_batch.geometry.logits_rows
    first = int(np.searchsorted(kept, spec.input_row))
    wanted = np.arange(spec.input_row, spec.input_row + count)
    if not np.array_equal(kept[first : first + count], wanted):
        raise InvariantError(f"rows {spec.input_row}+{count} are not among the kept rows")
    return first


def _ids_of(spec: LogprobSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """The spec's targets and named tokens, int64 on the host."""
    return (
        torch.from_numpy(spec.input_targets.astype(np.int64)),
        torch.from_numpy(spec.picked_ids.astype(np.int64)),
    )
