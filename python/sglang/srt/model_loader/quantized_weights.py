"""Finished weights of a quantised Hugging Face checkpoint, one at a time.

The tensors of a matrix (codes, scales, zeros) may lie in different files: they are read together,
by name. Matrices keep their codes where the native kernels can multiply with them, all others
become numbers. Experts come as those of GGUF files (`ExpertLayout.STACKED`), however these files
hold them, so that their codes are one matrix. Formats are in weight_forms.py and in
layers/quantization.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import torch

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.quantization_config import WeightScheme
from sglang.srt.layers.quantization.coded_matrix import (
    CodedMatrix,
    PlainMatrix,
    as_numbers,
)
from sglang.srt.layers.quantization.grouped_integers import stack_matrices
from sglang.srt.layers.quantization.scaled_floats import stack_floats
from sglang.srt.layers.weights import LoadedWeight
from sglang.srt.model_loader.gguf_weights import quantized_weight
from sglang.srt.model_loader.weight_files import (
    SafetensorsIndex,
    Wanted,
    WeightIterator,
    WeightSource,
)
from sglang.srt.model_loader.weight_forms import merged_half, open_merged, open_module, split_name

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj")
_MERGED = re.compile(r"(.*\.experts)\.(gate_up|down)_proj")
_INTERLEAVED = frozenset({"gpt_oss"})  # whose merged gates and ups alternate

_Roles = Mapping[str, str]  # a module's tensors: role -> name
_Tensors = Mapping[str, torch.Tensor]  # by name


@dataclass(frozen=True, slots=True)
class _Job:
    """One finished weight: its name, the tensors that it takes, and how it is made of them.

    `experts`: it is a stack of so many matrices, None: it is one or a plain tensor.
    """

    name: str
    takes: tuple[str, ...]
    make: Callable[[_Tensors], CodedMatrix | torch.Tensor]
    experts: int | None = None


def quantized_weights(
    config: ModelConfig,
    files: list[Path],
    dtype: torch.dtype,
    kernels: ModuleType | None = None,
    wanted: Wanted | None = None,
) -> WeightSource:
    """All weights of a checkpoint whose `weight_scheme` is not None.

    With `kernels`, the package sgl_kernel, matrices come as its `QuantizedWeight` where it can
    multiply with their codes; all else comes in `dtype`, or as plain tensors of the files. Raises
    ValueError for a damaged file; walking it also for tensors that are missing, superfluous or
    don't fit each other, which it names. `wanted` says by name which tensors are read; None: all
    but what `is_draft_weight`.
    """
    if config.weight_scheme is None:
        raise ValueError(f"{config.path}: no weights are quantised")
    index = SafetensorsIndex(files)
    modules: dict[str, dict[str, str]] = {}
    for name in index.names:
        # Without this experts behind the last layer would be read for nothing.
        if config.is_draft_weight(name) if wanted is None else not wanted(name):
            continue
        own = config.own_weight_name(name)
        module, role = split_name(own, config.weight_scheme.method)
        modules.setdefault(module, {})[role] = name
    jobs = list(_plan(modules, config, config.weight_scheme))
    return WeightSource(_walk(index, jobs, dtype, kernels), len(jobs))


def _plan(
    modules: Mapping[str, _Roles], config: ModelConfig, scheme: WeightScheme
) -> Iterator[_Job]:
    num_experts = 0 if config.moe is None else config.moe.num_experts
    stacks: dict[tuple[str, str], dict[int, _Roles]] = {}
    for module, roles in modules.items():
        if expert := _EXPERT.fullmatch(module):
            stacks.setdefault((expert[1], expert[3]), {})[int(expert[2])] = roles
        elif merged := _MERGED.fullmatch(module):
            parts = ("down",) if merged[2] == "down" else ("gate", "up")
            for part in parts:
                interleaved = config.model_type in _INTERLEAVED
                yield from _merged(module, f"{merged[1]}.{part}_proj", part, roles, num_experts,
                                   interleaved)  # fmt: skip
        elif "" in roles:
            yield _Job(module, (roles[""],), partial(_plain, roles[""]))
        else:
            make = partial(_module, scheme, module, roles)
            yield _Job(f"{module}.weight", tuple(roles.values()), make)
    for (parent, part), experts in stacks.items():
        yield _stack(parent, part, experts, num_experts, scheme)


def _plain(name: str, tensors: _Tensors) -> torch.Tensor:
    return tensors[name]


def _module(
    scheme: WeightScheme, module: str, roles: _Roles, tensors: _Tensors
) -> CodedMatrix | torch.Tensor:
    return open_module(scheme, module, {role: tensors[name] for role, name in roles.items()})


def _merged(
    module: str, stack: str, part: str, roles: _Roles, num_experts: int, interleaved: bool
) -> Iterator[_Job]:
    """One part of a layer's merged experts, and its biases."""
    weights = {role: name for role, name in roles.items() if role != "bias"}

    def make(tensors: _Tensors) -> CodedMatrix:
        found = {role: tensors[name] for role, name in weights.items()}
        return open_merged(module, part, found, num_experts=num_experts, interleaved=interleaved)

    def make_bias(tensors: _Tensors) -> torch.Tensor:
        return merged_half(tensors[roles["bias"]], part, interleaved=interleaved)

    if weights:
        yield _Job(f"{stack}.weight", tuple(weights.values()), make, num_experts)
    if "bias" in roles:
        yield _Job(f"{stack}.bias", (roles["bias"],), make_bias)


def _stack(
    parent: str, part: str, experts: Mapping[int, _Roles], num_experts: int, scheme: WeightScheme
) -> _Job:
    """The separate matrices of all experts, one below another.

    Raises ValueError for experts that are missing, and for more than there are.
    """
    for expert in sorted(set(range(num_experts)) ^ set(experts)):
        what = "is missing" if expert < num_experts else f"is beyond {num_experts} experts"
        raise ValueError(f"weight {parent}.{expert}.{part}_proj.weight {what}")

    def make(tensors: _Tensors) -> CodedMatrix:
        found: list[CodedMatrix] = []
        for expert in range(num_experts):
            name = f"{parent}.{expert}.{part}_proj"
            one = _module(scheme, name, experts[expert], tensors)
            if isinstance(one, torch.Tensor):
                if one.dim() != 2:
                    raise ValueError(f"weight {name}.weight: shape {tuple(one.shape)}")
                one = PlainMatrix(one)
            if found and one.shape != found[0].shape:
                raise ValueError(f"weight {name}.weight: shape {one.shape}, not {found[0].shape}")
            found.append(one)
        return stack_floats(found) or stack_matrices(found)

    takes = tuple(name for roles in experts.values() for name in roles.values())
    return _Job(f"{parent}.{part}_proj.weight", takes, make, num_experts)


def _walk(
    index: SafetensorsIndex, jobs: list[_Job], dtype: torch.dtype, kernels: ModuleType | None
) -> WeightIterator:
    for job in jobs:
        with index.read(job.takes) as tensors:
            yield job.name, _finished(job.make(tensors), job.experts, dtype, kernels)


def _finished(
    made: CodedMatrix | torch.Tensor,
    experts: int | None,
    dtype: torch.dtype,
    kernels: ModuleType | None,
) -> LoadedWeight:
    if isinstance(made, torch.Tensor):
        return made
    kept = None if kernels is None else made.block_codes()
    if kept is not None and kernels is not None:
        return quantized_weight(kernels, kept)
    numbers = as_numbers(made, dtype)
    return numbers if experts is None else numbers.view(experts, -1, numbers.shape[1])
