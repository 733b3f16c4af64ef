"""Tests of the tests: a bug of each class is planted, and the state machine must find it.

Each plant changes one line's worth of behaviour. What finds it is the audit, the contents or the
model; a plant that nobody finds fails here, and so does a machine that fails without a plant.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence, Set

import numpy as np
import pytest
from hypothesis.stateful import run_state_machine_as_test

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache import allocation, compaction, segment_jobs
from sglang.srt.mem_cache.block_table import BlockTable
from sglang.srt.mem_cache.kv_layout import GroupId, SegmentId
from sglang.srt.mem_cache.lease import KVLease
from sglang.srt.mem_cache.page_owner import PageIndex, PageState
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.mem_cache.radix_tree import RadixTree, TreeNode
from sglang.srt.mem_cache.reclaim import Reclaim, ReclaimStep
from sglang.srt.mem_cache.segment_jobs import JobRunner
from sglang.srt.mem_cache.segment_manager import SegmentManager
from sglang.srt.mem_cache.window_cache import WindowRadixCache
from sglang.srt.mem_cache.window_index import WindowPageIndex
from sglang.srt.mem_cache.window_recycler import WindowRecycler
from srt.crossed import mostly_slow
from srt.mem_cache.memory_driver import PoisonedBacking
from srt.mem_cache.memory_machine import PAGE, machine_settings
from srt.mem_cache.moving_machine import (
    ChunkedMovingMachine,
    ChunkedRanksMovingMachine,
    MovingMachine,
    RanksMovingMachine,
    SlidingMovingMachine,
    SlidingRanksMovingMachine,
    TwoGroupMovingMachine,
)

Plant = Callable[[pytest.MonkeyPatch], None]
MACHINES: list[type[MovingMachine]] = [
    MovingMachine,
    TwoGroupMovingMachine,
    SlidingMovingMachine,
    ChunkedMovingMachine,
    RanksMovingMachine,
    SlidingRanksMovingMachine,
]
WINDOWS = [SlidingMovingMachine, ChunkedMovingMachine, SlidingRanksMovingMachine]
RANKS = [RanksMovingMachine, SlidingRanksMovingMachine, ChunkedRanksMovingMachine]


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

    def lock(self: RadixCache, path: Sequence[TreeNode], priority: int) -> None:
        real(self, path[:1], priority)

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


def _rest_not_copied(patch: pytest.MonkeyPatch) -> None:
    """A hit goes on inside a page of which nothing was copied."""
    patch.setattr(allocation, "copy_pages", lambda *_: None)


def _copy_of_one_layer_lost(patch: pytest.MonkeyPatch) -> None:
    """Values stay behind."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    def keys_only(self: MHATokenToKVPool, layer: int) -> tuple[object]:
        return (self.get_key_buffer(layer),)

    patch.setattr(MHATokenToKVPool, "stored_planes", keys_only)


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


# ---- where a group recycles ---------------------------------------------------------------------


def _head_dropped_too_early(patch: pytest.MonkeyPatch) -> None:
    """A page goes although the next query sees it."""
    real = WindowRecycler._drop

    def drop(self: WindowRecycler, group: int, lease: KVLease, first_page: int) -> None:
        real(self, group, lease, min(first_page + 1, lease.tables[group].end_page))

    patch.setattr(WindowRecycler, "_drop", drop)


def _recycled_while_read(patch: pytest.MonkeyPatch) -> None:
    """Dropped pages are free at once, whatever forward may still read them."""
    patch.setattr(WindowRecycler, "note_launched", lambda self, epoch: None)


def _hole_taken_for_a_page(patch: pytest.MonkeyPatch) -> None:
    """A match goes as far as the tokens do, whatever the window group holds."""

    def usable(self: WindowRadixCache, edges: Sequence[TreeNode], num_tokens: int) -> int:
        del self, edges
        return num_tokens // PAGE * PAGE

    patch.setattr(WindowRadixCache, "_usable_point", usable)


def _idle_not_counted(patch: pytest.MonkeyPatch) -> None:
    """A row leaves a cached page, and nobody notes that it can be evicted now."""
    patch.setattr(WindowPageIndex, "drop_row", PageIndex.drop_row)


WINDOW_PLANTS = [
    _head_dropped_too_early,
    _recycled_while_read,
    _hole_taken_for_a_page,
    _idle_not_counted,
]


# ---- where ranks have to agree ------------------------------------------------------------------


def _a_refusal_elsewhere_ignored(patch: pytest.MonkeyPatch) -> None:
    """A rank keeps what it mapped although another rank was refused."""
    patch.setattr(JobRunner, "_conform", lambda self, job, result, vote: result)


def _a_rank_goes_ahead(patch: pytest.MonkeyPatch) -> None:
    """Each rank takes its own machine's answer for everybody's."""
    patch.setattr(segment_jobs, "agree_on", lambda ranks, votes, num_groups: votes)


RANK_PLANTS = [_a_refusal_elsewhere_ignored, _a_rank_goes_ahead]

# One bug of each class, sought on a machine of another kind as well; all of them everywhere only
# in the slow run.
CLASSES = [
    (_given_out_twice, TwoGroupMovingMachine),
    (_leaked_by_a_row, SlidingMovingMachine),
    (_reader_not_counted, ChunkedMovingMachine),
    (_unmapped_while_used, RanksMovingMachine),
    (_copy_lost_on_move, SlidingRanksMovingMachine),
]
CASES = [
    *itertools.product(PLANTS, MACHINES[:1]),
    (_rest_not_copied, MovingMachine),
    *CLASSES,
    *itertools.product(WINDOW_PLANTS, WINDOWS[:1]),
    *itertools.product(RANK_PLANTS, RANKS[:1]),
]
SLOW_CASES = [
    *(case for case in itertools.product(PLANTS, MACHINES[1:]) if case not in CLASSES),
    *itertools.product(WINDOW_PLANTS, WINDOWS[1:]),
    *itertools.product(RANK_PLANTS, RANKS[1:]),
]


@pytest.mark.parametrize(
    ("plant", "machine"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES)],
)
def test_the_machine_finds_it(
    plant: Plant, machine: type[MovingMachine], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises((InvariantError, AssertionError)):
        run_state_machine_as_test(machine, settings=machine_settings(300, shrink=False))


# The other machines run without a plant in test_moving_machine.py, too.
@pytest.mark.parametrize("machine", mostly_slow(MACHINES[:1], MACHINES[1:]))
def test_without_a_plant_the_same_runs_find_nothing(machine: type[MovingMachine]) -> None:
    run_state_machine_as_test(machine, settings=machine_settings(20, shrink=False))
