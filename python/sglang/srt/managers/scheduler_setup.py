"""From arguments to the parts of a scheduler: model, memory, clamp, worker. Runs once, at start.

The order matters: weights first, then what is left of the machine's memory is the pool's budget,
then the context is clamped to what the budget can hold.
"""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass, field

import torch

from sglang.srt.configs.model_config import ModelConfig, resolve_context_length
from sglang.srt.configs.pooling_config import PoolingConfig, pooling_of
from sglang.srt.constrained.compiler import GrammarCompiler
from sglang.srt.constrained.grammar import JsonStyle, check_style
from sglang.srt.distributed.communicator import Communicator, RankLinks
from sglang.srt.distributed.rank_grid import RankGrid
from sglang.srt.environ import Environ
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.attention.registry import get_attention_backend, make_attention_backend
from sglang.srt.layers.compiled import compile_layers
from sglang.srt.managers.draft_policy import DraftRules
from sglang.srt.managers.io_struct import SchedulerReady
from sglang.srt.managers.priority_policy import PriorityRules
from sglang.srt.managers.scheduler_canary import SchedulerCanary
from sglang.srt.managers.scheduler_device import (
    auto_min_slots,
    disk_space,
    draft_rules,
    host_space,
    open_backing,
    plan_of_device,
    prefill_chunk_tokens,
    reserve_of,
)
from sglang.srt.managers.scheduler_drafting import (
    BatchMaker,
    LoadedDraft,
    ModelSides,
    batch_maker,
    load_draft,
    make_drafter,
    make_side,
    with_draft,
)
from sglang.srt.managers.scheduler_dtypes import DTYPES, resolve_dtype, resolve_kv_dtype
from sglang.srt.managers.scheduler_grammars import GrammarQueue
from sglang.srt.managers.scheduler_kv_events import KVEventPublisher, open_publisher
from sglang.srt.managers.scheduler_limits import SchedulerLimits
from sglang.srt.managers.scheduler_lora import SchedulerAdapters, open_adapters
from sglang.srt.managers.scheduler_pool_plan import (
    AUTO_SEGMENT_BYTES,
    LowerSpace,
    PoolPlan,
    agreed_space,
    check_states,
    kv_cache_spec,
    plan_pool,
)
from sglang.srt.managers.scheduler_start import agreed_device_plan, agreed_memory
from sglang.srt.managers.scheduler_worker import AnyWorker, args_for_pooling, make_worker
from sglang.srt.mem_cache.allocation import KVMemory
from sglang.srt.mem_cache.canary_perturb import Perturbation
from sglang.srt.mem_cache.capacity import request_page_bounds
from sglang.srt.mem_cache.kv_events import EventSink
from sglang.srt.mem_cache.kv_layout import KVCacheSpec
from sglang.srt.mem_cache.segment_backing import SegmentBacking
from sglang.srt.model_loader.loader import load_model
from sglang.srt.models.causal_lm import CausalLM
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.cpu_cores import usable_cores
from sglang.srt.utils.device import DeviceRuntime, make_runtime
from sglang.srt.utils.progress import Progress
from sglang.srt.utils.rendezvous import ALONE, RankPlace

logger = logging.getLogger(__name__)

_SWITCH_INTERVAL_S = 1e-4


@dataclass(frozen=True)
class SchedulerParts:
    """What `make_scheduler` joins; `ready` is what the other processes are told."""

    memory: KVMemory
    worker: AnyWorker
    make_batch: BatchMaker
    limits: SchedulerLimits
    ready: SchedulerReady
    grammars: GrammarQueue
    publisher: KVEventPublisher | None = None
    canary: SchedulerCanary | None = None
    adapters: SchedulerAdapters = field(default_factory=SchedulerAdapters)


@dataclass(frozen=True)
class _Rank:
    """Who builds: its settings and device, its place, and its links to the others."""

    args: ServerArgs
    environ: Environ
    runtime: DeviceRuntime
    place: RankPlace
    grid: RankGrid
    links: RankLinks | None
    everyone: Communicator | None


def compute_threads(requested: int | None, present: int, num_ranks: int = 1) -> int:
    """Threads of one rank's products: the requested number, else its share of the cores.

    `present` is what the process has otherwise, OMP_NUM_THREADS included.
    """
    if requested is not None:
        return requested
    return max(1, min(present, usable_cores() // num_ranks))


def build_scheduler_parts(
    args: ServerArgs,
    environ: Environ,
    progress: Progress,
    links: RankLinks | None = None,
    *,
    everyone: Communicator | None = None,
    place: RankPlace | None = None,
    runtime: DeviceRuntime | None = None,
) -> SchedulerParts:
    """Load this rank's part of the model and make its pool, in this order.

    `links` to the other ranks, which build theirs at the same time; None with one rank. `everyone`
    are all schedulers of the server, `place` (None: by the links) is this one's among them.
    `runtime` stands for the device that the arguments name; None: that one. Raises ValueError with
    one line for anything the user has to change, BackingError or OSError for what the machine
    refuses, RankLostError when another rank does not come.
    """
    if links is None:
        _check_alone(args)
    else:
        place = place or RankPlace(links.rank, links.size, num_here=links.size)
        everyone = everyone or links.control
    place = place or ALONE
    runtime = runtime or make_runtime(args.device, place.device_index)
    _set_threads(args, runtime, place.num_here)
    config = ModelConfig.from_path(
        args.model_path,
        overrides=args.model_overrides(),
        trust_remote_code=args.trust_remote_code,
        multimodal=args.enable_multimodal,
    )
    pooling = pooling_of(config, is_embedding=args.is_embedding)
    args = args_for_pooling(args, pooling)
    check_states(args, config)
    requested = resolve_context_length(config, args.context_length, environ)
    config = config.for_context(requested)
    grid = RankGrid.of(links, args.kv_parallel_size)
    rank = _Rank(args, environ, runtime, place, grid, links, everyone)
    dtype = resolve_dtype(args.dtype, config.torch_dtype, args.device)
    free_before = runtime.read_memory().available_bytes
    kv_dtype, remark = resolve_kv_dtype(args.kv_cache_dtype, config.kv_cache, dtype)
    if remark is not None:
        logger.log(logging.INFO if kv_dtype != dtype else logging.WARNING, "%s", remark)
    model = _load(rank, config, DTYPES[dtype], pooling, scales_kv=kv_dtype.startswith("fp8"))
    draft = _load_draft(rank, config, model, DTYPES[dtype], kv_dtype)
    control = None if links is None else links.control
    places, adapters = open_adapters(args, model, control, runtime)
    backend_class = get_attention_backend(args.attention_backend, args.device)
    page_size = args.page_size or backend_class.preferred_page_size
    grammars = _grammars(args, config.vocab_size)
    own_spec = kv_cache_spec(config, grid.parallel, kv_dtype, page_size)
    spec = with_draft(own_spec, draft, grid.parallel)
    damage = _perturbation(args, environ, spec)
    runtime.synchronize()  # the weights were copied elsewhere than on the compute stream
    plan, memory, publisher = _open_pool(
        rank, config, spec, backend_class, requested=requested, free_before=free_before
    )
    sides = ModelSides.of(memory, own_spec.num_groups)
    topk = None if config.index is None else config.index.topk
    backend = make_attention_backend(backend_class, sides.own, grid.kv_group, topk)
    side = make_side(draft, backend_class, sides, progress)
    drafter = make_drafter(args, draft, side, runtime)
    num_rows = plan.max_running_requests + 1
    worker = make_worker(args, model, backend, runtime, sides.own, num_rows, places, drafter)
    runtime.synchronize()
    rules = draft_rules(args, draft)
    limits = _limits(args, plan, page_size, spec, rules)
    logger.info("KV pool ready: %r", memory)
    ready = _ready(backend_class.name, plan, limits, memory)
    make_batch = batch_maker(sides, backend, side, progress)
    canary = _canary(args, memory, damage)
    return SchedulerParts(
        memory, worker, make_batch, limits, ready, grammars, publisher, canary, adapters
    )


def _grammars(args: ServerArgs, vocab_size: int) -> GrammarQueue:
    """Raises ValueError for a whitespace pattern that is none."""
    if args.grammar_backend == "none":
        return GrammarQueue(None)
    style = JsonStyle(
        compact=args.constrained_json_disable_any_whitespace,
        whitespace_pattern=args.constrained_json_whitespace_pattern,
    )
    check_style(style)
    return GrammarQueue(GrammarCompiler(vocab_size, style))


def _check_alone(args: ServerArgs) -> None:
    """Raise ValueError when a scheduler without links was asked to be one of several ranks."""
    if args.num_ranks > 1:
        sizes = {"--tp-size": args.tp_size, "--kv-parallel-size": args.kv_parallel_size}
        several = ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
        raise ValueError(f"{several}: only a server or an Engine has several ranks")


def _warn_of_nothing_shared(args: ServerArgs, memory: KVMemory) -> None:
    if args.kv_parallel_size > 1 and not memory.kv_pool.share.shares_any:
        logger.warning(
            "--kv-parallel-size spreads nothing: no layer of this model keeps all tokens"
        )


def _set_threads(args: ServerArgs, runtime: DeviceRuntime, num_here: int) -> None:
    if not runtime.is_async:
        threads = compute_threads(args.cpu_threads, torch.get_num_threads(), num_here)
        torch.set_num_threads(threads)
    # The worker comes back from native code while the scheduler's thread prepares the next
    # step: by default it would be kept from the interpreter for up to 5 ms.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)


def _load(
    rank: _Rank,
    config: ModelConfig,
    dtype: torch.dtype,
    pooling: PoolingConfig | None,
    *,
    scales_kv: bool,
) -> CausalLM:
    args = rank.args
    model = load_model(
        config,
        load_format=args.load_format,
        dtype=dtype,
        parallel=rank.grid.parallel,
        device=rank.runtime.device,
        show_progress=rank.place.number == 0,
        seed=args.random_seed,
        quantization=args.quantization,
        scales_kv=scales_kv,
        kv_scale_path=args.quantization_param_path,
        pooling=pooling,
    )
    if args.enable_torch_compile:
        compile_layers(model, args.torch_compile_max_bs)
    return model


def _load_draft(
    rank: _Rank, config: ModelConfig, model: CausalLM, dtype: torch.dtype, kv_dtype: str
) -> LoadedDraft | None:
    return load_draft(
        rank.args,
        config,
        model,
        dtype=dtype,
        parallel=rank.grid.parallel,
        device=rank.runtime.device,
        scales_kv=kv_dtype.startswith("fp8"),
        show_progress=rank.place.number == 0,
    )


def _open_pool(
    rank: _Rank,
    config: ModelConfig,
    spec: KVCacheSpec,
    backend_class: type[AttentionBackend],
    *,
    requested: int,
    free_before: int,
) -> tuple[PoolPlan, KVMemory, KVEventPublisher | None]:
    """The pool in what the weights left, and who tells of its cache (None: nobody is to).

    `requested` tokens of context are clamped to it; `free_before` were the device's bytes before
    the weights. All ranks agree on the numbers.
    """
    args, runtime = rank.args, rank.runtime
    backing = open_backing(args, runtime, debug_protect=rank.environ.kv_debug_protect)
    num_sharing = 1 if runtime.is_async else rank.place.num_here  # a device is one scheduler's
    host = agreed_memory(rank.everyone, num_sharing, runtime.read_memory)
    device_plan = agreed_device_plan(
        rank.everyone,
        plan_of_device(
            args, runtime, free_before, config, spec, backend_class, backing.granule_bytes
        ),
    )
    num_here, min_slots = rank.place.num_here, auto_min_slots(runtime)
    below = LowerSpace(disk_space(args, num_here), host_space(args, num_here))
    below = agreed_space(rank.everyone, below)
    plan = plan_pool(args, spec, backing, host, requested, device_plan, min_slots, below)
    if plan.clamp.is_clamped:
        logger.warning("Context length clamped: %s.", plan.clamp.explanation)
    # All ranks cache alike; one of them tells.
    events = args.kv_events_config if rank.place.tp_rank == 0 else None
    publisher = open_publisher(events, rank.place)
    sink = None if publisher is None else publisher.publish
    memory = _make_memory(rank, spec, backing, plan, host.total_bytes + plan.lower_bytes, sink)
    memory.kv_pool.serve(runtime)
    _warn_of_nothing_shared(args, memory)
    return plan, memory, publisher


def _make_memory(
    rank: _Rank,
    spec: KVCacheSpec,
    backing: SegmentBacking,
    plan: PoolPlan,
    machine_bytes: int,
    event_sink: EventSink | None,
) -> KVMemory:
    args = rank.args
    ranks = None if rank.links is None else rank.links.control
    now_ms = int(time.monotonic() * 1e3)
    return KVMemory.create(
        spec,
        backing,
        budget_bytes=plan.budget_bytes,
        machine_bytes=machine_bytes,
        max_requests=plan.max_running_requests,
        slots_per_segment=args.kv_segment_size,
        auto_segment_bytes=AUTO_SEGMENT_BYTES,
        auto_min_slots=auto_min_slots(rank.runtime),
        reserve_segments=reserve_of(args, backing),
        idle_release_s=args.kv_idle_release_seconds,
        prefix_idle_s=args.prefix_cache_idle_seconds,
        max_cached_tokens=args.max_cached_tokens,
        enable_prefix_cache=not args.disable_radix_cache,
        eviction_policy=args.radix_eviction_policy,
        event_sink=event_sink,
        prefill_chunk=prefill_chunk_tokens(args),
        now=(now_ms if ranks is None else ranks.agree((now_ms,))[0]) / 1e3,
        ranks=ranks,
        kv_ranks=rank.grid.kv_ranks,
        lower_budget_bytes=plan.lower_bytes,
    )


def _perturbation(args: ServerArgs, environ: Environ, spec: KVCacheSpec) -> Perturbation | None:
    """Damage for the canary to find; None: none is wanted. Raises ValueError without a canary."""
    text = environ.kv_canary_perturb
    if text is None:
        return None
    if args.kv_canary == "off":
        raise ValueError("SGLANG_KV_CANARY_PERTURB is for a canary to find; set --kv-canary")
    num_groups = sum(group.state is None for group in spec.groups)  # states carry no marks
    return Perturbation.parse(text, num_groups, full=args.kv_canary == "full")


def _canary(
    args: ServerArgs, memory: KVMemory, damage: Perturbation | None
) -> SchedulerCanary | None:
    if args.kv_canary == "off":
        return None
    logger.warning("The KV canary (%s) checks every step: it is slow.", args.kv_canary)
    return SchedulerCanary(memory.watch(full=args.kv_canary == "full"), damage)


def _limits(
    args: ServerArgs,
    plan: PoolPlan,
    page_size: int,
    spec: KVCacheSpec,
    drafts: DraftRules | None,
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
        priorities=_priority_rules(args),
        drafts=drafts,
    )


def _priority_rules(args: ServerArgs) -> PriorityRules | None:
    if not args.enable_priority_scheduling:
        return None
    threshold = args.priority_scheduling_preemption_threshold
    return PriorityRules(
        low_first=args.schedule_low_priority_values_first,
        default=args.default_priority_value,
        threshold=None if args.disable_priority_preemption else threshold,
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
