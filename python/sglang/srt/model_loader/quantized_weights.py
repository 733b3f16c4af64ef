"""Finished weights of a quantised Hugging Face checkpoint, one at a time.

The tensors of a matrix (codes, scales, zeros) may lie in different files: they are read together,
by name. Matrices keep their codes where the native kernels can multiply with them, all others
become numbers. Experts come as those of GGUF files (`ExpertLayout.STACKED`), however these files
hold them, so that their codes are one matrix. Formats are in weight_forms.py and in
layers/quantization.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import torch

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.quantization_config import WeightScheme
from sglang.srt.layers.quantization.coded_matrix import CodedMatrix, as_numbers
from sglang.srt.layers.weights import LoadedWeight
from sglang.srt.model_loader.gguf_weights import quantized_weight
from sglang.srt.model_loader.weight_files import SafetensorsIndex, WeightIterator, WeightSource
from sglang.srt.model_loader.weight_forms import merged_half, open_merged, split_name

_INTERLEAVED = frozenset({"gpt_oss"})  # whose merged gates and ups alternate
_Roles = Mapping[str, str]  # a module's tensors: role -> name


@dataclass(frozen=True, slots=True)
class _Job:
    """One finished weight: its name, the tensors it takes by role, and how it is made of them.

    `experts`: it is a stack of so many matrices, None: it is one or a plain tensor.
    """

    name: str
    roles: _Roles
    make: Callable[[Mapping[str, torch.Tensor]], CodedMatrix | torch.Tensor]
    experts: int | None = None


def quantized_weights(
    config: ModelConfig, files: list[Path], dtype: torch.dtype, kernels: ModuleType | None = None
) -> WeightSource:
    """All weights of a checkpoint whose `weight_scheme` is not None.

    With `kernels`, the package sgl_kernel, matrices come as its `QuantizedWeight` where it can
    multiply with their codes; all else comes in `dtype`, or as plain tensors of the files. Raises
    ValueError for a damaged file; walking it also for tensors that are missing, superfluous or
    don't fit each other, which it names.
    """
    if config.weight_scheme is None:
        raise ValueError(f"{config.path}: no weights are quantised")
    index = SafetensorsIndex(files)
    modules: dict[str, dict[str, str]] = {}
    for name in index.names:
        module, role = split_name(name, config.weight_scheme.method)
        modules.setdefault(module, {})[role] = name
    jobs = list(_plan(modules, config, config.weight_scheme))
    return WeightSource(_walk(index, jobs, dtype, kernels), len(jobs))


def _plan(
    modules: Mapping[str, _Roles], config: ModelConfig, scheme: WeightScheme
) -> Iterator[_Job]:
    del scheme
    for module, roles in modules.items():
        parent, _, leaf = module.rpartition(".")
        if parent.endswith(".experts") and leaf in ("gate_up_proj", "down_proj"):
            yield from _merged(parent, leaf, roles, config)
        else:
            yield _Job(module, roles, _plain)


def _plain(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return tensors[""]


def _merged(parent: str, leaf: str, roles: _Roles, config: ModelConfig) -> Iterator[_Job]:
    """Gate and up, or down, of a layer's merged experts, and their biases."""
    interleaved = config.model_type in _INTERLEAVED
    num_experts = 0 if config.moe is None else config.moe.num_experts
    weights = {role: name for role, name in roles.items() if role != "bias"}
    for part in ("gate", "up") if leaf == "gate_up_proj" else ("down",):
        if weights:
            make = partial(
                open_merged,
                f"{parent}.{leaf}",
                part,
                num_experts=num_experts,
                interleaved=interleaved,
            )
            yield _Job(f"{parent}.{part}_proj.weight", weights, make, num_experts)
        if "bias" in roles:
            bias = partial(_merged_bias, part, interleaved)
            yield _Job(f"{parent}.{part}_proj.bias", {"bias": roles["bias"]}, bias)


def _merged_bias(part: str, interleaved: bool, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return merged_half(tensors["bias"], part, interleaved=interleaved)


def _walk(
    index: SafetensorsIndex, jobs: list[_Job], dtype: torch.dtype, kernels: ModuleType | None
) -> WeightIterator:
    for job in jobs:
        with index.read(job.roles.values()) as tensors:
            made = job.make({role: tensors[name] for role, name in job.roles.items()})
            yield job.name, _finished(made, job.experts, dtype, kernels)


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
