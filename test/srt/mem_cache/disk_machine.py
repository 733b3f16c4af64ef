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

    @rule(ahead=st.integers(1, 3), rank=st.integers(0, 1))
    def fail_the_disk(self, ahead: int, rank: int) -> None:
        """One of a rank's next uses of the disk will be refused."""
        backing = self.backing_of(rank)
        assert isinstance(backing, DiskBacking)
        backing.failing_disk.add(backing.num_disk + ahead)

    @invariant()
    def tiers_add_up(self) -> None:
        if not hasattr(self, "ranks"):
            return
        for driver in self.ranks.drivers:
            manager, backing = driver.memory.manager, driver.backing
            assert isinstance(backing, DiskBacking)
            backing.before_demote = driver.check_not_written
            assert manager.lower_bytes <= manager.lower_budget_bytes
            if not manager.pending():
                assert where(driver, Tier.DEVICE) == backing.mapped
                assert where(driver, Tier.LOWER) == backing.on_disk

    def was_refused(self, driver: MemoryDriver) -> bool:
        backing = driver.backing
        assert isinstance(backing, DiskBacking)
        return backing.num_disk in backing.failing_disk

    def _end(self, driver: MemoryDriver) -> None:
        super()._end(driver)
        assert isinstance(driver.backing, DiskBacking)
        if self.options.get("prefix_idle_s", 0) != -1:
            # with several ranks, what one could not give back or not have back when others had
            left = where(driver, Tier.LOWER) if self.num_ranks > 1 else set()
            assert driver.backing.on_disk == left, "disk space was not given back"


def where(driver: MemoryDriver, tier: Tier) -> set[tuple[int, int]]:
    """The segments that are on a tier of a rank: what all agreed on, but for its own exceptions."""
    manager = driver.memory.manager
    elsewhere = manager._runner._elsewhere
    return leftovers(driver, tier) | {
        (layout.group, segment)
        for layout in manager.layouts
        for segment, record in manager.segments(layout.group).items()
        if record.state is not SegmentState.RESERVED
        and elsewhere.get((layout.group, segment), record.tier) is tier
    }


def leftovers(driver: MemoryDriver, tier: Tier) -> set[tuple[int, int]]:
    """Segments that have memory there on this rank although all agreed that they have none."""
    left = driver.memory.manager._runner._leftover
    return {key for key, where_ in left.items() if where_ is tier}


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


class LatentPromotingMachine(MovingPromotingMachine):
    """Values are within keys: one plane a layer."""

    options = {"disk_segments": 3, "latent": True}  # noqa: RUF012


class RanksDiskMachine(DiskRules):
    """Two ranks: what one can't do, the other takes back."""

    num_ranks = 2


class RanksPromotingMachine(PromotingRules):
    num_groups = 2
    num_ranks = 2


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
