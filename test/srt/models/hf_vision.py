"""A tiny random Llama 4 with its vision tower, and what transformers computes with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Llama4Config, Llama4ForConditionalGeneration

from sglang.srt.multimodal.image_prompt import ImageTokens, PlacedImages, place_images
from sglang.srt.multimodal.image_tiles import TiledImage
from srt.models.hf_models import MOE_FIELDS

VOCAB = 160
TILE = 28
ROWS = 4
TOKENS = ImageTokens(
    image=155, start=151, end=152, next_column=153, next_row=154, patch=150, rows_per_tile=ROWS
)
TEXT_IDS = 140  # below are those of words
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": TILE,
    "patch_size": 7,
    "pixel_shuffle_ratio": 0.5,
    "vision_output_dim": 48,
    "projector_input_dim": 48,
    "projector_output_dim": 48,
}


def make_hf_vision_model() -> Llama4ForConditionalGeneration:
    """In float32, with weights so large that pictures matter; the same ones each time."""
    text = {
        **MOE_FIELDS["llama4"],
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    config = Llama4Config(
        vision_config=_VISION,
        text_config=text,
        image_token_index=TOKENS.patch,
        boi_token_index=TOKENS.start,
        eoi_token_index=TOKENS.end,
        attn_implementation="eager",
    )
    generator = torch.Generator().manual_seed(21)
    with torch.random.fork_rng():
        torch.manual_seed(21)
        model = Llama4ForConditionalGeneration(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                scale = 1.0 if "embed_tokens" in name else 1.2 / parameter.shape[-1] ** 0.5
                parameter.copy_(noise * scale)
            else:
                parameter.copy_(noise * 0.2 + (0.0 if name.endswith("bias") else 1.0))
            if "lm_head" in name:
                parameter[TEXT_IDS:] = 0  # transformers counts patches: none may be generated
    return model


def save_vision_model(model: Llama4ForConditionalGeneration, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


def draw_image(seed: int, rows: int = 1, cols: int = 1) -> TiledImage:
    """An image of random pixels over a grid of tiles."""
    count = rows * cols + (rows * cols > 1)
    rng = np.random.default_rng(seed)
    return TiledImage(rng.integers(0, 256, (count, 3, TILE, TILE), dtype=np.uint8), rows, cols)


def prompt_of(parts: Sequence[int | TiledImage]) -> PlacedImages:
    """Token ids and images in their order."""
    ids = [part if isinstance(part, int) else TOKENS.image for part in parts]
    images = [part for part in parts if isinstance(part, TiledImage)]
    if not images:
        return PlacedImages(np.array(ids, np.int32), np.array(ids, np.int32))
    return place_images(np.array(ids, np.int32), images, TOKENS)


@contextmanager
def _named_outputs(model: Llama4ForConditionalGeneration) -> Iterator[None]:
    """transformers 5.24 asks its text model's output for a field that it has not."""

    def add_field(_module: Any, _arguments: Any, output: Any) -> None:
        output.image_outputs = None

    handle = model.language_model.register_forward_hook(add_field)
    try:
        yield
    finally:
        handle.remove()


def vision_logits(
    model: Llama4ForConditionalGeneration, ids: Sequence[int], images: Sequence[TiledImage]
) -> torch.Tensor:
    """transformers' logits [n, vocabulary] of a whole sequence in one pass."""
    pixels = [(torch.from_numpy(image.pixels).float() / 255 - 0.5) / 0.5 for image in images]
    with torch.inference_mode(), _named_outputs(model):
        logits: torch.Tensor = model(
            input_ids=torch.tensor([list(ids)]),
            pixel_values=torch.cat(pixels) if pixels else None,
            use_cache=False,
        ).logits[0]
    return logits
