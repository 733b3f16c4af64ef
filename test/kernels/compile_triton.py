"""Compiles kernels for sm_90, which needs no GPU, and prints what came out as JSON.

Run by test_triton_compiles.py as a process of its own, since Triton interprets in the tests':

    python compile_triton.py '[{"kv": "bfloat16", "rows": 16, ...}, ...]'
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from sgl_kernel.triton.attention import launch_sizes
from sgl_kernel.triton.kernels.attention import merge_parts_kernel, paged_attention_kernel
from sgl_kernel.triton.kernels.fp8 import round_rows_kernel
from sgl_kernel.triton.kernels.moe import grouped_linear_kernel, sum_pairs_kernel
from sgl_kernel.triton.kernels.quantized import (
    dequantize_kernel,
    grouped_quantized_kernel,
    quantized_linear_kernel,
    quantized_rows_kernel,
    sum_splits_kernel,
)
from sgl_kernel.triton.kernels.rows import gate_kernel, rms_norm_kernel, route_kernel
from sgl_kernel.triton.kernels.store import rotate_and_store_kernel
from sgl_kernel.triton.launch import FP_FUSION, TRITON_TYPES, power_of_two
from sgl_kernel.triton.quantized import QuantizedWeight
from sgl_kernel.triton.work import Tile

POINTERS = {
    **dict.fromkeys(("part_ptr", "part_lse_ptr", "lse_ptr", "sinks_ptr"), "*fp32"),
    **dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32"),
    "slots_ptr": "*i64",
    "experts_ptr": "*i64",
    **dict.fromkeys(("pairs_ptr", "tile_experts_ptr"), "*i32"),
    **dict.fromkeys(("total_ptr", "pair_weights_ptr", "weights_ptr", "parts_ptr"), "*fp32"),
    **dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "out_ptr", "logits_ptr"), "*bf16"),
    "residual_ptr": "*fp32",
    **dict.fromkeys(("items_ptr", "origins_ptr", "pages_ptr", "rows_ptr"), "*i32"),
    "table_starts_ptr": "*i64",
}
STRIDES = (
    *("q_stride", "k_stride", "v_stride", "x_stride", "residual_stride"),
    *("codes_stride", "row_bytes", "out_stride"),
)
FLOATS = (
    "scale",
    "v_scale",
    "logit_cap",
    "eps",
    "offset",
    "alpha",
    "limit",
    "k_factor",
    "v_factor",
    "scale_gain",
    "gain",
)
WAITS = r"cp\.async\.wait_group\s+(\w+)"
INSTRUCTIONS = (
    r"cp\.async\.c[ag]\.shared\.global|(?:ld|st)\.global[.a-z0-9]*|wgmma\.mma_async|mma\.sync"
    r"|cvt[.a-z0-9]*bf16[.a-z0-9]*"
)


def compile_attention(
    *,
    kv: str = "bfloat16",
    q: str = "bfloat16",
    rows: int = 16,
    keys: int = 64,
    dim: int = 128,
    v_dim: int | None = None,
    page_size: int = 64,
    segmented: bool = False,
    sight: int = 0,
    capped: bool = False,
    sinks: bool = False,
    latent: bool = False,
) -> dict[str, Any]:
    """Shared memory, stack, registers and kinds of instructions of one launch's kernel."""
    kv_type, q_type = (TRITON_TYPES[getattr(torch, name)] for name in (kv, q))
    compute = q_type if kv.startswith("float8") else kv_type
    v_dim = v_dim or dim
    constants = {
        "KV_HEADS": 8,
        "GROUP": 16 if latent else 5,
        "HEAD_DIM": dim,
        "VALUE_DIM": v_dim,
        "BLOCK_D": power_of_two(v_dim if latent else dim),
        "BLOCK_R": max(16, power_of_two(dim - v_dim)) if latent else 16,
        "LATENT": latent,
        "BLOCK_E": power_of_two(v_dim),
        "BLOCK_M": rows,
        "BLOCK_N": keys,
        "PAGE_SIZE": page_size,
        "SIGHT": sight,
        "CAPPED": capped,
        "HAS_SINKS": sinks,
        "HAS_LSE": False,
        "SEGMENTED": segmented,
        "KV_TYPE": kv_type,
        "COMPUTE_TYPE": compute,
        "DOT_TYPE": compute,
        "PRECISION": "ieee" if q == "float32" else "tf32",
    }
    plane = "*i64" if segmented else f"*{kv_type}"
    types = {"k_ptr": plane, "v_ptr": plane, **dict.fromkeys(("q_ptr", "out_ptr"), f"*{q_type}")}
    options = launch_sizes(Tile(rows, keys), v_dim, getattr(torch, kv), segmented=segmented)
    return compiled(paged_attention_kernel, constants, types, options)


def compile_merge(*, dim: int = 128, sinks: bool = False) -> dict[str, Any]:
    constants = {
        "NUM_HEADS": 40,
        "VALUE_DIM": dim,
        "BLOCK_E": power_of_two(dim),
        "BLOCK_P": 16,
        "HAS_SINKS": sinks,
        "HAS_LSE": True,
    }
    return compiled(merge_parts_kernel, constants, {"out_ptr": "*bf16"}, {"num_warps": 4})


def compile_store(
    *, kv: str = "bfloat16", segmented: bool = False, interleaved: bool = False
) -> Any:
    kv_type = TRITON_TYPES[getattr(torch, kv)]
    constants = {
        "NUM_HEADS": 40,
        "KV_HEADS": 8,
        "HEAD_DIM": 128,
        "VALUE_DIM": 128,
        "BLOCK_PAIRS": 64,
        "BLOCK_E": 128,
        "BLOCK_HEADS": 8,
        "ROTATES": True,
        "INTERLEAVED": interleaved,
        "SEGMENTED": segmented,
        "X_TYPE": TRITON_TYPES[torch.bfloat16],
        "KV_TYPE": kv_type,
        "LARGEST": 448.0 if kv == "float8_e4m3fn" else 57344.0,
    }
    types = {
        **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "q_out_ptr"), "*bf16"),
        **dict.fromkeys(("k_plane_ptr", "v_plane_ptr"), "*i64" if segmented else f"*{kv_type}"),
    }
    return compiled(rotate_and_store_kernel, constants, types, {"num_warps": 4})


def compile_grouped(*, rows: int = 16, columns: int = 64, scales: bool = False) -> Any:
    constants = {
        "OUT": 1536,
        "IN": 2048,
        "NUM_EXPERTS": 128,
        "CHOSEN": 8,
        "BLOCK_M": rows,
        "BLOCK_N": columns,
        "BLOCK_C": 64,
        "GROUP_M": 8,
        "BY_TOKEN": True,
        "HAS_BIAS": False,
        "SCALES_INPUTS": scales,
        "SCALES_OUTPUTS": False,
        "X_TYPE": TRITON_TYPES[torch.bfloat16],
        "DOT_TYPE": TRITON_TYPES[torch.bfloat16],
        "PRECISION": "tf32",
    }
    options = {"num_warps": 8 if rows >= 128 else 4, "num_stages": 3}
    return compiled(grouped_linear_kernel, constants, {}, options)


def compile_quantized(
    *,
    name: str = "linear",
    bits: int = 4,
    group: int = 32,
    rows: int = 16,
    dtype: str = "bfloat16",
    mins: bool = False,
    values: list[int] | None = None,
    scales: bool = False,
    splits: int = 4,
    bare: bool = False,
    fp8: bool = False,
    rounded: bool = False,
    sm: int = 90,
) -> Any:
    """A kernel over codes; `rows` chooses the tile as a call with so many does.

    Of single rows it is the number of outputs instead. `fp8`: of E4M3, `group` 0: with one scale
    for an output; `rounded`: rows are that too. `bare`: without all that a call may lack.
    """
    x_type = getattr(torch, dtype)
    bits = 8 if fp8 else bits
    kind = torch.float8_e4m3fn if fp8 else torch.uint8 if bits == 4 else torch.int8
    codes = torch.empty(1, 64 * bits, dtype=kind)
    scale = torch.empty(1, 512 // (group or 512), dtype=torch.float32 if fp8 else torch.float16)
    weight = QuantizedWeight(codes, scale, scale if mins else None, values=values)
    weight.rounds_inputs = rounded
    sizes = weight.launch_sizes(weight.tile_for(rows, x_type), x_type, rounded)
    options = {key: sizes.pop(key) for key in ("num_warps", "num_stages")}
    kept = {key: sizes[key] for key in ("GROUP", "KIND", "HAS_MINS")}
    experts = {"EXPERT_ROWS": 5760, "CHOSEN": 4, "HAS_BIAS": True}
    scaled = {"SCALES_INPUTS": scales, "SCALES_OUTPUTS": not scales}
    single = {"BY_EXPERT": True, "BLOCK_N": rows, "BLOCK_B": 128 if fp8 else 256, "STAGES": 4}
    tiled = {"OUT": 5760, "ROW_BYTES": 2880 * bits // 8, "NUM_EXPERTS": 128, "BY_TOKEN": True}
    kernel, constants = {
        "linear": (quantized_linear_kernel, {**sizes, "SPLITS": splits, "HAS_BIAS": splits == 1}),
        "grouped": (grouped_quantized_kernel, {**sizes, **experts, **scaled, **tiled}),
        "rows": (quantized_rows_kernel, {**kept, **experts, **scaled, **single}),
        "dequantize": (dequantize_kernel, {**kept, "BLOCK_B": 1024, "BY_ID": True}),
        "round": (round_rows_kernel, {"GROUP": group, "BLOCK": group or 1024}),
        "sum": (sum_splits_kernel, {"SPLITS": splits, "BLOCK": 1024, "HAS_BIAS": True}),
    }[name]
    if name in ("linear", "grouped"):
        constants["TOGETHER"] = 8
    else:
        options = {"num_warps": 4}
    own = f"*{TRITON_TYPES[x_type]}"
    types = {
        "codes_ptr": "*fp8e4nv" if rounded else "*u8" if bits == 4 or fp8 else "*i8",
        **dict.fromkeys(("scales_ptr", "mins_ptr"), "*fp32" if fp8 else "*fp16"),
        **dict.fromkeys(("x_ptr", "bias_ptr", "out_ptr"), own),
        "ids_ptr": "*i64",
        "x_scales_ptr": "*fp32",
    }
    if rounded:
        types["x_ptr"] = "*fp8e4nv"
    if name == "round":
        types |= {"scales_ptr": "*fp32", "codes_ptr": "*fp8e4nv"}
    if name == "linear" and splits > 1:
        types["out_ptr"] = "*fp32"
    constants.pop("enable_fp_fusion", None)
    if not rounded and "x_scales_ptr" in kernel.arg_names:
        constants["x_scales_ptr"] = None
    return compiled(kernel, constants | lacking(kernel, bare), types, options, sm)


def lacking(kernel: Any, bare: bool) -> dict[str, Any]:
    """What a launch that lacks minima, bias, experts, ids and weights gives a kernel instead."""
    pointers = ("mins_ptr", "bias_ptr", "experts_ptr", "ids_ptr", "pair_weights_ptr")
    flags = ("HAS_MINS", "HAS_BIAS", "BY_EXPERT", "BY_ID", "SCALES_INPUTS", "SCALES_OUTPUTS")
    found = {**dict.fromkeys(pointers), **dict.fromkeys(flags, False)}
    return {name: value for name, value in found.items() if bare and name in kernel.arg_names}


def compile_rows(*, name: str) -> Any:
    kernel, constants = {
        "norm": (rms_norm_kernel, {"WIDTH": 5120, "BLOCK": 8192, "ADDS": True, "KEEPS": True}),
        "gate": (gate_kernel, {"WIDTH": 8192, "BLOCK": 1024, "KIND": 0}),
        "sum": (sum_pairs_kernel, {"WIDTH": 2048, "CHOSEN": 8, "BLOCK": 1024, "NUM_EXPERTS": 128}),
        "route": (
            route_kernel,
            {
                "NUM_EXPERTS": 128,
                "BLOCK": 128,
                "CHOSEN": 8,
                "SOFTMAX": True,
                "RENORMALIZE": True,
                "BLOCK_CHOSEN": 8,
            },
        ),
    }[name]
    warps = {"norm": 16, "route": 1}.get(name, 4)
    return compiled(kernel, constants, {}, {"num_warps": warps})


def count_kernels(*, name: str, values: list[Any]) -> dict[str, int]:
    """How many kernels Triton makes when what differs from call to call takes these values."""
    kernels: dict[str, Any] = {
        "attention": paged_attention_kernel,
        "merge": merge_parts_kernel,
        "grouped": grouped_linear_kernel,
        "quantized": quantized_linear_kernel,
        "grouped quantized": grouped_quantized_kernel,
    }
    kernel, differing = kernels[name], FLOATS
    if "grouped" in name or name == "quantized":
        differing = ("num_pairs", "num_rows", *(f"table_{i}" for i in range(4)))
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    keys = set()
    for value in values:
        arguments: dict[str, Any] = {}
        for parameter in kernel.params:
            if parameter.name in differing:
                arguments[parameter.name] = value
            elif parameter.name.endswith("_ptr"):
                arguments[parameter.name] = torch.empty(0)
            else:
                arguments[parameter.name] = 16
        keys.add(str(bind(**arguments)[1]))
    return {"kernels": len(keys)}


def compiled(
    kernel: Any,
    constants: dict[str, Any],
    types: dict[str, str],
    options: dict[str, Any],
    sm: int = 90,
) -> dict[str, Any]:
    signature, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        scalar = "fp32" if name in FLOATS else "i32"
        signature[name] = {**POINTERS, **types}.get(name, scalar)
        if name.endswith("_ptr") or name in STRIDES:
            aligned[place,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    made = triton.compile(
        source, target=GPUTarget("cuda", sm, 32), options={**options, **FP_FUSION}
    )
    return {
        "shared_bytes": made.metadata.shared,
        "instructions": Counter(re.findall(INSTRUCTIONS, made.asm["ptx"])),
        "on_their_way": [int(n, 0) for n in re.findall(WAITS, made.asm["ptx"])],
        **assembled(made.asm["cubin"]),
    }


def assembled(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of the stack, where what does not fit them is spilled."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-res-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found is not None, told
    return {"registers": int(found[1]), "stack_bytes": int(found[2])}


KINDS = {
    "attention": compile_attention,
    "merge": compile_merge,
    "count": count_kernels,
    "store": compile_store,
    "grouped": compile_grouped,
    "quantized": compile_quantized,
    "rows": compile_rows,
}

if __name__ == "__main__":
    for case in json.loads(sys.argv[1]):
        print(json.dumps(KINDS[case.pop("kernel", "attention")](**case)))
