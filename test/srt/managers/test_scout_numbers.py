"""What a token of Llama-4-Scout costs, from its config alone."""

from __future__ import annotations

import json
from pathlib import Path

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.managers.scheduler_pool_plan import kv_cache_spec
from sglang.srt.mem_cache.capacity import effective_context_length, tokens_kept
from sglang.srt.mem_cache.kv_layout import (
    GroupId,
    GroupKind,
)
from sglang.srt.mem_cache.segment_cuts import (
    make_segment_layouts,
)


def test_only_global_layers_grow(tmp_path: Path) -> None:
    raw = {
        "architectures": ["Llama4ForConditionalGeneration"],
        "text_config": {
            "max_position_embeddings": 10_485_760,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 16.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
            },
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = ModelConfig.from_path(str(tmp_path))
    spec = kv_cache_spec(config, ParallelState(), "bfloat16", 64)
    assert spec.bytes_per_token == 196_608
    full, chunked = spec.groups
    assert (full.kind, len(full.layers)) == (GroupKind.FULL, 12)
    assert (chunked.kind, len(chunked.layers), chunked.window) == (GroupKind.CHUNKED, 36, 8192)
    assert spec.bytes_per_slot(GroupId(0)) == 49_152
    assert tokens_kept(chunked, 10_000_000, 8192, 64) == 2 * 8192 + 64

    shard = kv_cache_spec(config, ParallelState(0, 8), "bfloat16", 64)
    budget = 63 * 10**9
    layouts = make_segment_layouts(
        shard,
        slots_per_segment=8192,
        auto_segment_bytes=1,
        auto_min_slots=1,
        granule_bytes=2 << 20,
        machine_bytes=budget,
        budget_bytes=budget,
    )
    clamp = effective_context_length(
        shard,
        layouts,
        budget_bytes=budget,
        reserve_segments=1,
        requested=10_000_000,
        prefill_chunk=8192,
    )
    assert clamp.effective == 10_000_000
    held = 10_000_000 * shard.bytes_per_slot(GroupId(0)) + 8192 * shard.bytes_per_slot(GroupId(1))
    assert round(held / 1e9, 1) == 61.6
