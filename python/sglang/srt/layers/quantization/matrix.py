"""A layer's weight that stays quantised: products with it, and rows of it as numbers.

A few rows of input go through the native kernel, which reads every code once. Many go through a
tile of the weight at a time, turned into numbers and multiplied by PyTorch: the work of that is
then small beside the product's. In float32 both compute with the same numbers. Inputs of 16 bits,
which are rounded already, are rounded once more to bytes for a few rows where the processor
multiplies bytes; without dot products of these, for any number of rows where codes are small.
Where it multiplies bfloat16 by matrix tiles, all but a few rows of that type meet
a weight that the native kernel rounds to it. On a GPU the kernels take any number of rows. See
docs/quantized_weights.md.

Legend: N outputs, K inputs.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Protocol, Self

import torch

from sglang.srt.layers.products import cpu_multiplies, tiled_linear
from sglang.srt.utils.native import native_kernels

# Up to so many rows the native kernel is the faster way, see benchmark/cpu/bench_quantized.py.
_NATIVE_ROWS = 64
# The same of E4M3 with inputs of bfloat16, whose tiles PyTorch multiplies faster.
_NATIVE_FP8_ROWS = 32
# Without dot products of bytes inputs are rounded up to so many rows where a block's sums don't fit
# 16 bits, else for any number.
_ROUNDED_ROWS_OF_PAIRS = 8
# Beside matrix tiles inputs are rounded up to so many rows only, see the same.
_ROUNDED_ROWS_BESIDE_TILES = 4
QUANTIZED_BLOCK = 32  # inputs that can't be cut apart


@cache
def _has_byte_dots() -> bool:
    kernels = native_kernels()
    return kernels is not None and bool(kernels.has_byte_dots())


@cache
def _has_tiles() -> bool:
    kernels = native_kernels()
    return kernels is not None and bool(kernels.has_tiles())


def rounds_inputs(dtype: torch.dtype) -> bool:
    """Whether a few inputs of `dtype` are rounded to bytes for products with codes."""
    return dtype is not torch.float32 and _has_byte_dots()


@cache
def _most_rounded_rows(has_short_sums: bool) -> int:
    kernels = native_kernels()
    if kernels is None or not kernels.has_byte_dots():
        return 0
    if kernels.cpu_isa().name in ("AVX2", "AVX512"):
        return sys.maxsize if has_short_sums else _ROUNDED_ROWS_OF_PAIRS
    return _NATIVE_ROWS


def _rounds(part: QuantizedWeight, flat: torch.Tensor) -> bool:
    """Whether the rows of flat [R, K] are rounded to bytes for a product with `part`."""
    few = _most_rounded_rows(part.has_short_sums)
    return flat.dtype is not torch.float32 and not part.is_fp8 and len(flat) <= few


def _by_tiles(flat: torch.Tensor) -> bool:
    """Whether matrix tiles multiply the rows of flat [R, K] fastest."""
    few = len(flat) <= _ROUNDED_ROWS_BESIDE_TILES
    return not few and flat.dtype is torch.bfloat16 and _has_tiles()


class QuantizedWeight(Protocol):
    """What is needed of `sgl_kernel.QuantizedWeight`, or of the one in sgl_kernel.triton.

    `on_device`: it computes on a GPU alone, and its layout may be cut on the host before.
    `is_fp8`: codes are E4M3, no integers that bytes could meet.
    """

    on_device: bool
    codes: torch.Tensor
    scales: torch.Tensor
    mins: torch.Tensor | None
    has_short_sums: bool
    is_fp8: bool
    rounds_inputs: bool  # only of those on a device

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def layout(self) -> tuple[object, ...]: ...

    @property
    def nbytes(self) -> int: ...

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self: ...

    def rows(self, first: int, last: int) -> Self: ...

    def columns(self, first: int, last: int) -> Self: ...

    def take(self, rows: torch.Tensor) -> Self: ...

    def multiply(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        num_threads: int = 1,
        round_inputs: bool = False,
        round_weight: bool = False,
    ) -> torch.Tensor: ...

    def multiply_into(
        self, out: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> None:
        """Only of those on a device."""

    def dequantize(self, dtype: torch.dtype, *, num_threads: int = 1) -> torch.Tensor: ...

    def dequantize_rows(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor: ...

    def dequantize_into(self, out: torch.Tensor, *, num_threads: int = 1) -> None: ...


def move_to(weight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
    """The same weight. Side effect: it holds copies on `device` of tensors that are elsewhere."""
    weight.codes, weight.scales = weight.codes.to(device), weight.scales.to(device)
    weight.mins = None if weight.mins is None else weight.mins.to(device)
    return weight


def numbers_like(weight: QuantizedWeight, target: torch.Tensor) -> torch.Tensor:
    """The weight as numbers of the type of `target`, where that lies. Side effect of `move_to`."""
    threads = torch.get_num_threads()
    return move_to(weight, target.device).dequantize(target.dtype, num_threads=threads)


class QuantizedMatrix:
    """A weight [N, K] of parts that stand one below another, joined where their layouts allow."""

    def __init__(self, parts: Sequence[QuantizedWeight]) -> None:
        joined = []
        for _, group in itertools.groupby(parts, key=lambda part: part.layout):
            some = list(group)
            joined.append(some[0] if len(some) == 1 else type(some[0]).join(some))
        self._parts = tuple(joined)
        self._on_device = any(part.on_device for part in joined)
        starts = itertools.accumulate((part.shape[0] for part in joined), initial=0)
        *self._starts, num_rows = starts
        self.shape = (num_rows, joined[0].shape[1])

    @property
    def whole(self) -> QuantizedWeight | None:
        """The weight when it is all of one layout, else None."""
        return self._parts[0] if len(self._parts) == 1 else None

    @property
    def is_fp8(self) -> bool:
        """Whether a part has codes of E4M3."""
        return any(part.is_fp8 for part in self._parts)

    def round_fp8_inputs(self) -> None:
        """From now on parts of E4M3 on a GPU meet many rows that are rounded to it too.

        What is many, and which GPUs do, the kernels know.
        """
        for part in self._parts:
            if part.is_fp8 and part.on_device:
                part.rounds_inputs = True

    @property
    def nbytes(self) -> int:
        """Memory of all parts, in bytes."""
        return sum(part.nbytes for part in self._parts)

    def tensors(self) -> Iterator[torch.Tensor]:
        """The memory of all parts: codes, scales and minima."""
        for part in self._parts:
            yield from (t for t in (part.codes, part.scales, part.mins) if t is not None)

    def replace_tensors(self, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Hold `move(tensor)`, an equal one that is contiguous, instead of each of `tensors()`."""
        for part in self._parts:
            part.codes, part.scales = move(part.codes), move(part.scales)
            part.mins = None if part.mins is None else move(part.mins)

    def product(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        first: int = 0,
        last: int | None = None,
    ) -> torch.Tensor:
        """x [*, K] times the outputs [first, last) transposed: [*, last - first].

        `last` None: to the end. `bias` is that of these outputs. Summed in float32 or wider, in
        the type of x.
        """
        last = self.shape[0] if last is None else last
        flat = x.reshape(-1, self.shape[1])
        if self._on_device:
            return self._on_gpu(flat, bias, first, last).view(*x.shape[:-1], last - first)
        natively = len(flat) <= self._most_native_rows(flat.dtype) or _by_tiles(flat)
        if natively or all(_rounds(part, flat) for part in self._parts):
            out = self._native(flat, bias, first, last)
        else:
            tile_dtype = x.dtype if cpu_multiplies(x.dtype) else torch.float32
            out = tiled_linear(
                flat,
                (last - first, self.shape[1]),
                lambda tile, begin: self._fill(tile, first + begin),
                bias,
                tile_dtype,
            )
        return out.view(*x.shape[:-1], last - first)

    def _most_native_rows(self, dtype: torch.dtype) -> int:
        return _NATIVE_FP8_ROWS if self.is_fp8 and dtype is torch.bfloat16 else _NATIVE_ROWS

    def take(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The rows of int64 `rows` [*] as numbers: [*, K] in `dtype`."""
        flat = rows.reshape(-1)
        if len(self._parts) == 1:
            out = self._parts[0].dequantize_rows(flat, dtype)
        elif self._on_device:
            out = self._take_from_all(flat, dtype)
        else:
            out = torch.empty(len(flat), self.shape[1], dtype=dtype)
            for start, part in zip(self._starts, self._parts, strict=True):
                here = (flat >= start) & (flat < start + part.shape[0])
                out[here] = part.take(flat[here] - start).dequantize(dtype)
        return out.view(*rows.shape, self.shape[1])

    def _take_from_all(self, flat: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows of every part for all of int64 `flat` [R], and the right ones of these.

        No size depends on what `flat` holds, so nothing waits for it.
        """
        out = torch.zeros(len(flat), self.shape[1], dtype=dtype, device=flat.device)
        for start, part in zip(self._starts, self._parts, strict=True):
            local = flat - start
            here = (local >= 0) & (local < part.shape[0])
            rows = part.dequantize_rows(local.clamp(0, part.shape[0] - 1), dtype)
            out = torch.where(here.unsqueeze(-1), rows, out)
        return out

    def _on_gpu(
        self, flat: torch.Tensor, bias: torch.Tensor | None, first: int, last: int
    ) -> torch.Tensor:
        """flat [R, K] times the outputs [first, last), each part's written in its place."""
        out = flat.new_empty(len(flat), last - first)
        for begin, part in self._parts_of(first, last):
            place = slice(begin - first, begin - first + part.shape[0])
            part.multiply_into(out[:, place], flat, None if bias is None else bias[place])
        return out

    def _native(
        self, flat: torch.Tensor, bias: torch.Tensor | None, first: int, last: int
    ) -> torch.Tensor:
        threads = torch.get_num_threads()
        tiles = _by_tiles(flat)
        outs = []
        for begin, part in self._parts_of(first, last):
            end = begin + part.shape[0]
            outs.append(
                part.multiply(
                    flat,
                    None if bias is None else bias[begin - first : end - first],
                    num_threads=threads,
                    round_inputs=not tiles and _rounds(part, flat),
                    round_weight=tiles,
                )
            )
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)

    def _fill(self, tile: torch.Tensor, first: int) -> None:
        """Write the outputs from `first` on into tile [outputs, K]."""
        threads = torch.get_num_threads()
        for begin, part in self._parts_of(first, first + len(tile)):
            rows = tile[begin - first : begin - first + part.shape[0]]
            part.dequantize_into(rows, num_threads=threads)

    def _parts_of(self, first: int, last: int) -> list[tuple[int, QuantizedWeight]]:
        """(first output, part) of the pieces that make up the outputs [first, last)."""
        found = []
        for start, part in zip(self._starts, self._parts, strict=True):
            end = start + part.shape[0]
            if start >= first and end <= last:
                found.append((start, part))
            elif start < last and end > first:
                begin = max(start, first)
                found.append((begin, part.rows(begin - start, min(end, last) - start)))
        return found

    def __repr__(self) -> str:
        return f"QuantizedMatrix({self.shape}, {self.nbytes} bytes)"
