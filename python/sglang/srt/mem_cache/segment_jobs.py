"""What the segment manager's background thread runs, and the pause that follows a refusal.

`JobRunner` owns the one thread and is the only code that maps and unmaps. It touches no segment
record; it reports what really happened, on this rank and after all ranks agreed. The one place
where a BackingError is caught. See docs/kv_segments.md, Note [Mapping runs ahead] and Note [Ranks
agree on growth].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from sglang.srt.errors import BackingError
from sglang.srt.mem_cache.kv_layout import GroupId, SegmentId, SegmentLayout
from sglang.srt.mem_cache.rank_agreement import RankAgreement, Vote, VoteStatus, agree_on
from sglang.srt.mem_cache.segment_backing.base import SegmentBacking, StagedBacking
from sglang.srt.mem_cache.segment_state import SegmentIdsByGroup, Ticket

FIRST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 5.0


@dataclass(slots=True)
class JobResult:
    """What the thread did, by group. `refused` is the machine's reason, None when all was done."""

    mapped: list[tuple[SegmentId, ...]]
    unmapped: list[tuple[SegmentId, ...]]
    map_ms: list[float]
    unmap_ms: list[float]
    refused: str | None = None


@dataclass(slots=True)
class Job:
    """An applied plan until its outcome was taken. `future` is None while it waits for epochs.

    `result` is this rank's own, from the moment it was seen until all ranks agreed.
    """

    ticket: Ticket
    map: SegmentIdsByGroup
    unmap: list[tuple[SegmentId, ...]]
    future: Future[JobResult] | None = field(default=None)
    result: JobResult | None = field(default=None)


class GrowthPause:
    """Keeps growth from being tried at every step while the machine refuses.

    0.1 s after the first refusal, twice as long after each further one, at most 5 s; ended by any
    map that succeeds and by memory given back. Times are the caller's.
    """

    def __init__(self, now: float) -> None:
        self._until = now
        self._length_s = 0.0

    def is_on(self, now: float) -> bool:
        return now < self._until

    def lengthen(self, now: float) -> None:
        """Note a refusal at `now`."""
        self._length_s = min(LONGEST_PAUSE_S, max(FIRST_PAUSE_S, 2 * self._length_s))
        self._until = now + self._length_s

    def end(self, now: float) -> None:
        """Note that memory can be had again."""
        self._length_s = 0.0
        self._until = now


class JobRunner:
    """The thread that maps and unmaps, and what the ranks together make of its results.

    Not thread safe: one thread calls it. `ranks` of size 1: a rank's own result is the result.
    """

    def __init__(
        self,
        backing: SegmentBacking,
        layouts: tuple[SegmentLayout, ...],
        timer: Callable[[], float],
        ranks: RankAgreement,
    ) -> None:
        self._backing = backing
        self._layouts = layouts
        self._timer = timer
        self._ranks = ranks
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kv-segments")
        # (group, segment) that have memory here although the ranks agreed that they have none
        self._leftover: set[tuple[int, SegmentId]] = set()

    @property
    def leftover_bytes(self) -> int:
        """Bytes that this rank could not give back when another had; 0 with one rank."""
        return sum(self._layouts[g].segment_bytes for g, _ in self._leftover)

    def start(self, job: Job) -> None:
        """Hand a job to the thread; memory that is still there from before is not mapped again."""
        to_map = tuple(
            tuple(s for s in segments if (g, s) not in self._leftover)
            for g, segments in enumerate(job.map)
        )
        args = (self._backing, self._layouts, to_map, tuple(job.unmap), self._timer)
        job.future = self._executor.submit(run_job, *args)

    def results(self, jobs: Sequence[Job], *, block: bool = False) -> list[JobResult | None]:
        """What came of the jobs, on all ranks alike; None: still under way somewhere.

        With `block` this rank's part is waited for. Every rank asks for the same jobs.
        """
        own = [self._own_result(job, block) for job in jobs]
        if self._ranks.size == 1:
            return own
        votes = [self._vote(result) for result in own]
        agreed = agree_on(self._ranks, votes, len(self._layouts))
        return [
            None
            if vote.status is VoteStatus.PENDING or result is None
            else self._conform(job, result, vote)
            for job, result, vote in zip(jobs, own, agreed, strict=True)
        ]

    def close(self) -> None:
        """End the thread after the work that it has begun."""
        self._executor.shutdown(wait=True)

    def _own_result(self, job: Job, block: bool) -> JobResult | None:
        if job.result is None and job.future is not None and (block or job.future.done()):
            job.result = job.future.result()
            commit(self._backing, self._layouts, job.result, self._timer)
            if job.result.refused is None:
                for g, segments in enumerate(job.map):
                    self._leftover.difference_update((g, s) for s in segments)
                    job.result.mapped[g] = segments
        return job.result

    def _vote(self, result: JobResult | None) -> Vote:
        if result is None:
            return Vote(VoteStatus.PENDING, (False,) * len(self._layouts))
        status = VoteStatus.DONE if result.refused is None else VoteStatus.REFUSED
        return Vote(status, tuple(bool(segments) for segments in result.unmapped))

    def _conform(self, job: Job, result: JobResult, vote: Vote) -> JobResult:
        """Make this rank's result the agreed one: after a refusal nobody keeps a map."""
        if vote.status is VoteStatus.DONE:
            return result
        if result.refused is None:
            result.refused = "another rank was refused"
        _give_back(self._backing, result, result.mapped, attached=True)
        for g, gone in enumerate(vote.unmapped):
            self._leftover.update((g, s) for s in result.mapped[g])
            result.mapped[g] = ()
            if gone and not result.unmapped[g]:
                self._leftover.update((g, s) for s in job.unmap[g])
                result.unmapped[g] = job.unmap[g]
        return result


def run_job(
    backing: SegmentBacking,
    layouts: tuple[SegmentLayout, ...],
    to_map: SegmentIdsByGroup,
    to_unmap: SegmentIdsByGroup,
    timer: Callable[[], float],
) -> JobResult:
    """Unmap, then map (a staged backing: prepare) in all groups or none; no BackingError."""
    groups = len(layouts)
    result = JobResult([()] * groups, [()] * groups, [0.0] * groups, [0.0] * groups)
    staged = backing if isinstance(backing, StagedBacking) else None
    take = staged.prepare if staged else backing.map
    try:
        for layout, segments in zip(layouts, to_unmap, strict=True):
            if segments:
                began = timer()
                backing.unmap(layout.group, segments)
                result.unmapped[layout.group] = segments
                result.unmap_ms[layout.group] += (timer() - began) * 1e3
        for layout, segments in zip(layouts, to_map, strict=True):
            if segments:
                began = timer()
                take(layout.group, segments)
                result.mapped[layout.group] = segments
                result.map_ms[layout.group] += (timer() - began) * 1e3
    except BackingError as error:
        result.refused = str(error)
        _give_back(backing, result, result.mapped, attached=staged is None)
    return result


def commit(
    backing: SegmentBacking,
    layouts: tuple[SegmentLayout, ...],
    result: JobResult,
    timer: Callable[[], float],
) -> None:
    """Attach what the thread prepared, in all groups or in none; nothing for other backings."""
    if not isinstance(backing, StagedBacking) or result.refused is not None:
        return
    prepared = list(result.mapped)
    result.mapped = [()] * len(prepared)
    try:
        for layout in layouts:
            segments, prepared[layout.group] = prepared[layout.group], ()
            if segments:
                began = timer()
                backing.commit(layout.group, segments)
                result.mapped[layout.group] = segments
                result.map_ms[layout.group] += (timer() - began) * 1e3
    except BackingError as error:
        result.refused = str(error)
        _give_back(backing, result, prepared, attached=False)
        _give_back(backing, result, result.mapped, attached=True)


def _give_back(
    backing: SegmentBacking,
    result: JobResult,
    taken: list[tuple[SegmentId, ...]],
    *,
    attached: bool,
) -> None:
    """After a refusal: no group keeps what another could not get.

    Memory that can't be given back stays in `taken`, so that states tell what is true.
    """
    for g, segments in enumerate(taken):
        if segments:
            try:
                if attached or not isinstance(backing, StagedBacking):
                    backing.unmap(GroupId(g), segments)
                else:
                    backing.discard(GroupId(g), segments)
            except BackingError as error:
                result.refused = f"{result.refused}; and undoing it failed: {error}"
            else:
                taken[g] = ()
