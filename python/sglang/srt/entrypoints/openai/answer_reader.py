"""A chat's answer, read for the doors that show it in parts: parsed, counted, cut into blocks.

The Responses, Messages and Ollama doors run a chat request and tell its answer in words of their
own. What they share is here, and knows no API's format; `ChatServing` has its own choices.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Union

from sglang.srt.entrypoints.openai.serving_base import last_of
from sglang.srt.entrypoints.openai.serving_chat import ChatCall, ChatServing
from sglang.srt.entrypoints.request_body import off_loop
from sglang.srt.entrypoints.sequences import SequenceOutput
from sglang.srt.function_call.core_types import (
    CallArguments,
    CallBroken,
    CallEnd,
    CallStart,
    Content,
    Event,
    Reasoning,
    TextParser,
    merged,
)
from sglang.srt.managers.generate_request import GenerateDelta
from sglang.srt.parser.answer_parser import PARSE_BYTES_PER_CHAR, AnswerForm, ReasoningCount


@dataclass(frozen=True)
class WholeAnswer:
    """A complete answer: its parsed events, what it was read from, and its reasoning tokens."""

    events: list[Event]
    output: SequenceOutput
    last: GenerateDelta
    num_reasoning: int


async def whole_answer(serving: ChatServing, chat: ChatCall) -> WholeAnswer:
    """Run a request for one answer to its end. Raises RequestError."""
    (output,) = await serving.runner.collect(chat.call)
    size = PARSE_BYTES_PER_CHAR * len(output.text)
    return await off_loop(size, read_whole, chat.form, output, serving.token_text)


def read_whole(
    form: AnswerForm, output: SequenceOutput, text_of: Callable[[int], str]
) -> WholeAnswer:
    """Parse an answer that has ended; RequestError 500 where none came."""
    last = last_of(output)
    events = settled(_parsed(form.make_parser(), output.text, is_last=True))
    num_reasoning = ReasoningCount(form, text_of).add(output.output_ids)
    return WholeAnswer(events, output, last, num_reasoning)


def settled(events: Iterable[Event]) -> list[Event]:
    """The events of a whole answer, with what was read of calls that are none as content."""
    result: list[Event] = []
    begin = 0
    for event in events:
        if isinstance(event, CallStart):
            begin = len(result)
        if isinstance(event, CallBroken):
            result[begin:] = [Content(event.raw)]
        else:
            result.append(event)
    return merged(result)


def _parsed(parser: TextParser | None, text: str, is_last: bool) -> list[Event]:
    if parser is None:
        return [Content(text)] if text else []
    return [*parser.feed(text), *(parser.finish() if is_last else ())]


class AnswerReader:
    """An answer of a stream, as far as it has come.

    `last` is the newest delta (None: none came), `num_reasoning` the reasoning tokens so far.
    """

    def __init__(self, form: AnswerForm, text_of: Callable[[int], str]) -> None:
        self.last: GenerateDelta | None = None
        self.num_reasoning = 0
        self._parser = form.make_parser()
        self._count = ReasoningCount(form, text_of)

    def take(self, delta: GenerateDelta) -> list[Event]:
        """The events of one more delta, which tells of no progress."""
        self.last = delta
        self.num_reasoning = self._count.add(delta.output_ids)
        return _parsed(self._parser, delta.text, delta.finish_reason is not None)


class BlockKind(enum.Enum):
    """What one part of an answer is."""

    REASONING = "reasoning"
    TEXT = "text"
    CALL = "call"


@dataclass(frozen=True)
class BlockBegin:
    """A part begins; `name` is a call's function."""

    kind: BlockKind
    name: str = ""


@dataclass(frozen=True)
class BlockText:
    """More of the part that has begun, never empty; a call's text is that of its arguments."""

    text: str


@dataclass(frozen=True)
class BlockEnd:
    """The part that has begun ends; not `is_complete`: it was cut off, or was no call."""

    is_complete: bool


Step = Union[BlockBegin, BlockText, BlockEnd]


class BlockReader:
    """Cuts an answer's events, fed in order, into parts, of which one at a time is open.

    White space is no part of its own: it waits for text, and is dropped before calls.
    """

    def __init__(self) -> None:
        self._open: BlockKind | None = None
        self._says = False  # there is a part besides reasoning
        self._space: list[str] = []

    def feed(self, events: Iterable[Event]) -> list[Step]:
        """What the events add."""
        return [step for event in events for step in self._take(event)]

    def finish(self, is_complete: bool) -> list[Step]:
        """Close what is open; a complete answer has a text, if an empty one, or a call."""
        steps: list[Step] = []
        if not self._says and (self._space or is_complete):
            steps += [*self._begin(BlockKind.TEXT), *_text("".join(self._space))]
        return [*steps, *self._close(is_complete)]

    def _take(self, event: Event) -> list[Step]:
        if isinstance(event, CallStart):
            self._space.clear()
            return self._begin(BlockKind.CALL, event.name)
        if isinstance(event, CallArguments):
            return _text(event.text)
        if isinstance(event, CallEnd):
            return self._close(is_complete=True)
        if isinstance(event, CallBroken):  # what was sent can't be taken back
            return self._close(is_complete=False)
        if isinstance(event, Reasoning):
            return [*self._in(BlockKind.REASONING), *_text(event.text)]
        if self._open is not BlockKind.TEXT and not event.text.strip():
            self._space.append(event.text)
            return []
        text = "".join([*self._space, event.text])
        self._space.clear()
        return [*self._in(BlockKind.TEXT), *_text(text)]

    def _in(self, kind: BlockKind) -> list[Step]:
        return [] if self._open is kind else self._begin(kind)

    def _begin(self, kind: BlockKind, name: str = "") -> list[Step]:
        steps = self._close(is_complete=True)
        self._open = kind
        self._says = self._says or kind is not BlockKind.REASONING
        return [*steps, BlockBegin(kind, name)]

    def _close(self, is_complete: bool) -> list[Step]:
        if self._open is None:
            return []
        self._open = None
        return [BlockEnd(is_complete)]


def _text(text: str) -> list[Step]:
    return [BlockText(text)] if text else []
