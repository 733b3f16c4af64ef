from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache.block_table import BlockTable, BlockTableSnapshot, runs_of_pages
from sglang.srt.mem_cache.table_rows import TableRows
from sglang.srt.mem_cache.table_space import TableSpace

ROWS = [2, 5, 1]


def make(*rows: int) -> tuple[TableRows, dict[int, BlockTable]]:
    tables = TableRows(TableSpace())
    for row in rows:
        tables.take_row(row)
    return tables, {row: BlockTable(1, tables, row) for row in rows}


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def rows_of(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def test_one_page_for_each_row() -> None:
    tables, views = make(*ROWS)
    tables.append_each(rows_of(5, 1), ids(7, 9))
    tables.append_each(rows_of(1, 2, 5), ids(10, 3, 11))
    assert {row: view.page_ids.tolist() for row, view in views.items()} == {
        2: [3],
        5: [7, 11],
        1: [9, 10],
    }
    assert [view.last_page for view in views.values()] == [3, 11, 10]


def test_a_row_that_is_not_taken_has_no_table() -> None:
    tables, views = make(1, 3)
    tables.append_each(rows_of(1, 3), ids(4, 5))
    tables.free_row(3)
    for row in (2, 3, 99):
        with pytest.raises(InvariantError, match=f"row {row} has no block table"):
            tables.range_of(row)
    with pytest.raises(InvariantError):
        tables.append_each(rows_of(1, 3), ids(6, 7))
    tables.take_row(3)
    assert (views[3].num_pages, views[3].last_page, views[3].first_page) == (0, -1, 0)


def test_many_rows_outgrow_their_ranges_together() -> None:
    tables, views = make(*ROWS)
    rows, snapshots = rows_of(*ROWS), []
    for page in range(20_000):
        tables.append_each(rows, ids(page, 50_000 - page, 60_000 + 2 * page))
        if page % 3000 == 0:
            snapshots.append((page + 1, [views[row].snapshot() for row in ROWS]))
    expected = [np.arange(20_000), 50_000 - np.arange(20_000), 60_000 + 2 * np.arange(20_000)]
    for row, pages in zip(ROWS, expected, strict=True):
        assert (views[row].page_ids == pages).all()
        tables.check(row)
    for length, of_rows in snapshots:
        for snapshot, pages in zip(of_rows, expected, strict=True):
            assert (snapshot.page_ids == pages[:length]).all()
    assert views[2].snapshot().first_run == (0, 20_000)
    assert views[5].snapshot().first_run == (50_000, 1)


def test_heads_of_many_rows_are_dropped_at_once() -> None:
    tables, views = make(*ROWS)
    for row in ROWS:
        tables.extend(row, np.arange(10 * row, 10 * row + 6, dtype=np.int32))
    snapshot = views[5].snapshot()
    dropped = tables.drop_heads(rows_of(1, 2, 5), rows_of(2, 0, 6))
    assert dropped.tolist() == [10, 11, 50, 51, 52, 53, 54, 55]
    assert [view.first_page for view in views.values()] == [0, 6, 2]
    assert [view.num_pages for view in views.values()] == [6, 0, 4]
    assert views[5].last_page == 55, "also when it was dropped"
    assert snapshot.page_ids.tolist() == [50, 51, 52, 53, 54, 55]
    assert tables.drop_heads(rows_of(1), rows_of(1)).tolist() == []
    with pytest.raises(InvariantError):
        tables.drop_heads(rows_of(2, 1), rows_of(1, 7))
    assert views[2].num_pages == 6, "nothing was dropped"


@pytest.mark.parametrize("window", [5, 3000])
def test_a_window_s_table_does_not_keep_its_dropped_heads(window: int) -> None:
    tables, views = make(1)
    row = rows_of(1)
    for page in range(40 * window if window > 100 else 20_000):
        tables.append_each(row, ids(page))
        tables.drop_heads(row, rows_of(max(0, page + 1 - window)))
    where = tables.range_of(1)
    assert views[1].page_ids.tolist() == list(range(page + 1 - window, page + 1))
    used = tables.end.item(1) - where.first
    assert used <= 4 * max(window, 1024), "dead head and window together"
    assert views[1].snapshot().first_run == (page + 1 - window, window)


CALL = st.one_of(
    st.tuples(st.just("append"), st.lists(st.sampled_from(ROWS), unique=True), st.integers(0, 9)),
    st.tuples(st.just("extend"), st.sampled_from(ROWS), st.integers(0, 1500)),
    st.tuples(st.just("drop"), st.lists(st.sampled_from(ROWS), unique=True), st.integers(0, 900)),
    st.tuples(st.just("replace"), st.sampled_from(ROWS), st.integers(0, 0)),
    st.tuples(st.just("truncate"), st.sampled_from(ROWS), st.integers(0, 900)),
    st.tuples(st.just("again"), st.sampled_from(ROWS), st.integers(0, 0)),
)


@settings(max_examples=60)
@given(st.lists(CALL, max_size=25), st.booleans())
def test_against_lists(calls: list[tuple[str, object, int]], strict: bool) -> None:
    tables = TableRows(TableSpace(strict=strict))
    for row in ROWS:
        tables.take_row(row)
    views = {row: BlockTable(1, tables, row) for row in ROWS}
    model: dict[int, list[int]] = {row: [] for row in ROWS}
    firsts = dict.fromkeys(ROWS, 0)
    seen: list[tuple[BlockTableSnapshot, list[int]]] = []
    counter = 0
    for name, what, amount in calls:
        some = what if isinstance(what, list) else [what]
        for row in some:
            seen.append((views[row].snapshot(), list(model[row])))
        if name == "append":
            pages = [counter + amount * i for i in range(len(some))]
            tables.append_each(np.array(some, np.int64), np.array(pages, np.int32))
            for row, page in zip(some, pages, strict=True):
                model[row].append(page)
            counter += 1
        elif name == "drop":
            counts = [min(amount, len(model[row])) for row in some]
            wanted = [firsts[row] + n for row, n in zip(some, counts, strict=True)]
            dropped = tables.drop_heads(np.array(some, np.int64), np.array(wanted, np.int64))
            expected = [p for row, n in zip(some, counts, strict=True) for p in model[row][:n]]
            assert dropped.tolist() == expected
            for row, n in zip(some, counts, strict=True):
                model[row], firsts[row] = model[row][n:], firsts[row] + n
        elif name == "extend":
            pages = list(range(counter, counter + amount))
            views[some[0]].extend(np.array(pages, np.int32))
            model[some[0]] += pages
            counter += amount + amount % 2
        elif name == "replace":
            model[some[0]] = [page + 1 for page in model[some[0]]]
            views[some[0]].replace_pages(np.array(model[some[0]], np.int32))
        elif name == "truncate":
            kept = min(amount, len(model[some[0]]))
            assert views[some[0]].truncate(kept).tolist() == model[some[0]][kept:]
            del model[some[0]][kept:]
        else:
            tables.free_row(some[0])
            tables.take_row(some[0])
            views[some[0]] = BlockTable(1, tables, some[0])
            model[some[0]], firsts[some[0]] = [], 0
        for row in ROWS:
            tables.check(row)
            assert views[row].page_ids.tolist() == model[row]
            assert views[row].end_page == firsts[row] + len(model[row])
            if model[row]:
                assert views[row].snapshot().first_run == views[row].runs[0]
    for snapshot, pages in seen:
        assert snapshot.page_ids.tolist() == pages
        assert snapshot.runs == runs_of_pages(np.array(pages, np.int32), 1)
