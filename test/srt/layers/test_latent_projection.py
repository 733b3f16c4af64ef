"""The weight between latents and heads: absorbed, it is the attention that makes every head."""

from __future__ import annotations

import pytest
import torch

from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers import latent_projection
from sglang.srt.layers.latent_projection import LatentUpProjection

H, N, V, C, T = 4, 6, 5, 8, 7


def made(
    weight: torch.Tensor, parallel: ParallelState | None = None, dtype: torch.dtype = torch.float32
) -> LatentUpProjection:
    layer = LatentUpProjection(H, N, V, C, parallel=parallel or ParallelState(), dtype=dtype)
    layer.weight_loader("weight", weight)
    return layer


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("ranks", [1, 2])
def test_scores_and_values_are_those_of_made_heads(ranks: int) -> None:
    weight, latents, q = numbers(H * (N + V), C), numbers(T, C), numbers(T, H, N)
    heads = (latents @ weight.t()).view(T, H, N + V)
    keys, values = heads.split((N, V), -1)
    scores = torch.einsum("thn,shn->hts", q, keys)
    mean = scores.softmax(-1)
    expected = torch.einsum("hts,shv->thv", mean, values)
    size = H // ranks
    for rank in range(ranks):
        layer, own = made(weight, ParallelState(rank, ranks)), slice(rank * size, (rank + 1) * size)
        ours = torch.einsum("thc,sc->hts", layer.queries(q[:, own]), latents)
        torch.testing.assert_close(ours, scores[own])
        averages = torch.einsum("hts,sc->thc", mean[own], latents)
        torch.testing.assert_close(layer.values(averages), expected[:, own].flatten(1))


@pytest.mark.parametrize("has_instructions", [True, False])
def test_bfloat16_is_rounded_once(has_instructions: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_projection, "cpu_multiplies", lambda dtype: has_instructions)
    weight, q = numbers(H * (N + V), C).bfloat16(), numbers(T, H, N).bfloat16()
    exact = made(weight).queries(q.float())
    found = made(weight, dtype=torch.bfloat16).queries(q)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, rtol=2**-8, atol=1e-6)


def test_no_rows() -> None:
    layer = made(numbers(H * (N + V), C))
    assert layer.queries(torch.empty(0, H, N)).shape == (0, H, C)
    assert layer.values(torch.empty(0, H, C)).shape == (0, H * V)


def test_refusals() -> None:
    layer = made(numbers(H * (N + V), C))
    with pytest.raises(ValueError, match="the checkpoint has 43 rows, the model needs 44"):
        layer.weight_loader("weight", numbers(43, C))
    with pytest.raises(ValueError, match="checkpoint has shape"):
        layer.weight_loader("weight", numbers(44, C + 1))
    with pytest.raises(ValueError, match="no parameter 'bias'"):
        layer.weight_loader("bias", numbers(44))
    with pytest.raises(ValueError, match="attention heads"):
        LatentUpProjection(H, N, V, C, parallel=ParallelState(0, 3), dtype=torch.float32)
