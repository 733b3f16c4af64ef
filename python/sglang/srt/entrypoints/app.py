"""The HTTP application: which path leads to which door, and how errors leave.

`build_app` makes an ASGI application from a `ServerContext`; several can live in one process. It
is plain Starlette: the doors take raw bodies, so FastAPI's models and validation would have no
work here, and its layers would stand between every event of a stream and the socket.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sglang.srt.entrypoints.admin_doors import AdminDoors
from sglang.srt.entrypoints.api_doors import ApiDoors
from sglang.srt.entrypoints.http_errors import error_response
from sglang.srt.entrypoints.http_gate import Gate, shape_of
from sglang.srt.entrypoints.lora_doors import LoraDoors
from sglang.srt.entrypoints.memory_doors import MemoryDoors
from sglang.srt.entrypoints.parser_doors import ParserDoors
from sglang.srt.entrypoints.request_body import ClientGoneError
from sglang.srt.entrypoints.sequences import CLIENT_CLOSED
from sglang.srt.entrypoints.server_context import ServerContext
from sglang.srt.errors import RequestError

Door = Callable[[Request], Awaitable[Response]]

GET, POST = ["GET"], ["POST"]


def build_app(context: ServerContext) -> Starlette:
    """The application of one server; `context` decides what is served and when."""
    api, admin, memory = ApiDoors(context), AdminDoors(context), MemoryDoors(context)
    parsers, lora = ParserDoors(context), LoraDoors(context)
    routes: list[tuple[str, list[str], Door]] = [
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
        ("/tokenize", POST, api.tokenize),
        ("/v1/tokenize", POST, api.tokenize),
        ("/detokenize", POST, api.detokenize),
        ("/v1/detokenize", POST, api.detokenize),
        ("/separate_reasoning", POST, parsers.separate_reasoning),
        ("/parse_function_call", POST, parsers.parse_function_call),
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
    return Starlette(
        routes=[Route(path, _guarded(door), methods=methods) for path, methods, door in routes],
        middleware=[Middleware(Gate, context=context)],
        exception_handlers={Exception: _unexpected},
    )


def _guarded(door: Door) -> Door:
    """The door with its errors turned into replies."""

    async def guarded(request: Request) -> Response:
        try:
            return await door(request)
        except RequestError as error:
            return error_response(shape_of(request.url.path), error)
        except ClientGoneError:
            return Response(status_code=CLIENT_CLOSED)  # nobody reads it

    return guarded


async def _unexpected(request: Request, error: Exception) -> Response:
    """The reply to a bug; the traceback is in the server's log, not in the reply.

    The server closes the connection after it, so the client has to be told not to use it again.
    """
    message = f"Internal server error: {type(error).__name__}"
    refusal = RequestError(message, 500)
    return error_response(shape_of(request.url.path), refusal, {"connection": "close"})
