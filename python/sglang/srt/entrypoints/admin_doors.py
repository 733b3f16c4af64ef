"""The doors for who runs the server: health, models, information, cache, aborts, metrics."""

from __future__ import annotations

import asyncio
import math
import uuid
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from sglang.srt.configs.lora_args import LoraRef
from sglang.srt.configs.pooling_config import PoolingConfig
from sglang.srt.entrypoints.event_stream import while_connected
from sglang.srt.entrypoints.http_errors import JsonResponse, bad_field
from sglang.srt.entrypoints.probe import probe_request
from sglang.srt.entrypoints.request_body import read_body, split_object
from sglang.srt.entrypoints.request_fields import FieldTable
from sglang.srt.entrypoints.server_context import ServerContext
from sglang.srt.entrypoints.server_info import load_of, model_info, server_info
from sglang.srt.entrypoints.service import TextService
from sglang.srt.errors import RequestError
from sglang.srt.managers.metrics import ServerMetrics

_SCRAPE_TIMEOUT_S = 5.0


class AbortBody(msgspec.Struct, frozen=True):
    """The fields of /abort_request."""

    rid: str = ""
    abort_all: bool = False
    abort_message: str | None = None


ABORT_FIELDS = FieldTable(AbortBody, accepted=(), refused={}, refuse_unknown=True)


class AdminDoors:
    """Endpoints that generate nothing for anybody; raise RequestError and ClientGoneError."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def root(self, _request: Request) -> Response:
        """GET or HEAD /."""
        return PlainTextResponse("SGLang is running")

    async def health(self, _request: Request) -> Response:
        """GET /health: the scheduler's signs of life, so it answers at once in every state."""
        return Response(status_code=200 if self._context.is_healthy else 503)

    async def health_generate(self, request: Request) -> Response:
        """GET /health_generate: a token is really generated, or a prompt pooled.

        A scheduler that is too busy to get to it in time but makes progress is healthy too.
        """
        if not self._context.is_healthy:
            return Response(status_code=503)
        serving = self._context.serving
        service = serving.service
        before = _progress(service)
        try:
            async with asyncio.timeout(self._context.environ.health_check_timeout_s):
                await while_connected(request.receive, _answer_one(service, serving.kind.pooling))
        except TimeoutError:
            advanced = _progress(service) != before and self._context.is_healthy
            return Response(status_code=200 if advanced else 503)
        except RequestError:
            return Response(status_code=503)
        return Response(status_code=200)

    async def models(self, _request: Request) -> Response:
        """GET /v1/models."""
        adapters = self._context.serving.service.adapters.loaded
        cards = [self._model_card(), *(self._adapter_card(ref) for ref in adapters.values())]
        return JsonResponse({"object": "list", "data": cards})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{id}: 404 for any id but ours and those of loaded LoRA adapters."""
        name = request.path_params["model"]
        if name == self._context.server_args.served_model_name:
            return JsonResponse(self._model_card())
        ref = self._context.serving.service.adapters.loaded.get(name)
        if ref is not None:
            return JsonResponse(self._adapter_card(ref))
        error = {
            "message": f"The model '{name}' does not exist",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
        return JsonResponse({"error": error}, status_code=404)

    def _model_card(self) -> dict[str, Any]:
        name = self._context.server_args.served_model_name
        return {
            "id": name,
            "object": "model",
            "created": int(self._context.created),
            "owned_by": "sglang",
            "root": name,
            "parent": None,
            "max_model_len": self._context.serving.service.context_length,
        }

    def _adapter_card(self, ref: LoraRef) -> dict[str, Any]:
        card = self._model_card()
        return {**card, "id": ref.name, "root": ref.path, "parent": card["id"]}

    async def model_info(self, _request: Request) -> Response:
        """GET /model_info."""
        return JsonResponse(model_info(self._context))

    async def server_info(self, _request: Request) -> Response:
        """GET /server_info."""
        return JsonResponse(await server_info(self._context))

    async def get_load(self, _request: Request) -> Response:
        """GET /get_load: what each replica has to do, for routers that go by it."""
        reply = await self._context.serving.service.control("internal_state")
        states = reply.data.get("replicas", [reply.data])
        return JsonResponse([load_of(dp_rank, state) for dp_rank, state in enumerate(states)])

    async def flush_cache(self, request: Request) -> Response:
        """GET or POST /flush_cache: 400 when requests are still running after `timeout` s."""
        timeout_s = _seconds(request.query_params.get("timeout", "0"))
        service = self._context.serving.service
        reply = await while_connected(request.receive, service.flush_cache(timeout_s))
        return PlainTextResponse(reply.message + "\n", status_code=200 if reply.success else 400)

    async def abort_request(self, request: Request) -> Response:
        """POST /abort_request: 200 whether or not such a request exists."""
        body = ABORT_FIELDS.read(
            split_object(await read_body(request, self._context.request_byte_limit))
        )
        if not body.rid and not body.abort_all:
            raise RequestError("Give 'rid' or 'abort_all'.")
        await self._context.serving.runner.abort(body.rid, body.abort_all)
        return Response(status_code=200)

    async def metrics(self, _request: Request) -> Response:
        """GET /metrics; counts of the HTTP side alone when the scheduler is silent."""
        metrics = self._context.metrics
        if metrics is None:
            raise RequestError("Metrics are off; start the server with --enable-metrics.", 404)
        try:
            reply = await self._context.serving.service.control(
                "internal_state", timeout_s=_SCRAPE_TIMEOUT_S
            )
            states = reply.data.get("replicas", [reply.data])
        except RequestError:
            states = []
        return Response(metrics.render(states), media_type=ServerMetrics.content_type)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < 1e9:
        raise bad_field("timeout", "expected a number of seconds")
    return seconds


def _progress(service: TextService) -> int | None:
    heartbeat = service.pulse.last_heartbeat
    return None if heartbeat is None else heartbeat.progress


async def _answer_one(service: TextService, pooling: PoolingConfig | None) -> None:
    request = probe_request(f"HEALTH_CHECK_{uuid.uuid4().hex}", 1, pooling)
    async with aclosing(service.generate(request)) as deltas:
        async for delta in deltas:
            if delta.finish_reason is not None and delta.finish_reason.type == "abort":
                raise RequestError(delta.finish_reason.message, 503)
