"""What every HTTP request passes before its door: the keys and the server's phase.

A plain ASGI middleware: it reads headers only, so bodies, streams and disconnects reach the doors
untouched.
"""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from sglang.srt.entrypoints.http_errors import ApiShape, JsonResponse, error_response
from sglang.srt.entrypoints.server_context import ServerContext
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


def shape_of(path: str) -> ApiShape:
    """Whose error format a path speaks."""
    if path == RESPONSES_PATH or path.startswith(f"{RESPONSES_PATH}/"):
        return ApiShape.RESPONSES
    return ApiShape.OPENAI if path.startswith("/v1/") else ApiShape.NATIVE


class Gate:
    """401 without the key, 503 while the server is not open; health passes always.

    The key is --api-key, on `ADMIN_PATHS` --admin-api-key when that is set; each may be absent.
    """

    def __init__(self, app: ASGIApp, context: ServerContext) -> None:
        self._app = app
        self._context = context
        self._key = _bearer(context.server_args.api_key)
        self._admin_key = _bearer(context.server_args.admin_api_key) or self._key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer for the app, or let it answer."""
        if scope["type"] != "http" or scope["path"] in HEALTH_PATHS:
            await self._app(scope, receive, send)
            return
        if not self._has_key(scope):
            refusal = JsonResponse({"error": "Unauthorized"}, status_code=401)
            await refusal(scope, receive, send)
            return
        try:
            _ = self._context.serving
        except RequestError as error:
            await error_response(shape_of(scope["path"]), error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        expected = self._admin_key if scope["path"] in ADMIN_PATHS else self._key
        if expected is None:
            return True
        given = b""
        for name, value in scope["headers"]:
            if name == b"authorization":
                given = value
        return hmac.compare_digest(given, expected)


def _bearer(key: str | None) -> bytes | None:
    return None if key is None else f"Bearer {key}".encode()
