"""Native kernels behind thin typed wrappers; what each needs and answers stands in its module."""

from sgl_kernel.attention import AttentionTables, QueryBlocks, paged_attention, serves_attention
from sgl_kernel.library import Isa, KernelError, cpu_isa, has_byte_dots, read_sum
from sgl_kernel.linear import linear
from sgl_kernel.quantized import QuantizedWeight
from sgl_kernel.rows import KVPlanes, rms_norm, rotate, silu_and_mul

__all__ = [
    "AttentionTables",
    "Isa",
    "KVPlanes",
    "KernelError",
    "QuantizedWeight",
    "QueryBlocks",
    "cpu_isa",
    "has_byte_dots",
    "linear",
    "paged_attention",
    "read_sum",
    "rms_norm",
    "rotate",
    "serves_attention",
    "silu_and_mul",
]
