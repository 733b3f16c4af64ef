"""Decode steps as graphs of a device: recorded at start for a few numbers of rows, then replayed.

A step takes the graph of the next larger number of rows; rows that are too many stand on the dump
page, which is always backed. Inputs lie in buffers that never move, tables where the attention
backend's recorded plan keeps them, K and V at addresses that growth and shrinking never change, so
a graph stays good for the life of the server. See docs/gpu.md, Graphs, and docs/kv_segments.md,
Note [Segments and graph capture].

The worker's thread replays; recording happens before it starts. Tested with a runtime that records
tensor operations on a CPU; not yet run on hardware.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from sglang.srt.model_executor.decode_tapes import CausalLM, StepLogits
from sglang.srt.model_executor.forward_batch_info import (
    BatchGeometry,
    BlockTableView,
    ForwardBatch,
    ForwardMode,
    Int32Array,
)
from sglang.srt.model_executor.lora_places import AdapterPlaces
from sglang.srt.utils.device import DeviceRuntime, Replay
from sglang.srt.utils.progress import Progress

logger = logging.getLogger(__name__)

DUMP_SLOT: Final = 0
# One array for all padding rows of all steps: a backend that keeps tables knows it after the first.
_DUMP_PAGES: Final = np.zeros(1, np.int32)
_FIRST_SIZES: Final = (1, 2, 4, 8, 12, 16)
_STEP, _WIDE_FROM, _WIDE_STEP = 8, 128, 16
_WARM_UPS: Final = 2  # kernels are compiled and libraries set up outside of a recording


def capture_sizes(max_rows: int) -> tuple[int, ...]:
    """Numbers of rows that get a graph, ascending, `max_rows` the last.

    Dense where a row more costs most; steps of 8, above 128 of 16, so that few rows are wasted.
    """
    sizes = [size for size in _FIRST_SIZES if size < max_rows]
    size = _FIRST_SIZES[-1] + _STEP
    while size < max_rows:
        sizes.append(size)
        size += _STEP if size < _WIDE_FROM else _WIDE_STEP
    return (*sizes, max_rows)


def size_for(rows: int, sizes: Sequence[int]) -> int | None:
    """The least of ascending `sizes` that holds `rows`; None: there is none."""
    return next((size for size in sizes if size >= rows), None)


class _DumpTable(NamedTuple):
    """The table of a padding row: one token in page 0."""

    page_ids: Int32Array
    first_run: tuple[int, int]
    first_position: int = 0


def padded_geometry(geometry: BatchGeometry, size: int) -> BatchGeometry:
    """A decode step's geometry with rows on the dump page up to `size` rows."""
    extra = size - len(geometry.seq_lens)
    page_size = geometry.page_size
    dump: BlockTableView = _DumpTable(_DUMP_PAGES, (DUMP_SLOT, page_size))
    ones, zeros = np.ones(extra, np.int64), np.zeros(extra, np.int64)
    return BatchGeometry(
        seq_lens=np.concatenate((geometry.seq_lens, ones)),
        extend_prefix_lens=np.concatenate((geometry.extend_prefix_lens, zeros)),
        extend_seq_lens=np.concatenate((geometry.extend_seq_lens, ones)),
        q_starts=np.arange(size, dtype=np.int64),
        logits_rows=np.arange(size, dtype=np.int64),
        block_tables=tuple(
            (*tables, *(dump for _ in range(extra))) for tables in geometry.block_tables
        ),
        page_size=page_size,
    )


def empty_geometry(num_groups: int, page_size: int) -> BatchGeometry:
    """A step of no rows."""
    none = np.empty(0, np.int64)
    return BatchGeometry(none, none, none, none, none, ((),) * num_groups, page_size)


@dataclass(frozen=True, slots=True)
class _Graph:
    """A recorded step of `size` rows; `logits` float32 [size, V] are written by `replay`."""

    replay: Replay
    plan: Any
    logits: torch.Tensor


class StepInputs:
    """Buffers of a decode step for up to `max_rows` rows, at addresses that never change.

    Rows that a step does not use stand on the dump page: its K and V may be overwritten.
    """

    def __init__(self, max_rows: int, num_groups: int, device: torch.device) -> None:
        def make() -> torch.Tensor:
            return torch.zeros(max_rows, dtype=torch.int64, device=device)

        self._input_ids, self._positions = make(), make()
        self._locs = tuple(make() for _ in range(num_groups))
        self._rows = torch.arange(max_rows, dtype=torch.int64, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        buffers = (self._input_ids, self._positions, self._rows, *self._locs)
        return sum(buffer.nbytes for buffer in buffers)

    def take(self, batch: ForwardBatch, size: int) -> None:
        """Write a step into the first rows; the others of `size` go to the dump page."""
        rows = batch.num_tokens
        pairs = [(self._input_ids, batch.input_ids), (self._positions, batch.positions)]
        pairs += list(zip(self._locs, batch.out_cache_loc, strict=True))
        for buffer, values in pairs:
            buffer[:rows].copy_(values)
            if size > rows:
                buffer[rows:size].zero_()

    def batch(
        self, size: int, geometry: BatchGeometry, pool: Any, backend: Any, plan: Any
    ) -> ForwardBatch:
        """A batch over the first `size` rows, of tensor objects that nobody has seen.

        Layers keep what they computed from the very same tensor of positions; a recording must
        compute it anew.
        """
        return ForwardBatch(
            forward_mode=ForwardMode.DECODE,
            input_ids=self._input_ids[:size],
            positions=self._positions[:size],
            geometry=geometry,
            out_cache_loc=tuple(loc[:size] for loc in self._locs),
            logits_rows=self._rows[:size],
            token_to_kv_pool=pool,
            attn_backend=backend,
            attn_plan=plan,
            progress=Progress(),
        )


class CudaGraphRunner:
    """The graphs of one model, by their number of rows and whether any has an adapter.

    `sizes` ascending. `record` must be called once, before any step is computed. `adapters` None:
    there are none.
    """

    def __init__(
        self,
        model: CausalLM,
        runtime: DeviceRuntime,
        pool: Any,
        backend: Any,
        *,
        sizes: Sequence[int],
        num_groups: int,
        page_size: int,
        adapters: AdapterPlaces | None = None,
    ) -> None:
        self._model = model
        self._adapters = adapters
        self._runtime = runtime
        self._pool = pool
        self._backend = backend
        self._sizes = tuple(sizes)
        self._empty = empty_geometry(num_groups, page_size)
        self._inputs = StepInputs(max(self._sizes), num_groups, runtime.device)
        self._own = None if adapters is None else adapters.make_mask(max(self._sizes))
        self._graphs: dict[tuple[int, bool], _Graph] = {}
        self._logits: torch.Tensor | None = None  # of all graphs: one is read before the next
        self.num_replays = 0

    @property
    def recorded(self) -> tuple[int, ...]:
        """Numbers of rows that have a graph, ascending."""
        return tuple(sorted({size for size, _ in self._graphs}))

    def record(self) -> None:
        """Record all sizes, the largest first, so that the others find its memory free.

        A model whose step waits for the device or asks it for a value can't be recorded: the
        reason is logged once, and steps are computed call by call.
        """
        # Buffers and pool were filled on another stream than the one that computes.
        self._runtime.synchronize()
        before = self._runtime.read_memory().available_bytes
        try:
            with self._runtime.computing(), torch.inference_mode():
                for size in sorted(self._sizes, reverse=True):
                    self._graphs[size, False] = self._record(size)
                    if self._adapters is not None and self._own is not None:
                        with self._adapters.masked(self._own[:size]):
                            self._graphs[size, True] = self._record(size)
        except RuntimeError as reason:
            self._graphs.clear()
            logger.warning("Decode steps are not recorded as graphs: %s", _first_of(reason))
            return
        self._runtime.synchronize()
        taken = before - self._runtime.read_memory().available_bytes
        logger.info("Recorded decode steps of %s rows: %d bytes", self.recorded, taken)

    def compute(
        self, batch: ForwardBatch, before: Callable[[], None] = lambda: None
    ) -> StepLogits | None:
        """Logits of a decode step, one row a request; None: it is not recorded.

        They are overwritten by the next call. `before` is called before a graph is launched. Side
        effect: the tokens' K and V are stored.
        """
        rows = batch.num_tokens
        size = size_for(rows, self._sizes)
        adapted = batch.adapter_places is not None
        if size is None or (size, adapted) not in self._graphs or not self._fits(batch):
            return None
        graph = self._graphs[size, adapted]
        self._backend.renew(graph.plan, padded_geometry(batch.geometry, size))
        self._inputs.take(batch, size)
        if adapted and self._adapters is not None and self._own is not None:
            self._adapters.fill_mask(self._own[:size], batch)
        before()
        graph.replay()
        self.num_replays += 1
        batch.progress.tick()
        return StepLogits(graph.logits[:rows])

    def times(self, rows: int) -> list[tuple[str, float]]:
        """As `DecodeTapes.times`: a graph does not tell its calls apart, so always empty."""
        del rows
        return []

    def _fits(self, batch: ForwardBatch) -> bool:
        geometry = batch.geometry
        rows = batch.num_tokens
        one_each = 0 < rows == len(geometry.seq_lens) == len(geometry.logits_rows)
        return one_each and bool(self._backend.may_record(geometry))

    def _record(self, size: int) -> _Graph:
        geometry = padded_geometry(self._empty, size)
        plan = self._backend.plan_recorded(geometry)

        def step() -> torch.Tensor:
            batch = self._inputs.batch(size, geometry, self._pool, self._backend, plan)
            logits: torch.Tensor = self._model.lm_head(self._model(batch))
            if self._logits is None:  # in a warm-up of the largest size
                self._logits = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
            return self._logits[:size].copy_(logits)

        for _ in range(_WARM_UPS):
            step()
        replay, logits = self._runtime.record(step)
        return _Graph(replay, plan, logits)


def _first_of(error: BaseException) -> BaseException:
    """What came first: a capture that was broken off says no more than that when it is ended."""
    while error.__context__ is not None:
        error = error.__context__
    return error
