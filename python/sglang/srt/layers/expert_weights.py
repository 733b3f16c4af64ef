"""The weights of a mixture's experts: how checkpoints hold them, and how they stay quantised.

`Experts` in layers/moe.py computes with them. Numbers are two parameters of all experts; quantised
weights are one matrix of all experts for each of gate, up and down, as GGUF files have them, or of
gate and up together where numbers were rounded to bytes. Nothing is copied for an expert.

Tensor parallel as in layers/linear.py: every rank has all experts, cut along their width.

Legend: E experts, H hidden width, I an expert's width, here and in the checkpoint.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.quantization.matrix import (
    QUANTIZED_BLOCK,
    QuantizedMatrix,
    QuantizedWeight,
    move_to,
    numbers_like,
)
from sglang.srt.layers.quantization.rounding import Rounding
from sglang.srt.layers.weights import (
    LoadedWeight,
    copy_checked,
    deferred_parameter,
    frozen_parameter,
    give_memory,
)

# (expert, part): the expert None for all of them, the part None for gate and up merged, or down.
ExpertShard = tuple[int | None, str | None]


class ExpertLayout(enum.Enum):
    """How a checkpoint holds the experts.

    MERGED: `gate_up_proj` [E, H, 2I] (gate, then up) and `down_proj` [E, I, H], for products from
    the right. INTERLEAVED: the same, but columns 2i and 2i + 1 are gate i and up i. SEPARATE:
    `{e}.gate_proj.weight` and `{e}.up_proj.weight` [I, H] and `{e}.down_proj.weight` [H, I].
    STACKED: `gate_proj.weight` and `up_proj.weight` [E, I, H] and `down_proj.weight` [E, H, I],
    biases beside them; GGUF files are so, and what is read of quantised checkpoints.
    """

    MERGED = "merged"
    INTERLEAVED = "interleaved"
    SEPARATE = "separate"
    STACKED = "stacked"


@dataclass(frozen=True, slots=True)
class ExpertMatrix:
    """One quantised matrix of every expert: outputs [e * stride + first, ... + count) are e's."""

    matrix: QuantizedMatrix
    stride: int
    first: int
    count: int

    def native(self, kernels: ModuleType, bias: torch.Tensor | None) -> Any:
        """It as `sgl_kernel.ExpertMatrix` with `bias` [E, count]; None when its layouts differ."""
        whole = self.matrix.whole
        if whole is None:
            return None
        return kernels.ExpertMatrix(whole, self.stride, self.first, self.count, bias)

    def codes(self, kernels: ModuleType) -> Any:
        """It as `sgl_kernel.triton.ExpertCodes`; None when its layouts differ."""
        whole = self.matrix.whole
        if whole is None:
            return None
        return kernels.ExpertCodes(whole, self.stride, self.first, self.count)

    def product(
        self, expert: int, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [T, in] times the expert's matrix transposed, plus bias [count]: [T, count]."""
        begin = expert * self.stride + self.first
        return self.matrix.product(x, bias, begin, begin + self.count)


class ExpertWeights(nn.Module):
    """Gate, up and down of E experts, this rank's share of their width.

    Numbers are `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I]; these have no experts once
    `gate` and `up`, or `down`, are quantised. With `bias` there are `gate_up_proj_bias` [E, 2I]
    and `down_proj_bias` [E, H]. Raises ValueError when the width can't be divided over the ranks.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        layout: ExpertLayout,
        bias: bool,
        parallel: ParallelState,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        width = parallel.shard_size(intermediate_size, "expert width")
        self.num_experts, self.hidden_size = num_experts, hidden_size
        self.width, self.intermediate_size = width, intermediate_size
        self.layout = layout
        self.gate_up_proj = deferred_parameter(num_experts, 2 * width, hidden_size, dtype=dtype)
        self.down_proj = deferred_parameter(num_experts, hidden_size, width, dtype=dtype)
        self.gate_up_proj_bias: nn.Parameter | None = None
        self.down_proj_bias: nn.Parameter | None = None
        if bias:
            self.gate_up_proj_bias = frozen_parameter(num_experts, 2 * width, dtype=dtype)
            self.down_proj_bias = frozen_parameter(num_experts, hidden_size, dtype=dtype)
        self.gate: ExpertMatrix | None = None
        self.up: ExpertMatrix | None = None
        self.down: ExpertMatrix | None = None
        self._halves: dict[str, QuantizedWeight | None] = {}  # of gate and up, None: numbers
        self._numbers_loaded = 0  # of gate_up_proj and down_proj
        self._parallel = parallel

    def native_parts(self, kernels: ModuleType) -> tuple[Any, Any, Any] | None:
        """Gate, up and down as `sgl_kernel.ExpertMatrix`, views of what is held here.

        The bias of down is left to rank 0. None when a matrix has parts of different layouts.
        """
        width, both = self.width, self.gate_up_proj_bias
        gate_bias, up_bias = (None, None) if both is None else both.chunk(2, 1)
        if self.gate is not None and self.up is not None:
            gate, up = self.gate.native(kernels, gate_bias), self.up.native(kernels, up_bias)
        else:
            rows = self.gate_up_proj.flatten(0, 1)
            gate = kernels.ExpertMatrix(rows, 2 * width, 0, width, gate_bias)
            up = kernels.ExpertMatrix(rows, 2 * width, width, width, up_bias)
        down_bias = self.down_proj_bias if self._parallel.tp_rank == 0 else None
        if self.down is not None:
            down = self.down.native(kernels, down_bias)
        else:
            rows, hidden = self.down_proj.flatten(0, 1), self.hidden_size
            down = kernels.ExpertMatrix(rows, hidden, 0, hidden, down_bias)
        return None if gate is None or up is None or down is None else (gate, up, down)

    def device_parts(self, kernels: ModuleType) -> tuple[Any, Any] | None:
        """What `mixture` of sgl_kernel.triton takes as gate and up, and as down.

        None when a matrix has parts of different layouts.
        """
        gate_up: Any = self.gate_up_proj
        if self.gate is not None and self.up is not None:
            gate_up = self.gate.codes(kernels), self.up.codes(kernels)
            if None in gate_up:
                return None
        down = self.down_proj if self.down is None else self.down.codes(kernels)
        return None if down is None else (gate_up, down)

    @property
    def is_loaded(self) -> bool:
        """Whether all weights have come; biases don't count."""
        return self._numbers_loaded == self.gate_up_proj.numel() + self.down_proj.numel()

    @property
    def has_integers(self) -> bool:
        """Whether gate and up are quantised, and nothing is FP8."""
        parts = [part.matrix for part in (self.gate, self.up, self.down) if part is not None]
        return self.gate is not None and not any(matrix.is_fp8 for matrix in parts)

    def quantize(self, rounding: Rounding) -> None:
        """Round loaded weights, where widths allow and they are not quantised yet."""
        width, rows = self.width, 2 * self.width
        if self.gate is None and self.hidden_size % QUANTIZED_BLOCK == 0:
            both = QuantizedMatrix([rounding(self.gate_up_proj.data.flatten(0, 1))])
            self._keep_gate_up(
                ExpertMatrix(both, rows, 0, width), ExpertMatrix(both, rows, width, width)
            )
        if self.down is None and width % QUANTIZED_BLOCK == 0:
            self._keep_down(rounding(self.down_proj.data.flatten(0, 1)))

    def checkpoint_tensors(self) -> Iterator[tuple[str, str, ExpertShard | None]]:
        """(name below this module, parameter, shard) of every tensor of the checkpoint."""
        names = [name for name, _ in self.named_parameters()]
        if self.layout is ExpertLayout.STACKED:
            suffixes = (("weight", ""), ("bias", "_bias"))
            for kind, suffix in suffixes[: 1 + ("down_proj_bias" in names)]:
                for part in ("gate", "up", "down"):
                    parameter = ("down_proj" if part == "down" else "gate_up_proj") + suffix
                    yield f"{part}_proj.{kind}", parameter, (None, part)
            return
        if self.layout is not ExpertLayout.SEPARATE:
            yield from ((name, name, None) for name in names)
            return
        for expert in range(self.num_experts):
            for part in ("gate", "up", "down"):
                parameter = "down_proj" if part == "down" else "gate_up_proj"
                yield f"{expert}.{part}_proj.weight", parameter, (expert, part)

    def weight_loader(
        self, param_name: str, loaded: LoadedWeight, shard_id: ExpertShard | None = None
    ) -> None:
        """Take this rank's part of a whole checkpoint tensor, see `ExpertLayout`.

        `shard_id` is that of `checkpoint_tensors`. A quantised tensor is STACKED, with the outputs
        of all experts one below another; it stays so, but for gates whose ups come as numbers, ups
        whose gates do, and columns that would cut its blocks. Raises ValueError for a wrong name or
        shape.
        """
        expert, part = shard_id or (None, None)
        if not isinstance(loaded, torch.Tensor):
            self._load_quantized(loaded, str(part))
        elif expert is not None:
            self._load_separate(param_name, loaded, expert, str(part))
        elif part is not None:
            self._load_stacked(param_name, loaded, part)
        elif param_name == "gate_up_proj":
            give_memory(self.gate_up_proj)
            for target, half in self._gate_and_up(loaded, self.gate_up_proj.data):
                self._copy(target, half.transpose(1, 2), param_name)
        elif param_name == "down_proj":
            self._check_width(loaded, 1, self.intermediate_size)
            give_memory(self.down_proj)
            self._copy(self.down_proj.data, self._cut(loaded, 1).transpose(1, 2), param_name)
        elif param_name == "gate_up_proj_bias" and self.gate_up_proj_bias is not None:
            for target, half in self._gate_and_up(loaded, self.gate_up_proj_bias.data):
                copy_checked(target, half, param_name)
        elif param_name == "down_proj_bias" and self.down_proj_bias is not None:
            copy_checked(self.down_proj_bias.data, loaded, param_name)
        else:
            raise ValueError(f"Experts has no parameter {param_name!r}")

    def _load_separate(self, param_name: str, loaded: torch.Tensor, expert: int, part: str) -> None:
        what = f"{part} of expert {expert}"
        give_memory(self.get_parameter(param_name))
        if param_name == "down_proj":
            self._check_width(loaded, 1, self.intermediate_size)
            self._copy(self.down_proj.data[expert], self._cut(loaded, 1), what)
            return
        self._check_width(loaded, 0, self.intermediate_size)
        target = self._half(self.gate_up_proj.data[expert], 0, part)
        self._copy(target, self._cut(loaded, 0), what)

    def _load_stacked(self, param_name: str, loaded: torch.Tensor, part: str) -> None:
        what = f"{part} of all experts"
        give_memory(self.get_parameter(param_name))
        target = self.get_parameter(param_name).data
        if part == "down":
            if param_name == "down_proj":
                self._check_width(loaded, 2, self.intermediate_size)
                self._copy(target, self._cut(loaded, 2), what)
            else:
                copy_checked(target, loaded, what)
            return
        self._check_width(loaded, 1, self.intermediate_size)
        half, loaded = self._half(target, 1, part), self._cut(loaded, 1)
        if param_name == "gate_up_proj":
            self._copy(half, loaded, what)
            self._halves[part] = None
            self._settle_gate_up()
        else:
            copy_checked(half, loaded, what)

    def _load_quantized(self, loaded: QuantizedWeight, part: str) -> None:
        rows, columns = self.intermediate_size, self.hidden_size
        if part == "down":
            rows, columns = columns, rows
        if loaded.shape != (self.num_experts * rows, columns):
            raise ValueError(
                f"{part} of all experts: the checkpoint has shape {tuple(loaded.shape)}, "
                f"the model needs {(self.num_experts * rows, columns)}"
            )
        if part != "down":
            self._halves[part] = move_to(self._own_rows(loaded), self.gate_up_proj.device)
            self._settle_gate_up()
        elif self._parallel.tp_size == 1:
            self._keep_down(loaded)
        elif self.width % QUANTIZED_BLOCK == 0:
            first = self._parallel.tp_rank * self.width
            self._keep_down(loaded.columns(first, first + self.width))
        else:
            wide = numbers_like(loaded, self.down_proj)
            self._load_stacked("down_proj", wide.view(self.num_experts, rows, columns), part)

    def _own_rows(self, loaded: QuantizedWeight) -> QuantizedWeight:
        """This rank's outputs of every expert's gate or up."""
        if self._parallel.tp_size == 1:
            return loaded
        rows = torch.arange(loaded.shape[0], device="cpu")
        return loaded.take(self._cut(rows.view(self.num_experts, -1), 1).reshape(-1))

    def _settle_gate_up(self) -> None:
        """Once gate and up are both there: quantised if both are, else numbers."""
        if len(self._halves) < 2:
            return
        kept = {part: half for part, half in self._halves.items() if half is not None}
        self._halves = {}
        if len(kept) == 2:
            gate, up = (QuantizedMatrix([kept[part]]) for part in ("gate", "up"))
            self._keep_gate_up(*(ExpertMatrix(m, self.width, 0, self.width) for m in (gate, up)))
            return
        for part, half in kept.items():
            wide = half.dequantize(self.gate_up_proj.dtype)
            target = self._half(self.gate_up_proj.data, 1, part)
            target.copy_(wide.view(target.shape))

    def _keep_gate_up(self, gate: ExpertMatrix, up: ExpertMatrix) -> None:
        self.gate, self.up = gate, up
        self.gate_up_proj.data = self.gate_up_proj.data.new_empty(
            0, 2 * self.width, self.hidden_size
        )

    def _keep_down(self, weight: QuantizedWeight) -> None:
        matrix = QuantizedMatrix([move_to(weight, self.down_proj.device)])
        self.down = ExpertMatrix(matrix, self.hidden_size, 0, self.hidden_size)
        self.down_proj.data = self.down_proj.data.new_empty(0, self.hidden_size, self.width)

    def _copy(self, target: torch.Tensor, source: torch.Tensor, what: str) -> None:
        copy_checked(target, source, what)
        self._numbers_loaded += target.numel()

    def _half(self, both: torch.Tensor, dim: int, part: str) -> torch.Tensor:
        """The gate's or the up's part of both, which stand one after the other along `dim`."""
        return both.narrow(dim, 0 if part == "gate" else self.width, self.width)

    def _gate_and_up(
        self, loaded: torch.Tensor, target: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        """(rows of the parameter, this rank's part of a merged tensor's last dimension), twice.

        Views only: a merged tensor of all experts may be gigabytes.
        """
        self._check_width(loaded, -1, 2 * self.intermediate_size)
        if self.layout is ExpertLayout.INTERLEAVED:
            gate, up = loaded[..., ::2], loaded[..., 1::2]
        else:
            gate, up = loaded.chunk(2, -1)
        first, second = target.narrow(1, 0, self.width), target.narrow(1, self.width, self.width)
        return (first, self._cut(gate, -1)), (second, self._cut(up, -1))

    def _cut(self, whole: torch.Tensor, dim: int) -> torch.Tensor:
        return whole.narrow(dim, self._parallel.tp_rank * self.width, self.width)

    def _check_width(self, loaded: torch.Tensor, dim: int, expected: int) -> None:
        if loaded.dim() <= abs(dim) - (dim < 0) or loaded.shape[dim] != expected:
            raise ValueError(
                f"the checkpoint has shape {tuple(loaded.shape)}, dimension {dim} should be "
                f"{expected}"
            )
