"""KV over ranks: whose page it is, what a rank maps, and that ranks keep the same page ids."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from sglang.srt.errors import BackingError, InvariantError
from sglang.srt.mem_cache.capacity import effective_context_length
from sglang.srt.mem_cache.compaction import compact, plan_compaction
from sglang.srt.mem_cache.kv_layout import (
    GroupId,
    GroupKind,
    KVRanks,
    SegmentLayout,
)
from sglang.srt.mem_cache.kv_share import KVShare
from sglang.srt.mem_cache.page_copy import copy_pages
from sglang.srt.mem_cache.page_owner import PageIndex, PageState
from sglang.srt.mem_cache.rank_agreement import RankAgreement
from sglang.srt.mem_cache.segment_cuts import (
    make_segment_layouts,
    trim_layouts_to_budget,
)
from srt.mem_cache.memory_driver import (
    FULL,
    MemoryDriver,
    PoisonedBacking,
    Window,
    make_memory,
    tiny_spec,
)
from srt.mem_cache.rank_world import Rank, RankDrivers

SIZE = 4  # KV-parallel ranks
PAGES = 8  # of a segment, 2 for each rank
SLIDING: tuple[Window, ...] = (FULL, (GroupKind.SLIDING, 10))


def layouts_of(
    size: int, windows: tuple[Window, ...] = (FULL,), **changes: int
) -> tuple[SegmentLayout, ...]:
    numbers = {
        "slots_per_segment": 4 * PAGES,
        "auto_segment_bytes": 1 << 20,
        "auto_min_slots": 1,
        "granule_bytes": 1,
        "machine_bytes": 1 << 20,
        "budget_bytes": 1 << 10,
        **changes,
    }
    spec = tiny_spec(len(windows), page_size=4, windows=windows)
    return make_segment_layouts(spec, **numbers, kv_parallel=size)


def test_a_rank_has_its_part_of_each_full_segment_and_windows_whole() -> None:
    full, window = layouts_of(SIZE, SLIDING)
    alone, same = layouts_of(1, SLIDING)
    assert window == same
    assert (full.pages_per_segment, full.kv_parallel) == (PAGES, SIZE)
    assert full.segment_bytes * SIZE == alone.segment_bytes
    assert full.on_rank.segment_bytes == full.segment_bytes
    assert full.on_rank.pages_per_segment == PAGES // SIZE
    assert full.fixed_bytes == alone.fixed_bytes, "the dump page of each rank"
    # the space holds what all ranks' machines together could
    assert full.num_slots >= SIZE * (1 << 20) // 12


def test_segments_are_whole_granules_on_each_rank() -> None:
    (layout,) = layouts_of(3, granule_bytes=4096, slots_per_segment=100)
    assert layout.on_rank.slots_per_segment * 4 % 4096 == 0
    assert layout.pages_per_segment == 3 * layout.on_rank.pages_per_segment
    assert layout.slots_per_segment >= 100


def test_pages_that_can_not_be_dealt_are_refused() -> None:
    with pytest.raises(ValueError, match="8 pages cannot be dealt to 3 ranks"):
        SegmentLayout(GroupId(0), 4, 8, 2, 1, 8, 4, 1, kv_parallel=3)
    with pytest.raises(ValueError, match="rank 4 is none of 4"):
        KVRanks(4, 4)


def test_a_static_pool_is_cut_for_one_rank() -> None:
    full, window = trim_layouts_to_budget(layouts_of(SIZE, SLIDING), (3 + 12) * 100)
    assert (full.max_segments, window.max_segments) == (1 + 3, 1 + 3)


def test_the_context_grows_with_the_ranks() -> None:
    spec = tiny_spec(1, page_size=4)
    numbers = {
        size: effective_context_length(
            spec,
            layouts_of(size),
            budget_bytes=10 * 12 * 4 * PAGES,
            reserve_segments=0,
            requested=1 << 20,
            prefill_chunk=16,
        )
        for size in (1, 2, SIZE)
    }
    alone = numbers[1].effective
    assert alone == 10 * 4 * PAGES
    assert [numbers[size].effective for size in (2, SIZE)] == [2 * alone, SIZE * alone]
    assert "12 bytes over 4 ranks" in numbers[SIZE].explanation


def test_every_slot_is_one_ranks_and_neighbours_stay_neighbours() -> None:
    layouts = layouts_of(SIZE, SLIDING)
    shares = [KVShare.of(rank, layouts) for rank in range(SIZE)]
    pages = np.arange(PAGES, 4 * PAGES, dtype=np.int32)
    assert (sum(share.owns(0, pages).astype(int) for share in shares) == 1).all()
    for share in shares:
        own = share.own_pages(0, pages)
        assert own.tolist() == list(range(PAGES // SIZE, PAGES))
        assert share.own_pages(1, pages) is pages
        assert share.owns(1, pages).all()
    slots = np.array([4 * 9 + 1, 4 * 10, 4 * 13 + 3])
    assert [share.own_slots(0, slots).tolist() for share in shares] == [
        [],
        [4 * 2 + 1, 4 * 3 + 3],
        [4 * 2],
        [],
    ]
    assert shares[1].write_slots(0, slots).tolist() == [4 * 2 + 1, 0, 4 * 3 + 3]
    assert shares[0].write_slots(0, slots).tolist() == [1, 0, 3], "the dump page"
    assert shares[0].write_slots(1, slots) is slots


# ---- ranks with memory -------------------------------------------------------------------------


def make_driver(ranks: RankAgreement | None, **options: object) -> MemoryDriver:
    assert isinstance(ranks, Rank)
    settings: dict[str, object] = {
        "pages_per_segment": PAGES,
        "budget_segments": 3,  # of whole segments: 12 parts
        "max_segments": 13,
        "backing": PoisonedBacking(),
        "prefill_chunk": 32,
        **options,
    }
    kv_ranks = KVRanks(ranks.number, ranks.size)
    memory, backing = make_memory(ranks=ranks, kv_ranks=kv_ranks, **settings)  # type: ignore[arg-type]
    return MemoryDriver(memory, backing)


@pytest.fixture
def make_ranks() -> Iterator[Callable[..., RankDrivers]]:
    made: list[RankDrivers] = []

    def make(**options: object) -> RankDrivers:
        made.append(RankDrivers(SIZE, lambda ranks: make_driver(ranks, **options)))
        return made[-1]

    yield make
    for ranks in made:
        ranks.close()


def grow(driver: MemoryDriver, num_tokens: int) -> bool:
    request = driver.open(list(range(num_tokens)))
    assert request is not None
    return driver.extend([(request, num_tokens)])


def test_a_request_larger_than_one_ranks_budget_runs(
    make_ranks: Callable[..., RankDrivers],
) -> None:
    ranks = make_ranks()
    budget = ranks.first.memory.manager.budget_bytes
    num_tokens = 11 * 4 * PAGES + 1
    assert 12 * num_tokens > 3 * budget
    assert ranks.run(lambda driver: grow(driver, num_tokens))
    ranks.check()
    for driver in ranks.drivers:
        assert driver.memory.manager.mapped_bytes == budget
        assert driver.memory.capacity_tokens == 12 * 4 * PAGES


def test_each_rank_maps_its_part(make_ranks: Callable[..., RankDrivers]) -> None:
    ranks = make_ranks()
    ranks.run(lambda driver: grow(driver, 4 * PAGES * 5))
    for driver in ranks.drivers:
        assert driver.memory.manager.mapped_bytes == 12 * 4 * PAGES * 5 // SIZE
        resident = driver.backing.resident_bytes()
        assert resident == 12 * 4 * PAGES * 5 // SIZE + driver.memory.manager.fixed_bytes


def test_a_map_refused_on_one_rank_leaves_the_same_pages(
    make_ranks: Callable[..., RankDrivers],
) -> None:
    ranks = make_ranks()
    assert ranks.run(lambda driver: grow(driver, 40))
    refusing = ranks.drivers[2].backing
    refusing.failing_maps = {refusing.num_maps + 1}
    assert not ranks.run(lambda driver: grow(driver, 4 * PAGES * 3))
    ranks.check()
    ranks.run(lambda driver: driver.boundary(10.0))
    grown = ranks.run(lambda driver: driver.extend([(driver.requests[1], 4 * PAGES * 3)]))
    assert grown
    ranks.check()


@pytest.mark.parametrize("windows", [(FULL,), SLIDING], ids=["full", "sliding"])
def test_random_programs_keep_contents_and_pages(
    make_ranks: Callable[..., RankDrivers], windows: tuple[Window, ...]
) -> None:
    moved = refused = 0
    for seed in range(6):
        ranks = make_ranks(windows=windows, idle_release_s=1.0, prefix_idle_s=20.0)
        luck = random.Random(f"{seed} luck")
        for number in range(60):
            for driver in ranks.drivers:
                fails = luck.random() < 0.1
                driver.backing.failing_maps = {driver.backing.num_maps + 1} if fails else set()
            moved += ranks.run(lambda driver, n=f"{seed} {number}": step(driver, random.Random(n)))
            ranks.check()
        refused += sum(stats.refused_count for stats in ranks.first.memory.manager.stats())
    assert moved > 0
    assert refused > 0


def step(driver: MemoryDriver, dice: random.Random) -> int:
    """One random thing; pages that were moved."""
    kind = dice.choice(("open", "open", "decode", "close", "close", "boundary", "compact"))
    if kind == "open":
        request = driver.open([dice.randrange(50) for _ in range(dice.randrange(2, 50))])
        if request is not None and driver.extend(
            [(request, len(request.tokens) - request.num_computed)]
        ):
            driver.cache_prefix(request, request.num_computed)
        elif request is not None:
            driver.close(request, insert=False)
    elif kind == "boundary":
        driver.boundary(dice.choice((0.2, 2.0, 30.0)))
    elif kind == "compact":
        done = compact(driver.memory, 1 << 20)
        return 0 if done is None else done.moved_pages
    elif driver.requests:
        request = driver.requests[dice.randrange(len(driver.requests))]
        if kind == "close":
            driver.close(request, insert=dice.random() < 0.5)
        elif request.num_computed == len(request.tokens):
            driver.decode([(request, dice.randrange(2))])
    return 0


# ---- compaction --------------------------------------------------------------------------------


def index_of(*owned: tuple[int, ...]) -> PageIndex:
    """Segments 1, 2, ... of which the given places are used."""
    index = PageIndex(layouts_of(SIZE)[0])
    for segment, places in enumerate(owned, 1):
        index.add_segment(segment)
        index.take(np.array([segment * PAGES + place for place in places], np.int32))
    return index


def test_a_page_moves_to_a_place_of_the_same_rank() -> None:
    index = index_of((0, 1, 2, 4), (2, 3))
    plan = plan_compaction(index, max_pages=100)
    assert plan is not None
    assert plan.sources.tolist() == [18, 19]
    assert plan.targets.tolist() == [14, 11]
    assert plan.num_emptied == 1


def test_a_segment_stays_when_a_rank_has_no_room_elsewhere() -> None:
    assert plan_compaction(index_of((0, 4), (0, 1)), max_pages=100) is None
    assert plan_compaction(index_of((0, 4), (1, 2)), max_pages=100) is not None


def test_random_plans_keep_the_rank() -> None:
    rng = random.Random(3)
    emptied = 0
    for _ in range(200):
        places = [
            tuple(p for p in range(PAGES) if rng.random() < 0.4) for _ in range(rng.randrange(1, 7))
        ]
        index = index_of(*places)
        while (plan := plan_compaction(index, max_pages=rng.randrange(1, 9))) is not None:
            assert ((plan.sources - plan.targets) % SIZE == 0).all()
            assert not set(plan.sources.tolist()) & set(plan.targets.tolist())
            index.relocate(plan.sources, plan.targets)
            emptied += plan.num_emptied
        assert index.num_used == sum(map(len, places))
        assert int(index.segment_counts(PageState.USED).sum()) == index.num_used
    assert emptied > 100


def test_a_copy_to_another_rank_is_a_bug(make_ranks: Callable[..., RankDrivers]) -> None:
    ranks = make_ranks()

    def move(driver: MemoryDriver) -> None:
        pages = np.array([PAGES], np.int32), np.array([PAGES + 1], np.int32)
        with pytest.raises(InvariantError, match="another rank"):
            copy_pages(driver.memory.kv_pool, GroupId(0), *pages)

    ranks.drivers[0].memory.kv_pool.share.owns(0, np.array([1]))
    move(ranks.drivers[0])
    move(ranks.drivers[1])


def test_the_machine_refuses_what_the_budget_allows(
    make_ranks: Callable[..., RankDrivers],
) -> None:
    ranks = make_ranks()
    for driver in ranks.drivers[1:]:
        driver.backing.fail_all_maps = True
    assert not ranks.run(lambda driver: grow(driver, 40))
    assert not ranks.first.backing.mapped, "what one rank got is given back"
    with pytest.raises(BackingError):
        ranks.drivers[1].backing.map(GroupId(0), ())
