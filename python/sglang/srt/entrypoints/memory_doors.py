"""The doors to the KV pool while it serves: its budget and its compaction.

Both are the administrator's (`ADMIN_PATHS` in http_gate). They check values and carry the
scheduler's answer; the work is the scheduler's.
"""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sglang.srt.entrypoints.event_stream import while_connected
from sglang.srt.entrypoints.http_errors import JsonResponse, bad_field
from sglang.srt.entrypoints.request_body import read_body, split_object
from sglang.srt.entrypoints.request_fields import FieldTable, Int
from sglang.srt.entrypoints.server_context import ServerContext
from sglang.srt.errors import RequestError
from sglang.srt.managers.io_struct import ControlReply
from sglang.srt.utils.sizes import parse_bytes

# Beyond the time that the operation has, the scheduler may be inside one long step.
_STEP_ALLOWANCE_S = 60.0
_LONGEST_S = 24 * 3600.0


class BudgetBody(msgspec.Struct, frozen=True):
    """The fields of /set_kv_budget; `bytes` is a number, or text such as "8GiB"."""

    bytes: Int | str | None = None
    timeout_s: float = 30.0


class CompactBody(msgspec.Struct, frozen=True):
    """The fields of /compact_kv."""

    timeout_s: float = 30.0


BUDGET_FIELDS = FieldTable(BudgetBody, accepted=(), refused={}, refuse_unknown=True)
COMPACT_FIELDS = FieldTable(CompactBody, accepted=(), refused={}, refuse_unknown=True)


class MemoryDoors:
    """Endpoints that move the KV pool; raise RequestError and ClientGoneError."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context

    async def set_kv_budget(self, request: Request) -> Response:
        """POST /set_kv_budget: 200 with what was reached, also when the time was too short.

        400 below what one request and the reserve need. A client that goes away does not stop
        the change.
        """
        body = BUDGET_FIELDS.read(await self._fields(request))
        timeout_s = _seconds(body.timeout_s)
        reply = await self._ask(
            request, "set_kv_budget", timeout_s, budget_bytes=_bytes(body.bytes)
        )
        return JsonResponse({"message": reply.message, **reply.data})

    async def compact_kv(self, request: Request) -> Response:
        """POST /compact_kv, with a body or without: 200 with what was moved and given back."""
        body = COMPACT_FIELDS.read(await self._fields(request))
        reply = await self._ask(request, "compact_kv", _seconds(body.timeout_s))
        return JsonResponse({"message": reply.message, **reply.data})

    async def _fields(self, request: Request) -> dict[str, msgspec.Raw]:
        body = await read_body(request, self._context.request_byte_limit)
        return split_object(body) if body else {}

    async def _ask(self, request: Request, op: str, timeout_s: float, **args: int) -> ControlReply:
        service = self._context.serving.service
        reply = await while_connected(
            request.receive,
            service.control(
                op, timeout_s=timeout_s + _STEP_ALLOWANCE_S, time_limit_s=timeout_s, **args
            ),
        )
        status = reply.data.get("status_code")
        if status is not None:
            raise RequestError(reply.message, status)
        return reply


def _bytes(value: int | str | None) -> int:
    if isinstance(value, str):
        try:
            value = parse_bytes(value)
        except ValueError as error:
            raise bad_field("bytes", str(error)) from None
    if value is None or not 0 <= value < 1 << 62:
        raise bad_field("bytes", 'expected a number of bytes, or text such as "8GiB"')
    return value


def _seconds(value: float) -> float:
    if not 0 <= value <= _LONGEST_S:
        raise bad_field("timeout_s", f"expected seconds from 0 to {_LONGEST_S:g}")
    return value
