"""Kernels in Triton, for GPUs: imported only by who asks, needs the package triton.

On a CPU they run in Triton's interpreter alone (TRITON_INTERPRET=1 before Triton is imported),
which is how they are tested; none has run on a GPU yet. See docs/gpu.md.
"""

from sgl_kernel.triton.attention import (
    DeviceWork,
    Segments,
    Tables,
    default_tiles,
    heads_together,
    paged_attention,
)
from sgl_kernel.triton.expert_codes import ExpertCodes
from sgl_kernel.triton.launch import GroupedTile, check_device, is_interpreted
from sgl_kernel.triton.moe import grouped_linear, mixture, sort_pairs
from sgl_kernel.triton.quantized import QuantizedWeight
from sgl_kernel.triton.rows import clamped_gate, gelu_tanh_and_mul, rms_norm, route, silu_and_mul
from sgl_kernel.triton.store import rotate_and_store, store_kv
from sgl_kernel.triton.work import Chip, Queries, Sight, Tile, Work, plan_waves, plan_work

__all__ = [
    "Chip",
    "DeviceWork",
    "ExpertCodes",
    "GroupedTile",
    "QuantizedWeight",
    "Queries",
    "Segments",
    "Sight",
    "Tables",
    "Tile",
    "Work",
    "check_device",
    "clamped_gate",
    "default_tiles",
    "gelu_tanh_and_mul",
    "grouped_linear",
    "heads_together",
    "is_interpreted",
    "mixture",
    "paged_attention",
    "plan_waves",
    "plan_work",
    "rms_norm",
    "rotate_and_store",
    "route",
    "silu_and_mul",
    "sort_pairs",
    "store_kv",
]
