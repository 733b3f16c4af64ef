"""/v1/chat/completions: messages to a prompt, deltas to OpenAI's objects."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec

from sglang.srt.entrypoints.event_stream import DONE_EVENT, event, progress_comment
from sglang.srt.entrypoints.http_errors import ApiShape, bad_field, stream_error
from sglang.srt.entrypoints.logprob_format import chat_content, formatted_bytes
from sglang.srt.entrypoints.openai.chat_messages import template_kwargs, template_messages
from sglang.srt.entrypoints.openai.protocol import CHAT_FIELDS, ChatBody
from sglang.srt.entrypoints.openai.serving_base import (
    MAX_OPENAI_TOP_LOGPROBS,
    OpenAIServing,
    ReplyHead,
    UsageCounter,
    call_ids,
    check_max_tokens,
    finish_fields,
    last_of,
    sampling_params,
)
from sglang.srt.entrypoints.request_body import RawFields, decode_field, off_loop
from sglang.srt.entrypoints.sequences import Call, SequenceOutput, abort_error
from sglang.srt.errors import RequestError
from sglang.srt.managers.generate_request import GenerateDelta, GenerateRequest
from sglang.srt.managers.io_struct import LogprobArrays

_TOOLS = msgspec.json.Decoder(list[Any] | None)


@dataclass(frozen=True)
class ChatCall:
    """A request that is ready to run."""

    head: ReplyHead
    call: Call
    body: ChatBody


def read_chat(fields: RawFields) -> ChatBody:
    """Read the fields; RequestError 400 naming the first that cannot be served.

    Tools are refused unless there are none, or the request says that none may be called.
    """
    fields = dict(fields)
    tools = fields.pop("tools", None)
    if tools is not None and decode_field("tools", tools, _TOOLS):
        choice = fields.get("tool_choice")
        if choice is None or bytes(choice) != b'"none"':
            raise bad_field("tools", "tools are not served")
    return CHAT_FIELDS.read(fields)


class ChatServing(OpenAIServing):
    """Serves read chat requests."""

    async def prepare(self, body: ChatBody) -> ChatCall:
        """Render the conversation and build the call; RequestError 400 when it cannot be."""
        messages = template_messages(body.messages)
        kwargs = template_kwargs(body.chat_template_kwargs, body.reasoning_effort)
        if body.continue_final_message and messages[-1]["role"] != "assistant":
            raise bad_field("continue_final_message", "the last message is not the assistant's")
        if not 0 <= body.top_logprobs <= MAX_OPENAI_TOP_LOGPROBS:
            raise bad_field(
                "top_logprobs",
                f"it must be in [0, {MAX_OPENAI_TOP_LOGPROBS}], got {body.top_logprobs}",
            )
        if body.top_logprobs and not body.logprobs:
            raise bad_field("top_logprobs", "it needs logprobs to be true")
        check_max_tokens("max_tokens", body.max_tokens)
        check_max_tokens("max_completion_tokens", body.max_completion_tokens)
        max_new = body.max_completion_tokens
        if max_new is None:
            max_new = body.max_tokens
        params = sampling_params(body, max_new, self.options.sampling_defaults)
        text = await self.service.render_chat(
            messages,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            **kwargs,
        )
        head, rid, extra_key = call_ids(body)
        request = GenerateRequest(
            rid=rid,
            text=text,
            input_ids=None,
            sampling_params=params,
            stream=body.stream,
            return_logprob=body.logprobs,
            top_logprobs_num=body.top_logprobs,
            extra_key=extra_key,
            priority=body.priority,
            add_special_tokens=False,
            include_progress=body.stream and bool(body.stream_options.include_progress),
        )
        return ChatCall(head, Call(rid, (request,)), body)

    async def reply(self, chat: ChatCall) -> dict[str, Any]:
        """The whole answer. Raises RequestError."""
        outputs = await self.runner.collect(chat.call)
        usage = UsageCounter(chat.call.prompt_indices, self.options.cache_report)
        choices = []
        for index, output in enumerate(outputs):
            last = last_of(output)
            usage.note(index, last)
            size = formatted_bytes(output.output_logprobs)
            choices.append(
                await off_loop(size, self._choice, index, output, last, chat.body.logprobs)
            )
        return {
            **chat.head.fields("chat.completion"),
            "choices": choices,
            "usage": usage.usage(),
            "metadata": {"weight_version": self.options.weight_version},
        }

    def _choice(
        self, index: int, output: SequenceOutput, last: GenerateDelta, logprobs: bool
    ) -> dict[str, Any]:
        message = {
            "role": "assistant",
            "content": output.text,
            "reasoning_content": None,
            "tool_calls": None,
        }
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(output.output_logprobs) if logprobs else None,
            **finish_fields(last.finish_reason),
        }

    def _logprobs(self, arrays: LogprobArrays | None) -> dict[str, Any]:
        return {"content": chat_content(arrays, self.token_bytes)}

    async def events(self, chat: ChatCall) -> AsyncGenerator[bytes, None]:
        """Encoded chunks, `[DONE]` last. Raises RequestError only before the first one."""
        options = chat.body.stream_options
        usage = UsageCounter(chat.call.prompt_indices, self.options.cache_report)
        begun: set[int] = set()
        has_sent = False
        try:
            async with aclosing(self.runner.stream(chat.call)) as deltas:
                async for index, delta in deltas:
                    if delta.progress is not None:
                        has_sent = True
                        yield progress_comment(index, delta.progress)
                        continue
                    error = abort_error(delta.finish_reason)
                    if error is not None:
                        raise error
                    usage.note(index, delta)
                    now = usage.usage() if options.continuous_usage_stats else None
                    if index not in begun:
                        begun.add(index)
                        opening = {"role": "assistant", "content": ""}
                        yield event(self._chunk(chat, index, opening, None, None, now))
                    for content, end in _cut(delta):
                        arrays = delta.output_logprobs if content else None
                        yield event(self._chunk(chat, index, content, arrays, end, now))
        except RequestError as error:
            if not (begun or has_sent):
                raise
            yield event(stream_error(ApiShape.OPENAI, error))
            yield DONE_EVENT
            return
        if options.include_usage:
            yield event(
                {
                    **chat.head.fields("chat.completion.chunk"),
                    "choices": [],
                    "usage": usage.usage(),
                }
            )
        yield DONE_EVENT

    def _chunk(
        self,
        chat: ChatCall,
        index: int,
        delta: dict[str, Any],
        arrays: LogprobArrays | None,
        end: GenerateDelta | None,
        usage: dict[str, Any] | None,
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(arrays) if arrays is not None else None,
            **finish_fields(end.finish_reason if end is not None else None),
        }
        return {**chat.head.fields("chat.completion.chunk"), "choices": [choice], "usage": usage}


def _cut(delta: GenerateDelta) -> list[tuple[dict[str, Any], GenerateDelta | None]]:
    """A delta as OpenAI cuts it: what is new, then the end in a chunk of its own.

    A token that has no text yet (half a character) is news too and goes out with empty content.
    """
    chunks: list[tuple[dict[str, Any], GenerateDelta | None]] = []
    if delta.text or len(delta.output_ids):
        chunks.append(({"content": delta.text}, None))
    if delta.finish_reason is not None:
        chunks.append(({}, delta))
    return chunks
