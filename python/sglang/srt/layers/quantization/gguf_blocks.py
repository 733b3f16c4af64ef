"""The blocks of GGUF's quantised tensors taken apart into codes, scales and minima.

What comes out is what the native kernels read (`sgl_kernel.QuantizedWeight`): codes of four bits
stay two to a byte, five, six and eight bits become a signed byte each. Values are the file's, but
for the scales of K-quants and of IQ4_XS: these are products, rounded to 16 bits. Codes whose
numbers stand at unequal distances name them; those of MXFP4 are taken twice, with half the scale.

Source: the block layouts of the public GGUF types, checked against `gguf.dequantize` in the tests.
Legend: B blocks, N rows, K inputs of a row, G inputs of a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

UInt8Array = npt.NDArray[np.uint8]
Float16Array = npt.NDArray[np.float16]
Float32Array = npt.NDArray[np.float32]
CodeArray = npt.NDArray[Any]  # uint8 of two codes, or int8 of one

_CODES_AT_ONCE = 1 << 22
_POWER_BIAS = 128  # of the exponent of MXFP4 over twice its numbers
_MXFP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_LOW_HALF, _FOUR_BITS = np.uint8(15), np.uint8(4)


class BlockCodes(NamedTuple):
    """A tensor of N rows: weight = (code * scale + min) * gain.

    `codes` uint8 [N, K / 2] or int8 [N, K], `scales` float16 [N, K / G], `mins` alike or None.
    With `values` a uint8 code names one of these 16, which takes its place; None: of its own value.
    With `group` codes are E4M3, uint8 [N, K], and scales float32 [N, ceil(K / group)].
    """

    codes: CodeArray
    scales: Float16Array | Float32Array
    mins: Float16Array | None
    gain: float
    values: tuple[int, ...] | None = None
    group: int | None = None


class _Parts(NamedTuple):
    """Of B blocks: codes [B, bytes], scales and minima float32 [B, groups]."""

    codes: CodeArray
    scales: Float32Array
    mins: Float32Array | None = None


@dataclass(frozen=True, slots=True)
class _Format:
    """A block of `width` inputs in `num_bytes`; `rounded`: its scales are no 16-bit numbers."""

    width: int
    num_bytes: int
    take_apart: Callable[[UInt8Array], _Parts]
    rounded: bool = False
    scale_at: int = 0  # where its 16-bit scale stands
    powers: bool = False  # its scale is a byte's power of two instead
    values: tuple[int, ...] | None = None  # that its codes name


def is_served(type_name: str, width: int) -> bool:
    """Whether rows of `width` inputs in this GGUF type can be taken apart."""
    found = _FORMATS.get(type_name)
    return found is not None and width % found.width == 0


def take_apart(type_name: str, rows: UInt8Array) -> BlockCodes:
    """Codes of a tensor from its bytes, uint8 [N, bytes of a row]; needs little more than these.

    Raises KeyError for a type that `is_served` does not know.
    """
    form = _FORMATS[type_name]
    blocks_of_row = rows.shape[1] // form.num_bytes
    gain = _gain(rows, form) if form.rounded else 1.0
    step = max(1, _CODES_AT_ONCE // (blocks_of_row * form.width))
    found: list[BlockCodes] = []
    for first in range(0, len(rows), step):
        some = np.ascontiguousarray(rows[first : first + step])
        parts = form.take_apart(some.reshape(-1, form.num_bytes))
        found.append(_as_rows(parts, len(some), gain, form.values))
    if len(found) == 1:
        return found[0]
    mins = [part.mins for part in found if part.mins is not None]
    return BlockCodes(
        np.concatenate([part.codes for part in found]),
        np.concatenate([part.scales for part in found]),
        np.concatenate(mins) if mins else None,
        gain,
        form.values,
    )


def _as_rows(
    parts: _Parts, num_rows: int, gain: float, values: tuple[int, ...] | None
) -> BlockCodes:
    def halves(values: Float32Array) -> Float16Array:
        return (values / np.float32(gain)).astype(np.float16).reshape(num_rows, -1)

    mins = None if parts.mins is None else halves(parts.mins)
    return BlockCodes(parts.codes.reshape(num_rows, -1), halves(parts.scales), mins, gain, values)


def _gain(rows: UInt8Array, form: _Format) -> float:
    """A power of two that brings the scales into the middle of what 16 bits can hold."""
    blocks = rows.reshape(len(rows), -1, form.num_bytes)
    if form.powers:
        # The largest becomes 2^14: what is 38 powers below it is still a 16-bit number.
        return float(2.0 ** (int(blocks[..., 0].max(initial=0)) - _POWER_BIAS - 14))
    scales = _half(blocks[..., form.scale_at : form.scale_at + 2].reshape(-1, 2), 0)
    largest = float(np.abs(scales).max(initial=0.0))
    return 2.0 ** math.ceil(math.log2(largest)) if 0.0 < largest < math.inf else 1.0


def _half(blocks: UInt8Array, at: int) -> Float32Array:
    """The 16-bit number at byte `at` of every block: float32 [B, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _low_high(bytes_: UInt8Array) -> tuple[UInt8Array, UInt8Array]:
    return bytes_ & _LOW_HALF, bytes_ >> _FOUR_BITS


def _q4_0(blocks: UInt8Array) -> _Parts:
    scale = _half(blocks, 0)
    return _Parts(blocks[:, 2:18], scale, -8 * scale)


def _q4_1(blocks: UInt8Array) -> _Parts:
    return _Parts(blocks[:, 4:20], _half(blocks, 0), _half(blocks, 2))


def _five_bits(blocks: UInt8Array, at: int) -> UInt8Array:
    """Codes [B, 32] whose fifth bits stand in 4 bytes at `at`, the other four behind them."""
    fifth = np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little")
    low, high = _low_high(blocks[:, at + 4 : at + 20])
    return np.concatenate((low, high), axis=1) | fifth << _FOUR_BITS


def _q5_0(blocks: UInt8Array) -> _Parts:
    return _Parts(_five_bits(blocks, 2).astype(np.int8) - np.int8(16), _half(blocks, 0))


def _q5_1(blocks: UInt8Array) -> _Parts:
    return _Parts(_five_bits(blocks, 4).view(np.int8), _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: UInt8Array) -> _Parts:
    return _Parts(blocks[:, 2:34].view(np.int8), _half(blocks, 0))


def _mxfp4(blocks: UInt8Array) -> _Parts:
    scale = np.exp2(blocks[:, :1].astype(np.float64) - _POWER_BIAS).astype(np.float32)
    return _Parts(blocks[:, 1:17], scale)


def _iq4_nl(blocks: UInt8Array) -> _Parts:
    return _Parts(blocks[:, 2:18], _half(blocks, 0))


def _iq4_xs(blocks: UInt8Array) -> _Parts:
    """Scales of six bits: two in 16 bits of all eight, four in half a byte of each."""
    upper = np.ascontiguousarray(blocks[:, 2:4]).view("<u2") >> np.arange(0, 16, 2) & 3
    lower = np.stack(_low_high(blocks[:, 4:8]), axis=2).reshape(-1, 8)
    steps = (lower | upper << 4).astype(np.float32) - np.float32(32)
    return _Parts(blocks[:, 8:136], _half(blocks, 0) * steps)


def _six_bits(packed: UInt8Array) -> tuple[UInt8Array, UInt8Array]:
    """Eight scales and eight minima of six bits from 12 bytes: uint8 [B, 8] each."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate((first & 63, third & 15 | first >> 6 << 4), axis=1)
    mins = np.concatenate((second & 63, third >> 4 | second >> 6 << 4), axis=1)
    return scales, mins


def _k_scales(blocks: UInt8Array) -> tuple[Float32Array, Float32Array]:
    """Scales and minima float32 [B, 8] of the K-quants that begin with them."""
    scales, mins = _six_bits(blocks[:, 4:16])
    return _half(blocks, 0) * scales, -_half(blocks, 2) * mins


def _nibbles(packed: UInt8Array) -> UInt8Array:
    """Codes [B, 8, 32] from 128 bytes: of each 32 bytes the low halves, then the high ones."""
    low, high = _low_high(packed.reshape(-1, 4, 32))
    return np.stack((low, high), axis=2).reshape(-1, 8, 32)


def _q4_k(blocks: UInt8Array) -> _Parts:
    codes = _nibbles(blocks[:, 16:144])
    packed = codes[..., :16] | codes[..., 16:] << 4
    return _Parts(packed.reshape(len(blocks), -1), *_k_scales(blocks))


def _q5_k(blocks: UInt8Array) -> _Parts:
    codes = _nibbles(blocks[:, 48:176])
    bit = np.arange(8, dtype=np.uint8)[:, None]
    codes |= (blocks[:, None, 16:48] >> bit & 1) << 4
    return _Parts(codes.view(np.int8).reshape(len(blocks), -1), *_k_scales(blocks))


def _q6_k(blocks: UInt8Array) -> _Parts:
    low, high = _low_high(blocks[:, :128].reshape(-1, 2, 1, 64))
    nibbles = np.concatenate((low, high), axis=2).reshape(-1, 2, 4, 32)
    shift = np.array([0, 2, 4, 6], np.uint8)[:, None]
    codes = nibbles | (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shift & 3) << 4
    signed = codes.reshape(len(blocks), -1).astype(np.int8) - np.int8(32)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
    return _Parts(signed, _half(blocks, 208) * scales)


_FORMATS = {
    "Q4_0": _Format(32, 18, _q4_0),
    "Q4_1": _Format(32, 20, _q4_1),
    "Q5_0": _Format(32, 22, _q5_0),
    "Q5_1": _Format(32, 24, _q5_1),
    "Q8_0": _Format(32, 34, _q8_0),
    "MXFP4": _Format(32, 17, _mxfp4, rounded=True, powers=True, values=_MXFP4),
    "IQ4_NL": _Format(32, 18, _iq4_nl, values=_IQ4),
    "IQ4_XS": _Format(256, 136, _iq4_xs, rounded=True, values=_IQ4),
    "Q4_K": _Format(256, 144, _q4_k, rounded=True),
    "Q5_K": _Format(256, 176, _q5_k, rounded=True),
    "Q6_K": _Format(256, 210, _q6_k, rounded=True, scale_at=208),
}
SERVED_TYPES = frozenset(_FORMATS)
