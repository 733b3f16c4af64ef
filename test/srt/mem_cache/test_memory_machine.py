"""Hypothesis drives all that happens to memory, under every policy; audited after every step."""

from __future__ import annotations

from srt.mem_cache.memory_machine import (
    MemoryMachine,
    OnlyWindowsMachine,
    StateMachine,
    TwoGroupMachine,
    WindowMachine,
    machine_settings,
)


class OnlyWindowsRanksMachine(OnlyWindowsMachine):
    num_ranks = 2
    delays = True


class LfuMachine(MemoryMachine):
    options = {  # noqa: RUF012
        "eviction_policy": "lfu",
        "prefix_idle_s": -1,
        "max_cached_tokens": 32,
    }


class FifoMachine(MemoryMachine):
    options = {"eviction_policy": "fifo", "max_cached_tokens": 32}  # noqa: RUF012


class PriorityMachine(MemoryMachine):
    num_groups = 2
    options = {"eviction_policy": "priority", "max_cached_tokens": 32}  # noqa: RUF012


class ChunkCacheMachine(MemoryMachine):
    options = {"enable_prefix_cache": False}  # noqa: RUF012


TestMemory = MemoryMachine.TestCase
TestMemory.settings = machine_settings(36)
TestTwoGroups = TwoGroupMachine.TestCase
TestTwoGroups.settings = machine_settings(18)
TestWindows = WindowMachine.TestCase
TestWindows.settings = machine_settings(36)
TestStates = StateMachine.TestCase
TestStates.settings = machine_settings(24)
TestOnlyWindows = OnlyWindowsMachine.TestCase
TestOnlyWindows.settings = machine_settings(18)
TestOnlyWindowsOnTwoRanks = OnlyWindowsRanksMachine.TestCase
TestOnlyWindowsOnTwoRanks.settings = machine_settings(6)
TestLfu = LfuMachine.TestCase
TestLfu.settings = machine_settings(12)
TestFifo = FifoMachine.TestCase
TestFifo.settings = machine_settings(12)
TestPriority = PriorityMachine.TestCase
TestPriority.settings = machine_settings(12)
TestChunkCache = ChunkCacheMachine.TestCase
TestChunkCache.settings = machine_settings(6)
