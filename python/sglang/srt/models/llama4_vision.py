"""Llama 4's vision tower and projector: transformers' modules with our weights in them.

From tiles of pixels to rows that stand in place of embeddings. Every rank has all of it and
encodes for itself: the rows would have to travel otherwise, and the tower is small beside the
text model. Called by `Llama4ForConditionalGeneration` alone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from sglang.srt.configs.vision_config import VisionConfig
from sglang.srt.layers.quantization.matrix import numbers_like
from sglang.srt.layers.weights import LoadedWeight

# Tiles that a device encodes together: bounds what is in memory meanwhile, and is enough work. A
# host takes one at a time: it has enough to do with that, and may take seconds for it.
_TILES_AT_ONCE = 4


class VisionTower(nn.Module):
    """Encodes tiles. Parameters are uninitialised until every one was loaded.

    `hidden_size` is the text model's. Raises ValueError for a configuration that transformers
    refuses.
    """

    def __init__(self, vision: VisionConfig, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        from transformers import Llama4Config
        from transformers.models.llama4.modeling_llama4 import (
            Llama4MultiModalProjector,
            Llama4VisionModel,
        )

        self._config = vision
        self._loaded: set[str] = set()
        device = torch.empty(0).device
        try:
            config = Llama4Config(
                vision_config=vision.fields, text_config={"hidden_size": hidden_size}
            )
            config.vision_config._attn_implementation = "sdpa"
            with torch.device("meta"):  # no gigabyte of random numbers
                self.vision_model = Llama4VisionModel(config.vision_config)
                self.multi_modal_projector = Llama4MultiModalProjector(config)
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"vision_config: {error}") from error
        rotary = type(self.vision_model.rotary_embedding)
        self.vision_model.rotary_embedding = rotary(config.vision_config).to(device)
        for name, parameter in list(self.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            made = torch.empty(parameter.shape, dtype=dtype, device=device)
            setattr(self.get_submodule(owner), leaf, nn.Parameter(made, requires_grad=False))

    def load(self, name: str, tensor: LoadedWeight) -> None:
        """Fill one parameter by its name in checkpoints. Raises ValueError naming a wrong one."""
        try:
            parameter = self.get_parameter(name)
        except AttributeError:
            raise ValueError(f"unexpected vision weight {name}") from None
        if name in self._loaded:
            raise ValueError(f"weight {name} is in the checkpoint twice")
        if not isinstance(tensor, torch.Tensor):
            tensor = numbers_like(tensor, parameter)
        if tensor.shape != parameter.shape:
            shapes = f"{tuple(tensor.shape)}, not {tuple(parameter.shape)}"
            raise ValueError(f"weight {name}: its shape is {shapes}")
        parameter.data.copy_(tensor)
        self._loaded.add(name)

    def check_complete(self) -> None:
        """Raise ValueError that names a weight that did not come."""
        missing = [n for n, _ in self.named_parameters() if n not in self._loaded]
        if missing:
            raise ValueError(f"{len(missing)} missing vision weight(s): {missing[0]} ...")

    def encode(self, pixels: bytes, tick: Callable[[], None]) -> torch.Tensor:
        """Rows [num_tiles * rows_per_tile, hidden] of tiles uint8 [num_tiles, 3, size, size].

        `tick` is called as it gets on.
        """
        size = self._config.tile_size
        tiles = np.frombuffer(pixels, np.uint8).reshape(-1, 3, size, size)
        like = next(self.parameters())
        rows = []
        step = 1 if like.device.type == "cpu" else _TILES_AT_ONCE
        for first in range(0, len(tiles), step):
            some = torch.from_numpy(tiles[first : first + step].copy()).to(like.device)
            # Mean and deviation of a half, of values in [0, 1].
            values = (some.float() / 255 - 0.5) / 0.5
            encoded = self.vision_model(values.to(like.dtype)).last_hidden_state
            rows.append(self.multi_modal_projector(encoded).flatten(0, 1))
            tick()
        return torch.cat(rows)
