"""The images of a request on the device side: which tokens are theirs, and their rows in a step.

A prompt holds a negative number where an embedding of an image goes (see the text tower's
`image_prompt`). `Req` owns a `ReqImage` for each image, a forward gets `ImagePart`s. The worker
encodes an image when the first of its tokens is computed and lets its rows go with the last one;
pixels stay as long as the request, which may be retracted and has to compute them again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sglang.srt.managers.io_struct import ImageInput

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


@dataclass(slots=True, eq=False)
class ReqImage:
    """One image: row i of its embeddings goes to prompt position `positions[i]` (ascending).

    `pixels` are bytes of uint8 tiles, one after another. `rows` is a tensor [rows, hidden] from
    the first of its tokens that is computed to the last one, the worker's own meanwhile.
    """

    pixels: bytes
    positions: Int32Array
    patch_id: int
    rows: Any = None

    @classmethod
    def of(cls, message: ImageInput) -> ReqImage:
        """The image as the text side sent it."""
        return cls(message.pixels, np.frombuffer(message.positions, "<i4"), message.patch_id)

    def part(self, start: int, end: int, q_start: int) -> ImagePart | None:
        """What a step takes of it that computes prompt positions [start, end) from its packed row
        `q_start` on; None: nothing."""
        first, last = np.searchsorted(self.positions, (start, end)).tolist()
        if first == last:
            return None
        at = self.positions[first:last].astype(np.int64) + (q_start - start)
        return ImagePart(self, first, at, last == len(self.positions))


@dataclass(frozen=True, slots=True, eq=False)
class ImagePart:
    """Rows [first, first + len(at)) of an image go to the packed rows `at` (int64) of a step."""

    image: ReqImage
    first: int
    at: Int64Array
    is_last: bool


def vocabulary_ids(ids: Int32Array, images: tuple[ReqImage, ...]) -> Int32Array:
    """`ids` with the patch token where a number stands for an image; `ids` itself without any."""
    if not images:
        return ids
    return np.where(ids < 0, np.int32(images[0].patch_id), ids)
