from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache.allocator import PageAllocator, runs_of
from sglang.srt.mem_cache.kv_layout import GroupId, SegmentLayout


def make(*segments: int, per_segment: int = 8) -> PageAllocator:
    layout = SegmentLayout(GroupId(0), 2, per_segment, 100, 1, 8, 8, 1)
    allocator = PageAllocator(layout)
    allocator.add_segments(segments)
    return allocator


def take(allocator: PageAllocator, count: int, hint: int = -1) -> list[int]:
    pages = allocator.alloc_pages(count, hint)
    assert pages is not None
    assert pages.dtype == np.int32
    return pages.tolist()


def give(allocator: PageAllocator, *pages: int) -> None:
    allocator.index.drop_row(np.array(pages, np.int32))


def test_nothing_is_mapped_at_first() -> None:
    allocator = make()
    assert allocator.num_free == 0
    assert allocator.alloc_pages(1) is None
    assert allocator.alloc_pages(0).tolist() == []
    assert allocator.alloc_each([]).tolist() == []


def test_none_takes_nothing() -> None:
    allocator = make(1)
    take(allocator, 5)
    assert allocator.alloc_pages(4) is None
    assert allocator.alloc_each([-1, -1, -1, -1]) is None
    assert repr(allocator) == "PageAllocator(group=0, free=3, used=5, cached=0)"


def test_the_next_page_of_the_own_run_comes_first() -> None:
    allocator = make(1, 2)
    assert take(allocator, 3) == [8, 9, 10]
    assert take(allocator, 1, hint=11) == [11]
    assert take(allocator, 6, hint=12) == [12, 13, 14, 15, 16, 17]  # runs cross segment borders
    assert take(allocator, 1, hint=12) == [20]  # taken: half of the gap stays for the run before


def test_one_page_goes_to_the_fullest_segment() -> None:
    allocator = make(1, 2, 3)
    take(allocator, 24)
    give(allocator, 8, 9, 10, 16, 17, 30)
    assert take(allocator, 1) == [30]  # segment 3 has 1 free page, 2 has 2, 1 has 3
    assert take(allocator, 1) == [16]
    assert take(allocator, 1) == [17]
    assert take(allocator, 1) == [8]


def test_an_extend_prefers_a_gap_that_holds_it() -> None:
    allocator = make(1, 2)
    take(allocator, 16)
    give(allocator, 8, 10, 12, 18, 19, 20, 21)
    assert take(allocator, 3) == [18, 19, 20]  # segment 1 is fuller, but only single pages
    assert take(allocator, 3) == [8, 10, 12]  # no gap is left that would hold it: pieces


def test_a_long_extend_takes_a_run_of_empty_segments() -> None:
    allocator = make(1, 2, 3, 4, 5, 6)
    take(allocator, 48)
    give(allocator, *range(16, 25), *range(32, 56), 8)
    # empty: segment 2 alone, and 4 to 6 in a row
    assert take(allocator, 20) == list(range(32, 52))
    assert take(allocator, 12) == [16, 17, 18, 19, 20, 21, 22, 23, 24, 52, 53, 54]


def test_decode_rows_get_one_page_each_and_room_between_them() -> None:
    allocator = make(1)
    first = allocator.alloc_each([-1, -1, -1])
    assert first.tolist() == [8, 10, 13]
    assert allocator.alloc_each([9, 11, 14]).tolist() == [9, 11, 14]
    # two rows that share their last page want the same next one: the second gets another
    assert allocator.alloc_each([15, 15]).tolist() == [15, 12]
    assert allocator.num_free == 0


def test_rows_whose_hints_are_free_are_served_before_those_without() -> None:
    allocator = make(1)
    take(allocator, 6)
    # the first row's gap would be page 14, which is the second row's own next page
    assert allocator.alloc_each([-1, 14]).tolist() == [15, 14]
    give(allocator, 8, 9, 10)
    hints = np.array([9, 9, 10_000, 10], np.int32)
    assert allocator.alloc_each(hints) is None
    assert allocator.alloc_each(hints[:3]).tolist() == [9, 8, 10]
    assert hints.tolist() == [9, 9, 10_000, 10]


def test_rows_without_their_next_page_get_gaps_together() -> None:
    allocator = make(1, 2, 3)
    take(allocator, 24)
    give(allocator, 9, 12, 16, 17, 18, 19, *range(24, 32))
    # segment 1 has 2 free pages, segment 2 has 4, segment 3 is empty: the fullest are filled up,
    # and the next one's rows stand apart, with room behind the row that ends before it
    pages = allocator.alloc_each([10, 12, 10, -1, 10, 10, 10, 10])
    assert pages.tolist() == [9, 12, 16, 17, 18, 19, 26, 29]
    assert allocator.alloc_each([27, 30]).tolist() == [27, 30]
    assert allocator.num_free == 4


def test_gaps_are_shared_by_their_length() -> None:
    allocator = make(1, 2, per_segment=32)
    take(allocator, 64)
    give(allocator, *range(33, 49), *range(60, 64), 50)  # 16, 4 and 1 free
    assert allocator.alloc_each([-1] * 3).tolist() == [37, 43, 61]


def test_places_for_rows_that_come_one_by_one_are_laid_out_together() -> None:
    allocator = make(1, per_segment=64)
    found: list[int] = []
    for _ in range(9):
        pages = allocator.alloc_each([-1])
        assert pages is not None
        found += pages.tolist()
    assert len(set(found)) == 9
    room = np.diff(np.append(np.sort(found), 128))
    assert room.min() >= 3, "each has room to grow, although nobody knew how many would come"


def test_a_place_that_a_neighbour_grew_into_is_given_to_nobody() -> None:
    allocator = make(1, per_segment=32)
    for _ in range(4):
        allocator.alloc_each([-1])
    laid_out = list(allocator._laid_out)
    assert laid_out
    (taken,) = take(allocator, 1, hint=laid_out[-1])
    assert taken == laid_out[-1]
    (page,) = allocator.alloc_each([-1]).tolist()
    assert page != taken
    assert page in laid_out


def test_places_are_laid_out_anew_when_pages_came_back() -> None:
    allocator = make(1, 2, per_segment=16)
    take(allocator, 16)
    for _ in range(4):
        allocator.alloc_each([-1])
    assert allocator._laid_out
    give(allocator, 20)  # now segment 1 is the fullest that has a free page
    assert allocator.alloc_each([-1]).tolist() == [20]


def test_removed_segments_are_not_used_and_must_be_empty() -> None:
    allocator = make(1, 2)
    assert take(allocator, 2) == [8, 9]
    with pytest.raises(InvariantError):
        allocator.remove_segments([1])
    allocator.remove_segments([2])
    assert allocator.alloc_pages(7) is None
    assert take(allocator, 6, hint=10) == [10, 11, 12, 13, 14, 15]
    assert allocator.alloc_pages(1, 16) is None
    allocator.add_segments([2])
    assert take(allocator, 1, hint=16) == [16]


def test_the_last_page_of_the_index_is_no_hint() -> None:
    allocator = make(1)
    end = len(allocator.index.state)
    assert take(allocator, 1, hint=end) == [8]
    assert take(allocator, 2, hint=end + 5) == [11, 12]


@given(st.lists(st.booleans(), max_size=40))
def test_runs_of(flags: list[bool]) -> None:
    starts, lengths = runs_of(np.array(flags, bool))
    covered = [i for s, n in zip(starts, lengths, strict=True) for i in range(s, s + n)]
    assert covered == [i for i, flag in enumerate(flags) if flag]
    assert all(s == 0 or not flags[s - 1] for s in starts)


CALL = st.tuples(st.sampled_from(["alloc", "each", "give"]), st.integers(0, 30), st.integers(0, 60))


@given(st.lists(CALL, max_size=40))
def test_every_free_page_can_be_had_and_none_twice(calls: list[tuple[str, int, int]]) -> None:
    allocator = make(1, 2, 4, 5, 7)
    held: list[int] = []
    for name, count, hint in calls:
        if name == "give":
            gone, held = held[:count], held[count:]
            give(allocator, *gone)
            continue
        free = allocator.num_free
        if name == "alloc":
            pages = allocator.alloc_pages(count, hint)
        else:
            pages = allocator.alloc_each(list(range(hint, hint + count)))
        assert (pages is None) == (count > free)
        if pages is not None:
            assert len(set(pages.tolist()) | set(held)) == count + len(held)
            assert {page // 8 for page in pages.tolist()} <= {1, 2, 4, 5, 7}
            held += pages.tolist()
        assert allocator.num_free == 40 - len(held)
