"""Blocks taken apart give the numbers that the gguf package reads from the same bytes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from sglang.srt.layers.quantization import gguf_blocks
from sglang.srt.layers.quantization.gguf_blocks import BlockCodes, is_served, take_apart

# Where a block holds 16-bit numbers: random bytes there could be infinite.
HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "MXFP4": (),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
ROUNDED = {"Q4_K", "Q5_K", "Q6_K", "IQ4_XS"}


def random_rows(name: str, rows: int, blocks: int, scale: float, seed: int = 0) -> np.ndarray:
    """uint8 [rows, bytes]: any codes, with 16-bit scales around `scale`."""
    random = np.random.default_rng(seed)
    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    data = random.integers(0, 256, (rows * blocks, size), np.uint8)
    for at in HALVES[name]:
        values = (random.uniform(-1, 1, rows * blocks) * scale).astype("<f2")
        data[:, at : at + 2] = values.view(np.uint8).reshape(-1, 2)
    if name == "MXFP4":  # powers of two, up to that of the scale
        top = 128 + round(np.log2(scale))
        data[:, 0] = random.integers(top - 30, top + 1, rows * blocks)
    return data.reshape(rows, -1)


def numbers(found: BlockCodes) -> np.ndarray:
    codes = found.codes.astype(np.float64)
    if found.codes.dtype == np.uint8:
        blocks = found.codes.reshape(len(codes), -1, 16)
        codes = np.concatenate((blocks & 15, blocks >> 4), -1).reshape(len(codes), -1)
    if found.values is not None:
        codes = np.array(found.values, np.float64)[codes]
    group = codes.shape[1] // found.scales.shape[1]
    wide = codes * found.scales.astype(np.float64).repeat(group, 1)
    if found.mins is not None:
        wide += found.mins.astype(np.float64).repeat(group, 1)
    return wide * found.gain


@pytest.mark.parametrize("name", sorted(HALVES))
@pytest.mark.parametrize("scale", [1.0, 3e-5])
def test_numbers_are_those_of_the_gguf_package(name: str, scale: float) -> None:
    rows = random_rows(name, 7, 3, scale)
    want = gguf.dequantize(rows, gguf.GGMLQuantizationType[name]).astype(np.float64)
    found = numbers(take_apart(name, rows))
    assert found.shape == want.shape
    assert np.abs(want).max() > scale
    # of a K-quant a scale and a minimum are rounded to 11 bits each
    tolerance = 2.0**-10 * np.abs(want).max() if name in ROUNDED else 1e-6 * np.abs(want).max()
    np.testing.assert_allclose(found, want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", sorted(HALVES))
def test_a_tensor_is_taken_apart_piece_by_piece(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(name, 11, 2, 0.01)
    whole = take_apart(name, rows)
    monkeypatch.setattr(gguf_blocks, "_CODES_AT_ONCE", 1 << 10)
    pieces = take_apart(name, rows)
    assert pieces.gain == whole.gain
    np.testing.assert_array_equal(numbers(pieces), numbers(whole))


def test_rows_of_zeros() -> None:
    for name in HALVES:
        rows = np.zeros_like(random_rows(name, 2, 2, 1.0))
        assert not numbers(take_apart(name, rows)).any()


def test_powers_far_apart_are_exact() -> None:
    """Of MXFP4 what is far below 2^-38 of the largest becomes 0, the rest is the file's."""
    powers = np.array([200, 186, 163, 136], np.uint8)
    rows = np.concatenate((powers[:, None], np.full((4, 16), 0x71, np.uint8)), 1).reshape(1, -1)
    want = gguf.dequantize(rows, gguf.GGMLQuantizationType.MXFP4).astype(np.float64)[0]
    found = numbers(take_apart("MXFP4", rows))[0]
    np.testing.assert_array_equal(found[:96], want[:96])
    assert not found[96:].any()


def test_types_and_widths_that_are_served() -> None:
    assert {name for name in HALVES if is_served(name, 512)} == set(HALVES)
    assert set(HALVES) == gguf_blocks.SERVED_TYPES
    assert is_served("Q4_1", 576)
    assert not is_served("Q4_K", 576)
    assert not is_served("F16", 576)
    assert not is_served("IQ3_XXS", 512)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q4_K", "MXFP4", "IQ4_NL", "IQ4_XS"])
def test_codes_of_four_bits_stay_two_to_a_byte(name: str) -> None:
    found = take_apart(name, random_rows(name, 5, 2, 1.0))
    assert found.codes.dtype == np.uint8
    assert found.codes.shape[1] * 2 == found.scales.shape[1] * 32
    assert (found.values is None) == name.startswith("Q")
