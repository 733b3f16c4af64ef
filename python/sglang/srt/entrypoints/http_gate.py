"""What every HTTP request passes before its door: the API key and the server's phase.

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


def shape_of(path: str) -> ApiShape:
    """Whose error format a path speaks."""
    return ApiShape.OPENAI if path.startswith("/v1/") else ApiShape.NATIVE


class Gate:
    """401 without the key, 503 while the server is not open; health passes always."""

    def __init__(self, app: ASGIApp, context: ServerContext) -> None:
        self._app = app
        self._context = context
        key = context.server_args.api_key
        self._expected = None if key is None else f"Bearer {key}".encode()

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
        if self._expected is None:
            return True
        given = b""
        for name, value in scope["headers"]:
            if name == b"authorization":
                given = value
        return hmac.compare_digest(given, self._expected)
