"""What checkpoints say of a quantised KV cache, and when their weights are quantised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.quantization_config import (
    KVCacheScheme,
    has_quantized_weights,
    kv_cache_scheme,
)
from srt.configs.test_model_config import TINY

STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
TENSORS = {"quant_method": "compressed-tensors", "kv_cache_scheme": STATIC}


def dtype_of(config: Any, modelopt: dict[str, Any] | None = None) -> str | None:
    found = kv_cache_scheme(config, modelopt or {})
    assert found is not None
    return found.dtype


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        ({}, "fp8_e4m3"),
        ({"observer": "minmax", "group_size": None}, "fp8_e4m3"),
        ({"strategy": None, "symmetric": None}, "fp8_e4m3"),
        ({"strategy": "attn_head"}, None),
        ({"strategy": "channel"}, None),
        ({"dynamic": True}, None),
        ({"type": "int"}, None),
        ({"num_bits": 4}, None),
        ({"symmetric": False}, None),
    ],
)
def test_schemes_of_compressed_tensors(change: dict[str, Any], dtype: str | None) -> None:
    assert dtype_of({**TENSORS, "kv_cache_scheme": {**STATIC, **change}}) == dtype


@pytest.mark.parametrize("place", ["file", "config", "nested"])
@pytest.mark.parametrize(("name", "dtype"), [("FP8", "fp8_e4m3"), ("fp8", "fp8_e4m3"),
                                             ("NVFP4", None), ("INT8", None)])  # fmt: skip
def test_algorithms_of_modelopt(name: str, dtype: str | None, place: str) -> None:
    said = {"quant_algo": None, "kv_cache_quant_algo": name}
    config = {"quant_method": "modelopt", **said}
    if place == "nested":
        config = {"quant_method": "modelopt", "quantization": said}
    sources = (None, said) if place == "file" else (config, {})
    assert dtype_of(*sources) == dtype
    assert not has_quantized_weights(*sources)


def test_where_nothing_is_said() -> None:
    assert kv_cache_scheme(None, {}) is None
    assert kv_cache_scheme(None, {"quant_algo": "FP8", "kv_cache_quant_algo": None}) is None
    assert kv_cache_scheme({"quant_method": "fp8", "kv_cache_quant_algo": "FP8"}, {}) is None


def test_weights_of_modelopt_are_still_refused() -> None:
    scheme = {"num_bits": 8, "type": "float", "dynamic": False}
    alone = {"quant_method": "modelopt", "kv_cache_scheme": scheme}
    assert not has_quantized_weights(alone, {})
    for change in ({"quant_algo": "FP8"}, {"config_groups": {"group_0": {}}}):
        assert has_quantized_weights({**alone, **change}, {})
    assert has_quantized_weights({"quant_method": "modelopt"}, {})
    assert has_quantized_weights(None, {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"})


def write(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value))


def test_it_is_read_from_both_files(tmp_path: Path) -> None:
    write(tmp_path, "config.json", TINY)
    assert ModelConfig.from_path(str(tmp_path)).kv_cache is None
    write(tmp_path, "config.json", {**TINY, "quantization_config": TENSORS})
    scheme = ModelConfig.from_path(str(tmp_path)).kv_cache
    assert scheme == KVCacheScheme("fp8_e4m3", str(STATIC))
    write(tmp_path, "config.json", TINY)
    said = {"quant_algo": None, "kv_cache_quant_algo": "FP8"}
    write(
        tmp_path, "hf_quant_config.json", {"producer": {"name": "modelopt"}, "quantization": said}
    )
    assert ModelConfig.from_path(str(tmp_path)).kv_cache == KVCacheScheme("fp8_e4m3", "FP8")
    said["quant_algo"] = "FP8"
    write(tmp_path, "hf_quant_config.json", {"quantization": said})
    with pytest.raises(ValueError, match="quantized by 'modelopt FP8' are not served"):
        ModelConfig.from_path(str(tmp_path))
    write(tmp_path, "hf_quant_config.json", {"quantization": [said]})
    with pytest.raises(ValueError, match=r"hf_quant_config.json: quantization must be an object"):
        ModelConfig.from_path(str(tmp_path))
