"""Where the images of a Llama 4 prompt stand: its tokens with every image token made long.

A prompt has one `<|image|>` for each image. It becomes the start and end marks, the patches of each
tile with separators between columns and behind rows, and behind `<|image|>` the patches of the
whole. Source: Meta's published prompt format of Llama 4.

Patches all look alike, but what they stand for differs. So prompts travel with *keys* in the
patches' places: negative numbers that are drawn from the image's digest, 31 bits each. Whoever
compares prompts (the prefix cache, the choice of a replica) tells images apart by them, and
whoever needs tokens of the vocabulary puts the patch token back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sglang.srt.errors import RequestError
from sglang.srt.managers.io_struct import ImageInput, int32_buffer
from sglang.srt.multimodal.image_tiles import TiledImage

IdArray = npt.NDArray[np.int32]
IMAGE_MARK = "<|image|>"
MARKS = (
    IMAGE_MARK,
    "<|image_start|>",
    "<|image_end|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
)


@dataclass(frozen=True)
class ImageTokens:
    """Ids of the tokens that images are written with, and the patches of one tile."""

    image: int
    start: int
    end: int
    next_column: int
    next_row: int
    patch: int
    rows_per_tile: int

    def written(self, image: TiledImage) -> list[int]:
        """The tokens of one image."""
        tile = [self.patch] * self.rows_per_tile
        ids = [self.start]
        if image.rows * image.cols > 1:
            for _ in range(image.rows):
                for col in range(image.cols):
                    ids += [self.next_column] * (col > 0) + tile
                ids.append(self.next_row)
        return [*ids, self.image, *tile, self.end]


@dataclass(frozen=True, eq=False)
class PlacedImages:
    """A prompt with its images: `ids` of the vocabulary and `keys`, both int32 [n], which differ
    in the images' patches alone, and the images for the device tower."""

    ids: IdArray
    keys: IdArray
    inputs: tuple[ImageInput, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes of the images' pixels."""
        return sum(len(image.pixels) for image in self.inputs)


def place_images(
    input_ids: IdArray, images: Sequence[TiledImage], tokens: ImageTokens
) -> PlacedImages:
    """Write `images` in the places of the image tokens of `input_ids` (int32 [n]), in order.

    Raises RequestError 400 unless there are as many of one as of the other.
    """
    places = np.flatnonzero(input_ids == tokens.image)
    if len(places) != len(images):
        raise RequestError(
            f"The prompt has {len(places)} image tokens ({IMAGE_MARK}) for {len(images)} images."
        )
    parts: list[IdArray] = []
    keyed: list[IdArray] = []
    inputs = []
    done = length = 0
    for place, image in zip(places.tolist(), images, strict=True):
        before = input_ids[done:place]
        written = np.array(tokens.written(image), np.int32)
        patches = np.flatnonzero(written == tokens.patch)
        keys = written.copy()
        keys[patches] = image_keys(image.digest, len(patches))
        length += len(before)
        inputs.append(
            ImageInput(image.pixels.tobytes(), int32_buffer(patches + length), tokens.patch)
        )
        parts += [before, written]
        keyed += [before, keys]
        done, length = place + 1, length + len(written)
    rest = input_ids[done:]
    return PlacedImages(
        np.concatenate([*parts, rest]), np.concatenate([*keyed, rest]), tuple(inputs)
    )


def image_keys(digest: bytes, count: int) -> IdArray:
    """`count` numbers below 0, int32, that hardly another digest has in common with this one."""
    words = np.frombuffer(hashlib.shake_256(digest).digest(4 * count), "<i4")
    return words | np.int32(-(1 << 31))
