"""Mixtures of experts: who goes to which expert, and the experts' products over sorted tokens.

Models build a router, one `Experts` and, where they have one, a shared MLP. Experts that no token
chose are not computed; every token's result is the same whatever stands beside it but for the
rounding of products of other heights: its experts are added up in ascending order.

Tensor parallel as in layers/linear.py: every rank has all experts, cut along their width.

Legend: T tokens, E experts, K experts of a token, H hidden width, I an expert's width.
Sources: arXiv 1701.06538, 2101.03961 (top-1), 2006.16668.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.expert_weights import ExpertLayout, ExpertWeights
from sglang.srt.layers.products import linear
from sglang.srt.layers.weights import copy_checked, frozen_parameter


class Routing(NamedTuple):
    """The experts of every token, int64 [T, K], and their weights, float32 [T, K]."""

    experts: torch.Tensor
    weights: torch.Tensor


def route_by_softmax(logits: torch.Tensor, num_chosen: int, *, renormalize: bool) -> Routing:
    """Softmax over all experts [T, E], the largest `num_chosen` kept.

    `renormalize` divides these by their sum, which is the softmax over the chosen logits alone.
    """
    weights, experts = torch.topk(torch.softmax(logits.float(), -1), num_chosen, dim=-1)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return Routing(experts, weights)


def route_by_sigmoid(logits: torch.Tensor, num_chosen: int) -> Routing:
    """The largest `num_chosen` of the logits [T, E], each weighted by its own sigmoid (Llama 4)."""
    chosen, experts = torch.topk(logits, num_chosen, dim=-1)
    return Routing(experts, torch.sigmoid(chosen.float()))


class Router(nn.Module):
    """Scores of the experts: [T, H] -> [T, E], the same on every rank."""

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

    def weight_loader(self, param_name: str, loaded: torch.Tensor) -> None:
        """Copy "weight" or "bias"; ValueError for a wrong name or shape."""
        target = self._parameters.get(param_name)
        if target is None:
            raise ValueError(f"Router has no parameter {param_name!r}")
        copy_checked(target.data, loaded, param_name)


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

    def forward(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """The weighted sum over each token's experts: x [T, H] -> [T, H], added over the ranks."""
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
        return self._parallel.all_reduce(total).to(x.dtype)

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
