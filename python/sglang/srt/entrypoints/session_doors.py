"""The doors of sessions: /open_session and /close_session. What runs in one: session_runner.py."""

from __future__ import annotations

import math

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sglang.srt.entrypoints.http_errors import JsonResponse, bad_field
from sglang.srt.entrypoints.request_body import read_body, split_object
from sglang.srt.entrypoints.request_fields import FieldTable
from sglang.srt.entrypoints.server_context import ServerContext
from sglang.srt.tokenizer.tokenizer import is_unicode


class OpenSessionBody(msgspec.Struct, frozen=True):
    """The fields of /open_session. No id: a new one; no `timeout` (seconds): it stays open."""

    session_id: str | None = None
    streaming: bool = False
    timeout: float | None = None


class CloseSessionBody(msgspec.Struct, frozen=True):
    """The fields of /close_session."""

    session_id: str = ""


OPEN_SESSION_FIELDS = FieldTable(
    OpenSessionBody,
    # It sizes nothing: ids are kept as they come, under one bound for all sessions.
    accepted=("capacity_of_str_len",),
    refused={},
    refuse_unknown=True,
)
CLOSE_SESSION_FIELDS = FieldTable(CloseSessionBody, accepted=(), refused={}, refuse_unknown=True)


class SessionDoors:
    """Endpoints that open and close sessions; raise RequestError and ClientGoneError."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def open_session(self, request: Request) -> Response:
        """GET or POST /open_session: the session's id, a JSON string."""
        raw = await read_body(request, self._context.request_byte_limit)
        body = OPEN_SESSION_FIELDS.read(split_object(raw))
        timeout_s = body.timeout
        if timeout_s is not None and not (timeout_s > 0 and math.isfinite(timeout_s)):
            raise bad_field("timeout", f"expected seconds above 0, got {timeout_s}")
        if body.session_id is not None and not (body.session_id and is_unicode(body.session_id)):
            raise bad_field("session_id", "expected a text that is not empty")
        sessions = self._context.serving.runner.sessions
        opened = sessions.open(body.session_id, streaming=body.streaming, timeout_s=timeout_s)
        return JsonResponse(opened)

    async def close_session(self, request: Request) -> Response:
        """GET or POST /close_session: 200 without a body."""
        raw = await read_body(request, self._context.request_byte_limit)
        body = CLOSE_SESSION_FIELDS.read(split_object(raw))
        self._context.serving.runner.sessions.close(body.session_id)
        return Response(status_code=200)
