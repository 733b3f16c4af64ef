"""Calls of a tape that are made as one: a projection to q, k and v with all that follows it.

What a model calls one after the other, a product, norms and rotations of heads and the store of K
and V, is found in the tape by the memory that the calls name; models know nothing of it. The
numbers stay those of the single calls. Left as they are: calls in another order, whose memory
overlaps, or of which another call reads a norm's result, which one call does not write.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sgl_kernel.library import BYTE_DTYPES, SCALE_BYTES, Op, QkvCall

Call = tuple[Op, Any]  # Any: the call's structure

_PRODUCTS = (Op.LINEAR, Op.QUANTIZED_LINEAR)
_MOST_ROTATIONS = 2
# The fields of structures that name what a call writes.
_WRITTEN = frozenset(("out", "total", "lse", "cos", "sin", "highest", "place"))
_SIZES = {0: 4, 1: 2, 2: 2}  # bytes of a number, by dtype


@dataclass(frozen=True)
class Span:
    """Rows of memory: bytes [begin, end)."""

    begin: int
    end: int

    @classmethod
    def of(cls, address: int, rows: int, row: int, width: int, size: int) -> Span:
        """`rows` rows of `width` numbers of `size` bytes, `row` numbers apart."""
        return cls(address, address + ((rows - 1) * row + width) * size)

    def overlaps(self, other: Span) -> bool:
        return self.begin < other.end and other.begin < self.end


@dataclass
class _Projection:
    """What follows a product, as far as it has been read."""

    product_op: Op
    product: Any
    before: list[Call] = field(default_factory=list)  # calls that can be made before the product
    norms: dict[int, Any] = field(default_factory=dict)  # by the address of their result
    rotates: list[tuple[int, Any, Any]] = field(default_factory=list)  # column, norm, rotation

    @property
    def size(self) -> int:
        return _SIZES[self.product.dtype]

    def steps(self, row: int, expected: int) -> bool:
        """Whether rows lie so far apart as expected; of a single row it does not matter."""
        return self.product.rows == 1 or row == expected

    def column(self, address: int) -> int | None:
        """The product's column that stands at `address` in the first row; None: none does."""
        column, rest = divmod(address - self.product.out, self.size)
        return column if not rest and 0 <= column < self.product.out_features else None

    def take(self, op: Op, call: Any) -> bool:
        """Read on; False for a call that does not belong to it."""
        if op is Op.ANGLES and not self.before:
            self.before.append((op, call))
            return True
        if op is Op.NORM:
            return self._take_norm(call)
        return op is Op.ROTATE and self._take_rotate(call)

    def _take_norm(self, call: Any) -> bool:
        heads = call.group
        fits = (
            call.x_dtype == call.dtype == self.product.dtype
            and not call.residual
            and not call.total
            and call.rows == self.product.rows * heads
            and self.steps(call.x_group, self.product.out_row)
            and (heads == 1 or call.x_row == call.width)
            and call.out_row == call.width
            and self.column(call.x) is not None
        )
        self.norms[call.out] = call
        return fits

    def _take_rotate(self, call: Any) -> bool:
        norm = self.norms.pop(call.x, None)
        column = self.column(call.x if norm is None else norm.x)
        row = self.product.out_row
        if norm is not None:
            row = norm.group * norm.width
            if norm.width != call.head_dim or call.width != row:
                return False
        fits = call.dtype == self.product.dtype and call.rows == self.product.rows
        if column is None or not fits or not self.steps(call.x_row, row):
            return False
        self.rotates.append((column, norm, call))
        return len(self.rotates) <= _MOST_ROTATIONS


def fuse(calls: Sequence[Call]) -> list[Call]:
    """The same calls, with those of each projection to q, k and v as one. Changes none of them."""
    fused: list[Call] = []
    at = 0
    while at < len(calls):
        count, made = _fused_at(calls, at)
        fused += made
        at += count
    return fused


def _fused_at(calls: Sequence[Call], first: int) -> tuple[int, list[Call]]:
    """How many calls from `first` on are replaced, and by what."""
    single = 1, [calls[first]]
    op, product = calls[first]
    if op not in _PRODUCTS:
        return single
    found = _Projection(op, product)
    for at in range(first + 1, len(calls)):
        op, call = calls[at]
        if op is Op.STORE:
            later = calls[at + 1 :]
            joined = _join(found, call, later)
            return single if joined is None else (at + 1 - first, [*found.before, joined])
        if not found.take(op, call):
            break
    return single


def _join(found: _Projection, store: Any, later: Sequence[Call]) -> Call | None:
    """The one call; None where it would not be the same."""
    product, size = found.product, found.size
    value = found.column(store.v)
    same = store.plane_dtype == -1 or store.x_dtype == product.dtype
    if value is None or found.norms or not same or store.rows != product.rows:
        return None
    k_columns = _columns(store, size, store.k_bytes, store.k_dim)
    v_columns = _columns(store, size, store.v_bytes, store.v_dim)
    dims = {rotate.head_dim for _, _, rotate in found.rotates}
    if len(dims) > 1 or value + v_columns != product.out_features:
        return None
    dim = dims.pop() if dims else store.k_dim
    spans = [column for column, _, _ in found.rotates] + [value, k_columns]
    if any(span % dim for span in spans) or not _holds_keys(found, store, k_columns, dim):
        return None
    if not found.steps(store.v_row, product.out_row * size):
        return None
    if not _apart(found) or _is_read(found, later):
        return None
    call = QkvCall(
        product=ctypes.addressof(product), store=ctypes.addressof(store),
        k_columns=k_columns, v_columns=v_columns, head_dim=dim,
        v_dim=store.v_dim, product_op=found.product_op,
    )  # fmt: skip
    for i, (column, norm, rotate) in enumerate(found.rotates):
        call.columns[i] = column
        call.norms[i] = None if norm is None else ctypes.addressof(norm)
        call.rotates[i] = ctypes.addressof(rotate)
    return Op.QKV, call


def _columns(store: Any, size: int, num_bytes: int, dim: int) -> int:
    """Numbers of a row that takes so many bytes in its plane, in heads of `dim`."""
    if store.plane_dtype == -1:
        return num_bytes // size
    if store.plane_dtype == BYTE_DTYPES[torch.int8]:
        return num_bytes // (dim + SCALE_BYTES) * dim
    return num_bytes


def _holds_keys(found: _Projection, store: Any, k_columns: int, dim: int) -> bool:
    """Whether the keys stored are whole heads of one rotation's result, or of the product's."""
    size = found.size
    column = found.column(store.k)
    if column is not None:
        turned = {first + n for first, _, one in found.rotates for n in range(one.width)}
        plain = not turned & set(range(column, column + k_columns))
        row = found.product.out_row * size
        return plain and column % dim == 0 and found.steps(store.k_row, row)
    for _, _, rotate in found.rotates:
        column, rest = divmod(store.k - rotate.out, size)
        inside = column >= 0 and column + k_columns <= rotate.width
        if inside and not rest and column % dim == 0:
            return found.steps(store.k_row, rotate.out_row * size)
    return False


def _apart(found: _Projection) -> bool:
    """Whether nothing that is written lies where something else is read or written."""
    product, size = found.product, found.size
    rows = product.rows
    read = [Span.of(product.x, rows, product.x_row, product.in_features, size)]
    written = [Span.of(product.out, rows, product.out_row, product.out_features, size)]
    for _, _, one in found.rotates:
        written.append(Span.of(one.out, rows, one.out_row, one.width, size))
        read += [Span.of(one.cos, rows, one.angle_row, one.head_dim, 4)]
        read += [Span.of(one.sin, rows, one.angle_row, one.head_dim, 4)]
    pairs = [(a, b) for i, a in enumerate(written) for b in [*written[i + 1 :], *read]]
    for _, one in found.before:  # made before the product then
        pairs += [
            (read[0], Span.of(at, one.rows, 2 * one.half, 2 * one.half, 4))
            for at in (one.cos, one.sin)
        ]
    return not any(a.overlaps(b) for a, b in pairs)


def _is_read(found: _Projection, later: Sequence[Call]) -> bool:
    """Whether a later call reads a norm's result before another call writes there."""
    for _, norm, _ in found.rotates:
        if norm is None:
            continue
        span = Span.of(norm.out, norm.rows, norm.out_row, norm.width, found.size)
        for _, call in later:
            names = {name for name, at in pointers(call) if span.begin <= at < span.end}
            if names - _WRITTEN:
                return True
            if names or span.overlaps(_result(call)):
                break
    return False


def _result(call: Any) -> Span:
    """Where the rows of a call's `out` lie; empty for calls without."""
    known = all(hasattr(call, name) for name in ("out", "out_row", "rows", "dtype"))
    if not known or not call.out:
        return Span(0, 0)
    return Span(call.out, call.out + call.rows * call.out_row * _SIZES[call.dtype])


def pointers(call: ctypes.Structure) -> Iterator[tuple[str, int]]:
    """The addresses that a structure names, with the names of their fields."""
    for name, kind, *_ in call._fields_:
        value = getattr(call, name)
        if isinstance(value, ctypes.Structure):
            yield from pointers(value)
        elif kind is ctypes.c_void_p and value:
            yield name, value
