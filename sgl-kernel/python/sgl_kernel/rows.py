"""Work on single rows, each read from memory once: norms, gates, rotations, copies to slots.

Computed in float32 and rounded once. Sources: RMSNorm, arXiv 1910.07467; SwiGLU, arXiv 2002.05202;
rotary embedding, arXiv 2104.09864.

Legend: R rows, D width, H heads, G kv heads, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch

from sgl_kernel.library import (
    BYTE_DTYPES,
    DTYPES,
    SCALE_BYTES,
    AnglesCall,
    GateCall,
    GatherCall,
    HighestCall,
    Isa,
    KernelError,
    NormCall,
    Op,
    RotateCall,
    ScaleCall,
    StoreCall,
    WidenCall,
    allowed_isa,
)
from sgl_kernel.tape import empty, make

_FP8 = frozenset(BYTE_DTYPES[dtype] for dtype in (torch.float8_e4m3fn, torch.float8_e5m2))


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    *,
    offset: float = 0.0,
    keep: bool = False,
    num_threads: int = 1,
    isa: Isa | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Normalise x [R, D], or x + residual: (norm [R, D] in the weight's type, the float32 sum).

    The factor is offset + weight [D]; `residual` is float32 [R, D]. Without one the second is x in
    float32 when `keep`, else None. x may be [T, H, D] instead, its heads at any strides, for
    R = T * H rows. `isa` lowers the instructions used. Raises KernelError for what is not served.
    """
    width = x.shape[-1]
    rows = x.numel() // width
    group, x_group = (rows, 0) if x.dim() == 2 else (x.shape[1], x.stride(0))
    if x.dtype not in DTYPES or weight.dtype not in DTYPES or x.stride(-1) != 1:
        raise KernelError(f"rms_norm does not serve {x.dtype} by {weight.dtype}")
    if weight.shape != (width,) or not weight.is_contiguous():
        raise KernelError(f"the weight must be contiguous [{width}]")
    out = empty((rows, width), weight.dtype)
    total = None
    if residual is not None:
        fits = residual.shape == (rows, width) and residual.stride(1) == 1
        if residual.dtype != torch.float32 or not fits:
            raise KernelError(f"the residual must be float32 {list(x.shape)}")
    if residual is not None or keep:
        total = empty((rows, width), torch.float32)
    call = NormCall(
        x.data_ptr(), None if residual is None else residual.data_ptr(),
        None if total is None else total.data_ptr(), weight.data_ptr(), out.data_ptr(),
        x.stride(-2), 0 if residual is None else residual.stride(0), width, width,
        group or 1, x_group, rows, width,
        eps, offset, DTYPES[x.dtype], DTYPES[weight.dtype],
        allowed_isa(isa), num_threads,
    )  # fmt: skip
    make(Op.NORM, call, x, residual, weight)
    return out, total


def silu_and_mul(x: torch.Tensor, *, num_threads: int = 1, isa: Isa | None = None) -> torch.Tensor:
    """silu(gate) * up of x [R, 2 D], which holds gate then up: [R, D] in the type of x.

    `isa` lowers the instructions used. Raises KernelError for what is not served.
    """
    return gate_and_mul(x, Gate(GateKind.SILU), num_threads=num_threads, isa=isa)


class GateKind(IntEnum):
    """How a gate opens, as csrc/api.h numbers it."""

    SILU = 0
    GELU_TANH = 1
    CLAMPED = 2


@dataclass(frozen=True, slots=True)
class Gate:
    """SILU: silu(gate) * up. GELU_TANH: gelu(gate) * up by its approximation with tanh. CLAMPED:
    (up + 1) * gate * sigmoid(alpha * gate), gate at most `limit` and up within +-`limit`."""

    kind: GateKind
    alpha: float = 0.0
    limit: float = 0.0


def gate_and_mul(
    x: torch.Tensor, gate: Gate, *, num_threads: int = 1, isa: Isa | None = None
) -> torch.Tensor:
    """The gate of x [R, 2 D], which holds gates then ups: [R, D] in the type of x.

    `isa` lowers the instructions used. Raises KernelError for what is not served.
    """
    rows, width = x.shape[0], x.shape[1] // 2
    if x.dtype not in DTYPES or x.stride(1) != 1 or x.shape[1] % 2:
        raise KernelError(f"gates of {x.dtype} {list(x.shape)} are not served")
    out = empty((rows, width), x.dtype)
    call = GateCall(
        x.data_ptr(), out.data_ptr(), x.stride(0), width, rows, width, DTYPES[x.dtype],
        allowed_isa(isa), num_threads, gate.kind, gate.alpha, gate.limit,
    )  # fmt: skip
    make(Op.GATE, call, x)
    return out


def scale(x: torch.Tensor, factor: float, *, num_threads: int = 1) -> torch.Tensor:
    """x [R, D] times `factor`, rounded to float32: a new tensor of its type.

    Raises KernelError for what is not served.
    """
    return _scale(x, None, factor, 0.0, 1.0, num_threads)


def scale_by_position(
    x: torch.Tensor,
    positions: torch.Tensor,
    *,
    attn_scale: float,
    floor_scale: float,
    num_threads: int = 1,
) -> torch.Tensor:
    """Row r of x [R, D] times 1 + attn_scale * ln(1 + floor((positions[r] + 1) / floor_scale)).

    Factors are taken in float64 and rounded to float32; `positions` is contiguous int64 [R]. Raises
    KernelError for what is not served.
    """
    if positions.dtype != torch.int64 or positions.shape != x.shape[:1]:
        raise KernelError(f"positions must be int64 [{len(x)}]")
    if not positions.is_contiguous() or floor_scale <= 0:
        raise KernelError("positions must be contiguous, and floor_scale positive")
    return _scale(x, positions, 0.0, attn_scale, floor_scale, num_threads)


def _scale(
    x: torch.Tensor,
    positions: torch.Tensor | None,
    factor: float,
    attn_scale: float,
    floor_scale: float,
    num_threads: int,
) -> torch.Tensor:
    rows, width = x.shape
    if x.dtype not in DTYPES or x.stride(1) != 1 or not width:
        raise KernelError(f"scale does not serve {x.dtype} {list(x.shape)}")
    out = empty((rows, width), x.dtype)
    call = ScaleCall(
        x.data_ptr(), out.data_ptr(), None if positions is None else positions.data_ptr(),
        x.stride(0), width, rows, width, attn_scale, floor_scale, factor, DTYPES[x.dtype],
        num_threads,
    )  # fmt: skip
    make(Op.SCALE, call, x, positions)
    return out


def rotate(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
    num_threads: int = 1,
    isa: Isa | None = None,
) -> torch.Tensor:
    """Turn the heads of x [R, H * D] by the angles of their rows: a new [R, H * D] of its type.

    `cos` and `sin` are float32 [R, D] or [R, 1, D]; the sine of a pair's first dimension comes
    negated. Pairs are dimensions d and d + D / 2, or 2 d and 2 d + 1 when `interleaved`. `isa`
    lowers the instructions used. Raises KernelError for what is not served.
    """
    rows, width = x.shape
    dim = cos.shape[-1]
    if x.dtype not in DTYPES or x.stride(1) != 1 or dim < 2 or dim % 2 or width % dim:
        raise KernelError(f"rotate does not serve {x.dtype} {list(x.shape)} in heads of {dim}")
    for angles in (cos, sin):
        if angles.dtype != torch.float32 or angles.numel() != rows * dim:
            raise KernelError(f"angles must be float32 [{rows}, {dim}]")
        if not angles.is_contiguous():
            raise KernelError("angles must be contiguous")
    out = empty((rows, width), x.dtype)
    call = RotateCall(
        x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), x.stride(0), dim, width,
        rows, width, dim, interleaved, DTYPES[x.dtype],
        allowed_isa(isa), num_threads,
    )  # fmt: skip
    make(Op.ROTATE, call, x, cos, sin)
    return out


def angles(
    positions: torch.Tensor,
    frequencies: torch.Tensor,
    *,
    scaling: float = 1.0,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine float32 [R, D] of contiguous int64 positions [R], as `rotate` takes them.

    `frequencies` float64 [D / 2] are radians for each position; both results are `scaling` times as
    large. Angles and their functions are taken in float64. Raises KernelError for other types.
    """
    if positions.dtype != torch.int64 or frequencies.dtype != torch.float64:
        raise KernelError("positions must be int64 and frequencies float64")
    if not positions.is_contiguous() or not frequencies.is_contiguous():
        raise KernelError("positions and frequencies must be contiguous")
    rows, half = len(positions), len(frequencies)
    cos, sin = (empty((rows, 2 * half), torch.float32) for _ in range(2))
    call = AnglesCall(
        positions.data_ptr(), frequencies.data_ptr(), cos.data_ptr(), sin.data_ptr(), rows, half,
        scaling, interleaved,
    )  # fmt: skip
    make(Op.ANGLES, call, positions, frequencies)
    return cos, sin


def gather(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rows of table [N, D]: row i of the result [R, D] is that of contiguous int64 ids[i].

    Every id must be in [0, N), which the caller has made sure of. Raises KernelError for others
    shapes and types.
    """
    if ids.dtype != torch.int64 or ids.dim() != 1 or not ids.is_contiguous():
        raise KernelError("ids must be contiguous int64")
    if table.dim() != 2 or table.stride(1) != 1:
        raise KernelError("rows of the table must be contiguous")
    width, size = table.shape[1], table.element_size()
    out = empty((len(ids), width), table.dtype)
    call = GatherCall(
        table.data_ptr(), out.data_ptr(), ids.data_ptr(), table.stride(0) * size, width * size,
        len(ids), width * size,
    )  # fmt: skip
    make(Op.GATHER, call, table, ids)
    return out


def widen(x: torch.Tensor, *, num_threads: int = 1) -> torch.Tensor:
    """x [R, D] in float32. Raises KernelError for types that are not served."""
    rows, width = x.shape
    if x.dtype not in DTYPES or x.stride(1) != 1:
        raise KernelError(f"widen does not serve {x.dtype}")
    out = empty((rows, width), torch.float32)
    call = WidenCall(
        x.data_ptr(), out.data_ptr(), x.stride(0), rows, width, DTYPES[x.dtype], num_threads
    )
    make(Op.WIDEN, call, x)
    return out


def highest(
    x: torch.Tensor, *, num_threads: int = 1, isa: Isa | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest of each row of float32 x [R, D], and int64 [R], where it stands first.

    A row with a NaN has NaN as its highest, at 0. `isa` lowers the instructions used. Raises
    KernelError for other types.
    """
    rows, width = x.shape
    if x.dtype != torch.float32 or x.stride(1) != 1 or not width:
        raise KernelError(f"highest does not serve {x.dtype} {list(x.shape)}")
    values = empty((rows,), torch.float32)
    places = empty((rows,), torch.int64)
    call = HighestCall(
        x.data_ptr(), values.data_ptr(), places.data_ptr(), x.stride(0), rows, width,
        allowed_isa(isa), num_threads,
    )  # fmt: skip
    make(Op.HIGHEST, call, x)
    return values, places


class KVPlanes:
    """A layer's K and V planes [S, G, D] as `store` writes them, of int8 [S, G, D + 4].

    Holds both tensors.

    Raises KernelError where a slot of a plane is not contiguous.
    """

    def __init__(self, k_plane: torch.Tensor, v_plane: torch.Tensor) -> None:
        self.planes = (k_plane, v_plane)
        for plane in self.planes:
            if not plane[0].is_contiguous():
                raise KernelError(f"slots of {list(plane.shape)} must be contiguous")
        self._shapes = tuple(tuple(plane.shape[1:]) for plane in self.planes)
        scale = SCALE_BYTES if k_plane.dtype == torch.int8 else 0
        self._rounded_shapes = tuple((heads, width - scale) for heads, width in self._shapes)
        self._dtypes = (k_plane.dtype, v_plane.dtype)
        same = k_plane.dtype == v_plane.dtype
        self._byte = BYTE_DTYPES.get(k_plane.dtype) if same else None  # that rows are rounded to
        self._addresses = (k_plane.data_ptr(), v_plane.data_ptr())
        self._slot_bytes = tuple(p.stride(0) * p.element_size() for p in self.planes)
        self._row_bytes = tuple(p.shape[1] * p.shape[2] * p.element_size() for p in self.planes)

    def store(
        self,
        slots: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
        num_threads: int = 1,
    ) -> None:
        """Write row i of k and v [R, G, D] into slot slots[i] of their planes.

        Rows are of the type of their plane. Into planes of fp8 they may be wider floats, both of
        one type: divided by their scale, rounded to the nearest, beyond the largest finite number
        to that one, NaN kept. Into planes of int8 too: a head to multiples of its largest over 127,
        all NaN with one. Scales are for fp8 alone; dividing is a product with the float32 inverse.
        `slots` int64 [R] must be distinct and in [0, S), which the caller has made sure of: a
        step's slots are the same for every layer. Raises KernelError for other shapes or types.
        """
        rows = len(slots)
        if slots.dtype != torch.int64 or not slots.is_contiguous():
            raise KernelError("slots must be contiguous int64")
        sources = []
        rounds = k.dtype == v.dtype and k.dtype in DTYPES and self._byte is not None
        if (k_scale, v_scale) != (1.0, 1.0) and not (rounds and self._byte in _FP8):
            raise KernelError("only rows that are rounded to fp8 have scales")
        shapes = self._rounded_shapes if rounds else self._shapes
        for new, shape, dtype in zip((k, v), shapes, self._dtypes, strict=True):
            fits = new.dtype == dtype or rounds
            if not fits or len(new) != rows or new.shape[1:] != shape:
                raise KernelError(f"{new.dtype} {list(new.shape)} does not fit the plane's slots")
            row, head, element = new.stride()
            if element != 1 or (head != shape[1] and shape[0] > 1):
                raise KernelError("rows must be contiguous")
            sources.append((new.data_ptr(), row * new.element_size()))
        (k_data, k_row), (v_data, v_row) = sources
        call = StoreCall(
            k_data, v_data, *self._addresses, slots.data_ptr(), k_row, v_row, *self._slot_bytes,
            rows, *self._row_bytes, *(width for _, width in self._rounded_shapes),
            DTYPES[k.dtype] if rounds else 0, self._byte if rounds else -1, num_threads,
            1.0 / k_scale, 1.0 / v_scale,
        )  # fmt: skip
        make(Op.STORE, call, slots, k, v, *self.planes)
