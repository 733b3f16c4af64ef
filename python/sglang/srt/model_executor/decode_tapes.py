"""Small steps as tapes: the native calls of a step, recorded once for each shape of a batch.

Played again, a step costs one call and no Python between its kernels; models are written as if
there were no tapes. Decode steps go onto a tape, of as many rows as requests, and short prompts
that end in the step, alone or beside others and beside decoding requests: their rows are filled up
with some that nobody reads. All of the model's work must be native calls; what a model does
otherwise is found while recording, and its steps are then computed as ever. See
docs/structures.md, Note [Tapes].

The worker's thread records and plays. A tape holds the addresses of the KV planes, of the weights
and of its inputs, none of which ever move.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch

from sglang.srt.errors import InvariantError
from sglang.srt.layers.logprobs import Highest
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, Int64Array
from sglang.srt.model_executor.lora_places import AdapterPlaces

logger = logging.getLogger(__name__)

_ARENA_BYTES = 1 << 30  # of address space; a step commits what it writes
# Steps with prompts: so many tokens and requests at most, their tokens filled up to a multiple.
_PROMPT_TOKENS = 64
_PROMPT_REQUESTS = 8
_PROMPT_MULTIPLE = 8
_PROMPT_TAPES = 32  # kept; a tape owns logits for its requests


class CausalLM(Protocol):
    """What every architecture offers to those who run it."""

    lm_head: ParallelLMHead

    def __call__(self, forward_batch: ForwardBatch) -> torch.Tensor: ...


class StepShape(NamedTuple):
    """What steps on one tape have in common: `tokens` counts those that fill up, too."""

    tokens: int
    requests: int
    sampled: int
    place: int = -1  # of the LoRA adapter of its one row; -1: it has none

    @classmethod
    def of(cls, batch: ForwardBatch) -> Self:
        """A decode step's number of rows thrice, or what a step with prompts is filled up to.

        Where all rows are sampled from, drafts are verified: few shapes, and no row to waste.
        """
        tokens, requests = batch.num_tokens, batch.batch_size
        sampled = len(batch.geometry.logits_rows)
        if tokens > max(requests, sampled):
            tokens = -(-tokens // _PROMPT_MULTIPLE) * _PROMPT_MULTIPLE
        return cls(tokens, requests, sampled)

    @property
    def is_decode(self) -> bool:
        return self.tokens == self.requests == self.sampled


@dataclass(frozen=True, slots=True)
class _Inputs:
    """A recorded step's batch, whose tensors and plan are written anew for each step.

    `arrays` are its tokens, positions and slots of each group, and the rows whose logits are
    wanted, as arrays: between two tapes memory is cold, and an array operation touches less of it
    than one of PyTorch. Rows that fill up compute token 0 at position 0, into slot 0, which lies in
    the page that no request ever gets.
    """

    batch: ForwardBatch
    arrays: list[Int64Array]

    @classmethod
    def like(cls, batch: ForwardBatch, tokens: int) -> _Inputs:
        """Copies of everything that the next step has otherwise, with room for `tokens` tokens."""
        geometry = batch.geometry
        geometry = replace(
            geometry,
            extend_prefix_lens=geometry.extend_prefix_lens.copy(),
            extend_seq_lens=geometry.extend_seq_lens.copy(),
            q_starts=geometry.q_starts.copy(),
        )

        def room() -> torch.Tensor:
            return torch.zeros(tokens, dtype=torch.int64)

        own = replace(
            batch,
            input_ids=room(),
            positions=room(),
            out_cache_loc=tuple(room() for _ in batch.out_cache_loc),
            logits_rows=batch.logits_rows.clone(),
            geometry=geometry,
            attn_plan=batch.attn_backend.plan(geometry),
        )
        found = cls(own, _arrays_of(own))
        found._fill(batch)
        return found

    def take(self, batch: ForwardBatch) -> None:
        """Become another step. Raises what its attention would raise for tables too short."""
        own = self.batch
        own.attn_backend.renew(own.attn_plan, batch.geometry)
        self._fill(batch)

    def _fill(self, batch: ForwardBatch) -> None:
        for array, new in zip(self.arrays, _arrays_of(batch), strict=True):
            array[: len(new)] = new
            array[len(new) :] = 0


def _arrays_of(batch: ForwardBatch) -> list[Int64Array]:
    tensors = (batch.input_ids, batch.positions, *batch.out_cache_loc, batch.logits_rows)
    return [one.numpy() for one in tensors]


class StepLogits(NamedTuple):
    """`logits` float32 [R, V] of a step's wanted rows; their `highest`, if it has been found, and
    the `hidden` states [R, h] that they are made of, where they are kept.

    All are overwritten by the next step.
    """

    logits: torch.Tensor
    highest: Highest | None = None
    hidden: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class DecodeTape:
    """A recorded step: `found` is written whenever it is played."""

    tape: Any  # sgl_kernel.Tape
    inputs: _Inputs
    found: StepLogits


class DecodeTapes:
    """The tapes of one model, by the shapes of their steps.

    Decode steps of up to `max_rows` rows are recorded when they are first needed, steps with
    prompts when a shape comes a second time, and the tapes of the latter give way to others.
    `kernels` is the package sgl_kernel. `fuses`: what belongs to a projection to q, k and v is made
    as one call (`Tape.fuse`). `adapters` None: there are none; of steps with adapters those of one
    row are recorded, for each place.
    """

    def __init__(
        self,
        model: CausalLM,
        kernels: ModuleType,
        max_rows: int,
        *,
        fuses: bool = False,
        adapters: AdapterPlaces | None = None,
    ) -> None:
        self._model = model
        self._kernels = kernels
        self._max_rows = max_rows
        self._fuses = fuses
        self._adapters = adapters
        self._arena = kernels.Arena(_ARENA_BYTES)
        self._tapes: dict[StepShape, DecodeTape] = {}
        self._prompt_tapes: OrderedDict[StepShape, DecodeTape] = OrderedDict()
        self._seen: set[StepShape] = set()  # of steps with prompts; their shapes are few
        self._refused: set[StepShape] = set()

    @property
    def recorded(self) -> tuple[int, ...]:
        """Numbers of rows of decode steps without adapters that have a tape, ascending."""
        return tuple(sorted(shape.tokens for shape in self._tapes if shape.place < 0))

    @property
    def recorded_places(self) -> tuple[int, ...]:
        """Places of LoRA adapters whose steps of one row have a tape, ascending."""
        return tuple(sorted(shape.place for shape in self._tapes if shape.place >= 0))

    @property
    def recorded_prompts(self) -> tuple[StepShape, ...]:
        """Shapes of steps with prompts that have a tape, the longest unused first."""
        return tuple(self._prompt_tapes)

    @property
    def refused(self) -> frozenset[StepShape]:
        """Shapes whose steps could not be recorded."""
        return frozenset(self._refused)

    def compute(
        self, batch: ForwardBatch, before: Callable[[], None] = lambda: None
    ) -> StepLogits | None:
        """Logits of a step that samples all `logits_rows`; None: it is not for a tape.

        They are overwritten by the next call. `before` is called when all is prepared and native
        code takes over. Side effect: the tokens' K and V are stored.
        """
        shape = StepShape.of(batch)
        if batch.adapter_places is not None:
            shape = shape._replace(place=int(batch.adapter_places[0]))
        if not self._fits(shape, batch):
            return None
        for group, loc in enumerate(batch.out_cache_loc):
            batch.token_to_kv_pool.check_slots(group, loc)
        vocab = self._model.lm_head.num_embeddings
        # Without a sign a negative number is larger than any token.
        if int(batch.input_ids.numpy().view(np.uint64).max()) >= vocab:
            raise InvariantError(f"a token to compute is not below {vocab}")
        found = self._find(shape)
        if found is None:
            before()
            return self._record(shape, batch)
        found.inputs.take(batch)
        before()
        found.tape.play(torch.get_num_threads())
        self._model.lm_head.cap(found.found.logits)
        batch.progress.tick()
        return found.found

    def times(self, rows: int) -> list[tuple[str, float]]:
        """Play the tape of `rows` rows once more: what each call is and how many seconds it took.

        An empty list without such a tape. Side effect: the last step's K and V are stored again,
        so only for a pool that is not in use.
        """
        found = self._tapes.get(StepShape(rows, rows, rows))
        if found is None:
            return []
        times = found.tape.times(torch.get_num_threads())
        return [(op.name.lower(), seconds) for op, seconds in times]

    def _fits(self, shape: StepShape, batch: ForwardBatch) -> bool:
        if not shape.sampled or shape in self._refused:
            return False
        if batch.adapter_places is not None and shape.tokens > 1:
            return False
        if not batch.attn_backend.may_record(batch.geometry):
            return False
        if shape.is_decode:
            return shape.tokens <= self._max_rows
        if shape.tokens > _PROMPT_TOKENS or shape.requests > min(_PROMPT_REQUESTS, self._max_rows):
            return False
        if shape in self._seen:
            return True
        self._seen.add(shape)
        return False

    def _find(self, shape: StepShape) -> DecodeTape | None:
        if shape.is_decode:
            return self._tapes.get(shape)
        found = self._prompt_tapes.get(shape)
        if found is not None:
            self._prompt_tapes.move_to_end(shape)
        return found

    def _record(self, shape: StepShape, batch: ForwardBatch) -> StepLogits | None:
        if self._adapters is not None:
            self._adapters.group(batch)
        inputs = _Inputs.like(batch, shape.tokens)
        tape = self._kernels.Tape(self._arena)
        threads, head = torch.get_num_threads(), self._model.lm_head
        try:
            with self._kernels.record(tape):
                hidden = self._model(inputs.batch)
                logits = head.uncapped(hidden)
                wide: torch.Tensor = self._kernels.widen(logits, num_threads=threads)
                highest = None  # of capped logits is looked for when they are capped
                if head.logit_cap == 0.0:
                    highest = self._kernels.highest(wide, num_threads=threads)
        except self._kernels.NotRecorded as reason:
            logger.info("Steps of %s are not recorded: %s", shape, reason)
            self._refused.add(shape)
            return None
        # A fused call is made later than its projection: what adapters made as a bias is gone then.
        if self._fuses and shape.place < 0:
            tape.fuse()
        found = StepLogits(head.cap(wide), highest, hidden)
        self._keep(shape, DecodeTape(tape, inputs, found))
        logger.debug("Recorded a step of %s: %d calls", shape, len(tape))
        return found

    def _keep(self, shape: StepShape, tape: DecodeTape) -> None:
        if shape.is_decode:
            self._tapes[shape] = tape
            return
        self._prompt_tapes[shape] = tape
        if len(self._prompt_tapes) > _PROMPT_TAPES:
            self._prompt_tapes.popitem(last=False)
