"""A message: what a parser makes of an answer, as content blocks and as the events of a stream.

A whole reply and a stream come from the same writer, so both have the same blocks. It knows
nothing of requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import orjson

from sglang.srt.entrypoints.openai.answer_reader import (
    BlockBegin,
    BlockKind,
    BlockReader,
    BlockText,
    Step,
)
from sglang.srt.function_call.core_types import Event
from sglang.srt.managers.generate_request import GenerateDelta
from sglang.srt.managers.io_struct import FinishReason

StreamEvent = dict[str, Any]
PING: StreamEvent = {"type": "ping"}
STOP: StreamEvent = {"type": "message_stop"}
# The delta of each kind of block, and its field.
_DELTAS = {
    BlockKind.REASONING: ("thinking_delta", "thinking"),
    BlockKind.TEXT: ("text_delta", "text"),
    BlockKind.CALL: ("input_json_delta", "partial_json"),
}


def usage(last: GenerateDelta, num_reasoning: int) -> dict[str, Any]:
    """Tokens as Anthropic counts them: `input_tokens` are those that no cache held."""
    return {
        "input_tokens": last.prompt_tokens - last.cached_tokens,
        "cache_creation_input_tokens": 0,  # what the cache takes in is not counted here
        "cache_read_input_tokens": last.cached_tokens,
        "output_tokens": last.completion_tokens,
        "output_tokens_details": {"thinking_tokens": num_reasoning},
    }


def stop_fields(reason: FinishReason | None, has_calls: bool) -> dict[str, Any]:
    """`stop_reason` and `stop_sequence`, both None for an answer that was aborted."""
    if reason is None or reason.type not in ("stop", "length"):
        return {"stop_reason": None, "stop_sequence": None}
    if reason.type == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if has_calls:
        return {"stop_reason": "tool_use", "stop_sequence": None}
    if isinstance(reason.matched, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": reason.matched}
    return {"stop_reason": "end_turn", "stop_sequence": None}


class MessageWriter:
    """Takes an answer's parsed events in order; what they make is in `content` after `finish`.

    `shows_thinking` False: the text of thinking is left out, its block stays.
    """

    def __init__(self, new_call_id: Callable[[], str], shows_thinking: bool = True) -> None:
        self.content: list[dict[str, Any]] = []
        self.has_calls = False  # complete ones
        self._new_call_id = new_call_id
        self._shows_thinking = shows_thinking
        self._blocks = BlockReader()
        self._kind = BlockKind.TEXT  # of the block that is open
        self._block: dict[str, Any] = {}
        self._texts: list[str] = []

    def feed(self, events: Iterable[Event]) -> list[StreamEvent]:
        """What the events add to the stream."""
        return self._shown(self._blocks.feed(events))

    def finish(self, is_complete: bool) -> list[StreamEvent]:
        """Close what is open; a complete answer has a text, if an empty one, or a call."""
        return self._shown(self._blocks.finish(is_complete))

    def _shown(self, steps: Iterable[Step]) -> list[StreamEvent]:
        return [shown for step in steps for shown in self._show(step)]

    def _show(self, step: Step) -> list[StreamEvent]:
        index = len(self.content)
        if isinstance(step, BlockBegin):
            self._kind = step.kind
            self._block = self._empty_block(step)
            self._texts.clear()
            start = {"type": "content_block_start", "index": index}
            return [{**start, "content_block": self._block}]
        if isinstance(step, BlockText):
            if self._kind is BlockKind.REASONING and not self._shows_thinking:
                return []
            self._texts.append(step.text)
            kind, field = _DELTAS[self._kind]
            delta = {"type": kind, field: step.text}
            return [{"type": "content_block_delta", "index": index, "delta": delta}]
        self.content.append(self._whole_block(step.is_complete))
        return [{"type": "content_block_stop", "index": index}]

    def _empty_block(self, begin: BlockBegin) -> dict[str, Any]:
        if begin.kind is BlockKind.CALL:
            return {
                "type": "tool_use",
                "id": self._new_call_id(),
                "name": begin.name,
                "input": {},
            }
        if begin.kind is BlockKind.TEXT:
            return {"type": "text", "text": ""}
        return {"type": "thinking", "thinking": "", "signature": ""}

    def _whole_block(self, is_complete: bool) -> dict[str, Any]:
        text = "".join(self._texts)
        if self._kind is not BlockKind.CALL:
            return {**self._block, _DELTAS[self._kind][1]: text}
        if not is_complete:  # what there is of its input is no JSON
            return self._block
        self.has_calls = True
        return {**self._block, "input": orjson.Fragment(text)}
