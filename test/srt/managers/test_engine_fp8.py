"""The device tower over K and V of fp8: all backends and backings give the same tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sglang.srt.mem_cache.segment_backing.segment_plane import SegmentPlane
from sglang.srt.utils.native import native_kernels
from srt.managers.test_decode_tapes import tapes_of
from srt.managers.test_engine_tokens import PROMPTS, answer_all, tower
from srt.models.hf_models import make_hf_model, save

pytestmark = pytest.mark.skipif(native_kernels() is None, reason="sgl-kernel is not installed")

FP8 = ("fp8_e4m3", "fp8_e5m2")
NATIVE = {"attention_backend": "cpu"}
TORCH = {"attention_backend": "torch_native"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(make_hf_model("llama"), tmp_path_factory.mktemp("llama"))


def answers(path: str, dtype: str, **flags: object) -> list[list[int]]:
    with tower(path, kv_cache_dtype=dtype, **flags) as engine:
        return answer_all(engine)


@pytest.mark.parametrize("dtype", FP8)
def test_backends_and_backings_agree(llama: str, dtype: str) -> None:
    expected = answers(llama, dtype, **TORCH)
    assert expected != answers(llama, "float32", **TORCH)
    for flags in (
        {**NATIVE},
        {**NATIVE, "page_size": 16, "kv_segment_size": 64, "disable_cuda_graph": True},
        {**NATIVE, "page_size": 1, "kv_segment_size": 64, "chunked_prefill_size": 32},
        {**NATIVE, "kv_backing": "segment_table", "page_size": 16, "kv_segment_size": 64},
        {**TORCH, "kv_backing": "segment_table"},
        {**TORCH, "page_size": 16, "kv_segment_size": 64, "disable_overlap_schedule": True},
    ):
        assert answers(llama, dtype, **flags) == expected, flags


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_decode_steps_are_recorded(family: str, dtype: str, tmp_path: Path) -> None:
    changes = {"sliding_window": 50} if family == "mistral" else {}
    path = save(make_hf_model(family, **changes), tmp_path)
    with tower(path, kv_cache_dtype=dtype, **NATIVE) as engine:
        found = answer_all(engine)
        assert tapes_of(engine).recorded == (1, 2, 3, 4, 5, 6)
        assert not tapes_of(engine).refused
    assert found == answers(path, dtype, disable_cuda_graph=True, **NATIVE)


def test_a_second_round_hits_the_cache_and_answers_the_same(llama: str) -> None:
    with tower(llama, kv_cache_dtype="fp8_e4m3", page_size=16, **NATIVE) as engine:
        first = answer_all(engine)
        engine.channel.outs.clear()
        assert answer_all(engine) == first
        cached = {out.rid: out.cached_tokens for out in engine.channel.outs}
        assert cached["r2"] == 128


@pytest.mark.parametrize(("backing", "mode"), [("mmap", "full"), ("segment_table", "chain")])
def test_the_canary_reads_bytes(llama: str, backing: str, mode: str) -> None:
    flags = {"kv_backing": backing, "page_size": 16, "kv_segment_size": 64, "kv_canary": mode}
    with tower(llama, kv_cache_dtype="fp8_e4m3", **flags) as engine:
        assert answer_all(engine) == answers(llama, "fp8_e4m3", **TORCH)


@pytest.mark.parametrize("dtype", FP8)
def test_capacity_doubles(llama: str, dtype: str) -> None:
    tokens, bytes_per_token = {}, {}
    for name in ("bfloat16", dtype):
        flags = {"kv_memory_budget": "32MiB", "kv_segment_size": 64, "page_size": 16}
        with tower(llama, kv_cache_dtype=name, **flags) as engine:
            tokens[name] = engine.memory.memory_object()["capacity_tokens"]
            bytes_per_token[name] = engine.memory.spec.bytes_per_token
    assert bytes_per_token["bfloat16"] == 2 * bytes_per_token[dtype]
    assert 1.9 < tokens[dtype] / tokens["bfloat16"] < 2.1


@pytest.mark.parametrize("backing", ["mmap", "segment_table"])
def test_planes_hold_bytes(llama: str, backing: str) -> None:
    with tower(llama, kv_cache_dtype="fp8_e5m2", kv_backing=backing) as engine:
        engine.send("r", PROMPTS[1])
        engine.run()
        plane = engine.memory.kv_pool.get_key_buffer(0)
        assert isinstance(plane, SegmentPlane) == (backing == "segment_table")
        assert plane.dtype == torch.float8_e5m2
