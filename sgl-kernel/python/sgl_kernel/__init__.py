"""Native kernels behind thin typed wrappers; what each needs and answers stands in its module."""

from sgl_kernel.attention import (
    AttentionTables,
    QueryBlocks,
    has_prompt_kernel,
    paged_attention,
    serves_attention,
)
from sgl_kernel.experts import ExpertMatrix, Mixture, RouteKind, route
from sgl_kernel.library import Isa, KernelError, Op, cpu_isa, has_byte_dots, read_sum
from sgl_kernel.linear import linear
from sgl_kernel.quantized import QuantizedWeight
from sgl_kernel.rows import (
    Gate,
    GateKind,
    KVPlanes,
    angles,
    gate_and_mul,
    gather,
    highest,
    rms_norm,
    rotate,
    scale,
    scale_by_position,
    silu_and_mul,
    widen,
)
from sgl_kernel.sampling import sample
from sgl_kernel.tape import Arena, NotRecorded, Tape, is_recording, record

__all__ = [
    "Arena",
    "AttentionTables",
    "ExpertMatrix",
    "Gate",
    "GateKind",
    "Isa",
    "KVPlanes",
    "KernelError",
    "Mixture",
    "NotRecorded",
    "Op",
    "QuantizedWeight",
    "QueryBlocks",
    "RouteKind",
    "Tape",
    "angles",
    "cpu_isa",
    "gate_and_mul",
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
    "route",
    "sample",
    "scale",
    "scale_by_position",
    "serves_attention",
    "silu_and_mul",
    "widen",
]
