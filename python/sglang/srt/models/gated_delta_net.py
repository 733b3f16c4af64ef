"""Gated DeltaNet as Qwen3-Next and Qwen3.5 have it: projections, convolution, state, gated norm.

Value heads and the key heads that they go with are split over tensor-parallel ranks. Source: arXiv
2412.06464, the published configurations, and the names and shapes of published weights.

Legend: T packed new tokens, H value heads and J key heads of this rank, K and V head widths, C
channels of the convolution.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.model_traits import LinearConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    RowParallelLinear,
)
from sglang.srt.layers.linear_attention.mixer import LinearAttention, StatePlanner
from sglang.srt.layers.rows import take_rows
from sglang.srt.layers.weights import copy_checked, frozen_parameter
from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class _Parts(NamedTuple):
    """`mixed` [T, C] goes through the convolution, `gate` [T, H, V]; `a` and `b` [T, H]."""

    mixed: torch.Tensor
    gate: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor


class ShortConv(nn.Module):
    """The convolution's filters [C, 1, size]: channels of queries, of keys, of values."""

    def __init__(
        self, widths: tuple[int, ...], size: int, parallel: ParallelState, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self._parallel, self._widths = parallel, widths
        share = sum(parallel.shard_size(width, "channels") for width in widths)
        self.weight = frozen_parameter(share, 1, size, dtype=dtype)

    def weight_loader(self, param_name: str, loaded: torch.Tensor) -> None:
        """Copy this rank's channels of "weight"; ValueError for a wrong name or shape."""
        if param_name != "weight" or len(loaded) != sum(self._widths):
            rows = sum(self._widths)
            raise ValueError(f"{param_name}: {len(loaded)} channels instead of {rows} of a weight")
        size, rank = self._parallel.tp_size, self._parallel.tp_rank
        own = [part.chunk(size)[rank] for part in loaded.split_with_sizes(self._widths)]
        copy_checked(self.weight.data, torch.cat(own), param_name)


class GatedNorm(nn.Module):
    """Root-mean-square norm of each head in float32, times a weight and silu(gate)."""

    def __init__(self, width: int, eps: float, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = frozen_parameter(width, dtype=dtype)
        self.eps = eps

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """x and gate [T, H, V]: the same in the weight's type."""
        normed = F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps)
        return (normed * F.silu(gate.float())).to(self.weight.dtype)

    def weight_loader(self, param_name: str, loaded: torch.Tensor) -> None:
        """Copy "weight"; ValueError for a wrong name or shape."""
        if param_name != "weight":
            raise ValueError(f"GatedNorm has no parameter {param_name!r}")
        copy_checked(self.weight.data, loaded, param_name)


class GatedDeltaNet(nn.Module):
    """What stands in place of self-attention in layer `layer_id`."""

    def __init__(
        self,
        config: ModelConfig,
        linear: LinearConfig,
        layer_id: int,
        planner: StatePlanner,
        parallel: ParallelState,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.linear = linear
        self._parallel = parallel
        self.key_heads = parallel.shard_size(linear.key_heads, "key heads of linear attention")
        self.value_heads = parallel.shard_size(
            linear.value_heads, "value heads of linear attention"
        )
        hidden = config.hidden_size
        keys, values = linear.key_heads * linear.key_dim, linear.value_heads * linear.value_dim
        self.in_proj_ba: MergedColumnParallelLinear
        if linear.interleaved:
            self.in_proj_qkvz = ColumnParallelLinear(
                hidden, 2 * keys + 2 * values, parallel=parallel, dtype=dtype
            )
            self.in_proj_ba = ColumnParallelLinear(
                hidden, 2 * linear.value_heads, parallel=parallel, dtype=dtype
            )
        else:
            self.in_proj_qkv = MergedColumnParallelLinear(
                hidden, (keys, keys, values), parallel=parallel, dtype=dtype
            )
            self.in_proj_z = ColumnParallelLinear(hidden, values, parallel=parallel, dtype=dtype)
            both = (linear.value_heads, linear.value_heads)
            self.in_proj_ba = MergedColumnParallelLinear(
                hidden, both, parallel=parallel, dtype=dtype
            )
        self.conv1d = ShortConv((keys, keys, values), linear.conv_size, parallel, dtype)
        self.A_log = frozen_parameter(self.value_heads, dtype=torch.float32)
        self.dt_bias = frozen_parameter(self.value_heads, dtype=torch.float32)
        self.norm = GatedNorm(linear.value_dim, config.rms_norm_eps, dtype=dtype)
        self.out_proj = RowParallelLinear(values, hidden, parallel=parallel, dtype=dtype)
        self.attn = LinearAttention(
            layer_id,
            planner,
            key_heads=self.key_heads,
            value_heads=self.value_heads,
            key_dim=linear.key_dim,
            value_dim=linear.value_dim,
        )

    def forward(
        self, x: torch.Tensor, forward_batch: ForwardBatch, *, rows_pruned: bool
    ) -> torch.Tensor:
        """From x [T, hidden]: [T, hidden], or [R, hidden] when `rows_pruned`."""
        parts = self._interleaved(x) if self.linear.interleaved else self._plain(x)
        decay = -self.A_log.exp() * F.softplus(parts.a.float() + self.dt_bias)
        strength = parts.b.float().sigmoid()
        filters = self.conv1d.weight.squeeze(1)
        read = self.attn(parts.mixed, decay, strength, filters, forward_batch)
        gate = parts.gate
        if rows_pruned:
            rows = forward_batch.logits_rows
            read, gate = take_rows(read, rows), take_rows(gate, rows)
        output: torch.Tensor = self.out_proj(self.norm(read, gate).flatten(1))
        return output

    def _interleaved(self, x: torch.Tensor) -> _Parts:
        """Of projections whose outputs come key head by key head, each with its values' parts."""
        one, count = self.linear, self.value_heads // self.key_heads
        values = count * one.value_dim
        heads = self.in_proj_qkvz(x).view(len(x), self.key_heads, -1)
        widths = (one.key_dim, one.key_dim, values, values)
        q, k, v, z = heads.split_with_sizes(widths, -1)
        b, a = self.in_proj_ba(x).view(len(x), self.key_heads, 2, count).unbind(-2)
        mixed = torch.cat([part.flatten(1) for part in (q, k, v)], -1)
        gate = z.reshape(len(x), self.value_heads, one.value_dim)
        return _Parts(mixed, gate, a.flatten(1), b.flatten(1))

    def _plain(self, x: torch.Tensor) -> _Parts:
        gate = self.in_proj_z(x).view(len(x), self.value_heads, self.linear.value_dim)
        b, a = self.in_proj_ba(x).chunk(2, -1)
        return _Parts(self.in_proj_qkv(x), gate, a, b)

    def weight_loader(self, param_name: str, loaded: torch.Tensor) -> None:
        """Copy this rank's heads of "A_log" or "dt_bias"; ValueError for a wrong name or shape."""
        target = self._parameters.get(param_name)
        if target is None or len(loaded) != self.linear.value_heads:
            raise ValueError(f"{param_name}: {tuple(loaded.shape)} is not one for each value head")
        own = loaded.chunk(self._parallel.tp_size)[self._parallel.tp_rank]
        copy_checked(target.data, own, param_name)
