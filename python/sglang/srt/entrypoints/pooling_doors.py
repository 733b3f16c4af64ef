"""The doors for vectors, classes, orders and scores: each reads its body and hands it on."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from sglang.srt.entrypoints.encode_api import EncodeCall, read_encode
from sglang.srt.entrypoints.event_stream import while_connected
from sglang.srt.entrypoints.http_errors import JsonResponse
from sglang.srt.entrypoints.openai.pooling_fields import (
    CLASSIFY_FIELDS,
    EMBEDDING_FIELDS,
    RERANK_FIELDS,
    SCORE_FIELDS,
    ClassifyBody,
    EmbeddingBody,
    RerankBody,
    ScoreBody,
)
from sglang.srt.entrypoints.openai.serving_completions import read_prompts
from sglang.srt.entrypoints.request_body import off_loop, read_body, split_body, split_object
from sglang.srt.entrypoints.sequences import MAX_SEQUENCES
from sglang.srt.entrypoints.server_context import ServerContext
from sglang.srt.managers.generate_request import IdArray

Prompts = list[str | IdArray]


class PoolingDoors:
    """Endpoints that give numbers; raise RequestError and ClientGoneError."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def encode(self, request: Request) -> Response:
        """POST or PUT /encode and /classify."""
        body = await self._body(request)
        call: EncodeCall = await off_loop(len(body), _parse_encode, body)
        serving = self._context.serving.encode
        return JsonResponse(await while_connected(request.receive, serving.reply(call)))

    async def embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings."""
        raw = await self._body(request)
        parsed: tuple[EmbeddingBody, Prompts] = await off_loop(len(raw), _parse_embeddings, raw)
        serving = self._context.serving.embeddings
        return JsonResponse(await while_connected(request.receive, serving.embeddings(*parsed)))

    async def classify(self, request: Request) -> Response:
        """POST /v1/classify."""
        raw = await self._body(request)
        parsed: tuple[ClassifyBody, Prompts] = await off_loop(len(raw), _parse_classify, raw)
        serving = self._context.serving.embeddings
        return JsonResponse(await while_connected(request.receive, serving.classify(*parsed)))

    async def rerank(self, request: Request) -> Response:
        """POST or PUT /v1/rerank."""
        raw = await self._body(request)
        body: RerankBody = await off_loop(len(raw), _parse_rerank, raw)
        serving = self._context.serving.rerank
        return JsonResponse(await while_connected(request.receive, serving.rerank(body)))

    async def score(self, request: Request) -> Response:
        """POST /v1/score."""
        raw = await self._body(request)
        body: ScoreBody = await off_loop(len(raw), _parse_score, raw)
        serving = self._context.serving.rerank
        return JsonResponse(await while_connected(request.receive, serving.score(body)))

    async def _body(self, request: Request) -> bytearray:
        return await read_body(request, self._context.request_byte_limit)


def _parse_encode(body: bytearray) -> EncodeCall:
    return read_encode(
        split_body(body, ids_in=["input_ids"], text_in=["text"], most_lists=MAX_SEQUENCES)
    )


def _parse_embeddings(raw: bytearray) -> tuple[EmbeddingBody, Prompts]:
    body = EMBEDDING_FIELDS.read(
        split_body(raw, ids_in=["input"], text_in=["input"], most_lists=MAX_SEQUENCES)
    )
    return body, read_prompts(body.input, "input")


def _parse_classify(raw: bytearray) -> tuple[ClassifyBody, Prompts]:
    body = CLASSIFY_FIELDS.read(
        split_body(raw, ids_in=["input"], text_in=["input"], most_lists=MAX_SEQUENCES)
    )
    return body, read_prompts(body.input, "input")


def _parse_rerank(raw: bytearray) -> RerankBody:
    return RERANK_FIELDS.read(split_object(raw))


def _parse_score(raw: bytearray) -> ScoreBody:
    return SCORE_FIELDS.read(split_object(raw))
