"""What a step's attention is cut into: tiles of queries times ranges of keys, as arrays.

Pure arithmetic on numpy; the attention backend plans with it once a step and shape of layer, the
wrappers in `sgl_kernel.triton.attention` upload what it returns. See docs/gpu.md, Note [Splits].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

ITEM_COLUMNS = 8
# Keys that one program adds up in one float32 sum; more lose what comes late.
MAX_PART_KEYS = 1 << 18


class Queries(NamedTuple):
    """Runs of queries at neighbouring rows and positions, int64 [n] each.

    Run i is rows [rows[i], rows[i] + counts[i]) of q, of which the first stands at positions[i] of
    request requests[i].
    """

    rows: Int64Array
    counts: Int64Array
    positions: Int64Array
    requests: Int64Array


@dataclass(frozen=True, slots=True)
class Sight:
    """What a query at position p sees: (p - window, p], or its chunk's keys up to p, or all."""

    window: int | None = None
    chunk: int | None = None

    def first_seen(self, positions: Int64Array) -> Int64Array:
        """First position that a query at each of `positions` sees."""
        if self.chunk is not None:
            return positions - positions % self.chunk
        if self.window is not None:
            return np.maximum(positions - self.window + 1, 0)
        return np.zeros_like(positions)


class Tile(NamedTuple):
    """Sizes of one launch: M rows (query times head of the group) by N keys, powers of two."""

    rows: int
    keys: int


@dataclass(frozen=True, slots=True)
class Launch:
    """Work items int32 [W, 8] of one tile size, the longest first."""

    tile: Tile
    items: Int32Array


@dataclass(frozen=True, slots=True)
class Work:
    """A step's launches, and the merge of what was split.

    `merged` int32 [*, 4]: output row, first part's row, parts, rows from part to part.
    `num_parts` rows of parts are written by the launches.
    """

    launches: tuple[Launch, ...]
    merged: Int32Array
    num_parts: int

    def padded(self, num_items: int, num_merged: int) -> Work:
        """The same with so many items and merged rows, what is too many empty: for recorded steps.

        Of one launch, as a step of single queries is. Raises ValueError when there is no room.
        """
        (launch,) = self.launches
        if len(launch.items) > num_items or len(self.merged) > num_merged:
            raise ValueError(f"{len(launch.items)} items do not fit {num_items}")
        items = np.zeros((num_items, ITEM_COLUMNS), np.int32)
        items[: len(launch.items)] = launch.items
        merged = np.zeros((num_merged, 4), np.int32)
        merged[: len(self.merged)] = self.merged
        return Work((Launch(launch.tile, items),), merged, num_items)


@dataclass(frozen=True, slots=True)
class Chip:
    """How many programs run at a time, and the least keys that are worth a program.

    Where parts are long, up to `rounds` of them follow each other in a program's place, so that the
    device does not wait for its slowest place; each has at least `round_keys`.
    """

    programs: int
    min_part_keys: int = 256
    rounds: int = 4
    round_keys: int = 1 << 13

    def part_keys(self, total_keys: int, kv_heads: int) -> int:
        """The most keys of a part, in a step that reads so many for each of `kv_heads`."""
        share = -(-total_keys * kv_heads // self.programs)
        rounds = min(max(share // self.round_keys, 1), self.rounds)
        return min(max(-(-share // rounds), self.min_part_keys), MAX_PART_KEYS)

    def most_items(self, num_rows: int, kv_heads: int) -> int:
        """Items of single queries, as long as they have `most_keys` keys in all."""
        return num_rows + self.rounds * self.programs // kv_heads + 1

    def most_keys(self, kv_heads: int) -> int:
        """Keys up to which no part is cut by MAX_PART_KEYS that its share would not cut."""
        return MAX_PART_KEYS * self.rounds * self.programs // kv_heads


def plan_work(
    queries: Queries,
    sight: Sight,
    *,
    group: int,
    kv_heads: int,
    small: Tile,
    large: Tile,
    chip: Chip,
) -> Work:
    """Cut `queries` into items: runs that fill no more than a small tile there, others in large.

    `group` query heads share a kv head. Keys of a tile are split where the whole step would leave
    programs of the chip idle, and at MAX_PART_KEYS. Raises ValueError when a group does not fit
    the tiles.
    """
    if group > small.rows:
        raise ValueError(f"{group} query heads of a kv head do not fit {small.rows} rows")
    is_small = queries.counts * group <= small.rows
    kinds = [
        (tile, _cut_rows(Queries(*(part[chosen] for part in queries)), tile.rows // group))
        for tile, chosen in ((small, is_small), (large, ~is_small))
        if chosen.any()
    ]
    ranges = [_key_blocks(tiles, sight, tile.keys) for tile, tiles in kinds]
    total_keys = sum(
        int(blocks.sum()) * tile.keys for (tile, _), (_, blocks) in zip(kinds, ranges, strict=True)
    )
    part_keys = chip.part_keys(total_keys, kv_heads)
    launches, merges, num_parts = [], [], 0
    for (tile, tiles), (first_keys, blocks) in zip(kinds, ranges, strict=True):
        splits = _num_splits(blocks * tile.keys, part_keys)
        part_rows = np.where(splits > 1, splits * tiles.counts, 0)
        starts = num_parts + np.cumsum(part_rows) - part_rows
        num_parts += int(part_rows.sum())
        launches.append(Launch(tile, _items(tiles, tile, first_keys, blocks, splits, starts)))
        merges.append(_merges(tiles, splits, starts))
    merged = np.concatenate(merges) if merges else np.empty((0, 4), np.int32)
    return Work(tuple(launches), merged, num_parts)


def plan_waves(
    queries: Queries,
    sight: Sight,
    *,
    group: int,
    kv_heads: int,
    small: Tile,
    large: Tile,
    chip: Chip,
    max_part_rows: int,
) -> tuple[Work, ...]:
    """`plan_work` in as many calls as it takes to write at most `max_part_rows` rows of parts each.

    One is enough unless many queries have keys for several sums each (a chunk of a prompt behind a
    million tokens). A single query is not cut further.
    """

    def waves(some: Queries) -> tuple[Work, ...]:
        work = plan_work(
            some, sight, group=group, kv_heads=kv_heads, small=small, large=large, chip=chip
        )
        if work.num_parts <= max_part_rows or some.counts.sum() <= 1:
            return (work,)
        first, second = _halves(some)
        return (*waves(first), *waves(second))

    return waves(queries)


def _halves(queries: Queries) -> tuple[Queries, Queries]:
    """The same queries in two, each with half of the rows; a run may be cut."""
    rows, counts, positions, requests = queries
    ends = np.cumsum(counts)
    first = np.clip(counts.sum() // 2 - (ends - counts), 0, counts)  # what the first half gets
    heads = _without_empty(Queries(rows, first, positions, requests))
    return heads, _without_empty(Queries(rows + first, counts - first, positions + first, requests))


def _without_empty(queries: Queries) -> Queries:
    used = queries.counts > 0
    return Queries(*(part[used] for part in queries))


def _num_splits(keys: Int64Array, part_keys: int) -> Int64Array:
    """Parts of ranges of `keys`: none shorter than `part_keys`, none longer than the bound."""
    return np.maximum(np.maximum(keys // part_keys, -(-keys // MAX_PART_KEYS)), 1)


def _cut_rows(queries: Queries, per_tile: int) -> Queries:
    """Runs of at most `per_tile` queries."""
    tiles = -(-queries.counts // per_tile)
    owner = np.repeat(np.arange(len(tiles)), tiles)
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(tiles) - tiles, tiles)
    done = nth * per_tile
    return Queries(
        queries.rows[owner] + done,
        np.minimum(queries.counts[owner] - done, per_tile),
        queries.positions[owner] + done,
        queries.requests[owner],
    )


def _key_blocks(tiles: Queries, sight: Sight, block: int) -> tuple[Int64Array, Int64Array]:
    """First key that each tile sees, and the blocks from there to its last query."""
    first = sight.first_seen(tiles.positions)
    return first, -(-(tiles.positions + tiles.counts) // block) - first // block


def _items(
    tiles: Queries,
    tile: Tile,
    first_keys: Int64Array,
    blocks: Int64Array,
    splits: Int64Array,
    part_starts: Int64Array,
) -> Int32Array:
    """Work items of tiles, whose keys are cut at block borders into `splits` even parts."""
    owner = np.repeat(np.arange(len(splits)), splits)
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(splits) - splits, splits)
    ends = tiles.positions + tiles.counts
    base = first_keys // tile.keys
    begin = base[owner] + blocks[owner] * nth // splits[owner]
    end = base[owner] + blocks[owner] * (nth + 1) // splits[owner]
    items = np.zeros((len(owner), ITEM_COLUMNS), np.int32)
    items[:, 0] = tiles.requests[owner]
    items[:, 1] = tiles.rows[owner]
    items[:, 2] = tiles.counts[owner]
    items[:, 3] = tiles.positions[owner]
    items[:, 4] = np.maximum(begin * tile.keys, first_keys[owner])
    items[:, 5] = np.minimum(end * tile.keys, ends[owner])
    parts = part_starts[owner] + nth * tiles.counts[owner]
    items[:, 6] = np.where(splits[owner] > 1, parts, -1)
    # The last programs to start should be the shortest.
    return items[np.argsort(begin - end, kind="stable")]


def _merges(tiles: Queries, splits: Int64Array, part_starts: Int64Array) -> Int32Array:
    """Rows whose keys were split, see `Work.merged`."""
    counts = np.where(splits > 1, tiles.counts, 0)
    owner = np.repeat(np.arange(len(counts)), counts)
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    merged = np.empty((len(owner), 4), np.int32)
    merged[:, 0] = tiles.rows[owner] + nth
    merged[:, 1] = part_starts[owner] + nth
    merged[:, 2] = splits[owner]
    merged[:, 3] = tiles.counts[owner]
    return merged
