"""From arguments to the parts of a scheduler: model, memory, clamp, worker. Runs once, at start.

The order matters: weights first, then what is left of the machine's memory is the pool's budget,
then the context is clamped to what the budget can hold.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.managers.io_struct import SchedulerReady
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.scheduler_limits import SchedulerLimits
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.mem_cache.allocation import KVMemory, KVPlacement
from sglang.srt.mem_cache.kv_layout import KVCacheSpec, KVGroupSpec
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

logger = logging.getLogger(__name__)

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


def resolve_dtype(requested: str, checkpoint: str) -> str:
    """The type of weights and activations: the requested one, or for "auto" the checkpoint's.

    As in SGLang, auto never computes in float32; on a CPU 16 bits means bfloat16, which has
    hardware products where float16 has none.
    """
    if requested != "auto":
        return requested
    return "bfloat16" if checkpoint in ("float32", "float16") else checkpoint


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
    """The KV cache of one rank: one group that keeps every token.

    Sliding-window layers keep all tokens too and mask what they may not see.
    """
    return KVCacheSpec(
        groups=(KVGroupSpec(layers=tuple(range(config.num_layers))),),
        kv_heads=max(1, config.num_kv_heads // parallel.tp_size),
        head_dim=config.head_dim,
        v_head_dim=config.v_head_dim,
        dtype=dtype,
        page_size=page_size,
    )
