"""What memory tells those who look: a map of its segments and the system's own figure.

Asked for by /server_info and what reads it (`python -m sglang.kv_report`), never by a step: the
resident figure takes the system milliseconds. Changes nothing.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Final

from sglang.srt.mem_cache.kv_layout import GroupId
from sglang.srt.mem_cache.segment_manager import SegmentManager
from sglang.srt.mem_cache.segment_state import SegmentState

# One letter for the state of a segment that has memory or is getting some.
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
        listed.append([int(segment), STATE_LETTERS[one.state], *pages])
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
