"""Tests of the tests: a bug of each class is planted, and the state machine must find it.

Each plant changes one line's worth of behaviour. What finds it is the audit, the contents or the
model; a plant that nobody finds fails here, and so does a machine that fails without a plant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set

import numpy as np
import pytest
from hypothesis.stateful import run_state_machine_as_test

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache import compaction
from sglang.srt.mem_cache.block_table import BlockTable
from sglang.srt.mem_cache.kv_layout import GroupId, SegmentId
from sglang.srt.mem_cache.page_owner import PageIndex, PageState
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.mem_cache.radix_tree import RadixTree, TreeNode
from sglang.srt.mem_cache.reclaim import Reclaim, ReclaimStep
from sglang.srt.mem_cache.segment_manager import SegmentManager
from srt.mem_cache.memory_driver import PoisonedBacking
from srt.mem_cache.moving_machine import MovingMachine, TwoGroupMovingMachine, machine_settings

Plant = Callable[[pytest.MonkeyPatch], None]
MACHINES = [MovingMachine, TwoGroupMovingMachine]


def _given_out_twice(patch: pytest.MonkeyPatch) -> None:
    """A page that was taken stays in the list of free ones."""
    real = PageIndex.take

    def take(self: PageIndex, pages: np.ndarray) -> None:
        real(self, pages)
        self.state[pages[-1:]] = PageState.FREE

    patch.setattr(PageIndex, "take", take)


def _freed_twice(patch: pytest.MonkeyPatch) -> None:
    """A row frees the pages that the tree took from it as well."""

    def drop_row(self: PageIndex, pages: np.ndarray) -> int:
        self.rows[pages] -= 1
        private = pages[self.rows[pages] == 0]
        for state in (PageState.USED, PageState.CACHED):
            self._move(private[self.state[private] == state], state, PageState.FREE)
        return len(private)

    patch.setattr(PageIndex, "drop_row", drop_row)


def _leaked_by_a_row(patch: pytest.MonkeyPatch) -> None:
    """A row that ends forgets its last page."""
    real = PageIndex.drop_row
    patch.setattr(PageIndex, "drop_row", lambda self, pages: real(self, pages[:-1]))


def _leaked_by_the_tree(patch: pytest.MonkeyPatch) -> None:
    """An evicted leaf keeps a page that no edge names."""
    real = PageIndex.release
    patch.setattr(PageIndex, "release", lambda self, pages: real(self, pages[1:]))


def _reader_not_counted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PageIndex, "share", lambda self, pages: None)


def _lock_not_counted(patch: pytest.MonkeyPatch) -> None:
    """A handle locks its own node and not the path above it."""
    real = RadixCache._lock

    def lock(self: RadixCache, path: Sequence[TreeNode]) -> None:
        real(self, path[:1])

    patch.setattr(RadixCache, "_lock", lock)


def _unmapped_while_used(patch: pytest.MonkeyPatch) -> None:
    """The segment below is unmapped as well."""
    real = PoisonedBacking.unmap

    def unmap(self: PoisonedBacking, group: GroupId, segments: Sequence[SegmentId]) -> None:
        real(self, group, segments)
        below = SegmentId(min(segments) - 1)
        if (group, below) in self.mapped:
            real(self, group, [below])

    patch.setattr(PoisonedBacking, "unmap", unmap)


def _thought_to_be_empty(patch: pytest.MonkeyPatch) -> None:
    """The manager does not hear of cached pages."""
    real = SegmentManager.add_pages

    def add_pages(
        self: SegmentManager, group: GroupId, segment: SegmentId, *, used: int = 0, cached: int = 0
    ) -> None:
        real(self, group, segment, used=used)

    patch.setattr(SegmentManager, "add_pages", add_pages)


def _copy_lost_on_move(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(compaction, "copy_pages", lambda *_: None)


def _copy_of_one_layer_lost(patch: pytest.MonkeyPatch) -> None:
    """Values stay behind."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    def keys_only(self: MHATokenToKVPool, layer: int) -> tuple[object]:
        return (self.get_key_buffer(layer),)

    patch.setattr(MHATokenToKVPool, "get_kv_buffer", keys_only)


def _table_not_told(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockTable, "replace_pages", lambda self, pages: None)


def _tree_not_told(patch: pytest.MonkeyPatch) -> None:
    def move_pages(self: RadixTree, group: int, nodes: Set[int], moved_to: np.ndarray) -> None:
        del self, group, nodes, moved_to

    patch.setattr(RadixTree, "move_pages", move_pages)


def _moved_onto_an_owned_page(patch: pytest.MonkeyPatch) -> None:
    """Two pages move to one place."""
    real = compaction.plan_compaction

    def plan(index: PageIndex, max_pages: int) -> compaction.PageMoves | None:
        found = real(index, max_pages)
        if found is not None:
            found.targets[:] = found.targets[0]
        return found

    patch.setattr(compaction, "plan_compaction", plan)


def _cut_that_ends_too_early(patch: pytest.MonkeyPatch) -> None:
    """Says that the budget holds after the first step."""
    patch.setattr(
        "srt.mem_cache.moving_machine.reclaim_step", lambda memory: ReclaimStep(Reclaim.HOLDS)
    )


PLANTS = [
    _given_out_twice,
    _freed_twice,
    _leaked_by_a_row,
    _leaked_by_the_tree,
    _reader_not_counted,
    _lock_not_counted,
    _unmapped_while_used,
    _thought_to_be_empty,
    _copy_lost_on_move,
    _copy_of_one_layer_lost,
    _table_not_told,
    _tree_not_told,
    _moved_onto_an_owned_page,
    _cut_that_ends_too_early,
]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("plant", PLANTS)
def test_the_machine_finds_it(
    plant: Plant, machine: type[MovingMachine], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises((InvariantError, AssertionError)):
        run_state_machine_as_test(machine, settings=machine_settings(300, shrink=False))


@pytest.mark.parametrize("machine", MACHINES)
def test_without_a_plant_the_same_runs_find_nothing(machine: type[MovingMachine]) -> None:
    run_state_machine_as_test(machine, settings=machine_settings(20, shrink=False))
