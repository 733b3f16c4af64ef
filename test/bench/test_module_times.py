from __future__ import annotations

import pytest
import torch
from torch import nn

from sglang.bench.module_times import ModuleTimes


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Leaf(nn.Module):
    def __init__(self, clock: Clock, seconds: float) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.clock.now += self.seconds
        return x


class Tree(nn.Module):
    """1 s before its parts, 2 s between them, 4 s after."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.first, self.second = Leaf(clock, 10), Leaf(clock, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.clock.now += 1
        x = self.first(x)
        self.clock.now += 2
        x = self.second(x)
        self.clock.now += 4
        return x


def test_a_modules_own_time_leaves_its_parts_out() -> None:
    clock = Clock()
    tree = Tree(clock)
    with ModuleTimes(tree, clock) as times:
        tree(torch.zeros(1))
        tree(torch.zeros(1))
    assert times.own["Tree"].seconds == pytest.approx(14)
    assert times.own["Leaf"].seconds == pytest.approx(60)
    assert (times.own["Tree"].calls, times.own["Leaf"].calls) == (2, 4)
    assert times.total_seconds == pytest.approx(74)


def test_nothing_is_measured_outside() -> None:
    clock = Clock()
    tree = Tree(clock)
    with ModuleTimes(tree, clock) as times:
        pass
    tree(torch.zeros(1))
    assert times.own == {}
