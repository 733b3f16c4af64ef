"""Grouped products and whole mixtures in Triton's interpreter, against torch and the layer."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from sgl_kernel.library import KernelError
from sgl_kernel.triton import GroupedTile, clamped_gate, grouped_linear, mixture, sort_pairs
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.activation import ClampedGate
from sglang.srt.layers.moe import ExpertLayout, Experts, Routing

TILE = GroupedTile(16, 16, 16)


def random(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def choices(tokens: int, experts: int, chosen: int, seed: int = 0) -> Routing:
    """Distinct experts for each token; the last one is nobody's."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts - 1, generator=generator)
    weights = torch.rand(tokens, chosen, generator=generator)
    return Routing(scores.topk(chosen).indices, weights)


@pytest.mark.parametrize(("tokens", "experts", "chosen"), [(1, 9, 2), (40, 4, 1), (33, 5, 3)])
@pytest.mark.parametrize("block", [1, 16])
def test_pairs_are_sorted_into_tiles_of_one_expert(
    tokens: int, experts: int, chosen: int, block: int
) -> None:
    routing = choices(tokens, experts, chosen)
    pairs = sort_pairs(routing.experts, experts, block)
    flat = routing.experts.flatten().tolist()
    seen = []
    for tile, expert in enumerate(pairs.tile_experts.tolist()):
        rows = pairs.order[tile * block : (tile + 1) * block].tolist()
        real = [pair for pair in rows if pair < len(flat)]
        assert rows == real + [len(flat)] * (block - len(real))
        assert all(flat[pair] == expert for pair in real)
        assert (expert == experts) == (not real)
        seen += real
    assert sorted(seen) == list(range(len(flat)))
    assert seen == sorted(seen, key=lambda pair: (flat[pair], pair))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24, 40), (16, 16), (50, 33)])
def test_products(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Rows by token, then rows by pair; widths and depths that fill no tile."""
    width, depth = shape
    routing = choices(21, 5, 2)
    pairs = sort_pairs(routing.experts, 5, TILE.rows)
    weight, bias = random(5, width, depth, dtype=dtype), random(5, width, seed=4, dtype=dtype)
    flat = routing.experts.flatten()
    for x in (random(21, depth, seed=2, dtype=dtype), random(42, depth, seed=3, dtype=dtype)):
        rows = (x if len(x) == 42 else x.repeat_interleave(2, 0)).double()
        scales = routing.weights.flatten().double().unsqueeze(1)
        exact = torch.einsum("pc,pnc->pn", rows, weight.double()[flat]) + bias.double()[flat]
        found = grouped_linear(
            x,
            weight,
            pairs,
            TILE,
            bias=bias,
            scale_outputs=routing.weights,
            out_dtype=torch.float32,
        )
        torch.testing.assert_close(found.double(), exact * scales, rtol=1e-5, atol=1e-5)
        found = grouped_linear(x, weight, pairs, TILE, scale_inputs=routing.weights)
        assert found.dtype == dtype
        exact = torch.einsum("pc,pnc->pn", rows * scales, weight.double()[flat])
        tolerance = 1e-5 if dtype is torch.float32 else 5e-2
        torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scale_inputs", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("tokens", "chosen"), [(1, 1), (5, 3), (40, 2)])
def test_mixtures_are_the_layers(tokens: int, chosen: int, bias: bool, scale_inputs: bool) -> None:
    layer = Experts(
        6,
        24,
        20,
        layout=ExpertLayout.MERGED,
        scale_inputs=scale_inputs,
        activation=ClampedGate(1.702, 7.0),
        bias=bias,
        parallel=ParallelState(),
        dtype=torch.float32,
    )
    for number, parameter in enumerate(layer.parameters()):
        parameter.data.copy_(random(*parameter.shape, seed=number) / 4)
    x, routing = random(tokens, 24, seed=9), choices(tokens, 6, chosen)
    found = mixture(
        x,
        routing.experts,
        routing.weights,
        layer.gate_up_proj,
        layer.down_proj,
        activation=lambda hidden: clamped_gate(hidden, 1.702, 7.0),
        gate_up_bias=layer.gate_up_proj_bias,
        down_bias=layer.down_proj_bias,
        scale_inputs=scale_inputs,
        tile=TILE,
    )
    torch.testing.assert_close(found, layer(x, routing), rtol=1e-5, atol=1e-5)


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    x, routing = random(30, 24), choices(30, 6, 3)
    gate_up, down = random(6, 40, 24, seed=5), random(6, 24, 20, seed=6)
    together = mixture(x, *routing, gate_up, down, tile=TILE)
    alone = mixture(x[7:8], routing.experts[7:8], routing.weights[7:8], gate_up, down, tile=TILE)
    assert torch.equal(alone[0], together[7])


def test_no_tokens() -> None:
    none = choices(0, 6, 2)
    out = mixture(torch.empty(0, 24), *none, random(6, 40, 24), random(6, 24, 20))
    assert out.shape == (0, 24)


def test_what_does_not_fit_is_refused() -> None:
    routing = choices(4, 5, 2)
    pairs = sort_pairs(routing.experts, 5, 16)
    weight = random(5, 24, 16)
    with pytest.raises(KernelError, match="3 rows for 4 x 2 pairs"):
        grouped_linear(random(3, 16), weight, pairs, TILE)
    with pytest.raises(KernelError, match="does not fit weights"):
        grouped_linear(random(4, 17), weight, pairs, TILE)
    with pytest.raises(KernelError, match="tiles of 16 and 32"):
        grouped_linear(random(4, 16), weight, pairs, GroupedTile(32, 16, 16))
