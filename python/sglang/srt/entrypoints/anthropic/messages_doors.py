"""The doors of Anthropic's API: /v1/messages and the count of a prompt's tokens."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from sglang.srt.entrypoints.anthropic.messages_fields import (
    MessagesBody,
    PromptBody,
    read_count,
    read_messages,
)
from sglang.srt.entrypoints.event_stream import EventStream, while_connected
from sglang.srt.entrypoints.http_errors import ApiShape, JsonResponse
from sglang.srt.entrypoints.request_body import off_loop, read_json_body, split_object
from sglang.srt.entrypoints.server_context import ServerContext


class MessagesDoors:
    """Anthropic's endpoints; raise RequestError and ClientGoneError."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def messages(self, request: Request) -> Response:
        """POST /v1/messages."""
        raw = await read_json_body(request, self._context.request_byte_limit)
        body: MessagesBody = await off_loop(len(raw), _parse_messages, raw)
        serving = self._context.generating.messages
        call = await while_connected(request.receive, serving.prepare(body))
        if call.is_stream:
            return EventStream(ApiShape.ANTHROPIC, serving.events(call))
        return JsonResponse(await while_connected(request.receive, serving.reply(call)))

    async def count_tokens(self, request: Request) -> Response:
        """POST /v1/messages/count_tokens."""
        raw = await read_json_body(request, self._context.request_byte_limit)
        body: PromptBody = await off_loop(len(raw), _parse_count, raw)
        serving = self._context.generating.messages
        return JsonResponse(await while_connected(request.receive, serving.count(body)))


def _parse_messages(body: bytearray) -> MessagesBody:
    return read_messages(split_object(body))


def _parse_count(body: bytearray) -> PromptBody:
    return read_count(split_object(body))
