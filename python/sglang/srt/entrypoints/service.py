"""What the doors need of the TokenizerManager, as a type.

The doors are written against this protocol, so that they import neither ZeroMQ nor a tokenizer
library; `TokenizerManager` satisfies it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from typing import Any, Protocol

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.managers.generate_request import GenerateDelta, GenerateRequest, IdArray
from sglang.srt.managers.io_struct import ControlReply
from sglang.srt.managers.lora_registry import LoraRegistry
from sglang.srt.managers.scheduler_pulse import SchedulerPulse
from sglang.srt.multimodal.image_prompt import PlacedImages
from sglang.srt.multimodal.image_tiles import TiledImage


class TokenTexts(Protocol):
    """What the doors ask a tokenizer themselves: the text of single tokens, the template.

    `chat_template` is one, several by name, or None. `bos_token_id` None: texts begin with none.
    """

    chat_template: str | Mapping[str, str] | None
    bos_token_id: int | None

    def token_text(self, token_id: int) -> str:
        """The text of one token, as shown beside a log probability."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token."""
        ...

    def encode_pair(self, first: str, second: str) -> tuple[IdArray, int]:
        """Ids of two texts as the model takes pairs, and where the second begins; blocks."""
        ...


class ImageLoader(Protocol):
    """What the doors ask of the image desk."""

    async def load(self, sources: Sequence[str]) -> tuple[TiledImage, ...]:
        """The images that URLs and base64 texts name; RequestError for what is none."""
        ...

    async def place(self, input_ids: IdArray, images: Sequence[TiledImage]) -> PlacedImages:
        """The prompt with its images, whose bytes count until `release`; RequestError."""
        ...

    def release(self, num_bytes: int) -> None:
        """So many bytes of placed images are not needed any more."""
        ...


class TextService(Protocol):
    """Requests in, deltas out; see `TokenizerManager` for the full contract."""

    pulse: SchedulerPulse
    model_config: ModelConfig
    adapters: LoraRegistry

    @property
    def tokenizer(self) -> TokenTexts | None:
        """None under --skip-tokenizer-init."""
        ...

    @property
    def images(self) -> ImageLoader:
        """Who fetches and decodes images."""
        ...

    @property
    def context_length(self) -> int:
        """The effective context in tokens at this moment, 0 before the scheduler is ready."""
        ...

    @property
    def constraint_refusal(self) -> str | None:
        """Why no text can be held to a grammar; None: it can."""
        ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateDelta, None]:
        """Deltas of one sequence; closing the generator early aborts the request."""
        ...

    async def tokenize(self, text: str, add_special_tokens: bool = True) -> IdArray:
        """Ids of `text`, computed off the event loop."""
        ...

    async def detokenize(self, token_ids: IdArray, skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`, computed off the event loop."""
        ...

    async def render_chat(
        self, messages: Sequence[Mapping[str, Any]], **template_kwargs: Any
    ) -> str:
        """The prompt text of a conversation; RequestError 400 when the template refuses it."""
        ...

    async def control(self, op: str, *, timeout_s: float = 30.0, **args: Any) -> ControlReply:
        """Ask the scheduler; RequestError 503 when it is gone or silent."""
        ...

    async def abort(self, rid: str = "", abort_all: bool = False) -> None:
        """End the requests whose id starts with `rid`, or all, in whatever state."""
        ...

    def flush_cache(self, timeout_s: float = 0.0) -> Coroutine[Any, Any, ControlReply]:
        """Drop every cached prefix, once the scheduler is idle."""
        ...

    def is_healthy(self, now: float | None = None) -> bool:
        """Whether the scheduler is ready, alive, and idle or making progress."""
        ...
