"""DeepSeek's routers: experts in groups, scores that a learned bias helps to choose.

Models build a `GroupedRouter`; the rest of a mixture is layers/moe.py. All in float32: experts'
scores lie close together, and another choice is another answer.

Legend: T tokens, E experts, K experts of a token, N groups, H hidden width.
Sources: arXiv 2405.04434, section 2.2.2 (groups); 2412.19437, section 2.1.2 (sigmoid and bias).
"""

from __future__ import annotations

import torch
from torch import nn

from sglang.srt.configs.model_traits import ExpertChoice, MoEConfig
from sglang.srt.layers.moe import Router, Routing
from sglang.srt.layers.weights import frozen_parameter


def route_in_groups(
    logits: torch.Tensor,
    num_chosen: int,
    choice: ExpertChoice,
    *,
    bias: torch.Tensor | None = None,
    renormalize: bool,
) -> Routing:
    """The experts of logits [T, E] by `choice`; `bias` float32 [E] is that of a biased one.

    `renormalize` divides the chosen scores by their sum, before they are scaled.
    """
    wide = logits.float()
    scores = torch.sigmoid(wide) if choice.sigmoid else torch.softmax(wide, -1)
    ranked = scores if bias is None else scores + bias
    if choice.num_groups > 1:
        ranked = _in_best_groups(ranked, choice)
    experts = torch.topk(ranked, num_chosen, dim=-1, sorted=False).indices
    weights = scores.gather(-1, experts)
    if renormalize:
        # The sum of sigmoids may be 0, that of a softmax's largest never.
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return Routing(experts, weights * choice.scaling)


def _in_best_groups(scores: torch.Tensor, choice: ExpertChoice) -> torch.Tensor:
    """Scores [T, E], -inf outside of each token's best groups."""
    num_tokens, num_experts = scores.shape
    size = num_experts // choice.num_groups
    grouped = scores.view(num_tokens, choice.num_groups, size)
    worth = grouped.topk(choice.group_best, dim=-1).values.sum(-1)
    best = worth.topk(choice.kept_groups, dim=-1, sorted=False).indices
    left_out = torch.ones_like(worth, dtype=torch.bool).scatter_(-1, best, False)
    hidden = grouped.masked_fill(left_out.unsqueeze(-1), float("-inf"))
    return hidden.view(num_tokens, num_experts)


class GroupedRouter(Router):
    """Routings of x [T, H], the same on every rank; its weight is kept in float32.

    Checkpoints call a biased choice's bias `e_score_correction_bias`.
    """

    e_score_correction_bias: nn.Parameter | None

    def __init__(self, hidden_size: int, moe: MoEConfig) -> None:
        super().__init__(hidden_size, moe.num_experts, dtype=torch.float32)
        self.choice = ExpertChoice() if moe.choice is None else moe.choice
        self.num_chosen, self.renormalize = moe.experts_per_token, moe.renormalize
        bias = None
        if self.choice.biased:
            bias = frozen_parameter(moe.num_experts, dtype=torch.float32)
        self.register_parameter("e_score_correction_bias", bias)

    def weight_loader(self, param_name: str, loaded: torch.Tensor) -> None:
        """As `Router.weight_loader`; the bias may be a row [1, E], as ERNIE has it."""
        is_row = param_name == "e_score_correction_bias" and loaded.dim() == 2
        super().weight_loader(param_name, loaded.squeeze(0) if is_row else loaded)

    def route(self, x: torch.Tensor) -> Routing:
        return route_in_groups(
            self(x.float()),
            self.num_chosen,
            self.choice,
            bias=self.e_score_correction_bias,
            renormalize=self.renormalize,
        )
