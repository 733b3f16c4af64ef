"""Whether a server's model writes or is pooled, and what the wrong kind of request is told."""

from __future__ import annotations

from dataclasses import dataclass

from sglang.srt.configs.pooling_config import PoolingConfig
from sglang.srt.errors import RequestError
from sglang.srt.managers.generate_request import GenerateRequest

_POOLED = (
    "The model does not generate text here: it is served for its vectors. Use /v1/embeddings, "
    "/v1/classify, /v1/rerank or /encode."
)
_GENERATES = (
    "The model generates text here: embeddings, classes and hidden states of it are not served. "
    "Start the server with --is-embedding, or with a classifier."
)


@dataclass(frozen=True, slots=True)
class ModelKind:
    """`pooling` None: the model generates."""

    pooling: PoolingConfig | None

    def need_generation(self) -> None:
        """Raise RequestError 400 when the model is pooled."""
        if self.pooling is not None:
            raise RequestError(_POOLED, 400, "BadRequestError")

    def need_pooling(self) -> PoolingConfig:
        """How the model is pooled; RequestError 400 when it generates."""
        if self.pooling is None:
            raise RequestError(_GENERATES, 400, "BadRequestError")
        return self.pooling

    def check(self, request: GenerateRequest) -> None:
        """Raise RequestError 400 for a request of the other kind, whoever made it."""
        if request.pooling is None:
            self.need_generation()
        else:
            self.need_pooling()
