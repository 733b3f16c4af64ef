"""The parts of a scheduler that depend on the device: memory, sampler, recorded steps.

Called by `scheduler_setup` in its order. What a device has left for the KV pool is decided in
`mem_cache/device_budget.py`; here the numbers for it are collected.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.speculative_args import DEFAULT_DRAFT_TOKENS, draft_length, ngram_window
from sglang.srt.errors import BackingError
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.device_sampler import DeviceSampler
from sglang.srt.layers.sampler import Sampler
from sglang.srt.managers.draft_policy import DraftRules
from sglang.srt.managers.tp_worker import TokenSampler
from sglang.srt.mem_cache.device_budget import (
    DeviceMemoryPlan,
    DeviceNeeds,
    plan_device_memory,
    step_allocations,
)
from sglang.srt.mem_cache.kv_layout import GroupId, KVCacheSpec, num_pages_for
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.segment_backing import SegmentBacking, make_backing
from sglang.srt.mem_cache.segment_backing.cuda_vmm_host import HOST_MARGIN_BYTES
from sglang.srt.model_executor.cuda_graph_runner import CudaGraphRunner, capture_sizes
from sglang.srt.model_executor.decode_tapes import CausalLM, DecodeTapes
from sglang.srt.model_executor.lora_places import AdapterPlaces
from sglang.srt.model_executor.model_runner import StepRecorder
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative.model_drafts import ModelRules
from sglang.srt.speculative.ngram_drafts import NgramRules
from sglang.srt.utils.device import DeviceRuntime
from sglang.srt.utils.disk_space import DiskSpace, read_disk_space
from sglang.srt.utils.host_memory import read_host_memory
from sglang.srt.utils.native import native_kernels

logger = logging.getLogger(__name__)

# Kernels on a GPU like long runs, and the driver few calls: docs/kv_segments.md.
_DEVICE_SEGMENT_TOKENS = 8192
# Most tokens of a step with drafts: more pay for themselves on no such machine.
_DRAFTED_STEP_TOKENS = {"cpu": 64, "cuda": 512}


def prefill_chunk_tokens(args: ServerArgs) -> int:
    """Most prompt tokens of a step: the chunk, or --max-prefill-tokens when prompts are whole."""
    if args.chunked_prefill_size == -1:
        return args.max_prefill_tokens
    return min(args.chunked_prefill_size, args.max_prefill_tokens)


def reserve_of(args: ServerArgs, backing: SegmentBacking) -> int:
    """Empty segments that stay mapped; memory that never moves has no reserve."""
    return args.kv_segment_reserve if backing.elastic else 0


class DraftTraits(Protocol):
    """What of a draft model is told by `ModelRules`."""

    @property
    def step_part(self) -> float: ...

    @property
    def reads_hidden(self) -> bool: ...


def draft_rules(args: ServerArgs, drafter: DraftTraits | None) -> DraftRules | None:
    """How requests are drafted; None: they are not.

    What penalties and grammars leave of a draft is found token by token, which a device would have
    to wait for. `drafter` None: no model drafts.
    """
    if args.speculative_algorithm is None:
        return None
    most_tokens, on_cpu = _DRAFTED_STEP_TOKENS[args.device], args.device == "cpu"
    if drafter is not None:
        cost, hidden = drafter.step_part, drafter.reads_hidden
        return ModelRules(draft_length(args), most_tokens, on_cpu, cost, hidden)
    least, most = ngram_window(args)
    return NgramRules(
        max_draft_tokens=args.speculative_num_draft_tokens or DEFAULT_DRAFT_TOKENS,
        min_match=least,
        max_match=most,
        max_step_tokens=most_tokens,
        drafts_edited=on_cpu,
    )


def auto_min_slots(runtime: DeviceRuntime) -> int:
    """The fewest tokens of a segment whose size is chosen automatically."""
    return _DEVICE_SEGMENT_TOKENS if runtime.is_async else 1


def open_backing(
    args: ServerArgs, runtime: DeviceRuntime, *, debug_protect: bool
) -> SegmentBacking:
    """The backing that the arguments ask for, on the runtime's device. Errors: `make_backing`."""

    def available_bytes() -> int:
        return runtime.read_memory().available_bytes

    return make_backing(
        args.kv_backing,
        device=runtime.device.type,
        device_index=runtime.device.index or 0,
        streams=runtime.stream_handles,
        debug_protect=debug_protect,
        available_bytes=available_bytes if runtime.is_async else None,
        num_threads=torch.get_num_threads(),
        disk_path=None if args.kv_disk_path is None else Path(args.kv_disk_path),
        host_tier=args.enable_hierarchical_cache,
    )


def disk_space(args: ServerArgs, num_sharing: int) -> DiskSpace | None:
    """The room that one of `num_sharing` schedulers has for its disk tier; None: it has none.

    Raises BackingError when the directory is none.
    """
    if args.kv_disk_path is None:
        return None
    try:
        space = read_disk_space(Path(args.kv_disk_path))
    except OSError as error:
        raise BackingError(f"--kv-disk-path: {error}") from error
    return replace(space, free_bytes=space.free_bytes // num_sharing)


def host_space(args: ServerArgs, num_sharing: int) -> int | None:
    """Bytes of the host's memory that one of `num_sharing` schedulers may pin; None: no host tier.

    A margin stays for the rest of the host.
    """
    if not args.enable_hierarchical_cache:
        return None
    return max(0, read_host_memory().available_bytes - HOST_MARGIN_BYTES) // num_sharing


def counted_rows(args: ServerArgs) -> int:
    """Requests with penalties that a device counts at a time: those of the largest graph."""
    if args.max_running_requests is None:
        return args.cuda_graph_max_bs
    return min(args.cuda_graph_max_bs, args.max_running_requests)


def make_sampler(args: ServerArgs, runtime: DeviceRuntime) -> TokenSampler:
    """The sampler for logits on the runtime's device."""
    if runtime.is_async:
        return DeviceSampler(runtime, counted_rows=counted_rows(args))
    return Sampler()


def recorded_rows(args: ServerArgs, backend: type[AttentionBackend]) -> tuple[int, ...]:
    """Numbers of rows of the decode steps that a device records; none where it records nothing."""
    if args.disable_cuda_graph or not backend.records_steps:
        return ()
    most = args.cuda_graph_max_bs
    if args.max_running_requests is not None:
        most = min(most, args.max_running_requests)
    return capture_sizes(most)


def fixed_bytes(spec: KVCacheSpec, granule_bytes: int) -> int:
    """What backs the dump page of every plane for good, in whole granules."""
    total = 0
    for number, group in enumerate(spec.groups):
        own = spec.of_group(GroupId(number))
        planes = [
            (len(group.layers), spec.page_size * own.k_bytes_per_slot_layer),
            (len(group.layers), spec.page_size * own.v_bytes_per_slot_layer),
            (
                spec.num_index_layers(GroupId(number)),
                spec.page_size * spec.index_bytes_per_slot_layer,
            ),
        ]
        if group.state is not None:
            planes = [(1, group.state_bytes)]
        total += sum(count * -(-size // granule_bytes) * granule_bytes for count, size in planes)
    return total


def plan_of_device(
    args: ServerArgs,
    runtime: DeviceRuntime,
    free_before: int,
    config: ModelConfig,
    spec: KVCacheSpec,
    backend: type[AttentionBackend],
    granule_bytes: int,
) -> DeviceMemoryPlan | None:
    """The clamp of a device that has its own memory, logged in one line; None on the host.

    `free_before` loading the weights; what is free now is asked. A server that shares its device
    may find more free than before: then nothing counts as taken by weights.
    """
    if not runtime.is_async:
        return None
    memory = runtime.read_memory()
    free_after = min(memory.available_bytes, free_before)
    sizes = recorded_rows(args, backend)
    rows = args.max_running_requests or 4096  # SGLang's rule gives no more
    beside = step_allocations(
        num_rows=rows + 1,
        graph_rows=max(sizes, default=0),
        num_groups=spec.num_groups,
        max_pages=[
            num_pages_for(free_after // spec.bytes_per_slot(GroupId(group)), spec.page_size)
            for group in range(spec.num_groups)
        ],
        vocab_size=config.vocab_size,
        counted_rows=counted_rows(args),
    )
    needs = DeviceNeeds(
        activation_tokens=prefill_chunk_tokens(args),
        graph_rows=max(sizes, default=0),
        ranks=args.num_ranks,
        allocations=(
            ("dump pages", fixed_bytes(spec, granule_bytes)),
            ("attention backend", backend.device_bytes(sizes, spec.num_groups)),
            *beside,
        ),
    )
    plan = plan_device_memory(
        memory.total_bytes, free_before, free_after, args.mem_fraction_static, needs
    )
    logger.info("%s", plan.line())
    return plan


def make_recorder(
    args: ServerArgs,
    model: CausalLM,
    backend: AttentionBackend,
    runtime: DeviceRuntime,
    pool: MHATokenToKVPool,
    adapters: AdapterPlaces | None = None,
) -> StepRecorder | None:
    """What decode steps are recorded on; None where they can't be or the user wants none.

    Tapes on a host, not with several ranks: a recording that is given up half-way would repeat
    collectives; nor of what torch.compile made. Graphs on a device, recorded before this returns.
    Steps that move recurrent states are not recorded.
    """
    if pool.states is not None:
        return None
    if runtime.is_async:
        sizes = recorded_rows(args, type(backend))
        if not sizes:
            return None
        graphs = CudaGraphRunner(
            model,
            runtime,
            pool,
            backend,
            sizes=sizes,
            num_groups=pool.spec.num_groups,
            page_size=pool.page_size,
            adapters=adapters,
        )
        graphs.record()
        return graphs
    kernels = native_kernels() if backend.is_native else None
    if args.enable_torch_compile or args.disable_cuda_graph or args.num_ranks > 1:
        return None
    if kernels is None:
        return None
    return DecodeTapes(
        model,
        kernels,
        args.cuda_graph_max_bs,
        fuses=args.enable_fused_qk_norm_rope,
        adapters=adapters,
    )
