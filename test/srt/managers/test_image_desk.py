"""The image desk, alone and at the TokenizerManager's side."""

from __future__ import annotations

import asyncio
import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sglang.srt.configs.vision_config import VisionConfig
from sglang.srt.errors import RequestError
from sglang.srt.managers import image_desk
from sglang.srt.managers.image_desk import ImageDesk
from sglang.srt.multimodal.image_prompt import MARKS
from sglang.srt.multimodal.image_source import FetchRules
from srt.managers.tokenizer_manager_harness import LENGTH, collect, eventually, request, rig
from srt.models.hf_vision import ROWS, TILE, TOKENS, draw_image

VISION = VisionConfig(TILE, ROWS, 16, TOKENS.patch, {})
IDS = dict(
    zip(
        MARKS,
        (TOKENS.image, TOKENS.start, TOKENS.end, TOKENS.next_column, TOKENS.next_row),
        strict=True,
    )
)


class Marks:
    """A tokenizer of which only its special tokens are asked."""

    def __init__(self, ids: dict[str, int]) -> None:
        self.ids = ids
        self.eos_token_ids = ()

    def special_ids_of(self, texts: list[str]) -> frozenset[int]:
        return frozenset(self.ids[text] for text in texts if text in self.ids)


def desk(ids: dict[str, int] | None = None, vision: VisionConfig | None = VISION) -> ImageDesk:
    tokenizer: Any = Marks(IDS if ids is None else ids)
    return ImageDesk(vision, tokenizer, FetchRules())


def picture(color: int) -> str:
    out = io.BytesIO()
    Image.new("RGB", (TILE, TILE), (color, 0, 0)).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


async def test_images_come_in_order() -> None:
    one = desk()
    images = await one.load([picture(color) for color in (9, 200, 77)])
    assert [int(image.pixels.max()) for image in images] == [9, 200, 77]
    assert await one.load([]) == ()
    one.close()


@pytest.mark.parametrize(
    ("made", "count", "named"),
    [
        (desk(vision=None), 1, "without --enable-multimodal"),
        (ImageDesk(VISION, None, FetchRules()), 1, "need a tokenizer"),
        (desk(ids={}), 1, r"tokenizer has no <\|image\|>"),
        (desk(), 65, "may have 64 images, got 65"),
    ],
    ids=["text model", "no tokenizer", "no marks", "too many"],
)
async def test_refused_before_anything_is_read(made: ImageDesk, count: int, named: str) -> None:
    with pytest.raises(RequestError, match=named) as caught:
        await made.load(["no image"] * count)
    assert caught.value.http_status == 400


async def test_one_bad_image_refuses_the_prompt() -> None:
    one = desk()
    with pytest.raises(RequestError, match="neither a URL nor base64"):
        await one.load([picture(1), "?", picture(2)])
    one.close()


async def test_pixels_are_bounded_over_all_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    one, image = desk(), draw_image(1)
    ids = np.array([TOKENS.image], np.int32)
    monkeypatch.setattr(image_desk, "MAX_LIVE_BYTES", 2 * image.pixels.nbytes)
    sizes = [(await one.place(ids, [image])).num_bytes for _ in range(2)]
    with pytest.raises(RequestError, match="the limit is") as caught:
        await one.place(ids, [image])
    assert caught.value.http_status == 503
    one.release(sizes[0])
    assert (await one.place(ids, [image])).num_bytes == image.pixels.nbytes
    one.close()


async def test_a_prompt_without_images_is_left_alone() -> None:
    ids = np.array([TOKENS.image, 1], np.int32)
    placed = await desk(vision=None).place(ids, [])
    assert placed.ids is ids
    assert placed.keys is ids
    assert placed.inputs == ()


async def test_requests_carry_keys_and_give_their_bytes_back() -> None:
    image = draw_image(1)
    async with rig(None) as one:
        one.manager.images = desk()
        asked = request(ids=[5, TOKENS.image, 6], images=(image,))
        stream = asyncio.create_task(collect(one.manager.generate(asked)))
        message = await one.sent_request()
        sent = np.frombuffer(message.input_ids, "<i4")
        assert sent.tolist()[:3] == [5, TOKENS.start, TOKENS.image]
        assert (sent[3 : 3 + ROWS] < 0).all()
        assert message.images[0].pixels == image.pixels.tobytes()
        assert np.frombuffer(message.images[0].positions, "<i4").tolist() == [3, 4, 5, 6]
        shown = np.frombuffer(message.detok.prefix_ids, "<i4").tolist()
        assert shown == [*[TOKENS.patch] * 4, TOKENS.end, 6]
        assert one.manager.images.live_bytes == image.pixels.nbytes
        assert asked.images == ()
        one.tell(message.rid, "ab", [1, 2], finish=LENGTH)
        assert (await stream)[-1].finish_reason == LENGTH
        await eventually(lambda: one.manager.images.live_bytes == 0)


async def test_the_context_counts_what_images_take() -> None:
    async with rig(None) as one:
        one.manager.images = desk()
        asked = request(ids=[TOKENS.image], images=(draw_image(1, 5, 5),), max_new_tokens=1)
        with pytest.raises(RequestError, match=r"input \(132 tokens\) is longer"):
            await collect(one.manager.generate(asked))
        assert one.manager.images.live_bytes == 0
