"""The device tower over a scaled KV cache of fp8: all ways to compute give the same tokens."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang.srt.mem_cache.segment_backing.segment_plane import raw
from sglang.srt.utils.native import native_kernels, triton_kernels
from srt.managers.rank_towers import rank_towers
from srt.managers.test_decode_tapes import tapes_of
from srt.managers.test_engine_tokens import PROMPTS, answer_all, tower
from srt.model_loader.test_kv_scales import add_tensors
from srt.models.hf_models import make_hf_model, save

pytestmark = pytest.mark.skipif(native_kernels() is None, reason="sgl-kernel is not installed")

FP8 = {"kv_cache_dtype": "fp8_e4m3"}
NATIVE = {"attention_backend": "cpu"}
TORCH = {"attention_backend": "torch_native"}
LARGE = 1000.0


def scaled_model(family: str, folder: Path, *, k_scale: float, v_scale: float) -> str:
    """V a thousand times as large, taken back by the output; K's scale is small."""
    hf = make_hf_model(family)
    for layer in hf.model.layers:
        layer.self_attn.v_proj.weight.data.mul_(LARGE)
        layer.self_attn.o_proj.weight.data.div_(LARGE)
    path = save(hf, folder)
    for layer in range(hf.config.num_hidden_layers):
        name = f"model.layers.{layer}.self_attn"
        scales = {"k_proj.k_scale": k_scale, "v_proj.v_scale": v_scale}
        add_tensors(path, {f"{name}.{key}": torch.tensor(x) for key, x in scales.items()})
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    return scaled_model("llama", folder, k_scale=0.03, v_scale=7.0)


def answers(path: str, **flags: object) -> list[list[int]]:
    with tower(path, **FP8, **flags) as engine:
        return answer_all(engine)


def test_backends_backings_and_ranks_agree(llama: str) -> None:
    expected = answers(llama, **TORCH)
    for flags in (
        {**NATIVE},
        {**NATIVE, "disable_cuda_graph": True, "page_size": 16, "kv_segment_size": 64},
        {**NATIVE, "enable_fused_qk_norm_rope": True},
        {**NATIVE, "kv_backing": "segment_table", "page_size": 16, "kv_segment_size": 64},
        {**TORCH, "kv_backing": "segment_table"},
        {**TORCH, "page_size": 16, "chunked_prefill_size": 32, "kv_canary": "full"},
    ):
        assert answers(llama, **flags) == expected, flags
    for flags in ({}, {"kv_parallel_size": 2}):
        with rank_towers(2, llama, **FP8, page_size=16, kv_segment_size=64, **flags) as ranks:
            assert ranks.run(answer_all) == expected, flags


@pytest.mark.skipif(triton_kernels() is None, reason="Triton is not installed")
def test_triton_agrees(llama: str) -> None:
    found = []
    for backend in ("torch_native", "triton"):
        with tower(llama, **FP8, attention_backend=backend, page_size=16) as engine:
            engine.send("r", PROMPTS[1], max_new_tokens=6)
            engine.run()
            found.append(engine.output("r"))
    assert found[0] == found[1]


@pytest.mark.parametrize("fuses", [False, True])
def test_decode_steps_are_recorded(llama: str, fuses: bool) -> None:
    flags = {**NATIVE, "enable_fused_qk_norm_rope": fuses}
    with tower(llama, **FP8, **flags) as engine:
        answer_all(engine)
        assert tapes_of(engine).recorded == (1, 2, 3, 4, 5, 6)
        assert not tapes_of(engine).refused


def test_scales_of_powers_of_two_keep_every_bit(tmp_path: Path) -> None:
    """The same model, its V in other units: the same bytes in the cache, the same tokens."""
    plain = save(make_hf_model("llama"), tmp_path / "plain")
    hf = make_hf_model("llama")
    for layer in hf.model.layers:
        layer.self_attn.v_proj.weight.data.mul_(1024.0)
        layer.self_attn.o_proj.weight.data.div_(1024.0)
    path = save(hf, tmp_path / "other")
    for layer in range(hf.config.num_hidden_layers):
        name = f"model.layers.{layer}.self_attn"
        ones = {f"{name}.k_scale": torch.tensor(1.0), f"{name}.v_scale": torch.tensor(1024.0)}
        add_tensors(path, ones)
    found = []
    for model in (plain, path):
        with tower(model, **FP8, **NATIVE) as engine:
            tokens = answer_all(engine)
            engine.send("last", PROMPTS[1])
            engine.run()
            values = engine.memory.kv_pool.get_value_buffer(1)
            assert isinstance(values, torch.Tensor)
            found.append((tokens, raw(values)[: engine.memory.kv_pool.page_size * 4].clone()))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def declare(path: str, **change: Any) -> None:
    """Let config.json say how the KV cache is quantised, as compressed-tensors does."""
    file = Path(path) / "config.json"
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, **change}
    quantization = {"quant_method": "compressed-tensors", "kv_cache_scheme": scheme}
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "quantization_config": quantization})
    )


def test_auto_is_what_the_checkpoint_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = scaled_model("llama", tmp_path, k_scale=0.03, v_scale=7.0)
    declare(path)
    expected = answers(path, **NATIVE)
    with caplog.at_level(logging.INFO), tower(path, kv_cache_dtype="auto", **NATIVE) as engine:
        assert answer_all(engine) == expected
        assert engine.memory.kv_pool.spec.dtype == "fp8_e4m3"
    assert "The KV cache is fp8_e4m3, as the checkpoint says" in caplog.text
    assert "scaled by 0.03 to 7" in caplog.text
    with tower(path, kv_cache_dtype="float32", **NATIVE) as engine:
        assert engine.memory.kv_pool.spec.dtype == "float32"


def test_a_scheme_that_is_not_served_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The cache is not quantised then, and a scale for each head is in nobody's way."""
    path = save(make_hf_model("llama"), tmp_path)
    with tower(path, **NATIVE) as engine:
        expected = answer_all(engine)
    heads = {"k_scale": torch.ones(2), "v_scale": torch.ones(2)}
    add_tensors(path, {f"model.layers.0.self_attn.{name}": x for name, x in heads.items()})
    declare(path, strategy="attn_head")
    with caplog.at_level(logging.WARNING), tower(path, **NATIVE) as engine:
        assert answer_all(engine) == expected
        assert engine.memory.kv_pool.spec.dtype == "float32"
    assert "scheme for its KV cache is not served" in caplog.text
    assert "attn_head" in caplog.text
    with pytest.raises(ValueError, match="only one scale for a layer is served"):
        answers(path, **NATIVE)


def test_a_scale_brings_answers_back(tmp_path: Path) -> None:
    """Values of thousands saturate: without scales the answers are others than without fp8."""
    scaled = scaled_model("llama", tmp_path / "scaled", k_scale=1.0, v_scale=LARGE / 16)
    with tower(scaled, **TORCH) as engine:
        exact = answer_all(engine)
    unscaled = scaled_model("llama", tmp_path / "unscaled", k_scale=1.0, v_scale=1.0)
    near, far = answers(scaled, **NATIVE), answers(unscaled, **NATIVE)

    def equal(some: list[list[int]]) -> int:
        pairs = zip(some, exact, strict=True)
        return sum(a == b for x, y in pairs for a, b in zip(x, y, strict=True))

    assert equal(near) > equal(far)
