"""Mixtures of experts against the plainest float64 sum, checkpoints of all layouts, shards."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.expert_weights import ExpertLayout
from sglang.srt.layers.moe import (
    Experts,
    Router,
    Routing,
    route_by_sigmoid,
    route_by_softmax,
    route_in_turns,
)

E, H, WIDTH = 6, 16, 8


class Checkpoint:
    """Random experts: gate and up [E, WIDTH, H], down [E, H, WIDTH], and biases."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.gate, self.up = (torch.randn(E, WIDTH, H, generator=generator) for _ in range(2))
        self.down = torch.randn(E, H, WIDTH, generator=generator)
        self.gate_up_bias = torch.randn(E, 2 * WIDTH, generator=generator)
        self.down_bias = torch.randn(E, H, generator=generator)

    def tensors(self, layout: ExpertLayout, bias: bool) -> dict[str, torch.Tensor]:
        if layout is ExpertLayout.SEPARATE:
            return {
                f"{e}.{part}_proj.weight": whole[e]
                for e in range(E)
                for part, whole in (("gate", self.gate), ("up", self.up), ("down", self.down))
            }
        if layout is ExpertLayout.STACKED:
            tensors = {
                f"{part}_proj.weight": whole
                for part, whole in (("gate", self.gate), ("up", self.up), ("down", self.down))
            }
            gate_bias, up_bias = self.gate_up_bias.chunk(2, 1)
            biases = {"gate": gate_bias, "up": up_bias, "down": self.down_bias}
            return tensors | {f"{part}_proj.bias": b for part, b in biases.items() if bias}
        tensors = {
            "gate_up_proj": torch.cat([self.gate, self.up], 1).transpose(1, 2).contiguous(),
            "down_proj": self.down.transpose(1, 2).contiguous(),
        }
        if bias:
            tensors |= {"gate_up_proj_bias": self.gate_up_bias, "down_proj_bias": self.down_bias}
        if layout is ExpertLayout.INTERLEAVED:
            order = torch.arange(2 * WIDTH).view(2, WIDTH).t().flatten()  # gate 0, up 0, gate 1
            for name in tensors.keys() & {"gate_up_proj", "gate_up_proj_bias"}:
                tensors[name] = tensors[name][..., order]
        return tensors

    def reference(
        self, x: torch.Tensor, routing: Routing, *, bias: bool, scale_inputs: bool
    ) -> torch.Tensor:
        """One token and one expert at a time, in float64."""
        out = torch.zeros(x.shape, dtype=torch.float64)
        for t in range(len(x)):
            for e, weight in zip(
                routing.experts[t].tolist(), routing.weights[t].tolist(), strict=True
            ):
                row = x[t].double() * (weight if scale_inputs else 1.0)
                gate, up = self.gate[e].double() @ row, self.up[e].double() @ row
                if bias:
                    gate, up = (
                        gate + self.gate_up_bias[e, :WIDTH],
                        up + self.gate_up_bias[e, WIDTH:],
                    )
                result = self.down[e].double() @ (torch.nn.functional.silu(gate) * up)
                if bias:
                    result = result + self.down_bias[e]
                out[t] += result * (1.0 if scale_inputs else weight)
        return out


def make_experts(
    layout: ExpertLayout = ExpertLayout.MERGED,
    parallel: ParallelState | None = None,
    *,
    bias: bool = False,
    scale_inputs: bool = False,
) -> Experts:
    experts = Experts(
        E,
        H,
        WIDTH,
        layout=layout,
        scale_inputs=scale_inputs,
        bias=bias,
        parallel=parallel or ParallelState(),
        dtype=torch.float32,
    )
    tensors = Checkpoint().tensors(layout, bias)
    places = list(experts.checkpoint_tensors())
    assert sorted(name for name, _, _ in places) == sorted(tensors)
    with torch.no_grad():
        for name, parameter, shard in places:
            experts.weight_loader(parameter, tensors[name], shard)
    return experts


def inputs(num_tokens: int, num_chosen: int = 2) -> tuple[torch.Tensor, Routing]:
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, H, generator=generator)
    logits = torch.randn(num_tokens, E, generator=generator)
    return x, route_by_softmax(logits, num_chosen, renormalize=False)


@pytest.mark.parametrize("scale_inputs", [False, True])
@pytest.mark.parametrize("num_chosen", [1, 2, E])
@pytest.mark.parametrize(
    ("layout", "bias"),
    [
        (ExpertLayout.MERGED, False),
        (ExpertLayout.MERGED, True),
        (ExpertLayout.INTERLEAVED, True),
        (ExpertLayout.SEPARATE, False),
        (ExpertLayout.STACKED, True),
    ],
)
def test_equals_one_token_and_expert_at_a_time(
    layout: ExpertLayout, bias: bool, num_chosen: int, scale_inputs: bool
) -> None:
    experts = make_experts(layout, bias=bias, scale_inputs=scale_inputs)
    x, routing = inputs(23, num_chosen)
    expected = Checkpoint().reference(x, routing, bias=bias, scale_inputs=scale_inputs)
    torch.testing.assert_close(experts(x, routing).double(), expected, atol=2e-4, rtol=1e-5)


class CountingActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []
        self._act = SiluAndMul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rows.append(len(x))
        out: torch.Tensor = self._act(x)
        return out


def test_only_chosen_experts_are_computed_and_only_for_their_tokens() -> None:
    experts = make_experts()
    experts.act_fn = CountingActivation()
    x = torch.randn(4, H)
    chosen = torch.tensor([[4], [1], [4], [4]])
    experts(x, Routing(chosen, torch.ones(4, 1)))
    assert experts.act_fn.rows == [1, 3]
    experts.act_fn.rows.clear()
    empty = experts(x[:0], Routing(chosen[:0], torch.ones(0, 1)))
    assert empty.shape == (0, H)
    assert experts.act_fn.rows == []


def test_repeats_are_identical_and_batch_mates_change_nothing_but_rounding() -> None:
    experts = make_experts()
    x, routing = inputs(200, 3)
    whole = experts(x, routing)
    assert torch.equal(whole, experts(x, routing))
    part = experts(x[50:90], Routing(routing.experts[50:90], routing.weights[50:90]))
    torch.testing.assert_close(part, whole[50:90], atol=1e-5, rtol=1e-5)


def test_bfloat16_sums_in_float32() -> None:
    experts = make_experts().to(torch.bfloat16)
    x, routing = inputs(9, E)
    out = experts(x.bfloat16(), routing)
    assert out.dtype is torch.bfloat16
    expected = Checkpoint().reference(x, routing, bias=False, scale_inputs=False)
    assert (out.double() - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("layout", list(ExpertLayout))
@pytest.mark.parametrize("bias", [False, True])
def test_shards_add_up(layout: ExpertLayout, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bias = bias and layout is not ExpertLayout.SEPARATE
    monkeypatch.setattr(ParallelState, "all_reduce", lambda self, tensor: tensor)
    x, routing = inputs(11)
    whole = make_experts(layout, bias=bias)(x, routing)
    parts = [make_experts(layout, ParallelState(rank, 4), bias=bias) for rank in range(4)]
    assert parts[0].gate_up_proj.shape == (E, 4, H)
    torch.testing.assert_close(sum(part(x, routing) for part in parts), whole, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("isa", "dtype", "rows"),
    [
        ("AVX2", torch.bfloat16, 32),
        ("AVX512_BF16", torch.bfloat16, 96),
        ("AMX", torch.bfloat16, 384),
        ("AMX", torch.float32, 32),
    ],
)
def test_how_many_tokens_are_few(isa: str, dtype: torch.dtype, rows: int) -> None:
    layer = Experts(E, H, WIDTH, layout=ExpertLayout.MERGED, parallel=ParallelState(), dtype=dtype)
    kernels: Any = SimpleNamespace(
        is_recording=lambda: False, cpu_isa=lambda: SimpleNamespace(name=isa)
    )
    assert layer._has_few(kernels, rows, 2)
    assert not layer._has_few(kernels, rows + 1, 2)
    assert not layer._has_few(kernels, 0, 2)
    kernels.is_recording = lambda: True
    assert layer._has_few(kernels, rows + 1, 2)


def test_wrong_tensors_are_refused_by_name() -> None:
    experts = make_experts()
    for name, shape, message in (
        ("gate_up_proj", (E, H, WIDTH), "dimension -1 should be 16"),
        ("gate_up_proj", (E, H + 1, 2 * WIDTH), "gate_up_proj: the checkpoint has shape"),
        ("down_proj", (E, H), "dimension 1 should be 8"),
        ("down_proj_bias", (E, H), "no parameter 'down_proj_bias'"),
        ("weight", (E,), "no parameter 'weight'"),
    ):
        with pytest.raises(ValueError, match=message):
            experts.weight_loader(name, torch.zeros(shape))
    with pytest.raises(ValueError, match="dimension 0 should be 8"):
        experts.weight_loader("gate_up_proj", torch.zeros(3, H), (0, "up"))
    with pytest.raises(ValueError, match="down of expert 2: the checkpoint has shape"):
        experts.weight_loader("down_proj", torch.zeros(3, WIDTH), (2, "down"))
    with pytest.raises(ValueError, match=r"expert width \(8\) cannot be divided by tp_size 3"):
        make_experts(parallel=ParallelState(0, 3))


def test_routes() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, -1.0, 0.5]])
    experts, weights = route_by_sigmoid(logits, 1)
    assert experts.tolist() == [[1], [0]]
    torch.testing.assert_close(weights, torch.sigmoid(torch.tensor([[2.0], [3.0]])))
    experts, weights = route_by_softmax(logits, 2, renormalize=False)
    assert experts.tolist() == [[1, 2], [0, 2]]
    torch.testing.assert_close(weights, logits.softmax(-1).gather(1, experts))
    _, shares = route_by_softmax(logits, 2, renormalize=True)
    torch.testing.assert_close(shares, logits.gather(1, experts).softmax(-1))


def test_router() -> None:
    router = Router(3, 2, bias=True, dtype=torch.float32)
    router.weight_loader("weight", torch.arange(6.0).view(2, 3))
    router.weight_loader("bias", torch.tensor([1.0, -1.0]))
    assert router(torch.ones(1, 3)).tolist() == [[4.0, 11.0]]
    plain = Router(3, 2, dtype=torch.float32)
    assert plain.bias is None
    with pytest.raises(ValueError, match="no parameter 'bias'"):
        plain.weight_loader("bias", torch.zeros(2))


def test_experts_chosen_in_turns() -> None:
    """The second's weight is its share of what the first left, without those too far from it."""
    logits = torch.tensor([[4.0, 3.0, 1.0, -8.0], [1.0, 1.0, 1.0, 1.0]])
    experts, weights = route_in_turns(logits, 2, 0.2)
    assert experts[0].tolist() == [0, 1]
    # Within 40 % of 4 there is 3; of 3 itself, once 4 is gone, nothing else.
    first = 1 / (1 + math.exp(3.0 - 4.0))
    assert weights[0].tolist() == pytest.approx([first, 1.0])
    assert weights[1].tolist() == pytest.approx([1 / 4, 1 / 3])
    assert len(set(experts[1].tolist())) == 2
