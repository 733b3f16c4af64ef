"""The vision tower by itself: transformers' rows, and what a checkpoint may lack or have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.model_loader.loader import load_model
from sglang.srt.models.llama4 import Llama4ForConditionalGeneration
from sglang.srt.utils.native import native_kernels
from srt.model_loader.test_fp8_checkpoints import compressed
from srt.models.hf_vision import (
    ROWS,
    draw_image,
    make_hf_vision_model,
    save_vision_model,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    reference = make_hf_vision_model()
    return save_vision_model(reference, tmp_path_factory.mktemp("llama4")), reference


def load(path: str, *, multimodal: bool = True, **arguments: Any) -> Llama4ForConditionalGeneration:
    config = ModelConfig.from_path(path, multimodal=multimodal)
    fields = {"dtype": torch.float32, "show_progress": False, **arguments}
    model = load_model(config, parallel=ParallelState(), **fields)
    assert isinstance(model, Llama4ForConditionalGeneration)
    return model


def rows_of(model: Llama4ForConditionalGeneration, pixels: bytes) -> torch.Tensor:
    assert model.vision is not None
    ticks: list[int] = []
    with torch.inference_mode():
        rows = model.vision.encode(pixels, lambda: ticks.append(1))
    assert len(ticks) == 7, "once a tile"
    return rows


def test_rows(saved: tuple[str, Any]) -> None:
    path, reference = saved
    image = draw_image(4, 2, 3)
    rows = rows_of(load(path), image.pixels.tobytes())
    values = (torch.from_numpy(image.pixels).float() / 255 - 0.5) / 0.5
    with torch.inference_mode():
        expected = reference.multi_modal_projector(
            reference.vision_model(values).last_hidden_state
        ).flatten(0, 1)
    assert rows.shape == (7 * ROWS, 64)
    torch.testing.assert_close(rows, expected, atol=2e-5, rtol=2e-5)
    rounded = rows_of(load(path, dtype=torch.bfloat16), image.pixels.tobytes())
    assert rounded.dtype is torch.bfloat16
    assert (rounded.float() - expected).norm() < 0.03 * expected.norm()


def test_without_images_nothing_of_it_is_there(saved: tuple[str, Any]) -> None:
    path, _ = saved
    model = load(path, multimodal=False)
    assert model.vision is None
    assert not [name for name, _ in model.named_parameters() if "vision" in name]


needs_kernels = pytest.mark.skipif(native_kernels() is None, reason="sgl-kernel is not installed")


@pytest.mark.parametrize(
    "arguments",
    [{"load_format": "dummy"}, pytest.param({"quantization": "int8"}, marks=needs_kernels)],
)
def test_other_ways_to_load(saved: tuple[str, Any], arguments: dict[str, Any]) -> None:
    path, _ = saved
    rows = rows_of(load(path, **arguments), draw_image(4, 2, 3).pixels.tobytes())
    assert rows.isfinite().all()
    assert rows.std() > 0


def test_beside_weights_in_fp8(saved: tuple[str, Any], tmp_path: Path) -> None:
    """As Maverick is published: the text model is quantised, the vision tower is not."""
    source = Path(saved[0])
    weights = load_file(source / "model.safetensors")
    for name in [name for name in weights if "language_model" in name and "q_proj" in name]:
        whole = weights.pop(name)
        scale = whole.abs().amax(1, keepdim=True) / 448
        weights[name] = (whole / scale).to(torch.float8_e4m3fn)
        weights[f"{name}_scale"] = scale
    save_file(weights, tmp_path / "model.safetensors")
    raw = json.loads((source / "config.json").read_text())
    raw["quantization_config"] = compressed("channel")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    pixels = draw_image(4, 2, 3).pixels.tobytes()
    assert torch.equal(rows_of(load(str(tmp_path)), pixels), rows_of(load(saved[0]), pixels))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("drop", "missing vision weight.*class_embedding"),
        ("cut", r"class_embedding: its shape is \(31,\), not \(32,\)"),
        ("add", "unexpected vision weight vision_model.none"),
    ],
)
def test_weights_that_do_not_fit(
    saved: tuple[str, Any], tmp_path: Path, change: str, named: str
) -> None:
    source = Path(saved[0])
    weights = load_file(source / "model.safetensors")
    name = next(name for name in weights if name.endswith("vision_model.class_embedding"))
    if change == "drop":
        del weights[name]
    elif change == "cut":
        weights[name] = weights[name][:-1].clone()
    else:
        weights[name.replace("class_embedding", "none")] = torch.zeros(1)
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(ValueError, match=named):
        load(str(tmp_path))
