"""Native kernels behind thin typed wrappers; what each needs and answers stands in its module."""

from sgl_kernel.attention import (
    AttentionTables,
    QueryBlocks,
    has_prompt_kernel,
    paged_attention,
    serves_attention,
)
from sgl_kernel.library import Isa, KernelError, Op, cpu_isa, has_byte_dots, read_sum
from sgl_kernel.linear import linear
from sgl_kernel.quantized import QuantizedWeight
from sgl_kernel.rows import (
    KVPlanes,
    angles,
    gather,
    highest,
    rms_norm,
    rotate,
    silu_and_mul,
    widen,
)
from sgl_kernel.tape import Arena, NotRecorded, Tape, is_recording, record

__all__ = [
    "Arena",
    "AttentionTables",
    "Isa",
    "KVPlanes",
    "KernelError",
    "NotRecorded",
    "Op",
    "QuantizedWeight",
    "QueryBlocks",
    "Tape",
    "angles",
    "cpu_isa",
    "gather",
    "has_byte_dots",
    "has_prompt_kernel",
    "highest",
    "is_recording",
    "linear",
    "paged_attention",
    "read_sum",
    "record",
    "rms_norm",
    "rotate",
    "serves_attention",
    "silu_and_mul",
    "widen",
]
