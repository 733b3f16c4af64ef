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
_THREADS = 2  # so many images are decoded at a time: each may take some hundred MiB meanwhile


class ImageDesk:
    """`vision` None: the server takes text only. Lives on one event loop."""

    def __init__(
        self, vision: VisionConfig | None, tokenizer: Tokenizer | None, rules: FetchRules
    ) -> None:
        self._vision = vision
        self._tokenizer = tokenizer
        self._rules = rules
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="images")
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
        loop = asyncio.get_running_loop()
        tasks = [
            loop.run_in_executor(self._threads, _load_one, source, self._rules, vision)
            for source in sources
        ]
        try:
            return tuple([await task for task in tasks])
        finally:
            for task in tasks:
                task.cancel()  # of no use any more where one was refused

    def place(self, input_ids: IdArray, images: Sequence[TiledImage]) -> PlacedImages:
        """The prompt with its images; see `place_images`.

        Raises RequestError, 503 when the requests that are served hold too many. Side effect:
        its pixels are counted until `release`.
        """
        if not images:
            return PlacedImages(input_ids, input_ids)
        placed = place_images(input_ids, images, self._tokens)
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
        self._threads.shutdown(wait=False, cancel_futures=True)

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


def _load_one(source: str, rules: FetchRules, vision: VisionConfig) -> TiledImage:
    return tile_image(read_source(source, rules), vision.tile_size, vision.max_tiles)
