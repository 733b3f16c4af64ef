"""The doors of Ollama's API; their paths can be changed (environ.py)."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from sglang.srt.entrypoints.event_stream import NDJSON, EventStream, while_connected
from sglang.srt.entrypoints.http_errors import ApiShape, JsonResponse, bad_field
from sglang.srt.entrypoints.ollama.model_facts import model_list, model_shown, running_models
from sglang.srt.entrypoints.ollama.ollama_fields import (
    OllamaChatBody,
    OllamaGenerateBody,
    read_chat,
    read_generate,
)
from sglang.srt.entrypoints.ollama.serving_ollama import OllamaCall, loaded
from sglang.srt.entrypoints.request_body import off_loop, read_body, split_object
from sglang.srt.entrypoints.request_fields import FieldTable, Refusal
from sglang.srt.entrypoints.server_context import ServerContext

# Clients ask whether a server is new enough for them: this is the version of Ollama whose API is
# served, as far as it is.
OLLAMA_API_VERSION = "0.12.0"


class ShowBody(msgspec.Struct, frozen=True):
    """The fields of /api/show; `name` is the older name of `model`."""

    model: str = ""
    name: str = ""


_AS_IT_IS = "the model is shown as it is"
SHOW_FIELDS = FieldTable(
    ShowBody,
    accepted=("verbose",),
    refused={
        "system": Refusal(_AS_IT_IS, ("",)),
        "template": Refusal(_AS_IT_IS, ("",)),
        "options": Refusal(_AS_IT_IS, ({},)),
    },
    refuse_unknown=True,
)


class OllamaDoors:
    """Ollama's endpoints; raise RequestError and ClientGoneError."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def root(self, _request: Request) -> Response:
        """GET or HEAD of a path that Ollama's clients look at first, where one is set."""
        return PlainTextResponse("Ollama is running")

    async def chat(self, request: Request) -> Response:
        """POST /api/chat."""
        raw = await read_body(request, self._context.request_byte_limit)
        body: OllamaChatBody = await off_loop(len(raw), _parse_chat, raw)
        if not body.messages:
            return JsonResponse(loaded(body.model, is_chat=True))
        serving = self._context.generating.ollama
        call = await while_connected(request.receive, serving.prepare_chat(body))
        return await self._answer(request, call)

    async def generate(self, request: Request) -> Response:
        """POST /api/generate."""
        raw = await read_body(request, self._context.request_byte_limit)
        body: OllamaGenerateBody = await off_loop(len(raw), _parse_generate, raw)
        if not body.prompt:
            return JsonResponse(loaded(body.model, is_chat=False))
        serving = self._context.generating.ollama
        call = await while_connected(request.receive, serving.prepare_generate(body))
        return await self._answer(request, call)

    async def _answer(self, request: Request, call: OllamaCall) -> Response:
        serving = self._context.generating.ollama
        if call.is_stream:
            return EventStream(ApiShape.OLLAMA, serving.lines(call), NDJSON)
        return JsonResponse(await while_connected(request.receive, serving.reply(call)))

    async def tags(self, _request: Request) -> Response:
        """GET /api/tags."""
        return JsonResponse(model_list(self._context))

    async def show(self, request: Request) -> Response:
        """POST /api/show."""
        raw = await read_body(request, self._context.request_byte_limit)
        body = SHOW_FIELDS.read(split_object(raw))
        if not body.model and not body.name:
            raise bad_field("model", "it is missing")
        return JsonResponse(model_shown(self._context, body.model or body.name))

    async def ps(self, _request: Request) -> Response:
        """GET /api/ps."""
        return JsonResponse(running_models(self._context))

    async def version(self, _request: Request) -> Response:
        """GET /api/version."""
        return JsonResponse({"version": OLLAMA_API_VERSION})


def _parse_chat(body: bytearray) -> OllamaChatBody:
    return read_chat(split_object(body))


def _parse_generate(body: bytearray) -> OllamaGenerateBody:
    return read_generate(split_object(body))
