"""Slots for the parts of a step: all decodes or none, then as many extends as there is room for.

Drafts are the first to be left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from sglang.srt.managers.draft_policy import without_drafts
from sglang.srt.managers.schedule_batch import ScheduledReq
from sglang.srt.mem_cache.allocation import DecodeRows, KVMemory, KVPlacement, PageNeed


class StepPlacer:
    """Asks memory for a step's slots; knows which rows decoded last, as they mostly go on.

    `drafts`: items may have some; without, nobody looks for them.
    """

    def __init__(self, memory: KVMemory, *, drafts: bool) -> None:
        self._memory = memory
        self._drafts = drafts
        self._decode_rows = DecodeRows.of(())

    def place(
        self, decodes: Sequence[ScheduledReq], extends: Sequence[ScheduledReq]
    ) -> tuple[tuple[ScheduledReq, ...], KVPlacement] | None:
        """What of a step has room, and where; None when the decodes have not, or nothing has.

        Where not all extends fit, those that come first go first.
        """
        parts: list[KVPlacement] = []
        items: list[ScheduledReq] = []
        if decodes:
            placed = self._place_decodes(decodes)
            if placed is None:
                return None
            items.extend(placed[0])
            parts.append(placed[1])
        if extends:
            placement = self._memory.alloc_for_extend([_need(item) for item in extends])
            if placement is not None:
                parts.append(placement)
                items.extend(extends)
            else:
                for item in extends:
                    placement = self._memory.alloc_for_extend([_need(item)])
                    if placement is not None:
                        parts.append(placement)
                        items.append(item)
        return (tuple(items), KVPlacement.concat(parts)) if items else None

    def _place_decodes(
        self, decodes: Sequence[ScheduledReq]
    ) -> tuple[Sequence[ScheduledReq], KVPlacement] | None:
        """All decodes, with their drafts or without; None: there is not room for a token each."""
        if self._drafts and any(item.draft or item.lease.has_spare_pages for item in decodes):
            # Those that have pages ahead of them, or need several tokens, are no rows of a kind.
            for some in (decodes, without_drafts(decodes)):
                placement = self._memory.alloc_for_extend([_need(item) for item in some])
                if placement is not None:
                    return some, placement
            return None
        leases = tuple([item.lease for item in decodes])
        if leases != self._decode_rows.leases:
            self._decode_rows = DecodeRows.of(leases)
        placement = self._memory.alloc_for_decode(self._decode_rows)
        return None if placement is None else (decodes, placement)


def _need(item: ScheduledReq) -> PageNeed:
    return PageNeed(item.lease, item.num_tokens)
