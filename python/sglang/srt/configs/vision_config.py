"""What a Llama 4 checkpoint says of its images: `read_vision` gives both towers the same numbers.

The text tower cuts tiles and counts tokens by it, the device tower builds the vision tower. Never
imports torch or transformers. Source: the published configuration of Llama-4-Scout and Maverick
and transformers' documentation of Llama4VisionConfig and Llama4ImageProcessor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_ARCHITECTURE = "Llama4ForConditionalGeneration"
# What transformers documents for fields that are left out.
_DEFAULT_SIZE, _DEFAULT_PATCH, _DEFAULT_RATIO, _DEFAULT_TILES = 448, 14, 0.5, 16
_DEFAULT_PATCH_ID, _DEFAULT_VOCAB = 200092, 202048
_HALF = [0.5, 0.5, 0.5]
# How pixels are prepared, fixed here: (field of the processor, its only value).
_FIXED: tuple[tuple[str, Any], ...] = (
    ("image_mean", _HALF),
    ("image_std", _HALF),
    ("resize_to_max_canvas", False),
    ("do_resize", True),
    ("do_rescale", True),
    ("do_normalize", True),
    ("resample", 2),
)


@dataclass(frozen=True)
class VisionConfig:
    """Images of one model.

    A tile has `tile_size` pixels a side and becomes `rows_per_tile` embeddings; an image has at
    most `max_tiles` and one more of the whole. `patch_id` is the token that stands where an
    embedding of an image goes. `fields` is the file's `vision_config`.
    """

    tile_size: int
    rows_per_tile: int
    max_tiles: int
    patch_id: int
    fields: dict[str, Any] = field(repr=False)


def read_vision(raw: Mapping[str, Any], folder: Path) -> VisionConfig | None:
    """What `raw`, the whole config.json, and the processor's file in `folder` say of images.

    None for a model that has no vision tower or none that is served. Raises ValueError with one
    line for numbers that don't fit together and for pixels that are prepared otherwise.
    """
    if _ARCHITECTURE not in (raw.get("architectures") or ()):
        return None
    fields = raw.get("vision_config")
    if not isinstance(fields, dict):
        return None
    size = _positive(fields, "image_size", _DEFAULT_SIZE)
    patch = _positive(fields, "patch_size", _DEFAULT_PATCH)
    ratio = fields.get("pixel_shuffle_ratio", _DEFAULT_RATIO)
    side = size // patch * ratio if isinstance(ratio, int | float) else 0
    if size % patch or side != int(side) or side < 1:
        raise ValueError(
            f"vision_config: image_size {size}, patch_size {patch} and pixel_shuffle_ratio "
            f"{ratio!r} don't fit together"
        )
    processor = _read_processor(folder)
    max_tiles = _positive(processor, "max_patches", _DEFAULT_TILES)
    for name, value in _FIXED:
        if processor.get(name, value) != value:
            raise ValueError(f"{name} {processor[name]!r} of the image processor is not served")
    tile = processor.get("size") or {"height": size, "width": size}
    if tile != {"height": size, "width": size}:
        raise ValueError(f"the image processor's size {tile!r} is not image_size {size}")
    patch_id = raw.get("image_token_index", raw.get("image_token_id", _DEFAULT_PATCH_ID))
    vocab_size = (raw.get("text_config") or {}).get("vocab_size", _DEFAULT_VOCAB)
    if not isinstance(patch_id, int) or not 0 <= patch_id < vocab_size:
        raise ValueError(f"image_token_index must be one of {vocab_size} tokens, not {patch_id!r}")
    return VisionConfig(size, int(side) ** 2, max_tiles, patch_id, dict(fields))


def _read_processor(folder: Path) -> dict[str, Any]:
    """The image processor's fields from the file where older or newer versions keep them."""
    for name, is_part in (("preprocessor_config.json", False), ("processor_config.json", True)):
        path = folder / name
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_bytes())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"cannot read {name}: {error}") from error
        if isinstance(found, dict) and is_part:
            found = found.get("image_processor", {})
        if not isinstance(found, dict):
            raise ValueError(f"{name} must hold a JSON object")
        if found:
            return {key: value for key, value in found.items() if value is not None}
    return {}


def _positive(fields: Mapping[str, Any], name: str, default: int) -> int:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number above 0, not {value!r}")
    return value
