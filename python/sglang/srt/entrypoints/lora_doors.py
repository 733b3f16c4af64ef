"""The doors to LoRA adapters while the server runs: load one, unload one.

Both are the administrator's (`ADMIN_PATHS` in http_gate). The work is the registry's.
"""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sglang.srt.entrypoints.event_stream import while_connected
from sglang.srt.entrypoints.http_errors import JsonResponse
from sglang.srt.entrypoints.request_body import read_body, split_object
from sglang.srt.entrypoints.request_fields import FieldTable
from sglang.srt.entrypoints.server_context import ServerContext
from sglang.srt.managers.lora_registry import LoraRegistry


class LoadBody(msgspec.Struct, frozen=True):
    """The fields of /load_lora_adapter; the first two are needed."""

    lora_name: str = ""
    lora_path: str = ""
    pinned: bool = False


class UnloadBody(msgspec.Struct, frozen=True):
    """The fields of /unload_lora_adapter."""

    lora_name: str = ""


LOAD_FIELDS = FieldTable(LoadBody, accepted=(), refused={}, refuse_unknown=True)
UNLOAD_FIELDS = FieldTable(UnloadBody, accepted=(), refused={}, refuse_unknown=True)


class LoraDoors:
    """Endpoints that load and unload adapters; raise RequestError and ClientGoneError."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def load(self, request: Request) -> Response:
        """POST /load_lora_adapter: 400 with the same object when it was not loaded."""
        body = LOAD_FIELDS.read(await self._fields(request))
        # A client that goes away does not stop what all schedulers do.
        return _reply(await self._registry.load(body.lora_name, body.lora_path, body.pinned))

    async def unload(self, request: Request) -> Response:
        """POST /unload_lora_adapter: answered when the last request with the adapter has ended.

        A client that goes away before leaves it loaded.
        """
        body = UNLOAD_FIELDS.read(await self._fields(request))
        work = self._registry.unload(body.lora_name)
        return _reply(await while_connected(request.receive, work))

    @property
    def _registry(self) -> LoraRegistry:
        return self._context.serving.service.adapters

    async def _fields(self, request: Request) -> dict[str, msgspec.Raw]:
        return split_object(await read_body(request, self._context.request_byte_limit))


def _reply(answer: dict[str, Any]) -> Response:
    return JsonResponse(answer, status_code=200 if answer["success"] else 400)
