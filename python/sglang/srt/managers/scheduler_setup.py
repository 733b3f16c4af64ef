"""From arguments to the parts of a scheduler: model, memory, clamp, worker. Runs once, at start.

The order matters: weights first, then what is left of the machine's memory is the pool's budget,
then the context is clamped to what the budget can hold.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sglang.srt.configs.kv_events_config import KVEventsConfig
from sglang.srt.configs.model_config import ModelConfig, resolve_context_length
from sglang.srt.distributed.communicator import RankLinks
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.environ import Environ
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.registry import get_attention_backend, make_attention_backend
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.sampler import Sampler
from sglang.srt.managers.io_struct import SchedulerReady
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.scheduler_canary import SchedulerCanary
from sglang.srt.managers.scheduler_kv_events import KVEventPublisher
from sglang.srt.managers.scheduler_limits import SchedulerLimits
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.mem_cache.allocation import KVMemory, KVPlacement
from sglang.srt.mem_cache.canary_perturb import Perturbation
from sglang.srt.mem_cache.capacity import (
    ContextClamp,
    budget_from_headroom,
    effective_context_length,
    request_page_bounds,
)
from sglang.srt.mem_cache.kv_events import EventSink
from sglang.srt.mem_cache.kv_layout import (
    GroupKind,
    KVCacheSpec,
    KVGroupSpec,
    SegmentLayout,
    make_segment_layouts,
    trim_layouts_to_budget,
)
from sglang.srt.mem_cache.segment_backing import SegmentBacking, make_backing
from sglang.srt.model_executor.decode_tapes import CausalLM, DecodeTapes
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.model_loader.loader import load_model
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.cpu_cores import usable_cores
from sglang.srt.utils.host_memory import HostMemory, read_host_memory
from sglang.srt.utils.native import native_kernels
from sglang.srt.utils.progress import Progress

logger = logging.getLogger(__name__)

# A segment of about this many bytes maps in a few milliseconds and wastes little at its end.
AUTO_SEGMENT_BYTES = 32 << 20

_SWITCH_INTERVAL_S = 1e-4

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True)
class SchedulerParts:
    """What `make_scheduler` joins; `ready` is what the other processes are told."""

    memory: KVMemory
    worker: TpModelWorker
    make_batch: Callable[[ScheduleBatch, KVPlacement], ForwardBatch]
    limits: SchedulerLimits
    ready: SchedulerReady
    publisher: KVEventPublisher | None = None
    canary: SchedulerCanary | None = None


def resolve_dtype(requested: str, checkpoint: str) -> str:
    """The type of weights and activations: the requested one, or for "auto" the checkpoint's.

    As in SGLang, auto never computes in float32; on a CPU 16 bits means bfloat16, which has
    hardware products where float16 has none.
    """
    if requested != "auto":
        return requested
    return "bfloat16" if checkpoint in ("float32", "float16") else checkpoint


def compute_threads(requested: int | None, present: int, num_ranks: int = 1) -> int:
    """Threads of one rank's products: the requested number, else its share of the cores.

    `present` is what the process has otherwise, OMP_NUM_THREADS included.
    """
    if requested is not None:
        return requested
    return max(1, min(present, usable_cores() // num_ranks))


def agreed_memory(links: RankLinks | None, read: Callable[[], HostMemory]) -> HostMemory:
    """What the machine has for one rank: the same on all ranks, read once all have loaded.

    `links` None: the rank is alone. Ranks share one machine, so each gets its part of what is
    left, and the least that any of them sees counts. Blocks until all ranks have called.
    """
    if links is None:
        return read()
    links.control.agree((0,))  # nobody's weights are still to come
    host = read()
    total, available = links.control.agree((host.total_bytes, host.available_bytes // links.size))
    return HostMemory(total, available, host.bound_by)


def resolve_max_running_requests(
    requested: int | None, capacity_tokens: int, context_length: int
) -> int:
    """Requests that may run at once: the requested number, else SGLang's rule from the capacity."""
    if requested is not None:
        return requested
    derived = int(capacity_tokens / max(1, context_length) * 512)
    return max(1, min(max(derived, 2048), 4096, capacity_tokens // 2))


def kv_cache_spec(
    config: ModelConfig, parallel: ParallelState, dtype: str, page_size: int
) -> KVCacheSpec:
    """The KV cache of one rank: a group of the layers that keep every token, if there are any,
    then one for each sliding window, narrow to wide, and one for each chunk."""
    layers: dict[tuple[GroupKind, int | None], list[int]] = {}
    spans = zip(config.layer_windows, config.layer_chunks, strict=True)
    for layer, (window, chunk) in enumerate(spans):
        if chunk is not None:
            kind = GroupKind.CHUNKED
        else:
            kind = GroupKind.FULL if window is None else GroupKind.SLIDING
        layers.setdefault((kind, chunk or window), []).append(layer)
    order = (GroupKind.FULL, GroupKind.SLIDING, GroupKind.CHUNKED)
    groups = [
        KVGroupSpec(tuple(layers[kind, span]), kind, span)
        for kind, span in sorted(layers, key=lambda key: (order.index(key[0]), key[1] or 0))
    ]
    return KVCacheSpec(
        groups=tuple(groups),
        kv_heads=max(1, config.num_kv_heads // parallel.tp_size),
        head_dim=config.head_dim,
        v_head_dim=config.v_head_dim,
        dtype=dtype,
        page_size=page_size,
    )


def resolve_budget(args: ServerArgs, available_bytes: int) -> int:
    """The KV budget in bytes before --max-total-tokens: the explicit one, else the fraction.

    An explicit budget above what the machine has left is taken with a warning: it is a bound, and
    mapping checks the machine each time.
    """
    if args.kv_memory_budget is None:
        return budget_from_headroom(available_bytes, args.mem_fraction_static)
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


@dataclass(frozen=True)
class _PoolPlan:
    """The numbers from which the pool is made."""

    budget_bytes: int
    clamp: ContextClamp
    max_running_requests: int


def plan_pool(
    args: ServerArgs,
    spec: KVCacheSpec,
    backing: SegmentBacking,
    host: HostMemory,
    requested_context: int,
) -> _PoolPlan:
    """Budget, clamped context and rows from the arguments and what the machine has left; pure.

    Raises ValueError when the budget cannot hold even one segment.
    """
    budget = resolve_budget(args, host.available_bytes)
    layouts = make_segment_layouts(
        spec,
        slots_per_segment=args.kv_segment_size,
        auto_segment_bytes=AUTO_SEGMENT_BYTES,
        auto_min_slots=1,
        granule_bytes=backing.granule_bytes,
        machine_bytes=host.total_bytes,
        budget_bytes=budget,
    )
    budget = cap_budget(budget, args.max_total_tokens, layouts)
    if not backing.elastic:
        layouts = trim_layouts_to_budget(layouts, budget)
    clamp = effective_context_length(
        spec,
        layouts,
        budget_bytes=budget,
        reserve_segments=args.kv_segment_reserve,
        requested=requested_context,
        prefill_chunk=prefill_chunk_tokens(args),
    )
    if clamp.effective < 2:
        raise ValueError(f"The KV memory cannot hold one request: {clamp.explanation}.")
    for layout in layouts:
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
    return _PoolPlan(budget, clamp, rows)


def prefill_chunk_tokens(args: ServerArgs) -> int:
    """Most prompt tokens of a step: the chunk, or --max-prefill-tokens when prompts are whole."""
    if args.chunked_prefill_size == -1:
        return args.max_prefill_tokens
    return min(args.chunked_prefill_size, args.max_prefill_tokens)


def build_scheduler_parts(
    args: ServerArgs, environ: Environ, progress: Progress, links: RankLinks | None = None
) -> SchedulerParts:
    """Load this rank's part of the model and make its pool, in this order.

    `links` to the other ranks, which build theirs at the same time; None with one rank. Raises
    ValueError with one line for anything the user has to change, BackingError or OSError for what
    the machine refuses, RankLostError when another rank does not come.
    """
    if links is None and args.tp_size > 1:
        raise ValueError(f"--tp-size {args.tp_size}: only a server or an Engine has several ranks")
    if args.device == "cpu":
        threads = compute_threads(args.cpu_threads, torch.get_num_threads(), args.tp_size)
        torch.set_num_threads(threads)
        # The worker comes back from native code while the scheduler's thread prepares the next
        # step: by default it would be kept from the interpreter for up to 5 ms.
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
    config = ModelConfig.from_path(
        args.model_path,
        overrides=args.model_overrides(),
        trust_remote_code=args.trust_remote_code,
    )
    requested = resolve_context_length(config, args.context_length, environ)
    parallel = (
        ParallelState() if links is None else ParallelState(links.rank, links.size, links.compute)
    )
    dtype = resolve_dtype(args.dtype, config.torch_dtype)
    model = load_model(
        config,
        load_format=args.load_format,
        dtype=DTYPES[dtype],
        parallel=parallel,
        device=args.device,
        show_progress=parallel.tp_rank == 0,
        seed=args.random_seed,
        quantization=args.quantization,
    )
    backend_class = get_attention_backend(args.attention_backend, args.device)
    page_size = args.page_size or backend_class.preferred_page_size
    kv_dtype = dtype if args.kv_cache_dtype == "auto" else args.kv_cache_dtype
    spec = kv_cache_spec(config, parallel, kv_dtype, page_size)
    damage = _perturbation(args, environ, spec)
    backing = make_backing(args.kv_backing, debug_protect=environ.kv_debug_protect)
    host = agreed_memory(links, read_host_memory)
    plan = plan_pool(args, spec, backing, host, requested)
    if plan.clamp.is_clamped:
        logger.warning("Context length clamped: %s.", plan.clamp.explanation)
    # All ranks cache alike; one of them tells.
    publisher = open_publisher(args.kv_events_config if parallel.tp_rank == 0 else None)
    sink = None if publisher is None else publisher.publish
    memory = _make_memory(args, spec, backing, plan, host.total_bytes, sink, links)
    backend = make_attention_backend(backend_class, memory.kv_pool)

    def make_batch(batch: ScheduleBatch, placement: KVPlacement) -> ForwardBatch:
        return ForwardBatch.from_schedule_batch(
            batch,
            placement,
            pool=memory.kv_pool,
            backend=backend,
            page_size=page_size,
            progress=progress,
        )

    tapes = _decode_tapes(args, model, backend)
    worker = TpModelWorker(
        ModelRunner(model, LogitsProcessor(), tapes), Sampler(), plan.max_running_requests + 1
    )
    limits = _limits(args, plan, page_size, spec)
    logger.info("KV pool ready: %r", memory)
    ready = _ready(backend.name, plan, limits, memory)
    return SchedulerParts(
        memory, worker, make_batch, limits, ready, publisher, _canary(args, memory, damage)
    )


def _decode_tapes(
    args: ServerArgs, model: CausalLM, backend: AttentionBackend
) -> DecodeTapes | None:
    """What decode steps are recorded on; None where they can't be or the user wants none.

    Not with several ranks: a recording that is given up half-way would repeat collectives.
    """
    kernels = native_kernels() if backend.records_steps else None
    if kernels is None or args.disable_cuda_graph or args.tp_size > 1:
        return None
    return DecodeTapes(model, kernels, args.cuda_graph_max_bs, fuses=args.enable_fused_qk_norm_rope)


def _make_memory(
    args: ServerArgs,
    spec: KVCacheSpec,
    backing: SegmentBacking,
    plan: _PoolPlan,
    machine_bytes: int,
    event_sink: EventSink | None,
    links: RankLinks | None,
) -> KVMemory:
    ranks = None if links is None else links.control
    now_ms = int(time.monotonic() * 1e3)
    return KVMemory.create(
        spec,
        backing,
        budget_bytes=plan.budget_bytes,
        machine_bytes=machine_bytes,
        max_requests=plan.max_running_requests,
        slots_per_segment=args.kv_segment_size,
        auto_segment_bytes=AUTO_SEGMENT_BYTES,
        reserve_segments=args.kv_segment_reserve,
        idle_release_s=args.kv_idle_release_seconds,
        prefix_idle_s=args.prefix_cache_idle_seconds,
        max_cached_tokens=args.max_cached_tokens,
        enable_prefix_cache=not args.disable_radix_cache,
        eviction_policy=args.radix_eviction_policy,
        event_sink=event_sink,
        prefill_chunk=prefill_chunk_tokens(args),
        now=(now_ms if ranks is None else ranks.agree((now_ms,))[0]) / 1e3,
        ranks=ranks,
    )


def open_publisher(config_json: str | None) -> KVEventPublisher | None:
    """The publisher of cache events that the flag asks for, None when it asks for none.

    Raises ValueError when its endpoint can't be used.
    """
    config = KVEventsConfig.from_json(config_json or "{}")
    if not config.enabled:
        return None
    publisher = KVEventPublisher(config)
    logger.info("Publishing cache events: %r", publisher)
    return publisher


def _perturbation(args: ServerArgs, environ: Environ, spec: KVCacheSpec) -> Perturbation | None:
    """Damage for the canary to find; None: none is wanted. Raises ValueError without a canary."""
    text = environ.kv_canary_perturb
    if text is None:
        return None
    if args.kv_canary == "off":
        raise ValueError("SGLANG_KV_CANARY_PERTURB is for a canary to find; set --kv-canary")
    return Perturbation.parse(text, spec.num_groups, full=args.kv_canary == "full")


def _canary(
    args: ServerArgs, memory: KVMemory, damage: Perturbation | None
) -> SchedulerCanary | None:
    if args.kv_canary == "off":
        return None
    logger.warning("The KV canary (%s) checks every step: it is slow.", args.kv_canary)
    return SchedulerCanary(memory.watch(full=args.kv_canary == "full"), damage)


def _limits(
    args: ServerArgs, plan: _PoolPlan, page_size: int, spec: KVCacheSpec
) -> SchedulerLimits:
    return SchedulerLimits(
        page_size=page_size,
        context_length=plan.clamp.effective,
        context_length_requested=plan.clamp.requested,
        max_running_requests=plan.max_running_requests,
        chunk_tokens=prefill_chunk_tokens(args),
        adaptive_chunk=args.chunk_adaptation,
        policy=args.schedule_policy,
        stream_interval=args.stream_interval,
        overlap=not args.disable_overlap_schedule and args.kv_canary == "off",
        window_pages=request_page_bounds(spec, prefill_chunk_tokens(args)),
        random_seed=args.random_seed,
        max_queued_requests=args.max_queued_requests,
        log_interval_steps=args.decode_log_interval,
    )


def _ready(
    attention_backend: str, plan: _PoolPlan, limits: SchedulerLimits, memory: KVMemory
) -> SchedulerReady:
    return SchedulerReady(
        context_length=limits.context_length,
        context_length_requested=limits.context_length_requested,
        capacity_tokens=memory.capacity_tokens,
        max_running_requests=limits.max_running_requests,
        max_req_input_len=limits.context_length - 1,
        page_size=limits.page_size,
        details={
            "explanation": plan.clamp.explanation,
            "kv_backing": memory.manager.backing.name,
            "attention_backend": attention_backend,
        },
    )
