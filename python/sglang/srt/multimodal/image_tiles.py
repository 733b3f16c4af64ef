"""From the bytes of an image file to the tiles that Llama 4's vision tower sees.

Pillow decodes; the tiling is ours, by the published rules of the model: an image keeps its
proportions on a canvas of at most `max_tiles` tiles, black where it does not reach, and one that
needs several tiles comes once more, squeezed into a single one, behind them. Pure but for Pillow,
which is imported when the first image comes. Called by the image desk, in threads.
"""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from sglang.srt.errors import RequestError

# What a decoder is let near: the formats that clients send, none that names other files.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 1 << 25  # of one image, 96 MiB once it is decoded
# What decoders of damaged files raise.
_DAMAGE = (
    *(OSError, SyntaxError, ValueError, ArithmeticError, LookupError, TypeError, EOFError),
    *(AttributeError, struct.error, zlib.error),
)


@dataclass(frozen=True, eq=False)
class TiledImage:
    """An image as tiles: uint8 [num_tiles, 3, size, size], row by row over a `rows` x `cols` grid.

    With more than one tile in the grid the whole image follows as one tile more.
    """

    pixels: npt.NDArray[np.uint8]
    rows: int
    cols: int

    @cached_property
    def digest(self) -> bytes:
        """What tells images apart that give different tiles: SHA-256 of them and their grid."""
        head = f"{self.rows}x{self.cols}x{self.pixels.shape[-1]}:".encode()
        return hashlib.sha256(head + self.pixels.tobytes()).digest()


def tile_image(data: bytes, size: int, max_tiles: int) -> TiledImage:
    """Decode an image file and cut it into tiles of `size` pixels a side.

    The first frame of an animation, turned as the camera says, without transparency. Raises
    RequestError 400 for what is no image of `FORMATS`, is damaged, or has over `MAX_PIXELS`.
    """
    from PIL import Image

    image = _decode(data)
    width, height = image.size
    rows, cols = best_grid(width, height, size, max_tiles)
    canvas = Image.new("RGB", (cols * size, rows * size))
    canvas.paste(image.resize(fitted_size(width, height, rows, cols, size), _bilinear()), (0, 0))
    tiles = list(_cut(np.asarray(canvas), rows, cols, size))
    if len(tiles) > 1:
        tiles.append(np.asarray(image.resize((size, size), _bilinear())))
    pixels = np.ascontiguousarray(np.stack(tiles).transpose(0, 3, 1, 2))
    return TiledImage(pixels, rows, cols)


def best_grid(width: int, height: int, size: int, max_tiles: int) -> tuple[int, int]:
    """Rows and columns of the canvas for an image: (rows, cols), rows x cols <= max_tiles.

    The canvas that the image has to be enlarged least to fill one side of; where every canvas is
    too small, the one it has to be reduced least for. Of equals the smallest.
    """

    def cost(grid: tuple[int, int]) -> tuple[bool, float, int]:
        scale = min(grid[0] * size / height, grid[1] * size / width)
        return scale < 1, scale if scale >= 1 else -scale, grid[0] * grid[1]

    grids = (
        (rows, cols) for rows in range(1, max_tiles + 1) for cols in range(1, max_tiles // rows + 1)
    )
    return min(grids, key=cost)


def fitted_size(width: int, height: int, rows: int, cols: int, size: int) -> tuple[int, int]:
    """(width, height) of an image on its canvas: enlarged to one tile's side at most."""
    room_w = min(max(width, size), cols * size)
    room_h = min(max(height, size), rows * size)
    if room_w / width < room_h / height:
        return room_w, max(1, min(int(height * (room_w / width)), room_h))
    return max(1, min(int(width * (room_h / height)), room_w)), room_h


def _decode(data: bytes) -> Any:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise RequestError(
                    f"An image has {width} x {height} pixels; at most {MAX_PIXELS} are served."
                )
            turned = ImageOps.exif_transpose(image)
            if turned.mode == "P":  # straight to RGB it warns of transparency
                turned = turned.convert("RGBA")
            return turned.convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise RequestError(f"An image has more than {MAX_PIXELS} pixels.") from None
    except UnidentifiedImageError:
        raise RequestError(f"An image is none of {', '.join(FORMATS)}.") from None
    except _DAMAGE as error:
        raise RequestError(f"An image cannot be decoded: {error}") from None


def _bilinear() -> Any:
    from PIL import Image

    return Image.Resampling.BILINEAR


def _cut(
    canvas: npt.NDArray[np.uint8], rows: int, cols: int, size: int
) -> Iterator[npt.NDArray[np.uint8]]:
    for row in range(rows):
        for col in range(cols):
            yield canvas[row * size : (row + 1) * size, col * size : (col + 1) * size]
