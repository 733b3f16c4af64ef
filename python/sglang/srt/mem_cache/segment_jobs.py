"""What the segment manager's background thread runs, and what the ranks make of its results.

`JobRunner` owns the one thread and is the only code that maps and unmaps. It touches no segment
record; it reports what really happened, on this rank and after all ranks agreed. The one place
where a BackingError is caught. See docs/kv_segments.md, Note [Mapping runs ahead] and Note [Ranks
agree on growth].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from sglang.srt.errors import BackingError, InvariantError
from sglang.srt.mem_cache.kv_layout import GroupId, SegmentId, SegmentLayout
from sglang.srt.mem_cache.rank_agreement import RankAgreement, Vote, VoteStatus, agree_on
from sglang.srt.mem_cache.segment_backing.base import (
    SegmentBacking,
    StagedBacking,
    TieredBacking,
)
from sglang.srt.mem_cache.segment_state import SegmentIdsByGroup, Ticket, Tier

_Act = Callable[[GroupId, Sequence[SegmentId]], None]
_Timer = Callable[[], float]


@dataclass(slots=True)
class JobResult:
    """What the thread did, by group. `refused` is the machine's reason, None when all was done.

    `disk_refused`: it was the disk that refused, and memory may still be had.
    """

    mapped: list[tuple[SegmentId, ...]]
    unmapped: list[tuple[SegmentId, ...]]
    demoted: list[tuple[SegmentId, ...]]
    map_ms: list[float]
    unmap_ms: list[float]
    demote_ms: list[float]
    refused: str | None = None
    disk_refused: bool = False


@dataclass(frozen=True, slots=True)
class Work:
    """What the thread is to do, in this order; `map` on `tier`, the others by where they are."""

    unmap: SegmentIdsByGroup
    unmap_on_disk: SegmentIdsByGroup
    demote: SegmentIdsByGroup
    map: SegmentIdsByGroup
    tier: Tier


@dataclass(slots=True)
class Job:
    """An applied plan until its outcome was taken. `future` is None while it waits for epochs.

    `tier` is that of `map`. `result` is this rank's own, from the moment it was seen until all
    ranks agreed.
    """

    ticket: Ticket
    map: SegmentIdsByGroup
    unmap: list[tuple[SegmentId, ...]]
    demote: SegmentIdsByGroup
    tier: Tier = Tier.DEVICE
    future: Future[JobResult] | None = field(default=None)
    result: JobResult | None = field(default=None)


class JobRunner:
    """The thread that maps and unmaps, and what the ranks together make of its results.

    Not thread safe: one thread calls it. `ranks` of size 1: a rank's own result is the result.
    """

    def __init__(
        self,
        backing: SegmentBacking,
        layouts: tuple[SegmentLayout, ...],
        timer: _Timer,
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

    def start(self, job: Job, on_disk: SegmentIdsByGroup) -> None:
        """Hand a job to the thread; memory that is still there from before is not mapped again.

        `on_disk` are those of the job's unmaps that lie there.
        """
        to_map = tuple(
            tuple(s for s in segments if (g, s) not in self._leftover)
            for g, segments in enumerate(job.map)
        )
        in_memory = tuple(
            tuple(s for s in segments if s not in elsewhere)
            for segments, elsewhere in zip(job.unmap, on_disk, strict=True)
        )
        work = Work(in_memory, on_disk, job.demote, to_map, job.tier)
        job.future = self._executor.submit(run_job, self._backing, self._layouts, work, self._timer)

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
        _give_back(result, result.mapped, self._backing.unmap)
        for g, gone in enumerate(vote.unmapped):
            self._leftover.update((g, s) for s in result.mapped[g])
            result.mapped[g] = ()
            if gone and not result.unmapped[g]:
                self._leftover.update((g, s) for s in job.unmap[g])
                result.unmapped[g] = job.unmap[g]
        return result


def run_job(
    backing: SegmentBacking, layouts: tuple[SegmentLayout, ...], work: Work, timer: _Timer
) -> JobResult:
    """Do the work; map (a staged backing: prepare) in all groups or none; no BackingError."""
    result = _nothing_done(len(layouts))
    tiered = backing if isinstance(backing, TieredBacking) else None
    undo = backing.unmap
    try:
        _each(layouts, work.unmap, backing.unmap, result.unmapped, result.unmap_ms, timer)
        if any(work.unmap_on_disk):
            give = _tiered(tiered).unmap_on_disk
            _each(layouts, work.unmap_on_disk, give, result.unmapped, result.unmap_ms, timer)
        # what may be refused from here on is new memory, or room on disk
        result.disk_refused = any(work.demote) or work.tier is Tier.DISK
        if any(work.demote):
            demote = _tiered(tiered).demote
            _each(layouts, work.demote, demote, result.demoted, result.demote_ms, timer)
        if work.tier is Tier.DISK:
            take, undo = _tiered(tiered).map_on_disk, _tiered(tiered).unmap_on_disk
        elif isinstance(backing, StagedBacking):
            take, undo = backing.prepare, backing.discard
        else:
            take = backing.map
        _each(layouts, work.map, take, result.mapped, result.map_ms, timer)
    except BackingError as error:
        result.refused = str(error)
        _give_back(result, result.mapped, undo)
    else:
        result.disk_refused = False
    return result


def commit(
    backing: SegmentBacking,
    layouts: tuple[SegmentLayout, ...],
    result: JobResult,
    timer: _Timer,
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
        _give_back(result, prepared, backing.discard)
        _give_back(result, result.mapped, backing.unmap)


def _nothing_done(groups: int) -> JobResult:
    none: tuple[SegmentId, ...] = ()
    return JobResult(
        mapped=[none] * groups,
        unmapped=[none] * groups,
        demoted=[none] * groups,
        map_ms=[0.0] * groups,
        unmap_ms=[0.0] * groups,
        demote_ms=[0.0] * groups,
    )


def _tiered(backing: TieredBacking | None) -> TieredBacking:
    if backing is None:
        raise InvariantError("segments on disk over a backing that has none")
    return backing


def _each(
    layouts: tuple[SegmentLayout, ...],
    segments: SegmentIdsByGroup,
    act: _Act,
    done: list[tuple[SegmentId, ...]],
    spent_ms: list[float],
    timer: _Timer,
) -> None:
    """Act on every group's segments and note what was done and how long it took."""
    for layout, some in zip(layouts, segments, strict=True):
        if some:
            began = timer()
            act(layout.group, some)
            done[layout.group] += some
            spent_ms[layout.group] += (timer() - began) * 1e3


def _give_back(result: JobResult, taken: list[tuple[SegmentId, ...]], undo: _Act) -> None:
    """After a refusal: no group keeps what another could not get.

    Memory that can't be given back stays in `taken`, so that states tell what is true.
    """
    for g, segments in enumerate(taken):
        if segments:
            try:
                undo(GroupId(g), segments)
            except BackingError as error:
                result.refused = f"{result.refused}; and undoing it failed: {error}"
            else:
                taken[g] = ()
