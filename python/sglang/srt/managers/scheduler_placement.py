"""Slots for the parts of a step: all decodes or none, then as many extends as there is room for."""

from __future__ import annotations

from collections.abc import Sequence

from sglang.srt.managers.schedule_batch import ScheduledReq
from sglang.srt.mem_cache.allocation import DecodeRows, KVMemory, KVPlacement, PageNeed


class StepPlacer:
    """Asks memory for a step's slots; knows which rows decoded last, as they mostly go on."""

    def __init__(self, memory: KVMemory) -> None:
        self._memory = memory
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
            leases = tuple([item.lease for item in decodes])
            if leases != self._decode_rows.leases:
                self._decode_rows = DecodeRows.of(leases)
            placement = self._memory.alloc_for_decode(self._decode_rows)
            if placement is None:
                return None
            parts.append(placement)
            items.extend(decodes)
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


def _need(item: ScheduledReq) -> PageNeed:
    return PageNeed(item.lease, item.num_tokens)
