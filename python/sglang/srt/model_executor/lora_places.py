"""The adapters of one rank: all that are loaded, in host memory, and the few places where layers
look for them.

The scheduler says which adapter takes which place; a batch brings the changes, and the worker's
thread makes them before it computes that batch, so that no step sees half of one. Who may be where
is decided elsewhere (managers/lora_policy.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from sglang.srt.configs.lora_args import ALL_MODULES
from sglang.srt.layers.linear import ShardedLinear
from sglang.srt.layers.lora import (
    AdapterMask,
    AdapterRows,
    AdapterStep,
    Factors,
    LinearAdapters,
)
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_loader.lora_files import (
    AdapterFile,
    CutAdapter,
    OwnFactors,
    cut_adapter,
    leaf_of,
)
from sglang.srt.models.causal_lm import AdapterSite
from sglang.srt.utils.device import CpuRuntime, DeviceRuntime


def resolve_targets(
    wanted: Sequence[str] | None, found: Iterable[AdapterFile], sites: Mapping[str, AdapterSite]
) -> frozenset[str]:
    """The last words of modules that adapters may change.

    `wanted` None: those of the adapters that were `found`. ValueError for a word that the model
    has no linear layer of.
    """
    present = {leaf_of(module) for module in sites}
    if wanted is None:
        wanted = sorted({leaf for adapter in found for leaf in adapter.leaves} & present)
    elif ALL_MODULES in wanted:
        wanted = sorted(present)
    strange = [word for word in wanted if word not in present]
    if strange:
        raise ValueError(
            f"--lora-target-modules: no linear layer of the model is called "
            f"{', '.join(strange)}; it has {', '.join(sorted(present)) or 'none'}"
        )
    return frozenset(wanted)


class AdapterPlaces:
    """Places for `num_places` adapters up to `rank` in the linear layers of one model.

    Making one takes their memory, on the layers' device, which is `runtime`'s. `hold` and `forget`
    are for the scheduler's thread, the others for the one that computes.
    """

    def __init__(
        self,
        sites: Mapping[str, AdapterSite],
        targets: frozenset[str],
        num_places: int,
        rank: int,
        runtime: DeviceRuntime,
        own_factors: OwnFactors,
    ) -> None:
        self.num_places = num_places
        self._runtime = runtime
        self.targets = targets
        self.rank = rank
        self._sites = sites
        self._own_factors = own_factors
        self._step = AdapterStep()
        self._held: dict[int, CutAdapter] = {}
        shards: dict[ShardedLinear, list[int | str | None]] = {}
        for module, site in sites.items():
            if leaf_of(module) in targets:
                shards.setdefault(site.layer, []).append(site.shard_id)
        for layer, wanted in shards.items():
            parts = {shard: layer.adapter_part(shard) for shard in wanted}
            layer.adapters = LinearAdapters(
                parts, layer.num_outputs, num_places, rank, layer.weight, self._step
            )
        self._layers = tuple(shards)

    @property
    def nbytes(self) -> int:
        """Bytes of all places, on the device."""
        return sum(layer.adapters.nbytes for layer in self._layers if layer.adapters is not None)

    def hold(self, adapter_id: int, adapter: AdapterFile) -> None:
        """Keep what this rank needs of an adapter; ValueError when it does not fit the model."""
        own = adapter.renamed(self._own_factors)
        self._held[adapter_id] = cut_adapter(own, self._sites, self.targets, self.rank)

    def forget(self, adapter_id: int) -> None:
        """Let go of an adapter, if it is held; its place may keep what it has."""
        self._held.pop(adapter_id, None)

    def change(self, batch: ForwardBatch) -> None:
        """Make the changes of places that a batch brings; the first thing to do for it.

        Layers forget the rows of the batch before: a step that is recorded now has no adapters.
        """
        self._step.rows = None
        for change in batch.adapter_changes:
            self._put(change.place, self._held[change.adapter_id])

    def group(self, batch: ForwardBatch) -> None:
        """Let layers know a batch's rows by their adapters, before the model computes it."""
        places, geometry = batch.adapter_places, batch.geometry
        if places is not None:
            self._step.rows = AdapterRows.of_step(
                places, geometry.extend_seq_lens, geometry.logits_rows, self._runtime.move
            )

    def make_mask(self, num_rows: int) -> torch.Tensor:
        """Room for the places of up to `num_rows` rows of a recorded step: [rows, places]."""
        like = self._layers[0].weight
        return like.new_zeros(num_rows, self.num_places)

    @contextmanager
    def masked(self, own: torch.Tensor) -> Iterator[None]:
        """Let layers look up rows in `own` [R, places], part of a mask, while this lasts."""
        self._step.rows = AdapterMask(own)
        try:
            yield
        finally:
            self._step.rows = None

    def fill_mask(self, own: torch.Tensor, batch: ForwardBatch) -> None:
        """Write a decode step's rows into `own` [R, places]; those beyond its rows have none."""
        here = np.zeros(own.shape, np.float32)
        if batch.adapter_places is not None:
            rows = np.flatnonzero(batch.adapter_places >= 0)
            here[rows, batch.adapter_places[rows]] = 1
        (moved,) = self._runtime.move([torch.from_numpy(here)])
        own.copy_(moved)

    def _put(self, place: int, adapter: CutAdapter) -> None:
        factors: dict[ShardedLinear, dict[int | str | None, Factors]] = {}
        for site, pair in adapter.items():
            factors.setdefault(site.layer, {})[site.shard_id] = pair
        for layer in self._layers:
            if layer.adapters is not None:
                layer.adapters.put(place, factors.get(layer, {}))

    def __repr__(self) -> str:
        return (
            f"AdapterPlaces({self.num_places} of rank {self.rank}, {self.nbytes} bytes, "
            f"{len(self._held)} adapters held)"
        )


def make_places(
    sites: Mapping[str, AdapterSite],
    found: Sequence[AdapterFile],
    *,
    num_places: int,
    rank: int | None,
    targets: Sequence[str] | None,
    own_factors: OwnFactors,
    runtime: DeviceRuntime | None = None,
) -> AdapterPlaces:
    """Places for the adapters that were `found` at start, and later ones no larger.

    `rank` and `targets` None: those of the found; `runtime` None: the host. `own_factors` is the
    model's (see `CausalLM`). ValueError for targets that the model lacks.
    """
    found = [adapter.renamed(own_factors) for adapter in found]
    resolved = resolve_targets(targets, found, sites)
    most = rank if rank is not None else max(adapter.rank for adapter in found)
    with torch.inference_mode(False):
        return AdapterPlaces(
            sites, resolved, num_places, most, runtime or CpuRuntime(), own_factors
        )
