"""From the hidden states of a step to one vector for each request that pools any.

Called by the pooling worker with the rows that the last layer kept. A prompt's vector is finished
on the host, where its chunks are added up (`PoolingState`) and where it is cut and normalised.

Legend: R kept rows, P requests that pool some of them, h hidden size, d vector size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from sglang.srt.layers.weights import LoadedWeight, copy_checked, frozen_parameter


class HeadLinear(nn.Module):
    """Vectors [P, in_features] -> [P, out_features] in float32; whole on every rank."""

    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = False, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.weight = frozen_parameter(out_features, in_features, dtype=dtype)
        if bias:
            self.bias = frozen_parameter(out_features, dtype=dtype)
        else:
            self.register_parameter("bias", None)

    def weight_loader(self, param_name: str, loaded: LoadedWeight) -> None:
        """Copy a whole parameter; ValueError for a wrong name, shape or kind."""
        parameter = {"weight": self.weight, "bias": self.bias}.get(param_name)
        if parameter is None or not isinstance(loaded, torch.Tensor):
            raise ValueError(f"a classifier has no {param_name!r} of this kind")
        copy_checked(parameter.data, loaded, param_name)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(vectors.float(), self.weight.float(), bias)


class Pooler(nn.Module):
    """Adds up each request's rows in float32; `head` None: the sums are the vectors.

    With a head every request pools one row at most.
    """

    def __init__(self, head: nn.Module | None) -> None:
        super().__init__()
        self._head = (head,)  # in a tuple: the module belongs to the model

    def forward(self, hidden: torch.Tensor, num_rows: Sequence[int]) -> torch.Tensor:
        """hidden [R, h] -> float32 [P, d]; `num_rows` [P] rows, at least 1, for each of P.

        A request's sum is over its own rows alone, so it is the same in every batch.
        """
        if list(num_rows) == [1] * len(hidden):  # in a step where nobody pools, too
            sums = hidden.float()
        else:
            parts = torch.split(hidden, list(num_rows))
            sums = torch.stack([rows.float().sum(0) for rows in parts])
        head = self._head[0]
        if head is None:
            return sums
        logits: torch.Tensor = head(sums)
        return logits
