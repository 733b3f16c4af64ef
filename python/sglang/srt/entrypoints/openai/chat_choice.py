"""One choice of a chat reply: the model's text to OpenAI's message, whole or in deltas.

The text is parsed as the request's `AnswerForm` says; without anything to parse it is the content.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang.srt.entrypoints.openai.serving_base import finish_fields
from sglang.srt.function_call.core_types import (
    CallArguments,
    CallBroken,
    CallEnd,
    CallStart,
    Content,
    Event,
    Reasoning,
    merged,
)
from sglang.srt.function_call.function_call_parser import new_call_id
from sglang.srt.managers.generate_request import GenerateDelta, IdArray, concat_logprobs
from sglang.srt.managers.io_struct import FinishReason, LogprobArrays
from sglang.srt.parser.answer_parser import AnswerForm


def finish_of(reason: FinishReason | None, has_calls: bool) -> dict[str, Any]:
    """`finish_reason` and `matched_stop`; an answer that stopped after calls ends with them."""
    fields = finish_fields(reason)
    if has_calls and fields["finish_reason"] == "stop":
        fields["finish_reason"] = "tool_calls"
    return fields


def whole_choice(form: AnswerForm, text: str, reason: FinishReason | None) -> dict[str, Any]:
    """`message`, `finish_reason` and `matched_stop` of a complete answer."""
    parser = form.make_parser()
    if parser is None:
        events: list[Event] = [Content(text)]
    else:
        events = merged([*parser.feed(text), *parser.finish()])
    message = _message(form, events)
    return {"message": message, **finish_of(reason, message["tool_calls"] is not None)}


def _message(form: AnswerForm, events: Iterable[Event]) -> dict[str, Any]:
    content: list[str] = []
    reasoning: list[str] = []
    calls: list[dict[str, Any]] = []
    name, arguments = "", ""
    for event in events:
        if isinstance(event, CallStart):
            name, arguments = event.name, ""
        elif isinstance(event, CallArguments):
            arguments += event.text
        elif isinstance(event, CallEnd):
            calls.append(_call(form, name, arguments, len(calls)))
        elif isinstance(event, CallBroken):
            content.append(event.raw)
        elif isinstance(event, Reasoning) and form.separates:
            reasoning.append(event.text)
        else:
            content.append(event.text)
    said = "".join(content)
    return {
        "role": "assistant",
        "content": None if calls and not said.strip() else said,
        "reasoning_content": "".join(reasoning) or None,
        "tool_calls": calls or None,
    }


def _call(form: AnswerForm, name: str, arguments: str, index: int) -> dict[str, Any]:
    return {
        "id": new_call_id(form.names.tool_call or "", name=name, index=index),
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


@dataclass(frozen=True)
class Chunk:
    """One chunk of a stream: what is new, its tokens' log probabilities, and how it ends.

    `end` holds `finish_reason` and `matched_stop`, both None before the last chunk.
    """

    delta: dict[str, Any]
    logprobs: LogprobArrays | None
    end: dict[str, Any]


class StreamedChoice:
    """One choice of a stream; `streams_reasoning` False: reasoning comes at once, at its end."""

    def __init__(self, form: AnswerForm, streams_reasoning: bool) -> None:
        self._form = form
        self._parser = form.make_parser()
        self._streams_reasoning = streams_reasoning
        self._thought: list[str] = []  # reasoning that waits for its end
        self._logprobs: list[LogprobArrays] = []  # of tokens whose text is held back
        self._output_ids: list[IdArray] = []  # of tokens that are in no chunk yet
        self._num_calls = 0
        self._has_calls = False

    def chunks_with_ids(self, delta: GenerateDelta) -> list[tuple[Chunk, IdArray | None]]:
        """`chunks`, the first with the ids of all tokens since the chunk before; others None."""
        self._output_ids.append(delta.output_ids)
        chunks = self.chunks(delta)
        if not chunks:
            return []
        ids, self._output_ids = np.concatenate(self._output_ids), []
        return [(chunks[0], ids), *((chunk, None) for chunk in chunks[1:])]

    def chunks(self, delta: GenerateDelta) -> list[Chunk]:
        """What the delta adds, then the end in a chunk of its own.

        A token that has no text yet (half a character) is news too, and goes out with empty
        content where nothing is parsed. Where something is, log probabilities wait for the next
        chunk when the text does.
        """
        is_last = delta.finish_reason is not None
        news = self._news(delta, is_last)
        if delta.output_logprobs is not None:
            self._logprobs.append(delta.output_logprobs)
        if is_last and self._logprobs and not news:
            news = [{"content": ""}]
        chunks = []
        for one in news:
            chunks.append(Chunk(one, concat_logprobs(self._logprobs), finish_fields(None)))
            self._logprobs = []
        if is_last:
            chunks.append(Chunk({}, None, finish_of(delta.finish_reason, self._has_calls)))
        return chunks

    def _news(self, delta: GenerateDelta, is_last: bool) -> list[dict[str, Any]]:
        if self._parser is None:
            return [{"content": delta.text}] if delta.text or len(delta.output_ids) else []
        events = self._parser.feed(delta.text)
        if is_last:
            events = merged([*events, *self._parser.finish()])
        news = [one for event in events for one in self._shown(event)]
        return [*news, *self._thoughts()] if is_last else news

    def _shown(self, event: Event) -> list[dict[str, Any]]:
        if isinstance(event, Reasoning) and self._form.separates:
            if self._streams_reasoning:
                return [{"reasoning_content": event.text}]
            self._thought.append(event.text)
            return []
        if isinstance(event, CallStart):
            call = {"index": self._num_calls, **_call(self._form, event.name, "", self._num_calls)}
            self._num_calls += 1
            return [*self._thoughts(), {"tool_calls": [call]}]
        if isinstance(event, CallArguments):
            index = self._num_calls - 1
            return [{"tool_calls": [{"index": index, "function": {"arguments": event.text}}]}]
        if isinstance(event, CallEnd):
            self._has_calls = True
            return []
        if isinstance(event, CallBroken):  # what was sent can't be taken back
            return []
        return [*self._thoughts(), {"content": event.text}]

    def _thoughts(self) -> list[dict[str, Any]]:
        thought, self._thought = "".join(self._thought), []
        return [{"reasoning_content": thought}] if thought else []
