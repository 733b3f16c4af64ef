"""A fake backing with a disk: what lies where, refusals of the disk, a look before each move."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sglang.srt.errors import BackingError
from sglang.srt.mem_cache.kv_layout import GroupId, SegmentId
from srt.mem_cache.rank_world import SlowBacking


class DiskBacking(SlowBacking):
    """`mapped` are segments in memory, `on_disk` those on disk; no segment is in both.

    Disk call number n (maps and demotions, counted from 1) fails when n is in `failing_disk`.
    `before_demote` is called with what is about to move.
    """

    def __init__(self) -> None:
        super().__init__()
        self.on_disk: set[tuple[int, int]] = set()
        self.failing_disk: set[int] = set()
        self.num_disk = 0
        self.num_demoted = 0
        self.num_promoted = 0
        self.promotes = False
        self.before_demote: Callable[[int, Sequence[int]], None] = lambda group, segments: None

    def map_lower(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        self._use_lower()
        keys = {(group, segment) for segment in segments}
        assert not keys & (self.mapped | self.on_disk)
        self.on_disk |= keys
        self._fill(group, segments, 0.0)

    def unmap_lower(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        self._open_for_the_owner()
        self._pass_gate()
        self.num_unmaps += 1
        if self.num_unmaps in self.failing_unmaps:
            raise BackingError(f"unmap {self.num_unmaps} was told to fail")
        keys = {(group, segment) for segment in segments}
        assert keys <= self.on_disk
        self.on_disk -= keys
        self._fill(group, segments, float("nan"))

    def demote(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        self.before_demote(group, segments)
        self._use_lower()
        keys = {(group, segment) for segment in segments}
        assert keys <= self.mapped
        self.mapped -= keys
        self.on_disk |= keys
        self.num_demoted += len(keys)

    def map(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        assert not {(group, segment) for segment in segments} & self.on_disk
        super().map(group, segments)

    lower_tier = "disk"

    def promote(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        self.before_demote(group, segments)
        self._open_for_the_owner()
        self._pass_gate()
        self.num_maps += 1
        if self.fail_all_maps or self.num_maps in self.failing_maps:
            raise BackingError(f"map {self.num_maps} was told to fail")
        keys = {(group, segment) for segment in segments}
        assert keys <= self.on_disk
        self.on_disk -= keys
        self.mapped |= keys
        self.num_promoted += len(keys)

    def lower_bytes(self) -> int:
        return sum(self._layouts[group].segment_bytes for group, _ in self.on_disk)

    def _use_lower(self) -> None:
        self._open_for_the_owner()
        self._pass_gate()
        self.num_disk += 1
        if self.num_disk in self.failing_disk:
            raise BackingError(f"disk call {self.num_disk} was told to fail")
