"""The shared library: found beside this file, loaded once, its calls declared for ctypes.

The wrappers call it; it knows no tensor's meaning. Importing the package fails with ImportError
where the library was not built. Calls release the interpreter lock.
"""

from __future__ import annotations

import ctypes
import sys
from enum import IntEnum
from functools import cache
from pathlib import Path

import torch


class KernelError(ValueError):
    """A kernel was called with what it does not serve."""


class Isa(IntEnum):
    """Levels of instructions, as csrc/api.h numbers them."""

    GENERIC = 0
    AVX2 = 1
    AVX512 = 2
    AVX512_BF16 = 3
    AMX = 4
    NEON = 5


DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Of K and V alone. A head's row of int8 is its bytes and then a float32: SCALE_BYTES more.
BYTE_DTYPES = {torch.float8_e4m3fn: 3, torch.float8_e5m2: 4, torch.int8: 5}
SCALE_BYTES = 4


class AttentionCall(ctypes.Structure):
    """`SglAttention` of csrc/api.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "lse", "sinks")),
        *(
            (name, ctypes.c_int64)
            for name in ("q_row", "q_head", "k_slot", "k_head", "v_slot", "v_head")
        ),
        *((name, ctypes.c_int64) for name in ("out_row", "out_head", "num_blocks")),
        *(
            (name, ctypes.c_void_p)
            for name in ("block_row", "block_rows", "block_position", "block_table")
        ),
        *((name, ctypes.c_void_p) for name in ("pages", "first_position")),
        *((name, ctypes.c_int64) for name in ("page_size", "window", "chunk")),
        *(
            (name, ctypes.c_int32)
            for name in ("num_kv_heads", "heads_per_group", "head_dim", "dtype", "kv_dtype")
        ),
        ("isa", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("logit_cap", ctypes.c_float),
    )


class LinearCall(ctypes.Structure):
    """`SglLinear` of csrc/api.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("x_row", "weight_row", "out_row")),
        *((name, ctypes.c_int64) for name in ("rows", "out_features", "in_features")),
        *((name, ctypes.c_int32) for name in ("dtype", "isa", "num_threads")),
    )


class QuantizedCall(ctypes.Structure):
    """`SglQuantized` of csrc/api.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "bias", "out", "codes", "scales", "mins")),
        ("ids", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("x_row", "out_row", "code_row", "scale_row")),
        *((name, ctypes.c_int64) for name in ("rows", "out_features", "in_features", "group")),
        ("gain", ctypes.c_float),
        *(
            (name, ctypes.c_int32)
            for name in ("bits", "dtype", "isa", "num_threads", "round_inputs", "round_weight")
        ),
        ("has_values", ctypes.c_int32),
        ("values", ctypes.c_int8 * 16),
        ("is_fp8", ctypes.c_int32),
    )


class NormCall(ctypes.Structure):
    """`SglNorm` of csrc/api.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "residual", "total", "weight", "out")),
        *((name, ctypes.c_int64) for name in ("x_row", "residual_row", "total_row", "out_row")),
        *((name, ctypes.c_int64) for name in ("group", "x_group", "rows", "width")),
        *((name, ctypes.c_float) for name in ("eps", "offset")),
        *((name, ctypes.c_int32) for name in ("x_dtype", "dtype", "isa", "num_threads")),
    )


class GateCall(ctypes.Structure):
    """`SglGate` of csrc/api.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "out")),
        *((name, ctypes.c_int64) for name in ("x_row", "out_row", "rows", "width")),
        *((name, ctypes.c_int32) for name in ("dtype", "isa", "num_threads", "kind")),
        *((name, ctypes.c_float) for name in ("alpha", "limit")),
    )


class RotateCall(ctypes.Structure):
    """`SglRotate` of csrc/api.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "cos", "sin", "out")),
        *((name, ctypes.c_int64) for name in ("x_row", "angle_row", "out_row")),
        *((name, ctypes.c_int64) for name in ("rows", "width", "head_dim")),
        *((name, ctypes.c_int32) for name in ("interleaved", "dtype", "isa", "num_threads")),
    )


class StoreCall(ctypes.Structure):
    """`SglStore` of csrc/api.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("k", "v", "k_plane", "v_plane", "slots")),
        *((name, ctypes.c_int64) for name in ("k_row", "v_row", "k_slot", "v_slot")),
        *((name, ctypes.c_int64) for name in ("rows", "k_bytes", "v_bytes", "k_dim", "v_dim")),
        *((name, ctypes.c_int32) for name in ("x_dtype", "plane_dtype", "num_threads")),
        *((name, ctypes.c_float) for name in ("k_factor", "v_factor")),
    )


class GatherCall(ctypes.Structure):
    """`SglGather` of csrc/api.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("table", "out", "ids")),
        *((name, ctypes.c_int64) for name in ("table_row", "out_row", "rows", "bytes")),
    )


class AnglesCall(ctypes.Structure):
    """`SglAngles` of csrc/api.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("positions", "frequencies", "cos", "sin")),
        *((name, ctypes.c_int64) for name in ("rows", "half")),
        ("scaling", ctypes.c_double),
        ("interleaved", ctypes.c_int32),
    )


class WidenCall(ctypes.Structure):
    """`SglWiden` of csrc/api.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "out")),
        *((name, ctypes.c_int64) for name in ("x_row", "rows", "width")),
        *((name, ctypes.c_int32) for name in ("dtype", "num_threads")),
    )


class HighestCall(ctypes.Structure):
    """`SglHighest` of csrc/api.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "highest", "place")),
        *((name, ctypes.c_int64) for name in ("x_row", "rows", "width")),
        *((name, ctypes.c_int32) for name in ("isa", "num_threads")),
    )


class SampleCall(ctypes.Structure):
    """`SglSample` of csrc/api.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "highest", "tokens", "rows")),
        *((name, ctypes.c_void_p) for name in ("temperature", "u", "top_k", "top_p", "min_p")),
        *((name, ctypes.c_int64) for name in ("logit_row", "count", "width")),
        *((name, ctypes.c_int32) for name in ("isa", "num_threads")),
    )


class ScaleCall(ctypes.Structure):
    """`SglScale` of csrc/api.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "out", "positions")),
        *((name, ctypes.c_int64) for name in ("x_row", "out_row", "rows", "width")),
        *((name, ctypes.c_double) for name in ("attn_scale", "floor_scale")),
        ("factor", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("dtype", "num_threads")),
    )


class RouteCall(ctypes.Structure):
    """`SglRoute` of csrc/api.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("scores", "experts", "weights")),
        *((name, ctypes.c_int64) for name in ("score_row", "rows", "num_experts", "chosen")),
        *((name, ctypes.c_int32) for name in ("dtype", "kind")),
    )


class ExpertMatrixFields(ctypes.Structure):
    """`SglExpertMatrix` of csrc/api.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "scales", "mins", "bias")),
        *((name, ctypes.c_int64) for name in ("row", "scale_row", "expert", "bias_expert")),
        ("group", ctypes.c_int64),
        ("gain", ctypes.c_float),
        ("bits", ctypes.c_int32),
        ("has_values", ctypes.c_int32),
        ("values", ctypes.c_int8 * 16),
        ("is_fp8", ctypes.c_int32),
    )


class ExpertsCall(ctypes.Structure):
    """`SglExperts` of csrc/api.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "added", "out", "experts", "weights")),
        *((name, ExpertMatrixFields) for name in ("gate", "up", "down")),
        *((name, ctypes.c_int64) for name in ("x_row", "added_row", "out_row")),
        *((name, ctypes.c_int64) for name in ("rows", "chosen", "num_experts", "hidden", "width")),
        *((name, ctypes.c_int32) for name in ("dtype", "out_dtype", "kind")),
        *((name, ctypes.c_float) for name in ("alpha", "limit")),
        *(
            (name, ctypes.c_int32)
            for name in ("scale_inputs", "isa", "num_threads", "round_inputs")
        ),
    )


class QkvCall(ctypes.Structure):
    """`SglQkv` of csrc/api.h, field by field."""

    _fields_ = (
        ("product", ctypes.c_void_p),
        ("norms", ctypes.c_void_p * 2),
        ("rotates", ctypes.c_void_p * 2),
        ("store", ctypes.c_void_p),
        ("columns", ctypes.c_int64 * 2),
        *((name, ctypes.c_int64) for name in ("k_columns", "v_columns", "head_dim", "v_dim")),
        ("product_op", ctypes.c_int64),
    )


class Step(ctypes.Structure):
    """`SglStep` of csrc/api.h, field by field."""

    _fields_ = (("call", ctypes.c_void_p), ("op", ctypes.c_int64))


class Op(IntEnum):
    """What a step of a tape calls, as csrc/api.h numbers it."""

    ATTENTION = 0
    QKV = 15
    LINEAR = 1
    QUANTIZED_LINEAR = 2
    DEQUANTIZE = 3
    NORM = 4
    GATE = 5
    ROTATE = 6
    STORE = 7
    GATHER = 8
    ANGLES = 9
    WIDEN = 10
    HIGHEST = 11
    SCALE = 12
    ROUTE = 13
    EXPERTS = 14


_CALLS = {
    "attention": AttentionCall,
    "qkv": QkvCall,
    "linear": LinearCall,
    "quantized_linear": QuantizedCall,
    "dequantize": QuantizedCall,
    "norm": NormCall,
    "gate": GateCall,
    "rotate": RotateCall,
    "store": StoreCall,
    "gather": GatherCall,
    "angles": AnglesCall,
    "widen": WidenCall,
    "highest": HighestCall,
    "scale": ScaleCall,
    "sample": SampleCall,
    "route": RouteCall,
    "experts": ExpertsCall,
}


@cache
def library() -> ctypes.CDLL:
    """The loaded library, running on PyTorch's OpenMP threads where those are found.

    Raises ImportError when it was not built.
    """
    path = Path(__file__).with_name("libsgl_kernel_cpu.so")
    if not path.exists():
        raise ImportError(f"the native kernels are not built: there is no {path.name}")
    lib = ctypes.CDLL(str(path))
    lib.sgl_cpu_isa.argtypes = ()
    lib.sgl_cpu_isa.restype = ctypes.c_int32
    lib.sgl_set_parallel.argtypes = (ctypes.c_void_p,)
    lib.sgl_set_parallel.restype = None
    for name, call in _CALLS.items():
        function = getattr(lib, f"sgl_{name}")
        function.argtypes = (ctypes.POINTER(call),)
        function.restype = ctypes.c_int32
    lib.sgl_run.argtypes = (
        ctypes.POINTER(Step),
        ctypes.c_int64,
        ctypes.c_int32,
        ctypes.POINTER(ctypes.c_double),
    )
    lib.sgl_run.restype = ctypes.c_int64
    lib.sgl_read_sum.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32)
    lib.sgl_read_sum.restype = ctypes.c_uint32
    lib.sgl_set_parallel(_gomp_parallel())
    return lib


def _gomp_parallel() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that PyTorch brings; None without one."""
    if not sys.platform.startswith("linux"):
        return None
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    found += sorted((Path(torch.__file__).parent.parent / "torch.libs").glob("libgomp*.so*"))
    for path in found:
        runtime = ctypes.CDLL(str(path))  # loaded already: the same one again
        return ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p).value
    return None


@cache
def cpu_isa() -> Isa:
    """The best level that this processor and the library have."""
    return Isa(library().sgl_cpu_isa())


def allowed_isa(isa: Isa | None) -> Isa:
    """The level that a call may use: no more than the processor has, nor than `isa`, if given."""
    return cpu_isa() if isa is None else min(isa, cpu_isa())


def has_byte_dots(isa: Isa | None = None) -> bool:
    """Whether rounded inputs are multiplied as bytes here, with no more than `isa`, if given.

    By dot products of bytes, or with AVX2 by their products in pairs.
    """
    return Isa.AVX2 <= allowed_isa(isa) <= Isa.AMX


def has_tiles(isa: Isa | None = None) -> bool:
    """Whether bfloat16 is multiplied by matrix tiles here, with no more than `isa`, if given."""
    return allowed_isa(isa) == Isa.AMX


def read_sum(data: torch.Tensor, num_threads: int) -> int:
    """Sum of a contiguous tensor's bytes as 32-bit words, modulo 2^32: a read at full speed.

    Raises KernelError when the bytes are not whole lines of 64 or not contiguous.
    """
    if not data.is_contiguous() or data.nbytes % 64:
        raise KernelError("read_sum wants contiguous memory in lines of 64 bytes")
    return int(library().sgl_read_sum(data.data_ptr(), data.nbytes, num_threads))
