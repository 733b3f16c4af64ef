"""Attention of packed queries straight over block tables: decode and extend are one call.

What a step's batch looks like is said once (`AttentionTables`, `QueryBlocks`, arrays that live as
long as the step); a layer's call then costs one small structure. K and V may be views of any
stride but the last, with 64-bit offsets.

Sources: online softmax, arXiv 1805.02867; split keys merged exactly, FlashDecoding
(crfm.stanford.edu/2023/10/12/flashdecoding.html) and arXiv 2205.14135.

Legend: R query rows, H query heads, G kv heads, D head dim, S slots, B requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sgl_kernel.library import (
    BYTE_DTYPES,
    DTYPES,
    SCALE_BYTES,
    AttentionCall,
    Isa,
    KernelError,
    Op,
    allowed_isa,
    cpu_isa,
)
from sgl_kernel.tape import empty, make

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

MAX_HEAD_DIM = 576


class AttentionTables:
    """Block tables of B requests: page ids in order, and the position of each first page's slot.

    Holds the page arrays, whose addresses the kernel reads. Raises KernelError for page ids that
    are not contiguous int32.
    """

    def __init__(
        self, pages: Sequence[Int32Array], first_positions: Sequence[int], page_size: int
    ) -> None:
        self.page_size = page_size
        self.addresses, self.first_positions, self.end_positions = np.zeros(
            (3, len(pages)), np.int64
        )
        # What was found to see only positions of these tables: every layer of a step asks the same.
        self._checked: dict[tuple[int, int | None, int | None, int], _Checked] = {}
        self.renew(pages, first_positions)

    def renew(self, pages: Sequence[Int32Array], first_positions: Sequence[int]) -> None:
        """Let the same tables stand for other pages, in place: what reads them sees the new ones.

        Checks again what was checked before. Raises KernelError for another number of tables, page
        ids that are not contiguous int32, and blocks that see positions outside.
        """
        if len(pages) != len(self.addresses):
            raise KernelError(f"{len(pages)} tables instead of {len(self.addresses)}")
        for i, ids in enumerate(pages):
            if ids.dtype != np.int32 or not ids.flags.c_contiguous:
                raise KernelError("page ids must be contiguous int32")
            self.addresses[i] = ids.ctypes.data
        self.pages = tuple(pages)
        self.first_positions[:] = first_positions
        self._begins_later = any(first_positions)
        self.end_positions[:] = [len(ids) * self.page_size for ids in pages]
        self.end_positions += self.first_positions
        for key, (blocks, _) in self._checked.items():
            self._checked[key] = self._checked_blocks(blocks)
        self.check_again()

    def check_again(self) -> None:
        """Check what was checked before, for blocks that may stand at other positions by now.

        Raises KernelError for blocks that see positions outside of these tables.
        """
        for (_, window, chunk, _), checked in self._checked.items():
            self._check_positions(checked, window, chunk)

    def check(self, blocks: QueryBlocks, rows: int, window: int | None, chunk: int | None) -> None:
        """Raises KernelError unless all that `blocks` of `rows` rows see lies in the tables."""
        key = (id(blocks), window, chunk, rows)
        if key in self._checked and self._checked[key].blocks is blocks:
            return
        checked = self._checked_blocks(blocks)
        self._check_positions(checked, window, chunk)
        if blocks.rows.min() < 0 or (blocks.rows + blocks.counts).max() > rows:
            raise KernelError("a block names rows that q does not have")
        self._checked[key] = checked

    def _checked_blocks(self, blocks: QueryBlocks) -> _Checked:
        return _Checked(blocks, self.end_positions[blocks.requests] - blocks.counts)

    def _check_positions(self, checked: _Checked, window: int | None, chunk: int | None) -> None:
        blocks = checked.blocks
        outside = (blocks.positions > checked.last_positions).any()
        if self._begins_later:
            first = np.zeros_like(blocks.positions)
            if window is not None:
                first = np.maximum(blocks.positions - window + 1, 0)
            elif chunk is not None:
                first = blocks.positions - blocks.positions % chunk
            outside = outside or (first < self.first_positions[blocks.requests]).any()
        if outside:
            raise KernelError("a query sees positions outside its block table")

    def __len__(self) -> int:
        return len(self.pages)


@dataclass(frozen=True)
class QueryBlocks:
    """Ranges of consecutive queries of one request each.

    Block i's queries are rows [rows[i], rows[i] + counts[i]) of q; the first stands at position
    positions[i] of request requests[i].
    """

    rows: Int64Array
    counts: Int64Array
    positions: Int64Array
    requests: Int64Array

    def __post_init__(self) -> None:
        for name in ("rows", "counts", "positions", "requests"):
            array = np.ascontiguousarray(getattr(self, name), dtype=np.int64)
            object.__setattr__(self, name, array)

    def __len__(self) -> int:
        return len(self.rows)


class _Checked(NamedTuple):
    """Blocks whose positions lie in the tables while none is above `last_positions` [blocks]."""

    blocks: QueryBlocks
    last_positions: Int64Array


def serves_attention(
    dtype: torch.dtype, head_dim: int, v_head_dim: int, kv_dtype: torch.dtype | None = None
) -> bool:
    """True when `paged_attention` computes heads of this type and width over K and V of `kv_dtype`.

    K and V are of the type of q, as None says, or of fp8 or int8.
    """
    fits = head_dim % 16 == 0 and 16 <= head_dim <= MAX_HEAD_DIM and head_dim == v_head_dim
    return dtype in DTYPES and fits and (kv_dtype in (None, dtype) or kv_dtype in BYTE_DTYPES)


def has_prompt_kernel() -> bool:
    """True when this processor's level has a kernel for many queries at once.

    Prompts are faster there than in PyTorch's fused attention, for every type and width that is
    served. The levels without take queries one by one.
    """
    return Isa.AVX2 <= cpu_isa() <= Isa.AMX


def paged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: AttentionTables,
    blocks: QueryBlocks,
    *,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    logit_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    num_threads: int = 1,
    isa: Isa | None = None,
) -> torch.Tensor:
    """Attend with q [R, H, D] over k and v [S, G, D]; returns [R, H, D] in the dtype of q.

    k and v are of that dtype, or both of one fp8, whose numbers are taken as they are (a scale of K
    belongs into `scale`, one of V to the result); or of int8 [S, G, D + 4], a head's bytes and
    behind them the float32 that they are multiples of. The query at position p sees [0, p], with
    `window` only the last `window` of them, with `chunk` those from p - p % chunk on. `logit_cap` c
    > 0 turns a score s into c * tanh(s / c). `sinks` float32 [H] is a score per head that joins the
    softmax with no value. `lse` float32 [R, H], if given, receives the natural logarithm of the
    denominator, sink included. Written are the rows that blocks name, of `out` or else of a new
    tensor. `isa` lowers the instructions used.

    Every visible position must lie in the tables; checked. Raises KernelError for shapes, types or
    tables that are not served.
    """
    rows, heads, dim = q.shape
    kv_heads = k.shape[1]
    _check(q, k, v, tables, blocks, window, chunk)
    if out is None:
        out = empty((rows, heads, dim), q.dtype)
    elif out.shape != q.shape or out.dtype != q.dtype or out.stride(2) != 1:
        raise KernelError("out must have the shape and the dtype of q")
    if not len(blocks):
        return out
    call = AttentionCall(
        q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), out=out.data_ptr(),
        lse=_float_rows(lse, (rows, heads), "lse"), sinks=_float_rows(sinks, (heads,), "sinks"),
        q_row=q.stride(0), q_head=q.stride(1), k_slot=k.stride(0), k_head=k.stride(1),
        v_slot=v.stride(0), v_head=v.stride(1), out_row=out.stride(0), out_head=out.stride(1),
        num_blocks=len(blocks),
        block_row=blocks.rows.ctypes.data, block_rows=blocks.counts.ctypes.data,
        block_position=blocks.positions.ctypes.data, block_table=blocks.requests.ctypes.data,
        pages=tables.addresses.ctypes.data, first_position=tables.first_positions.ctypes.data,
        page_size=tables.page_size, window=window or 0, chunk=chunk or 0,
        num_kv_heads=kv_heads, heads_per_group=heads // kv_heads, head_dim=dim,
        dtype=DTYPES[q.dtype], kv_dtype=(DTYPES | BYTE_DTYPES)[k.dtype], isa=allowed_isa(isa),
        num_threads=num_threads, scale=scale, logit_cap=logit_cap,
    )  # fmt: skip
    make(Op.ATTENTION, call, q, k, v, out, lse, sinks, tables, blocks)
    return out


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: AttentionTables,
    blocks: QueryBlocks,
    window: int | None,
    chunk: int | None,
) -> None:
    scale = SCALE_BYTES if k.dtype == torch.int8 else 0
    if not serves_attention(q.dtype, q.shape[2], v.shape[2] - scale) or q.shape[1] % k.shape[1]:
        raise KernelError(f"attention does not serve {q.dtype} q {list(q.shape)}")
    if k.dtype != v.dtype or (k.dtype != q.dtype and k.dtype not in BYTE_DTYPES):
        raise KernelError("q, k and v must have one dtype, or k and v one of a byte")
    if k.shape[2] != q.shape[2] + scale:
        raise KernelError("q, k and v must have one head width")
    if q.stride(2) != 1 or k.stride(2) != 1 or v.stride(2) != 1:
        raise KernelError("heads must be contiguous")
    if window is not None and chunk is not None:
        raise KernelError("a layer has a sliding window or chunks, not both")
    if len(blocks):
        tables.check(blocks, q.shape[0], window, chunk)


def _float_rows(tensor: torch.Tensor | None, shape: tuple[int, ...], name: str) -> int | None:
    if tensor is None:
        return None
    if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape or not tensor.is_contiguous():
        raise KernelError(f"{name} must be contiguous float32 {list(shape)}")
    return tensor.data_ptr()
