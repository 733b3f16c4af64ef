"""How a step's attention is cut into work items, as arithmetic."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from sgl_kernel.triton.work import (
    MAX_PART_KEYS,
    Chip,
    Queries,
    Sight,
    Tile,
    Work,
    plan_waves,
    plan_work,
)

ALL = Sight()
SMALL, LARGE = Tile(16, 64), Tile(128, 64)
H100 = Chip(programs=132 * 3)


def queries(*lengths: tuple[int, int]) -> Queries:
    prefix, counts = (np.array(column, np.int64) for column in zip(*lengths, strict=True))
    return Queries(np.cumsum(counts) - counts, counts, prefix, np.arange(len(counts)))


def plan(
    *lengths: tuple[int, int], sight: Sight = ALL, kv_heads: int = 8, chip: Chip = H100
) -> Work:
    return plan_work(
        queries(*lengths), sight, group=4, kv_heads=kv_heads, small=SMALL, large=LARGE, chip=chip
    )


def num_programs(work: Work, kv_heads: int = 8) -> int:
    return sum(len(launch.items) for launch in work.launches) * kv_heads


def test_ten_million_tokens_fill_the_chip() -> None:
    for kv_heads, rounds in ((1, 3), (8, 4)):
        work = plan((10_000_000, 1), kv_heads=kv_heads)
        assert num_programs(work, kv_heads) > 0.95 * 132 * 3 * rounds
        items = work.launches[0].items
        keys = items[:, 5] - items[:, 4]
        assert keys.max() <= min(MAX_PART_KEYS, 2 * 10_000_000 * kv_heads // (132 * 3 * rounds))
        assert keys.min() > 0.9 * keys.max()
        assert work.merged.tolist() == [[0, 0, len(items), 1]]


def test_parts_follow_each_other_where_they_are_long() -> None:
    for total, part in ((1000, 256), (50_000, 1011), (1 << 20, 10_592), (10_000_000, 50_506)):
        assert H100.part_keys(total, 8) == part
    assert H100.part_keys(1 << 30, 8) == MAX_PART_KEYS
    assert H100.most_items(256, 8) == 256 + 4 * 132 * 3 // 8 + 1


def test_many_short_requests_are_not_split() -> None:
    work = plan(*[(100 + i, 1) for i in range(256)])
    assert len(work.launches[0].items) == 256
    assert len(work.merged) == 0
    assert work.num_parts == 0


def test_few_short_requests_keep_parts_worth_a_program() -> None:
    work = plan((2000, 1), (90, 1))
    items = work.launches[0].items
    assert (items[:, 0] == 1).sum() == 1
    keys = items[items[:, 0] == 0][:, 5] - items[items[:, 0] == 0][:, 4]
    assert len(keys) == 8
    assert keys.max() <= 256


def test_one_long_request_among_short_ones_is_split() -> None:
    work = plan((1_000_000, 1), *[(500, 1)] * 63)
    items = work.launches[0].items
    assert (items[:, 0] == 0).sum() * 8 > 132 * 3
    assert (items[:, 0] > 0).sum() == 63
    assert items[0, 0] == 0  # the longest begin first


def test_windows_cost_what_they_see() -> None:
    near = plan((1_000_000, 1), sight=Sight(window=128)).launches[0].items
    assert near[:, 4:6].tolist() == [[999_873, 1_000_001]]
    chunk = plan((1_000_000, 1), sight=Sight(chunk=8192), chip=Chip(1, 1 << 20)).launches[0].items
    assert chunk[:, 4:6].tolist() == [[1_000_000 - 1_000_000 % 8192, 1_000_001]]


def test_prompts_and_single_queries_get_tiles_of_their_own() -> None:
    work = plan((64, 1), (0, 4), (0, 5), (0, 100))
    small, large = work.launches
    assert (small.tile, large.tile) == (SMALL, LARGE)
    assert sorted(small.items[:, 2]) == [1, 4]
    assert sorted(large.items[:, 2]) == [4, 5, 32, 32, 32]


def test_a_group_that_fits_no_tile_is_refused() -> None:
    with pytest.raises(ValueError, match="20 query heads"):
        plan_work(
            queries((3, 1)), Sight(), group=20, kv_heads=1, small=SMALL, large=LARGE, chip=H100
        )


def test_nothing_to_do() -> None:
    none = np.empty(0, np.int64)
    work = plan_work(
        Queries(none, none, none, none),
        Sight(),
        group=4,
        kv_heads=1,
        small=SMALL,
        large=LARGE,
        chip=H100,
    )
    assert work.launches == ()
    assert work.merged.shape == (0, 4)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(
        st.tuples(st.integers(0, 5000), st.sampled_from([1, 1, 3, 60, 300])), min_size=1, max_size=6
    ),
    span=st.sampled_from([None, 1, 100, 1000]),
    chunked=st.booleans(),
    programs=st.sampled_from([1, 100, 10_000]),
    group=st.sampled_from([1, 5, 16]),
)
def test_every_query_meets_every_key_that_it_sees_once(
    lengths: list[tuple[int, int]], span: int | None, chunked: bool, programs: int, group: int
) -> None:
    sight = Sight(chunk=span) if chunked else Sight(window=span)
    packed = queries(*lengths)
    work = plan_work(
        packed, sight, group=group, kv_heads=2, small=SMALL, large=LARGE, chip=Chip(programs, 64)
    )
    ranges: dict[int, list[tuple[int, int]]] = {}
    parts: dict[int, list[int]] = {}
    for launch in work.launches:
        for request, row, count, position, lo, hi, part, _ in launch.items.tolist():
            assert count * group <= launch.tile.rows
            assert lo < hi
            assert row - packed.rows[request] == position - packed.positions[request]
            for i in range(count):
                ranges.setdefault(row + i, []).append((lo, hi))
                parts.setdefault(row + i, []).append(part + i if part >= 0 else -1)
    merged = {row: (first, count, step) for row, first, count, step in work.merged.tolist()}
    used = [part for found in parts.values() for part in found if part >= 0]
    assert sorted(used) == list(range(work.num_parts))
    for request, (prefix, extend) in enumerate(lengths):
        for i in range(extend):
            row = int(packed.rows[request]) + i
            pieces = sorted(ranges.pop(row))
            assert pieces[0][0] <= sight.first_seen(np.array([prefix + i]))[0]
            assert pieces[-1][1] > prefix + i
            assert all(a[1] == b[0] for a, b in pairwise(pieces))
            if len(pieces) == 1:
                assert parts[row] == [-1]
                assert row not in merged
            else:
                first, count, step = merged.pop(row)
                assert sorted(parts[row]) == [first + n * step for n in range(count)]
    assert not ranges
    assert not merged


@pytest.mark.parametrize("max_part_rows", [1, 300, 5000, 1 << 20])
def test_waves_write_no_more_parts_than_they_may(max_part_rows: int) -> None:
    packed = queries((3_000_000, 700), (2_000_000, 1), (0, 40), (1_000_000, 3))
    waves = plan_waves(
        packed,
        ALL,
        group=4,
        kv_heads=2,
        small=SMALL,
        large=LARGE,
        chip=H100,
        max_part_rows=max_part_rows,
    )
    whole = [work for work in waves if work.num_parts <= max_part_rows]
    single = [work for work in waves if work.num_parts > max_part_rows]
    assert all(len(work.merged) == 1 for work in single)
    assert bool(single) == (max_part_rows == 1)
    assert (len(waves) > 1) == (max_part_rows < 1 << 20)
    rows = []
    for work in whole + single:
        for launch in work.launches:
            for request, row, count, position, *_ in np.unique(
                launch.items[:, :4], axis=0
            ).tolist():
                assert position - packed.positions[request] == row - packed.rows[request]
                rows += range(row, row + count)
    assert sorted(rows) == list(range(int(packed.counts.sum())))
