"""--enable-fused-qk-norm-rope: one call for a projection to q, k and v, and the same tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang.srt.model_executor.decode_tapes import DecodeTapes
from sglang.srt.utils.native import native_kernels
from srt.managers.test_engine_tokens import NEW_TOKENS, PROMPTS, answer_all, tower
from srt.models.hf_models import hf_greedy, make_hf_model, save

pytestmark = pytest.mark.skipif(native_kernels() is None, reason="sgl-kernel is not installed")


def ops_of(engine: object) -> list[str]:
    tapes = engine.parts.worker._runner.tapes  # type: ignore[attr-defined]
    assert isinstance(tapes, DecodeTapes)
    assert tapes.recorded == (1, 2, 3, 4, 5, 6)
    return [name for name, _ in tapes.times(1)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_the_same_tokens_from_fewer_calls(family: str, tmp_path: Path) -> None:
    reference = make_hf_model(family)
    path = save(reference, tmp_path)
    expected = [hf_greedy(reference, one, NEW_TOKENS) for one in PROMPTS]
    with tower(path) as engine:
        assert answer_all(engine) == expected
        single = ops_of(engine)
    with tower(path, enable_fused_qk_norm_rope=True) as engine:
        assert answer_all(engine) == expected
        fused = ops_of(engine)
    assert "qkv" not in single
    assert fused.count("qkv") == single.count("store") > 0
    assert not {"store", "rotate"} & set(fused)


@pytest.mark.parametrize("kv_cache_dtype", ["fp8_e4m3", "fp8_e5m2"])
def test_into_a_cache_of_a_byte(kv_cache_dtype: str, tmp_path: Path) -> None:
    path = save(make_hf_model("qwen3"), tmp_path)
    for dtype in ("float32", "bfloat16"):
        flags = {"kv_cache_dtype": kv_cache_dtype, "dtype": dtype}
        with tower(path, **flags) as engine:
            expected = answer_all(engine)
        with tower(path, enable_fused_qk_norm_rope=True, **flags) as engine:
            assert answer_all(engine) == expected
            assert "qkv" in ops_of(engine)
