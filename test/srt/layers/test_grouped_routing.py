"""DeepSeek's routers against a plain loop over tokens, in float64."""

from __future__ import annotations

import pytest
import torch

from sglang.srt.configs.model_traits import ExpertChoice, MoEConfig
from sglang.srt.layers.grouped_routing import GroupedRouter, route_in_groups

CHOICES = {
    "greedy": ExpertChoice(),
    "groups": ExpertChoice(num_groups=4, kept_groups=2, scaling=16.0),
    "sigmoid": ExpertChoice(sigmoid=True, num_groups=4, kept_groups=3, group_best=2),
    "biased": ExpertChoice(True, True, 4, 2, 2, 2.5),
    "one group": ExpertChoice(True, True, 1, 1, 2, 2.5),
}


def plain(
    logits: list[float], chosen: int, choice: ExpertChoice, bias: list[float], renormalize: bool
) -> dict[int, float]:
    """Expert -> weight of one token, step by step as the papers say."""
    wide = torch.tensor(logits, dtype=torch.float64)
    scores = (wide.sigmoid() if choice.sigmoid else wide.softmax(0)).tolist()
    ranked = [score + b for score, b in zip(scores, bias, strict=True)]
    size = len(logits) // choice.num_groups
    worth = [
        sum(sorted(ranked[g * size : (g + 1) * size])[-choice.group_best :])
        for g in range(choice.num_groups)
    ]
    groups = sorted(range(choice.num_groups), key=lambda g: -worth[g])[: choice.kept_groups]
    candidates = [e for e in range(len(logits)) if e // size in groups]
    best = sorted(candidates, key=lambda e: -ranked[e])[:chosen]
    total = sum(scores[e] for e in best) if renormalize else 1.0
    return {e: scores[e] / total * choice.scaling for e in best}


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("name", CHOICES)
def test_equals_a_plain_loop(name: str, renormalize: bool) -> None:
    choice = CHOICES[name]
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(50, 16, generator=generator) * 2
    bias = torch.randn(16, generator=generator) if choice.biased else torch.zeros(16)
    experts, weights = route_in_groups(
        logits, 3, choice, bias=bias if choice.biased else None, renormalize=renormalize
    )
    assert experts.shape == weights.shape == (50, 3)
    assert (experts.dtype, weights.dtype) == (torch.int64, torch.float32)
    by_logits = 0
    for t in range(50):
        expected = plain(logits[t].tolist(), 3, choice, bias.tolist(), renormalize)
        found = dict(zip(experts[t].tolist(), weights[t].tolist(), strict=True))
        assert found == pytest.approx(expected, rel=1e-5)
        by_logits += set(found) == set(logits[t].topk(3).indices.tolist())
    assert (by_logits == 50) == (name == "greedy")  # groups and biases do decide


def test_a_masked_group_is_never_chosen_whatever_the_bias() -> None:
    choice = ExpertChoice(True, True, 2, 1, 2)
    logits = torch.tensor([[0.0, 0.0, 9.0, 9.0]])
    bias = torch.tensor([-5.0, -5.0, -9.0, -9.0])
    experts, weights = route_in_groups(logits, 2, choice, bias=bias, renormalize=True)
    assert sorted(experts[0].tolist()) == [0, 1]
    assert weights[0].tolist() == pytest.approx([0.5, 0.5])


def test_scores_that_are_all_zero_weigh_nothing() -> None:
    logits = torch.full((1, 4), -200.0)
    choice = ExpertChoice(sigmoid=True)
    assert route_in_groups(logits, 2, choice, renormalize=True).weights.tolist() == [[0.0, 0.0]]


def test_router_computes_in_float32_whatever_comes() -> None:
    moe = MoEConfig(frozenset({0}), 8, 2, 4, renormalize=True, choice=CHOICES["biased"])
    router = GroupedRouter(6, moe)
    generator = torch.Generator().manual_seed(2)
    weight, bias = torch.randn(8, 6, generator=generator), torch.randn(8, generator=generator)
    router.weight_loader("weight", weight)
    router.weight_loader("e_score_correction_bias", bias)
    x = torch.randn(5, 6, generator=generator).bfloat16()
    found = router.route(x)
    expected = route_in_groups(
        x.float() @ weight.t(), 2, moe.choice or ExpertChoice(), bias=bias, renormalize=True
    )
    assert torch.equal(found.experts.sort(-1).values, expected.experts.sort(-1).values)
    assert found.weights.dtype == torch.float32
    with pytest.raises(ValueError, match="no parameter 'bias'"):
        router.weight_loader("bias", bias)
    plain_router = GroupedRouter(6, MoEConfig(frozenset({0}), 8, 2, 4))
    with pytest.raises(ValueError, match="no parameter 'e_score_correction_bias'"):
        plain_router.weight_loader("e_score_correction_bias", bias)
