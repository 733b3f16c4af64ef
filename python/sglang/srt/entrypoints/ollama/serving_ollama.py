"""/api/chat and /api/generate: chats in Ollama's words, told in lines of JSON.

The request becomes a chat request and the answer is parsed as a chat's, unless it is a raw prompt.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec
import orjson

from sglang.srt.entrypoints.http_errors import ApiShape, dump_json, stream_error
from sglang.srt.entrypoints.ollama.ollama_fields import (
    OllamaChatBody,
    OllamaGenerateBody,
    OptionsBody,
    SharedBody,
    chat_body,
    chat_messages,
    prompt_messages,
    read_options,
    shared_fields,
    unable_to_think,
)
from sglang.srt.entrypoints.openai.answer_reader import AnswerReader, read_whole
from sglang.srt.entrypoints.openai.protocol import CompletionBody
from sglang.srt.entrypoints.openai.serving_chat import ChatServing
from sglang.srt.entrypoints.openai.serving_completions import CompletionServing
from sglang.srt.entrypoints.request_body import off_loop
from sglang.srt.entrypoints.sequences import Call, SequenceOutput
from sglang.srt.errors import RequestError
from sglang.srt.function_call.core_types import (
    CallArguments,
    CallBroken,
    CallEnd,
    CallStart,
    Event,
    Reasoning,
)
from sglang.srt.function_call.function_call_parser import new_call_id
from sglang.srt.managers.generate_request import GenerateDelta
from sglang.srt.parser.answer_parser import PARSE_BYTES_PER_CHAR, AnswerForm, ParserNames

# More of an answer: one of `content`, `thinking` and `tool_calls`.
Part = dict[str, Any]


@dataclass(frozen=True)
class OllamaCall:
    """A request that is ready to run, since `begin_ns`; not `is_chat`: of /api/generate."""

    model: str
    is_chat: bool
    is_stream: bool
    call: Call
    form: AnswerForm
    begin_ns: int


class OllamaServing:
    """Serves read requests by way of `chat`, raw prompts by way of `completions`."""

    def __init__(self, chat: ChatServing, completions: CompletionServing) -> None:
        self._chat = chat
        self._completions = completions

    async def prepare_chat(self, body: OllamaChatBody) -> OllamaCall:
        """Render the conversation and build the call; RequestError 400 when it cannot be."""
        begin_ns = time.perf_counter_ns()
        options = self._options(body)
        messages = chat_messages(body.messages)
        chat = await self._chat.prepare(chat_body(body, options, messages, body.tools))
        return OllamaCall(body.model, True, body.stream, chat.call, chat.form, begin_ns)

    async def prepare_generate(self, body: OllamaGenerateBody) -> OllamaCall:
        """Build the call of a prompt; RequestError 400 when it cannot be."""
        begin_ns = time.perf_counter_ns()
        options = self._options(body)
        if body.raw:
            call = await self._raw_call(body, options)
            form = AnswerForm(ParserNames(), {}, None, prompt="", continued="", separates=False)
        else:
            messages = prompt_messages(body)
            chat = await self._chat.prepare(chat_body(body, options, messages))
            call, form = chat.call, chat.form
        return OllamaCall(body.model, False, body.stream, call, form, begin_ns)

    def _options(self, body: SharedBody) -> OptionsBody:
        if body.think and self._chat.options.parsers.reasoning is None:
            raise unable_to_think(body.model)
        return read_options(body, self._chat.service.context_length)

    async def _raw_call(self, body: OllamaGenerateBody, options: OptionsBody) -> Call:
        fields = CompletionBody(**shared_fields(body, options))
        call = (await self._completions.prepare(fields, [body.prompt])).call
        if fields.max_tokens is not None:
            return call
        (request,) = call.prompts  # without a limit, where OpenAI's API has one
        params = msgspec.structs.replace(request.sampling_params, max_new_tokens=None)
        return Call(call.rid, (dataclasses.replace(request, sampling_params=params),))

    async def reply(self, call: OllamaCall) -> dict[str, Any]:
        """The whole answer. Raises RequestError."""
        output = SequenceOutput()
        clock = _Clock(call.begin_ns)
        async with aclosing(self._chat.runner.answers(call.call)) as deltas:
            async for _, delta in deltas:
                clock.note()
                output.add(delta)
        size = PARSE_BYTES_PER_CHAR * len(output.text)
        answer = await off_loop(size, read_whole, call.form, output, self._chat.token_text)
        whole = _joined(_Parts(_new_id(call)).take(answer.events))
        return _line(call, whole, _ended(answer.last, clock))

    async def lines(self, call: OllamaCall) -> AsyncGenerator[bytes, None]:
        """Encoded lines, an error the last one. Raises RequestError only before the first."""
        has_begun = False
        try:
            async with aclosing(self._answered(call)) as lines:
                async for line in lines:
                    has_begun = True
                    yield dump_json(line) + b"\n"
        except RequestError as error:
            if not has_begun:
                raise
            yield dump_json(stream_error(ApiShape.OLLAMA, error)) + b"\n"

    async def _answered(self, call: OllamaCall) -> AsyncGenerator[dict[str, Any], None]:
        reader = AnswerReader(call.form, self._chat.token_text)
        parts = _Parts(_new_id(call))
        clock = _Clock(call.begin_ns)
        async with aclosing(self._chat.runner.answers(call.call)) as deltas:
            async for _, delta in deltas:
                clock.note()
                for part in parts.take(reader.take(delta)):
                    yield _line(call, part)
        last = reader.last
        if last is None or last.finish_reason is None:
            raise RequestError("The request ended without an answer.", 500)
        yield _line(call, {}, _ended(last, clock))


class _Clock:
    """When the first and the last news of an answer came."""

    def __init__(self, begin_ns: int) -> None:
        self.begin_ns = begin_ns
        self.first_ns: int | None = None
        self.last_ns = begin_ns

    def note(self) -> None:
        """News have come."""
        self.last_ns = time.perf_counter_ns()
        if self.first_ns is None:
            self.first_ns = self.last_ns


class _Parts:
    """Puts the events of an answer together; a call is a part of its own, once it is complete."""

    def __init__(self, new_id: Callable[[], str]) -> None:
        self._new_id = new_id
        self._name = ""
        self._arguments: list[str] = []

    def take(self, events: Iterable[Event]) -> list[Part]:
        """The parts that the events add."""
        return [part for event in events for part in self._take(event)]

    def _take(self, event: Event) -> list[Part]:
        if isinstance(event, CallStart):
            self._name = event.name
            self._arguments.clear()
            return []
        if isinstance(event, CallArguments):
            self._arguments.append(event.text)
            return []
        if isinstance(event, CallEnd):
            arguments = orjson.Fragment("".join(self._arguments))
            function = {"name": self._name, "arguments": arguments}
            return [{"tool_calls": [{"id": self._new_id(), "function": function}]}]
        if isinstance(event, CallBroken):
            return [{"content": event.raw}]
        if not event.text:
            return []
        return [{"thinking" if isinstance(event, Reasoning) else "content": event.text}]


def _new_id(call: OllamaCall) -> Callable[[], str]:
    return lambda: new_call_id(call.form.names.tool_call or "")


def _joined(parts: Iterable[Part]) -> Part:
    """All parts as one; white space beside calls is dropped."""
    content, thinking, calls = "", "", []
    for part in parts:
        content += part.get("content", "")
        thinking += part.get("thinking", "")
        calls += part.get("tool_calls", [])
    whole: Part = {"content": "" if calls and not content.strip() else content}
    if thinking:
        whole["thinking"] = thinking
    if calls:
        whole["tool_calls"] = calls
    return whole


def _line(call: OllamaCall, part: Part, end: dict[str, Any] | None = None) -> dict[str, Any]:
    """One line of a reply; `end` None: more follow."""
    head = {"model": call.model, "created_at": timestamp(time.time())}
    if call.is_chat:
        shown: dict[str, Any] = {"message": {"role": "assistant", "content": "", **part}}
    else:
        shown = {"response": part.get("content", "")}
        if "thinking" in part:
            shown["thinking"] = part["thinking"]
    return {**head, **shown, **({"done": False} if end is None else end)}


def _ended(last: GenerateDelta, clock: _Clock) -> dict[str, Any]:
    """What the last line tells besides; durations in nanoseconds.

    That of the prompt holds the time before it was the request's turn. The model was loaded before.
    """
    first_ns = clock.last_ns if clock.first_ns is None else clock.first_ns
    reason = last.finish_reason
    return {
        "done": True,
        "done_reason": None if reason is None else reason.type,
        "total_duration": clock.last_ns - clock.begin_ns,
        "load_duration": 0,
        "prompt_eval_count": last.prompt_tokens,
        "prompt_eval_cached_count": last.cached_tokens,
        "prompt_eval_duration": first_ns - clock.begin_ns,
        "eval_count": last.completion_tokens,
        "eval_duration": clock.last_ns - first_ns,
    }


def loaded(model: str, is_chat: bool) -> dict[str, Any]:
    """The reply to a request without a prompt, which asks for the model to be loaded: it is."""
    shown: dict[str, Any] = {"response": ""}
    if is_chat:
        shown = {"message": {"role": "assistant", "content": ""}}
    head = {"model": model, "created_at": timestamp(time.time())}
    return {**head, **shown, "done": True, "done_reason": "load"}


def timestamp(seconds: float) -> str:
    """Seconds since the epoch in the form of RFC 3339."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
