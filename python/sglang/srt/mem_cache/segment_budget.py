"""How many bytes each tier may hold, what is left of them, and the pause after a refusal.

The segment manager's own; it reads the groups' tables and changes none. See docs/kv_segments.md,
Note [What the budget counts] and Note [The tier below].
"""

from __future__ import annotations

from typing import Final

from sglang.srt.mem_cache.segment_cuts import (
    tiers_bytes,
)
from sglang.srt.mem_cache.segment_state import SegmentTable, Tier

FIRST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 5.0


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


class TierBudgets:
    """One bound for each tier over all groups; a bound of 0 for LOWER: there is no such tier.

    `bound_bytes[tier]` may be changed at any time, also below what the tier holds.
    """

    def __init__(
        self, tables: tuple[SegmentTable, ...], budget_bytes: int, lower_bytes: int, now: float
    ) -> None:
        self._tables = tables
        self._layouts = tuple(table.layout for table in tables)
        self.bound_bytes = {Tier.DEVICE: budget_bytes, Tier.LOWER: lower_bytes}
        self.pauses = {tier: GrowthPause(now) for tier in Tier}

    def used_bytes(self, tier: Tier) -> int:
        """Bytes of all segments that are on the tier or about to be."""
        if tier is Tier.LOWER:
            return sum(table.lower_bytes for table in self._tables)
        return sum(table.committed_bytes for table in self._tables)

    def room_bytes(self, tier: Tier) -> int:
        """What is left for new segments; negative above the bound."""
        return self.bound_bytes[tier] - self.used_bytes(tier)

    def reach_bytes(self, now: float) -> int:
        """Bytes that all tiers can hold: of one that pauses, no more than it has.

        Where there is but one tier its bound counts, whether it pauses or not.
        """
        bounds = dict(self.bound_bytes)
        if bounds[Tier.LOWER]:
            for tier, pause in self.pauses.items():
                if pause.is_on(now):
                    bounds[tier] = min(bounds[tier], self.used_bytes(tier))
        return tiers_bytes(self._layouts, bounds[Tier.DEVICE], bounds[Tier.LOWER])

    def can_grow(self, now: float) -> bool:
        """Whether a tier that exists does not pause."""
        tiers = [Tier.DEVICE, Tier.LOWER] if self.bound_bytes[Tier.LOWER] else [Tier.DEVICE]
        return not all(self.pauses[tier].is_on(now) for tier in tiers)

    def note_given(self, now: float) -> None:
        """Something was mapped or given back: no tier pauses any more."""
        for pause in self.pauses.values():
            pause.end(now)
