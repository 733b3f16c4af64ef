"""Lengths of drafts against all lengths there are, and costs that are learnt."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sglang.srt.speculative.draft_plan import _LEAST_GAIN, Offer, may_gain, plan_lengths
from sglang.srt.speculative.step_costs import DraftedCosts, StepCosts


def rate(offers: list[Offer], lengths: tuple[int, ...], costs: list[float]) -> float:
    tokens = sum(
        1 + sum(offer.chance**k for k in range(1, length + 1))
        for offer, length in zip(offers, lengths, strict=True)
    )
    return tokens / costs[len(offers) + sum(lengths)]


@pytest.mark.parametrize("seed", range(40))
def test_no_other_lengths_give_more_tokens_a_second(seed: int) -> None:
    rng = np.random.default_rng(seed)
    offers = [Offer(float(rng.random()), int(rng.integers(0, 4))) for _ in range(4)]
    costs = np.cumsum(rng.random(32)).tolist()
    lengths = tuple(plan_lengths(offers, costs.__getitem__, max_tokens=12))
    assert 4 + sum(lengths) <= 12
    every = itertools.product(*(range(offer.most + 1) for offer in offers))
    best = max(rate(offers, some, costs) for some in every if 4 + sum(some) <= 12)
    plain = rate(offers, (0, 0, 0, 0), costs)
    if best > _LEAST_GAIN * plain:
        assert rate(offers, lengths, costs) == pytest.approx(best)
    else:
        assert lengths == (0, 0, 0, 0)


def test_tokens_that_cost_nothing_are_all_drafted_and_dear_ones_are_not() -> None:
    offers = [Offer(0.5, 3), Offer(0.9, 2), Offer(0.0, 0)]
    assert plan_lengths(offers, lambda n: 1.0, 100) == [3, 2, 0]
    assert plan_lengths(offers, lambda n: 1.0, 6) == [1, 2, 0], "the likeliest come first"
    assert plan_lengths(offers, float, 100) == [0, 0, 0]
    assert plan_lengths([], float, 8) == []


def test_nobody_looks_for_drafts_that_can_not_pay() -> None:
    assert may_gain(1, 8, lambda n: 1.0, 64)
    assert not may_gain(1, 8, float, 64), "a token more costs as much as a step"
    assert not may_gain(40, 8, lambda n: 1.0, 64), "no room for one each"
    assert may_gain(2, 3, lambda n: 4.0 if n < 8 else 10.0, 64)
    assert not may_gain(2, 3, lambda n: 4.0 if n < 4 else 10.0 * n, 64)


def test_costs_are_lines_between_what_was_seen() -> None:
    costs = StepCosts()
    assert costs.seconds(1) == 1.0
    assert costs.seconds(11) == pytest.approx(2.0)
    for _ in range(3):
        costs.observe(1, 0.004)
        costs.observe(5, 0.008)
    assert repr(costs) == "StepCosts(1: 4.00 ms, 5: 8.00 ms)"
    assert costs.seconds(1) == 0.004
    assert costs.seconds(2) == pytest.approx(0.005)
    assert costs.seconds(15) == pytest.approx(0.008 * 2.4 / 1.4), "as steep as is assumed"


def test_the_first_steps_of_a_size_say_nothing_and_slow_ones_little() -> None:
    costs = StepCosts()
    costs.observe(4, 3.0)
    costs.observe(4, 2.0)
    assert costs.seconds(4) == pytest.approx(1.3), "recorded and compiled"
    costs.observe(4, 0.010)
    costs.observe(4, 1.010)
    assert costs.seconds(4) == pytest.approx(0.110)
    costs.observe(4, 0.010)
    assert costs.seconds(4) == pytest.approx(0.060)


def test_what_was_not_seen_for_long_is_forgotten() -> None:
    costs = StepCosts()
    for _ in range(3):
        costs.observe(6, 9.0)
    for _ in range(600):
        costs.observe(1, 0.004)
    assert costs.seconds(6) == pytest.approx(0.004 * 1.5)
    costs.observe(6, 0.005)
    assert costs.seconds(6) == 0.005, "it is no first step any more"


@pytest.mark.parametrize("seed", range(20))
def test_a_draft_model_is_asked_as_often_as_it_pays(seed: int) -> None:
    """Each token of the longest draft costs a step of the draft model, whoever else has one."""
    rng = np.random.default_rng(seed)
    chance, ahead_s = float(rng.random()), float(rng.random())
    offers = [Offer(chance, 4)] * 3
    lengths = plan_lengths(offers, lambda n: 1.0 + 0.01 * n, 64, ahead_s)

    def quotient(length: int) -> float:
        tokens = 3 * sum(chance**k for k in range(length + 1))
        return tokens / (1.0 + 0.01 * 3 * (1 + length) + length * ahead_s)

    best = max(range(5), key=quotient)
    if quotient(best) > _LEAST_GAIN * quotient(0):
        assert lengths == [best] * 3
    else:
        assert lengths == [0] * 3


def test_a_draft_model_as_dear_as_the_model_gains_nothing() -> None:
    assert not may_gain(1, 8, lambda n: 1.0, 64, ahead_s=1.0)
    assert may_gain(1, 8, lambda n: 1.0, 64, ahead_s=0.5)


def test_what_drafting_took_is_no_part_of_the_models_own_step() -> None:
    costs = DraftedCosts(step_part=0.25)
    assert (costs.seconds(1), costs.ahead_s(1)) == (1.0, 0.25)
    assert costs.ahead_s(11) == pytest.approx(0.5)
    for _ in range(3):
        costs.observe(2, 0.010)
    assert costs.ahead_s(2) == pytest.approx(0.0025), "nothing was seen of it"
    for _ in range(3):
        costs.observe(8, 0.018, drafting_s=0.006, num_rows=2, num_ahead=3)
    assert costs.seconds(8) == pytest.approx(0.012)
    assert costs.ahead_s(2) == pytest.approx(0.002)
    assert DraftedCosts(0.0).ahead_s(4) == 0.0
