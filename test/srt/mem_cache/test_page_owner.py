from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache.kv_layout import GroupId, SegmentLayout
from sglang.srt.mem_cache.page_owner import NO_NODE, PageIndex, PageState


def layout(pages_per_segment: int = 4, max_segments: int = 100) -> SegmentLayout:
    return SegmentLayout(GroupId(0), 2, pages_per_segment, max_segments, 1, 8, 8, 1)


def pages(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


@pytest.fixture
def index() -> PageIndex:
    index = PageIndex(layout())
    index.add_segment(1)
    index.add_segment(3)
    return index


def test_states_and_counts_follow_a_page_through_its_life(index: PageIndex) -> None:
    index.take(pages(4, 5, 12))
    assert repr(index) == "PageIndex(group=0, free=5, used=3, cached=0)"
    index.adopt(pages(4, 12), 7)
    assert index.node[[4, 5, 12]].tolist() == [7, NO_NODE, 7]
    index.share(pages(4))
    assert index.rows[[4, 5, 12]].tolist() == [2, 1, 1]
    assert index.counts[:, 1].tolist() == [0, 2, 1, 1]
    assert index.counts[:, 3].tolist() == [0, 3, 0, 1]
    assert index.drop_row(pages(4, 5, 12)) == 1  # only page 5 was the row's alone
    assert index.drop_row(pages(4)) == 0
    index.rename_node(pages(4), 9)
    index.release(pages(4, 12))
    assert repr(index) == "PageIndex(group=0, free=8, used=0, cached=0)"
    assert set(index.node.tolist()) == {NO_NODE}


def test_a_listener_hears_changes_per_segment() -> None:
    heard: list[tuple[int, int, int]] = []

    def listen(segment: int, *, used: int, cached: int) -> None:
        heard.append((segment, used, cached))

    index = PageIndex(layout(), listen)
    index.add_segment(1)
    index.add_segment(2)
    index.take(pages(4, 5, 8))
    index.adopt(pages(4), 1)
    index.drop_row(pages(4, 5, 8))
    index.release(pages(4))
    assert heard == [(1, 2, 0), (2, 1, 0), (1, -1, 1), (1, -1, 0), (2, -1, 0), (1, 0, -1)]


@pytest.mark.parametrize(
    ("action", "complaint"),
    [
        (lambda i: i.take(pages(5)), "all FREE"),
        (lambda i: i.take(pages(8)), "all FREE"),  # segment 2 is not mapped
        (lambda i: i.share(pages(5)), "only cached"),
        (lambda i: i.drop_row(pages(6)), "no row had"),
        (lambda i: i.adopt(pages(4), 1), "all USED"),
        (lambda i: i.release(pages(4)), "still reads"),
        (lambda i: i.release(pages(5)), "still reads"),
        (lambda i: i.release(pages(6)), "all CACHED"),
        (lambda i: i.add_segment(1), "added twice"),
        (lambda i: i.remove_segment(1), "owners"),
        (lambda i: i.remove_segment(2), "owners"),
    ],
)
def test_a_wrong_move_raises_and_changes_nothing(index: PageIndex, action, complaint) -> None:
    index.take(pages(4, 5))
    index.adopt(pages(4), 3)
    before = (index.state.tolist(), index.rows.tolist(), index.counts.tolist())
    with pytest.raises(InvariantError, match=complaint):
        action(index)
    assert (index.state.tolist(), index.rows.tolist(), index.counts.tolist()) == before


@given(st.integers(4, 26), st.integers(1, 12), st.permutations(range(12)))
def test_pages_in_a_row_and_out_of_order_change_alike(
    first: int, count: int, order: list[int]
) -> None:
    row = np.arange(first, first + count, dtype=np.int32)
    mixed = row[[i for i in order if i < count]]
    found = []
    for some in (row, mixed):
        heard: list[tuple[int, int, int]] = []

        def listen(segment: int, *, used: int, cached: int, heard: list = heard) -> None:
            heard.append((segment, used, cached))

        index = PageIndex(layout(), listen)
        for segment in range(1, 10):
            index.add_segment(segment)
        index.take(some)
        index.adopt(some[: count // 2 + 1], 5)
        index.drop_row(some)
        index.share(some[: count // 2 + 1])
        index.drop_row(some[: count // 2 + 1])
        assert index.segments_emptied_by(some[: count // 2 + 1]) >= 1
        index.rename_node(some[: count // 2 + 1], 6)
        assert (index.node == 6).sum() == count // 2 + 1
        index.release(some[: count // 2 + 1])
        assert index.totals[1:] == [36, 0, 0]
        found.append((index.state.tolist(), index.rows.tolist(), index.counts.tolist()))
        assert all(n == 0 for n in np.sum([(u, c) for _, u, c in heard], axis=0))
    assert found[0] == found[1]


@pytest.mark.parametrize("beyond", [pages(799, 800), pages(800), pages(10_000, 10_001)])
def test_pages_that_do_not_exist_are_never_taken(index: PageIndex, beyond: np.ndarray) -> None:
    with pytest.raises((IndexError, InvariantError)):
        index.take(beyond + len(index.state) - 800)
    assert index.num_free == 8


def test_memory_follows_the_highest_segment_that_was_mapped() -> None:
    index = PageIndex(layout(pages_per_segment=128, max_segments=1_000_000))
    assert len(index.state) == 0
    index.add_segment(1)
    assert len(index.state) <= 8 * 128
    index.add_segment(50)
    assert len(index.state) <= 102 * 128
    assert index.num_segments == 51
    assert not index.is_mapped(49)
    assert index.is_mapped(50)
    index.remove_segment(50)
    assert not index.is_mapped(50)
    assert not index.is_free(50 * 128)
    assert not index.is_free(10**9)


def test_segments_emptied_by(index: PageIndex) -> None:
    index.take(pages(4, 5, 12, 13))
    index.adopt(pages(4, 5, 12, 13), 1)
    index.drop_row(pages(4, 5, 12, 13))
    assert index.segments_emptied_by(pages(4, 5, 12, 13)) == 2
    assert index.segments_emptied_by(pages(4, 5, 12)) == 1
    assert index.segments_emptied_by(pages(4, 12)) == 0


@pytest.mark.parametrize("shape", ["run", "reversed", "one swapped", "every second"])
def test_long_lists_of_pages_are_treated_alike_run_or_not(shape: str) -> None:
    index = PageIndex(layout(pages_per_segment=512, max_segments=20))
    for segment in (1, 2, 3):
        index.add_segment(segment)
    ids = np.arange(600, 1200, dtype=np.int32)
    if shape == "reversed":
        ids = ids[::-1].copy()
    elif shape == "one swapped":
        ids[[5, 6]] = ids[[6, 5]]
    elif shape == "every second":
        ids = ids[::2].copy()
    index.take(ids)
    index.adopt(ids, 5)
    index.share(ids)
    index.rename_node(ids, 6)
    others = np.setdiff1d(np.arange(len(index.state)), ids)
    assert set(index.rows[ids].tolist()) == {2}
    assert set(index.node[ids].tolist()) == {6}
    assert set(index.state[ids].tolist()) == {PageState.CACHED}
    assert not index.rows[others].any()
    assert set(index.node[others].tolist()) == {NO_NODE}
    assert not (index.state[others] == PageState.CACHED).any()
    assert [index.drop_row(ids), index.drop_row(ids)] == [0, 0]
    with pytest.raises(InvariantError, match="no row had"):
        index.drop_row(ids)
    index.release(ids)
    assert index.totals == [0, 3 * 512, 0, 0]


def test_a_long_run_that_is_not_all_known_is_refused() -> None:
    index = PageIndex(layout(pages_per_segment=512, max_segments=20))
    index.add_segment(1)
    beyond = np.arange(len(index.state) - 100, len(index.state) + 400, dtype=np.int32)
    with pytest.raises(IndexError):
        index.share(beyond)
    with pytest.raises(InvariantError, match="all FREE"):
        index.take(np.arange(0, 600, dtype=np.int32))


def test_states_are_in_step_with_the_rows_of_counts() -> None:
    assert [state.value for state in PageState] == [0, 1, 2, 3]
