"""What a multimodal checkpoint says of its images, and what is not served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.vision_config import VisionConfig

VISION = {"image_size": 336, "patch_size": 14, "pixel_shuffle_ratio": 0.5, "hidden_size": 1408}
CONFIG: dict[str, Any] = {
    "architectures": ["Llama4ForConditionalGeneration"],
    "text_config": {},
    "vision_config": VISION,
    "image_token_index": 200092,
}
PROCESSOR = {"max_patches": 16, "size": {"height": 336, "width": 336}, "image_mean": [0.5] * 3}


def read(folder: Path, config: dict[str, Any], **files: Any) -> VisionConfig | None:
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return ModelConfig.from_path(str(folder), multimodal=True).vision


def test_scout(tmp_path: Path) -> None:
    vision = read(tmp_path, CONFIG, preprocessor_config=PROCESSOR)
    assert vision == VisionConfig(336, 144, 16, 200092, VISION)
    assert ModelConfig.from_path(str(tmp_path)).vision is None, "only when it is asked for"


def test_the_newer_file_of_processors(tmp_path: Path) -> None:
    vision = read(tmp_path, CONFIG, processor_config={"image_processor": {"max_patches": 4}})
    assert vision is not None
    assert vision.max_tiles == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["Llama4ForCausalLM"]},
        {"vision_config": None},
        {"architectures": ["Gemma3ForConditionalGeneration"]},
    ],
    ids=["text", "no tower", "another family"],
)
def test_models_without_images(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert read(tmp_path, {**CONFIG, **changes}) is None


@pytest.mark.parametrize(
    ("changes", "processor", "named"),
    [
        ({"vision_config": {**VISION, "patch_size": 15}}, {}, "don't fit together"),
        ({"vision_config": {**VISION, "image_size": 0}}, {}, "image_size must be"),
        ({"vision_config": {**VISION, "pixel_shuffle_ratio": "x"}}, {}, "don't fit together"),
        ({"image_token_index": -1}, {}, "image_token_index"),
        ({"image_token_index": 202048}, {}, "one of 202048 tokens, not 202048"),
        ({}, {"size": {"height": 448, "width": 336}}, "is not image_size 336"),
        ({}, {"resize_to_max_canvas": True}, "resize_to_max_canvas True"),
        ({}, {"image_mean": [0.4] * 3}, "image_mean"),
        ({}, {"max_patches": 0}, "max_patches must be"),
        ({}, [], "must hold a JSON object"),
    ],
)
def test_what_does_not_fit(
    tmp_path: Path, changes: dict[str, Any], processor: Any, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        read(tmp_path, {**CONFIG, **changes}, preprocessor_config=processor)
