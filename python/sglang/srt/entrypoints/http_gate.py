"""What every HTTP request passes before its door: the keys and the server's phase.

A plain ASGI middleware: it reads headers only, so bodies, streams and disconnects reach the doors
untouched.
"""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from sglang.srt.entrypoints.http_errors import ApiShape, error_response, unauthorized
from sglang.srt.entrypoints.server_context import ServerContext
from sglang.srt.environ import OllamaRoutes
from sglang.srt.errors import RequestError

# Always open and always answered: who asks for health has no key and no patience.
HEALTH_PATHS = frozenset({"/health", "/health_generate", "/ready", "/ping"})

# What changes the server for everybody: asks for the admin key once there is one.
ADMIN_PATHS = frozenset(
    {
        *("/set_kv_budget", "/compact_kv", "/flush_cache"),
        *("/load_lora_adapter", "/unload_lora_adapter"),
    }
)

RESPONSES_PATH = "/v1/responses"
MESSAGES_PATH = "/v1/messages"

_SHAPES = {RESPONSES_PATH: ApiShape.RESPONSES, MESSAGES_PATH: ApiShape.ANTHROPIC}

# Where a client may put the key, and what stands before it there.
_KEY_HEADERS = {b"authorization": b"Bearer ", b"x-api-key": b""}


def shape_of(path: str, ollama: OllamaRoutes) -> ApiShape:
    """Whose error format a path speaks; `ollama` says which paths are Ollama's."""
    if path in ollama.paths:
        return ApiShape.OLLAMA
    for root, shape in _SHAPES.items():
        if path == root or path.startswith(f"{root}/"):
            return shape
    return ApiShape.OPENAI if path.startswith("/v1/") else ApiShape.NATIVE


class Gate:
    """401 without the key, 503 while the server is not open; health passes always.

    The key is --api-key, on `ADMIN_PATHS` --admin-api-key when that is set; each may be absent.
    """

    def __init__(self, app: ASGIApp, context: ServerContext) -> None:
        self._app = app
        self._context = context
        args = context.server_args
        self._key = None if args.api_key is None else args.api_key.encode()
        admin_key = args.admin_api_key
        self._admin_key = self._key if admin_key is None else admin_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer for the app, or let it answer."""
        if scope["type"] != "http" or scope["path"] in HEALTH_PATHS:
            await self._app(scope, receive, send)
            return
        if not self._has_key(scope):
            await unauthorized(self._shape_of(scope))(scope, receive, send)
            return
        try:
            _ = self._context.serving
        except RequestError as error:
            await error_response(self._shape_of(scope), error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _shape_of(self, scope: Scope) -> ApiShape:
        return shape_of(scope["path"], self._context.environ.ollama_routes)

    def _has_key(self, scope: Scope) -> bool:
        expected = self._admin_key if scope["path"] in ADMIN_PATHS else self._key
        if expected is None:
            return True
        return any(
            hmac.compare_digest(value, _KEY_HEADERS[name] + expected)
            for name, value in scope["headers"]
            if name in _KEY_HEADERS
        )
