"""A Hypothesis state machine: real memory beside a plain model, audited after every step.

`MemoryMachine` has all that happens to memory between two steps of a scheduler, on one rank or on
several; what the groups keep, how fast machines are and which policy evicts is the subclasses'.
`moving_machine.py` adds budgets and compaction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from sglang.srt.mem_cache.kv_layout import GroupKind
from sglang.srt.mem_cache.rank_agreement import RankAgreement
from srt.mem_cache.fake_backing import FakeBacking
from srt.mem_cache.memory_driver import (
    FULL,
    STATES,
    MemoryDriver,
    Request,
    Window,
    finish_background,
    make_memory,
)
from srt.mem_cache.rank_world import RankDrivers, SlowBacking, open_gate_before_waiting

PAGE = 4

T = TypeVar("T")


def _prompt(blocks: list[int], tail: int) -> list[int]:
    return [token for block in blocks for token in [0, 0, 0, block]] + [2] * tail


# whole pages of two kinds and a tail: most prompts share, part and share again
PROMPT = st.builds(_prompt, st.lists(st.integers(0, 1), max_size=8), st.integers(1, PAGE + 1))
NAMESPACE = st.sampled_from([None, None, None, None, "tenant"])


def _allocatable_bytes(driver: MemoryDriver) -> int:
    """Bytes of all segments whose pages can be given out or have been."""
    return sum(
        sum(allocator.index.totals) // layout.pages_per_segment * layout.segment_bytes
        for allocator, layout in zip(
            driver.memory.allocators, driver.memory.manager.layouts, strict=True
        )
    )


class MemoryMachine(RuleBasedStateMachine):
    """Random lives of up to five requests on up to six segments of four pages."""

    num_groups = 1
    num_ranks = 1
    delays = False  # whether background work may be under way while other things happen
    options: dict[str, object] = {}  # noqa: RUF012 - overridden, never changed
    # prefixes grow old in the first, their segments idle in the second
    idle_boundaries = 2

    def draw_windows(self, data: st.DataObject) -> Sequence[Window]:
        """Kind and window of every group; a machine with window groups draws them."""
        del data
        return (FULL,) * self.num_groups

    def make_backing(self) -> FakeBacking:
        """What stands under one rank's memory."""
        return SlowBacking()

    @initialize(data=st.data(), budget=st.integers(1, 6), reserve=st.integers(0, 1))
    def start(self, data: st.DataObject, budget: int, reserve: int) -> None:
        windows = self.draw_windows(data)

        def make(agreement: RankAgreement | None) -> MemoryDriver:
            memory, backing = make_memory(
                windows=windows,
                page_size=PAGE,
                budget_segments=budget,
                max_segments=12,
                max_requests=5,
                backing=self.make_backing(),
                reserve_segments=reserve,
                ranks=agreement,
                **self.options,
            )
            open_gate_before_waiting(memory.manager, backing)
            return MemoryDriver(memory, backing, in_background=self.delays)

        self.reserve = reserve
        self.ranks = RankDrivers(self.num_ranks, make)

    def on_ranks(self, act: Callable[[MemoryDriver], T]) -> T:
        """Do the same on every rank; returns what all return."""
        return self.ranks.run(act)

    @property
    def epoch(self) -> int:
        """The newest forward that was launched, on every rank."""
        return self.ranks.first.memory.manager.launched_epoch

    @property
    def requests(self) -> list[Request]:
        """What rank 0 runs; rules name a request by its place in this list."""
        return self.ranks.first.requests

    def pick(self, data: st.DataObject) -> int:
        return data.draw(st.integers(0, len(self.requests) - 1))

    # ---- the life of requests -----------------------------------------------------------------

    @rule(prompt=PROMPT, extra_key=NAMESPACE, priority=st.integers(-1, 1))
    def open(self, prompt: list[int], extra_key: str | None, priority: int) -> None:
        def act(driver: MemoryDriver) -> int | None:
            request = driver.open(prompt, extra_key, priority, copies=True)
            return None if request is None else request.num_computed

        self.on_ranks(act)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), extra=st.integers(1, 6))
    def next_turn(self, data: st.DataObject, extra: int) -> None:
        """A request ends and the same conversation comes back with some more tokens."""
        which = self.pick(data)

        def act(driver: MemoryDriver) -> None:
            before = driver.requests[which]
            driver.close(before, insert=True)
            again = driver.open(before.tokens + [1] * extra, before.extra_key)
            assert again is not None

        self.on_ranks(act)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), extra=st.integers(1, 6))
    def fork(self, data: st.DataObject, extra: int) -> None:
        """A second request goes its own way from somewhere inside what a first one computed."""
        which = self.pick(data)
        at = data.draw(st.integers(0, self.requests[which].num_computed))

        def act(driver: MemoryDriver) -> bool:
            first = driver.requests[which]
            driver.cache_prefix(first, first.num_computed)
            return driver.open(first.tokens[:at] + [3] * extra, first.extra_key) is not None

        self.on_ranks(act)

    @rule(prompt=PROMPT, insert=st.booleans())
    def whole_life(self, prompt: list[int], insert: bool) -> None:
        """Open, compute the whole prompt in two chunks, share, decode twice, close."""

        def act(driver: MemoryDriver) -> None:
            request = driver.open(prompt)
            if request is None:
                return
            for divisor in (2, 1):
                left = len(request.tokens) - request.num_computed
                driver.extend([(request, -(-left // divisor))])
                driver.cache_prefix(request, request.num_computed)
                driver.check()
            for token in (0, 1):
                driver.decode([(request, token)])
            driver.close(request, insert=insert)

        self.on_ranks(act)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), whole=st.booleans())
    def extend(self, data: st.DataObject, whole: bool) -> None:
        wants = []
        for which, request in enumerate(self.requests):
            left = len(request.tokens) - request.num_computed
            if left and (whole or data.draw(st.booleans())):
                wants.append((which, left if whole else data.draw(st.integers(1, left))))
        self.on_ranks(lambda driver: driver.extend([(driver.requests[w], n) for w, n in wants]))

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), token=st.integers(0, 2), times=st.integers(1, 6))
    def decode(self, data: st.DataObject, token: int, times: int) -> None:
        batch = [which for which in range(len(self.requests)) if data.draw(st.booleans())]

        def act(driver: MemoryDriver) -> list[bool]:
            wants = [(driver.requests[which], token) for which in batch]
            return [driver.decode(wants) for _ in range(times)]

        self.on_ranks(act)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        which = self.pick(data)

        def act(driver: MemoryDriver) -> None:
            driver.cache_prefix(driver.requests[which], driver.requests[which].num_computed)

        self.on_ranks(act)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        """A request has ended: what it computed stays in the cache."""
        which = self.pick(data)
        self.on_ranks(lambda driver: driver.close(driver.requests[which], insert=True))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        """A request ends wherever it stands and leaves nothing but what it shared."""
        which = self.pick(data)
        self.on_ranks(lambda driver: driver.close(driver.requests[which], insert=False))

    # ---- what happens to memory ---------------------------------------------------------------

    @rule(
        seconds=st.sampled_from([0.0, 0.1, 10.0, 400.0]),
        expected=st.integers(0, 10),
        finish=st.booleans(),
    )
    def boundary(self, seconds: float, expected: int, finish: bool) -> None:
        finish = finish or not self.delays
        self.on_ranks(lambda driver: driver.boundary(seconds, expected, finish=finish))

    @rule(expected=st.integers(4, 24))
    def grow(self, expected: int) -> None:
        """Map ahead for a large step; nothing that is there may go for it."""

        def act(driver: MemoryDriver) -> tuple[int, ...]:
            cached = driver.memory.cache.num_pages
            manager = driver.memory.manager
            before = _allocatable_bytes(driver)  # what is draining may go any time
            driver.memory.ladder.look_ahead((expected,) * driver.memory.spec.num_groups)
            if not self.delays:
                finish_background(driver.memory)
                after = _allocatable_bytes(driver)
                assert before <= after <= max(before, manager.budget_bytes + manager.lower_bytes)
            assert driver.memory.cache.num_pages == cached
            return driver.memory.ladder.free_pages()

        self.on_ranks(act)

    @rule()
    def shrink(self) -> None:
        """Give back what is empty, whatever its age."""

        def act(driver: MemoryDriver) -> None:
            driver.memory.ladder.release_empty()
            if not self.delays:
                finish_background(driver.memory)

        self.on_ranks(act)

    @rule(pages=st.integers(1, 8), windows=st.booleans())
    def evict(self, pages: int, windows: bool) -> None:
        """Drop cold prefixes, or in groups that recycle cold snapshots."""

        def act(driver: MemoryDriver) -> int:
            cache = driver.memory.cache
            if windows:
                wanted = [0 if rule is None else pages for rule in driver.rules]
                return sum(cache.evict_windows(wanted))
            there = cache.num_evictable_pages
            freed = cache.evict(pages)
            assert any(driver.rules) or freed == min(pages, there)
            return freed

        self.on_ranks(act)

    @rule()
    def clear(self) -> None:
        idle = not self.requests

        def act(driver: MemoryDriver) -> None:
            assert driver.memory.flush() is idle
            finish_background(driver.memory)  # what it gives back can be had again only then
            if idle:
                assert driver.memory.cache.num_pages == 0

        self.on_ranks(act)

    @rule()
    def launch_a_forward(self) -> None:
        """What becomes free may be read until it ends: not to be unmapped, nor written anew."""
        epoch = self.epoch + 1
        self.on_ranks(lambda driver: driver.launch(epoch))

    @precondition(lambda self: self.requests)
    @rule(token=st.integers(0, 2), times=st.integers(2, 12), chunk=st.integers(1, 9))
    def overlapped_steps(self, token: int, times: int, chunk: int) -> None:
        """Prompts and decodes go on, each step placed while the forward before it still reads."""

        begun = self.epoch

        def act(driver: MemoryDriver) -> list[bool]:
            placed = []
            for epoch in range(begun + 1, begun + 1 + times):
                left = [(r, len(r.tokens) - r.num_computed) for r in driver.requests]
                decodes = [(r, token) for r, count in left if count == 0]
                extends = [(r, min(chunk, count)) for r, count in left if count]
                placed += [driver.decode(decodes), driver.extend(extends)]
                driver.check()  # what the forward before reads is still there
                driver.complete(epoch - 1)
                driver.launch(epoch)
            return placed

        self.on_ranks(act)

    @rule(finish=st.booleans())
    def complete_forwards(self, finish: bool) -> None:
        epoch = self.epoch

        def act(driver: MemoryDriver) -> None:
            driver.complete(epoch)
            if finish or not self.delays:
                finish_background(driver.memory)

        self.on_ranks(act)

    # ---- what machines do ---------------------------------------------------------------------

    def backing_of(self, rank: int) -> FakeBacking:
        return self.ranks.drivers[rank % self.num_ranks].backing

    @rule(ahead=st.integers(1, 3), rank=st.integers(0, 1))
    def fail_a_map(self, ahead: int, rank: int) -> None:
        """One of the next maps will be refused by a rank's machine."""
        backing = self.backing_of(rank)
        backing.failing_maps.add(backing.num_maps + ahead)

    @rule(ahead=st.integers(1, 2), rank=st.integers(0, 1))
    def fail_an_unmap(self, ahead: int, rank: int) -> None:
        backing = self.backing_of(rank)
        backing.failing_unmaps.add(backing.num_unmaps + ahead)

    @precondition(lambda self: self.delays)
    @rule(rank=st.integers(0, 1), slow=st.booleans())
    def change_pace(self, rank: int, slow: bool) -> None:
        """A rank's background work stands still from now on, or goes on."""
        self.on_ranks(lambda driver: None)  # what was begun at the old pace has ended
        gate = self.backing_of(rank).gate
        gate.clear() if slow else gate.set()

    # ---- after every step, and at the end -----------------------------------------------------

    @invariant()
    def adds_up(self) -> None:
        self.ranks.check()

    def teardown(self) -> None:
        if not hasattr(self, "ranks"):
            return
        try:
            if not self.ranks.broken:
                self.on_ranks(self._end)
        finally:
            self.ranks.close()

    def _end(self, driver: MemoryDriver) -> None:
        """All end, time passes, and memory is back in the idle state."""
        while driver.requests:
            driver.close(driver.requests[-1], insert=True)
        driver.backing.failing_maps.clear()
        driver.backing.failing_unmaps.clear()
        driver.complete(driver.memory.manager.launched_epoch)
        for _ in range(self.idle_boundaries):
            driver.boundary(1000.0)
        driver.check()
        if self.options.get("prefix_idle_s", 0) != -1:
            mapped = len(driver.backing.mapped) * driver.memory.manager.layouts[0].segment_bytes
            idle = driver.memory.manager.leftover_bytes + self.reserve * sum(
                layout.segment_bytes for layout in driver.memory.manager.layouts
            )
            assert mapped == idle, "not back in the idle state"


class TwoGroupMachine(MemoryMachine):
    num_groups = 2


# Around the borders of pages (4 tokens) and of segments (16), and some that are neither.
WIDTHS = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 30])


class WindowMachine(MemoryMachine):
    """One group that keeps all and one that recycles."""

    num_groups = 2
    kinds: Sequence[GroupKind] = (GroupKind.SLIDING, GroupKind.CHUNKED)

    def draw_windows(self, data: st.DataObject) -> Sequence[Window]:
        return (FULL, (data.draw(st.sampled_from(self.kinds)), data.draw(WIDTHS)))


class StateMachine(MemoryMachine):
    """One group that keeps all tokens and one whose pages are states."""

    num_groups = 2

    def draw_windows(self, data: st.DataObject) -> Sequence[Window]:
        del data
        return (FULL, STATES)


class OnlyWindowsMachine(MemoryMachine):
    """No group keeps all: the tree holds snapshots and nothing else."""

    num_groups = 2

    def draw_windows(self, data: st.DataObject) -> Sequence[Window]:
        return ((GroupKind.SLIDING, data.draw(WIDTHS)), (GroupKind.CHUNKED, data.draw(WIDTHS)))


def machine_settings(examples: int, *, shrink: bool = True) -> settings:
    """`shrink` False: the same examples every time and no search for the smallest failing one."""
    phases = [Phase.explicit, Phase.reuse, Phase.generate, Phase.target, Phase.shrink]
    return settings(
        max_examples=examples,
        stateful_step_count=30,
        deadline=None,
        phases=phases if shrink else [Phase.generate],
        database=None if not shrink else settings.default.database,
        derandomize=not shrink,
        report_multiple_bugs=shrink,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
