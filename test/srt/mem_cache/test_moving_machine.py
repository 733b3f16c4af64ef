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
    MovingMachine: 40,
    TwoGroupMovingMachine: 20,
    SlidingMovingMachine: 30,
    ChunkedMovingMachine: 30,
    LatentMovingMachine: 15,
    StateMovingMachine: 20,
    SlowMovingMachine: 20,
    SlowSlidingMovingMachine: 20,
    RanksMovingMachine: 15,
    TwoGroupRanksMovingMachine: 10,
    SlidingRanksMovingMachine: 15,
    ChunkedRanksMovingMachine: 15,
}


@pytest.mark.parametrize("machine", MACHINES)
def test_every_step_adds_up(machine: type[MovingMachine]) -> None:
    run_state_machine_as_test(machine, settings=machine_settings(MACHINES[machine]))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("machine", MACHINES)
def test_every_step_adds_up_over_many_more_lives(machine: type[MovingMachine]) -> None:
    run_state_machine_as_test(machine, settings=machine_settings(30 * MACHINES[machine]))
