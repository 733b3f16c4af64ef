"""The interface that every attention backend implements, and what a layer tells it.

A backend is made once per rank. It plans once a step from the batch's lengths and tables, then
stores and attends once a layer. It never changes a table.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch

from sglang.srt.errors import InvariantError
from sglang.srt.layers.rotary_embedding import Rotation
from sglang.srt.mem_cache.kv_layout import KVCacheSpec
from sglang.srt.model_executor.forward_batch_info import BatchGeometry, ForwardBatch


class AttentionLayer(Protocol):
    """The calling layer; see `RadixAttention` for the meaning of each.

    `scaling` multiplies a query's product with a stored key, so `k_scale` is in it. Results are in
    units of what is stored, which the layer multiplies by `v_scale`, unless the backend does
    (`scales_values`).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    scaling: float
    layer_id: int
    sliding_window: int | None
    attention_chunk: int | None
    logit_cap: float
    sinks: torch.Tensor | None
    k_scale: float
    v_scale: float


class AttentionBackend(ABC):
    """Attends over the slots of block tables.

    `name` is its word for --attention-backend, `preferred_page_size` the page size in tokens
    where the user sets none. `group_of_layer[layer]` names the KV group whose tables count.
    """

    name: ClassVar[str]
    preferred_page_size: ClassVar[int] = 64
    records_steps: ClassVar[bool] = False  # has `may_record` and `renew`
    is_native: ClassVar[bool] = False  # computes a recorded step by calls that a tape takes
    rotates: ClassVar[bool] = False  # has `rotate_and_store`
    scales_values: ClassVar[bool] = False  # `forward` multiplies by the layer's `v_scale` itself

    def __init__(self, spec: KVCacheSpec) -> None:
        self.spec = spec
        self.group_of_layer = spec.group_of_layer()

    @classmethod
    def device_bytes(cls, sizes: Sequence[int], num_groups: int) -> int:
        """Memory that it takes on a device beside tables and what a step computes.

        `sizes` are the numbers of rows of recorded steps.
        """
        del sizes, num_groups
        return 0

    @abstractmethod
    def plan(self, geometry: BatchGeometry) -> Any:
        """Prepare a step; pure. The result travels as `ForwardBatch.attn_plan`."""

    def plan_recorded(self, geometry: BatchGeometry) -> Any:
        """A plan that `renew` can make that of any step that `may_record` allows."""
        return self.plan(geometry)

    def may_record(self, geometry: BatchGeometry) -> bool:
        """Whether a step's attention is the same calls for every step of as many requests."""
        del geometry
        return False

    def renew(self, plan: Any, geometry: BatchGeometry) -> None:
        """Make a recorded step's plan that of another step, in place.

        Both steps are such as `may_record` allows, of equally many requests. Raises what `forward`
        raises for tables too short.
        """
        raise InvariantError(f"{self.name} records no steps, {plan!r} of {len(geometry.seq_lens)}")

    def store(
        self, k: torch.Tensor, v: torch.Tensor, layer: AttentionLayer, forward_batch: ForwardBatch
    ) -> None:
        """Put new tokens' k [T, G, D] and v [T, G, Dv] into the slots that the batch names.

        Whatever attends next sees them, divided by the layer's scales and rounded to the KV dtype.
        """
        loc = forward_batch.out_cache_loc[self.group_of_layer[layer.layer_id]]
        forward_batch.token_to_kv_pool.set_kv_buffer(
            layer.layer_id, loc, k, v, k_scale=layer.k_scale, v_scale=layer.v_scale
        )

    def rotate_and_store(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        rotation: Rotation,
        layer: AttentionLayer,
        forward_batch: ForwardBatch,
    ) -> torch.Tensor:
        """Turn q [T, H * D] and k [T, G * D] and `store` k and v [T, G * Dv]; the turned q, new.

        Where `rotates` says so: one launch instead of three.
        """
        del q, k, v, rotation, forward_batch
        raise InvariantError(f"{self.name} turns no rows, as layer {layer.layer_id} asks it to")

    @abstractmethod
    def forward(
        self,
        q: torch.Tensor,
        layer: AttentionLayer,
        forward_batch: ForwardBatch,
        *,
        rows_pruned: bool,
    ) -> torch.Tensor:
        """Attend with q [R, H, D] and return [R, H * Dv] in q's dtype.

        Row r of q is packed row r, or packed row `logits_rows[r]` when `rows_pruned`. The query at
        position p sees positions [0, p], cut to the layer's window or chunk, and nothing of
        another request. K and V of all those positions already lie in the pool. Ticks
        `forward_batch.progress` in long computations.
        """
