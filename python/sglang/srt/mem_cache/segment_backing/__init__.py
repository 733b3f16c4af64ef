"""Backings by name: what puts bytes under KV segments. One file each behind `SegmentBacking`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from sglang.srt.errors import BackingError
from sglang.srt.mem_cache.segment_backing.base import KV_TORCH_DTYPES, Plane, SegmentBacking
from sglang.srt.mem_cache.segment_backing.cuda_driver import CudaDriver, HostVmmDriver
from sglang.srt.mem_cache.segment_backing.cuda_vmm import CudaVmmBacking, cuda_bytes
from sglang.srt.mem_cache.segment_backing.cuda_vmm_host import CudaVmmHostBacking
from sglang.srt.mem_cache.segment_backing.disk_file import DiskFile
from sglang.srt.mem_cache.segment_backing.mmap import MmapBacking
from sglang.srt.mem_cache.segment_backing.mmap_disk import MmapDiskBacking
from sglang.srt.mem_cache.segment_backing.segment_table import SegmentTableBacking
from sglang.srt.mem_cache.segment_backing.static import StaticBacking

__all__ = ["KV_TORCH_DTYPES", "Plane", "SegmentBacking", "make_backing"]

logger = logging.getLogger(__name__)


def make_backing(
    kind: str,
    *,
    device: str = "cpu",
    device_index: int = 0,
    streams: Sequence[int] = (0,),
    debug_protect: bool = False,
    available_bytes: Callable[[], int] | None = None,
    num_threads: int = 1,
    disk_path: Path | None = None,
    host_tier: bool = False,
    make_driver: Callable[..., HostVmmDriver] = CudaDriver,
) -> SegmentBacking:
    """The backing that `--kv-backing` names; "auto" takes what works best on `device`.

    That is mmap, else segment_table on a CPU; cuda_vmm, else static on a GPU, of several number
    `device_index`, whichever is the calling thread's. `streams` are the handles of the streams on
    which work reads the memory (cuda_vmm only). `debug_protect` makes
    memory that is not mapped inaccessible (mmap only). `available_bytes` replaces the system's
    figure of memory that may be taken; on a GPU static and segment_table need it. `num_threads`
    map segments together (mmap only). `disk_path` is the directory of the disk tier (None: there is
    none), which mmap alone has. `host_tier`: segments may also lie in the host's memory, which
    cuda_vmm alone can do. `make_driver` replaces the driver of cuda_vmm. Raises
    BackingError when the machine can't support the kind (the message suggests one that works),
    ValueError for another name.
    """

    def cuda_vmm() -> SegmentBacking:
        driver = make_driver(device_index, streams=streams)
        make = CudaVmmHostBacking if host_tier else CudaVmmBacking
        return make(driver, make_tensor=partial(cuda_bytes, device_index))

    def on_mmap() -> SegmentBacking:
        disk = None if disk_path is None else DiskFile(disk_path)
        make = MmapBacking if disk is None else partial(MmapDiskBacking, disk)
        return make(
            debug_protect=debug_protect, available_bytes=available_bytes, num_threads=num_threads
        )

    if disk_path is not None and (kind not in ("auto", "mmap") or device != "cpu"):
        raise BackingError("only the mmap backing, on a CPU, has a disk tier (--kv-disk-path)")
    if host_tier and (kind not in ("auto", "cuda_vmm") or device == "cpu"):
        raise BackingError(
            "only the cuda_vmm backing, on a GPU, has a host tier (--enable-hierarchical-cache)"
        )
    if kind == "auto" and device != "cpu":
        try:
            return cuda_vmm()
        except BackingError as error:
            if host_tier:
                raise
            logger.warning("KV memory is static, it can't grow or shrink: %s", error)
            kind = "static"
    if kind in ("auto", "mmap"):
        try:
            return on_mmap()
        except BackingError as error:
            if kind == "mmap" or disk_path is not None:
                raise
            logger.warning("KV memory on a segment table, not on mmap: %s", error)
            kind = "segment_table"
    device = f"cuda:{device_index}" if device == "cuda" else device
    if kind == "segment_table":
        return SegmentTableBacking(device=device, available_bytes=available_bytes)
    if kind == "static":
        return StaticBacking(device=device, available_bytes=available_bytes)
    if kind == "cuda_vmm":
        return cuda_vmm()
    raise ValueError(
        f"unknown KV backing {kind!r}: auto, static, mmap, cuda_vmm and segment_table exist"
    )
