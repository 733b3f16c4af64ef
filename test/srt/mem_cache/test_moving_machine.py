"""Hypothesis drives budgets and compaction beside everything else; audited after every step.

One group and two (a second that keeps all, slides or is chunked), one rank and two.
"""

from __future__ import annotations

import pytest
from hypothesis.stateful import run_state_machine_as_test

from srt.mem_cache.memory_machine import machine_settings
from srt.mem_cache.moving_machine import (
    ChunkedMovingMachine,
    ChunkedRanksMovingMachine,
    LatentMovingMachine,
    MovingMachine,
    RanksMovingMachine,
    SlidingMovingMachine,
    SlidingRanksMovingMachine,
    SlowMovingMachine,
    SlowSlidingMovingMachine,
    StateMovingMachine,
    TwoGroupMovingMachine,
    TwoGroupRanksMovingMachine,
)

MACHINES = {
    MovingMachine: 24,
    TwoGroupMovingMachine: 12,
    SlidingMovingMachine: 18,
    ChunkedMovingMachine: 18,
    LatentMovingMachine: 9,
    StateMovingMachine: 12,
    SlowMovingMachine: 12,
    SlowSlidingMovingMachine: 12,
    RanksMovingMachine: 9,
    TwoGroupRanksMovingMachine: 6,
    SlidingRanksMovingMachine: 9,
    ChunkedRanksMovingMachine: 9,
}


@pytest.mark.parametrize("machine", MACHINES)
def test_every_step_adds_up(machine: type[MovingMachine]) -> None:
    run_state_machine_as_test(machine, settings=machine_settings(MACHINES[machine]))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("machine", MACHINES)
def test_every_step_adds_up_over_many_more_lives(machine: type[MovingMachine]) -> None:
    run_state_machine_as_test(machine, settings=machine_settings(50 * MACHINES[machine]))
