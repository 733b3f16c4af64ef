"""Native products with quantised weights against float64, at every level of instructions here."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

sgl_kernel = pytest.importorskip("sgl_kernel")

from kernels.quantized_cases import E4M3, drawn_codes, numbers  # noqa: E402
from sgl_kernel import (  # noqa: E402
    Isa,
    KernelError,
    QuantizedWeight,
    cpu_isa,
    has_byte_dots,
    has_tiles,
)

LEVELS = [isa for isa in Isa if isa <= cpu_isa() and (isa != Isa.NEON or cpu_isa() == Isa.NEON)]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 1.01 * 2.0**-8, torch.float16: 1.01 * 2.0**-11}
with_tiles = pytest.mark.skipif(not has_tiles(), reason="no matrix tiles")
# Levels that multiply bytes, each in a way of its own.
ROUNDING_LEVELS = [isa for isa in LEVELS if has_byte_dots(isa) and isa not in (Isa.AVX512, Isa.AMX)]
X86 = [isa for isa in Isa if Isa.AVX2 <= isa <= Isa.AMX]
HERE = Path(__file__).parent
API = HERE.parents[1] / "sgl-kernel" / "csrc"
COMPILER = shutil.which("g++") or shutil.which("c++")
CPU_INFO = Path("/proc/cpuinfo")
CPU_FLAGS = set(CPU_INFO.read_text().split()) if CPU_INFO.exists() else set()
HAS_BYTE_PERMUTES = {"avx512vbmi", "avx512_bf16"} <= CPU_FLAGS
SMALL = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -16)  # up to what 16 bits can add up
LARGE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 127)
LAYOUTS = {
    "4": (4, 32, False, None),
    "4+min": (4, 32, True, None),
    "4:small": (4, 32, False, SMALL),
    "4:small+min": (4, 32, True, SMALL),
    "4:large": (4, 32, False, LARGE),
    "8": (8, 32, False, None),
    "8+min": (8, 32, True, None),
    "8/16": (8, 16, False, None),
    "e4m3": (E4M3, 0, False, None),
    "e4m3/64": (E4M3, 64, False, None),
}
INTEGERS = [name for name, layout in LAYOUTS.items() if layout[0] != E4M3]


def make(layout: str, outs: int, width: int, gain: float = 1.0) -> QuantizedWeight:
    return QuantizedWeight(*drawn_codes(LAYOUTS[layout], outs, width, gain))


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize(
    ("rows", "outs", "width"),
    [(1, 1, 32), (1, 67, 576), (5, 9, 288), (7, 5, 96), (8, 6, 64), (33, 40, 320)],
)
def test_products(
    rows: int, outs: int, width: int, dtype: torch.dtype, layout: str, isa: Isa
) -> None:
    weight = make(layout, outs, width, gain=0.25)
    generator = torch.Generator().manual_seed(rows)
    whole = torch.randn(rows, width + 3, generator=generator).to(dtype)
    x, bias = whole[:, 3:], torch.randn(outs, generator=generator).to(dtype)
    out = weight.multiply(x, bias, num_threads=2, isa=isa)
    assert out.dtype is dtype
    wide = numbers(weight)
    want = x.double() @ wide.t() + bias.double()
    terms = x.double().abs() @ wide.abs().t() + bias.double().abs()
    error = (out.double() - want).abs()
    assert (error <= ROUNDING[dtype] * want.abs() + 1e-6 * terms).all()


def rounded(x: torch.Tensor) -> torch.Tensor:
    """float64 [R, K], each 32 inputs as multiples of their largest over 127."""
    blocks = x.float().view(len(x), -1, 32)
    largest = blocks.abs().amax(-1, keepdim=True)
    most = torch.tensor(127.0)  # a number over a tensor would go by the reciprocal
    codes = torch.where(largest > 0, blocks * (most / largest), blocks).round()
    return (codes.double() * (largest / 127).double()).flatten(1)


@pytest.mark.parametrize("isa", ROUNDING_LEVELS)
@pytest.mark.parametrize("layout", INTEGERS)
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize(
    ("rows", "outs", "width"),
    [
        *((1, 1, 32), (1, 67, 576), (2, 5, 96), (3, 8, 128), (5, 9, 288), (9, 3, 160)),
        *((8, 7, 544), (33, 40, 320), (300, 5, 2048)),
    ],
)
def test_products_of_rounded_inputs(
    rows: int, outs: int, width: int, dtype: torch.dtype, layout: str, isa: Isa
) -> None:
    weight = make(layout, outs, width, gain=0.25)
    generator = torch.Generator().manual_seed(rows)
    whole = torch.randn(rows, width + 3, generator=generator).to(dtype)
    x, bias = whole[:, 3:], torch.randn(outs, generator=generator).to(dtype)
    x[0, :32] = 0
    out = weight.multiply(x, bias, num_threads=2, isa=isa, round_inputs=True).double()
    wide, near = numbers(weight), rounded(x)
    want = near @ wide.t() + bias.double()
    terms = near.abs() @ wide.abs().t() + bias.double().abs()
    assert ((out - want).abs() <= ROUNDING[dtype] * want.abs() + 1e-6 * terms).all()
    # Half a step of 1 / 127 for each input, against the inputs as they are.
    step = x.double().view(rows, -1, 32).abs().amax(-1).repeat_interleave(32, 1) / 254
    exact = x.double() @ wide.t() + bias.double()
    room = 1.001 * step @ wide.abs().t() + ROUNDING[dtype] * exact.abs() + 1e-6 * terms
    assert ((out - exact).abs() <= room).all()


@pytest.mark.parametrize("isa", ROUNDING_LEVELS)
def test_sums_of_extreme_codes_fit(isa: Isa) -> None:
    """The largest codes and inputs everywhere: sums in 16 bits would show what they can't hold."""
    halves, ones = torch.full((5, 288), 255, dtype=torch.uint8), torch.ones(5, 18).half()
    weights = [
        QuantizedWeight(halves, ones),
        QuantizedWeight(torch.full((5, 576), -128).char(), ones),
        *(QuantizedWeight(halves, ones, values=(0,) * 15 + (v,)) for v in (-127, -16, 16, 17, 127)),
    ]
    for weight in weights:
        for rows in (1, 4, 9):
            x = torch.full((rows, 576), -127.0)
            x[:, 1::2] *= torch.tensor([1.0, -1.0]).repeat(144)
            for inputs in (x, -x, x.abs()):
                out = weight.multiply(inputs, isa=isa, round_inputs=True)
                assert torch.equal(out.double(), inputs.double() @ numbers(weight).t())


@pytest.mark.parametrize("isa", ROUNDING_LEVELS)
@pytest.mark.parametrize("layout", INTEGERS)
def test_rounded_rows_do_not_depend_on_their_neighbours(layout: str, isa: Isa) -> None:
    """Up to a few rows, and beyond: from there on blocks are added up in another order."""
    weight, x = make(layout, 50, 576), torch.randn(43, 576)
    few = 8 if isa >= Isa.AVX512_BF16 else 5 if weight.has_short_sums else 43
    out = weight.multiply(x, num_threads=2, isa=isa, round_inputs=True)
    for rows in (1, 2, 3, 5, 6, 8, 9, 17, 30):
        some = weight.multiply(x[-rows:], isa=isa, round_inputs=True)
        if rows > few or few == len(x):
            assert torch.equal(out[-rows:], some)
        if rows > few:
            continue
        alone = torch.cat(
            [weight.multiply(row[None], isa=isa, round_inputs=True) for row in x[-rows:]]
        )
        assert torch.equal(some, alone)
        terms = rounded(x[-rows:]).abs() @ numbers(weight).abs().t()
        assert ((out[-rows:] - some).abs() <= 1e-6 * terms).all()


@pytest.mark.parametrize("isa", ROUNDING_LEVELS)
@pytest.mark.parametrize("rows", [3, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", INTEGERS)
def test_rounded_rows_keep_what_is_not_finite(
    layout: str, dtype: torch.dtype, rows: int, isa: Isa
) -> None:
    weight, x = make(layout, 6, 96), torch.randn(rows, 96).to(dtype)
    x[0, 40], x[2, 95] = float("nan"), float("inf")
    out = weight.multiply(x, isa=isa, round_inputs=True)
    assert not out[[0, 2]].isfinite().any()
    assert out[1].isfinite().all()
    assert out[3:].isfinite().all()


def built_and_run(program: Path, sources: list[str], flags: list[str]) -> str:
    """What a C++ program prints, which must build and end well."""
    build = [str(COMPILER), "-std=c++17", "-Wno-psabi", f"-I{API}", *flags, *sources]
    for command in ([*build, "-o", str(program)], [str(program)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(COMPILER is None or cpu_isa() not in X86, reason="no C++ compiler for AVX2")
def test_dot_products_without_avx512_give_the_same_bits(tmp_path: Path) -> None:
    """With the instruction written out, since few processors that lack AVX-512 have it."""
    program = tmp_path / "dots_check"
    sources = [
        str(HERE / "dots_check.cpp"),
        str(API / "rounded_parts.cpp"),
        str(API / "scratch.cpp"),
    ]
    flags = ["-O0", "-mavx2", "-mfma", "-mf16c"]
    assert built_and_run(program, sources, flags) == "0 of 80 products differ\n"


@pytest.mark.skipif(COMPILER is None or not HAS_BYTE_PERMUTES, reason="no C++ compiler for VBMI")
def test_products_on_tiles_that_are_written_out(tmp_path: Path) -> None:
    """All of them but the tiles' own instructions, since few processors have these."""
    program = tmp_path / "tiles_check"
    sources = [str(HERE / "tiles_check.cpp"), str(API / "scratch.cpp")]
    flags = ["-O1", "-mavx2", "-mfma", "-mf16c", "-w"]
    flags += [f"-mavx512{kind}" for kind in ("f", "bw", "dq", "vl", "bf16", "vbmi")]
    flags += ["-mamx-tile", "-mamx-bf16"]
    said = built_and_run(program, sources, flags)
    assert said == "0 outputs of 33 products are far\n"


def test_rounding_wants_its_instructions() -> None:
    with pytest.raises(KernelError, match="dot products"):
        make("4", 8, 64).multiply(torch.zeros(2, 64), isa=Isa.GENERIC, round_inputs=True)


@with_tiles
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize(
    ("rows", "outs", "width"),
    [(1, 1, 32), (5, 67, 576), (16, 32, 128), (17, 5, 160), (33, 40, 320), (70, 100, 2048)],
)
def test_products_with_a_rounded_weight(rows: int, outs: int, width: int, layout: str) -> None:
    weight = make(layout, outs, width, gain=0.25)
    generator = torch.Generator().manual_seed(rows)
    whole = torch.randn(rows, width + 3, generator=generator).bfloat16()
    x, bias = whole[:, 3:], torch.randn(outs, generator=generator).bfloat16()
    out = weight.multiply(x, bias, num_threads=2, round_weight=True)
    assert out.dtype is torch.bfloat16
    # Four bits to the nearest, ties away from 0; eight bits with ties to even.
    wide = (numbers(weight) / 0.25).float()
    if weight.bits == 4:
        wide = (wide.view(torch.int32) + 0x8000 & -0x10000).view(torch.float32)
    wide = wide.bfloat16().double() * 0.25
    want = x.double() @ wide.t() + bias.double()
    terms = x.double().abs() @ wide.abs().t() + bias.double().abs()
    error = (out.double() - want).abs()
    assert (error <= ROUNDING[torch.bfloat16] * want.abs() + 1e-6 * terms).all()


@with_tiles
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_rows_of_a_rounded_weight_do_not_depend_on_their_neighbours(layout: str) -> None:
    """Nor on how many are packed at a time: more than 2048 of this width are packed in turns."""
    weight, x = make(layout, 50, 256), torch.randn(2100, 256).bfloat16()
    x[7, 40], x[2090, 255] = float("nan"), float("inf")
    out = weight.multiply(x, num_threads=2, round_weight=True)
    for first, last in ((0, 1), (7, 8), (3, 21), (2030, 2070), (2090, 2091)):
        some = weight.multiply(x[first:last], round_weight=True)
        torch.testing.assert_close(out[first:last], some, rtol=0, atol=0, equal_nan=True)
    lost = torch.tensor([7, 2090])
    assert not out[lost].isfinite().any()
    assert out[8:2090].isfinite().all()


def test_a_rounded_weight_wants_tiles_and_their_type() -> None:
    weight = make("4", 8, 64)
    for x, isa in ((torch.zeros(2, 64), None), (torch.zeros(2, 64).bfloat16(), Isa.GENERIC)):
        with pytest.raises(KernelError, match="rounded weight"):
            weight.multiply(x, isa=isa, round_weight=True)


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_numbers(dtype: torch.dtype, layout: str, isa: Isa) -> None:
    weight = make(layout, 37, 96, gain=0.5)
    out = weight.dequantize(dtype, num_threads=2, isa=isa)
    torch.testing.assert_close(out.double(), numbers(weight), rtol=ROUNDING[dtype], atol=128 * 2e-7)


@pytest.mark.parametrize("isa", LEVELS)
def test_every_code_of_e4m3(isa: Isa) -> None:
    """Bit for bit, with the smallest numbers, zeros of both signs and NaN."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    turned = torch.stack([codes.view(torch.uint8).roll(i) for i in range(32)]).view(codes.dtype)
    weight = QuantizedWeight(turned, torch.full((32, 2), 0.75), group=128)
    want = turned.float() * 0.75
    for dtype in ROUNDING:
        found = weight.dequantize(dtype, isa=isa)
        torch.testing.assert_close(found, want.to(dtype), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(found.signbit() | found.isnan(), want.signbit() | want.isnan())
    finite = torch.where(want.isfinite(), turned.float(), 0.0).to(codes.dtype)
    some = QuantizedWeight(finite, weight.scales, group=128)
    for dtype in ROUNDING:
        for rows in (1, 7):
            x = torch.ones(rows, 256, dtype=dtype)
            assert weight.multiply(x, isa=isa).isnan().all()
            assert torch.equal(some.multiply(x, isa=isa), torch.zeros(rows, 32, dtype=dtype))
            only = torch.zeros_like(x).index_fill_(1, torch.tensor([100]), 1.0)
            assert torch.equal(some.multiply(only, isa=isa)[0], some.dequantize(dtype)[:, 100])


def test_groups_of_e4m3_that_are_cut() -> None:
    """Columns that begin within a group: it becomes several of the same scale."""
    weight = QuantizedWeight(*drawn_codes((E4M3, 128, False, None), 5, 416, 1.0))
    for first, last, group in ((128, 416, 128), (192, 416, 64), (96, 160, 32), (0, 64, 64)):
        part = weight.columns(first, last)
        assert part.group == group
        assert torch.equal(numbers(part), numbers(weight)[:, first:last])
        x = torch.randn(3, last - first)
        want = x.double() @ numbers(part).t()
        torch.testing.assert_close(part.multiply(x).double(), want, rtol=1e-5, atol=1e-2)
    whole = QuantizedWeight(*drawn_codes((E4M3, 0, False, None), 5, 416, 1.0))
    assert whole.columns(32, 96).scales.shape == (5, 1)


def test_what_is_refused_of_e4m3() -> None:
    codes, scales = torch.zeros(4, 96).to(torch.float8_e4m3fn), torch.ones(4, 3)
    for wrong, group in (
        ((codes, scales.half(), None), 32),
        ((codes, scales, scales), 32),
        ((codes, scales, None), 64),
        ((codes, scales, None), 16),
        ((codes[:, :48], scales[:, :1], None), None),
    ):
        with pytest.raises(KernelError):
            QuantizedWeight(*wrong, group=group)
    weight = QuantizedWeight(codes, scales)
    assert weight.group == 32
    assert repr(weight) == "QuantizedWeight((4, 96), E4M3, group=32)"
    with pytest.raises(KernelError, match="not served with E4M3"):
        weight.multiply(torch.zeros(2, 96), round_inputs=True)
    with pytest.raises(KernelError, match="joined"):
        QuantizedWeight.join([weight, QuantizedWeight(codes, scales[:, :1])])


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize(("some", "many"), [(1, 5), (6, 13)])
def test_a_row_does_not_depend_on_its_neighbours(layout: str, some: int, many: int) -> None:
    """Within few rows, and within many: the two ways add up in different orders."""
    weight, x = make(layout, 50, 576), torch.randn(many, 576).bfloat16()
    together = weight.multiply(x, num_threads=2)
    for first in range(many - some + 1):
        part = slice(first, first + some)
        assert torch.equal(together[part], weight.multiply(x[part]))


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_parts(layout: str) -> None:
    weight = make(layout, 24, 128)
    wide = numbers(weight)
    assert torch.equal(numbers(weight.rows(3, 9)), wide[3:9])
    assert torch.equal(numbers(weight.take(torch.tensor([5, 0, 5]))), wide[[5, 0, 5]])
    assert torch.equal(numbers(weight.columns(32, 96)), wide[:, 32:96])
    joined = QuantizedWeight.join([weight.rows(0, 5), weight.rows(5, 24)])
    assert torch.equal(numbers(joined), wide)
    assert joined.values == weight.values == weight.take(torch.tensor([0])).values
    x = torch.randn(2, 128)
    assert torch.equal(weight.rows(3, 9).multiply(x), weight.multiply(x)[:, 3:9])
    bytes_each = weight.bits / 8 + 2 / weight.group * (1 if weight.mins is None else 2)
    if weight.is_fp8:
        bytes_each = 1 + 4 / weight.group
    assert weight.nbytes == 24 * 128 * bytes_each


def test_nothing_to_multiply() -> None:
    weight = make("4", 8, 64)
    assert weight.multiply(torch.empty(0, 64)).shape == (0, 8)
    assert weight.rows(0, 0).multiply(torch.zeros(2, 64)).shape == (2, 0)


def test_what_is_refused() -> None:
    weight = make("4", 8, 64)
    for x in (torch.zeros(2, 32), torch.zeros(2, 64, dtype=torch.float64), torch.zeros(64, 2).t()):
        with pytest.raises(KernelError, match="does not serve"):
            weight.multiply(x)
    with pytest.raises(KernelError, match="bias"):
        weight.multiply(torch.zeros(2, 64), torch.zeros(7))
    with pytest.raises(KernelError, match="cut a block"):
        weight.columns(16, 64)
    with pytest.raises(KernelError, match="joined"):
        QuantizedWeight.join([weight, make("8", 8, 64)])
    with pytest.raises(KernelError, match="joined"):
        QuantizedWeight.join([weight, make("4:small", 8, 64)])
    with pytest.raises(KernelError, match="is no"):
        weight.dequantize_into(torch.zeros(7, 64))
    codes, scales = weight.codes, weight.scales
    for wrong in (
        (codes.int(), scales, None),
        (codes, scales.float(), None),
        (codes, scales[:, :1], None),  # groups of 64
        (codes[:, :8], scales[:, :1], None),  # half a block
        (codes, scales, scales[:4]),
    ):
        with pytest.raises(KernelError):
            QuantizedWeight(*wrong)
    bytes_ = make("8", 8, 64)
    for values in (SMALL[:15], (*SMALL[:15], 128), (*SMALL[:15], -128)):
        with pytest.raises(KernelError, match="4 bits with values"):
            QuantizedWeight(codes, scales, values=values)
    with pytest.raises(KernelError, match="8 bits with values"):
        QuantizedWeight(bytes_.codes, bytes_.scales, values=SMALL)


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_some_rows_as_numbers(layout: str, isa: Isa) -> None:
    weight = make(layout, 37, 96, gain=0.5)
    ids = torch.tensor([36, 0, 5, 5])
    out = weight.dequantize_rows(ids, torch.float32, num_threads=2, isa=isa)
    assert torch.equal(out, weight.dequantize(torch.float32, isa=isa)[ids])
    with pytest.raises(KernelError, match="int64"):
        weight.dequantize_rows(ids.int(), torch.float32)
    with pytest.raises(KernelError, match="float64"):
        weight.dequantize_rows(ids, torch.float64)
