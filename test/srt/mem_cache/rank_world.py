"""Simulated tensor-parallel ranks in one process: threads that agree by a minimum; for tests only.

Each rank has a memory of its own over a machine of its own pace and temper. `RankDrivers` lets all
ranks do the same thing and compares what came of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeVar

from sglang.srt.mem_cache.allocation import KVMemory
from sglang.srt.mem_cache.kv_layout import GroupId, SegmentId
from sglang.srt.mem_cache.rank_agreement import RankAgreement
from sglang.srt.mem_cache.segment_manager import SegmentManager
from srt.mem_cache.fake_backing import FakeBacking
from srt.mem_cache.memory_driver import MemoryDriver, PoisonedBacking
from srt.mem_cache.segment_pools import snapshot

WAIT_S = 20.0

T = TypeVar("T")


class World:
    """The minimum over threads that stand for ranks; a rank that dies ends all others."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.rounds = 0
        self.pending_rounds = 0
        self._votes: list[list[int]] = [[] for _ in range(size)]
        self._barrier = threading.Barrier(size, timeout=WAIT_S)

    def rank(self, number: int) -> Rank:
        return Rank(self, number)

    def meet(self, number: int, votes: Sequence[int]) -> list[int]:
        self._votes[number] = list(votes)
        self._barrier.wait()
        columns = list(zip(*self._votes, strict=True))  # equally long, or the ranks have parted
        if number == 0:
            self.rounds += 1
            self.pending_rounds += any(len(set(column)) > 1 for column in columns)
        self._barrier.wait()
        return [min(column) for column in columns]

    def leave(self) -> None:
        self._barrier.abort()

    def gather(self, runs: Sequence[Future[T]]) -> None:
        """Wait for all runs; who waits for a rank that has ended already waits no longer."""
        undone: set[Future[T]] = set(runs)
        while undone:
            undone = wait(
                undone,
                timeout=0.001 if len(undone) < len(runs) else None,
                return_when=FIRST_COMPLETED,
            ).not_done
            if 0 < len(undone) == self._barrier.n_waiting < len(runs):
                self.leave()


@dataclass
class Rank:
    world: World
    number: int

    @property
    def size(self) -> int:
        return self.world.size

    def agree(self, votes: Sequence[int]) -> list[int]:
        return self.world.meet(self.number, votes)


class SlowBacking(PoisonedBacking):
    """Its background work stands still while `gate` is cleared.

    Undoing a map happens on the rank's own thread: nobody else could open the gate for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.owner = threading.get_ident()

    def map(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        self._open_for_the_owner()
        super().map(group, segments)

    def unmap(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        self._open_for_the_owner()
        super().unmap(group, segments)

    def _open_for_the_owner(self) -> None:
        if threading.get_ident() == self.owner:
            self.gate.set()


def open_gate_before_waiting(manager: SegmentManager, backing: FakeBacking) -> None:
    """Nobody is left to open a rank's gate while the rank itself waits."""
    wait = manager.wait

    def patient(ticket: object) -> object:
        backing.gate.set()
        return wait(ticket)  # type: ignore[arg-type]

    manager.wait = patient  # type: ignore[method-assign, assignment]


def state_of(memory: KVMemory) -> object:
    """All that ranks have to agree on: segments, every page's owners, tables, what is under way."""
    manager = memory.manager
    return (
        snapshot(manager),
        memory.ladder.free_pages(),
        manager.growth_paused,
        [ticket.number for ticket in manager.pending()],
        [
            [table.page_ids.tolist() for table in lease.tables]
            for _, lease in sorted(memory.leases.items())
        ],
        [
            (array.tobytes(), len(array))
            for index in (allocator.index for allocator in memory.allocators)
            for array in (index.state, index.rows, index.node)
        ],
    )


class RankDrivers:
    """One `MemoryDriver` per rank, made by `make(agreement)` on the rank's own thread.

    With one rank there is no thread and no agreement. A rank whose gate is open has finished its
    background work before the next thing is done, so that a run depends on no timing.
    """

    def __init__(self, size: int, make: Callable[[RankAgreement | None], MemoryDriver]) -> None:
        self.world = World(size) if size > 1 else None
        self.broken = False
        self._threads = [ThreadPoolExecutor(1) for _ in range(size if size > 1 else 0)]
        self.drivers: list[MemoryDriver] = []
        ranks = [None] if self.world is None else [self.world.rank(n) for n in range(size)]
        self.drivers = self._together([lambda rank=rank: make(rank) for rank in ranks])

    @property
    def first(self) -> MemoryDriver:
        """Rank 0: what it holds, all others hold (see `check`)."""
        return self.drivers[0]

    def run(self, act: Callable[[MemoryDriver], T]) -> T:
        """Let every rank act; what it returns must be the same everywhere."""
        results = self._together([lambda d=d: self._act(d, act) for d in self.drivers])
        assert all(result == results[0] for result in results), "the ranks have parted"
        return results[0]

    def check(self) -> None:
        """Every rank's audit and contents, and that all hold the same pages alike."""
        self.run(MemoryDriver.check)
        states = [state_of(driver.memory) for driver in self.drivers]
        if any(state != states[0] for state in states):
            self.broken = True
            raise AssertionError("the ranks' pages have parted")

    def close(self) -> None:
        """End all threads, whatever state they are in."""
        for driver in self.drivers:
            driver.backing.gate.set()
            driver.memory.close_pool()
        for thread in self._threads:
            thread.shutdown()

    def _act(self, driver: MemoryDriver, act: Callable[[MemoryDriver], T]) -> T:
        if driver.backing.gate.is_set():
            for job in list(driver.memory.manager._jobs.values()):
                if job.future is not None:
                    job.future.result()
        return act(driver)

    def _together(self, tasks: Sequence[Callable[[], T]]) -> list[T]:
        try:
            if self.world is None:
                return [task() for task in tasks]
            runs = [
                thread.submit(self._or_leave, task)
                for thread, task in zip(self._threads, tasks, strict=True)
            ]
            self.world.gather(runs)
            errors = [error for run in runs if (error := run.exception()) is not None]
            # Who waited for a rank that has died has nothing to say.
            for error in errors:
                if not isinstance(error, threading.BrokenBarrierError):
                    raise error
            assert not errors, "the ranks have parted: one waits for what the others don't ask"
            return [run.result() for run in runs]
        except BaseException:
            self.broken = True
            raise

    def _or_leave(self, task: Callable[[], T]) -> T:
        assert self.world is not None
        try:
            return task()
        except BaseException:
            self.world.leave()
            raise
