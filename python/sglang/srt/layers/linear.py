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
from sglang.srt.layers.lora import AdapterPart, LinearAdapters
from sglang.srt.layers.quantization.matrix import QUANTIZED_BLOCK, numbers_like
from sglang.srt.layers.weights import (
    LoadedWeight,
    WeightOwner,
    copy_checked,
    frozen_parameter,
    narrow_rows,
)


class ShardedLinear(WeightOwner):
    """Weight [out of this rank, in of this rank] and optional bias.

    `adapters` (None: none are served) is set once, after the weights are loaded.
    """

    bias: nn.Parameter | None
    adapters: LinearAdapters | None = None

    def __init__(
        self, out_features: int, in_features: int, bias_features: int | None, dtype: torch.dtype
    ) -> None:
        super().__init__(out_features, in_features, dtype)
        self.num_outputs = out_features
        if bias_features is None:
            self.register_parameter("bias", None)
        else:
            self.bias = frozen_parameter(bias_features, dtype=dtype)

    def adapter_part(self, shard_id: int | str | None) -> AdapterPart:
        """Where a checkpoint's projection `shard_id` lies in this layer (None: it is all of it)."""
        raise NotImplementedError

    def adapted(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
        first: int = 0,
        last: int | None = None,
    ) -> torch.Tensor:
        """`product`, with what the rows' adapters add."""
        if self.adapters is None:
            return self.product(x, bias, first, last)
        own = self.adapters.as_bias(x, bias, first, last)
        if own is not None:
            return self.product(x, own, first, last)
        output = self.product(x, bias, first, last)
        self.adapters.add_to(output, x, first)
        return output

    def _load(self, param_name: str, first: int, source: LoadedWeight, what: str) -> None:
        """Take rows of "weight" or entries of "bias" from `first` on.

        Raises ValueError for anything that this layer lacks, and other shapes.
        """
        if param_name == "weight":
            self.load_rows(first, source, what)
        elif param_name == "bias" and self.bias is not None and isinstance(source, torch.Tensor):
            copy_checked(self.bias.data[first : first + len(source)], source, what)
        else:
            raise ValueError(f"{type(self).__name__} has no parameter {param_name!r}")


class MergedColumnParallelLinear(ShardedLinear):
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
        return self.adapted(x, self.bias)

    def adapter_part(self, shard_id: int | str | None) -> AdapterPart:
        """See `ShardedLinear`."""
        shard = shard_id or 0
        assert isinstance(shard, int)
        size = self.shard_sizes[shard]
        first = sum(self.shard_sizes[:shard])
        begin, total = self._parallel.tp_rank * size, self.output_sizes[shard]
        width = self.weight.shape[1]
        return AdapterPart(first, size, begin, total, 0, width, width)

    def weight_loader(
        self, param_name: str, loaded: LoadedWeight, shard_id: int | None = None
    ) -> None:
        """Copy this rank's part of projection `shard_id` (None: all, concatenated in order).

        `param_name` is "weight" or "bias", `loaded` the whole tensor of the checkpoint. Raises
        ValueError for a wrong name, shape or shard.
        """
        if shard_id is None:
            expected = sum(self.output_sizes)
            if loaded.shape[0] != expected:
                raise ValueError(f"{param_name}: {loaded.shape[0]} rows instead of {expected}")
            first = 0
            for i, size in enumerate(self.output_sizes):
                self.weight_loader(param_name, narrow_rows(loaded, first, size), i)
                first += size
            return
        if not 0 <= shard_id < len(self.output_sizes):
            raise ValueError(f"{type(self).__name__} has no shard {shard_id!r}")
        if loaded.shape[0] != self.output_sizes[shard_id]:
            raise ValueError(
                f"{param_name} of shard {shard_id}: the checkpoint has {loaded.shape[0]} rows, "
                f"the model needs {self.output_sizes[shard_id]}"
            )
        size = self.shard_sizes[shard_id]
        source = narrow_rows(loaded, self._parallel.tp_rank * size, size)
        offset = sum(self.shard_sizes[:shard_id])
        self._load(param_name, offset, source, f"{param_name} of shard {shard_id}")


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


class QKVParallelLinear(ShardedLinear):
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
        return self.adapted(x, self.bias)

    def adapter_part(self, shard_id: int | str | None) -> AdapterPart:
        """See `ShardedLinear`."""
        assert isinstance(shard_id, str)
        width = self.weight.shape[1]
        return AdapterPart(*self._shards[shard_id], 0, width, width)

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """[*, hidden] -> [*, q_size]: the queries' part of `forward`."""
        bias = None if self.bias is None else self.bias[: self.q_size]
        return self.adapted(x, bias, 0, self.q_size)

    def keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[*, hidden] -> [*, k_size] and [*, v_size]: the other parts of `forward`."""
        bias = None if self.bias is None else self.bias[self.q_size :]
        both = self.adapted(x, bias, self.q_size)
        return both[..., : self.k_size], both[..., self.k_size :]

    def split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views of q, k and v in the output of `forward`."""
        q, k, v = torch.split(qkv, [self.q_size, self.k_size, self.v_size], dim=-1)
        return q, k, v

    def weight_loader(self, param_name: str, loaded: LoadedWeight, shard_id: str) -> None:
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
        source = narrow_rows(loaded, first, rows)
        self._load(param_name, offset, source, f"{param_name} of {shard_id}")


class RowParallelLinear(ShardedLinear):
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
            return self.adapted(x, self.bias)
        # The ranks' parts of what adapters add are summed with the others.
        total = self._parallel.all_reduce(self.adapted(x))
        return total if self.bias is None else total + self.bias

    def adapter_part(self, shard_id: int | str | None) -> AdapterPart:
        """See `ShardedLinear`."""
        assert shard_id is None
        rows, shard = self.num_outputs, self.weight.shape[1]
        begin = self._parallel.tp_rank * shard
        return AdapterPart(0, rows, 0, rows, begin, shard, self.input_size)

    def weight_loader(self, param_name: str, loaded: LoadedWeight) -> None:
        """Copy this rank's columns of "weight", or the whole "bias".

        Raises ValueError for a wrong name or shape.
        """
        if param_name == "weight":
            if loaded.shape[-1] != self.input_size:
                raise ValueError(
                    f"weight: the checkpoint has {loaded.shape[-1]} columns, "
                    f"the model needs {self.input_size}"
                )
            loaded = self._columns(loaded)
            if loaded.shape[0] != len(self.weight):
                raise ValueError(
                    f"weight: the checkpoint has {loaded.shape[0]} rows, "
                    f"the model needs {len(self.weight)}"
                )
        self._load(param_name, 0, loaded, param_name)

    def _columns(self, loaded: LoadedWeight) -> LoadedWeight:
        """This rank's columns; as numbers where they cut a quantised block."""
        shard = self.weight.shape[1]
        first = self._parallel.tp_rank * shard
        if not isinstance(loaded, torch.Tensor):
            if self._parallel.tp_size == 1:
                return loaded
            if shard % QUANTIZED_BLOCK == 0:
                return loaded.columns(first, first + shard)
            loaded = numbers_like(loaded, self.weight)
        return loaded.narrow(1, first, shard)
