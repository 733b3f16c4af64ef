"""Brings back from the tier below what running requests read, when memory has room for it.

For tiers that are read in place at their own pace (the host's memory under a GPU), where nobody
else keeps a nearer copy. `KVMemory` calls `step` at each step boundary; decides and asks the ladder
to move. See docs/kv_segments.md, Note [The tier below].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

from sglang.srt.mem_cache.cold_segments import SegmentHeat
from sglang.srt.mem_cache.page_ladder import PageLadder
from sglang.srt.mem_cache.segment_backing.base import TieredBacking
from sglang.srt.mem_cache.segment_manager import SegmentManager
from sglang.srt.mem_cache.segment_state import Tier

STEP_BYTES: Final = 64 << 20  # moved at a step boundary each way: a few milliseconds of a bus
LOOK_EVERY_S: Final = 0.25  # between two looks that found nothing to move; a look reads all pages


class Promoter:
    """Moves segments up, and for them gives empty ones back and moves down what nobody reads.

    `heats` tells every segment that has an owner, the coldest first. Room for the coming step's
    pages, and one segment of each group beside, stays free: growth would send as much down again.
    """

    def __init__(
        self,
        manager: SegmentManager,
        ladder: PageLadder,
        heats: Callable[[], Sequence[SegmentHeat]],
    ) -> None:
        self._manager = manager
        self._ladder = ladder
        self._heats = heats
        self._next_look = 0.0
        self._step_bytes = max(STEP_BYTES, *(one.segment_bytes for one in manager.layouts))

    def step(self, now: float, pages_expected: Sequence[int]) -> int:
        """Move what a step boundary has time for; returns how many segments came up."""
        if not self._manager.lower_bytes or now < self._next_look:
            return 0
        self._next_look = now + LOOK_EVERY_S
        heats = self._heats()
        wanted = [one for one in heats if self._tier(one) is Tier.LOWER and _is_read_only(one)]
        if not wanted:
            return 0
        wanted_bytes = sum(self._manager.layouts[one.group].segment_bytes for one in wanted)
        missing = min(self._step_bytes, wanted_bytes) - self._room(pages_expected)
        if missing > 0:
            if (
                self._ladder.shrink(math.inf, pages_expected, most_bytes=missing, keep=1)
                is not None
            ):
                self._next_look = now  # there is room when they are gone
                return 0
            unread = [one for one in heats if self._tier(one) is Tier.DEVICE and not _is_used(one)]
            most = min(self._step_bytes, missing)
            self._ladder.demote(most, [(one.group, one.segment) for one in unread])
        most = min(self._step_bytes, self._room(pages_expected))
        moved = self._ladder.promote(most, [(one.group, one.segment) for one in reversed(wanted)])
        if moved:
            self._next_look = now
        return moved

    def _tier(self, heat: SegmentHeat) -> Tier:
        return self._manager.segments(heat.group)[heat.segment].tier

    def _room(self, pages_expected: Sequence[int]) -> int:
        """Bytes of the budget that growth will not want at once."""
        expected = pages_expected or [0] * self._manager.num_groups
        missing = [
            max(0, pages - free)
            for pages, free in zip(expected, self._ladder.free_pages(), strict=True)
        ]
        kept = sum(
            layout.segment_bytes
            for layout in self._manager.layouts
            if not self._manager.has_empty(layout.group)
        )
        return -self._manager.bytes_short(missing) - kept


def make_promoter(
    manager: SegmentManager, ladder: PageLadder, heats: Callable[[], Sequence[SegmentHeat]]
) -> Promoter | None:
    """A promoter where there is a tier below that is worth leaving; None elsewhere."""
    backing = manager.backing
    if not manager.lower_budget_bytes or not isinstance(backing, TieredBacking):
        return None
    return Promoter(manager, ladder, heats) if backing.promotes else None


def _is_read_only(heat: SegmentHeat) -> bool:
    """Running requests read it, and nobody writes it meanwhile."""
    return heat.is_read and not heat.is_hot


def _is_used(heat: SegmentHeat) -> bool:
    return heat.is_read or heat.is_hot
