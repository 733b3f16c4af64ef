"""Replies that last: work that ends when its client leaves, and server-sent events.

Every request that may run for long goes through `while_connected`, streamed or not, so a client
that leaves is noticed in any state and its request ends in the scheduler. Starlette's own
streaming reply is not used: depending on the server's ASGI version it notices a lost client only
at the next write, which during a long prefill is minutes away.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sglang.srt.entrypoints.http_errors import ApiShape, dump_json, error_response
from sglang.srt.entrypoints.request_body import ClientGoneError
from sglang.srt.errors import RequestError
from sglang.srt.managers.io_struct import PrefillProgress

T = TypeVar("T")

DONE_EVENT = b"data: [DONE]\n\n"
SERVER_SENT_EVENTS = "text/event-stream"
NDJSON = "application/x-ndjson"


def event(content: Any) -> bytes:
    """One server-sent event with a JSON object."""
    return b"data: " + dump_json(content) + b"\n\n"


def named_event(content: Mapping[str, Any]) -> bytes:
    """One server-sent event with a JSON object, named as the object's `type`."""
    return f"event: {content['type']}\ndata: ".encode() + dump_json(content) + b"\n\n"


def progress_comment(index: int, progress: PrefillProgress) -> bytes:
    """How far the prompt of sequence `index` is, as a comment of the stream.

    Clients that do not look for comments skip them, as the specification of server-sent events
    asks, so that the API's own events stay what its clients know.
    """
    return b": progress " + dump_json({"index": index, **progress.as_dict()}) + b"\n\n"


async def cancel_and_wait(*tasks: asyncio.Future[Any]) -> None:
    """Cancel the tasks and wait until each has cleaned up; their outcomes are dropped."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def until_disconnect(receive: Receive) -> None:
    """Return when the client has closed the connection; the body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves.

    Raises what `work` raises, ClientGoneError when the client left first. `work` has ended in
    every case, so what it held is released.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(until_disconnect(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        await cancel_and_wait(task, gone)


class EventStream(Response):
    """A reply from an iterator of encoded events, server-sent ones or lines of JSON.

    The status line is sent with the first event, so an error raised before it becomes an ordinary
    error reply. The iterator is closed in every case; after a disconnect it is cancelled where it
    waits. Errors after the first event are the iterator's business.
    """

    def __init__(
        self,
        shape: ApiShape,
        events: AsyncGenerator[bytes, None],
        media_type: str = SERVER_SENT_EVENTS,
    ) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(headers=headers, media_type=media_type)
        del self.headers["content-length"]
        self._shape = shape
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they or the client end."""
        try:
            await while_connected(receive, self._send_all(scope, receive, send))
        except ClientGoneError:
            return

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events) as events:
            try:
                first = await anext(events)
            except RequestError as error:
                await error_response(self._shape, error)(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": first, "more_body": True})
            async for data in events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
