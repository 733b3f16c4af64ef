"""`ForwardBatch`: all that compute may see of a step, fully built by one constructor.

The worker builds it from a `ScheduleBatch` and the placement that memory granted; layers, the
attention backend and the sampler read it and never change it. Ids and lengths that only the host
needs stay in numpy, so that no step copies them to a device.

Shape letters: T packed new tokens, B requests, R rows whose logits are wanted.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from sglang.srt.utils.progress import Progress

Int64Array = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]


class ForwardMode(enum.Enum):
    """What a batch computes: new prompt tokens, one token each, both, or nothing (padding)."""

    EXTEND = "extend"
    DECODE = "decode"
    MIXED = "mixed"
    IDLE = "idle"


class BlockTableView(Protocol):
    """A request's pages of one group, frozen at the moment the batch was built.

    `page_ids` int32 [P] in order; `runs` are (first_slot, num_slots) pairs in order, contiguous
    in slots, covering at least the batch's seq_len (the last may cover more: clip by seq_len).
    `first_position` is the token position of the first slot (0 unless a window dropped pages).
    """

    @property
    def page_ids(self) -> Int32Array: ...

    @property
    def runs(self) -> Sequence[tuple[int, int]]: ...

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
class ForwardBatch:
    """One step's tensors, tables, pools and backend.

    `out_cache_loc[g]` int64 [T] are the slots where the new tokens' K and V go. `logits_rows`
    int64 [R] are ascending. `attn_plan` is what the backend's `plan` returned for this batch.
    `progress` is ticked by every layer.
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

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def batch_size(self) -> int:
        return len(self.geometry.seq_lens)
