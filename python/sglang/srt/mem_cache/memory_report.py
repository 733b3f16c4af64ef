"""What memory tells those who look: a map of its segments and the system's own figure.

Asked for by /server_info, /metrics and what reads them (`python -m sglang.kv_report`), never by a
step: the resident figure takes the system milliseconds. Changes nothing.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Final

from sglang.srt.mem_cache.kv_layout import GroupId, KVCacheSpec
from sglang.srt.mem_cache.segment_backing.base import LOWER_PLACES
from sglang.srt.mem_cache.segment_manager import SegmentManager
from sglang.srt.mem_cache.segment_state import SegmentState, SegmentStats, Tier

# One letter for the state of a segment that has memory or is getting some; S stands for one that
# is mapped from the tier below.
STATE_LETTERS: Final = MappingProxyType(
    {SegmentState.MAPPED: "M", SegmentState.MAPPING: "G", SegmentState.DRAINING: "D"}
)
# Segments that a map lists over all groups; the counts are always whole.
MAX_LISTED_SEGMENTS: Final = 4096


def segment_maps(manager: SegmentManager, limit: int = MAX_LISTED_SEGMENTS) -> list[dict[str, Any]]:
    """The segments of every group that are not RESERVED, by group and ascending id.

    Per group `pages_per_segment`, `num_segments` (all that there are to list) and `segments`:
    [id, state letter, used, cached, free pages] each, the lowest ids first. Of more than `limit`
    segments over all groups, each group lists its share.
    """
    share = limit // manager.num_groups
    return [_segment_map(manager, GroupId(g), share) for g in range(manager.num_groups)]


def _segment_map(manager: SegmentManager, group: GroupId, limit: int) -> dict[str, Any]:
    records = manager.segments(group)
    ids = sorted(s for s, record in records.items() if record.state in STATE_LETTERS)
    listed = []
    for segment in ids[:limit]:
        one = records[segment]
        pages = (one.pages_used, one.pages_cached, one.pages_free)
        below = one.tier is Tier.LOWER and one.state is SegmentState.MAPPED
        listed.append([int(segment), "S" if below else STATE_LETTERS[one.state], *pages])
    return {
        "group": int(group),
        "pages_per_segment": manager.layouts[group].pages_per_segment,
        "num_segments": len(ids),
        "segments": listed,
    }


def memory_details(manager: SegmentManager) -> dict[str, Any]:
    """What `/server_info` adds to the memory object: `resident_bytes` and `segment_maps`.

    `resident_bytes` is the system's own figure of the KV ranges, None where it has none.
    """
    return {
        "resident_bytes": manager.backing.resident_bytes(),
        "segment_maps": segment_maps(manager),
    }


def memory_figures(spec: KVCacheSpec, manager: SegmentManager) -> dict[str, Any]:
    """What the pool holds, in all and by group: bytes, segments by state, pages by owner."""
    stats = manager.stats()
    return {
        "backing": manager.backing.name,
        "bytes_per_token": spec.bytes_per_token,
        "reserved_bytes": manager.reserved_bytes,
        "mapped_bytes": manager.mapped_bytes,
        "fixed_bytes": manager.fixed_bytes,
        "budget_bytes": manager.budget_bytes,
        **_lower_figures(manager),
        "growth_paused": manager.growth_paused,
        "segments": {
            state.value: sum(one.segments[state] for one in stats) for state in SegmentState
        },
        "pages": _pages(*stats),
        "groups": [
            {
                "group": int(one.group),
                "kind": spec.groups[one.group].kind.value,
                "num_layers": len(spec.groups[one.group].layers),
                "bytes_per_token": 0 if layout.holds_states else spec.bytes_per_slot(one.group),
                "state_bytes": spec.groups[one.group].state_bytes,
                "segment_tokens": 0 if layout.holds_states else layout.slots_per_segment,
                "segment_pages": layout.pages_per_segment,
                "segment_bytes": layout.segment_bytes,
                "segments": {state.value: one.segments[state] for state in SegmentState},
                "pages": _pages(one),
                "reserved_bytes": one.reserved_bytes,
                "mapped_bytes": one.mapped_bytes,
                "lower_bytes": one.lower_bytes,
                "fixed_bytes": one.fixed_bytes,
                "map_count": one.map_count,
                "unmap_count": one.unmap_count,
                "demote_count": one.demote_count,
                "promote_count": one.promote_count,
                "refused_count": one.refused_count,
            }
            for one, layout in zip(stats, manager.layouts, strict=True)
        ],
    }


def _lower_figures(manager: SegmentManager) -> dict[str, int]:
    """Bytes on each tier that may lie below, and their bounds; 0 where there is none."""
    figures: dict[str, int] = {}
    for tier in LOWER_PLACES:
        there = manager.lower_tier == tier
        figures[f"{tier}_bytes"] = manager.lower_bytes if there else 0
        figures[f"{tier}_budget_bytes"] = manager.lower_budget_bytes if there else 0
    return figures


def _pages(*stats: SegmentStats) -> dict[str, int]:
    return {
        "free": sum(one.pages_free for one in stats),
        "used": sum(one.pages_used for one in stats),
        "cached": sum(one.pages_cached for one in stats),
    }
