"""Decode steps as tapes: the native calls of a step, recorded once for each number of rows.

Played again, a step costs one call and no Python between its kernels; models are written as if
there were no tapes. A step goes onto a tape when each of its requests computes one token and
samples the next, and when all of the model's work on it is native calls; what a model does
otherwise is found while recording, and its steps are then computed as ever. See
docs/structures.md, Note [Tapes].

The worker's thread records and plays. A tape holds the addresses of the KV planes, of the weights
and of its inputs, none of which ever move.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from sglang.srt.errors import InvariantError
from sglang.srt.layers.logprobs import Highest
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, Int64Array

logger = logging.getLogger(__name__)

_ARENA_BYTES = 1 << 30  # of address space; a step commits what it writes


class CausalLM(Protocol):
    """What every architecture offers to those who run it."""

    lm_head: ParallelLMHead

    def __call__(self, forward_batch: ForwardBatch) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class _Inputs:
    """A recorded step's batch, whose tensors and plan are written anew for each step.

    `arrays` are its tokens, positions and slots of each group, as arrays: between two tapes
    memory is cold, and an array operation touches less of it than one of PyTorch.
    """

    batch: ForwardBatch
    arrays: list[Int64Array]

    @classmethod
    def like(cls, batch: ForwardBatch) -> _Inputs:
        """Copies of everything that the next step of as many rows has otherwise."""
        geometry = batch.geometry
        geometry = replace(geometry, extend_prefix_lens=geometry.extend_prefix_lens.copy())
        own = replace(
            batch,
            input_ids=batch.input_ids.clone(),
            positions=batch.positions.clone(),
            out_cache_loc=tuple(loc.clone() for loc in batch.out_cache_loc),
            geometry=geometry,
            attn_plan=batch.attn_backend.plan(geometry),
        )
        return cls(own, _arrays_of(own))

    def take(self, batch: ForwardBatch) -> None:
        """Become another step. Raises what its attention would raise for tables too short."""
        own = self.batch
        own.attn_backend.renew(own.attn_plan, batch.geometry)
        for array, new in zip(self.arrays, _arrays_of(batch), strict=True):
            array[:] = new


def _arrays_of(batch: ForwardBatch) -> list[Int64Array]:
    return [one.numpy() for one in (batch.input_ids, batch.positions, *batch.out_cache_loc)]


class StepLogits(NamedTuple):
    """A decode step's `logits` float32 [R, V] and their `highest`, if the step has found it.

    All are overwritten by the next step.
    """

    logits: torch.Tensor
    highest: Highest | None = None


@dataclass(frozen=True, slots=True)
class DecodeTape:
    """A recorded step: `found` is written whenever it is played."""

    tape: Any  # sgl_kernel.Tape
    inputs: _Inputs
    found: StepLogits


class DecodeTapes:
    """The tapes of one model, by their number of rows, recorded when they are first needed.

    `kernels` is the package sgl_kernel. Steps of more than `max_rows` are not recorded. `fuses`:
    what belongs to a projection to q, k and v is made as one call (`Tape.fuse`).
    """

    def __init__(
        self, model: CausalLM, kernels: ModuleType, max_rows: int, *, fuses: bool = False
    ) -> None:
        self._model = model
        self._kernels = kernels
        self._max_rows = max_rows
        self._fuses = fuses
        self._arena = kernels.Arena(_ARENA_BYTES)
        self._tapes: dict[int, DecodeTape] = {}
        self._refused: set[int] = set()

    @property
    def recorded(self) -> tuple[int, ...]:
        """Numbers of rows that have a tape, ascending."""
        return tuple(sorted(self._tapes))

    @property
    def refused(self) -> frozenset[int]:
        """Numbers of rows whose steps could not be recorded."""
        return frozenset(self._refused)

    def compute(
        self, batch: ForwardBatch, before: Callable[[], None] = lambda: None
    ) -> StepLogits | None:
        """Logits of a decode step, one row a request; None: it is not for a tape.

        They are overwritten by the next call. `before` is called when all is prepared and native
        code takes over. Side effect: the tokens' K and V are stored.
        """
        if not self._fits(batch):
            return None
        for group, loc in enumerate(batch.out_cache_loc):
            batch.token_to_kv_pool.check_slots(group, loc)
        rows = batch.num_tokens
        vocab = self._model.lm_head.num_embeddings
        # Without a sign a negative number is larger than any token.
        if int(batch.input_ids.numpy().view(np.uint64).max()) >= vocab:
            raise InvariantError(f"a token to compute is not below {vocab}")
        found = self._tapes.get(rows)
        if found is None:
            before()
            return self._record(batch)
        found.inputs.take(batch)
        before()
        found.tape.play(torch.get_num_threads())
        batch.progress.tick()
        return found.found

    def times(self, rows: int) -> list[tuple[str, float]]:
        """Play the tape of `rows` rows once more: what each call is and how many seconds it took.

        An empty list without such a tape. Side effect: the last step's K and V are stored again,
        so only for a pool that is not in use.
        """
        found = self._tapes.get(rows)
        if found is None:
            return []
        times = found.tape.times(torch.get_num_threads())
        return [(op.name.lower(), seconds) for op, seconds in times]

    def _fits(self, batch: ForwardBatch) -> bool:
        rows = batch.num_tokens
        if rows == 0 or rows > self._max_rows or rows in self._refused:
            return False
        geometry = batch.geometry
        # `logits_rows` are ascending rows of the batch: as many as there are, they are all of them.
        one_each = rows == len(geometry.seq_lens) == len(geometry.logits_rows)
        return one_each and bool(batch.attn_backend.may_record(geometry))

    def _record(self, batch: ForwardBatch) -> StepLogits | None:
        rows = batch.num_tokens
        inputs = _Inputs.like(batch)
        tape = self._kernels.Tape(self._arena)
        threads = torch.get_num_threads()
        try:
            with self._kernels.record(tape):
                logits = self._model.lm_head(self._model(inputs.batch))
                wide: torch.Tensor = self._kernels.widen(logits, num_threads=threads)
                highest = self._kernels.highest(wide, num_threads=threads)
        except self._kernels.NotRecorded as reason:
            logger.info("Decode steps of %d rows are not recorded: %s", rows, reason)
            self._refused.add(rows)
            return None
        if self._fuses:
            tape.fuse()
        found = StepLogits(wide, highest)
        self._tapes[rows] = DecodeTape(tape, inputs, found)
        logger.debug("Recorded a decode step of %d rows: %d calls", rows, len(tape))
        return found
