"""gpt-oss's answers: messages in channels, as OpenAI's harmony format describes them.

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>commentary
    to=functions.get_weather <|constrain|>json<|message|>{...}<|call|>

analysis is reasoning, a message to a function is a call, everything else is content. The prompt
ends with <|start|>assistant, so an answer begins inside a header. openai-harmony would do this
from tokens, but gets its vocabulary from the network. Format: the "OpenAI harmony response format"
guide.
"""

from __future__ import annotations

import enum
import re

from sglang.srt.function_call.core_types import (
    PIECE_CHARS,
    WHITESPACE,
    CallBroken,
    CallEnd,
    CallStart,
    Content,
    Event,
    HeldSpace,
    Reasoning,
    ToolSchemas,
    first_marker,
    held_length,
    merged,
)
from sglang.srt.function_call.json_scan import ArgumentsReader, Step

_START, _CHANNEL, _MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_CONSTRAIN, _END, _CALL, _RETURN = "<|constrain|>", "<|end|>", "<|call|>", "<|return|>"
HARMONY_MARKERS = (_START, _CHANNEL, _MESSAGE, _CONSTRAIN, _END, _CALL, _RETURN)
_BODY_ENDS = (_START, _CHANNEL, _END, _CALL, _RETURN)
_MOST_HEADER = 1024  # characters; what goes on for longer is content
_CHANNEL_NAME = re.compile(re.escape(_CHANNEL) + r"\s*([A-Za-z_]+)")
_RECIPIENT = re.compile(r"(?:^|[\s>])to=([^\s<]+)")
_FUNCTIONS = "functions."


class _State(enum.Enum):
    FIRST = enum.auto()  # the very beginning, where a header is only likely
    HEADER = enum.auto()
    BODY = enum.auto()
    BETWEEN = enum.auto()


class _Kind(enum.Enum):
    REASONING = enum.auto()
    CONTENT = enum.auto()
    CALL = enum.auto()


class HarmonyParser:
    """One answer. Only functions in `tools` can be called, `max_calls` of them (None: any number).

    Messages of one kind are parted by a line break. Text that is no message is content.
    """

    def __init__(self, tools: ToolSchemas, *, max_calls: int | None = None) -> None:
        self._tools = tools
        self._calls_left = max_calls
        self._state = _State.FIRST
        self._kind = _Kind.CONTENT
        self._buffer = ""
        self._space = HeldSpace()
        self._raw = ""  # of a message that may be a call
        self._arguments: ArgumentsReader | None = None  # of the call whose body this is
        self._name = ""
        self._has_begun = False
        self._said: set[_Kind] = set()
        self._needs_break = False

    @property
    def is_reasoning(self) -> bool:
        """True while what comes is reasoning."""
        return self._state is _State.BODY and self._kind is _Kind.REASONING

    @property
    def is_open(self) -> bool:
        """True while what came may be the beginning of reasoning or not: headers are neither."""
        return False

    def feed(self, text: str) -> list[Event]:
        """See `TextParser`."""
        if self._space.takes(self._buffer, text):
            return []
        self._buffer += self._space.released()
        out: list[Event] = []
        for at in range(0, len(text), PIECE_CHARS):
            self._buffer += text[at : at + PIECE_CHARS]
            self._read(out)
        return merged(out)

    def _read(self, out: list[Event]) -> None:
        steps = {
            _State.FIRST: self._at_first,
            _State.HEADER: self._in_header,
            _State.BODY: self._in_body,
            _State.BETWEEN: self._between,
        }
        while self._buffer and steps[self._state](out):
            pass

    def finish(self) -> list[Event]:
        """See `TextParser`."""
        out: list[Event] = []
        text, self._buffer = self._buffer + self._space.released(), ""
        if self._state is _State.BODY:
            self._add(text, out)
            self._end_body(out)
        elif text.strip(WHITESPACE) or self._state is _State.FIRST:
            self._begin(_Kind.CONTENT)
            self._add(text, out)
        return merged(out)

    # ---- one step each: False when more text is needed ----

    def _at_first(self, _: list[Event]) -> bool:
        begun = self._buffer.lstrip(WHITESPACE)
        starts = (_CHANNEL, _START, _MESSAGE, "to=")
        if any(begun.startswith(start) for start in starts):
            self._state = _State.HEADER
        elif any(start.startswith(begun) for start in starts):
            return False
        else:
            self._begin(_Kind.CONTENT)
        return True

    def _in_header(self, out: list[Event]) -> bool:
        at = self._buffer.find(_MESSAGE)
        if not 0 <= at <= _MOST_HEADER:
            if len(self._buffer) < _MOST_HEADER + len(_MESSAGE):
                return False
            text, self._buffer = self._buffer[:_MOST_HEADER], self._buffer[_MOST_HEADER:]
            self._begin(_Kind.CONTENT)
            self._add(text, out)
            return True
        header = self._buffer[:at]
        self._raw = header + _MESSAGE
        self._buffer = self._buffer[len(self._raw) :]
        recipient = _RECIPIENT.search(header)
        channel = _CHANNEL_NAME.search(header)
        if recipient is not None:
            self._begin_call(recipient[1], out)
        elif channel is not None and channel[1] == "analysis":
            self._begin(_Kind.REASONING)
        else:
            self._begin(_Kind.CONTENT)
        return True

    def _in_body(self, out: list[Event]) -> bool:
        found = first_marker(self._buffer, _BODY_ENDS)
        if found is None:
            certain = len(self._buffer) - held_length(self._buffer, _BODY_ENDS)
            text, self._buffer = self._buffer[:certain], self._buffer[certain:]
            self._add(text, out)
            return False
        at, marker = found
        text, self._buffer = self._buffer[:at], self._buffer[at:]
        self._add(text, out)
        self._end_body(out)
        self._state = _State.HEADER if marker in (_START, _CHANNEL) else _State.BETWEEN
        if self._state is _State.BETWEEN:
            self._buffer = self._buffer[len(marker) :]
        return True

    def _between(self, _: list[Event]) -> bool:
        begun = self._buffer.lstrip(WHITESPACE)
        if not begun:
            return False
        starts = (_START, _CHANNEL)
        if any(begun.startswith(start) for start in starts):
            self._buffer = begun
            self._state = _State.HEADER
        elif any(start.startswith(begun) for start in starts):
            return False
        else:
            self._begin(_Kind.CONTENT)
        return True

    # ---- messages ----

    def _begin(self, kind: _Kind) -> None:
        self._state = _State.BODY
        self._kind = kind
        self._needs_break = kind in self._said

    def _begin_call(self, recipient: str, out: list[Event]) -> None:
        name = recipient.removeprefix(_FUNCTIONS)
        has_room = self._calls_left is None or self._calls_left > 0
        if recipient.startswith(_FUNCTIONS) and name in self._tools and has_room:
            self._state = _State.BODY
            self._kind = _Kind.CALL
            self._name = name
            self._has_begun = False
            self._arguments = ArgumentsReader()
            return
        self._begin(_Kind.CONTENT)
        self._add(self._raw, out)

    def _add(self, text: str, out: list[Event]) -> None:
        """More of the message's body."""
        if self._kind is _Kind.CALL:
            text = self._add_to_call(text, out)
        if not text:
            return
        self._said.add(self._kind)
        if self._needs_break:
            text = "\n" + text
            self._needs_break = False
        out.append(Reasoning(text) if self._kind is _Kind.REASONING else Content(text))

    def _add_to_call(self, text: str, out: list[Event]) -> str:
        """Read arguments; what is left once the message is no call (any more)."""
        at = 0
        while at < len(text):
            run = 0 if self._arguments is None else self._arguments.take_run(text, at, out)
            char = text[at]
            if run or ((self._arguments is None or not self._has_begun) and char in WHITESPACE):
                self._raw += text[at : at + (run or 1)]
                at += run or 1
                continue
            if self._arguments is None:
                return self._leave_call(text[at:])
            if char == "{" and not self._has_begun:
                self._has_begun = True
                out.append(CallStart(self._name))
            step = Step.REFUSED if not self._has_begun else self._arguments.take(char, out)
            if step is Step.REFUSED:
                return self._give_up(out) + text[at:]
            self._raw += char
            at += 1
            if step is Step.DONE:
                out.append(CallEnd())
                self._arguments = None
                self._raw = ""
                if self._calls_left is not None:
                    self._calls_left -= 1
        return ""

    def _give_up(self, out: list[Event]) -> str:
        """The message is no call: what has to be shown instead."""
        raw, self._raw = self._raw, ""
        self._arguments = None
        if self._has_begun:
            out.append(CallBroken(raw))
            raw = ""
        return self._leave_call(raw)

    def _leave_call(self, text: str) -> str:
        self._begin(_Kind.CONTENT)
        return text

    def _end_body(self, out: list[Event]) -> None:
        if self._kind is _Kind.CALL and self._arguments is not None:
            text = self._give_up(out)
            self._add(text, out)
