"""`ForwardBatch`: all that compute may see of a step, fully built by one constructor.

The worker builds it from a `ScheduleBatch` and the placement that memory granted; layers, the
attention backend and the sampler read it and never change it. Ids and lengths that only the host
needs stay in numpy, so that no step copies them to a device.

Shape letters: T packed new tokens, B requests, R rows whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from sglang.srt.managers.req_images import ImagePart
from sglang.srt.managers.schedule_batch import AdapterChange, ScheduleBatch
from sglang.srt.mem_cache.allocation import KVPlacement
from sglang.srt.mem_cache.block_table import BlockTableSnapshot
from sglang.srt.model_executor.forward_mode import ForwardMode as ForwardMode
from sglang.srt.utils.device import DeviceRuntime
from sglang.srt.utils.progress import Progress

Int64Array = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]


class BlockTableView(Protocol):
    """A request's pages of one group, frozen at the moment the batch was built.

    `page_ids` int32 [P] in order, covering at least the batch's seq_len. `first_run` is the first
    contiguous slot range, (first_slot, num_slots). `first_position` is the token position of the
    first slot (0 unless a window dropped pages).
    """

    @property
    def page_ids(self) -> Int32Array: ...

    @property
    def first_run(self) -> tuple[int, int]: ...

    @property
    def first_position(self) -> int: ...


@dataclass(frozen=True, slots=True)
class BatchGeometry:
    """The lengths and tables of a batch: what an attention plan is made from.

    Request b's queries are the packed rows [q_starts[b], q_starts[b] + extend_seq_lens[b]); they
    stand at positions [extend_prefix_lens[b], seq_lens[b]), where seq_lens counts the new tokens.
    `logits_rows` [R] are the packed rows, ascending, whose logits are wanted.
    """

    seq_lens: Int64Array  # [B]
    extend_prefix_lens: Int64Array  # [B]
    extend_seq_lens: Int64Array  # [B]
    q_starts: Int64Array  # [B]
    logits_rows: Int64Array  # [R]
    block_tables: tuple[tuple[BlockTableView, ...], ...]  # [group][B]
    page_size: int


class AttentionPlanner(Protocol):
    """The part of an attention backend that runs once a step, before any layer."""

    def plan(self, geometry: BatchGeometry) -> Any: ...


@dataclass(frozen=True, slots=True)
class LogprobSpec:
    """Log probabilities that one request of a batch wants in this step.

    Prompt part: of packed rows [input_row, input_row + len(input_targets)), the log probability
    of the token that follows each row, `input_targets` int32 [N] (empty: none). `top_num` largest
    and `picked_ids` are wanted for every such row and for the sampled token when `output`.
    """

    input_row: int
    input_targets: Int32Array
    output: bool
    top_num: int
    picked_ids: Int32Array


@dataclass(frozen=True, slots=True)
class PooledRows:
    """What a batch pools; it samples nothing, and `logits_rows` are the rows that are pooled.

    `num_rows` [B] of them are each request's, one request after another. `second_from` [B] is the
    position of the first token of a prompt's second text, behind its end where there is none.
    """

    num_rows: Int64Array
    second_from: Int64Array

    @classmethod
    def of(cls, batch: ScheduleBatch) -> PooledRows | None:
        """None for a batch whose requests generate."""
        states = [item.req.pooling for item in batch.items[:1]]
        if not states or states[0] is None:
            return None
        counts = [item.pooled_rows()[1] for item in batch.items]
        starts = [item.req.second_from for item in batch.items]
        return cls(np.array(counts, np.int64), np.array(starts, np.int64))


class LayerStates:
    """Where a model leaves what goes into some of its layers, for a draft head.

    `layers` are numbers of layers; `joined` is there when the model has computed its step.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = frozenset(layers)
        self._found: list[torch.Tensor] = []

    def note(self, x: torch.Tensor, residual: torch.Tensor | None) -> None:
        """Keep the stream x + `residual` [T, h] in x's type; x where there is no residual yet."""
        self._found.append(x if residual is None else (residual + x).to(x.dtype))

    def joined(self) -> torch.Tensor:
        """All that was kept, side by side: [T, h times the layers]."""
        return torch.cat(self._found, -1)


class HiddenSpan(NamedTuple):
    """Hidden states of the tokens [first, end) of the request in KV row `row`."""

    row: int
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """Which of the model's hidden states a draft head keeps of a step, and which it reads.

    `kept` are those of the step's packed tokens, request after request; `first` and `after` those
    that the batches of that name of a `DraftBatch` read. `wanted` int64 [R] are the packed rows
    whose logits are wanted, of all of which there are hidden states.
    """

    kept: tuple[HiddenSpan, ...]
    first: tuple[HiddenSpan, ...]
    after: tuple[HiddenSpan, ...]
    wanted: Int64Array


@dataclass(frozen=True, slots=True)
class DraftBatch:
    """What a draft model computes of a step, before the model does; D requests are drafted.

    `first` takes in what the draft model lacks of the requests' texts (None: nothing), and says the
    first token of each draft; `ahead[i]` says token i + 1 of those drafts, `rows_ahead[i]` int64
    among the D, that have one: its `input_ids` are what was said before and not yet there. N tokens
    are said in all: `said` int64 [N] are their places in a table [longest, D], those of a request
    in order, and `places` int64 [N] the packed rows of the model's own batch where they go.

    A draft head reads `hidden` states (None: it is no head): at a token's place it computes what
    follows the next token. `after` is what it computes behind the model (None: nothing).
    """

    first: ForwardBatch | None
    ahead: tuple[ForwardBatch, ...]
    rows_ahead: tuple[Int64Array, ...]
    said: Int64Array
    places: Int64Array
    after: ForwardBatch | None = None
    hidden: HiddenStates | None = None


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step's tensors, tables, pools and backend.

    `out_cache_loc[g]` int64 [T] are the slots where the new tokens' K and V go. `logits_rows`
    int64 [R] are ascending; R is 0 when no request of the step ends its prompt. `attn_plan` is
    what the backend's `plan` returned for this batch. `progress` is ticked by every layer.

    Packed rows `relay_at` take the token that the forward before sampled for KV rows
    `relay_rows`: the worker writes them into `input_ids` right before it computes, and nothing
    else of a batch ever changes. `image_parts` are rows of images that stand in place of
    embeddings; their tokens are the patch token.

    `pooled` None: the batch's requests generate. `adapter_places` [B] are the places of the
    sequences' LoRA adapters, -1 for none; None: no sequence has one. `adapter_changes` are made
    before anything is computed. `drafting` None: no draft model computes anything beside it.
    `layer_states` None: nobody wants what goes into layers.
    """

    forward_mode: ForwardMode
    input_ids: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T]
    geometry: BatchGeometry
    out_cache_loc: tuple[torch.Tensor, ...]  # int64 [T] per group
    logits_rows: torch.Tensor  # int64 [R]
    token_to_kv_pool: Any  # MHATokenToKVPool; typed loosely so that planning imports no layers
    attn_backend: Any  # AttentionBackend
    attn_plan: Any
    progress: Progress
    relay_at: Int64Array = field(default_factory=lambda: np.empty(0, np.int64))
    relay_rows: Int64Array = field(default_factory=lambda: np.empty(0, np.int64))
    pooled: PooledRows | None = None
    adapter_places: Int64Array | None = None
    adapter_changes: tuple[AdapterChange, ...] = ()
    image_parts: tuple[ImagePart, ...] = ()
    drafting: DraftBatch | None = None
    layer_states: LayerStates | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def batch_size(self) -> int:
        return len(self.geometry.seq_lens)

    def moved(
        self, runtime: DeviceRuntime, *others: torch.Tensor
    ) -> tuple[ForwardBatch, list[torch.Tensor]]:
        """This batch with its tensors on the device, and there too `others`, relay_at, relay_rows.

        One transfer for all. Raises InvariantError for slots outside the pool: on the device
        nobody looks at them any more.
        """
        here = [
            self.input_ids,
            self.positions,
            self.logits_rows,
            *self.out_cache_loc,
            *others,
            torch.from_numpy(self.relay_at),
            torch.from_numpy(self.relay_rows),
        ]
        for group, loc in enumerate(self.out_cache_loc):
            self.token_to_kv_pool.check_slots(group, loc)
        input_ids, positions, logits_rows, *rest = runtime.move(here)
        num_groups = len(self.out_cache_loc)
        batch = replace(
            self,
            input_ids=input_ids,
            positions=positions,
            logits_rows=logits_rows,
            out_cache_loc=tuple(rest[:num_groups]),
        )
        return batch, rest[num_groups:]

    @classmethod
    def from_schedule_batch(
        cls,
        batch: ScheduleBatch,
        placement: KVPlacement,
        *,
        pool: Any,
        backend: Any,
        page_size: int,
        progress: Progress,
        all_rows: bool = False,
    ) -> ForwardBatch:
        """Pack a step: the only constructor that the engine uses.

        `placement` names the slots of every item's tokens in the order of `batch.items`. Block
        tables are snapshots: later growth and release on the host do not reach this batch. With
        `all_rows` the hidden states of all tokens are wanted of the model.
        """
        items = batch.items
        lens = np.fromiter((item.num_tokens for item in items), np.int64, len(items))
        prefix = np.fromiter((item.start for item in items), np.int64, len(items))
        starts = np.cumsum(lens) - lens
        total = int(lens.sum())
        positions = np.arange(total, dtype=np.int64) + np.repeat(prefix - starts, lens)
        input_ids, relay_at, relay_rows = _packed_ids(batch, starts, total)
        logits_rows = np.arange(total) if all_rows else wanted_rows(batch)
        geometry = BatchGeometry(
            seq_lens=prefix + lens,
            extend_prefix_lens=prefix,
            extend_seq_lens=lens,
            q_starts=starts,
            logits_rows=logits_rows,
            block_tables=block_tables_of(batch, placement),
            page_size=page_size,
        )
        return cls(
            forward_mode=batch.forward_mode,
            input_ids=torch.from_numpy(input_ids),
            positions=torch.from_numpy(positions),
            geometry=geometry,
            out_cache_loc=tuple(
                torch.from_numpy(np.ascontiguousarray(loc, dtype=np.int64))
                for loc in placement.out_cache_loc
            ),
            logits_rows=torch.from_numpy(logits_rows),
            token_to_kv_pool=pool,
            attn_backend=backend,
            attn_plan=backend.plan(geometry),
            progress=progress,
            relay_at=relay_at,
            relay_rows=relay_rows,
            pooled=PooledRows.of(batch),
            adapter_places=_adapter_places(batch),
            adapter_changes=batch.adapter_changes,
            image_parts=_image_parts(batch, starts),
        )


def _packed_ids(
    batch: ScheduleBatch, starts: Int64Array, total: int
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Ids [T] of all new tokens, the rows of those still to be sampled (0), and their KV rows."""
    input_ids = np.empty(total, np.int64)
    relay_at: list[int] = []
    relay_rows: list[int] = []
    for item, q_start in zip(batch.items, starts.tolist(), strict=True):
        if item.from_relay:
            relay_at.append(q_start)
            relay_rows.append(item.lease.row)
            input_ids[q_start] = 0
        else:
            input_ids[q_start : q_start + item.num_tokens] = item.input_ids()
    return input_ids, np.array(relay_at, np.int64), np.array(relay_rows, np.int64)


def _adapter_places(batch: ScheduleBatch) -> Int64Array | None:
    places = np.fromiter((item.req.adapter_place for item in batch.items), np.int64)
    return places if (places >= 0).any() else None


def _image_parts(batch: ScheduleBatch, starts: Int64Array) -> tuple[ImagePart, ...]:
    """What the step computes of images, in the order of its tokens."""
    parts = (
        image.part(item.start, item.start + item.num_tokens, q_start)
        for item, q_start in zip(batch.items, starts.tolist(), strict=True)
        for image in item.req.images
    )
    return tuple(part for part in parts if part is not None)


def block_tables_of(
    batch: ScheduleBatch, placement: KVPlacement
) -> tuple[tuple[BlockTableSnapshot, ...], ...]:
    """Snapshots [group][B] of the requests' pages; the placement's where it brings them."""
    if placement.tables is not None:
        return placement.tables()
    return tuple(
        tuple(item.lease.tables[group].snapshot() for item in batch.items)
        for group in range(len(placement.out_cache_loc))
    )


def wanted_rows(batch: ScheduleBatch) -> Int64Array:
    """Packed rows that are wanted of the model, ascending.

    Prompt logprobs, then those to sample; or those to pool.
    """
    rows: list[int] = []
    q_start = 0
    for item in batch.items:
        pools = item.req.pooling is not None
        first, count = item.pooled_rows() if pools else item.logprob_rows()
        if count:
            begin = q_start + first - item.start
            rows += range(begin, begin + count)
        q_start += item.num_tokens
        rows += range(q_start - item.num_places, q_start)
    return np.array(rows, np.int64)
