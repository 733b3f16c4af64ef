"""Block tables on the device: what is uploaded, and that it is what the host has."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang.srt.layers.attention.triton_tables import DeviceTables
from sglang.srt.mem_cache.block_table import BlockTable, BlockTableSnapshot
from sglang.srt.mem_cache.table_rows import TableRows
from sglang.srt.mem_cache.table_space import TableSpace

CPU = torch.device("cpu")


def check(tables: DeviceTables, views: list[BlockTableSnapshot]) -> int:
    """The device has what the views say; how many ids that took."""
    before = tables.uploaded_ids
    starts = tables.update(views)
    for start, view in zip(starts.tolist(), views, strict=True):
        found = tables.pages[start : start + len(view.page_ids)].numpy()
        assert np.array_equal(found, view.page_ids)
    return tables.uploaded_ids - before


def test_only_new_ids_are_uploaded() -> None:
    tables, table = DeviceTables(CPU), BlockTable(16)
    table.extend(np.arange(10, 5010, dtype=np.int32))
    assert check(tables, [table.snapshot()]) == 5000
    assert check(tables, [table.snapshot()]) == 0
    table.append_page(7)
    assert check(tables, [table.snapshot()]) == 1
    table.drop_head(4000)
    assert check(tables, [table.snapshot()]) == 0
    table.replace_pages(table.page_ids[::-1].copy())
    assert check(tables, [table.snapshot()]) == 1001
    assert tables.moves == 0


def test_what_is_appended_one_by_one_is_uploaded_a_few_times() -> None:
    """A table that outgrows its range, on the host or here, is sent again: amortised constant."""
    tables, table = DeviceTables(CPU), BlockTable(16)
    sent = 0
    for page in range(5000):
        table.append_page(page)
        sent += check(tables, [table.snapshot()])
    assert sent < 4 * 5000


def test_ranges_of_ended_requests_are_used_again() -> None:
    tables = DeviceTables(CPU, capacity=1024)
    rows = TableRows(TableSpace())
    for round_number in range(50):
        rows.take_row(1)
        table = BlockTable(16, rows, 1)
        table.extend(np.arange(200, dtype=np.int32) + round_number)
        check(tables, [table.snapshot()])
        rows.free_row(1)
        del table
    assert tables.moves == 0
    assert len(tables.pages) == 1024


def test_more_than_the_capacity_moves_all() -> None:
    tables = DeviceTables(CPU, capacity=256)
    held = []
    for number in range(20):
        table = BlockTable(16)
        table.extend(np.arange(60, dtype=np.int32) + 100 * number)
        held.append(table)
        check(tables, [table.snapshot() for table in held])
    assert tables.moves > 0
    assert check(tables, [table.snapshot() for table in held]) == 0


@settings(deadline=None, max_examples=60)
@given(
    steps=st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from("aaaeedrtf"), st.integers(1, 300)), max_size=40
    ),
    capacity=st.sampled_from([64, 1 << 12, 1 << 20]),
)
def test_any_life_of_tables(steps: list[tuple[int, str, int]], capacity: int) -> None:
    tables, rows = DeviceTables(CPU, capacity), TableRows(TableSpace())
    lives: dict[int, BlockTable] = {}
    fresh = 0
    for row, action, count in steps:
        if row not in lives:
            rows.take_row(row)
            lives[row] = BlockTable(4, rows, row)
        table = lives[row]
        fresh += 1000
        match action:
            case "a":
                table.append_page(fresh)
            case "e":
                table.extend(np.arange(fresh, fresh + count, dtype=np.int32))
            case "d":
                table.drop_head(table.first_page + min(count, table.num_pages))
            case "r":
                table.replace_pages(np.arange(fresh, fresh + table.num_pages, dtype=np.int32))
            case "t":
                table.truncate(table.num_pages // 2)
            case "f":
                rows.free_row(row)
                del lives[row]
        check(tables, [table.snapshot() for table in lives.values()])


def test_views_of_one_array_are_told_apart() -> None:
    """Other parts of the same array are sent anew, and none takes the place of another."""
    tables = DeviceTables(CPU)
    ids = np.arange(400, dtype=np.int32)
    cuts = [(300, 400), (0, 100), (350, 390), (100, 300), (0, 400)]
    check(tables, [BlockTableSnapshot(ids[a:b], 0, (0, 0), 16) for a, b in cuts])
    check(tables, [BlockTableSnapshot(ids[a:b], 0, (0, 0), 16) for a, b in cuts[::-1]])
