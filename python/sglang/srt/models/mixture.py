"""`Mixture`: experts in place of an MLP, as the families have them, and the decoder around them.

What a mixture computes is in `MoEConfig`, what its parts are called in checkpoints and how its
experts lie there is in `MixtureOptions`. The arithmetic is layers/moe.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.model_traits import MoEConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.activation import ClampedGate
from sglang.srt.layers.expert_weights import ExpertLayout
from sglang.srt.layers.grouped_routing import GroupedRouter
from sglang.srt.layers.moe import Experts, MixerRouter, Router, SigmoidRouter, SoftmaxRouter
from sglang.srt.layers.weights import LoadedWeight
from sglang.srt.models.arranged import ArrangedForCausalLM
from sglang.srt.models.llama import LlamaMLP


@dataclass(frozen=True, slots=True)
class MixtureOptions:
    """How checkpoints hold a family's mixtures.

    `router` and `shared` name these modules, `{shared}_gate` is what weighs the latter. `layout` is
    that of numbers; quantised experts are STACKED. `bias`: router and experts have one.
    """

    router: str = "gate"
    shared: str = "shared_experts"
    layout: ExpertLayout = ExpertLayout.SEPARATE
    bias: bool = False


class Mixture(nn.Module):
    """Every token through its experts and, where there is one, through the shared MLP."""

    def __init__(
        self,
        config: ModelConfig,
        moe: MoEConfig,
        options: MixtureOptions,
        parallel: ParallelState,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        hidden, gate = config.hidden_size, moe.clamped_gate
        self.options = options
        self.add_module(options.router, _router(hidden, moe, options, dtype))
        self.experts = Experts(
            moe.num_experts,
            hidden,
            moe.intermediate_size,
            layout=ExpertLayout.STACKED if config.stacks_experts else options.layout,
            scale_inputs=moe.scales_inputs,
            activation=None if gate is None else ClampedGate(gate.alpha, gate.limit),
            bias=options.bias,
            parallel=parallel,
            dtype=dtype,
        )
        self.has_shared = moe.shared_intermediate_size is not None
        self.gates_shared = moe.gates_shared
        if moe.shared_intermediate_size is not None:
            shared = LlamaMLP(hidden, moe.shared_intermediate_size, False, parallel, dtype)
            self.add_module(options.shared, shared)
            if moe.gates_shared:
                self.add_module(f"{options.shared}_gate", Router(hidden, 1, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        router = self.get_submodule(self.options.router)
        assert isinstance(router, Router)
        output: torch.Tensor = self.experts(x, router.route(x), self._shared(x))
        return output

    def _shared(self, x: torch.Tensor) -> torch.Tensor | None:
        if not self.has_shared:
            return None
        output: torch.Tensor = self.get_submodule(self.options.shared)(x)
        if not self.gates_shared:
            return output
        gate = self.get_submodule(f"{self.options.shared}_gate")(x)
        return torch.sigmoid(gate.float()).to(x.dtype) * output


def _router(hidden: int, moe: MoEConfig, options: MixtureOptions, dtype: torch.dtype) -> Router:
    if moe.choice is not None:
        return GroupedRouter(hidden, moe)
    if moe.mixer_tolerance is not None:
        return MixerRouter(
            hidden,
            moe.num_experts,
            moe.experts_per_token,
            tolerance=moe.mixer_tolerance,
            dtype=dtype,
        )
    if moe.scales_inputs:
        return SigmoidRouter(hidden, moe.num_experts, moe.experts_per_token, dtype=dtype)
    return SoftmaxRouter(
        hidden,
        moe.num_experts,
        moe.experts_per_token,
        renormalize=moe.renormalize,
        bias=options.bias,
        dtype=dtype,
    )


class MixtureForCausalLM(ArrangedForCausalLM):
    """The whole model, with a `Mixture` in the layers of `ModelConfig.moe`; arguments and errors as
    for `LlamaForCausalLM`.

    Layers of token prediction behind the last one, which some checkpoints have, are passed over.
    """

    mixture: ClassVar[MixtureOptions] = MixtureOptions()

    def make_mlp(
        self, config: ModelConfig, layer_id: int, parallel: ParallelState, dtype: torch.dtype
    ) -> nn.Module:
        if config.moe is not None and layer_id in config.moe.layers:
            return Mixture(config, config.moe, self.mixture, parallel, dtype)
        return super().make_mlp(config, layer_id, parallel, dtype)

    def _may_be_ignored(self, name: str, tensor: LoadedWeight) -> bool:
        return self.config.is_draft_weight(name) or super()._may_be_ignored(name, tensor)
