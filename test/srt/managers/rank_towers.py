"""Several ranks as threads of one process, each a whole device tower; for tests only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from srt.distributed.thread_ranks import ThreadRanks
from srt.managers.test_engine_tokens import DeviceTower
from srt.mem_cache.rank_world import state_of

T = TypeVar("T")


class RankTowers:
    """`size` towers that talk through `ThreadRanks`; every rank's thread runs the same program.

    Without `kv_parallel_size` among the flags they are tensor-parallel ranks.
    """

    def __init__(self, size: int, model_path: str, **flags: object) -> None:
        self.ranks = ThreadRanks(size)
        kv_size = flags.get("kv_parallel_size", 1)
        assert isinstance(kv_size, int)

        def make(rank: int) -> DeviceTower:
            links = self.ranks.links(rank)
            return DeviceTower(model_path, links=links, tp_size=size // kv_size, **flags)

        self.towers = self.ranks.run(make)

    @property
    def first(self) -> DeviceTower:
        return self.towers[0]

    def run(self, program: Callable[[DeviceTower], T]) -> T:
        """Let every rank run the program; its result, which all ranks must have."""
        results = self.ranks.run(lambda rank: program(self.towers[rank]))
        assert all(result == results[0] for result in results), "the ranks have parted"
        return results[0]

    def check(self) -> None:
        """Every rank's audit; all hold the same pages in the same states."""
        self.run(lambda tower: tower.memory.audit())
        states = [state_of(tower.memory) for tower in self.towers]
        assert all(state == states[0] for state in states)

    def close(self) -> None:
        for tower in self.towers:
            tower.parts.worker.close()
            tower.memory.close_pool()
        self.ranks.close()


@contextmanager
def rank_towers(size: int, model_path: str, **flags: object) -> Iterator[RankTowers]:
    made = RankTowers(size, model_path, **flags)
    try:
        yield made
        made.check()
    finally:
        made.close()
