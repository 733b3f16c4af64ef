"""A Hypothesis state machine: real memory beside a plain model, audited after every step."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from sglang.srt.mem_cache.kv_layout import GroupKind
from srt.mem_cache.memory_driver import (
    FULL,
    MemoryDriver,
    PoisonedBacking,
    Request,
    Window,
    finish_background,
    make_memory,
)

PAGE = 4


def _prompt(blocks: list[int], tail: int) -> list[int]:
    return [token for block in blocks for token in [0, 0, 0, block]] + [2] * tail


# whole pages of two kinds and a tail: most prompts share, part and share again
PROMPT = st.builds(_prompt, st.lists(st.integers(0, 1), max_size=8), st.integers(1, PAGE + 1))
NAMESPACE = st.sampled_from([None, None, None, None, "tenant"])


class MemoryMachine(RuleBasedStateMachine):
    """Random lives of up to five requests on up to six segments of four pages."""

    num_groups = 1
    options: dict[str, object] = {}  # noqa: RUF012 - overridden, never changed

    def draw_windows(self, data: st.DataObject) -> Sequence[Window]:
        """Kind and window of every group; a machine with window groups draws them."""
        del data
        return (FULL,) * self.num_groups

    @initialize(data=st.data(), budget=st.integers(1, 6), reserve=st.integers(0, 1))
    def start(self, data: st.DataObject, budget: int, reserve: int) -> None:
        memory, backing = make_memory(
            windows=self.draw_windows(data),
            page_size=PAGE,
            budget_segments=budget,
            max_segments=12,
            max_requests=5,
            backing=PoisonedBacking(),
            reserve_segments=reserve,
            **self.options,
        )
        self.reserve = reserve
        self.epoch = 0
        self.driver = MemoryDriver(memory, backing)

    def pick(self, data: st.DataObject) -> Request:
        index = data.draw(st.integers(0, len(self.driver.requests) - 1))
        return self.driver.requests[index]

    @rule(prompt=PROMPT, extra_key=NAMESPACE, priority=st.integers(-1, 1))
    def open(self, prompt: list[int], extra_key: str | None, priority: int) -> None:
        self.driver.open(prompt, extra_key, priority)

    @precondition(lambda self: self.driver.requests)
    @rule(data=st.data(), extra=st.integers(1, 6))
    def next_turn(self, data: st.DataObject, extra: int) -> None:
        """A request ends and the same conversation comes back with some more tokens."""
        before = self.pick(data)
        self.driver.close(before, insert=True)
        again = self.driver.open(before.tokens + [1] * extra, before.extra_key)
        assert again is not None

    @rule(prompt=PROMPT, insert=st.booleans())
    def whole_life(self, prompt: list[int], insert: bool) -> None:
        """Open, compute the whole prompt in two chunks, share, decode twice, close."""
        request = self.driver.open(prompt)
        if request is None:
            return
        for divisor in (2, 1):
            left = len(request.tokens) - request.num_computed
            self.driver.extend([(request, -(-left // divisor))])
            self.driver.cache_prefix(request, request.num_computed)
            self.driver.check()
        for token in (0, 1):
            self.driver.decode([(request, token)])
        self.driver.close(request, insert=insert)

    @precondition(lambda self: self.driver.requests)
    @rule(data=st.data(), whole=st.booleans())
    def extend(self, data: st.DataObject, whole: bool) -> None:
        wants = []
        for request in self.driver.requests:
            left = len(request.tokens) - request.num_computed
            if left and (whole or data.draw(st.booleans())):
                wants.append((request, left if whole else data.draw(st.integers(1, left))))
        self.driver.extend(wants)

    @precondition(lambda self: self.driver.requests)
    @rule(data=st.data(), token=st.integers(0, 2), times=st.integers(1, 6))
    def decode(self, data: st.DataObject, token: int, times: int) -> None:
        batch = [r for r in self.driver.requests if data.draw(st.booleans())]
        for _ in range(times):
            self.driver.decode([(request, token) for request in batch])

    @precondition(lambda self: self.driver.requests)
    @rule(data=st.data())
    def cache_prefix(self, data: st.DataObject) -> None:
        request = self.pick(data)
        self.driver.cache_prefix(request, request.num_computed)

    @precondition(lambda self: self.driver.requests)
    @rule(data=st.data(), insert=st.booleans())
    def close(self, data: st.DataObject, insert: bool) -> None:
        self.driver.close(self.pick(data), insert=insert)

    @rule(seconds=st.sampled_from([0.0, 0.1, 10.0, 400.0]), expected=st.integers(0, 10))
    def boundary(self, seconds: float, expected: int) -> None:
        self.driver.boundary(seconds, expected)

    @rule()
    def flush(self) -> None:
        idle = not self.driver.requests
        assert self.driver.memory.flush() is idle
        finish_background(self.driver.memory)  # what it gives back can be had again only then
        if idle:
            assert self.driver.memory.cache.num_pages == 0

    @rule()
    def launch_a_forward(self) -> None:
        """What becomes free may be read until it ends: not to be unmapped, nor written anew."""
        self.epoch += 1
        self.driver.launch(self.epoch)

    @rule()
    def complete_forwards(self) -> None:
        self.driver.complete(self.epoch)
        finish_background(self.driver.memory)

    @rule(ahead=st.integers(1, 3))
    def fail_a_map(self, ahead: int) -> None:
        """One of the next maps will be refused by the machine."""
        backing = self.driver.backing
        backing.failing_maps.add(backing.num_maps + ahead)

    @rule(ahead=st.integers(1, 2))
    def fail_an_unmap(self, ahead: int) -> None:
        backing = self.driver.backing
        backing.failing_unmaps.add(backing.num_unmaps + ahead)

    @invariant()
    def adds_up(self) -> None:
        self.driver.check()

    def teardown(self) -> None:
        if not hasattr(self, "driver"):
            return
        driver = self.driver
        while driver.requests:
            driver.close(driver.requests[-1], insert=True)
        driver.complete(self.epoch)
        driver.backing.failing_maps.clear()
        driver.backing.failing_unmaps.clear()
        for _ in range(2):  # prefixes grow old in the first, their segments idle in the second
            driver.boundary(1000.0)
        driver.check()
        if self.options.get("prefix_idle_s", 0) != -1:
            mapped = len(driver.backing.mapped)
            assert mapped == self.reserve * self.num_groups, "not back in the idle state"
        driver.memory.close_pool()


class TwoGroupMachine(MemoryMachine):
    num_groups = 2


# Around the borders of pages (4 tokens) and of segments (16), and some that are neither.
WIDTHS = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 30])


class WindowMachine(MemoryMachine):
    """One group that keeps all and one that recycles."""

    num_groups = 2

    def draw_windows(self, data: st.DataObject) -> Sequence[Window]:
        kind = data.draw(st.sampled_from([GroupKind.SLIDING, GroupKind.CHUNKED]))
        return (FULL, (kind, data.draw(WIDTHS)))


class OnlyWindowsMachine(MemoryMachine):
    """No group keeps all: the tree holds snapshots and nothing else."""

    num_groups = 2

    def draw_windows(self, data: st.DataObject) -> Sequence[Window]:
        return ((GroupKind.SLIDING, data.draw(WIDTHS)), (GroupKind.CHUNKED, data.draw(WIDTHS)))


class LfuMachine(MemoryMachine):
    options = {  # noqa: RUF012
        "eviction_policy": "lfu",
        "prefix_idle_s": -1,
        "max_cached_tokens": 32,
    }


class FifoMachine(MemoryMachine):
    options = {"eviction_policy": "fifo", "max_cached_tokens": 32}  # noqa: RUF012


class PriorityMachine(MemoryMachine):
    num_groups = 2
    options = {"eviction_policy": "priority", "max_cached_tokens": 32}  # noqa: RUF012


class ChunkCacheMachine(MemoryMachine):
    options = {"enable_prefix_cache": False}  # noqa: RUF012


def _settings(examples: int) -> settings:
    return settings(
        max_examples=examples,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


TestMemory = MemoryMachine.TestCase
TestMemory.settings = _settings(60)
TestTwoGroups = TwoGroupMachine.TestCase
TestTwoGroups.settings = _settings(30)
TestWindows = WindowMachine.TestCase
TestWindows.settings = _settings(60)
TestOnlyWindows = OnlyWindowsMachine.TestCase
TestOnlyWindows.settings = _settings(30)
TestLfu = LfuMachine.TestCase
TestLfu.settings = _settings(20)
TestFifo = FifoMachine.TestCase
TestFifo.settings = _settings(20)
TestPriority = PriorityMachine.TestCase
TestPriority.settings = _settings(20)
TestChunkCache = ChunkCacheMachine.TestCase
TestChunkCache.settings = _settings(10)
