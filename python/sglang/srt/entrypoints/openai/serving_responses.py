"""/v1/responses: a response is a chat, told as items, that clients may come back to.

The request becomes a chat request and the answer is parsed as a chat's; fields, items, events and
the store are in the responses_* modules beside this one.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec
import orjson

from sglang.srt.entrypoints.event_stream import progress_comment
from sglang.srt.entrypoints.http_errors import bad_field, dump_json
from sglang.srt.entrypoints.logprob_format import chat_content, formatted_bytes
from sglang.srt.entrypoints.openai.answer_reader import (
    AnswerReader,
    WholeAnswer,
    whole_answer,
)
from sglang.srt.entrypoints.openai.responses_events import (
    EventEncoder,
    OutputWriter,
    StreamEvent,
    new_id,
)
from sglang.srt.entrypoints.openai.responses_fields import ResponsesBody, chat_body, echoed
from sglang.srt.entrypoints.openai.responses_items import Message, content_chars, messages_of
from sglang.srt.entrypoints.openai.responses_store import ResponseStore, Turn
from sglang.srt.entrypoints.openai.serving_chat import ChatCall, ChatServing
from sglang.srt.entrypoints.request_body import off_loop
from sglang.srt.errors import RequestError
from sglang.srt.function_call.function_call_parser import new_call_id
from sglang.srt.managers.generate_request import GenerateDelta
from sglang.srt.managers.io_struct import FinishReason, LogprobArrays

_MESSAGES: msgspec.json.Decoder[list[Message]] = msgspec.json.Decoder(list[Message])
_FINAL_EVENTS = {"completed": "response.completed", "failed": "response.failed"}
_RATE_LIMIT = 429


@dataclass(frozen=True)
class ResponseCall:
    """A request that is ready to run.

    `opening` is the response before its first token, `asked` the input's messages and `previous`
    the conversation that they go on from. `keeps`: the response may be come back to.
    """

    id: str
    chat: ChatCall
    opening: dict[str, Any]
    asked: list[Message]
    previous: Turn | None
    keeps: bool

    @property
    def is_stream(self) -> bool:
        """Whether the reply is a stream of events."""
        return self.chat.body.stream


class ResponseServing:
    """Serves read requests by way of `chat`; what is kept is in `store`."""

    def __init__(self, chat: ChatServing, store: ResponseStore) -> None:
        self._chat = chat
        self._store = store
        self._running: dict[str, ResponseCall] = {}

    async def prepare(self, body: ResponsesBody) -> ResponseCall:
        """Build the call; RequestError 400 when it can't be, 404 without the earlier response."""
        response_id = new_id("resp")
        previous: Turn | None = None
        messages: list[Message] = []
        if body.instructions:
            messages.append({"role": "system", "content": body.instructions})
        if body.previous_response_id is not None:
            stored = self._store.get(body.previous_response_id)
            if stored is None:
                raise _unknown(body.previous_response_id)
            previous = stored.turn
            size = sum(len(turn.messages) for turn in previous.chain())
            messages += await off_loop(size, _told, previous)
        asked = messages_of("input", body.input)
        if not asked:
            raise bad_field("input", "it is missing or empty")
        # Aborts go by how ids begin: the client's own still works, and ends nothing else here.
        rid = response_id if body.rid is None else f"{body.rid}_{response_id}"
        chat = await self._chat.prepare(chat_body(body, rid, [*messages, *asked]))
        opening = _opening(response_id, body, chat)
        return ResponseCall(response_id, chat, opening, asked, previous, body.store)

    async def reply(self, call: ResponseCall) -> bytes:
        """The whole response as JSON. Raises RequestError."""
        self._running[call.id] = call
        try:
            answer = await whole_answer(self._chat, call.chat)
            size = formatted_bytes(answer.output.output_logprobs)
            response = await off_loop(size, self._whole, call, answer)
            return await self._end(call, response)
        finally:
            self._running.pop(call.id, None)

    def _whole(self, call: ResponseCall, answer: WholeAnswer) -> dict[str, Any]:
        writer = _writer(call)
        writer.feed(answer.events, self._logprobs(call, answer.output.output_logprobs))
        writer.finish(_status(answer.last.finish_reason) == "completed")
        return _ended(call, writer.items, answer.last, answer.num_reasoning)

    def _logprobs(self, call: ResponseCall, arrays: LogprobArrays | None) -> list[dict[str, Any]]:
        if arrays is None or not call.chat.body.logprobs:
            return []
        return chat_content(arrays, self._chat.token_bytes)

    async def events(self, call: ResponseCall) -> AsyncGenerator[bytes, None]:
        """Encoded events; the last one has the response. RequestError only before the first."""
        self._running[call.id] = call
        try:
            async with aclosing(self._answered(call)) as events:
                async for one in events:
                    yield one
        finally:
            self._running.pop(call.id, None)

    async def _answered(self, call: ResponseCall) -> AsyncGenerator[bytes, None]:
        encoder = EventEncoder()
        answer = _StreamedAnswer(call, AnswerReader(call.chat.form, self._chat.token_text))
        has_begun = False
        try:
            async with aclosing(self._chat.runner.answers(call.chat.call)) as deltas:
                async for index, delta in deltas:
                    if not has_begun:
                        has_begun = True
                        for one in _begin(call):
                            yield encoder.encode(one)
                    if delta.progress is not None:
                        yield progress_comment(index, delta.progress)
                        continue
                    for one in answer.take(delta, self._logprobs(call, delta.output_logprobs)):
                        yield encoder.encode(one)
            response = answer.response()
            if response["status"] == "failed":
                raise RequestError("The request ended without an answer.", 500)
        except RequestError as error:
            if not has_begun:
                raise
            for one in answer.broken_off():
                yield encoder.encode(one)
            response = {**answer.response(), "status": "failed", "error": _error(error)}
        kind = _FINAL_EVENTS.get(response["status"], "response.incomplete")
        body = await self._end(call, response)
        yield encoder.encode({"type": kind, "response": orjson.Fragment(body)})

    async def _end(self, call: ResponseCall, response: dict[str, Any]) -> bytes:
        """The response as JSON, kept if it may be."""
        body = dump_json(response)
        if call.keeps:
            said = [*call.asked, *messages_of("output", response["output"])]
            size = sum(map(content_chars, said))
            messages = await off_loop(size, msgspec.json.encode, said)
            self._store.put(call.id, body, Turn(messages, call.previous))
        self._running.pop(call.id, None)  # before the client hears of the end, and comes back
        return body

    def retrieve(self, response_id: str) -> bytes:
        """A kept response as JSON, as it began while it runs; RequestError 404."""
        call = self._running.get(response_id)
        if call is not None and call.keeps:
            return dump_json(call.opening)
        stored = self._store.get(response_id)
        if stored is None:
            raise _unknown(response_id)
        return stored.body

    async def cancel(self, response_id: str) -> bytes:
        """End a running response; one that has ended stays as it is. RequestError 404."""
        call = self._running.get(response_id)
        if call is None:
            return self.retrieve(response_id)
        await self._chat.runner.abort(call.chat.call.rid)
        return dump_json({**call.opening, "status": "cancelled"})

    def delete(self, response_id: str) -> dict[str, Any]:
        """Forget a kept response that has ended; RequestError 404."""
        if not self._store.drop(response_id):
            raise _unknown(response_id)
        return {"id": response_id, "object": "response", "deleted": True}


class _StreamedAnswer:
    """One answer of a stream, as far as it has come."""

    def __init__(self, call: ResponseCall, reader: AnswerReader) -> None:
        self._call = call
        self._reader = reader
        self._writer = _writer(call)

    def take(self, delta: GenerateDelta, logprobs: list[dict[str, Any]]) -> list[StreamEvent]:
        """The events of a delta."""
        shown = self._writer.feed(self._reader.take(delta), logprobs)
        if delta.finish_reason is not None:
            shown += self._writer.finish(_status(delta.finish_reason) == "completed")
        return shown

    def broken_off(self) -> list[StreamEvent]:
        """The events that close what an error has cut off."""
        return self._writer.finish(is_complete=False)

    def response(self) -> dict[str, Any]:
        """The response with all items that are closed."""
        reader = self._reader
        return _ended(self._call, self._writer.items, reader.last, reader.num_reasoning)


def _unknown(response_id: str) -> RequestError:
    return RequestError(f"Response '{response_id}' was not found: it is unknown or dropped.", 404)


def _told(turn: Turn) -> list[Message]:
    """All messages of a conversation."""
    turns = reversed(list(turn.chain()))
    return [message for one in turns for message in _MESSAGES.decode(one.messages)]


def _writer(call: ResponseCall) -> OutputWriter:
    parser = call.chat.form.names.tool_call or ""
    return OutputWriter(lambda: new_call_id(parser))


def _status(reason: FinishReason | None) -> str:
    """The status of a response that ended so; None: it never ended."""
    if reason is None:
        return "failed"
    return {"length": "incomplete", "abort": "cancelled"}.get(reason.type, "completed")


def _opening(response_id: str, body: ResponsesBody, chat: ChatCall) -> dict[str, Any]:
    """The response before its first token; sampling as it will be, defaults included."""
    params = chat.call.prompts[0].sampling_params
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "output": [],
        "usage": None,
        **echoed(body),
        "temperature": params.temperature,
        "top_p": params.top_p,
    }


def _begin(call: ResponseCall) -> list[StreamEvent]:
    response = orjson.Fragment(dump_json(call.opening))
    kinds = ("response.created", "response.in_progress")
    return [{"type": kind, "response": response} for kind in kinds]


def _ended(
    call: ResponseCall, items: list[dict[str, Any]], last: GenerateDelta | None, reasoning: int
) -> dict[str, Any]:
    """The response at its end; `last` None: not a token came."""
    status = _status(None if last is None else last.finish_reason)
    is_cut = status == "incomplete"
    return {
        **call.opening,
        "status": status,
        "completed_at": int(time.time()) if status == "completed" else None,
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "output": items,
        "usage": None if last is None else _usage(last, reasoning),
    }


def _usage(last: GenerateDelta, reasoning: int) -> dict[str, Any]:
    """Tokens as the Responses API counts them; what the cache took in is not counted here."""
    return {
        "input_tokens": last.prompt_tokens,
        "input_tokens_details": {"cached_tokens": last.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": last.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": last.prompt_tokens + last.completion_tokens,
    }


def _error(error: RequestError) -> dict[str, Any]:
    """The `error` of a response that failed."""
    code = "server_error" if error.http_status >= 500 else "invalid_prompt"
    if error.http_status == _RATE_LIMIT:
        code = "rate_limit_exceeded"
    return {"code": code, "message": error.message}
