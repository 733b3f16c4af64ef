"""The text side's desk for images: fetched, decoded and cut in threads, counted while they live.

The TokenizerManager owns one. Without --enable-multimodal, or for a model without a vision tower,
it only says why no image is served. It decides nothing of prompts; `multimodal/` does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

from sglang.srt.configs.vision_config import VisionConfig
from sglang.srt.errors import RequestError
from sglang.srt.managers.generate_request import IdArray
from sglang.srt.multimodal.image_prompt import MARKS, ImageTokens, PlacedImages, place_images
from sglang.srt.multimodal.image_source import FetchRules, read_source
from sglang.srt.multimodal.image_tiles import TiledImage, tile_image
from sglang.srt.tokenizer.tokenizer import Tokenizer

MAX_IMAGES = 64  # of one prompt
MAX_LIVE_BYTES = 1 << 30
"""Pixels of all requests that have not ended; the scheduler holds them."""
# So many images are fetched and decoded at a time, the others wait: a file may have 32 MiB, and
# takes some hundred MiB while it is decoded.
_FETCHES, _DECODES = 8, 2


class ImageDesk:
    """`vision` None: the server takes text only. Lives on one event loop."""

    def __init__(
        self, vision: VisionConfig | None, tokenizer: Tokenizer | None, rules: FetchRules
    ) -> None:
        self._vision = vision
        self._tokenizer = tokenizer
        self._rules = rules
        self._fetchers = ThreadPoolExecutor(_FETCHES, thread_name_prefix="fetch-images")
        self._decoders = ThreadPoolExecutor(_DECODES, thread_name_prefix="decode-images")
        self._turns = asyncio.Semaphore(_FETCHES)
        self.live_bytes = 0

    async def load(self, sources: Sequence[str]) -> tuple[TiledImage, ...]:
        """The images that `sources` name, in order. Raises RequestError, 400 for most."""
        vision = self._vision
        if not sources:
            return ()
        if vision is None:
            raise RequestError(
                "Images are not served: the model takes text only, or the server runs without "
                "--enable-multimodal."
            )
        if len(sources) > MAX_IMAGES:
            raise RequestError(f"A prompt may have {MAX_IMAGES} images, got {len(sources)}.")
        _ = self._tokens  # refused before anything is fetched
        # One after another: a prompt with many holds one file at a time and leaves others a turn.
        return tuple([await self._load_one(source, vision) for source in sources])

    async def _load_one(self, source: str, vision: VisionConfig) -> TiledImage:
        loop = asyncio.get_running_loop()
        async with self._turns:
            data = await loop.run_in_executor(self._fetchers, read_source, source, self._rules)
            return await loop.run_in_executor(self._decoders, _tile, data, vision)

    async def place(self, input_ids: IdArray, images: Sequence[TiledImage]) -> PlacedImages:
        """The prompt with its images; see `place_images`.

        Raises RequestError, 503 when the requests that are served hold too many. Side effect:
        its pixels are counted until `release`.
        """
        if not images:
            return PlacedImages(input_ids, input_ids)
        placed = await asyncio.get_running_loop().run_in_executor(
            self._decoders, place_images, input_ids, images, self._tokens
        )
        num_bytes = placed.num_bytes
        if self.live_bytes + num_bytes > MAX_LIVE_BYTES:
            raise RequestError(
                f"The requests being served hold {self.live_bytes >> 20} MiB of images, this one "
                f"has {num_bytes >> 20} MiB more; the limit is {MAX_LIVE_BYTES >> 20} MiB.",
                503,
            )
        self.live_bytes += num_bytes
        return placed

    def release(self, num_bytes: int) -> None:
        """The request of so many bytes has ended."""
        self.live_bytes -= num_bytes

    def close(self) -> None:
        """End the threads."""
        self._fetchers.shutdown(wait=False, cancel_futures=True)
        self._decoders.shutdown(wait=False, cancel_futures=True)

    @cached_property
    def _tokens(self) -> ImageTokens:
        if self._tokenizer is None:
            raise RequestError("Images need a tokenizer (the server has --skip-tokenizer-init).")
        vision = self._vision
        assert vision is not None  # load comes first
        ids: list[int] = []
        for mark in MARKS:
            found = self._tokenizer.special_ids_of([mark])
            if len(found) != 1:
                raise RequestError(f"Images are not served: the tokenizer has no {mark}.")
            ids += found
        image, start, end, next_column, next_row = ids
        return ImageTokens(
            image, start, end, next_column, next_row, vision.patch_id, vision.rows_per_tile
        )


def _tile(data: bytes, vision: VisionConfig) -> TiledImage:
    image = tile_image(data, vision.tile_size, vision.max_tiles)
    _ = image.digest  # computed here rather than where somebody waits
    return image
