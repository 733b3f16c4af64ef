"""What the segment manager's background thread runs, and the pause that follows a refusal.

`run_job` is the only code that maps and unmaps; it runs on the manager's one thread, touches no
segment record, and reports what really happened. The one place where a BackingError is caught.
See docs/kv_segments.md, Note [Mapping runs ahead].
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final

from sglang.srt.errors import BackingError
from sglang.srt.mem_cache.kv_layout import GroupId, SegmentId, SegmentLayout
from sglang.srt.mem_cache.segment_backing.base import SegmentBacking
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
    """An applied plan until its outcome was taken. `future` is None while it waits for epochs."""

    ticket: Ticket
    map: SegmentIdsByGroup
    unmap: list[tuple[SegmentId, ...]]
    future: Future[JobResult] | None = field(default=None)


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


def run_job(
    backing: SegmentBacking,
    layouts: tuple[SegmentLayout, ...],
    to_map: SegmentIdsByGroup,
    to_unmap: SegmentIdsByGroup,
    timer: Callable[[], float],
) -> JobResult:
    """Unmap, then map in all groups or in none; never raises BackingError."""
    groups = len(layouts)
    result = JobResult([()] * groups, [()] * groups, [0.0] * groups, [0.0] * groups)
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
                backing.map(layout.group, segments)
                result.mapped[layout.group] = segments
                result.map_ms[layout.group] += (timer() - began) * 1e3
    except BackingError as error:
        result.refused = str(error)
        _give_back_maps(backing, result)
    return result


def _give_back_maps(backing: SegmentBacking, result: JobResult) -> None:
    """After a refusal: no group keeps what another could not get.

    Memory that can't be given back stays in `mapped`, so that states tell what is true.
    """
    for g, segments in enumerate(result.mapped):
        if segments:
            try:
                backing.unmap(GroupId(g), segments)
            except BackingError as error:
                result.refused = f"{result.refused}; and undoing it failed: {error}"
            else:
                result.mapped[g] = ()
