"""The memory's state machines over memory and disk: what does not fit in one goes to the other."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule

from sglang.srt.mem_cache.segment_state import SegmentState, Tier
from srt.mem_cache.disk_backing import DiskBacking
from srt.mem_cache.fake_backing import FakeBacking
from srt.mem_cache.memory_driver import MemoryDriver
from srt.mem_cache.memory_machine import MemoryMachine, OnlyWindowsMachine, WindowMachine
from srt.mem_cache.moving_machine import MovingMachine, SlidingMovingMachine


class DiskRules(MemoryMachine):
    """Up to six segments in memory and three on disk. Beside the rules: the disk refuses."""

    options = {"disk_segments": 3}  # noqa: RUF012
    # a group whose segments are all on disk gets its reserve when others have left memory
    idle_boundaries = 3

    def make_backing(self) -> FakeBacking:
        return DiskBacking()

    @rule(ahead=st.integers(1, 3))
    def fail_the_disk(self, ahead: int) -> None:
        """One of the next uses of the disk will be refused."""
        backing = self.backing_of(0)
        assert isinstance(backing, DiskBacking)
        backing.failing_disk.add(backing.num_disk + ahead)

    @invariant()
    def tiers_add_up(self) -> None:
        if not hasattr(self, "ranks"):
            return
        driver = self.ranks.first
        manager, backing = driver.memory.manager, driver.backing
        assert isinstance(backing, DiskBacking)
        backing.before_demote = driver.check_not_written
        assert manager.lower_bytes <= manager.lower_budget_bytes
        if not manager.pending():
            assert where(driver, Tier.DEVICE) == backing.mapped
            assert where(driver, Tier.LOWER) == backing.on_disk
            assert manager.lower_bytes == backing.lower_bytes()

    def was_refused(self, driver: MemoryDriver) -> bool:
        backing = driver.backing
        assert isinstance(backing, DiskBacking)
        return backing.num_disk in backing.failing_disk

    def _end(self, driver: MemoryDriver) -> None:
        super()._end(driver)
        assert isinstance(driver.backing, DiskBacking)
        if self.options.get("prefix_idle_s", 0) != -1:
            assert not driver.backing.on_disk, "disk space was not given back"


def where(driver: MemoryDriver, tier: Tier) -> set[tuple[int, int]]:
    """The segments that the manager says are on a tier."""
    manager = driver.memory.manager
    return {
        (layout.group, segment)
        for layout in manager.layouts
        for segment, record in manager.segments(layout.group).items()
        if record.state is not SegmentState.RESERVED and record.tier is tier
    }


class DiskMachine(DiskRules):
    pass


class PromotingRules(DiskRules):
    """What is read comes back from below at step boundaries, as from a host's memory."""

    def make_backing(self) -> FakeBacking:
        backing = DiskBacking()
        backing.promotes = True
        return backing


class PromotingMachine(PromotingRules):
    pass


class WindowPromotingMachine(PromotingRules, WindowMachine):
    num_groups = 2
    draw_windows = WindowMachine.draw_windows


class MovingPromotingMachine(PromotingRules, MovingMachine):
    pass


class TwoGroupDiskMachine(DiskRules):
    num_groups = 2


class WindowDiskMachine(DiskRules, WindowMachine):
    num_groups = 2
    draw_windows = WindowMachine.draw_windows


class OnlyWindowsDiskMachine(DiskRules, OnlyWindowsMachine):
    num_groups = 2
    draw_windows = OnlyWindowsMachine.draw_windows


class MovingDiskMachine(DiskRules, MovingMachine):
    pass


class SlidingMovingDiskMachine(DiskRules, SlidingMovingMachine):
    num_groups = 2
    draw_windows = WindowMachine.draw_windows


class SlowMovingDiskMachine(MovingDiskMachine):
    delays = True
