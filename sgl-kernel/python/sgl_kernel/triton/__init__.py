"""Kernels in Triton, for GPUs: imported only by who asks, needs the package triton.

On a CPU they run in Triton's interpreter alone (TRITON_INTERPRET=1 before Triton is imported),
which is how they are tested; none has run on a GPU yet. See docs/gpu.md.
"""

from sgl_kernel.triton.attention import (
    DeviceWork,
    Segments,
    Tables,
    default_tiles,
    paged_attention,
)
from sgl_kernel.triton.launch import check_device, is_interpreted
from sgl_kernel.triton.work import Chip, Queries, Sight, Tile, Work, plan_waves, plan_work

__all__ = [
    "Chip",
    "DeviceWork",
    "Queries",
    "Segments",
    "Sight",
    "Tables",
    "Tile",
    "Work",
    "check_device",
    "default_tiles",
    "is_interpreted",
    "paged_attention",
    "plan_waves",
    "plan_work",
]
