"""A response's output: what a parser makes of an answer, as items and as the events of a stream.

A whole reply and a stream come from the same writer, so both have the same items. It knows
nothing of requests; who streams numbers the events.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from sglang.srt.entrypoints.event_stream import named_event
from sglang.srt.entrypoints.openai.answer_reader import (
    BlockBegin,
    BlockKind,
    BlockReader,
    BlockText,
    Step,
)
from sglang.srt.function_call.core_types import Event

StreamEvent = dict[str, Any]
REASONING, MESSAGE, CALL = "reasoning", "message", "function_call"
_KINDS = {BlockKind.REASONING: REASONING, BlockKind.TEXT: MESSAGE, BlockKind.CALL: CALL}
_ID_PREFIXES = {REASONING: "rs", MESSAGE: "msg", CALL: "fc"}
_DELTAS = {
    REASONING: "response.reasoning_text",
    MESSAGE: "response.output_text",
    CALL: "response.function_call_arguments",
}


def new_id(prefix: str) -> str:
    """An id that nobody can guess."""
    return f"{prefix}_{uuid.uuid4().hex}"


class EventEncoder:
    """Numbers the events of one stream, and writes them as server-sent events."""

    def __init__(self) -> None:
        self._next = 0

    def encode(self, event: StreamEvent) -> bytes:
        """One event with its name and its number."""
        numbered = {**event, "sequence_number": self._next}
        self._next += 1
        return named_event(numbered)


@dataclass
class _Item:
    """An item that is being written."""

    kind: str
    id: str
    index: int
    call: dict[str, str] = field(default_factory=dict)  # a call's id and name
    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    def part(self) -> dict[str, Any]:
        """The one content part of reasoning or of a message."""
        text = "".join(self.texts)
        if self.kind == REASONING:
            return {"type": "reasoning_text", "text": text}
        logprobs = list(self.logprobs)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def shown(self, status: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
        """The item with the content `parts`; a call has its arguments instead."""
        head = {"id": self.id, "type": self.kind, "status": status}
        if self.kind == CALL:
            return {**head, **self.call, "arguments": "".join(self.texts)}
        if self.kind == MESSAGE:
            return {**head, "role": "assistant", "content": parts}
        return {**head, "summary": [], "content": parts, "encrypted_content": None}


class OutputWriter:
    """Takes an answer's parsed events in order; what they make is in `items` after `finish`.

    Log probabilities go with the next text of a message, whatever their tokens were.
    """

    def __init__(self, new_call_id: Callable[[], str]) -> None:
        self.items: list[dict[str, Any]] = []
        self._new_call_id = new_call_id
        self._blocks = BlockReader()
        self._open: _Item | None = None
        self._logprobs: list[dict[str, Any]] = []

    def feed(
        self, events: Iterable[Event], logprobs: Iterable[dict[str, Any]] = ()
    ) -> list[StreamEvent]:
        """What the events add to the stream; `logprobs` are OpenAI's objects of their tokens."""
        self._logprobs += logprobs
        return self._shown(self._blocks.feed(events))

    def finish(self, is_complete: bool) -> list[StreamEvent]:
        """Close what is open; a complete answer has a message, if an empty one, or a call."""
        return self._shown(self._blocks.finish(is_complete))

    def _shown(self, steps: Iterable[Step]) -> list[StreamEvent]:
        return [shown for step in steps for shown in self._show(step)]

    def _show(self, step: Step) -> list[StreamEvent]:
        if isinstance(step, BlockBegin):
            return self._begin(_KINDS[step.kind], step.name)
        if isinstance(step, BlockText):
            return self._text(step.text)
        return self._close("completed" if step.is_complete else "incomplete")

    def _begin(self, kind: str, name: str) -> list[StreamEvent]:
        call = {"call_id": self._new_call_id(), "name": name} if kind == CALL else {}
        item = _Item(kind, new_id(_ID_PREFIXES[kind]), len(self.items), call)
        self._open = item
        added = item.shown("in_progress", [])
        shown: list[StreamEvent] = [
            {"type": "response.output_item.added", "output_index": item.index, "item": added}
        ]
        if kind != CALL:
            part = {"type": "response.content_part.added", **_place(item), "part": item.part()}
            shown.append(part)
        return shown

    def _text(self, text: str) -> list[StreamEvent]:
        item = self._open
        if item is None:
            return []
        item.texts.append(text)
        delta = {"type": f"{_DELTAS[item.kind]}.delta", **_place(item), "delta": text}
        if item.kind == MESSAGE:
            delta["logprobs"] = self._claimed(item)
        return [delta]

    def _claimed(self, item: _Item) -> list[dict[str, Any]]:
        """The log probabilities that wait, which are the item's now."""
        logprobs, self._logprobs = self._logprobs, []
        item.logprobs += logprobs
        return logprobs

    def _close(self, status: str) -> list[StreamEvent]:
        item, self._open = self._open, None
        if item is None:
            return []
        if item.kind == MESSAGE:
            self._claimed(item)  # those of tokens without text, as that of the answer's end
        parts = [] if item.kind == CALL else [item.part()]
        whole = item.shown(status, parts)
        self.items.append(whole)
        done: StreamEvent = {"type": f"{_DELTAS[item.kind]}.done", **_place(item)}
        if item.kind == CALL:
            done["arguments"] = whole["arguments"]
        else:
            done["text"] = parts[0]["text"]
        if item.kind == MESSAGE:
            done["logprobs"] = parts[0]["logprobs"]
        shown = [done]
        if parts:
            part = {"type": "response.content_part.done", **_place(item), "part": parts[0]}
            shown.append(part)
        shown.append(
            {"type": "response.output_item.done", "output_index": item.index, "item": whole}
        )
        return shown


def _place(item: _Item) -> dict[str, Any]:
    """Where in the output an event of the item belongs."""
    place = {"item_id": item.id, "output_index": item.index}
    return place if item.kind == CALL else {**place, "content_index": 0}
