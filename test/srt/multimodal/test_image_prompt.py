"""Prompts with images: Meta's format, and keys that tell images apart."""

from __future__ import annotations

import numpy as np
import pytest

from sglang.srt.errors import RequestError
from sglang.srt.multimodal.image_prompt import image_keys, place_images
from sglang.srt.multimodal.image_tiles import TiledImage
from srt.models.hf_vision import ROWS, TOKENS, draw_image, prompt_of

P = [TOKENS.patch] * ROWS
START, END, X, Y, IMAGE = (
    TOKENS.start,
    TOKENS.end,
    TOKENS.next_column,
    TOKENS.next_row,
    TOKENS.image,
)


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        ((1, 1), [START, IMAGE, *P, END]),
        ((1, 2), [START, *P, X, *P, Y, IMAGE, *P, END]),
        ((2, 1), [START, *P, Y, *P, Y, IMAGE, *P, END]),
        ((2, 3), [START, *P, X, *P, X, *P, Y, *P, X, *P, X, *P, Y, IMAGE, *P, END]),
    ],
    ids=str,
)
def test_format(grid: tuple[int, int], expected: list[int]) -> None:
    """The lists are what transformers' Llama4Processor writes."""
    placed = prompt_of([1, draw_image(1, *grid), 2])
    assert placed.ids.tolist() == [1, *expected, 2]


def test_keys_stand_where_patches_do_and_nowhere_else() -> None:
    placed = prompt_of([1, draw_image(1, 1, 2), 2, draw_image(2), TOKENS.patch])
    at = [np.frombuffer(image.positions, "<i4") for image in placed.inputs]
    assert [len(one) for one in at] == [3 * ROWS, ROWS]
    (keyed,) = np.nonzero(placed.keys != placed.ids)
    assert keyed.tolist() == np.concatenate(at).tolist()
    assert (placed.ids[keyed] == TOKENS.patch).all()
    assert (placed.keys[keyed] < 0).all()
    assert placed.ids[-1] == TOKENS.patch, "one that a client wrote stays a token"
    assert [image.patch_id for image in placed.inputs] == [TOKENS.patch] * 2
    assert placed.num_bytes == 4 * 3 * 28 * 28


def test_keys_are_the_images_own() -> None:
    one, same, other = (prompt_of([draw_image(n), 5]) for n in (1, 1, 2))
    later = prompt_of([1, 2, 3, draw_image(1), 5])
    assert one.keys.tolist() == same.keys.tolist() == later.keys[3:].tolist()
    assert one.ids.tolist() == other.ids.tolist()
    patches = one.keys < 0
    assert (one.keys[patches] != other.keys[patches]).all()


def test_the_grid_counts_as_well() -> None:
    pixels = draw_image(1, 1, 2).pixels
    wide, tall = TiledImage(pixels, 1, 2), TiledImage(pixels, 2, 1)
    assert wide.digest != tall.digest


def test_keys_are_drawn_afresh_for_every_patch() -> None:
    keys = image_keys(b"digest", 5000)
    assert keys.dtype == np.int32
    assert keys.max() < 0
    assert len(set(keys.tolist())) == 5000


@pytest.mark.parametrize("ids", [[1, 2], [IMAGE, 1, IMAGE]], ids=["none", "two"])
def test_as_many_places_as_images(ids: list[int]) -> None:
    count = ids.count(IMAGE)
    with pytest.raises(RequestError, match=rf"has {count} image tokens .* for 1 images"):
        place_images(np.array(ids, np.int32), [draw_image(1)], TOKENS)
