"""What every model offers to the runner and the loader: `CausalLM`, and how weights find a place.

One table per model maps checkpoint names to parameters, so that a missing or unexpected tensor is
an error that names it. Reading files is model_loader's work, cutting shards the layers'.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.linear import ShardedLinear
from sglang.srt.layers.lora import Factors
from sglang.srt.layers.moe import Experts
from sglang.srt.layers.quantization.matrix import numbers_like
from sglang.srt.layers.rotary_embedding import partial_row_order
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead
from sglang.srt.layers.weights import LoadedWeight, WeightOwner
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

MergedProjections = Mapping[str, tuple[tuple[str, Any], ...]]

_NAMES_SHOWN = 8
_TURNED = frozenset({"q_proj", "k_proj", "q_norm", "k_norm"})  # modules with rows that turn


class LoadedModel(nn.Module):
    """What has weights of a checkpoint.

    `merged_projections` says which checkpoint tensors share a parameter: merged name ->
    ((checkpoint name, shard id), ...). `Experts` say it themselves. `orders_rows`: of heads that
    turn in part, by halves, the pairs that turn come first here (see `partial_row_order`).
    """

    config: ModelConfig
    merged_projections: ClassVar[MergedProjections]
    orders_rows: ClassVar[bool] = False

    def load_weights(self, weights: Iterable[tuple[str, LoadedWeight]]) -> None:
        """Copy every (checkpoint name, whole tensor) into this rank's parameters.

        Tensors that come quantised stay so in layers that can keep them.

        A tensor is let go before the next is asked for. Raises ValueError that names missing,
        unexpected, repeated and wrongly shaped tensors; rotary frequency buffers, the copy of a
        tied head and GPTQ's biases of zeros are passed over.
        """
        places = self._places()
        done: set[str] = set()
        unexpected = []
        for name, tensor in weights:
            own = self.config.own_weight_name(name)
            place = places.get(own)
            if place is None:
                if not self._may_be_ignored(name, tensor):
                    unexpected.append(name)
                continue
            if own in done:
                raise ValueError(f"weight {name} is in the checkpoint twice")
            try:
                place.load(self._in_order(own, tensor))
            except ValueError as error:
                raise ValueError(f"weight {name}: {error}") from error
            done.add(own)
        missing = [name for name in places if name not in done]
        problems = [
            f"{len(names)} {what} weight(s): {_listed(names)}"
            for what, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        if problems:
            raise ValueError(f"{type(self).__name__}: " + "; ".join(problems))

    def _places(self) -> dict[str, Place]:
        places = {}
        for full_name, _ in self.named_parameters():
            owner, _, param_name = full_name.rpartition(".")
            module = self.get_submodule(owner)
            if isinstance(module, Experts):
                for below, parameter, expert_shard in module.checkpoint_tensors():
                    places[f"{owner}.{below}"] = Place(module, parameter, expert_shard)
                continue
            parent, _, leaf = owner.rpartition(".")
            for source, shard in self.merged_projections.get(leaf, ((leaf, None),)):
                prefix = f"{parent}.{source}" if parent else source
                places[f"{prefix}.{param_name}"] = Place(module, param_name, shard)
        return places

    def _row_order(self, name: str, num_rows: int) -> torch.Tensor | None:
        """Which row of a checkpoint's tensor stands where, int64 [num_rows]; None: as there."""
        dim, rope = self.config.head_dim, self.config.rope
        if not self.orders_rows or rope.partial == 1.0 or self.config.interleaved_rope:
            return None
        if name.rpartition(".")[0].rpartition(".")[2] not in _TURNED or num_rows % dim:
            return None
        heads = torch.arange(0, num_rows, dim, device="cpu")
        return (heads.unsqueeze(1) + partial_row_order(dim, rope.turned(dim))).flatten()

    def _in_order(self, name: str, tensor: LoadedWeight) -> LoadedWeight:
        order = self._row_order(name, tensor.shape[0]) if tensor.shape else None
        if order is None:
            return tensor
        return tensor[order] if isinstance(tensor, torch.Tensor) else tensor.take(order)

    def _may_be_ignored(self, name: str, tensor: LoadedWeight) -> bool:
        if name.endswith("rotary_emb.inv_freq"):
            return True
        scheme = self.config.weight_scheme
        if scheme is not None and scheme.method == "gptq" and name.endswith(".bias"):
            # Its writers give every layer a bias; one that is not the model's adds nothing.
            return isinstance(tensor, torch.Tensor) and not tensor.any()
        return self.config.tie_word_embeddings and name == "lm_head.weight"


class CausalLM(LoadedModel, ABC):
    """A decoder: tokens in, hidden states of the wanted rows out.

    `lm_head` turns hidden rows into logits.
    """

    lm_head: ParallelLMHead

    @abstractmethod
    def forward(self, forward_batch: ForwardBatch) -> torch.Tensor:
        """Hidden states [R, hidden_size] of `logits_rows`, after the final norm.

        Side effect: K and V of all T tokens are in the pool; `progress` was ticked per layer.
        """

    def adapter_sites(self) -> dict[str, AdapterSite]:
        """The linear layers by their modules' names in checkpoints, which adapters go by."""
        return {
            name.removesuffix(".weight"): AdapterSite(place.module, place.shard_id)
            for name, place in self._places().items()
            if isinstance(place.module, ShardedLinear) and place.param_name == "weight"
        }

    def own_factors(self, factors: Mapping[str, Factors]) -> Mapping[str, Factors]:
        """An adapter's A and B by the modules of `adapter_sites`, of those by modules of files.

        They differ where a checkpoint joins projections, or names them otherwise. ValueError for
        rows that can't be cut.
        """
        own: dict[str, Factors] = {}
        for module, (a, b) in factors.items():
            name = self.config.own_weight_name(f"{module}.weight")
            order = self._row_order(name, len(b))
            own[name.removesuffix(".weight")] = a, b if order is None else b[order]
        return own


@dataclass(frozen=True, slots=True)
class AdapterSite:
    """A checkpoint's projection: the linear layer that computes it, and which of its shards."""

    layer: ShardedLinear
    shard_id: int | str | None


@dataclass(frozen=True, slots=True)
class Place:
    """The parameter of a layer, or the shard of it, where one checkpoint tensor goes."""

    module: Any  # a layer with weight_loader
    param_name: str
    shard_id: Any

    def load(self, tensor: LoadedWeight) -> None:
        if not isinstance(tensor, torch.Tensor) and not isinstance(
            self.module, (WeightOwner, Experts)
        ):
            tensor = numbers_like(tensor, self.module.get_parameter(self.param_name))
        if self.shard_id is None:
            self.module.weight_loader(self.param_name, tensor)
        else:
            self.module.weight_loader(self.param_name, tensor, self.shard_id)


def _listed(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:_NAMES_SHOWN])
    rest = len(names) - _NAMES_SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown
