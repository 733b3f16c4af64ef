from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache.block_table import BlockTable


def pages(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_runs_merge_across_calls() -> None:
    table = BlockTable(4)
    table.extend(pages(4, 5, 6))
    table.extend(pages(7, 2, 3))
    table.append_page(4)
    assert table.runs == [(16, 16), (8, 12)]
    assert table.page_ids.tolist() == [4, 5, 6, 7, 2, 3, 4]
    assert table.next_page_hint == 5
    assert repr(table) == "BlockTable(pages=7, first=0)"


def test_empty_table() -> None:
    table = BlockTable(4)
    table.extend(pages())
    assert (table.num_pages, table.last_page, table.next_page_hint, table.runs) == (0, -1, -1, [])
    assert table.snapshot().runs == []
    assert table.slots(0, 0).tolist() == []


def test_the_last_page_follows_every_change() -> None:
    table = BlockTable(4)
    table.append_page(5)
    assert (table.last_page, table.next_page_hint) == (5, 6)
    table.extend(pages(6, 9))
    assert table.last_page == 9
    assert table.truncate(1).tolist() == [6, 9]
    assert table.last_page == 5
    table.truncate(0)
    assert (table.last_page, table.next_page_hint) == (-1, -1)


def test_slots_of_positions() -> None:
    table = BlockTable(4)
    table.extend(pages(3, 9))
    assert table.slots(0, 8).tolist() == [12, 13, 14, 15, 36, 37, 38, 39]
    assert table.slots(2, 4).tolist() == [14, 15, 36, 37]
    assert table.slots(4, 1).tolist() == [36]
    assert table.slot_of(6) == 38
    with pytest.raises(InvariantError):
        table.slots(6, 3)


def test_positions_of_a_table_whose_head_was_dropped() -> None:
    table = BlockTable(4)
    table.begin_at(10)
    table.extend(pages(3, 9))
    assert table.slots(41, 4).tolist() == [13, 14, 15, 36]
    assert table.slot_of(44) == 36
    assert table.snapshot().first_position == 40
    with pytest.raises(InvariantError):
        table.slots(39, 1)


def test_snapshot_stays_true_while_the_table_grows() -> None:
    table = BlockTable(2)
    table.extend(pages(1, 2, 7))
    snapshot = table.snapshot()
    for page in range(8, 500):
        table.append_page(page)
    table.extend(pages(1000, 1001))
    assert snapshot.page_ids.tolist() == [1, 2, 7]
    assert snapshot.runs == [(2, 4), (14, 2)]
    assert table.runs[-1] == (2000, 4)


def test_snapshot_stays_true_after_truncation_and_new_pages() -> None:
    table = BlockTable(2)
    table.extend(pages(1, 2, 7, 8, 9))
    snapshot = table.snapshot()
    assert table.truncate(2).tolist() == [7, 8, 9]
    table.extend(pages(20, 21, 22, 23))
    assert table.page_ids.tolist() == [1, 2, 20, 21, 22, 23]
    assert table.runs == [(2, 4), (40, 8)]
    assert snapshot.page_ids.tolist() == [1, 2, 7, 8, 9]
    assert snapshot.runs == [(2, 4), (14, 6)]
    with pytest.raises(InvariantError):
        table.truncate(7)


def test_snapshot_copies_nothing() -> None:
    table = BlockTable(1)
    table.extend(np.arange(100_000, dtype=np.int32) * 2)
    snapshot = table.snapshot()
    assert np.shares_memory(snapshot.page_ids, table.page_ids)


@given(st.lists(st.lists(st.integers(1, 12), max_size=6), max_size=8), st.integers(1, 3))
def test_runs_cover_exactly_the_slots(calls: list[list[int]], page_size: int) -> None:
    table = BlockTable(page_size)
    expected: list[int] = []
    for call in calls:
        table.extend(np.array(call, np.int32))
        expected += [page * page_size + i for page in call for i in range(page_size)]
    covered = [slot for first, count in table.runs for slot in range(first, first + count)]
    assert covered == expected == table.slots(0, len(expected)).tolist()
    ends = [(a[0] + a[1], b[0]) for a, b in zip(table.runs, table.runs[1:], strict=False)]
    assert all(end != start for end, start in ends), "neighbours are merged"
