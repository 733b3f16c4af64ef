"""Token codes: 1,024 sign vectors of length 128, no two of which have much in common.

Code (a, b) is x -> (-1)^Tr(a x + b x^3) over the 128 elements x of GF(2^7): the words of the dual
of the double-error-correcting BCH code, lengthened by the element 0. Two different codes agree and
disagree equally often, up to an inner product of 16 out of 128. Signs are exact in every floating
point type, and so is their inner product in float32.

Source: R. Gold, "Maximal recursive sequences with 3-valued recursive cross-correlation functions",
IEEE Transactions on Information Theory 14 (1968).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

CODE_LENGTH = 128
MAX_CODES = CODE_LENGTH * CODE_LENGTH
MAX_CORRELATION = 16 / CODE_LENGTH  # of two different codes, in size

_DEGREE = 7
_MODULUS = 0b10000011  # x^7 + x + 1, primitive over GF(2)


def token_codes(count: int) -> npt.NDArray[np.float64]:
    """The first `count` codes, [count, 128] of +1 and -1; code i has b = i // 128, a = i % 128.

    Raises ValueError when there are not so many (16,384).
    """
    if not 0 < count <= MAX_CODES:
        raise ValueError(f"{count} codes: there are between 1 and {MAX_CODES}")
    times = _multiplication_table()
    elements = np.arange(CODE_LENGTH)
    cubes = times[elements, times[elements, elements]]
    trace = _traces(times)
    number = np.arange(count)[:, None]
    a, b = number % CODE_LENGTH, number // CODE_LENGTH
    exponent = trace[times[a, elements[None, :]] ^ times[b, cubes[None, :]]]
    return np.where(exponent, -1.0, 1.0)


def _multiplication_table() -> npt.NDArray[np.int64]:
    """Products in GF(2^7), elements written as the bits of their polynomials: [128, 128]."""
    left = np.arange(CODE_LENGTH)[:, None]
    shifted = np.arange(CODE_LENGTH)[None, :].repeat(CODE_LENGTH, axis=0)
    product = np.zeros((CODE_LENGTH, CODE_LENGTH), dtype=np.int64)
    for bit in range(_DEGREE):
        product ^= np.where((left >> bit) & 1, shifted, 0)
        shifted = shifted << 1
        shifted = np.where(shifted >> _DEGREE, shifted ^ _MODULUS, shifted)
    return product


def _traces(times: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Tr(x) = x + x^2 + x^4 + ... + x^64 of every element, each 0 or 1: [128]."""
    power = np.arange(CODE_LENGTH)
    total = np.zeros_like(power)
    for _ in range(_DEGREE):
        total ^= power
        power = times[power, power]
    return total
