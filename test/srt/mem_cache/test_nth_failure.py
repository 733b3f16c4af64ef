"""Map or unmap number n is refused, for every n: one busy life, audited after each of its steps.

One group and two (a second that keeps all, slides or is chunked); one rank, and two of which either
is refused while the other maps. Contents are read back, and both ranks hold the same pages.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest

from sglang.srt.mem_cache.compaction import compact
from sglang.srt.mem_cache.kv_layout import GroupKind
from sglang.srt.mem_cache.rank_agreement import RankAgreement
from sglang.srt.mem_cache.reclaim import Reclaim, reclaim_step
from srt.crossed import crossed
from srt.mem_cache.memory_driver import (
    FULL,
    MemoryDriver,
    Window,
    finish_background,
    make_memory,
)
from srt.mem_cache.rank_world import RankDrivers, SlowBacking, open_gate_before_waiting

KINDS: dict[str, tuple[Window, ...]] = {
    "one": (FULL,),
    "two": (FULL, FULL),
    "sliding": (FULL, (GroupKind.SLIDING, 9)),
    "chunked": (FULL, (GroupKind.CHUNKED, 16)),
}
PROMPT = [7] * 24
Act = Callable[[MemoryDriver], object]


def pool(windows: Sequence[Window], num_ranks: int) -> RankDrivers:
    def make(agreement: RankAgreement | None) -> MemoryDriver:
        memory, backing = make_memory(
            windows=windows,
            budget_segments=5,
            max_segments=12,
            backing=SlowBacking(),
            idle_release_s=1.0,
            ranks=agreement,
        )
        open_gate_before_waiting(memory.manager, backing)
        return MemoryDriver(memory, backing, in_background=True)

    return RankDrivers(num_ranks, make)


def begin(tokens: list[int]) -> Act:
    """Open a request and compute and share as much of its prompt as there are pages for."""

    def act(driver: MemoryDriver) -> None:
        request = driver.open(tokens)
        assert request is not None
        while request.num_computed < len(tokens):
            count = min(8, len(tokens) - request.num_computed)
            if not driver.extend([(request, count)]):
                break
            driver.cache_prefix(request, request.num_computed)

    return act


def decode_all(driver: MemoryDriver) -> None:
    for token in range(6):
        ready = [r for r in driver.requests if r.num_computed == len(r.tokens)]
        driver.decode([(request, token) for request in ready])


def close(which: int, *, insert: bool) -> Act:
    return lambda driver: driver.close(driver.requests[which], insert=insert)


def cut(segments: int) -> Act:
    """As the scheduler does; a refused unmap is tried again."""

    def act(driver: MemoryDriver) -> None:
        memory = driver.memory
        unit = sum(layout.segment_bytes for layout in memory.manager.layouts)
        finish_background(memory)
        memory.manager.set_budget(segments * unit)
        for _ in range(100):
            done = reclaim_step(memory)
            finish_background(memory)
            if done.state is Reclaim.HOLDS:
                return
            if done.state is Reclaim.STUCK:
                driver.close(driver.requests[-1], insert=True)
        raise AssertionError("the budget was never reached")

    return act


def tidy(driver: MemoryDriver) -> None:
    finish_background(driver.memory)
    compact(driver.memory, 1 << 20)
    driver.memory.ladder.release_empty()


LIFE: tuple[Act, ...] = (
    begin([*PROMPT, 1, 2, 3]),
    lambda driver: driver.boundary(0.2, 4, finish=False),
    begin([*PROMPT, 4]),
    decode_all,
    lambda driver: driver.boundary(0.2, 2),
    close(0, insert=True),
    begin([9] * 30),
    decode_all,
    lambda driver: driver.memory.cache.evict(2),
    close(0, insert=False),
    tidy,
    cut(2),
    lambda driver: driver.boundary(6.0, 3, finish=False),
    begin([5] * 20),
    cut(5),
    decode_all,
    begin([*PROMPT, 1, 2, 3, 9, 9]),
    lambda driver: driver.boundary(3.0),
)


def live(ranks: RankDrivers) -> list[tuple[int, int]]:
    """Run the life, then end it without refusals; maps and unmaps that the life asked for."""
    for act in LIFE:
        ranks.run(act)
        ranks.check()
    calls = [(driver.backing.num_maps, driver.backing.num_unmaps) for driver in ranks.drivers]
    for driver in ranks.drivers:
        driver.backing.failing_maps.clear()
        driver.backing.failing_unmaps.clear()

    def end(driver: MemoryDriver) -> None:
        while driver.requests:
            driver.close(driver.requests[-1], insert=True)
        assert driver.memory.flush()
        finish_background(driver.memory)
        driver.boundary(100.0)
        driver.boundary(100.0)

    ranks.run(end)
    ranks.check()
    for driver in ranks.drivers:
        left = len(driver.backing.mapped) * driver.memory.manager.layouts[0].segment_bytes
        assert left == driver.memory.manager.leftover_bytes, "not everything was given back"
    ranks.close()
    return calls


@pytest.mark.parametrize(
    ("kind", "call"),
    crossed(
        ["sliding", "one", "two", "chunked"], [("map", 2), ("unmap", 1), ("map", 1), ("unmap", 2)]
    ),
    ids=lambda value: f"{value[0]}-{value[1]}" if isinstance(value, tuple) else value,
)
def test_whichever_call_is_refused_everything_adds_up(kind: str, call: tuple[str, int]) -> None:
    what, num_ranks = call
    refused = 0
    for n in itertools.count(1):
        reached = False
        for rank in range(num_ranks):
            ranks = pool(KINDS[kind], num_ranks)
            backing = ranks.drivers[rank].backing
            (backing.failing_maps if what == "map" else backing.failing_unmaps).add(n)
            other = ranks.drivers[1 - rank].backing if num_ranks == 2 else backing
            if n % 2 and other is not backing:
                other.gate.clear()  # refused here while the other one still works
            asked = live(ranks)[rank][what == "unmap"]
            reached = reached or asked >= n
            refused += asked >= n
        if not reached:
            break
    assert refused >= 3 * num_ranks
