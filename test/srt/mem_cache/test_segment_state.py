"""Every move between states, and totals that always equal a recount."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache.kv_layout import SegmentId
from sglang.srt.mem_cache.segment_state import LEGAL_MOVES, Segment, SegmentState, SegmentTable
from srt.mem_cache.segment_pools import PAGES_PER_SEGMENT, STATES, small_layouts

RESERVED, MAPPING, MAPPED, DRAINING = STATES
WAYS = {
    RESERVED: (),
    MAPPING: (MAPPING,),
    MAPPED: (MAPPING, MAPPED),
    DRAINING: (MAPPING, MAPPED, DRAINING),
}
EXPECTED_MOVES = {
    (RESERVED, MAPPING),
    (MAPPING, MAPPED),
    (MAPPING, RESERVED),
    (MAPPED, DRAINING),
    (DRAINING, RESERVED),
    (DRAINING, MAPPED),
}


@pytest.mark.parametrize("before", STATES)
@pytest.mark.parametrize("after", STATES)
def test_every_pair_of_states(before: SegmentState, after: SegmentState) -> None:
    segment = Segment(SegmentId(3))
    for state in WAYS[before]:
        segment.move_to(state)
    if (before, after) in EXPECTED_MOVES:
        segment.move_to(after)
        assert segment.state is after
    else:
        with pytest.raises(InvariantError, match=f"3: {before.value} -> {after.value}"):
            segment.move_to(after)
        assert segment.state is before


def test_the_table_of_moves_is_complete_and_frozen() -> None:
    assert set(LEGAL_MOVES) == set(STATES)
    with pytest.raises(TypeError):
        LEGAL_MOVES[RESERVED] = frozenset()  # type: ignore[index]
    with pytest.raises(AttributeError):
        Segment(SegmentId(1)).state = MAPPED  # type: ignore[misc]


def mapped_table() -> SegmentTable:
    table = SegmentTable(small_layouts()[0])
    for state in (MAPPING, MAPPED):
        table.move(SegmentId(1), state, 5.0)
    return table


def test_records_are_made_when_first_mapped() -> None:
    table = SegmentTable(small_layouts()[0])
    assert table.segments == {}
    assert table.count(RESERVED) == 9
    table.move(SegmentId(1), MAPPING, 0.0)
    assert list(table.segments) == [1]
    assert repr(table.segments[SegmentId(1)]) == "Segment(1 mapping free=0 used=0 cached=0 epoch=0)"
    table.check()


def test_counts_follow_states() -> None:
    table = mapped_table()
    assert table.pages_free == PAGES_PER_SEGMENT
    assert table.empty == {1: 5.0}
    table.move(SegmentId(1), DRAINING, 6.0)
    assert (table.pages_free, table.empty) == (0, {})
    assert table.attached_bytes == table.layout.segment_bytes
    assert table.segments[SegmentId(1)].pages_free == PAGES_PER_SEGMENT
    table.move(SegmentId(1), RESERVED, 7.0)
    assert table.attached_bytes == 0
    assert table.segments[SegmentId(1)].pages_free == 0
    table.check()


def test_pages_move_between_counts_and_the_empty_clock_follows() -> None:
    table = mapped_table()
    one = SegmentId(1)
    table.add_pages(one, used=3, cached=0, now=6.0, epoch=1)
    assert (table.pages_free, table.pages_used, table.pages_cached) == (1, 3, 0)
    assert table.empty == {}
    table.add_pages(one, used=-3, cached=2, now=7.0, epoch=2)
    assert (table.pages_free, table.pages_used, table.pages_cached) == (2, 0, 2)
    table.add_pages(one, used=0, cached=-2, now=8.0, epoch=3)
    assert table.empty == {1: 8.0}
    assert table.segments[one].last_use_epoch == 3
    table.add_pages(one, used=0, cached=0, now=9.0, epoch=3)
    assert table.empty == {1: 8.0}  # empty since then, not since it was last named
    table.check()


@pytest.mark.parametrize(("used", "cached"), [(5, 0), (-1, 0), (0, -1), (3, 2), (-1, 1)])
def test_counts_that_do_not_add_up_change_nothing(used: int, cached: int) -> None:
    table = mapped_table()
    with pytest.raises(InvariantError, match="does not add up"):
        table.add_pages(SegmentId(1), used=used, cached=cached, now=9.0, epoch=9)
    assert table.pages_free == PAGES_PER_SEGMENT
    assert table.empty == {1: 5.0}
    table.check()


@pytest.mark.parametrize("segment", [0, 2, 99])
def test_pages_of_unmapped_segments_are_refused(segment: int) -> None:
    with pytest.raises(InvariantError, match="not mapped"):
        mapped_table().add_pages(SegmentId(segment), used=1, cached=0, now=0.0, epoch=0)


def test_a_segment_with_pages_can_not_drain() -> None:
    table = mapped_table()
    table.add_pages(SegmentId(1), used=1, cached=0, now=0.0, epoch=0)
    with pytest.raises(InvariantError, match="has pages"):
        table.move(SegmentId(1), DRAINING, 0.0)
    table.check()


@pytest.mark.parametrize("segment", [0, 10])
def test_ids_outside_the_space(segment: int) -> None:
    with pytest.raises(InvariantError, match=r"outside 1\.\.9"):
        SegmentTable(small_layouts()[0]).move(SegmentId(segment), MAPPING, 0.0)


def test_lowest_ids_come_first_also_after_their_return() -> None:
    table = SegmentTable(small_layouts()[0])
    for segment in range(1, 6):
        table.move(SegmentId(segment), MAPPING, 0.0)
    for segment in (4, 2):
        table.move(SegmentId(segment), RESERVED, 0.0)
    assert table.lowest_reserved(1) == (2,)
    assert table.lowest_reserved(4) == (2, 4, 6, 7)
    assert table.lowest_reserved(6) == (2, 4, 6, 7, 8, 9)
    assert table.lowest_reserved(7) is None


def test_check_finds_what_was_changed_behind_its_back() -> None:
    for name in ("pages_free", "pages_used", "pages_cached"):
        table = mapped_table()
        setattr(table, name, 2)
        with pytest.raises(InvariantError, match="recorded"):
            table.check()
    table = mapped_table()
    table.segments[SegmentId(1)].pages_used = 1
    with pytest.raises(InvariantError, match="do not add up"):
        table.check()
    table = mapped_table()
    table.empty.clear()
    with pytest.raises(InvariantError, match="list of empty"):
        table.check()
    table = mapped_table()
    table.segments[SegmentId(1)].move_to(DRAINING)
    with pytest.raises(InvariantError):
        table.check()


class TableMachine(RuleBasedStateMachine):
    """Random moves and page counts, legal or not, against nothing but `check`."""

    def __init__(self) -> None:
        super().__init__()
        self.table = SegmentTable(small_layouts()[0])
        self.now = 0.0

    @rule(segment=st.integers(0, 11), state=st.sampled_from(STATES))
    def move(self, segment: int, state: SegmentState) -> None:
        self.now += 1
        try:
            self.table.move(SegmentId(segment), state, self.now)
        except InvariantError:
            return
        assert self.table.segments[SegmentId(segment)].state is state

    @rule(segment=st.integers(0, 11), used=st.integers(-4, 4), cached=st.integers(-4, 4))
    def add(self, segment: int, used: int, cached: int) -> None:
        try:
            self.table.add_pages(
                SegmentId(segment), used=used, cached=cached, now=self.now, epoch=0
            )
        except InvariantError:
            return
        assert self.table.segments[SegmentId(segment)].state is MAPPED

    @invariant()
    def adds_up(self) -> None:
        self.table.check()


TestTableMachine = TableMachine.TestCase
