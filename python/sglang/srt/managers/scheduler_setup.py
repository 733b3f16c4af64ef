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
from sglang.srt.managers.scheduler_pool_plan import (
    AUTO_SEGMENT_BYTES,
    PoolPlan,
    kv_cache_spec,
    plan_pool,
    prefill_chunk_tokens,
)
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.mem_cache.allocation import KVMemory, KVPlacement
from sglang.srt.mem_cache.canary_perturb import Perturbation
from sglang.srt.mem_cache.capacity import request_page_bounds
from sglang.srt.mem_cache.kv_events import EventSink
from sglang.srt.mem_cache.kv_layout import KVCacheSpec
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

_SWITCH_INTERVAL_S = 1e-4

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


BatchMaker = Callable[[ScheduleBatch, KVPlacement], ForwardBatch]


@dataclass(frozen=True)
class SchedulerParts:
    """What `make_scheduler` joins; `ready` is what the other processes are told."""

    memory: KVMemory
    worker: TpModelWorker
    make_batch: BatchMaker
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
    _set_threads(args)
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
    model = _load(args, config, parallel, DTYPES[dtype])
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
    tapes = _decode_tapes(args, model, backend)
    worker = TpModelWorker(
        ModelRunner(model, LogitsProcessor(), tapes), Sampler(), plan.max_running_requests + 1
    )
    limits = _limits(args, plan, page_size, spec)
    logger.info("KV pool ready: %r", memory)
    ready = _ready(backend.name, plan, limits, memory)
    return SchedulerParts(
        memory,
        worker,
        _batch_maker(memory, backend, page_size, progress),
        limits,
        ready,
        publisher,
        _canary(args, memory, damage),
    )


def _set_threads(args: ServerArgs) -> None:
    if args.device != "cpu":
        return
    torch.set_num_threads(compute_threads(args.cpu_threads, torch.get_num_threads(), args.tp_size))
    # The worker comes back from native code while the scheduler's thread prepares the next
    # step: by default it would be kept from the interpreter for up to 5 ms.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)


def _load(
    args: ServerArgs, config: ModelConfig, parallel: ParallelState, dtype: torch.dtype
) -> CausalLM:
    return load_model(
        config,
        load_format=args.load_format,
        dtype=dtype,
        parallel=parallel,
        device=args.device,
        show_progress=parallel.tp_rank == 0,
        seed=args.random_seed,
        quantization=args.quantization,
    )


def _batch_maker(
    memory: KVMemory, backend: AttentionBackend, page_size: int, progress: Progress
) -> BatchMaker:
    def make_batch(batch: ScheduleBatch, placement: KVPlacement) -> ForwardBatch:
        return ForwardBatch.from_schedule_batch(
            batch,
            placement,
            pool=memory.kv_pool,
            backend=backend,
            page_size=page_size,
            progress=progress,
        )

    return make_batch


def _decode_tapes(
    args: ServerArgs, model: CausalLM, backend: AttentionBackend
) -> DecodeTapes | None:
    """What decode steps are recorded on; None where they can't be or the user wants none.

    Not with several ranks: a recording that is given up half-way would repeat collectives.
    """
    kernels = native_kernels() if backend.records_steps else None
    if kernels is None or args.disable_cuda_graph or args.tp_size > 1:
        return None
    return DecodeTapes(model, kernels, args.cuda_graph_max_bs)


def _make_memory(
    args: ServerArgs,
    spec: KVCacheSpec,
    backing: SegmentBacking,
    plan: PoolPlan,
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


def _limits(args: ServerArgs, plan: PoolPlan, page_size: int, spec: KVCacheSpec) -> SchedulerLimits:
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
    attention_backend: str, plan: PoolPlan, limits: SchedulerLimits, memory: KVMemory
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
