"""Tiles are those of the published rules.

The grids of `GRIDS` are what transformers' Llama4ImageProcessor gave for images of these sizes; its
pixels differed from these by two of 255 at most over 200 sizes (it resizes with torchvision, which
the tests don't have).
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sglang.srt.errors import RequestError
from sglang.srt.multimodal import image_tiles
from sglang.srt.multimodal.image_tiles import best_grid, fitted_size, tile_image

# (width, height) -> (rows, columns), tiles of 336 pixels, 16 at most
GRIDS = {
    (700, 500): (2, 3),
    (336, 336): (1, 1),
    (100, 50): (1, 1),
    (3000, 100): (1, 9),
    (100, 3000): (9, 1),
    (1344, 1344): (4, 4),
    (5000, 5000): (4, 4),
    (337, 336): (1, 2),
    (672, 336): (1, 2),
    (20, 20): (1, 1),
    (1000, 1001): (3, 3),
    (333, 999): (3, 1),
}


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("size", GRIDS, ids=str)
def test_grids(size: tuple[int, int]) -> None:
    assert best_grid(*size, 336, 16) == GRIDS[size]


def test_no_canvas_is_larger_than_allowed() -> None:
    for width, height in [(1, 5000), (5000, 1), (700, 500), (999, 999)]:
        rows, cols = best_grid(width, height, 28, 5)
        assert 1 <= rows * cols <= 5
        fitted = fitted_size(width, height, rows, cols, 28)
        assert 1 <= fitted[0] <= cols * 28
        assert 1 <= fitted[1] <= rows * 28


def test_an_image_of_one_tile() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    tiled = tile_image(file_of(Image.fromarray(pixels)), 28, 16)
    assert (tiled.rows, tiled.cols) == (1, 1)
    assert np.array_equal(tiled.pixels, pixels.transpose(2, 0, 1)[None])


def test_tiles_come_row_by_row_and_the_whole_last() -> None:
    colors = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40 + 10
    gray = np.kron(colors, np.ones((28, 28), np.uint8))
    image = Image.fromarray(np.repeat(gray[..., None], 3, 2))
    tiled = tile_image(file_of(image), 28, 16)
    assert (tiled.rows, tiled.cols) == (2, 3)
    assert tiled.pixels.shape == (7, 3, 28, 28)
    assert [int(tile.min()) for tile in tiled.pixels[:6]] == colors.ravel().tolist()
    assert [int(tile.max()) for tile in tiled.pixels[:6]] == colors.ravel().tolist()
    assert int(tiled.pixels[6].min()) == 10
    assert int(tiled.pixels[6].max()) == 210


def test_what_an_image_does_not_reach_is_black() -> None:
    tiled = tile_image(file_of(Image.new("RGB", (40, 28), (200, 100, 50))), 28, 16)
    assert (tiled.rows, tiled.cols) == (1, 2)
    right = tiled.pixels[1]
    assert right[:, :, :12].reshape(3, -1).max(1).tolist() == [200, 100, 50]
    assert right[:, :, 12:].max() == 0
    assert tiled.pixels[2].reshape(3, -1).min(1).tolist() == [200, 100, 50]


def test_turned_by_the_camera_and_without_transparency() -> None:
    image = Image.new("RGB", (20, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    turned = tile_image(file_of(image, "JPEG", exif=exif), 28, 16)
    assert (turned.rows, turned.cols) == (1, 2)
    clear = tile_image(file_of(Image.new("RGBA", (28, 28), (9, 8, 7, 0))), 28, 16)
    assert clear.pixels.reshape(3, -1).max(1).tolist() == [9, 8, 7]
    image = Image.new("P", (28, 28), 1)
    image.putpalette([0, 0, 0, 9, 8, 7])
    few = tile_image(file_of(image, transparency=bytes([255, 0])), 28, 16)
    assert few.pixels.reshape(3, -1).max(1).tolist() == [9, 8, 7]


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "BMP"])
def test_formats(kind: str) -> None:
    tiled = tile_image(file_of(Image.new("RGB", (28, 28), (255, 255, 255)), kind), 28, 16)
    assert tiled.pixels.min() >= 250


def test_digests_tell_images_apart() -> None:
    one = tile_image(file_of(Image.new("RGB", (28, 28), (1, 2, 3))), 28, 16)
    same = tile_image(file_of(Image.new("RGB", (28, 28), (1, 2, 3)), "BMP"), 28, 16)
    other = tile_image(file_of(Image.new("RGB", (28, 28), (1, 2, 4))), 28, 16)
    assert one.digest == same.digest != other.digest


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"no image", "none of PNG, JPEG"),
        (file_of(Image.new("RGB", (28, 28)), "TIFF"), "none of PNG, JPEG"),
        (file_of(Image.new("RGB", (28, 28)))[:60], "cannot be decoded"),
    ],
    ids=["text", "tiff", "cut"],
)
def test_what_is_refused(data: bytes, named: str) -> None:
    with pytest.raises(RequestError, match=named) as caught:
        tile_image(data, 28, 16)
    assert caught.value.http_status == 400


def test_too_many_pixels_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = file_of(Image.new("L", (40, 30)))
    monkeypatch.setattr(image_tiles, "MAX_PIXELS", 1199)
    with pytest.raises(RequestError, match="40 x 30 pixels; at most 1199"):
        tile_image(data, 28, 16)
    monkeypatch.setattr(image_tiles, "MAX_PIXELS", 1200)
    assert tile_image(data, 28, 16).pixels.shape == (5, 3, 28, 28)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # Pillow's own bound
    with pytest.raises(RequestError, match="more than 1200 pixels"):
        tile_image(data, 28, 16)
