"""Which tensors of a quantised checkpoint make one matrix, and what they say.

A module `x` has its tensors under `x.<role>`; the merged experts of a layer have theirs under
`experts.gate_up_proj<_role>` and `experts.down_proj<_role>`. Nothing here reads files: the loader
hands over tensors by role. What doesn't fit raises ValueError that names the tensor.

Legend: E experts, H hidden width, I an expert's width, N outputs, K inputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from sglang.srt.configs.quantization_config import WeightScheme
from sglang.srt.layers.quantization.coded_matrix import CodedMatrix, PlainMatrix, StackedMatrix
from sglang.srt.layers.quantization.grouped_integers import GroupedIntegers
from sglang.srt.layers.quantization.mxfp4 import BLOCK, Mxfp4Matrix
from sglang.srt.layers.quantization.scaled_floats import ScaledFloats, stack_floats
from sglang.srt.model_loader.integer_forms import open_awq, open_bytes, open_gptq, open_packed

Tensors = Mapping[str, torch.Tensor]
"""Tensors by role; a plain tensor's is "" or "weight"."""

_MERGED = re.compile(r"(.*\.experts\.(?:gate_up|down)_proj)(?:_(blocks|scales|scale|bias))?")
# Of which a module has none beside its weight as numbers.
_PACKED = frozenset({"qweight", "qzeros", "scales", "g_idx", "weight_packed", "weight_shape"})
_SCALES = ("weight_scale", "weight_scale_inv")  # both are factors of the codes
# Of inputs, which are not quantised here.
_UNUSED = frozenset({"input_scale", "activation_scale", "input_scale_ub", "input_zero_point"})
# Roles of a module's tensors, by method. Others are plain tensors of their own.
_ROLES: dict[str, frozenset[str]] = {
    "mxfp4": frozenset(),
    "fp8": frozenset({"weight", *_SCALES, *_UNUSED}),
    "gptq": frozenset({"weight", "qweight", "qzeros", "scales", "g_idx"}),
    "awq": frozenset({"weight", "qweight", "qzeros", "scales"}),
    "compressed-tensors": frozenset(
        {"weight", "weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx"}
        | {*_SCALES, *_UNUSED}
    ),
}


def split_name(name: str, method: str) -> tuple[str, str]:
    """(module, role) of a tensor; role "" of a plain one, whose module is its whole name."""
    merged = _MERGED.fullmatch(name)
    if merged is not None:
        return merged[1], merged[2] or ""
    module, _, role = name.rpartition(".")
    return (module, role) if role in _ROLES[method] else (name, "")


def open_module(scheme: WeightScheme, module: str, tensors: Tensors) -> CodedMatrix | torch.Tensor:
    """The matrix of a module's tensors, or its weight as it is where that is numbers."""
    weight = tensors.get("weight")
    packed = sorted(tensors.keys() & _PACKED)
    if packed and weight is not None:
        raise ValueError(f"weight {module}.weight is there beside {module}.{packed[0]}")
    if packed and scheme.method == "gptq":
        return open_gptq(scheme, module, tensors)
    if packed and scheme.method == "awq":
        return open_awq(scheme, module, tensors)
    if packed:
        return open_packed(module, tensors)
    if weight is None:
        raise ValueError(f"weight {module}.weight is missing beside {module}.{next(iter(tensors))}")
    if weight.dtype is torch.int8 and scheme.method == "compressed-tensors":
        return open_bytes(module, tensors)
    return _open_floats(scheme, module, weight, tensors)


def _open_floats(
    scheme: WeightScheme, module: str, weight: torch.Tensor, tensors: Tensors
) -> CodedMatrix | torch.Tensor:
    scales = [role for role in _SCALES if role in tensors]
    name = f"{module}.{scales[0] if scales else _SCALES[0]}"
    if _is_numbers(name, weight, tensors[scales[0]] if scales else None):
        return weight
    if weight.dim() != 2:
        raise ValueError(f"weight {module}.weight: {_told(weight)} is no matrix")
    if len(scales) != 1:
        what = "there are both" if scales else "there is none"
        raise ValueError(f"weight {module}.weight needs one of {' and '.join(_SCALES)}, {what}")
    zeros = tensors.get("weight_zero_point")
    if zeros is not None and bool(zeros.float().any()):
        raise ValueError(f"weight {module}.weight_zero_point: FP8 has no zeros")
    return _scaled(name, weight, tensors[scales[0]], scheme.block)


def _scaled(
    name: str, codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int] | None
) -> ScaledFloats:
    """`codes` float8 [N, K] and their scales, whose shape says what each is for."""
    rows, width = codes.shape
    if not scales.is_floating_point():
        raise ValueError(f"weight {name}: {scales.dtype} is no scale")
    if block is not None:
        wanted = (-(-rows // block[0]), -(-width // block[1]))
        if tuple(scales.shape) == wanted:
            return ScaledFloats(codes, scales, block)
    if scales.numel() == 1:
        return ScaledFloats(codes, scales.reshape(1, 1), (rows, width))
    if scales.dim() in (1, 2) and len(scales) == rows and width % (scales.numel() // rows) == 0:
        scales = scales.reshape(rows, -1)
        return ScaledFloats(codes, scales, (1, width // scales.shape[1]))
    raise ValueError(f"weight {name}: shape {tuple(scales.shape)} scales no {tuple(codes.shape)}")


def _told(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def kept_bits(scheme: WeightScheme) -> float | None:
    """Bits of a weight whose codes are kept, with its scales; None where they become numbers.

    Integers are taken as symmetric, FP8 without a block as having few scales.
    """
    group = -1 if scheme.group is None else scheme.group
    if scheme.floats:
        inputs = None if scheme.block is None else scheme.block[1]
        return 8.0 if inputs is None else None if inputs % BLOCK else 8.0 + 32 / inputs
    if scheme.method == "mxfp4":
        sample: CodedMatrix = Mxfp4Matrix(
            torch.zeros(1, 1, BLOCK // 2, dtype=torch.uint8),
            torch.zeros(1, 1, dtype=torch.uint8),
        )
    elif scheme.bits is not None and not scheme.ordered and (group < 0 or group % BLOCK == 0):
        codes = torch.zeros(1, BLOCK, dtype=torch.uint8)
        scales = torch.ones(1, 1, dtype=torch.float16)
        sample = GroupedIntegers(
            (1, BLOCK), scheme.bits, lambda first, last: codes[first:last], scales, None, BLOCK
        )
    else:
        return None
    kept = sample.block_codes()
    if kept is None:
        return None
    parts = (kept.codes, kept.scales, kept.mins)
    return sum(part.nbytes for part in parts if part is not None) * 8 / BLOCK


def open_merged(
    module: str, part: str, tensors: Tensors, *, num_experts: int, interleaved: bool
) -> CodedMatrix:
    """`part` ("gate", "up" or "down") of all experts of a merged tensor, one below another.

    MXFP4 has outputs before inputs, [E, N, K / 32, 16]; numbers have inputs before outputs,
    [E, K, N], and so has FP8, with scales [E, 1, N] or one for an expert.
    `interleaved`: outputs 2i and 2i + 1 of gate and up are gate i and up i, else gates come first.
    """
    if "blocks" in tensors or "scales" in tensors:
        return _open_mxfp4(module, part, tensors, num_experts)
    weight, scales = tensors.get(""), tensors.get("scale")
    if weight is None:
        raise ValueError(f"weight {module} is missing beside {module}_scale")
    if weight.dim() != 3 or len(weight) != num_experts or not weight.is_floating_point():
        raise ValueError(f"weight {module}: {_told(weight)} is none of {num_experts} experts")
    outputs = merged_half(weight, part, interleaved=interleaved).transpose(1, 2)
    if _is_numbers(f"{module}_scale", weight, scales):
        return StackedMatrix([PlainMatrix(expert) for expert in outputs])
    if scales is None:
        raise ValueError(f"weight {module}_scale is missing")
    if scales.numel() == num_experts:
        halves = scales.reshape(num_experts, 1)
    elif tuple(scales.shape) == (num_experts, 1, weight.shape[2]):
        halves = merged_half(scales, part, interleaved=interleaved).squeeze(1)
    else:
        raise ValueError(f"weight {module}_scale: {_told(scales)} scales no {_told(weight)}")
    pairs = zip(outputs, halves, strict=True)
    found = [_scaled(f"{module}_scale", *pair, None) for pair in pairs]
    return stack_floats(found) or StackedMatrix(found)


def _is_numbers(name: str, weight: torch.Tensor, scales: torch.Tensor | None) -> bool:
    """Whether a weight is numbers rather than FP8; `name` is that of its scales.

    Raises ValueError for scales of numbers, and for other types.
    """
    if weight.is_floating_point() and weight.dtype.itemsize > 1:
        if scales is not None:
            raise ValueError(f"weight {name} scales a weight of {weight.dtype}")
        return True
    if weight.dtype is not torch.float8_e4m3fn:
        raise ValueError(f"weight {name}: a weight of {weight.dtype} is not served")
    return False


def merged_half(merged: torch.Tensor, part: str, *, interleaved: bool) -> torch.Tensor:
    """The gates or ups along the last dimension of a merged tensor, all of it for "down"."""
    if part == "down":
        return merged
    if interleaved:
        return merged[..., 0 if part == "gate" else 1 :: 2]
    return merged.chunk(2, -1)[0 if part == "gate" else 1]


def _open_mxfp4(module: str, part: str, tensors: Tensors, num_experts: int) -> CodedMatrix:
    for role in ("blocks", "scales"):
        if role not in tensors:
            raise ValueError(f"weight {module}_{role} is missing")
    if "" in tensors:
        raise ValueError(f"weight {module} is there as numbers beside {module}_blocks")
    blocks, scales = tensors["blocks"], tensors["scales"]
    shape = tuple(blocks.shape)
    odd = part != "down" and blocks.dim() > 1 and shape[1] % 2 == 1
    if blocks.dim() != 4 or shape[0] != num_experts or shape[3] * 2 != BLOCK or odd:
        raise ValueError(
            f"weight {module}_blocks: shape {shape} is not [{num_experts}, outputs, blocks, 16]"
        )
    if scales.shape != blocks.shape[:3]:
        raise ValueError(
            f"weight {module}_scales: shape {tuple(scales.shape)} does not fit blocks of {shape}"
        )
    for role in ("blocks", "scales"):
        if tensors[role].dtype is not torch.uint8:
            raise ValueError(f"weight {module}_{role}: {tensors[role].dtype}, uint8 is served")
    rows = slice(None) if part == "down" else slice(0 if part == "gate" else 1, None, 2)
    return Mxfp4Matrix(blocks.flatten(0, 1)[rows], scales.flatten(0, 1)[rows])
