"""The memory's state machine with a budget that moves and pages that are moved together."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from sglang.srt.mem_cache.compaction import compact
from sglang.srt.mem_cache.kv_layout import GroupKind
from sglang.srt.mem_cache.page_owner import PageState
from sglang.srt.mem_cache.reclaim import Reclaim, pages_over_budget, reclaim_step
from srt.mem_cache.memory_driver import MemoryDriver, finish_background
from srt.mem_cache.memory_machine import MemoryMachine, StateMachine, WindowMachine


class MovingMachine(MemoryMachine):
    """Random lives while the budget goes up and down; compaction whenever nothing is launched."""

    def was_refused(self, driver: MemoryDriver) -> bool:
        """Whether the newest call that could have helped was told to fail."""
        del driver
        return False

    def drain(self, driver: MemoryDriver) -> None:
        """Pages move only with the queue drained."""
        driver.complete(driver.memory.manager.launched_epoch)
        driver.writes.clear()  # also those of steps that no forward was launched for
        finish_background(driver.memory)

    @rule(
        pages=st.lists(st.integers(1, 3), min_size=3, max_size=5),
        fates=st.lists(st.sampled_from(["ends", "runs", "shares", "stays"]), min_size=5),
        then=st.sampled_from(["compact", "cut", "nothing"]),
    )
    def leave_holes(self, pages: list[int], fates: list[str], then: str) -> None:
        """Requests that share nothing begin side by side; those that end leave gaps."""

        def act(driver: MemoryDriver) -> None:
            began = []
            for number, count in enumerate(pages):
                request = driver.open([10 + number] * (4 * count))
                if request is None:
                    break
                began.append(request)
                if not driver.extend([(request, len(request.tokens) - request.num_computed)]):
                    break
            for request, fate in zip(began, fates, strict=False):
                if fate == "shares":
                    driver.cache_prefix(request, request.num_computed)
                elif fate != "runs":
                    driver.close(request, insert=fate == "stays")

        self.on_ranks(act)
        if then == "compact":
            self.compact(1 << 20)
        elif then == "cut":
            self.set_budget(1)

    @rule(max_bytes=st.sampled_from([1, 100, 1 << 20]))
    def compact(self, max_bytes: int) -> None:
        def act(driver: MemoryDriver) -> None:
            memory = driver.memory
            self.drain(driver)
            before = [(a.index.num_used, a.index.num_cached) for a in memory.allocators]
            free = [int(a.index.segment_counts(PageState.FREE).sum()) for a in memory.allocators]
            compact(memory, max_bytes)
            after = [(a.index.num_used, a.index.num_cached) for a in memory.allocators]
            assert before == after, "nothing appears and nothing is lost"
            assert free == [a.index.num_free for a in memory.allocators]

        self.on_ranks(act)

    @rule(segments=st.integers(1, 8))
    def set_budget(self, segments: int) -> None:
        """As the scheduler does: reclaim, and when all that is left is in use, one has to go."""

        def act(driver: MemoryDriver) -> None:
            memory = driver.memory
            unit = sum(layout.segment_bytes for layout in memory.manager.layouts)
            least = (1 + self.reserve) * unit
            self.drain(driver)
            memory.manager.set_budget(max(segments * unit, least))
            for _ in range(1000):
                done = reclaim_step(memory)
                finish_background(memory)
                driver.check()
                if done.state is Reclaim.HOLDS:
                    break
                if done.state is Reclaim.STUCK:
                    excused = self.was_refused(driver)
                    assert excused or pages_over_budget(memory) > 0, "compaction would have done"
                    driver.close(driver.requests[-1], insert=True)
            assert memory.manager.committed_bytes <= memory.manager.budget_bytes

        self.on_ranks(act)

    @precondition(lambda self: self.requests)
    @rule(token=st.integers(0, 2))
    def decode_everybody(self, token: int) -> None:
        self.on_ranks(lambda driver: driver.decode([(r, token) for r in driver.requests]))


class LatentMovingMachine(MovingMachine):
    """Values are within keys: one plane a layer."""

    options = {"latent": True}  # noqa: RUF012


class TwoGroupMovingMachine(MovingMachine):
    num_groups = 2


class SlidingMovingMachine(MovingMachine):
    """One group that keeps all and one that recycles: tables without heads, edges with holes."""

    num_groups = 2
    kinds = (GroupKind.SLIDING,)
    draw_windows = WindowMachine.draw_windows


class ChunkedMovingMachine(SlidingMovingMachine):
    kinds = (GroupKind.CHUNKED,)


class StateMovingMachine(MovingMachine):
    """One group that keeps all tokens and one whose pages are states."""

    num_groups = 2
    draw_windows = StateMachine.draw_windows


class SlowMovingMachine(MovingMachine):
    """Segments are on their way while other things happen."""

    delays = True


class SlowSlidingMovingMachine(SlidingMovingMachine):
    delays = True


class RanksMovingMachine(MovingMachine):
    """Two ranks: each machine has its own pace and its own failures, the pages are the same."""

    num_ranks = 2
    delays = True


class TwoGroupRanksMovingMachine(RanksMovingMachine):
    num_groups = 2


class SlidingRanksMovingMachine(SlidingMovingMachine):
    num_ranks = 2
    delays = True


class ChunkedRanksMovingMachine(ChunkedMovingMachine):
    num_ranks = 2
    delays = True
