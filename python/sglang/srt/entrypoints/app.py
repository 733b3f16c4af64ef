"""The HTTP application: which path leads to which door, and how errors leave.

`build_app` makes an ASGI application from a `ServerContext`; several can live in one process. It
is plain Starlette: the doors take raw bodies, so FastAPI's models and validation would have no
work here, and its layers would stand between every event of a stream and the socket.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sglang.srt.entrypoints.admin_doors import AdminDoors
from sglang.srt.entrypoints.anthropic.messages_doors import MessagesDoors
from sglang.srt.entrypoints.api_doors import ApiDoors
from sglang.srt.entrypoints.http_errors import error_response
from sglang.srt.entrypoints.http_gate import Gate, shape_of
from sglang.srt.entrypoints.lora_doors import LoraDoors
from sglang.srt.entrypoints.memory_doors import MemoryDoors
from sglang.srt.entrypoints.ollama.ollama_doors import OllamaDoors
from sglang.srt.entrypoints.parser_doors import ParserDoors
from sglang.srt.entrypoints.pooling_doors import PoolingDoors
from sglang.srt.entrypoints.request_body import ClientGoneError
from sglang.srt.entrypoints.sequences import CLIENT_CLOSED
from sglang.srt.entrypoints.server_context import ServerContext
from sglang.srt.entrypoints.session_doors import SessionDoors
from sglang.srt.environ import OllamaRoutes
from sglang.srt.errors import RequestError

Door = Callable[[Request], Awaitable[Response]]

GET, POST = ["GET"], ["POST"]


def build_app(context: ServerContext) -> Starlette:
    """The application of one server; `context` decides what is served and when."""
    api, admin, memory = ApiDoors(context), AdminDoors(context), MemoryDoors(context)
    parsers, pooling = ParserDoors(context), PoolingDoors(context)
    sessions, lora = SessionDoors(context), LoraDoors(context)
    routes: list[tuple[str, list[str], Door]] = [
        *_ollama_routes(context),
        *_anthropic_routes(context),
        ("/", ["GET", "HEAD"], admin.root),
        ("/health", GET, admin.health),
        ("/ready", GET, admin.health),
        ("/ping", GET, admin.health),
        ("/health_generate", GET, admin.health_generate),
        ("/generate", ["POST", "PUT"], api.generate),
        ("/v1/chat/completions", POST, api.chat),
        ("/v1/completions", POST, api.completions),
        ("/v1/responses", POST, api.responses),
        ("/v1/responses/{response_id}", ["GET", "DELETE"], api.response),
        ("/v1/responses/{response_id}/cancel", POST, api.cancel_response),
        ("/encode", ["POST", "PUT"], pooling.encode),
        ("/classify", ["POST", "PUT"], pooling.encode),
        ("/v1/embeddings", POST, pooling.embeddings),
        ("/v1/classify", POST, pooling.classify),
        ("/v1/rerank", ["POST", "PUT"], pooling.rerank),
        ("/v1/score", POST, pooling.score),
        ("/tokenize", POST, api.tokenize),
        ("/v1/tokenize", POST, api.tokenize),
        ("/detokenize", POST, api.detokenize),
        ("/v1/detokenize", POST, api.detokenize),
        ("/separate_reasoning", POST, parsers.separate_reasoning),
        ("/parse_function_call", POST, parsers.parse_function_call),
        ("/open_session", ["GET", "POST"], sessions.open_session),
        ("/close_session", ["GET", "POST"], sessions.close_session),
        ("/v1/models", GET, admin.models),
        ("/v1/models/{model:path}", GET, admin.model),
        ("/model_info", GET, admin.model_info),
        ("/get_model_info", GET, admin.model_info),
        ("/server_info", GET, admin.server_info),
        ("/get_server_info", GET, admin.server_info),
        ("/get_load", GET, admin.get_load),
        ("/flush_cache", ["GET", "POST"], admin.flush_cache),
        ("/abort_request", POST, admin.abort_request),
        ("/set_kv_budget", POST, memory.set_kv_budget),
        ("/compact_kv", POST, memory.compact_kv),
        ("/load_lora_adapter", POST, lora.load),
        ("/unload_lora_adapter", POST, lora.unload),
    ]
    if context.metrics is not None:
        routes.append(("/metrics", GET, admin.metrics))
    ollama = context.environ.ollama_routes
    return Starlette(
        routes=[
            Route(path, _guarded(door, ollama), methods=methods) for path, methods, door in routes
        ],
        middleware=[Middleware(Gate, context=context)],
        exception_handlers={Exception: partial(_unexpected, ollama)},
    )


def _ollama_routes(context: ServerContext) -> list[tuple[str, list[str], Door]]:
    """The first of all, so that a path that was chosen for them is theirs."""
    paths, doors = context.environ.ollama_routes, OllamaDoors(context)
    routes: list[tuple[str, list[str], Door]] = [
        (paths.chat, POST, doors.chat),
        (paths.generate, POST, doors.generate),
        (paths.tags, GET, doors.tags),
        (paths.show, POST, doors.show),
        (paths.ps, GET, doors.ps),
        (paths.version, GET, doors.version),
    ]
    return [*routes, (paths.root, ["GET", "HEAD"], doors.root)] if paths.root else routes


def _anthropic_routes(context: ServerContext) -> list[tuple[str, list[str], Door]]:
    doors = MessagesDoors(context)
    return [
        ("/v1/messages", POST, doors.messages),
        ("/v1/messages/count_tokens", POST, doors.count_tokens),
    ]


def _guarded(door: Door, ollama: OllamaRoutes) -> Door:
    """The door with its errors turned into replies."""

    async def guarded(request: Request) -> Response:
        try:
            return await door(request)
        except RequestError as error:
            return error_response(shape_of(request.url.path, ollama), error)
        except ClientGoneError:
            return Response(status_code=CLIENT_CLOSED)  # nobody reads it

    return guarded


async def _unexpected(ollama: OllamaRoutes, request: Request, error: Exception) -> Response:
    """The reply to a bug; the traceback is in the server's log, not in the reply.

    The server closes the connection after it, so the client has to be told not to use it again.
    """
    message = f"Internal server error: {type(error).__name__}"
    refusal = RequestError(message, 500)
    return error_response(shape_of(request.url.path, ollama), refusal, {"connection": "close"})
