"""Routing and whole mixtures against float64, one row and one expert at a time."""

from __future__ import annotations

import pytest
import torch

sgl_kernel = pytest.importorskip("sgl_kernel")

from kernels.test_cpu_quantized import (  # noqa: E402
    LAYOUTS,
    LEVELS,
    ROUNDING_LEVELS,
    make,
    numbers,
    rounded,
)
from sgl_kernel import (  # noqa: E402
    Arena,
    ExpertMatrix,
    Gate,
    GateKind,
    Isa,
    KernelError,
    Mixture,
    QuantizedWeight,
    RouteKind,
    Tape,
    has_byte_dots,
    record,
    route,
)

E, HIDDEN, WIDTH = 5, 96, 64
GATES = [Gate(GateKind.SILU), Gate(GateKind.GELU_TANH), Gate(GateKind.CLAMPED, 1.702, 0.6)]
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.003}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("experts", "chosen"), [(4, 1), (7, 7), (128, 8)])
def test_routes(dtype: torch.dtype, experts: int, chosen: int) -> None:
    generator = torch.Generator().manual_seed(experts)
    scores = torch.rand(3, experts + 2, generator=generator).argsort(1).to(dtype) / 16
    scores = scores[:, 2:]  # rows apart
    wide = scores.float()
    for kind, weights in (
        (RouteKind.SOFTMAX, wide.softmax(-1)),
        (RouteKind.SIGMOID, wide.sigmoid()),
    ):
        found, shares = route(scores, chosen, kind)
        assert torch.equal(found, wide.topk(chosen, -1).indices)
        torch.testing.assert_close(shares, weights.gather(1, found), atol=1e-7, rtol=1e-6)
    found, shares = route(scores, chosen, RouteKind.CHOSEN)
    torch.testing.assert_close(shares, wide.gather(1, found).softmax(-1), atol=1e-7, rtol=1e-6)


def test_routes_of_equals_and_of_what_is_no_number() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, float("nan"), 3.0, -1.0]])
    found, weights = route(scores, 2, RouteKind.CHOSEN)
    assert found.tolist() == [[1, 2], [1, 2]]
    assert weights[0].tolist() == [0.5, 0.5]
    assert weights[1].isnan().all()
    all_nan, _ = route(torch.full((1, 3), float("nan")), 3, RouteKind.SOFTMAX)
    assert all_nan.tolist() == [[0, 1, 2]]
    low, shares = route(torch.full((1, 3), -1e30), 1, RouteKind.SOFTMAX)
    assert low.item() == 0
    assert shares.item() == pytest.approx(1 / 3)
    assert route(scores[:0], 2, RouteKind.SIGMOID)[0].shape == (0, 2)
    with pytest.raises(KernelError, match="5 of torch"):
        route(scores, 5, RouteKind.SIGMOID)


def gated(gate: torch.Tensor, up: torch.Tensor, opening: Gate) -> torch.Tensor:
    if opening.kind is GateKind.SILU:
        return torch.nn.functional.silu(gate) * up
    if opening.kind is GateKind.GELU_TANH:
        return torch.nn.functional.gelu(gate, approximate="tanh") * up
    gate, up = gate.clamp(max=opening.limit), up.clamp(-opening.limit, opening.limit)
    return (up + 1) * gate * torch.sigmoid(opening.alpha * gate)


class Weights:
    """Gate, up and down of E experts: numbers of `dtype`, or codes of a layout; and biases."""

    def __init__(self, layouts: tuple[str, str, str], dtype: torch.dtype, bias: bool) -> None:
        self.generator = torch.Generator().manual_seed(9)
        self.gate, self.gate_numbers = self.matrix(layouts[0], WIDTH, HIDDEN, dtype)
        self.up, self.up_numbers = self.matrix(layouts[1], WIDTH, HIDDEN, dtype)
        self.down, self.down_numbers = self.matrix(layouts[2], HIDDEN, WIDTH, dtype)
        both = torch.randn(E, 2 * WIDTH, generator=self.generator).to(dtype)
        self.biases: tuple[torch.Tensor | None, ...] = (None, None, None)
        if bias:
            down = torch.randn(E, HIDDEN, generator=self.generator).to(dtype)
            self.biases = (both[:, :WIDTH], both[:, WIDTH:], down)

    def matrix(
        self, layout: str, outs: int, width: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor | QuantizedWeight, torch.Tensor]:
        if layout == "numbers":
            weight = torch.randn(E * outs, width, generator=self.generator).to(dtype) / 8
            return weight, weight.double().view(E, outs, width)
        found = make(layout, E * outs, width, gain=2.0**-10)
        return found, numbers(found).view(E, outs, width)

    def mixture(self, opening: Gate, dtype: torch.dtype, scale_inputs: bool = False) -> Mixture:
        parts = [
            ExpertMatrix(weight, outs, 0, outs, bias)
            for weight, outs, bias in zip(
                (self.gate, self.up, self.down), (WIDTH, WIDTH, HIDDEN), self.biases, strict=True
            )
        ]
        return Mixture(*parts, E, opening, scale_inputs=scale_inputs, dtype=dtype)

    def reference(
        self,
        x: torch.Tensor,
        experts: torch.Tensor,
        weights: torch.Tensor,
        opening: Gate,
        *,
        scale_inputs: bool = False,
        rounds: bool = False,
    ) -> torch.Tensor:
        as_bytes = rounded if rounds else torch.Tensor.double
        total = torch.zeros(x.shape, dtype=torch.float64)
        gate_bias, up_bias, down_bias = (
            torch.zeros(E, 1) if bias is None else bias for bias in self.biases
        )
        for r in range(len(x)):
            for e, weight in zip(experts[r].tolist(), weights[r].tolist(), strict=True):
                row = x[r : r + 1]
                if scale_inputs:
                    row = (row.float() * weight).to(x.dtype)
                row = as_bytes(row)
                gate = row @ self.gate_numbers[e].t() + gate_bias[e].double()
                up = row @ self.up_numbers[e].t() + up_bias[e].double()
                opened = as_bytes(gated(gate, up, opening).float())
                given = opened @ self.down_numbers[e].t() + down_bias[e].double()
                total[r] += given[0] * (1.0 if scale_inputs else weight)
        return total


def choices(rows: int, chosen: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    order = torch.rand(rows, E, generator=generator).argsort(1)[:, :chosen].contiguous()
    return order, torch.rand(rows, chosen, generator=generator)


def close(found: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    assert (found.double() - want).abs().max() <= ROUNDING[dtype] * want.abs().max()


MIXED = [
    ("numbers", "numbers", "numbers"),
    *((layout, layout, layout) for layout in LAYOUTS),
    ("4", "8+min", "8/16"),
    ("4", "4:small", "4:small"),
    ("4:large", "4:small", "4:large"),
    ("4+min", "4+min", "numbers"),
    ("numbers", "numbers", "8"),
    ("e4m3/64", "e4m3", "numbers"),
    ("4", "e4m3", "8"),
]
INTEGERS = [layouts for layouts in MIXED if not any("e4m3" in layout for layout in layouts)]


@pytest.mark.parametrize("isa", LEVELS)
@pytest.mark.parametrize("layouts", MIXED, ids="-".join)
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_rows_through_their_experts(
    layouts: tuple[str, str, str], dtype: torch.dtype, isa: Isa
) -> None:
    weights = Weights(layouts, dtype, bias=True)
    for opening, rows, chosen in zip(GATES, (1, 33, 7), (3, 2, E), strict=True):
        whole = torch.randn(rows, HIDDEN + 5).to(dtype)
        x, (experts, shares) = whole[:, 5:], choices(rows, chosen)
        mixture = weights.mixture(opening, dtype)
        for threads in (1, 3):
            found = mixture(x, experts, shares, num_threads=threads, isa=isa)
            assert found.dtype is dtype
            close(found, weights.reference(x, experts, shares, opening), dtype)
        wide = mixture(x, experts, shares, out_dtype=torch.float32, isa=isa)
        assert wide.dtype is torch.float32
        assert torch.equal(wide.to(dtype), found)


@pytest.mark.parametrize("isa", LEVELS)
def test_many_rows_of_an_expert(isa: Isa) -> None:
    """Other numbers of rows for each expert, of which some pass the height of a tile."""
    weights = Weights(("numbers", "numbers", "numbers"), torch.bfloat16, bias=True)
    x = torch.randn(60, HIDDEN).bfloat16()
    experts = torch.tensor([0] * 37 + [3] * 17 + [4] * 5 + [1])[:, None]
    shares = torch.rand(60, 1)
    for threads in (1, 2):
        mixture = weights.mixture(GATES[0], torch.bfloat16)
        found = mixture(x, experts, shares, num_threads=threads, isa=isa)
        close(found, weights.reference(x, experts, shares, GATES[0]), torch.bfloat16)


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("layout", ["numbers", "4+min"])
def test_scaled_inputs_and_what_is_added(layout: str, dtype: torch.dtype) -> None:
    weights = Weights((layout,) * 3, dtype, bias=False)
    mixture = weights.mixture(GATES[0], dtype, scale_inputs=True)
    for rows in (1, 6):
        x, added = torch.randn(2, rows, HIDDEN).to(dtype)
        experts, shares = choices(rows, 2)
        want = weights.reference(x, experts, shares, GATES[0], scale_inputs=True)
        close(mixture(x, experts, shares), want, dtype)
        close(mixture(x, experts, shares, added=added), want + added.double(), dtype)


@pytest.mark.parametrize("isa", ROUNDING_LEVELS)
@pytest.mark.parametrize("layouts", INTEGERS, ids="-".join)
def test_rounded_inputs(layouts: tuple[str, str, str], isa: Isa) -> None:
    """Codes meet bytes; numbers beside them their inputs as they are."""
    weights = Weights(layouts, torch.bfloat16, bias=True)
    mixture = weights.mixture(GATES[0], torch.bfloat16)
    for rows in (1, 9):
        x, (experts, shares) = torch.randn(rows, HIDDEN).bfloat16(), choices(rows, 3)
        found = mixture(x, experts, shares, round_inputs=True, num_threads=2, isa=isa)
        exact = weights.reference(x, experts, shares, GATES[0])
        close(found, exact, torch.bfloat16)
        if "numbers" not in layouts:
            want = weights.reference(x, experts, shares, GATES[0], rounds=True)
            error = (found.double() - want).abs()
            assert error.max() <= 0.006 * want.abs().max()


def test_parts_of_one_matrix_and_rows_alone() -> None:
    """Gates and ups one below the other, as numbers rounded to bytes are; the same answer alone."""
    weight = make("8", E * 2 * WIDTH, HIDDEN, gain=2.0**-10)
    down = make("8", E * HIDDEN, WIDTH, gain=2.0**-10)
    mixture = Mixture(
        ExpertMatrix(weight, 2 * WIDTH, 0, WIDTH),
        ExpertMatrix(weight, 2 * WIDTH, WIDTH, WIDTH),
        ExpertMatrix(down, HIDDEN, 0, HIDDEN),
        E,
        GATES[0],
        dtype=torch.float32,
    )
    apart = Weights(("8", "8", "8"), torch.float32, bias=False)
    both = numbers(weight).view(E, 2 * WIDTH, HIDDEN)
    apart.gate_numbers, apart.up_numbers = both[:, :WIDTH], both[:, WIDTH:]
    apart.down_numbers = numbers(down).view(E, HIDDEN, WIDTH)
    x, (experts, shares) = torch.randn(4, HIDDEN), choices(4, 3)
    found = mixture(x, experts, shares)
    close(found, apart.reference(x, experts, shares, GATES[0]), torch.float32)
    for r in range(4):
        alone = mixture(x[r : r + 1], experts[r : r + 1].clone(), shares[r : r + 1].clone())
        torch.testing.assert_close(alone[0], found[r], atol=1e-5, rtol=1e-5)
    assert mixture(x[:0], experts[:0], shares[:0]).shape == (0, HIDDEN)


def test_a_tape_goes_where_new_scores_lead() -> None:
    weights = Weights(("numbers",) * 3, torch.float32, bias=True)
    mixture = weights.mixture(GATES[2], torch.float32)
    x, scores = torch.randn(3, HIDDEN), torch.randn(3, E)

    def compute() -> torch.Tensor:
        experts, shares = route(scores, 2, RouteKind.CHOSEN)
        return mixture(x, experts, shares, num_threads=2)

    tape = Tape(Arena(1 << 20))
    with record(tape):
        out = compute()
    for _ in range(3):
        x.normal_()
        scores.normal_()
        want = compute().clone()
        tape.play(2)
        assert torch.equal(out, want)


def test_what_is_not_served() -> None:
    weights = Weights(("numbers",) * 3, torch.float32, bias=False)
    mixture = weights.mixture(GATES[0], torch.float32)
    x, (experts, shares) = torch.randn(2, HIDDEN), choices(2, 2)
    for wrong in (E, -1):
        with pytest.raises(KernelError, match="experts does not serve"):
            mixture(x, torch.full_like(experts, wrong), shares)
    with pytest.raises(KernelError, match="rows must be"):
        mixture(x.bfloat16(), experts, shares)
    with pytest.raises(KernelError, match="int64"):
        mixture(x, experts.int(), shares)
    with pytest.raises(KernelError, match="float32"):
        mixture(x, experts, shares.double())
    gate = ExpertMatrix(weights.gate, WIDTH, 0, WIDTH)
    down = ExpertMatrix(weights.down, HIDDEN, 0, HIDDEN)
    codes = ExpertMatrix(make("4", E * WIDTH, HIDDEN), WIDTH, 0, WIDTH)
    with pytest.raises(KernelError, match="both be numbers"):
        Mixture(gate, codes, down, E, GATES[0], dtype=torch.float32)
    with pytest.raises(KernelError, match="don't fit together"):
        Mixture(gate, gate, gate, E, GATES[0], dtype=torch.float32)
    with pytest.raises(KernelError, match="less than 6 experts"):
        Mixture(gate, gate, down, E + 1, GATES[0], dtype=torch.float32)
    floats = Weights(("8", "8", "e4m3"), torch.float32, bias=False).mixture(GATES[0], torch.float32)
    if has_byte_dots():
        with pytest.raises(KernelError, match="experts does not serve"):
            floats(x, experts, shares, round_inputs=True)
    short = ExpertMatrix(weights.gate, WIDTH, 1, WIDTH)
    with pytest.raises(KernelError, match="are not within"):
        Mixture(short, short, down, E, GATES[0], dtype=torch.float32)
