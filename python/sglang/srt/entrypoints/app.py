"""The HTTP application: which path leads to which door, and how errors leave.

`build_app` makes a FastAPI application from a `ServerContext`; several can live in one process.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from sglang.srt.entrypoints.admin_doors import AdminDoors
from sglang.srt.entrypoints.api_doors import ApiDoors
from sglang.srt.entrypoints.http_errors import error_response
from sglang.srt.entrypoints.http_gate import Gate, shape_of
from sglang.srt.entrypoints.request_body import ClientGoneError
from sglang.srt.entrypoints.sequences import CLIENT_CLOSED
from sglang.srt.entrypoints.server_context import ServerContext
from sglang.srt.entrypoints.server_info import server_version
from sglang.srt.errors import RequestError

Door = Callable[[Request], Awaitable[Response]]

GET, POST = ["GET"], ["POST"]


def build_app(context: ServerContext) -> FastAPI:
    """The application of one server; `context` decides what is served and when."""
    app = FastAPI(title="sglang", version=server_version())
    api, admin = ApiDoors(context), AdminDoors(context)
    routes: list[tuple[str, list[str], Door]] = [
        ("/", ["GET", "HEAD"], admin.root),
        ("/health", GET, admin.health),
        ("/ready", GET, admin.health),
        ("/ping", GET, admin.health),
        ("/health_generate", GET, admin.health_generate),
        ("/generate", ["POST", "PUT"], api.generate),
        ("/v1/chat/completions", POST, api.chat),
        ("/v1/completions", POST, api.completions),
        ("/tokenize", POST, api.tokenize),
        ("/v1/tokenize", POST, api.tokenize),
        ("/detokenize", POST, api.detokenize),
        ("/v1/detokenize", POST, api.detokenize),
        ("/v1/models", GET, admin.models),
        ("/v1/models/{model:path}", GET, admin.model),
        ("/model_info", GET, admin.model_info),
        ("/get_model_info", GET, admin.model_info),
        ("/server_info", GET, admin.server_info),
        ("/get_server_info", GET, admin.server_info),
        ("/flush_cache", ["GET", "POST"], admin.flush_cache),
        ("/abort_request", POST, admin.abort_request),
    ]
    if context.metrics is not None:
        routes.append(("/metrics", GET, admin.metrics))
    for path, methods, door in routes:
        app.add_route(path, _guarded(door), methods=methods)
    app.add_exception_handler(Exception, _unexpected)
    app.add_middleware(Gate, context=context)
    return app


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
    """The reply to a bug; the traceback is in the server's log, not in the reply."""
    message = f"Internal server error: {type(error).__name__}"
    return error_response(shape_of(request.url.path), RequestError(message, 500))
