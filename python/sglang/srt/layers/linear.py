"""Linear layers split over tensor-parallel ranks, and how checkpoint tensors enter them.

Models build their projections from these classes; the loader hands whole checkpoint tensors to
`weight_loader`, which cuts out this rank's part. Parameters are frozen: this engine never trains.
Nothing here knows checkpoint names.

Column parallel: the outputs are split, no communication. Row parallel: the inputs are split, the
partial sums are added over the ranks (Megatron-LM, arXiv 1909.08053, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.products import linear


def frozen_parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """An uninitialised parameter without gradient on the current default device."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


def copy_checked(target: torch.Tensor, source: torch.Tensor, what: str) -> None:
    """Copy `source` into `target`, converting the dtype; ValueError when the shapes differ."""
    if target.shape != source.shape:
        raise ValueError(
            f"{what}: the checkpoint has shape {tuple(source.shape)}, "
            f"the model needs {tuple(target.shape)}"
        )
    target.copy_(source)


class _ShardedLinear(nn.Module):
    """Weight [out of this rank, in of this rank] and optional bias."""

    bias: nn.Parameter | None

    def __init__(
        self, out_features: int, in_features: int, bias_features: int | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.weight = frozen_parameter(out_features, in_features, dtype=dtype)
        if bias_features is None:
            self.register_parameter("bias", None)
        else:
            self.bias = frozen_parameter(bias_features, dtype=dtype)

    def _parameter(self, param_name: str) -> torch.Tensor:
        """The tensor called "weight" or "bias"; ValueError for anything this layer lacks."""
        if param_name == "weight":
            return self.weight.data
        if param_name == "bias" and self.bias is not None:
            return self.bias.data
        raise ValueError(f"{type(self).__name__} has no parameter {param_name!r}")


class MergedColumnParallelLinear(_ShardedLinear):
    """Several projections of one input in one product, each split over the ranks.

    `output_sizes` are the whole widths; `forward` [*, input_size] -> [*, sum of this rank's
    widths], the projections one after another.
    """

    def __init__(
        self,
        input_size: int,
        output_sizes: Sequence[int],
        *,
        bias: bool = False,
        parallel: ParallelState,
        dtype: torch.dtype,
    ) -> None:
        self.shard_sizes = tuple(parallel.shard_size(n, "output width") for n in output_sizes)
        width = sum(self.shard_sizes)
        super().__init__(width, input_size, width if bias else None, dtype)
        self.output_sizes = tuple(output_sizes)
        self._parallel = parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)

    def weight_loader(
        self, param_name: str, loaded: torch.Tensor, shard_id: int | None = None
    ) -> None:
        """Copy this rank's part of projection `shard_id` (None: all, concatenated in order).

        `param_name` is "weight" or "bias", `loaded` the whole tensor of the checkpoint. Raises
        ValueError for a wrong name, shape or shard.
        """
        if shard_id is None:
            expected = sum(self.output_sizes)
            if loaded.shape[0] != expected:
                raise ValueError(f"{param_name}: {loaded.shape[0]} rows instead of {expected}")
            for i, part in enumerate(torch.split(loaded, list(self.output_sizes))):
                self.weight_loader(param_name, part, i)
            return
        if not 0 <= shard_id < len(self.output_sizes):
            raise ValueError(f"{type(self).__name__} has no shard {shard_id!r}")
        if loaded.shape[0] != self.output_sizes[shard_id]:
            raise ValueError(
                f"{param_name} of shard {shard_id}: the checkpoint has {loaded.shape[0]} rows, "
                f"the model needs {self.output_sizes[shard_id]}"
            )
        size = self.shard_sizes[shard_id]
        offset = sum(self.shard_sizes[:shard_id])
        target = self._parameter(param_name).narrow(0, offset, size)
        source = loaded.narrow(0, self._parallel.tp_rank * size, size)
        copy_checked(target, source, f"{param_name} of shard {shard_id}")


class ColumnParallelLinear(MergedColumnParallelLinear):
    """One projection whose outputs are split: [*, input_size] -> [*, output_size / tp_size]."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        bias: bool = False,
        parallel: ParallelState,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(input_size, (output_size,), bias=bias, parallel=parallel, dtype=dtype)


class QKVParallelLinear(_ShardedLinear):
    """Query, key and value projections in one product, split by heads.

    `forward` [*, hidden] -> [*, q_size + k_size + v_size] (this rank's widths); `split` cuts it.
    With more ranks than kv heads, neighbouring ranks hold the same kv head. Raises ValueError
    when heads cannot be divided.
    """

    def __init__(
        self,
        hidden_size: int,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        v_head_dim: int | None = None,
        bias: bool = False,
        parallel: ParallelState,
        dtype: torch.dtype,
    ) -> None:
        v_dim = head_dim if v_head_dim is None else v_head_dim
        heads = parallel.shard_size(num_heads, "attention heads")
        if num_kv_heads >= parallel.tp_size:
            kv_heads = parallel.shard_size(num_kv_heads, "kv heads")
            kv_index = parallel.tp_rank
        else:
            if parallel.tp_size % num_kv_heads:
                raise ValueError(f"{num_kv_heads} kv heads over {parallel.tp_size} ranks")
            kv_heads = 1
            kv_index = parallel.tp_rank // (parallel.tp_size // num_kv_heads)
        self.num_heads, self.num_kv_heads = heads, kv_heads
        self.q_size = heads * head_dim
        self.k_size = kv_heads * head_dim
        self.v_size = kv_heads * v_dim
        # shard -> (first row here, rows here, first row in the checkpoint, rows there)
        self._shards = {
            "q": (0, self.q_size, parallel.tp_rank * self.q_size, num_heads * head_dim),
            "k": (self.q_size, self.k_size, kv_index * self.k_size, num_kv_heads * head_dim),
            "v": (
                self.q_size + self.k_size,
                self.v_size,
                kv_index * self.v_size,
                num_kv_heads * v_dim,
            ),
        }
        width = self.q_size + self.k_size + self.v_size
        super().__init__(width, hidden_size, width if bias else None, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)

    def split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views of q, k and v in the output of `forward`."""
        q, k, v = torch.split(qkv, [self.q_size, self.k_size, self.v_size], dim=-1)
        return q, k, v

    def weight_loader(self, param_name: str, loaded: torch.Tensor, shard_id: str) -> None:
        """Copy this rank's heads of `shard_id` ("q", "k" or "v") from a whole checkpoint tensor.

        Raises ValueError for a wrong name, shape or shard.
        """
        if shard_id not in self._shards:
            raise ValueError(f"QKVParallelLinear has no shard {shard_id!r}")
        offset, rows, first, total = self._shards[shard_id]
        if loaded.shape[0] != total:
            raise ValueError(
                f"{param_name} of {shard_id}: the checkpoint has {loaded.shape[0]} rows, "
                f"the model needs {total}"
            )
        target = self._parameter(param_name).narrow(0, offset, rows)
        copy_checked(target, loaded.narrow(0, first, rows), f"{param_name} of {shard_id}")


class RowParallelLinear(_ShardedLinear):
    """A projection whose inputs are split: [*, input_size / tp_size] -> [*, output_size].

    The ranks' partial sums are added; the bias is added once, after the sum.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        bias: bool = False,
        parallel: ParallelState,
        dtype: torch.dtype,
    ) -> None:
        shard = parallel.shard_size(input_size, "input width")
        super().__init__(output_size, shard, output_size if bias else None, dtype)
        self.input_size = input_size
        self._parallel = parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._parallel.tp_size == 1:
            return linear(x, self.weight, self.bias)
        total = self._parallel.all_reduce(linear(x, self.weight))
        return total if self.bias is None else total + self.bias

    def weight_loader(self, param_name: str, loaded: torch.Tensor) -> None:
        """Copy this rank's columns of "weight", or the whole "bias".

        Raises ValueError for a wrong name or shape.
        """
        target = self._parameter(param_name)
        if param_name == "weight":
            if loaded.shape[-1] != self.input_size:
                raise ValueError(
                    f"weight: the checkpoint has {loaded.shape[-1]} columns, "
                    f"the model needs {self.input_size}"
                )
            shard = target.shape[1]
            loaded = loaded.narrow(1, self._parallel.tp_rank * shard, shard)
        copy_checked(target, loaded, param_name)
