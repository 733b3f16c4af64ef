"""Two ranks with machines of different speed and temper hold the same pages at every step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from sglang.srt.errors import BackingError
from sglang.srt.mem_cache.kv_layout import GroupId, KVCacheSpec, SegmentId
from sglang.srt.mem_cache.rank_agreement import (
    RankAgreement,
    SingleRank,
    Vote,
    VoteStatus,
    agree_on,
)
from sglang.srt.mem_cache.segment_manager import SegmentManager
from sglang.srt.mem_cache.segment_state import SegmentState, Tier
from srt.crossed import mostly_slow
from srt.mem_cache.disk_backing import DiskBacking
from srt.mem_cache.fake_backing import FakeBacking
from srt.mem_cache.memory_driver import MemoryDriver, make_memory
from srt.mem_cache.rank_world import (
    Rank,
    RankDrivers,
    SlowBacking,
    World,
    open_gate_before_waiting,
    state_of,
)
from srt.mem_cache.segment_pools import ONE_GROUP, TWO_GROUPS, small_layouts, snapshot

G = GroupId(0)
NO = (False, False)
GROUPS = pytest.mark.parametrize("num_groups", [1, 2])


class MoodyBacking(SlowBacking):
    """Its background work ends when the rank's own luck lets it, and fails as luck has it."""

    def __init__(self, luck: random.Random, *, fail_maps: float, fail_unmaps: float) -> None:
        super().__init__()
        self.luck = luck
        self.odds = {"map": fail_maps, "unmap": fail_unmaps}
        self.refusals = 0

    def map(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        self._maybe_refuse("map")
        super().map(group, segments)

    def unmap(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        self._maybe_refuse("unmap")
        super().unmap(group, segments)

    def _maybe_refuse(self, kind: str) -> None:
        self._open_for_the_owner()
        self.gate.wait()
        if self.luck.random() < self.odds[kind]:
            self.refusals += 1
            raise BackingError(f"a {kind} met bad luck")


@dataclass
class Trace:
    steps: list[object] = field(default_factory=list)
    refusals: int = 0
    leftovers: int = 0


def run_program(world: World, number: int, seed: int, num_groups: int) -> Trace:
    """One rank's run: what happens is drawn from `seed`, how its machine behaves from the rank."""
    try:
        return _run(world, number, seed, num_groups)
    except BaseException:
        world.leave()
        raise


def _run(world: World, number: int, seed: int, num_groups: int) -> Trace:
    dice = random.Random(seed)
    luck = random.Random(f"{seed} {number}")
    odds = (0.0, 0.1, 0.3)[seed % 3]
    backing = MoodyBacking(random.Random(f"{number} {seed}"), fail_maps=odds, fail_unmaps=odds)
    reserve = 0 if odds else dice.randrange(2)
    memory, _ = make_memory(
        num_groups=num_groups,
        budget_segments=5,
        backing=backing,
        reserve_segments=reserve,
        idle_release_s=1.0,
        prefix_idle_s=5.0,
        ranks=world.rank(number),
    )
    open_gate_before_waiting(memory.manager, backing)
    driver = MemoryDriver(memory, backing, in_background=True)
    trace = Trace()
    epoch = 0
    for _ in range(150):
        backing.gate.clear() if luck.random() < 0.6 else backing.gate.set()
        kind = dice.choice(("open", "extend", "extend", "decode", "close", "boundary", "boundary"))
        result: object = None
        if kind == "open":
            tokens = [dice.randrange(2) for _ in range(dice.randrange(2, 40))]
            result = driver.open(tokens) is not None
        elif kind == "boundary":
            driver.now += dice.choice((0.0, 0.2, 2.0, 10.0))
            memory.note_completed(epoch - dice.randrange(2))
            memory.on_step_boundary(driver.now, (dice.randrange(12),) * num_groups)
        elif driver.requests:
            request = driver.requests[dice.randrange(len(driver.requests))]
            left = len(request.tokens) - request.num_computed
            epoch += 1
            memory.note_launched(epoch)
            if kind == "close":
                driver.close(request, insert=dice.random() < 0.7)
            elif kind == "extend" and left:
                result = driver.extend([(request, dice.randint(1, left))])
                driver.cache_prefix(request, request.num_computed)
            elif kind == "decode":
                result = driver.decode([(request, dice.randrange(2))])
        driver.check()
        trace.leftovers += memory.manager.leftover_bytes > 0
        trace.steps.append((kind, result, state_of(memory)))
    backing.gate.set()
    trace.refusals = backing.refusals
    memory.close_pool()
    return trace


@pytest.mark.parametrize("seeds", mostly_slow([range(6)], [range(6, 40)]), ids=str)
@GROUPS
def test_ranks_hold_the_same_pages_whatever_their_machines_do(
    num_groups: int, seeds: range
) -> None:
    refusals = leftovers = rounds = parted = 0
    for seed in seeds:
        world = World(2)
        with ThreadPoolExecutor(2) as threads:
            runs = [threads.submit(run_program, world, n, seed, num_groups) for n in range(2)]
        first, second = (run.result() for run in runs)
        for step, (a, b) in enumerate(zip(first.steps, second.steps, strict=True)):
            assert a == b, f"seed {seed}, step {step}"
        refusals += first.refusals + second.refusals
        leftovers += first.leftovers + second.leftovers
        rounds += world.rounds
        parted += world.pending_rounds
    # the programs met what they are meant to meet
    assert refusals > 20
    assert leftovers > 0
    assert 0 < parted < rounds


def two_managers(
    spec: KVCacheSpec,
) -> tuple[World, list[SegmentManager], list[FakeBacking], ThreadPoolExecutor]:
    world, threads = World(2), ThreadPoolExecutor(2)
    backings = [FakeBacking(), FakeBacking()]
    layouts = small_layouts(spec)
    for backing in backings:
        backing.reserve(spec, layouts)
    managers = [
        SegmentManager(
            layouts,
            backing,
            budget_bytes=1 << 20,
            reserve_segments=0,
            idle_release_s=30.0,
            ranks=world.rank(number),
        )
        for number, backing in enumerate(backings)
    ]
    return world, managers, backings, threads


@pytest.mark.parametrize("spec", [ONE_GROUP, TWO_GROUPS], ids=["one group", "two groups"])
def test_a_refusal_on_one_rank_is_rolled_back_on_the_other(spec: KVCacheSpec) -> None:
    for failing in range(1, spec.num_groups + 1):
        world, managers, backings, threads = two_managers(spec)
        backings[1].failing_maps = {failing}
        backings[0].gate.clear()
        wanted = (5,) * spec.num_groups
        before = snapshot(managers[0])
        tickets = []
        for manager in managers:
            plan = manager.plan_growth(wanted)
            assert plan is not None
            tickets.append(manager.apply(plan))
        assert world.rounds == 0
        # one rank is through (refused), the other still maps: nobody acts
        jobs = [manager._jobs[0].future for manager in managers]
        assert jobs[1] is not None
        jobs[1].result()
        polls = list(threads.map(SegmentManager.poll, managers, tickets))
        assert polls == [None, None]
        assert world.rounds == 1
        backings[0].gate.set()
        outcomes = list(threads.map(SegmentManager.wait, managers, tickets))
        assert [outcome.succeeded for outcome in outcomes] == [False, False]
        assert outcomes[0].refused == "another rank was refused"
        assert [outcome.mapped for outcome in outcomes] == [((),) * spec.num_groups] * 2
        for manager, backing in zip(managers, backings, strict=True):
            assert snapshot(manager) == before
            assert manager.growth_paused
            assert not backing.mapped
            manager.check()
        for manager in managers:
            manager.close()
        threads.shutdown()


@pytest.mark.parametrize("refusing", [0, 1])
def test_memory_that_only_one_rank_could_give_back_is_mapped_again_for_nothing(
    refusing: int,
) -> None:
    world, managers, backings, threads = two_managers(TWO_GROUPS)

    def grow_all(*pages: int) -> None:
        tickets = []
        for manager in managers:
            plan = manager.plan_growth(pages)
            assert plan is not None
            tickets.append(manager.apply(plan))
        outcomes = list(threads.map(SegmentManager.wait, managers, tickets))
        assert all(outcome.succeeded for outcome in outcomes)

    grow_all(8, 4)
    backings[refusing].failing_unmaps = {1}
    tickets = []
    for manager in managers:
        manager.note_time(100.0)
        plan = manager.plan_shrink(100.0)
        assert plan is not None
        tickets.append(manager.apply(plan))
    outcomes = list(threads.map(SegmentManager.wait, managers, tickets))
    assert {outcome.unmapped for outcome in outcomes} == {((2, 1), (1,))}
    assert not any(outcome.succeeded for outcome in outcomes)
    assert snapshot(managers[0]) == snapshot(managers[1])
    kept = managers[refusing]
    assert kept.leftover_bytes == backings[refusing].resident_bytes() - kept.fixed_bytes  # type: ignore[operator]
    assert managers[1 - refusing].leftover_bytes == 0
    for manager in managers:
        assert manager.mapped_bytes == 0
        manager.note_time(200.0)
    maps = backings[refusing].num_maps
    grow_all(4, 4)
    assert backings[refusing].num_maps == maps, "the memory was there already"
    assert kept.leftover_bytes == 16 * 3 * 32
    for manager in managers:
        assert manager.segments(GroupId(0))[SegmentId(1)].state is SegmentState.MAPPED
        manager.close()
    threads.shutdown()
    assert world.rounds == 3


def test_nothing_under_way_sends_nothing() -> None:
    memory, backing = make_memory(ranks=World(2).rank(0))
    for now in (1.0, 2.0):
        memory.on_step_boundary(now)  # would block for ever: no second rank is there
    assert agree_on(Rank(World(2), 0), [], 1) == []
    memory.close_pool()
    assert backing.closed


def test_votes_add_up() -> None:
    class Recorded(SingleRank):
        def agree(self, votes: Sequence[int]) -> list[int]:
            other = (1, -1, 0, 1, 0, 2, 0, -1, 1, 1)
            return [min(pair) for pair in zip(votes, other, strict=True)]

    mine = [Vote(VoteStatus.DONE, (False, True), (True, True)), Vote(VoteStatus.PENDING, NO, NO)]
    assert agree_on(Recorded(), mine, 2) == [
        Vote(VoteStatus.REFUSED, (True, True), (True, False)),
        Vote(VoteStatus.PENDING, (False, True), NO),
    ]
    assert agree_on(SingleRank(), mine, 2) == mine


def test_ranks_agree_on_what_moved_and_undo_what_one_could_not() -> None:
    """A disk that is full on one rank: the other takes back what it moved, or keeps it in mind."""
    backings: list[DiskBacking] = []

    def make(agreement: RankAgreement | None) -> MemoryDriver:
        backing = DiskBacking()
        memory, _ = make_memory(
            budget_segments=4, disk_segments=4, max_segments=12, backing=backing, ranks=agreement
        )
        backings.append(backing)
        return MemoryDriver(memory, backing)

    ranks = RankDrivers(2, make)
    runner = [driver.memory.manager._runner for driver in ranks.drivers]
    first, second = (driver.backing for driver in ranks.drivers)
    assert isinstance(first, DiskBacking)
    assert isinstance(second, DiskBacking)

    def fill(driver: MemoryDriver) -> None:
        request = driver.open([7] * 48)
        assert request is not None
        assert driver.extend([(request, 48)])
        driver.launch(1)
        driver.complete(1)

    def demote(driver: MemoryDriver) -> int:
        memory = driver.memory
        return memory.demote(memory.manager.layouts[0].segment_bytes)

    def promote(driver: MemoryDriver) -> int:
        manager = driver.memory.manager
        below = [(G, s) for s, one in manager.segments(G).items() if one.tier is Tier.LOWER]
        return driver.memory.ladder.promote(1 << 30, below)

    def tiers(driver: MemoryDriver) -> str:
        records = driver.memory.manager.segments(G)
        return "".join(records[SegmentId(s)].tier.value[0] for s in (1, 2, 3))

    ranks.run(fill)
    second.failing_disk.add(second.num_disk + 1)
    assert ranks.run(demote) == 0
    ranks.check()
    assert ranks.run(tiers) == "ddd"
    assert not first.on_disk, "rank 0 had moved it and moved it back"
    assert first.num_promoted == 1

    def later(driver: MemoryDriver) -> None:
        driver.boundary(driver.now + 100.0)  # the pause after a refusal is over

    ranks.run(later)
    second.failing_disk.add(second.num_disk + 1)
    first.failing_maps.add(first.num_maps + 1)
    assert ranks.run(demote) == 0
    ranks.check()
    assert ranks.run(tiers) == "ddd"
    assert first.on_disk == {(0, 1)}, "it can't be had back"
    assert runner[0]._elsewhere == {(0, 1): Tier.LOWER}
    size = ranks.first.memory.manager.layouts[0].segment_bytes
    assert [one.leftover_bytes for one in runner] == [-size, 0]

    ranks.run(later)
    assert ranks.run(demote) == 1  # on rank 0 it is there already
    ranks.check()
    assert ranks.run(tiers) == "ldd"
    assert (first.on_disk, second.on_disk) == ({(0, 1)}, {(0, 1)})
    assert not runner[0]._elsewhere

    second.failing_maps.add(second.num_maps + 1)
    first.failing_disk.add(first.num_disk + 1)
    assert ranks.run(promote) == 0
    assert runner[0]._elsewhere == {(0, 1): Tier.DEVICE}, "and the other way round"
    ranks.run(later)

    def end(driver: MemoryDriver) -> None:
        driver.close(driver.requests[0], insert=False)
        driver.boundary(driver.now + 100.0)
        driver.boundary(driver.now + 100.0)

    ranks.run(end)
    ranks.check()
    for backing in backings:
        assert not backing.mapped
        assert not backing.on_disk
    ranks.close()
