"""Products with quantised weights in Triton's interpreter, against float64 of what they stand for.

The interpreter cuts weights off to bfloat16 where a GPU rounds them, so bounds are a whole step.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from kernels.quantized_cases import E4M3, drawn_codes, numbers
from sgl_kernel.library import KernelError
from sgl_kernel.triton import ExpertCodes, GroupedTile, QuantizedWeight, mixture
from sgl_kernel.triton.expert_codes import takes_single_pairs
from sgl_kernel.triton.quantized import default_splits, default_tile

TILE = GroupedTile(16, 16, 64)
STEP = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
UNEVEN = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
LAYOUTS = {
    "4": (4, 32, False, None),
    "4+min": (4, 32, True, None),
    "e2m1": (4, 32, False, E2M1),
    "table": (4, 32, False, UNEVEN),
    "table+min": (4, 32, True, UNEVEN),
    "8": (8, 32, False, None),
    "8+min": (8, 32, True, None),
    "8/16": (8, 16, False, None),
    "e4m3": (E4M3, 0, False, None),
    "e4m3/32": (E4M3, 32, False, None),
    "e4m3/96": (E4M3, 96, False, None),
}


def make(layout: str, outs: int, width: int, gain: float = 1.0) -> QuantizedWeight:
    return QuantizedWeight(*drawn_codes(LAYOUTS[layout], outs, width, gain))


def drawn(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(out: torch.Tensor, x: torch.Tensor, wide: torch.Tensor, bias: torch.Tensor) -> None:
    want = x.double() @ wide.t() + bias.double()
    terms = x.double().abs() @ wide.abs().t() + bias.double().abs()
    assert ((out.double() - want).abs() <= STEP[x.dtype] * terms).all()


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize(
    ("rows", "outs", "width", "splits", "dtype"),
    [
        (1, 19, 96, 1, torch.float32),
        (17, 33, 160, 1, torch.float32),
        (3, 17, 288, 2, torch.bfloat16),
        (2, 5, 64, 4, torch.float16),
    ],
)
def test_products(
    layout: str, rows: int, outs: int, width: int, splits: int, dtype: torch.dtype
) -> None:
    """Rows, outputs, inputs and shares of these that fill no tile, one of them empty."""
    weight = make(layout, outs, width, gain=0.25)
    whole = drawn(rows, width + 3, seed=rows, dtype=dtype)
    x, bias = whole[:, 3:], drawn(outs, dtype=dtype)
    out = weight.multiply(x, bias, tile=TILE, splits=splits)
    assert out.dtype is dtype
    close(out, x, numbers(weight), bias)
    assert torch.equal(weight.multiply(x[:1], bias, tile=TILE, splits=splits), out[:1])


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_single_rows(layout: str) -> None:
    """One row meets the weight as it is; outputs and inputs fill no tile."""
    for outs, width, dtype in ((19, 96, torch.float32), (21, 1184, torch.bfloat16)):
        weight = make(layout, outs, width, gain=0.25)
        x, bias = drawn(1, width, dtype=dtype), drawn(outs, dtype=dtype)
        wide = numbers(weight)
        want = x.double() @ wide.t() + bias.double()
        terms = x.double().abs() @ wide.abs().t() + bias.double().abs()
        error = (weight.multiply(x, bias).double() - want).abs()
        rounding = {torch.float32: 0.0, torch.bfloat16: 2.0**-7}[dtype]  # of the answer alone
        assert (error <= rounding * want.abs() + 1e-6 * terms).all()
        assert torch.equal(weight.multiply(x), weight.multiply(x, torch.zeros(outs, dtype=dtype)))


def test_an_idle_chip_gets_more_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer outputs each of a single row, and shares of the inputs of several."""
    weight = make("4+min", 21, 1184)
    x, nothing = drawn(3, 1184, dtype=torch.bfloat16), torch.zeros(21, dtype=torch.bfloat16)
    alone, several = weight.multiply(x[:1]), weight.multiply(x)
    monkeypatch.setattr("sgl_kernel.triton.quantized.num_programs", lambda device: 396)
    tile = default_tile(3, 4, torch.bfloat16)
    assert default_splits(3, weight.shape, tile, 396) == 2
    assert torch.equal(weight.multiply(x[:1]), alone)
    assert torch.equal(weight.multiply(x), weight.multiply(x, tile=tile, splits=2))
    close(weight.multiply(x), x, numbers(weight), nothing)
    close(several, x, numbers(weight), nothing)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_numbers(layout: str) -> None:
    """Whole weights and single outputs; a place of many numbers, of which some are left alone."""
    weight = make(layout, 7, 1056, gain=0.5)
    wide = numbers(weight)
    for dtype, step in STEP.items():
        out = weight.dequantize(dtype)
        assert out.dtype is dtype
        assert ((out.double() - wide).abs() <= step * wide.abs().max()).all()
        ids = torch.tensor([6, 0, 6])
        assert torch.equal(weight.dequantize_rows(ids, dtype), out[ids])
    place = torch.full((7, 1060), 3.0)
    weight.dequantize_into(place[:, 4:])
    assert torch.equal(place[:, 4:], weight.dequantize(torch.float32))
    assert (place[:, :4] == 3.0).all()


def test_places_beyond_31_bits() -> None:
    """Two outputs with 2 GiB of untouched memory between them."""
    memory = torch.empty((1 << 31) + 4096, dtype=torch.uint8)
    small = make("4+min", 2, 64)
    codes = memory.as_strided((2, 32), (1 << 31, 1))
    codes.copy_(small.codes)
    far = QuantizedWeight(codes, small.scales, small.mins, small.gain)
    x = drawn(3, 64)
    assert torch.equal(far.multiply(x, tile=TILE), small.multiply(x, tile=TILE))
    assert torch.equal(far.dequantize(torch.float32), small.dequantize(torch.float32))


def test_a_row_is_the_same_beside_others() -> None:
    """Whatever the number of rows, as long as these fit one tile."""
    shape = (2880, 4096)
    splits = {default_splits(rows, shape, default_tile(16, 4, torch.bfloat16), 396)
              for rows in (1, 2, 16)}  # fmt: skip
    assert splits == {8}
    assert default_splits(17, shape, default_tile(16, 4, torch.bfloat16), 396) == 1
    assert default_splits(1, (201_088, 2880), default_tile(1, 4, torch.bfloat16), 396) == 1
    assert default_splits(1, (64, 64), default_tile(1, 4, torch.bfloat16), 396) == 1
    depths = {
        default_tile(rows, bits, dtype).depth % 32
        for rows in (1, 500)
        for bits in (4, 8)
        for dtype in STEP
    }
    assert depths == {0}
    tiles = [default_tile(rows, 4, torch.bfloat16) for rows in (1, 17, 33, 65, 9000)]
    assert [(tile.rows, tile.columns) for tile in tiles] == [
        *((16, 64), (32, 64), (64, 64), (128, 128), (128, 128))
    ]


def mixture_numbers(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    biases: tuple[torch.Tensor, torch.Tensor] | None,
    scale_inputs: bool,
) -> torch.Tensor:
    """float64, a pair at a time."""
    out = torch.zeros(len(x), down.shape[1], dtype=torch.float64)
    for token, chosen in enumerate(experts.tolist()):
        for place, expert in enumerate(chosen):
            share = weights[token, place].double()
            row = x[token].double() * (share if scale_inputs else 1.0)
            both = gate_up[expert] @ row
            both += 0 if biases is None else biases[0][expert]
            gate, up = both.chunk(2)
            given = down[expert] @ (gate * torch.sigmoid(gate) * up)
            given += 0 if biases is None else biases[1][expert]
            out[token] += given if scale_inputs else share * given
    return out


@pytest.mark.parametrize(("bias", "scale_inputs"), [(True, False), (False, True)])
@pytest.mark.parametrize(
    "kinds", [("e2m1", "e2m1"), ("8", "4+min"), ("4", None), (None, "8/16"), ("e4m3", "e4m3/32")]
)
def test_mixtures(kinds: tuple[str | None, str | None], bias: bool, scale_inputs: bool) -> None:
    """Gate and up as one matrix and as two, codes beside numbers; the last expert is nobody's."""
    num_experts, hidden, width = 4, 64, 32
    generator = torch.Generator().manual_seed(3)
    experts = torch.rand(9, num_experts - 1, generator=generator).topk(2).indices
    weights = torch.rand(9, 2, generator=generator)
    x = drawn(9, hidden) / 8
    biases = (drawn(num_experts, 2 * width), drawn(num_experts, hidden)) if bias else None
    ways: list[object]
    if kinds[0] is None:
        wide = drawn(num_experts, 2 * width, hidden, seed=7) / 8
        exact, ways = wide.double(), [wide]
    else:
        both = make(kinds[0], num_experts * 2 * width, hidden, 1 / 64)
        exact = numbers(both).view(num_experts, 2 * width, hidden)
        one = (ExpertCodes(both, 2 * width, first, width) for first in (0, width))
        rows = torch.arange(len(both.codes)).view(num_experts, 2, width)
        halves = (both.take(rows[:, half].reshape(-1)) for half in range(2))
        ways = [tuple(one), tuple(ExpertCodes(half, width, 0, width) for half in halves)]
    down: torch.Tensor | ExpertCodes
    if kinds[1] is None:
        down = drawn(num_experts, hidden, width, seed=8) / 8
        wide_down = down.double()
    else:
        matrix = make(kinds[1], num_experts * hidden, width, 1 / 64)
        down = ExpertCodes(matrix, hidden, 0, hidden)
        wide_down = numbers(matrix).view(num_experts, hidden, width)
    want = mixture_numbers(x, experts, weights, exact, wide_down, biases, scale_inputs)
    found = [
        mixture(
            x,
            experts,
            weights,
            gate_up,  # type: ignore[arg-type]
            down,
            num_experts=num_experts,
            gate_up_bias=None if biases is None else biases[0],
            down_bias=None if biases is None else biases[1],
            scale_inputs=scale_inputs,
            tile=GroupedTile(16, 16, 32),
        )
        for gate_up in ways
    ]
    assert not takes_single_pairs(18, num_experts)
    torch.testing.assert_close(found[0].double(), want, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("kinds", [("e2m1", "8/16"), ("e4m3/32", "e4m3")])
@pytest.mark.parametrize(("bias", "scale_inputs"), [(True, False), (False, True)])
def test_few_pairs_are_not_sorted(bias: bool, scale_inputs: bool, kinds: tuple[str, str]) -> None:
    """Half as many pairs as experts: each reads its expert's weights, rounded nowhere."""
    num_experts, hidden, width = 8, 64, 32
    experts, weights = torch.tensor([[6, 1], [1, 0]]), torch.rand(2, 2)
    assert takes_single_pairs(experts.numel(), num_experts)
    assert not takes_single_pairs(experts.numel() + 1, num_experts)
    smaller = 2.0**-5 if "e4m3" in kinds[1] else 1.0
    gains = (smaller / 32, smaller / 64)
    gate, up = (make(kinds[0], num_experts * width, hidden, gain) for gain in gains)
    down = make(kinds[1], num_experts * hidden, width, smaller / 64)
    biases = (drawn(num_experts, 2 * width), drawn(num_experts, hidden)) if bias else None
    x = drawn(2, hidden) / 8
    found = mixture(
        *(x, experts, weights),
        (ExpertCodes(gate, width, 0, width), ExpertCodes(up, width, 0, width)),
        ExpertCodes(down, hidden, 0, hidden),
        num_experts=num_experts,
        gate_up_bias=None if biases is None else biases[0],
        down_bias=None if biases is None else biases[1],
        scale_inputs=scale_inputs,
    )
    halves = [numbers(one).view(num_experts, width, hidden) for one in (gate, up)]
    both, wide_down = torch.cat(halves, 1), numbers(down).view(num_experts, hidden, width)
    want = mixture_numbers(x, experts, weights, both, wide_down, biases, scale_inputs)
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    weight = make("4", 8, 64)
    with pytest.raises(KernelError, match=r"does not serve torch\.float32"):
        weight.multiply(drawn(2, 32))
    with pytest.raises(KernelError, match=r"does not serve torch\.float64"):
        weight.multiply(drawn(2, 64).double())
    with pytest.raises(KernelError, match="tiles of 16 inputs cut a block"):
        weight.multiply(drawn(2, 64), tile=GroupedTile(16, 16, 16))
    with pytest.raises(KernelError, match="bias must be contiguous"):
        weight.multiply(drawn(2, 64), drawn(7))
    with pytest.raises(KernelError, match="is no place for a product"):
        weight.multiply_into(torch.empty(2, 7), drawn(2, 64))
    with pytest.raises(KernelError, match=r"is no torch\.float32"):
        weight.dequantize_into(torch.empty(8, 63))
    with pytest.raises(KernelError, match="ids must be contiguous int64"):
        weight.dequantize_rows(torch.tensor([1], dtype=torch.int32), torch.float32)
    experts, weights = torch.tensor([[0], [1]]), torch.ones(2, 1)
    gate = ExpertCodes(weight, 4, 0, 2), ExpertCodes(weight, 4, 2, 2)
    for down, words in (
        (ExpertCodes(weight, 5, 0, 5), "does not fit"),
        (ExpertCodes(make("4", 8, 32), 5, 0, 5), "outputs are not 2 of"),
    ):
        with pytest.raises(KernelError, match=words):
            mixture(
                *(drawn(2, 64), experts, weights, gate, down),
                num_experts=2,
                activation=lambda both: both[:, :1].repeat(1, 32),
                tile=GroupedTile(16, 16, 32),
            )


def test_layouts() -> None:
    """What is cut, taken and joined stands for the same numbers, and keeps its values and gain."""
    for layout in LAYOUTS:
        weight = make(layout, 6, 128, gain=0.5)
        wide = numbers(weight)
        assert torch.equal(numbers(weight.rows(1, 4)), wide[1:4])
        assert weight.rows(1, 4).codes.data_ptr() == weight.codes[1:].data_ptr()
        assert torch.equal(numbers(weight.columns(32, 96)), wide[:, 32:96])
        order = torch.tensor([5, 0, 0])
        assert torch.equal(numbers(weight.take(order)), wide[order])
        both = QuantizedWeight.join([weight, weight.rows(0, 2)])
        assert torch.equal(numbers(both), torch.cat((wide, wide[:2])))
        tensors = (weight.codes, weight.scales, weight.mins)
        assert weight.nbytes == sum(part.nbytes for part in tensors if part is not None)
    with pytest.raises(KernelError, match="different layouts"):
        QuantizedWeight.join([make("4", 2, 64), make("table", 2, 64)])
    with pytest.raises(KernelError, match="cut a block"):
        make("8", 2, 64).columns(16, 64)
    some = make("4", 2, 64)
    for values in ((0,) * 15, (128,) * 16):
        with pytest.raises(KernelError, match="4 bits with values"):
            QuantizedWeight(some.codes, some.scales, values=values)
    with pytest.raises(KernelError, match="8 bits with values"):
        QuantizedWeight(make("8", 2, 64).codes, some.scales, values=E2M1)
    assert repr(some) == "QuantizedWeight((2, 64), bits=4, group=32)"
