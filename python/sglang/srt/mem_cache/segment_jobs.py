"""What the segment manager's background thread runs, and what the ranks make of its results.

`JobRunner` owns the one thread and is the only code that maps and unmaps. It touches no segment
record; it reports what really happened, on this rank and after all ranks agreed. The one place
where a BackingError is caught. See docs/kv_segments.md, Note [Mapping runs ahead] and Note [Ranks
agree on growth].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from sglang.srt.errors import BackingError, InvariantError
from sglang.srt.mem_cache.kv_layout import GroupId, SegmentId, SegmentLayout
from sglang.srt.mem_cache.rank_agreement import RankAgreement, Vote, VoteStatus, agree_on
from sglang.srt.mem_cache.segment_backing.base import (
    SegmentBacking,
    StagedBacking,
    StagedTieredBacking,
    TieredBacking,
)
from sglang.srt.mem_cache.segment_state import SegmentIdsByGroup, Ticket, Tier

_Act = Callable[[GroupId, Sequence[SegmentId]], None]
_Timer = Callable[[], float]


@dataclass(slots=True)
class JobResult:
    """What the thread did, by group. `refused` is the machine's reason, None when all was done.

    `lower_refused`: it was the lower tier that refused, and memory may still be had.
    """

    mapped: list[tuple[SegmentId, ...]]
    unmapped: list[tuple[SegmentId, ...]]
    demoted: list[tuple[SegmentId, ...]]
    promoted: list[tuple[SegmentId, ...]]
    map_ms: list[float]
    unmap_ms: list[float]
    demote_ms: list[float]
    promote_ms: list[float]
    refused: str | None = None
    lower_refused: bool = False


@dataclass(frozen=True, slots=True)
class Work:
    """What the thread is to do, in this order; `map` on `tier`, the others by where they are."""

    unmap: SegmentIdsByGroup
    unmap_lower: SegmentIdsByGroup
    demote: SegmentIdsByGroup
    promote: SegmentIdsByGroup
    map: SegmentIdsByGroup
    tier: Tier


@dataclass(slots=True)
class Job:
    """An applied plan until its outcome was taken. `future` is None while it waits for epochs.

    `tier` is that of `map`. `work` is what of the plan this rank's thread has to do. `result` is
    this rank's own, from the moment it was seen until all ranks agreed.
    """

    ticket: Ticket
    map: SegmentIdsByGroup
    unmap: list[tuple[SegmentId, ...]]
    demote: SegmentIdsByGroup
    promote: SegmentIdsByGroup
    tier: Tier = Tier.DEVICE
    work: Work | None = field(default=None)
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
        # (group, segment) that have memory here although the ranks agreed that they have none, and
        # those that lie elsewhere here than where they agreed: each with its tier
        self._leftover: dict[tuple[int, SegmentId], Tier] = {}
        self._elsewhere: dict[tuple[int, SegmentId], Tier] = {}

    @property
    def leftover_bytes(self) -> int:
        """Bytes of memory that this rank has beyond what the ranks agreed on; 0 with one rank.

        What it could not give back or not move down when another had, less what it could not move
        back up.
        """
        layouts = self._layouts
        extra = sum(
            layouts[g].segment_bytes for (g, _), t in self._leftover.items() if t is Tier.DEVICE
        )
        return extra + sum(
            layouts[g].segment_bytes if tier is Tier.DEVICE else -layouts[g].segment_bytes
            for (g, _), tier in self._elsewhere.items()
        )

    def start(self, job: Job, below: SegmentIdsByGroup) -> None:
        """Hand a job to the thread; memory that is still there from before is not mapped again.

        `below` are those of the job's unmaps that lie on the lower tier.
        """
        to_map = tuple(
            tuple(s for s in segments if (g, s) not in self._leftover)
            for g, segments in enumerate(job.map)
        )
        agreed = [
            {s: Tier.LOWER if s in low else Tier.DEVICE for s in some}
            for some, low in zip(job.unmap, below, strict=True)
        ]
        tiers = [
            {s: self._elsewhere.get((g, s), tier) for s, tier in some.items()}
            for g, some in enumerate(agreed)
        ]
        job.work = Work(
            unmap=tuple(_on(Tier.DEVICE, some) for some in tiers),
            unmap_lower=tuple(_on(Tier.LOWER, some) for some in tiers),
            demote=self._not_yet(job.demote, Tier.LOWER),
            promote=self._not_yet(job.promote, Tier.DEVICE),
            map=to_map,
            tier=job.tier,
        )
        job.future = self._executor.submit(
            run_job, self._backing, self._layouts, job.work, self._timer
        )

    def results(self, jobs: Sequence[Job], *, block: bool = False) -> list[JobResult | None]:
        """What came of the jobs, on all ranks alike; None: still under way somewhere.

        With `block` this rank's part is waited for. Every rank asks for the same jobs.
        """
        own = [self._own_result(job, block) for job in jobs]
        if self._ranks.size == 1:
            return own
        votes = [self._vote(*pair) for pair in zip(jobs, own, strict=True)]
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
            commit(self._backing, self._layouts, job, job.result, self._timer)
            if job.result.refused is None:
                for g, segments in enumerate(job.map):
                    self._take_leftovers(g, segments, job.tier)
                    job.result.mapped[g] = segments
        return job.result

    def _take_leftovers(self, group: int, segments: Sequence[SegmentId], tier: Tier) -> None:
        """Segments that were found with memory are mapped now, on the tier where that is."""
        for key in ((group, segment) for segment in segments):
            found = self._leftover.pop(key, tier)
            if found is not tier:
                self._elsewhere[key] = found

    def _not_yet(self, segments: SegmentIdsByGroup, tier: Tier) -> SegmentIdsByGroup:
        """Those that are not on the tier on this rank already."""
        return tuple(
            tuple(s for s in some if self._elsewhere.get((g, s)) is not tier)
            for g, some in enumerate(segments)
        )

    def _vote(self, job: Job, result: JobResult | None) -> Vote:
        if result is None or job.work is None:
            none = (False,) * len(self._layouts)
            return Vote(VoteStatus.PENDING, none, none)
        status = VoteStatus.DONE if result.refused is None else VoteStatus.REFUSED
        work = job.work
        moves = zip(work.demote, result.demoted, work.promote, result.promoted, strict=True)
        moved = tuple(down == went and up == came for down, went, up, came in moves)
        return Vote(status, tuple(bool(segments) for segments in result.unmapped), moved)

    def _conform(self, job: Job, result: JobResult, vote: Vote) -> JobResult:
        """Make this rank's result the agreed one: after a refusal nobody keeps a map."""
        if vote.status is VoteStatus.REFUSED:
            if result.refused is None:
                result.refused = "another rank was refused"
            result.lower_refused = _asks_below(job)
            self._undo_maps(job, result)
        for g in range(len(self._layouts)):
            self._conform_unmaps(g, job, result, gone=vote.unmapped[g])
            self._conform_moves(g, job, result, moved=vote.moved[g])
        return result

    def _undo_maps(self, job: Job, result: JobResult) -> None:
        """Give back what was mapped; what can't be given back is kept for the next map."""
        for tier in Tier:
            taken = [
                tuple(s for s in some if self._elsewhere.get((g, s), job.tier) is tier)
                for g, some in enumerate(result.mapped)
            ]
            if any(taken):
                _give_back(result, taken, _unmapping(self._backing, tier))
            self._leftover.update({(g, s): tier for g, some in enumerate(taken) for s in some})
        for g, segments in enumerate(result.mapped):
            for segment in segments:
                self._elsewhere.pop((g, segment), None)
            result.mapped[g] = ()

    def _conform_unmaps(self, g: int, job: Job, result: JobResult, *, gone: bool) -> None:
        """A group's unmaps are done when any rank did them; memory that is still here is kept."""
        if not gone or job.work is None:
            return
        for segment in set(job.unmap[g]).difference(result.unmapped[g]):
            below = segment in job.work.unmap_lower[g]
            self._leftover[g, segment] = Tier.LOWER if below else Tier.DEVICE
        for segment in job.unmap[g]:
            self._elsewhere.pop((g, segment), None)
        result.unmapped[g] = job.unmap[g]

    def _conform_moves(self, g: int, job: Job, result: JobResult, *, moved: bool) -> None:
        """A group's moves are done when all ranks did them, else they are undone where possible."""
        kinds = (
            (job.demote[g], result.demoted, Tier.LOWER, False),
            (job.promote[g], result.promoted, Tier.DEVICE, True),
        )
        for wanted, done, tier, to_lower in kinds:
            if moved:
                for segment in wanted:
                    self._elsewhere.pop((g, segment), None)
                done[g] = wanted
            elif done[g]:
                try:
                    _move(self._backing, GroupId(g), done[g], to_lower=to_lower)
                except BackingError as error:
                    result.refused = f"{result.refused}; and undoing it failed: {error}"
                    self._elsewhere.update({(g, segment): tier for segment in done[g]})
                done[g] = ()


def run_job(
    backing: SegmentBacking, layouts: tuple[SegmentLayout, ...], work: Work, timer: _Timer
) -> JobResult:
    """Do the work; map (a staged backing: prepare) in all groups or none; no BackingError."""
    result = _nothing_done(len(layouts))
    take, undo = _mapping(backing, work.tier)
    try:
        _each(layouts, work.unmap, backing.unmap, result.unmapped, result.unmap_ms, timer)
        if any(work.unmap_lower):
            give = _tiered(backing).unmap_lower
            _each(layouts, work.unmap_lower, give, result.unmapped, result.unmap_ms, timer)
        # what may be refused from here on is new memory, or room below
        result.lower_refused = _asks_below(work)
        if any(work.demote):
            demote = _moving(_tiered(backing), to_lower=True)
            _each(layouts, work.demote, demote, result.demoted, result.demote_ms, timer)
        if any(work.promote):
            promote = _moving(_tiered(backing), to_lower=False)
            _each(layouts, work.promote, promote, result.promoted, result.promote_ms, timer)
        _each(layouts, work.map, take, result.mapped, result.map_ms, timer)
    except BackingError as error:
        result.refused = str(error)
        _give_back(result, result.mapped, undo)
        if isinstance(backing, StagedTieredBacking):
            _give_back(result, result.demoted, backing.discard_move)
            _give_back(result, result.promoted, backing.discard_move)
    else:
        result.lower_refused = False
    return result


def commit(
    backing: SegmentBacking,
    layouts: tuple[SegmentLayout, ...],
    job: Job,
    result: JobResult,
    timer: _Timer,
) -> None:
    """Attach what the thread prepared; nothing for other backings.

    Moves first, as far as the machine does them. Then maps, in all groups or in none.
    """
    if not isinstance(backing, StagedBacking) or result.refused is not None:
        return
    if isinstance(backing, StagedTieredBacking):
        move, drop = backing.commit_move, backing.discard_move
        _commit(layouts, result, result.demoted, result.demote_ms, (move, drop), timer)
        _commit(layouts, result, result.promoted, result.promote_ms, (move, drop), timer)
    acts = (backing.commit, backing.discard)
    if not _commit(layouts, result, result.mapped, result.map_ms, acts, timer):
        _give_back(result, result.mapped, backing.unmap)
        result.lower_refused = _asks_below(job)


def _commit(
    layouts: tuple[SegmentLayout, ...],
    result: JobResult,
    done: list[tuple[SegmentId, ...]],
    spent_ms: list[float],
    acts: tuple[_Act, _Act],
    timer: _Timer,
) -> bool:
    """Attach what `done` says is prepared until one is refused; `done` says then what was attached.

    `acts` attach and give back. Once anything was refused, all that is prepared is given back, and
    the answer is False.
    """
    act, drop = acts
    left, done[:] = list(done), [()] * len(done)
    if result.refused is None:
        try:
            for layout in layouts:
                # a refused call holds nothing
                segments, left[layout.group] = left[layout.group], ()
                if segments:
                    began = timer()
                    act(layout.group, segments)
                    done[layout.group] = segments
                    spent_ms[layout.group] += (timer() - began) * 1e3
        except BackingError as error:
            result.refused = str(error)
    _give_back(result, left, drop)
    return result.refused is None


def _asks_below(wanted: Job | Work) -> bool:
    """Whether room of the lower tier is wanted."""
    return any(wanted.demote) or wanted.tier is Tier.LOWER


def _nothing_done(groups: int) -> JobResult:
    none: tuple[SegmentId, ...] = ()
    return JobResult(
        mapped=[none] * groups,
        unmapped=[none] * groups,
        demoted=[none] * groups,
        promoted=[none] * groups,
        map_ms=[0.0] * groups,
        unmap_ms=[0.0] * groups,
        demote_ms=[0.0] * groups,
        promote_ms=[0.0] * groups,
    )


def _on(tier: Tier, tiers: Mapping[SegmentId, Tier]) -> tuple[SegmentId, ...]:
    return tuple(segment for segment, where in tiers.items() if where is tier)


def _move(
    backing: SegmentBacking, group: GroupId, segments: Sequence[SegmentId], *, to_lower: bool
) -> None:
    """Move segments to the other tier at once. Raises BackingError, and they stay."""
    tiered = _tiered(backing)
    (tiered.demote if to_lower else tiered.promote)(group, segments)


def _unmapping(backing: SegmentBacking, tier: Tier) -> _Act:
    """How memory on a tier is given back."""
    if tier is Tier.DEVICE:
        return backing.unmap
    return _tiered(backing).unmap_lower


def _mapping(backing: SegmentBacking, tier: Tier) -> tuple[_Act, _Act]:
    """How new segments get memory on a tier, and how that is undone."""
    if tier is Tier.DEVICE:
        if isinstance(backing, StagedBacking):
            return backing.prepare, backing.discard
        return backing.map, backing.unmap
    if isinstance(backing, StagedTieredBacking):
        return backing.prepare_lower, backing.discard
    tiered = _tiered(backing)
    return tiered.map_lower, tiered.unmap_lower


def _moving(backing: TieredBacking, *, to_lower: bool) -> _Act:
    """How segments go to the other tier (a staged backing: are copied there)."""
    if isinstance(backing, StagedTieredBacking):
        return partial(backing.prepare_move, to_lower=to_lower)
    return backing.demote if to_lower else backing.promote


def _tiered(backing: SegmentBacking) -> TieredBacking:
    if not isinstance(backing, TieredBacking):
        raise InvariantError("segments below a backing that has no lower tier")
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
