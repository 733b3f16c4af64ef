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

from sglang.srt.layers.quantization.coded_matrix import CodedMatrix, PlainMatrix, StackedMatrix
from sglang.srt.layers.quantization.mxfp4 import BLOCK, Mxfp4Matrix

Tensors = Mapping[str, torch.Tensor]
"""Tensors by role; a plain tensor's is "" or "weight"."""

_MERGED = re.compile(r"(.*\.experts\.(?:gate_up|down)_proj)(?:_(blocks|scales|bias))?")
# Roles of a module's tensors, by method. Others are plain tensors of their own.
_ROLES: dict[str, frozenset[str]] = {"mxfp4": frozenset()}


def split_name(name: str, method: str) -> tuple[str, str]:
    """(module, role) of a tensor; role "" of a plain one, whose module is its whole name."""
    merged = _MERGED.fullmatch(name)
    if merged is not None:
        return merged[1], merged[2] or ""
    module, _, role = name.rpartition(".")
    return (module, role) if role in _ROLES[method] else (name, "")


def open_merged(
    module: str, part: str, tensors: Tensors, *, num_experts: int, interleaved: bool
) -> CodedMatrix:
    """`part` ("gate", "up" or "down") of all experts of a merged tensor, one below another.

    Codes have outputs before inputs, [E, N, K / 32, 16]; numbers inputs before outputs, [E, K, N].
    `interleaved`: outputs 2i and 2i + 1 of gate and up are gate i and up i, else gates come first.
    """
    if "blocks" in tensors or "scales" in tensors:
        return _open_mxfp4(module, part, tensors, num_experts)
    weight = tensors[""]
    if weight.dim() != 3 or len(weight) != num_experts or not weight.is_floating_point():
        found = f"{weight.dtype} {tuple(weight.shape)}"
        raise ValueError(f"weight {module}: {found} is none of {num_experts} experts")
    outputs = merged_half(weight, part, interleaved=interleaved).transpose(1, 2)
    return StackedMatrix([PlainMatrix(expert) for expert in outputs])


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
