"""Backings by name: what puts bytes under KV segments. One file each behind `SegmentBacking`."""

from __future__ import annotations

from collections.abc import Callable

from sglang.srt.mem_cache.segment_backing.base import KV_TORCH_DTYPES, Plane, SegmentBacking
from sglang.srt.mem_cache.segment_backing.mmap import MmapBacking
from sglang.srt.mem_cache.segment_backing.static import StaticBacking

__all__ = ["KV_TORCH_DTYPES", "Plane", "SegmentBacking", "make_backing"]


def make_backing(
    kind: str,
    *,
    debug_protect: bool = False,
    available_bytes: Callable[[], int] | None = None,
) -> SegmentBacking:
    """The backing that `--kv-backing` names: "auto" (mmap), "mmap" or "static".

    `debug_protect` makes memory that is not mapped inaccessible (mmap only). `available_bytes`
    replaces the system's figure of memory that may be taken. Raises BackingError when the machine
    can't support the kind (the message suggests one that works), ValueError for another name.
    """
    if kind in ("auto", "mmap"):
        return MmapBacking(debug_protect=debug_protect, available_bytes=available_bytes)
    if kind == "static":
        return StaticBacking(available_bytes=available_bytes)
    raise ValueError(f"unknown KV backing {kind!r}: auto, mmap and static exist")
