"""Mixtures of experts: who goes to which expert, and the experts' products over sorted tokens.

Models build a router, one `Experts` and, where they have one, a shared MLP. Experts that no token
chose are not computed; every token's result is the same whatever stands beside it but for the
rounding of products of other heights: its experts are added up in ascending order.

Tensor parallel as in layers/linear.py: every rank has all experts, cut along their width.

Legend: T tokens, E experts, K experts of a token, H hidden width, I an expert's width.
Sources: arXiv 1701.06538, 2101.03961 (top-1), 2006.16668.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.activation import SiluAndMul
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


class ExpertLayout(enum.Enum):
    """How a checkpoint holds the experts.

    MERGED: `gate_up_proj` [E, H, 2I] (gate, then up) and `down_proj` [E, I, H], for products from
    the right. INTERLEAVED: the same, but columns 2i and 2i + 1 are gate i and up i. SEPARATE:
    `{e}.gate_proj.weight` and `{e}.up_proj.weight` [I, H] and `{e}.down_proj.weight` [H, I].
    """

    MERGED = "merged"
    INTERLEAVED = "interleaved"
    SEPARATE = "separate"


class Experts(nn.Module):
    """E gated MLPs, down_e(act(gate_up_e(x))), this rank's share of their width.

    `scale_inputs`: a token's weight multiplies what its expert gets (Llama 4), not what it gives.
    `activation` maps [*, 2I] (gate, then up) to [*, I]; None is `SiluAndMul`. With `bias` the
    experts have `gate_up_proj_bias` [E, 2I] and `down_proj_bias` [E, H]. Raises ValueError when
    the width can't be divided over the ranks.
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
        super().__init__()
        width = parallel.shard_size(intermediate_size, "expert width")
        self.num_experts = num_experts
        self.width, self.intermediate_size = width, intermediate_size
        self.layout = layout
        self.scale_inputs = scale_inputs
        self.act_fn = SiluAndMul() if activation is None else activation
        self.gate_up_proj = frozen_parameter(num_experts, 2 * width, hidden_size, dtype=dtype)
        self.down_proj = frozen_parameter(num_experts, hidden_size, width, dtype=dtype)
        self.gate_up_proj_bias: nn.Parameter | None = None
        self.down_proj_bias: nn.Parameter | None = None
        if bias:
            self.gate_up_proj_bias = frozen_parameter(num_experts, 2 * width, dtype=dtype)
            self.down_proj_bias = frozen_parameter(num_experts, hidden_size, dtype=dtype)
        self._parallel = parallel

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
        up_bias, down_bias = self.gate_up_proj_bias, self.down_proj_bias
        gate_up = linear(x, self.gate_up_proj[expert], None if up_bias is None else up_bias[expert])
        output = linear(self.act_fn(gate_up), self.down_proj[expert])
        if down_bias is not None and self._parallel.tp_rank == 0:  # once in the ranks' sum
            output = output + down_bias[expert]
        return output

    def checkpoint_tensors(self) -> Iterator[tuple[str, str, tuple[int, str] | None]]:
        """(name below this module, parameter, shard) of every tensor of the checkpoint."""
        names = [name for name, _ in self.named_parameters()]
        if self.layout is not ExpertLayout.SEPARATE:
            yield from ((name, name, None) for name in names)
            return
        for expert in range(self.num_experts):
            for part in ("gate", "up", "down"):
                parameter = "down_proj" if part == "down" else "gate_up_proj"
                yield f"{expert}.{part}_proj.weight", parameter, (expert, part)

    def weight_loader(
        self, param_name: str, loaded: torch.Tensor, shard_id: tuple[int, str] | None = None
    ) -> None:
        """Copy this rank's part of a whole checkpoint tensor, see `ExpertLayout`.

        `shard_id` is (expert, "gate", "up" or "down"), None for all experts merged. Raises
        ValueError for a wrong name or shape.
        """
        if shard_id is not None:
            expert, part = shard_id
            self._load_separate(param_name, loaded, expert, part)
        elif param_name == "gate_up_proj":
            for target, half in self._gate_and_up(loaded, self.gate_up_proj.data):
                copy_checked(target, half.transpose(1, 2), param_name)
        elif param_name == "down_proj":
            self._check_width(loaded, 1, self.intermediate_size)
            copy_checked(self.down_proj.data, self._cut(loaded, 1).transpose(1, 2), param_name)
        elif param_name == "gate_up_proj_bias" and self.gate_up_proj_bias is not None:
            for target, half in self._gate_and_up(loaded, self.gate_up_proj_bias.data):
                copy_checked(target, half, param_name)
        elif param_name == "down_proj_bias" and self.down_proj_bias is not None:
            copy_checked(self.down_proj_bias.data, loaded, param_name)
        else:
            raise ValueError(f"Experts has no parameter {param_name!r}")

    def _load_separate(self, param_name: str, loaded: torch.Tensor, expert: int, part: str) -> None:
        what = f"{part} of expert {expert}"
        if param_name == "down_proj":
            self._check_width(loaded, 1, self.intermediate_size)
            copy_checked(self.down_proj.data[expert], self._cut(loaded, 1), what)
            return
        self._check_width(loaded, 0, self.intermediate_size)
        offset = 0 if part == "gate" else self.width
        target = self.gate_up_proj.data[expert].narrow(0, offset, self.width)
        copy_checked(target, self._cut(loaded, 0), what)

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
