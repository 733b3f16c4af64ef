"""Hypothesis drives memory and disk together; audited after every step, no write is ever lost."""

from __future__ import annotations

import pytest
from hypothesis.stateful import run_state_machine_as_test

from srt.mem_cache.disk_machine import (
    DiskMachine,
    DiskRules,
    LatentPromotingMachine,
    MovingDiskMachine,
    MovingPromotingMachine,
    OnlyWindowsDiskMachine,
    PromotingMachine,
    RanksDiskMachine,
    RanksPromotingMachine,
    SlidingMovingDiskMachine,
    SlowMovingDiskMachine,
    TwoGroupDiskMachine,
    WindowDiskMachine,
    WindowPromotingMachine,
)
from srt.mem_cache.memory_machine import machine_settings

MACHINES = {
    DiskMachine: 24,
    TwoGroupDiskMachine: 9,
    WindowDiskMachine: 12,
    OnlyWindowsDiskMachine: 6,
    MovingDiskMachine: 18,
    SlidingMovingDiskMachine: 9,
    SlowMovingDiskMachine: 9,
    PromotingMachine: 15,
    RanksDiskMachine: 12,
    RanksPromotingMachine: 12,
    WindowPromotingMachine: 9,
    MovingPromotingMachine: 9,
    LatentPromotingMachine: 6,
}


@pytest.mark.parametrize("machine", MACHINES)
def test_every_step_adds_up(machine: type[DiskRules]) -> None:
    run_state_machine_as_test(machine, settings=machine_settings(MACHINES[machine]))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("machine", MACHINES)
def test_every_step_adds_up_over_many_more_lives(machine: type[DiskRules]) -> None:
    run_state_machine_as_test(machine, settings=machine_settings(50 * MACHINES[machine]))
