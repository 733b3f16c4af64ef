"""Mixtures of experts: who goes to which expert, and the experts' products over sorted tokens.

Models build a router, one `Experts` and, where they have one, a shared MLP. Experts that no token
chose are not computed; every token's result is the same whatever stands beside it but for the
rounding of products of other heights: its experts are added up in ascending order.

Tensor parallel as in layers/linear.py: every rank has all experts, cut along their width.

Legend: T tokens, E experts, K experts of a token, H hidden width, I an expert's width.
Sources: arXiv 1701.06538, 2101.03961 (top-1), 2006.16668.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.activation import GatedActivation, SiluAndMul
from sglang.srt.layers.expert_weights import ExpertLayout, ExpertWeights
from sglang.srt.layers.products import linear
from sglang.srt.layers.quantization.matrix import rounds_inputs
from sglang.srt.layers.weights import copy_checked, frozen_parameter
from sglang.srt.utils.native import device_kernels_for, kernels_for

# Up to so many tokens one native call is the faster way, or up to so many for each expert on the
# average where codes are multiplied; see benchmark/cpu/bench_experts.py.
_NATIVE_ROWS = 32
# The same for each expert where bfloat16 is multiplied by dot instructions or on tiles.
_NATIVE_ROWS_BY_ISA = {"AVX512_BF16": 32, "AMX": 128}


class Routing(NamedTuple):
    """The experts of every token, int64 [T, K], and their weights, float32 [T, K]."""

    experts: torch.Tensor
    weights: torch.Tensor


def route_by_softmax(logits: torch.Tensor, num_chosen: int, *, renormalize: bool) -> Routing:
    """Softmax over all experts [T, E], the largest `num_chosen` kept.

    `renormalize` divides these by their sum, which is the softmax over the chosen logits alone.
    """
    kernels = _kernels_for_few(logits)
    if kernels is not None:
        kind = kernels.RouteKind.CHOSEN if renormalize else kernels.RouteKind.SOFTMAX
        return Routing(*kernels.route(logits, num_chosen, kind))
    weights, experts = torch.topk(torch.softmax(logits.float(), -1), num_chosen, dim=-1)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return Routing(experts, weights)


def route_by_sigmoid(logits: torch.Tensor, num_chosen: int) -> Routing:
    """The largest `num_chosen` of the logits [T, E], each weighted by its own sigmoid (Llama 4)."""
    kernels = _kernels_for_few(logits)
    if kernels is not None:
        return Routing(*kernels.route(logits, num_chosen, kernels.RouteKind.SIGMOID))
    chosen, experts = torch.topk(logits, num_chosen, dim=-1)
    return Routing(experts, torch.sigmoid(chosen.float()))


def route_in_turns(logits: torch.Tensor, num_chosen: int, tolerance: float) -> Routing:
    """One expert after the other of the logits [T, E], the largest of those that are left.

    Its weight is its share of the softmax over them, without those that are too far from it: by
    more than twice `tolerance`, as a part of the larger of it and of their own size. Weights don't
    add up to 1. Source: arXiv 2409.12136, section 2 (GRIN, without its noise).
    """
    wide = logits.float()
    left, weights, experts = wide, [], []
    for _ in range(num_chosen):
        best, expert = left.max(-1, keepdim=True)
        is_far = (best - wide) / torch.maximum(wide.abs(), best) > 2 * tolerance
        shares = torch.softmax(left.masked_fill(is_far, float("-inf")), -1)
        weights.append(shares.gather(-1, expert))
        experts.append(expert)
        left = left.scatter(-1, expert, float("-inf"))
    return Routing(torch.cat(experts, -1), torch.cat(weights, -1))


def _kernels_for_few(x: torch.Tensor) -> ModuleType | None:
    """The native kernels where they take as many rows as x has."""
    kernels = kernels_for(x)
    if kernels is not None and (len(x) <= _NATIVE_ROWS or kernels.is_recording()):
        return kernels
    return None


class Router(nn.Module):
    """Scores of the experts: [T, H] -> [T, E], the same on every rank.

    `route` of its kinds makes the routing of x [T, H].
    """

    bias: nn.Parameter | None

    def __init__(
        self, hidden_size: int, num_experts: int, *, bias: bool = False, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.weight = frozen_parameter(num_experts, hidden_size, dtype=dtype)
        if bias:
            self.bias = frozen_parameter(num_experts, dtype=dtype)
        else:
            self.register_parameter("bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)

    def route(self, x: torch.Tensor) -> Routing:
        """Experts and weights of x [T, H]."""
        raise NotImplementedError

    def weight_loader(self, param_name: str, loaded: torch.Tensor) -> None:
        """Copy "weight" or "bias"; ValueError for a wrong name or shape."""
        target = self._parameters.get(param_name)
        if target is None:
            raise ValueError(f"Router has no parameter {param_name!r}")
        copy_checked(target.data, loaded, param_name)


class SoftmaxRouter(Router):
    """Routings by `route_by_softmax`: `num_chosen` experts of every token."""

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_chosen: int,
        *,
        renormalize: bool,
        bias: bool = False,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(hidden_size, num_experts, bias=bias, dtype=dtype)
        self.num_chosen, self.renormalize = num_chosen, renormalize

    def route(self, x: torch.Tensor) -> Routing:
        return route_by_softmax(self(x), self.num_chosen, renormalize=self.renormalize)


class SigmoidRouter(Router):
    """Routings by `route_by_sigmoid`: `num_chosen` experts of every token."""

    def __init__(
        self, hidden_size: int, num_experts: int, num_chosen: int, *, dtype: torch.dtype
    ) -> None:
        super().__init__(hidden_size, num_experts, dtype=dtype)
        self.num_chosen = num_chosen

    def route(self, x: torch.Tensor) -> Routing:
        return route_by_sigmoid(self(x), self.num_chosen)


class MixerRouter(Router):
    """Routings by `route_in_turns`: `num_chosen` experts of every token."""

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_chosen: int,
        *,
        tolerance: float,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(hidden_size, num_experts, dtype=dtype)
        self.num_chosen, self.tolerance = num_chosen, tolerance

    def route(self, x: torch.Tensor) -> Routing:
        return route_in_turns(self(x), self.num_chosen, self.tolerance)


class Experts(ExpertWeights):
    """E gated MLPs, down_e(act(gate_up_e(x))), this rank's share of their width.

    `scale_inputs`: a token's weight multiplies what its expert gets (Llama 4), not what it gives.
    `activation` maps [*, 2I] (gate, then up) to [*, I]; None is `SiluAndMul`. The rest is that of
    `ExpertWeights`.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        layout: ExpertLayout,
        scale_inputs: bool = False,
        activation: nn.Module | None = None,
        bias: bool = False,
        parallel: ParallelState,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(
            num_experts,
            hidden_size,
            intermediate_size,
            layout=layout,
            bias=bias,
            parallel=parallel,
            dtype=dtype,
        )
        self.scale_inputs = scale_inputs
        self.act_fn = SiluAndMul() if activation is None else activation
        self._mixture: tuple[Any, Any] = (None, None)

    def forward(
        self, x: torch.Tensor, routing: Routing, added: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The weighted sum over each token's experts: x [T, H] -> [T, H], added over the ranks.

        `added` [T, H], the same on every rank, joins the sum.
        """
        kernels = kernels_for(x) if x.dtype is self.gate_up_proj.dtype else None
        if kernels is not None and self._has_few(kernels, *routing.experts.shape):
            mixture = self._native(kernels)
            if mixture is not None:
                return self._add_ranks(mixture, x, routing, added)
        there = device_kernels_for(x) if x.dtype is self.gate_up_proj.dtype else None
        parts = None if there is None else self.device_parts(there)
        if there is not None and parts is not None:
            mine = self._launch(there, parts, x, routing)
        else:
            mine = self._one_by_one(x, routing)
        total = self._parallel.all_reduce(mine).to(x.dtype)
        return total if added is None else total + added

    def _launch(
        self, kernels: ModuleType, parts: tuple[Any, Any], x: torch.Tensor, routing: Routing
    ) -> torch.Tensor:
        """This rank's sum [T, H] by Triton's kernels, which wait for nothing."""
        is_first = self._parallel.tp_rank == 0  # whose bias is the ranks' sum's
        total: torch.Tensor = kernels.mixture(
            x,
            routing.experts,
            routing.weights,
            *parts,
            num_experts=self.num_experts,
            activation=self.act_fn,
            gate_up_bias=self.gate_up_proj_bias,
            down_bias=self.down_proj_bias if is_first else None,
            scale_inputs=self.scale_inputs,
            out_dtype=None if self._parallel.tp_size == 1 else torch.float32,
        )
        return total

    def _has_few(self, kernels: ModuleType, rows: int, num_chosen: int) -> bool:
        """Whether so many tokens are few enough for the native call, all or for each expert."""
        if rows <= _NATIVE_ROWS or kernels.is_recording():
            return rows > 0
        most = 0
        if self.gate is not None:
            most = _NATIVE_ROWS
        elif self.gate_up_proj.dtype is torch.bfloat16:
            most = _NATIVE_ROWS_BY_ISA.get(kernels.cpu_isa().name, 0)
        return rows * num_chosen <= most * self.num_experts

    def _add_ranks(
        self, mixture: Any, x: torch.Tensor, routing: Routing, added: torch.Tensor | None
    ) -> torch.Tensor:
        compute = partial(
            mixture,
            x,
            routing.experts,
            routing.weights,
            num_threads=torch.get_num_threads(),
            round_inputs=self.has_integers and rounds_inputs(x.dtype),
        )
        if self._parallel.tp_size == 1:
            out: torch.Tensor = compute(added=added)
            return out
        total = self._parallel.all_reduce(compute(out_dtype=torch.float32)).to(x.dtype)
        return total if added is None else total + added

    def _native(self, kernels: ModuleType) -> Any:
        """All experts as `sgl_kernel.Mixture`; None when they are not what it serves."""
        if not isinstance(self.act_fn, GatedActivation):
            return None
        # Weights that were loaded, rounded or moved since are others.
        numbers = (self.gate_up_proj, self.down_proj)
        state = (self.gate, self.down, *((one.data_ptr(), one.dtype) for one in numbers))
        if self._mixture[0] != state:
            parts = self.native_parts(kernels)
            mixture = None
            if parts is not None:
                mixture = kernels.Mixture(
                    *parts,
                    self.num_experts,
                    self.act_fn.opening(kernels),
                    scale_inputs=self.scale_inputs,
                    dtype=self.gate_up_proj.dtype,
                )
            self._mixture = (state, mixture)
        return self._mixture[1]

    def _one_by_one(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """This rank's sum [T, H], one expert after the other: many rows of each."""
        num_chosen = routing.experts.shape[1]
        # Stable: within an expert tokens stay in order, so that their rows are read upwards.
        order = torch.argsort(routing.experts.flatten(), stable=True)
        rows = order.div(num_chosen, rounding_mode="floor")
        weights = routing.weights.flatten()[order].unsqueeze(1)
        counts = torch.bincount(routing.experts.flatten(), minlength=self.num_experts)
        # The sum of several is kept in float32, a single result needs no sum.
        total = x.new_zeros(x.shape, dtype=x.dtype if num_chosen == 1 else torch.float32)
        start = 0
        for expert, count in enumerate(counts.tolist()):
            if count == 0:
                continue
            part = slice(start, start + count)
            start += count
            tokens = x[rows[part]]
            if self.scale_inputs:
                output = self._expert(expert, (tokens * weights[part]).to(x.dtype))
            else:
                output = self._expert(expert, tokens) * weights[part]
            # A token stands once in an expert's rows: no two additions meet.
            total.index_add_(0, rows[part], output.to(total.dtype))
        return total

    def _expert(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        gated = self.act_fn(self._gate_up(expert, x))
        if self.down is None:
            output = linear(gated, self.down_proj[expert])
        else:
            output = self.down.product(expert, gated)
        if (
            self.down_proj_bias is not None and self._parallel.tp_rank == 0
        ):  # once in the ranks' sum
            output = output + self.down_proj_bias[expert]
        return output

    def _gate_up(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.gate_up_proj_bias is None else self.gate_up_proj_bias[expert]
        if self.gate is None or self.up is None:
            return linear(x, self.gate_up_proj[expert], bias)
        gate_bias, up_bias = (None, None) if bias is None else bias.chunk(2)
        gate = self.gate.product(expert, x, gate_bias)
        return torch.cat([gate, self.up.product(expert, x, up_bias)], -1)
