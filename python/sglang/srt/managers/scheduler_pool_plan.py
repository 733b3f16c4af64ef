"""From arguments and what the machine has left to the numbers of the KV pool; nothing is made here.

The groups of layers, the budget, the context clamped to what the budget can hold, and the rows.
Called by `scheduler_setup` at start; `sglang.plan_memory` takes the groups from here too.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.model_traits import LinearConfig
from sglang.srt.distributed.communicator import Communicator
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.managers.scheduler_device import prefill_chunk_tokens, reserve_of
from sglang.srt.mem_cache.capacity import (
    ContextClamp,
    budget_from_headroom,
    effective_context_length,
)
from sglang.srt.mem_cache.device_budget import DeviceMemoryPlan
from sglang.srt.mem_cache.kv_layout import (
    GroupKind,
    KVCacheSpec,
    KVGroupSpec,
    SegmentLayout,
    StateShape,
)
from sglang.srt.mem_cache.segment_backing import SegmentBacking
from sglang.srt.mem_cache.segment_backing.base import LOWER_PLACES
from sglang.srt.mem_cache.segment_cuts import (
    make_segment_layouts,
    trim_layouts_to_budget,
)
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.disk_space import DiskSpace
from sglang.srt.utils.host_memory import HostMemory

logger = logging.getLogger(__name__)

# A segment of about this many bytes maps in a few milliseconds and wastes little at its end.
AUTO_SEGMENT_BYTES = 32 << 20


def resolve_max_running_requests(
    requested: int | None, capacity_tokens: int, context_length: int
) -> int:
    """Requests that may run at once: the requested number, else SGLang's rule from the capacity."""
    if requested is not None:
        return requested
    derived = int(capacity_tokens / max(1, context_length) * 512)
    return max(1, min(max(derived, 2048), 4096, capacity_tokens // 2))


def check_states(args: ServerArgs, config: ModelConfig) -> None:
    """Raise ValueError for what can't be served of a model with recurrent states."""
    if config.linear is None:
        return
    if args.speculative_algorithm is not None:
        raise ValueError(
            "--speculative-algorithm: the recurrent states of this model can't be taken back to "
            "before a draft that was not accepted"
        )
    if args.max_total_tokens is not None:
        raise ValueError(
            "--max-total-tokens says nothing of recurrent states; bound this model's memory with "
            "--kv-memory-budget"
        )


def kv_cache_spec(
    config: ModelConfig, parallel: ParallelState, dtype: str, page_size: int
) -> KVCacheSpec:
    """The KV cache of one rank: a group of the layers that keep every token, if there are any,
    then one for each sliding window, narrow to wide, one for each chunk, and one of the states of
    linear attention.

    An encoder keeps nothing; one small layer is then what prompts are admitted by. Raises
    ValueError when the heads of states can't be divided over the ranks."""
    if config.encoder is not None:
        one = KVGroupSpec((0,), GroupKind.FULL, None)
        return KVCacheSpec((one,), 1, config.head_dim, config.head_dim, dtype, page_size)
    layers: dict[tuple[GroupKind, int | None], list[int]] = {}
    spans = zip(config.layer_windows, config.layer_chunks, strict=True)
    linear = config.linear
    for layer, (window, chunk) in enumerate(spans):
        if linear is not None and layer in linear.layers:
            kind = GroupKind.STATE
        elif chunk is not None:
            kind = GroupKind.CHUNKED
        else:
            kind = GroupKind.FULL if window is None else GroupKind.SLIDING
        layers.setdefault((kind, chunk or window), []).append(layer)
    order = (GroupKind.FULL, GroupKind.SLIDING, GroupKind.CHUNKED, GroupKind.STATE)
    state = None if linear is None else _state_shape(linear, parallel)
    groups = [
        KVGroupSpec(
            tuple(layers[kind, span]), kind, span, state=state if kind is GroupKind.STATE else None
        )
        for kind, span in sorted(layers, key=lambda key: (order.index(key[0]), key[1] or 0))
    ]
    return KVCacheSpec(
        groups=tuple(groups),
        kv_heads=max(1, config.num_kv_heads // parallel.tp_size),
        head_dim=config.head_dim,
        v_head_dim=config.v_head_dim,
        dtype=dtype,
        page_size=page_size,
        values_in_keys=config.latent is not None,
        index_dim=0 if config.index is None else config.index.head_dim,
        index_layers=() if config.index is None else config.index.layers,
    )


def _state_shape(linear: LinearConfig, parallel: ParallelState) -> StateShape:
    """What one layer keeps of a request on one rank, which has its share of the heads."""
    keys = parallel.shard_size(linear.key_heads, "key heads of linear attention")
    values = parallel.shard_size(linear.value_heads, "value heads of linear attention")
    return StateShape(
        heads=values,
        key_dim=linear.key_dim,
        value_dim=linear.value_dim,
        conv_tokens=linear.conv_size - 1,
        channels=2 * keys * linear.key_dim + values * linear.value_dim,
    )


def resolve_budget(
    args: ServerArgs, available_bytes: int, device_plan: DeviceMemoryPlan | None = None
) -> int:
    """The KV budget in bytes before --max-total-tokens: the explicit one, else the default.

    The default is what `device_plan` leaves, on a host (None) the fraction of what is available.
    An explicit budget above what the machine has left is taken with a warning: it is a bound, and
    mapping checks the machine each time.
    """
    if args.kv_memory_budget is None:
        if device_plan is not None:
            return device_plan.budget_bytes
        return budget_from_headroom(available_bytes, args.mem_fraction_static or 0.7)
    if args.kv_memory_budget > available_bytes:
        logger.warning(
            "--kv-memory-budget (%d bytes) is more than the %d bytes that the machine has left; "
            "growth beyond those will be refused by the machine.",
            args.kv_memory_budget,
            available_bytes,
        )
    return args.kv_memory_budget


def cap_budget(
    budget_bytes: int, max_total_tokens: int | None, layouts: tuple[SegmentLayout, ...]
) -> int:
    """The budget cut to whole segments for `max_total_tokens` (None: not cut).

    A cap above what the budget holds is ignored with a warning, as SGLang does.
    """
    if max_total_tokens is None:
        return budget_bytes
    wanted = sum(
        -(-max_total_tokens // layout.slots_per_segment) * layout.segment_bytes
        for layout in layouts
    )
    if wanted > budget_bytes:
        logger.warning(
            "--max-total-tokens (%d) needs %d bytes, the KV budget is %d bytes; the budget stands.",
            max_total_tokens,
            wanted,
            budget_bytes,
        )
    return min(wanted, budget_bytes)


def resolve_disk(args: ServerArgs, space: DiskSpace | None) -> int:
    """Bytes that the disk tier may take: what --kv-disk-size says, else half of what is free.

    `space` None: there is no tier. A size above what is free is cut with a warning, and a file
    system in memory is warned of.
    """
    if space is None:
        return 0
    if space.is_memory:
        logger.warning(
            "--kv-disk-path %s is a file system in memory (%s): what lies there takes memory "
            "beside the KV budget.",
            args.kv_disk_path,
            space.kind,
        )
    if args.kv_disk_size is None:
        return space.free_bytes // 2
    if args.kv_disk_size > space.free_bytes:
        logger.warning(
            "--kv-disk-size (%d bytes) is more than the %d bytes that are free at %s; these count.",
            args.kv_disk_size,
            space.free_bytes,
            args.kv_disk_path,
        )
    return min(args.kv_disk_size, space.free_bytes)


def resolve_host(args: ServerArgs, budget_bytes: int, space_bytes: int | None) -> int:
    """Bytes of the host tier: what --hicache-size says, else --hicache-ratio times the KV budget.

    `space_bytes` None: there is no tier. More than these is cut with a warning.
    """
    if space_bytes is None:
        return 0
    wanted = args.hicache_size * 10**9 or int(args.hicache_ratio * budget_bytes)
    if wanted > space_bytes:
        logger.warning(
            "The host tier of %d bytes (--hicache-size, --hicache-ratio) is more than the %d bytes "
            "that the host has left for it; these count.",
            wanted,
            space_bytes,
        )
    return min(wanted, space_bytes)


@dataclass(frozen=True)
class LowerSpace:
    """What there is below memory: the disk tier's room, or bytes of the host's memory.

    None: there is no such tier; at most one of both is there.
    """

    disk: DiskSpace | None = None
    host_bytes: int | None = None


def agreed_space(everyone: Communicator | None, space: LowerSpace) -> LowerSpace:
    """The least that any scheduler has below memory; all have the same kind of tier.

    `everyone` None: there is no other. Blocks until all have called.
    """
    if everyone is None:
        return space
    disk, host = space.disk, space.host_bytes
    if disk is not None:
        disk = replace(disk, free_bytes=everyone.agree((disk.free_bytes,))[0])
    if host is not None:
        host = everyone.agree((host,))[0]
    return LowerSpace(disk, host)


@dataclass(frozen=True)
class PoolPlan:
    """The numbers from which the pool is made; `lower_bytes` 0: there is no tier below memory."""

    budget_bytes: int
    lower_bytes: int
    clamp: ContextClamp
    max_running_requests: int


def plan_pool(
    args: ServerArgs,
    spec: KVCacheSpec,
    backing: SegmentBacking,
    host: HostMemory,
    requested_context: int,
    device_plan: DeviceMemoryPlan | None = None,
    min_slots: int = 1,
    below: LowerSpace = LowerSpace(),
) -> PoolPlan:
    """Budget, clamped context and rows from the arguments and what the machine has left; pure.

    `min_slots`: fewest tokens of a segment whose size is
    chosen automatically. Raises ValueError when the budget cannot hold even one segment.
    """
    budget = resolve_budget(args, host.available_bytes, device_plan)
    lower = resolve_disk(args, below.disk) or resolve_host(args, budget, below.host_bytes)
    layouts = make_segment_layouts(
        spec,
        slots_per_segment=args.kv_segment_size,
        auto_segment_bytes=AUTO_SEGMENT_BYTES,
        auto_min_slots=min_slots,
        granule_bytes=backing.granule_bytes,
        machine_bytes=host.total_bytes + lower,
        budget_bytes=budget + lower,
        kv_parallel=args.kv_parallel_size,
    )
    total = cap_budget(budget + lower, args.max_total_tokens, layouts)
    budget = min(budget, total)
    # What memory has beyond whole segments holds nothing: it is no part of what the tokens take.
    unit = math.gcd(*(layout.segment_bytes for layout in layouts))
    lower = min(lower, total - budget + budget % unit)
    if not backing.elastic:
        layouts = trim_layouts_to_budget(layouts, budget)
    clamp = effective_context_length(
        spec,
        layouts,
        budget_bytes=budget,
        lower_bytes=lower,
        lower_place=LOWER_PLACES["host" if below.disk is None else "disk"],
        reserve_segments=reserve_of(args, backing),
        requested=requested_context,
        prefill_chunk=prefill_chunk_tokens(args),
    )
    if clamp.effective < 2:
        raise ValueError(f"The KV memory cannot hold one request: {clamp.explanation}.")
    for layout in layouts:
        if layout.holds_states:
            states, size = layout.pages_per_segment, layout.segment_bytes
            logger.info("KV group %d: segments of %d states (%d bytes)", layout.group, states, size)
            continue
        logger.info(
            "KV group %d: segments of %d tokens (%d bytes, %d pages of %d)",
            layout.group,
            layout.slots_per_segment,
            layout.segment_bytes,
            layout.pages_per_segment,
            layout.page_size,
        )
    rows = resolve_max_running_requests(
        args.max_running_requests, clamp.capacity_tokens, clamp.effective
    )
    return PoolPlan(budget, lower, clamp, rows)
