"""`WeightOwner`: a layer with one weight matrix, loaded as numbers or as quantised parts.

Linear layers, the embedding and the head are such layers. A checkpoint may give some rows of a
merged weight quantised and others not: then all become numbers.
"""

from __future__ import annotations

import torch
from torch import nn

from sglang.srt.layers.products import linear
from sglang.srt.layers.quantization.matrix import (
    QUANTIZED_BLOCK,
    QuantizedMatrix,
    QuantizedWeight,
    move_to,
)
from sglang.srt.layers.quantization.rounding import Rounding

LoadedWeight = torch.Tensor | QuantizedWeight


def frozen_parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """An uninitialised parameter without gradient on the current default device."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


def deferred_parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """As `frozen_parameter`; on a GPU without memory before `give_memory`, and all one number.

    Weights that stay quantised never need it. On a CPU memory that is never written is never
    committed, so there it costs nothing to have it.
    """
    if torch.get_default_device().type == "cpu":
        return frozen_parameter(*shape, dtype=dtype)
    return nn.Parameter(torch.empty(1, dtype=dtype).expand(shape), requires_grad=False)


def give_memory(parameter: nn.Parameter) -> None:
    """Give a `deferred_parameter` its memory, uninitialised, before numbers are written there.

    Others have theirs and keep it.
    """
    data = parameter.data
    if data.numel() > 1 and not any(data.stride()):
        parameter.data = torch.empty_like(data, memory_format=torch.contiguous_format)


def copy_checked(target: torch.Tensor, source: torch.Tensor, what: str) -> None:
    """Copy `source` into `target`, converting the dtype; ValueError when the shapes differ."""
    if target.shape != source.shape:
        raise ValueError(
            f"{what}: the checkpoint has shape {tuple(source.shape)}, "
            f"the model needs {tuple(target.shape)}"
        )
    target.copy_(source)


def narrow_rows(loaded: LoadedWeight, first: int, count: int) -> LoadedWeight:
    """Rows [first, first + count) of what a checkpoint gave."""
    if isinstance(loaded, torch.Tensor):
        return loaded.narrow(0, first, count)
    return loaded.rows(first, first + count)


class WeightOwner(nn.Module):
    """Weight [N, K]. `quantized` is the weight, and `weight` has no rows, once all rows came so."""

    def __init__(self, num_rows: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = deferred_parameter(num_rows, width, dtype=dtype)
        self.quantized: QuantizedMatrix | None = None
        self._parts: list[tuple[int, QuantizedWeight]] = []
        self._rows_loaded = 0

    def product(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        first: int = 0,
        last: int | None = None,
    ) -> torch.Tensor:
        """x [*, K] times the outputs [first, last) of the weight, plus their bias.

        `last` None: to the end.
        """
        if self.quantized is not None:
            return self.quantized.product(x, bias, first, last)
        weight = self.weight if first == 0 and last is None else self.weight[first:last]
        return linear(x, weight, bias)

    def load_rows(self, first: int, source: LoadedWeight, what: str) -> None:
        """Take rows of the weight from `first` on; ValueError when the shapes differ."""
        count, width = source.shape[0], self.weight.shape[1]
        if isinstance(source, torch.Tensor):
            give_memory(self.weight)
            copy_checked(self.weight.data[first : first + count], source, what)
        elif source.shape[1] != width:
            raise ValueError(f"{what}: the checkpoint has {source.shape[1]} columns, not {width}")
        else:
            self._parts.append((first, move_to(source, self.weight.device)))
        self._rows_loaded += count
        if self._parts and self._rows_loaded == len(self.weight):
            self._settle()

    @property
    def is_loaded(self) -> bool:
        """Whether all rows have come."""
        return self.quantized is not None or self._rows_loaded == len(self.weight)

    def quantize(self, rounding: Rounding) -> None:
        """Round a loaded weight, if its width allows and it is not quantised yet.

        Side effect: `weight` has no rows afterwards.
        """
        rows, width = self.weight.shape
        if self.quantized is None and rows and width % QUANTIZED_BLOCK == 0:
            self.quantized = QuantizedMatrix([rounding(self.weight.data)])
            self.weight.data = self.weight.data.new_empty(0, width)

    def _settle(self) -> None:
        """All rows are there, some of them quantised."""
        parts = sorted(self._parts, key=lambda part: part[0])
        self._parts = []
        if sum(part.shape[0] for _, part in parts) == len(self.weight):
            self.quantized = QuantizedMatrix([part for _, part in parts])
            self.weight.data = self.weight.data.new_empty(0, self.weight.shape[1])
            return
        for first, part in parts:
            rows = self.weight.data[first : first + part.shape[0]]
            part.dequantize_into(rows, num_threads=torch.get_num_threads())
