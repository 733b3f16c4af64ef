"""The device tower over K and V of int8: all backends and backings give the same tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sglang.srt.mem_cache.kv_layout import KVCacheSpec, KVGroupSpec
from sglang.srt.utils.native import native_kernels
from srt.managers.test_engine_tokens import PROMPTS, answer_all, tower
from srt.models.hf_models import make_hf_model, save

pytestmark = pytest.mark.skipif(native_kernels() is None, reason="sgl-kernel is not installed")

NATIVE = {"attention_backend": "cpu"}
TORCH = {"attention_backend": "torch_native"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(make_hf_model("llama"), tmp_path_factory.mktemp("llama"))


def answers(path: str, **flags: object) -> list[list[int]]:
    with tower(path, kv_cache_dtype="int8", **flags) as engine:
        return answer_all(engine)


def test_backends_and_backings_agree(llama: str) -> None:
    expected = answers(llama, **TORCH)
    for flags in (
        {**NATIVE},
        {**NATIVE, "page_size": 16, "kv_segment_size": 64, "disable_cuda_graph": True},
        {**NATIVE, "page_size": 1, "kv_segment_size": 64, "chunked_prefill_size": 32},
        {**NATIVE, "kv_backing": "segment_table", "page_size": 16, "kv_segment_size": 64},
        {**NATIVE, "enable_fused_qk_norm_rope": True},
        {**TORCH, "kv_backing": "segment_table"},
        {**TORCH, "page_size": 16, "kv_segment_size": 64, "disable_overlap_schedule": True},
    ):
        assert answers(llama, **flags) == expected, flags


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma3"])
def test_families(family: str, tmp_path: Path) -> None:
    changes = {"sliding_window": 50} if family == "mistral" else {}
    path = save(make_hf_model(family, **changes), tmp_path)
    flags = {"page_size": 16, "kv_segment_size": 64}
    assert answers(path, **NATIVE, **flags) == answers(path, **TORCH, **flags)


@pytest.mark.parametrize(("backing", "mode"), [("mmap", "full"), ("segment_table", "chain")])
def test_the_canary_reads_rows_with_their_scales(llama: str, backing: str, mode: str) -> None:
    flags = {"kv_backing": backing, "page_size": 16, "kv_segment_size": 64, "kv_canary": mode}
    assert answers(llama, **flags) == answers(llama, **TORCH)


@pytest.mark.parametrize("backing", ["mmap", "segment_table"])
def test_planes_hold_a_scale_behind_each_head(llama: str, backing: str) -> None:
    with tower(llama, kv_cache_dtype="int8", kv_backing=backing) as engine:
        engine.send("r", PROMPTS[1])
        engine.run()
        spec, plane = engine.memory.spec, engine.memory.kv_pool.get_key_buffer(0)
        assert plane.dtype == torch.int8
        assert tuple(plane.shape[1:]) == (spec.kv_heads, spec.head_dim + 4)
        heads = spec.kv_heads * spec.num_layers
        assert spec.bytes_per_token == 2 * heads * (spec.head_dim + 4)


def test_heads_of_an_odd_width_are_refused() -> None:
    groups = (KVGroupSpec((0,)),)
    with pytest.raises(ValueError, match="multiples of 4, not 30 and 32"):
        KVCacheSpec(groups, kv_heads=1, head_dim=30, v_head_dim=32, dtype="int8", page_size=1)
    KVCacheSpec(groups, kv_heads=1, head_dim=28, v_head_dim=32, dtype="int8", page_size=1)
