"""The memory's state machine with a budget that moves and pages that are moved together."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from sglang.srt.mem_cache.compaction import compact
from sglang.srt.mem_cache.page_owner import PageState
from sglang.srt.mem_cache.reclaim import Reclaim, held_bytes, pages_over_budget, reclaim_step
from srt.mem_cache.memory_driver import finish_background
from srt.mem_cache.test_memory_machine import MemoryMachine, WindowMachine


class MovingMachine(MemoryMachine):
    """Random lives while the budget goes up and down; compaction whenever nothing is launched."""

    @property
    def unit(self) -> int:
        return sum(layout.segment_bytes for layout in self.driver.memory.manager.layouts)

    def drain(self) -> None:
        """Pages move only with the queue drained."""
        self.driver.complete(self.epoch)
        finish_background(self.driver.memory)

    @rule(
        pages=st.lists(st.integers(1, 3), min_size=3, max_size=5),
        fates=st.lists(st.sampled_from(["ends", "runs", "shares", "stays"]), min_size=5),
        then=st.sampled_from(["compact", "cut", "nothing"]),
    )
    def leave_holes(self, pages: list[int], fates: list[str], then: str) -> None:
        """Requests that share nothing begin side by side; those that end leave gaps."""
        began = []
        for number, count in enumerate(pages):
            request = self.driver.open([10 + number] * (4 * count))
            if request is None:
                break
            began.append(request)
            if not self.driver.extend([(request, len(request.tokens) - request.num_computed)]):
                break
        for request, fate in zip(began, fates, strict=False):
            if fate == "shares":
                self.driver.cache_prefix(request, request.num_computed)
            elif fate != "runs":
                self.driver.close(request, insert=fate == "stays")
        if then == "compact":
            self.compact(1 << 20)
        elif then == "cut":
            self.set_budget(1)

    @rule(max_bytes=st.sampled_from([1, 100, 1 << 20]))
    def compact(self, max_bytes: int) -> None:
        memory = self.driver.memory
        self.drain()
        before = [(a.index.num_used, a.index.num_cached) for a in memory.allocators]
        free = [int(a.index.segment_counts(PageState.FREE).sum()) for a in memory.allocators]
        compact(memory, max_bytes)
        after = [(a.index.num_used, a.index.num_cached) for a in memory.allocators]
        assert before == after, "nothing appears and nothing is lost"
        assert free == [a.index.num_free for a in memory.allocators]

    @rule(segments=st.integers(1, 8))
    def set_budget(self, segments: int) -> None:
        """As the scheduler does: reclaim, and when all that is left is in use, one has to go."""
        memory = self.driver.memory
        least = (1 + self.reserve) * self.unit
        self.drain()
        memory.manager.set_budget(max(segments * self.unit, least))
        for _ in range(1000):
            done = reclaim_step(memory)
            finish_background(memory)
            self.driver.check()
            if done.state is Reclaim.HOLDS:
                break
            if done.state is Reclaim.STUCK:
                assert pages_over_budget(memory) > 0, "compaction would have done"
                self.driver.close(self.driver.requests[-1], insert=True)
        assert held_bytes(memory.manager) <= memory.manager.budget_bytes

    @precondition(lambda self: self.driver.requests)
    @rule(token=st.integers(0, 2))
    def decode_everybody(self, token: int) -> None:
        self.driver.decode([(request, token) for request in self.driver.requests])


class TwoGroupMovingMachine(MovingMachine):
    num_groups = 2


class WindowMovingMachine(MovingMachine):
    """One group that keeps all and one that recycles: tables without heads, edges with holes."""

    num_groups = 2
    draw_windows = WindowMachine.draw_windows


def machine_settings(examples: int, *, shrink: bool = True) -> settings:
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
