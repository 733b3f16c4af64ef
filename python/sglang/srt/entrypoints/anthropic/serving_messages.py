"""/v1/messages: a message is a chat in Anthropic's words.

The request becomes a chat request and the answer is parsed as a chat's; fields, the conversation
and the events are in the modules beside this one.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec

from sglang.srt.entrypoints.anthropic.conversation import conversation
from sglang.srt.entrypoints.anthropic.message_events import (
    PING,
    STOP,
    MessageWriter,
    StreamEvent,
    stop_fields,
    usage,
)
from sglang.srt.entrypoints.anthropic.messages_fields import (
    MessagesBody,
    PromptBody,
    chat_body,
    prompt_fields,
)
from sglang.srt.entrypoints.event_stream import named_event
from sglang.srt.entrypoints.http_errors import ApiShape, stream_error
from sglang.srt.entrypoints.openai.answer_reader import AnswerReader, whole_answer
from sglang.srt.entrypoints.openai.protocol import ChatBody
from sglang.srt.entrypoints.openai.responses_events import new_id
from sglang.srt.entrypoints.openai.serving_chat import ChatCall, ChatServing
from sglang.srt.errors import RequestError
from sglang.srt.function_call.function_call_parser import new_call_id
from sglang.srt.managers.generate_request import GenerateDelta
from sglang.srt.managers.io_struct import FinishReason
from sglang.srt.parser.answer_parser import GPT_OSS


@dataclass(frozen=True)
class MessageCall:
    """A request that is ready to run; `shows_thinking` False: its text is left out."""

    id: str
    chat: ChatCall
    shows_thinking: bool

    @property
    def is_stream(self) -> bool:
        """Whether the reply is a stream of events."""
        return self.chat.body.stream


class MessageServing:
    """Serves read requests by way of `chat`."""

    def __init__(self, chat: ChatServing) -> None:
        self._chat = chat

    async def prepare(self, body: MessagesBody) -> MessageCall:
        """Render the conversation and build the call; RequestError 400 when it cannot be."""
        message_id = new_id("msg")
        # Aborts go by how ids begin: the client's own still works, and ends nothing else here.
        rid = message_id if body.rid is None else f"{body.rid}_{message_id}"
        messages = conversation(body.system, body.messages)
        chat = await self._chat.prepare(self._bounded(body, chat_body(body, rid, messages)))
        shows_thinking = body.thinking is None or body.thinking.display != "omitted"
        return MessageCall(message_id, chat, shows_thinking)

    def _bounded(self, body: MessagesBody, chat: ChatBody) -> ChatBody:
        """The request with its budget of thinking, where one can be kept."""
        if body.thinking is None or self._chat.options.parsers.reasoning in (None, GPT_OSS):
            return chat
        budget = body.thinking.budget_tokens
        return msgspec.structs.replace(chat, max_thinking_tokens=budget)

    async def count(self, body: PromptBody) -> dict[str, int]:
        """The number of tokens of a prompt; RequestError 400 when it can't be rendered."""
        messages = conversation(body.system, body.messages)
        chat = await self._chat.prepare(ChatBody(**prompt_fields(body, messages)))
        service, prompt = self._chat.service, chat.call.prompts[0]
        tokens = await service.tokenize(prompt.text or "", False)
        placed = await service.images.place(tokens, prompt.images)
        service.images.release(placed.num_bytes)
        return {"input_tokens": len(placed.ids)}

    async def reply(self, call: MessageCall) -> dict[str, Any]:
        """The whole message. Raises RequestError."""
        answer = await whole_answer(self._chat, call.chat)
        writer = _writer(call)
        writer.feed(answer.events)
        writer.finish(_is_complete(answer.last.finish_reason))
        return {
            **_opening(call, answer.last),
            "content": writer.content,
            **stop_fields(answer.last.finish_reason, writer.has_calls),
            "usage": usage(answer.last, answer.num_reasoning),
        }

    async def events(self, call: MessageCall) -> AsyncGenerator[bytes, None]:
        """Encoded events, an error the last one. Raises RequestError only before the first."""
        has_begun = False
        try:
            async with aclosing(self._answered(call)) as events:
                async for one in events:
                    has_begun = True
                    yield named_event(one)
        except RequestError as error:
            if not has_begun:
                raise
            yield named_event(stream_error(ApiShape.ANTHROPIC, error))

    async def _answered(self, call: MessageCall) -> AsyncGenerator[StreamEvent, None]:
        reader = AnswerReader(call.chat.form, self._chat.token_text)
        writer = _writer(call)
        has_begun = False
        async with aclosing(self._chat.runner.answers(call.chat.call)) as deltas:
            async for _, delta in deltas:
                if not has_begun:
                    has_begun = True
                    yield {"type": "message_start", "message": _opening(call, delta)}
                    yield PING
                elif delta.progress is not None:
                    yield PING
                if delta.progress is None:
                    for one in writer.feed(reader.take(delta)):
                        yield one
        last = reader.last
        if last is None or last.finish_reason is None:
            raise RequestError("The request ended without an answer.", 500)
        for one in writer.finish(_is_complete(last.finish_reason)):
            yield one
        stop = stop_fields(last.finish_reason, writer.has_calls)
        yield {"type": "message_delta", "delta": stop, "usage": usage(last, reader.num_reasoning)}
        yield STOP


def _writer(call: MessageCall) -> MessageWriter:
    parser = call.chat.form.names.tool_call or ""
    return MessageWriter(lambda: new_call_id(parser, "toolu_"), call.shows_thinking)


def _is_complete(reason: FinishReason | None) -> bool:
    return reason is not None and reason.type == "stop"


def _opening(call: MessageCall, delta: GenerateDelta) -> dict[str, Any]:
    """The message with nothing in it, as far as `delta` tells of it."""
    return {
        "id": call.id,
        "type": "message",
        "role": "assistant",
        "model": call.chat.body.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage(delta, num_reasoning=0),
    }
