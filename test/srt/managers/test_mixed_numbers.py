"""What a token of Gemma-3-27B, EXAONE-4.0-32B and gpt-oss-20b costs, by published shapes alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.managers.scheduler_pool_plan import kv_cache_spec
from sglang.srt.mem_cache.capacity import tokens_kept
from sglang.srt.mem_cache.kv_layout import GroupId, GroupKind, KVCacheSpec

GEMMA_27B: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "text_config": {
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_attention_heads": 32,
        "num_hidden_layers": 62,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "query_pre_attn_scalar": 168,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
}
EXAONE_32B: dict[str, Any] = {
    "architectures": ["Exaone4ForCausalLM"],
    "hidden_size": 5120,
    "intermediate_size": 27392,
    "num_attention_heads": 40,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "sliding_window_pattern": "LLLG",
}
GPT_OSS_20B: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "num_hidden_layers": 24,
    "num_local_experts": 32,
}


def spec_of(folder: Path, raw: dict[str, Any]) -> KVCacheSpec:
    (folder / "config.json").write_text(json.dumps(raw))
    config = ModelConfig.from_path(str(folder))
    assert config.max_position_embeddings == 131072
    return kv_cache_spec(config, ParallelState(), "bfloat16", 64)


def bytes_at(spec: KVCacheSpec, tokens: int, prefill_chunk: int) -> int:
    """Of one request of `tokens` tokens, window groups at their peak."""
    return sum(
        tokens_kept(group, tokens, prefill_chunk, spec.page_size)
        * spec.bytes_per_slot(GroupId(number))
        for number, group in enumerate(spec.groups)
    )


def test_gemma_3_27b(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, GEMMA_27B)
    full, sliding = spec.groups
    assert (full.kind, len(full.layers)) == (GroupKind.FULL, 10)
    assert (sliding.kind, len(sliding.layers), sliding.window) == (GroupKind.SLIDING, 52, 1024)
    layer = 2 * 16 * 128 * 2  # K and V, 16 heads of 128, two bytes
    assert spec.bytes_per_token == 62 * layer == 507_904
    assert spec.bytes_per_slot(GroupId(0)) == 10 * layer == 81_920
    assert tokens_kept(sliding, 131_072, 2048, 64) == 1024 + 2048 + 64
    held, dense = bytes_at(spec, 131_072, 2048), 131_072 * spec.bytes_per_token
    assert held == 131_072 * 81_920 + 3136 * 425_984
    assert round(dense / held, 1) == 5.5


def test_exaone_4_32b(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, EXAONE_32B)
    full, sliding = spec.groups
    assert (full.kind, full.layers) == (GroupKind.FULL, tuple(range(3, 64, 4)))
    assert (sliding.kind, len(sliding.layers), sliding.window) == (GroupKind.SLIDING, 48, 4096)
    layer = 2 * 8 * 128 * 2
    assert spec.bytes_per_token == 64 * layer == 262_144
    assert spec.bytes_per_slot(GroupId(0)) == 16 * layer == 65_536
    held, dense = bytes_at(spec, 131_072, 2048), 131_072 * spec.bytes_per_token
    assert held == 131_072 * 65_536 + 6208 * 196_608 == 9_810_477_056
    assert round(dense / held, 1) == 3.5


def test_gpt_oss_20b(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, GPT_OSS_20B)
    full, sliding = spec.groups
    assert (full.kind, full.layers) == (GroupKind.FULL, tuple(range(1, 24, 2)))
    assert (sliding.kind, sliding.layers) == (GroupKind.SLIDING, tuple(range(0, 24, 2)))
    assert sliding.window == 128
    layer = 2 * 8 * 64 * 2
    assert spec.bytes_per_token == 24 * layer == 49_152
    assert spec.bytes_per_slot(GroupId(0)) == 12 * layer == 24_576
    assert tokens_kept(sliding, 131_072, 2048, 64) == 128 + 2048 + 64
    held, dense = bytes_at(spec, 131_072, 2048), 131_072 * spec.bytes_per_token
    assert held == (131_072 + 2240) * 24_576
    assert round(dense / held, 2) == 1.97
