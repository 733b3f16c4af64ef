"""Two groups with different segment sizes under one budget, and random programs against a model."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sglang.srt.mem_cache.kv_layout import GroupId, SegmentId
from sglang.srt.mem_cache.segment_state import SegmentState, Ticket
from srt.mem_cache.segment_pools import TWO_GROUPS, grow, make_pool, small_layouts

FULL, WINDOW = GroupId(0), GroupId(1)
FULL_BYTES = 16 * 96  # 3 layers
WINDOW_BYTES = 32 * 32  # 1 layer


def test_the_groups_differ_in_tokens_and_bytes() -> None:
    full, window = small_layouts(TWO_GROUPS)
    assert (full.segment_bytes, window.segment_bytes) == (FULL_BYTES, WINDOW_BYTES)
    assert (full.pages_per_segment, window.pages_per_segment) == (4, 8)


def test_a_plan_grows_both_groups_each_in_its_own_segments() -> None:
    manager, backing = make_pool(TWO_GROUPS, budget_bytes=1 << 20)
    outcome = grow(manager, 9, 9)
    assert outcome.mapped == ((1, 2, 3), (1, 2))
    assert backing.mapped == {(0, 1), (0, 2), (0, 3), (1, 1), (1, 2)}
    assert manager.mapped_bytes == 3 * FULL_BYTES + 2 * WINDOW_BYTES
    assert [stats.mapped_bytes for stats in manager.stats()] == [3 * FULL_BYTES, 2 * WINDOW_BYTES]
    manager.check()
    manager.close()


def test_one_budget_over_both() -> None:
    manager, _ = make_pool(TWO_GROUPS, budget_bytes=3 * FULL_BYTES)
    grow(manager, 4, 8)
    assert manager.growable_pages(FULL) == 4
    assert manager.growable_pages(WINDOW) == 8 * (2 * FULL_BYTES // WINDOW_BYTES - 1)
    assert manager.plan_growth((4, 8)) is None
    assert manager.plan_growth((4, 0)) is not None
    assert manager.plan_growth((0, 16)) is not None
    manager.close()


def test_capacity_counts_only_what_others_use() -> None:
    manager, _ = make_pool(TWO_GROUPS, budget_bytes=4 * FULL_BYTES)
    grow(manager, 8, 0)
    manager.add_pages(FULL, SegmentId(2), cached=1)
    manager.close()


def test_empty_segments_of_the_other_group_make_room_only_when_asked() -> None:
    manager, backing = make_pool(TWO_GROUPS, budget_bytes=3 * FULL_BYTES)
    grow(manager, 12, 0)
    manager.add_pages(FULL, SegmentId(3), used=1)
    assert manager.plan_growth((0, 8)) is None
    plan = manager.plan_growth((0, 16), take_empty=True)
    assert plan is not None
    assert (plan.map, plan.unmap) == (((), (1, 2)), ((2, 1), ()))
    manager.wait(manager.apply(plan))
    assert backing.mapped == {(0, 3), (1, 1), (1, 2)}
    assert manager.mapped_bytes == FULL_BYTES + 2 * WINDOW_BYTES
    assert manager.plan_growth((0, 8)) is not None  # 2 x 1,536 bytes hold three of 1,024
    assert manager.plan_growth((0, 9), take_empty=True) is None
    manager.check()
    manager.close()


def test_what_a_forward_still_reads_is_not_taken() -> None:
    manager, _ = make_pool(TWO_GROUPS, budget_bytes=FULL_BYTES)
    grow(manager, 4, 0)
    manager.note_launched(1)
    manager.add_pages(FULL, SegmentId(1), used=1)
    manager.add_pages(FULL, SegmentId(1), used=-1)
    assert manager.plan_growth((0, 1), take_empty=True) is None
    manager.note_completed(1)
    assert manager.plan_growth((0, 1), take_empty=True) is not None
    manager.close()


def test_reserve_and_idle_release_per_group() -> None:
    manager, backing = make_pool(TWO_GROUPS, budget_bytes=1 << 20, reserve_segments=1)
    assert backing.mapped == {(0, 1), (1, 1)}
    grow(manager, 8, 8)
    plan = manager.plan_shrink(1e3)
    assert plan is not None
    assert plan.unmap == ((3, 2), (2,))
    manager.wait(manager.apply(plan))
    assert backing.mapped == {(0, 1), (1, 1)}
    manager.close()


class ManagerMachine(RuleBasedStateMachine):
    """Random growth, use, idling, epochs, budgets and refusals; the fake backing is the model."""

    @initialize(reserve=st.integers(0, 2))
    def start(self, reserve: int) -> None:
        self.manager, self.backing = make_pool(
            TWO_GROUPS, budget_bytes=8 * FULL_BYTES, reserve_segments=reserve
        )
        self.tickets: list[Ticket] = []
        self.used: dict[tuple[GroupId, SegmentId], int] = {}
        self.now = 0.0
        self.epoch = 0

    @rule(full=st.integers(0, 12), window=st.integers(0, 20), take=st.booleans())
    def grow(self, full: int, window: int, take: bool) -> None:
        plan = self.manager.plan_growth((full, window), take_empty=take)
        if plan is not None:
            self.tickets.append(self.manager.apply(plan))

    @rule(idle=st.sampled_from([0.0, 0.05, 31.0]))
    def let_time_pass(self, idle: float) -> None:
        self.now += idle
        self.manager.note_time(self.now)
        plan = self.manager.plan_shrink(self.now)
        if plan is not None:
            self.tickets.append(self.manager.apply(plan))

    @rule()
    def refill(self) -> None:
        plan = self.manager.plan_reserve()
        if plan is not None:
            self.tickets.append(self.manager.apply(plan))

    @rule(data=st.data(), pages=st.integers(1, 4))
    def take_pages(self, data: st.DataObject, pages: int) -> None:
        mapped = [
            (group, segment.id)
            for group in (FULL, WINDOW)
            for segment in self.manager.segments(group).values()
            if segment.state is SegmentState.MAPPED and segment.pages_free >= pages
        ]
        if mapped:
            group, segment = data.draw(st.sampled_from(mapped))
            self.manager.add_pages(group, segment, used=pages)
            self.used[group, segment] = self.used.get((group, segment), 0) + pages

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def give_pages(self, data: st.DataObject) -> None:
        group, segment = data.draw(st.sampled_from(sorted(self.used)))
        self.manager.add_pages(group, segment, used=-self.used.pop((group, segment)))

    @rule(lag=st.integers(0, 2))
    def forward(self, lag: int) -> None:
        self.epoch += 1
        self.manager.note_launched(self.epoch)
        self.manager.note_completed(self.epoch - lag)

    @rule(budget=st.integers(0, 10))
    def set_budget(self, budget: int) -> None:
        self.manager.set_budget(budget * FULL_BYTES)

    @rule(maps=st.sets(st.integers(1, 3)), unmaps=st.sets(st.integers(1, 2)))
    def break_machine(self, maps: set[int], unmaps: set[int]) -> None:
        self.settle()
        self.backing.failing_maps = {self.backing.num_maps + n for n in maps}
        self.backing.failing_unmaps = {self.backing.num_unmaps + n for n in unmaps}

    @rule()
    def settle(self) -> None:
        """Take every outcome that can be had; afterwards states and machine agree."""
        for ticket in list(self.tickets):
            if self.manager.poll(ticket) is None and self.waits_for_a_forward(ticket):
                continue
            self.manager.wait(ticket)
            self.tickets.remove(ticket)
        attached = {
            (group, segment.id)
            for group in (FULL, WINDOW)
            for segment in self.manager.segments(group).values()
            if segment.state in (SegmentState.MAPPED, SegmentState.DRAINING)
        }
        assert attached == self.backing.mapped
        resident = self.backing.resident_bytes()
        assert resident == self.manager.mapped_bytes + self.manager.fixed_bytes

    def waits_for_a_forward(self, ticket: Ticket) -> bool:
        return self.manager._jobs[ticket.number].future is None

    @invariant()
    def adds_up(self) -> None:
        self.manager.check()
        for group, segment in self.used:
            assert self.manager.segments(group)[segment].pages_used == self.used[group, segment]

    def teardown(self) -> None:
        self.manager.note_completed(self.epoch)
        self.settle()
        assert self.manager.pending() == ()
        self.manager.close()


ManagerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestManagerMachine = ManagerMachine.TestCase
