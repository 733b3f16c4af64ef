"""Stage 5: one rank of Llama-4-Scout at tensor parallel 8, real shapes, decoding at 10M tokens.

Weights are random and the other ranks are silent: sums stay this rank's own, so tokens mean nothing
and no time for communication is in the figure. K and V of all 10M tokens lie in cuda_vmm memory, or
of as many as fit: 27 GB of weights and 61 GB of K and V are too much for 80 GB. The report says so
then, and adds what a line through two contexts gives at 10M, by name an extrapolation. The bound is
what must be read of K, V and weights for a token, at the published bandwidth of an H200 and at the
copy bandwidth measured here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gpu_check.records import Journal
from gpu_check.setting import Setting
from gpu_check.stage_figures import measure_ceilings
from gpu_check.stage_kernels import BACKENDS, backend_class
from gpu_check.stage_memory import make_backing, make_driver
from sglang.planner.known_models import KNOWN_MODELS
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.moe import Experts
from sglang.srt.managers.scheduler_pool_plan import kv_cache_spec
from sglang.srt.mem_cache.block_table import BlockTableSnapshot
from sglang.srt.mem_cache.kv_layout import (
    GroupId,
    GroupKind,
    KVCacheSpec,
    SegmentId,
    SegmentLayout,
)
from sglang.srt.mem_cache.memory_pool import (
    MHATokenToKVPool,
)
from sglang.srt.mem_cache.segment_backing.base import Plane
from sglang.srt.mem_cache.segment_backing.cuda_vmm import CudaVmmBacking
from sglang.srt.mem_cache.segment_cuts import (
    make_segment_layouts,
)
from sglang.srt.mem_cache.segment_table_pool import (
    make_kv_pool,
)
from sglang.srt.model_executor.forward_batch_info import BatchGeometry, ForwardBatch
from sglang.srt.model_executor.forward_mode import ForwardMode
from sglang.srt.model_loader.loader import load_model
from sglang.srt.models.causal_lm import CausalLM
from sglang.srt.utils.device import upload
from sglang.srt.utils.progress import Progress

RANKS = 8
CONTEXT = 10_000_000
PAGE_SIZE = 64
H200_BYTES_PER_S = 4.8e12
_LEFT_FREE = 6 << 30
_LEAST_BYTES = 36 << 30  # the weights, what is left free, and some context
_FILL_BYTES = 1 << 30

_TINY_TEXT = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 64,
    "intermediate_size_mlp": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 16,
    "attention_chunk_size": 64,
    "num_local_experts": 4,
}


class LoneRank:
    """Rank 0 of a group whose others say nothing: sums and gathers of this rank's own."""

    rank = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself."""
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """The tensor for every rank."""
        return torch.cat([tensor] * self.size, dim)

    def broadcast(self, data: bytes | None) -> memoryview:
        """What rank 0 says."""
        return memoryview(data or b"")

    def agree(self, votes: Sequence[int]) -> Sequence[int]:
        """One vote counts."""
        return votes


def write_config(folder: Path, *, small: bool) -> str:
    """Scout's published shape, or a tiny one of the same kind."""
    fields: dict[str, Any] = json.loads(json.dumps(KNOWN_MODELS["llama-4-scout"]))
    if small:
        fields["text_config"] |= _TINY_TEXT
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)


@dataclass(frozen=True)
class Rank:
    """A loaded rank with memory for `context` tokens of one request."""

    model: CausalLM
    spec: KVCacheSpec
    pool: MHATokenToKVPool
    layouts: tuple[SegmentLayout, ...]
    context: int

    def tables(self, position: int) -> tuple[BlockTableSnapshot, ...]:
        """The request's table in each group when its newest token stands at `position`."""
        tables = []
        for group, layout in zip(self.spec.groups, self.layouts, strict=True):
            first = 0
            if group.kind is not GroupKind.FULL and group.window is not None:
                first = position - position % group.window
            count = -(-(position + 1 - first) // PAGE_SIZE)
            begin = layout.pages_per_segment  # segment 0 holds the dump page alone
            pages = np.arange(begin, begin + count, dtype=np.int32)
            run = (begin * PAGE_SIZE, count * PAGE_SIZE)
            tables.append(BlockTableSnapshot(pages, first, run, PAGE_SIZE))
        return tuple(tables)

    def batch(self, position: int, backend: AttentionBackend, device: torch.device) -> ForwardBatch:
        """A decode step of the request's token at `position`."""
        tables = self.tables(position)
        one = np.ones(1, np.int64)
        geometry = BatchGeometry(
            seq_lens=one * (position + 1),
            extend_prefix_lens=one * position,
            extend_seq_lens=one,
            q_starts=one * 0,
            logits_rows=one * 0,
            block_tables=tuple((table,) for table in tables),
            page_size=PAGE_SIZE,
        )
        slots = [int(table.page_ids[-1]) * PAGE_SIZE + position % PAGE_SIZE for table in tables]
        ids, positions, rows, *locs = upload(
            [torch.tensor([number]) for number in (7, position, 0, *slots)], device
        )
        return ForwardBatch(
            forward_mode=ForwardMode.DECODE,
            input_ids=ids,
            positions=positions,
            geometry=geometry,
            out_cache_loc=tuple(locs),
            logits_rows=rows,
            token_to_kv_pool=self.pool,
            attn_backend=backend,
            attn_plan=backend.plan(geometry),
            progress=Progress(),
        )


def check_scout(setting: Setting, journal: Journal) -> None:
    """Load, map, decode; milliseconds a token beside the bounds."""
    free = setting.runtime.read_memory().available_bytes
    if not setting.is_dry and free < _LEAST_BYTES:
        journal.skip("scout", f"{free / 1e9:.0f} GB are free, the weights alone take 27 GB")
        return
    copied, _ = measure_ceilings(setting, journal)
    path = write_config(setting.folder / "scout", small=setting.is_dry)
    config = ModelConfig.from_path(path)
    parallel = ParallelState(0, RANKS, LoneRank(RANKS))
    began = time.monotonic()
    model = load_model(
        config,
        load_format="dummy",
        dtype=torch.bfloat16,
        parallel=parallel,
        device=setting.device,
        show_progress=False,
    )
    setting.synchronize()
    spec = kv_cache_spec(config, parallel, "bfloat16", PAGE_SIZE)
    journal.note("rank is loaded", seconds=time.monotonic() - began, weights_gb=_size(model) / 1e9)
    backing = make_backing(setting, make_driver(setting))
    try:
        rank = _mapped(setting, journal, model, spec, backing)
        _decode(setting, journal, rank, copied)
    finally:
        setting.synchronize()
        backing.close()


def _mapped(
    setting: Setting, journal: Journal, model: CausalLM, spec: KVCacheSpec, backing: CudaVmmBacking
) -> Rank:
    """Memory for as many tokens as fit, at most `CONTEXT`, written with zeros."""
    free, context = setting.runtime.read_memory().available_bytes, 4096
    if not setting.is_dry:
        room = free - _LEFT_FREE
        context = min(CONTEXT, room // spec.bytes_per_slot(GroupId(0)))
    if context < CONTEXT:
        wanted = (CONTEXT * spec.bytes_per_slot(GroupId(0)) + _size(model)) / 1e9
        journal.skip(
            "context of 10M tokens",
            f"weights, K and V of {wanted:.1f} GB do not fit; {context:,} tokens are measured",
        )
    layouts = make_segment_layouts(
        spec,
        slots_per_segment=None,
        auto_segment_bytes=32 << 20,
        auto_min_slots=256 if setting.is_dry else 8192,
        granule_bytes=backing.granule_bytes,
        machine_bytes=(context + 8192) * spec.bytes_per_slot(GroupId(0)),
        budget_bytes=0,
    )
    backing.reserve(spec, layouts)
    began, num_segments = time.monotonic(), 0
    for group, layout in zip(spec.groups, layouts, strict=True):
        tokens = context if group.window is None else min(context, group.window)
        count = min(-(-tokens // layout.slots_per_segment), layout.max_segments - 1)
        backing.map(layout.group, [SegmentId(number) for number in range(1, count + 1)])
        num_segments += count
        end = (count + 1) * layout.slots_per_segment
        with setting.runtime.computing():
            for layer in group.layers:
                for plane in (Plane.KEY, Plane.VALUE):
                    view = backing.view(layer, plane)[layout.slots_per_segment : end]
                    step = max(1, _FILL_BYTES // (view[0].numel() * view.element_size()))
                    for first in range(0, len(view), step):
                        view[first : first + step].zero_()
    setting.synchronize()
    journal.note(
        "context is mapped",
        tokens=context,
        segments=num_segments,
        kv_gb=backing.held_bytes / 1e9,
        seconds=time.monotonic() - began,
    )
    pool = make_kv_pool(spec, layouts, backing)
    pool.serve(setting.runtime)
    return Rank(model, spec, pool, layouts, context)


def _decode(setting: Setting, journal: Journal, rank: Rank, copied: float) -> None:
    """A few steps with every backend that loads, tokens at the end of the context."""
    read = _read_bytes(rank)
    steps = 2 if setting.is_dry else 16
    for name in BACKENDS:
        if setting.seconds_left <= 0:
            journal.skip(f"decode {name}", "no time is left")
            continue
        try:
            backend = backend_class(name, setting)(rank.spec)
        except ValueError as reason:
            journal.skip(f"decode {name}", str(reason))
            continue
        try:
            ms = _step_ms(setting, rank, backend, 2 if name == "torch_native" else steps)
        except Exception as reason:  # noqa: BLE001  one backend that breaks is one finding
            journal.fail(f"decode {name}", f"{type(reason).__name__}: {reason}")
            continue
        journal.note(
            f"decode {name}",
            tokens_of_context=rank.context,
            ms_per_token=ms,
            read_gb=read / 1e9,
            h200_bound_ms=read / H200_BYTES_PER_S * 1e3,
            copy_bound_ms=read / copied * 1e3,
        )
        if rank.context < CONTEXT and name == BACKENDS[0]:
            half = replace(rank, context=rank.context // 2)
            half_ms = _step_ms(setting, half, backend, steps)
            journal.note(
                f"decode {name}, extrapolated to 10M tokens, not measured there",
                tokens_of_contexts=f"{half.context} and {rank.context}",
                ms_of_half=half_ms,
                ms_per_token_extrapolated=extrapolated_ms(
                    (half.context, half_ms), (rank.context, ms), CONTEXT
                ),
            )


def extrapolated_ms(short: tuple[int, float], long: tuple[int, float], context: int) -> float:
    """Milliseconds at `context` tokens on the line through two (tokens, milliseconds)."""
    slope = (long[1] - short[1]) / (long[0] - short[0])
    return long[1] + slope * (context - long[0])


def _step_ms(setting: Setting, rank: Rank, backend: AttentionBackend, steps: int) -> float:
    """Milliseconds a step, all of it: planning, transfers, launches, the model, its logits."""
    first = rank.context - steps - 3
    with setting.runtime.computing(), torch.inference_mode():

        def step(position: int) -> torch.Tensor:
            batch = rank.batch(position, backend, setting.device)
            logits: torch.Tensor = rank.model.lm_head(rank.model(batch))
            return logits.argmax(-1)

        for number in range(2):
            step(first + number)
        setting.synchronize()
        began = time.perf_counter()
        for number in range(steps):
            step(first + 2 + number)
        setting.synchronize()
    return (time.perf_counter() - began) / steps * 1e3


def _read_bytes(rank: Rank) -> float:
    """K and V of one step, and the weights that a token uses: one routed expert of each layer."""
    total = 0.0
    for group, table in zip(rank.spec.groups, rank.tables(rank.context - 1), strict=True):
        slots = len(table.page_ids) * PAGE_SIZE
        total += (
            slots
            * len(group.layers)
            * (rank.spec.k_bytes_per_slot_layer + rank.spec.v_bytes_per_slot_layer)
        )
    total += _size(rank.model)
    for module in rank.model.modules():
        if isinstance(module, Experts):
            total -= _size(module) * (1 - 1 / module.num_experts)
    embedding = rank.model.get_submodule("model.embed_tokens")
    return total - _size(embedding)  # of which one row is read


def _size(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


PARTS = (("scout", check_scout),)
