"""Hypothesis drives budgets and compaction beside everything else; audited after every step."""

from __future__ import annotations

from srt.mem_cache.moving_machine import (
    MovingMachine,
    TwoGroupMovingMachine,
    WindowMovingMachine,
    machine_settings,
)

TestMoving = MovingMachine.TestCase
TestMoving.settings = machine_settings(40)
TestTwoGroupsMoving = TwoGroupMovingMachine.TestCase
TestTwoGroupsMoving.settings = machine_settings(25)
TestWindowsMoving = WindowMovingMachine.TestCase
TestWindowsMoving.settings = machine_settings(40)
