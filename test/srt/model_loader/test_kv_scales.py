"""Scales of an fp8 KV cache: every name that checkpoints give them, the JSON file, and mistakes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_loader.loader import load_model
from srt.models.hf_models import make_hf_model, save

LAYERS = 2


def add_tensors(path: str, tensors: dict[str, torch.Tensor]) -> None:
    """Put more tensors into a checkpoint of one file."""
    file = Path(path) / "model.safetensors"
    save_file({**load_file(file), **tensors}, file, metadata={"format": "pt"})


def layer_scales(names: dict[str, float], shape: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """`names` below every layer's self_attn; layer l's numbers are l + 1 times as large."""
    return {
        f"model.layers.{layer}.self_attn.{name}": torch.full(shape, value * (layer + 1))
        for layer in range(LAYERS)
        for name, value in names.items()
    }


def scales_of(path: str, **arguments: Any) -> list[tuple[float, float]]:
    fields: dict[str, Any] = {
        "dtype": torch.float32,
        "parallel": ParallelState(),
        "show_progress": False,
        "scales_kv": True,
    }
    model = load_model(ModelConfig.from_path(path), **{**fields, **arguments})
    layers = [one for one in model.modules() if isinstance(one, RadixAttention)]
    assert [one.layer_id for one in layers] == list(range(LAYERS))
    for one in layers:
        assert one.scaling == pytest.approx(one.head_dim**-0.5 * one.k_scale)
    return [(one.k_scale, one.v_scale) for one in layers]


@pytest.fixture
def llama(tmp_path: Path) -> str:
    return save(make_hf_model("llama", num_hidden_layers=LAYERS), tmp_path / "llama")


def write_file(path: Path, ranks: dict[str, Any], dtype: str = "float8_e4m3fn") -> str:
    kv_cache = {"dtype": dtype, "scaling_factor": ranks}
    path.write_text(json.dumps({"model_type": "llama", "kv_cache": kv_cache}))
    return str(path)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize(
    ("k_name", "v_name"),
    [
        ("attn.k_scale", "attn.v_scale"),
        ("k_proj.k_scale", "v_proj.v_scale"),
        ("k_scale", "v_scale"),
        ("qkv_proj.k_scale", "qkv_proj.v_scale"),
    ],
)
def test_names_of_two_scales(llama: str, k_name: str, v_name: str, shape: tuple[int, ...]) -> None:
    add_tensors(llama, layer_scales({k_name: 0.5, v_name: 3.0, "attn.q_scale": 9.0}, shape))
    assert scales_of(llama) == [(0.5, 3.0), (1.0, 6.0)]
    assert scales_of(llama, scales_kv=False) == [(1.0, 1.0)] * LAYERS


@pytest.mark.parametrize("name", ["kv_scale", "attn.kv_scale"])
def test_one_scale_for_both(llama: str, name: str) -> None:
    add_tensors(llama, layer_scales({name: 0.25}))
    assert scales_of(llama) == [(0.25, 0.25), (0.5, 0.5)]


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "llama4", "gpt_oss"])
def test_other_families(family: str, tmp_path: Path) -> None:
    hf = make_hf_model(family)
    path = save(hf, tmp_path)
    names = [f"model.layers.{i}.self_attn" for i in range(hf.config.num_hidden_layers)]
    keys = [f"{name}.{kind}_scale" for name in names for kind in "kv"]
    add_tensors(path, {key: torch.tensor(2.0) for key in keys})
    config = ModelConfig.from_path(path)
    model = load_model(
        config,
        dtype=torch.float32,
        parallel=ParallelState(),
        show_progress=False,
        scales_kv=True,
    )
    layers = [one for one in model.modules() if isinstance(one, RadixAttention)]
    assert len(layers) == len(names)
    assert {(one.k_scale, one.v_scale) for one in layers} == {(2.0, 2.0)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (layer_scales({"k_scale": 1.0, "v_scale": 1.0}, (2,)), r"shape \(2,\), only one scale"),
        (layer_scales({"k_scale": 0.0, "v_scale": 1.0}), "of 0.0 is no positive number"),
        (layer_scales({"k_scale": float("nan"), "v_scale": 1.0}), "nan is no positive number"),
        (layer_scales({"k_scale": 1.0}), "layer 0 has a k_scale and no other"),
        (layer_scales({"k_scale": 1.0, "attn.k_scale": 1.0}), "layer 0 has two scales"),
        ({"model.layers.1.self_attn.kv_scale": torch.tensor(1.0)}, r"layers \[0\] have none"),
        (layer_scales({"kv_scale": 1.0}) | {"model.layers.7.self_attn.kv_scale": torch.ones(1)},
         r"there are no layers \[7\]"),
    ],
    ids=["heads", "zero", "nan", "half", "twice", "missing", "unknown"],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    llama: str, tensors: dict[str, torch.Tensor], message: str
) -> None:
    add_tensors(llama, tensors)
    with pytest.raises(ValueError, match=message):
        scales_of(llama)


def test_a_checkpoint_without_scales_is_said_once(
    llama: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert scales_of(llama) == [(1.0, 1.0)] * LAYERS
    assert [r.message for r in caplog.records].count(caplog.records[-1].message) == 1
    assert "no k_scale and v_scale" in caplog.text
    caplog.clear()
    scales_of(llama, scales_kv=False)
    assert "k_scale" not in caplog.text


def test_the_file_wins_and_each_rank_reads_its_own(llama: str, tmp_path: Path) -> None:
    add_tensors(llama, layer_scales({"kv_scale": 0.25}))
    ranks = {str(r): {str(i): 0.5 + r + i for i in range(LAYERS)} for r in range(2)}
    one = write_file(tmp_path / "one.json", {"0": ranks["0"]})
    assert scales_of(llama, kv_scale_path=one) == [(0.5, 0.5), (1.5, 1.5)]
    two = write_file(tmp_path / "two.json", ranks)
    for rank, expected in enumerate(([(0.5, 0.5), (1.5, 1.5)], [(1.5, 1.5), (2.5, 2.5)])):
        found = scales_of(llama, kv_scale_path=two, parallel=ParallelState(rank, 2))
        assert found == expected
    with pytest.raises(ValueError, match=r"scales of ranks \['0'\], --tp-size is 2"):
        scales_of(llama, kv_scale_path=one, parallel=ParallelState(0, 2))


@pytest.mark.parametrize(
    ("ranks", "dtype", "message"),
    [
        ({"0": {"0": 1.0}}, "float8_e4m3fn", "needs scales of layers 0 to 1"),
        ({"0": [1.0, 1.0]}, "float8_e4m3fn", "needs scales of layers 0 to 1"),
        ({"0": {"0": 1.0, "1": -1.0}}, "float8_e4m3fn", "-1.0 is no positive number"),
        ({"0": {"0": 1.0, "1": "x"}}, "float8_e4m3fn", "'x' is no positive number"),
        ({"0": {"0": 1.0, "1": 1.0}}, "int8", "scales are for 'int8'"),
    ],
)
def test_damaged_files(
    llama: str, tmp_path: Path, ranks: dict[str, Any], dtype: str, message: str
) -> None:
    path = write_file(tmp_path / "scales.json", ranks, dtype)
    with pytest.raises(ValueError, match=message):
        scales_of(llama, kv_scale_path=path)
    Path(path).write_text("{}")
    with pytest.raises(ValueError, match="no file with scales"):
        scales_of(llama, kv_scale_path=path)
    with pytest.raises(ValueError, match="no file with scales"):
        scales_of(llama, kv_scale_path=str(tmp_path / "nowhere"))
