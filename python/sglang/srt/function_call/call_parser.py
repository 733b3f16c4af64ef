"""Finds tool calls in an answer's text: what stands around them, and what to do when they break.

A `CallFormat` says how a family of models marks calls; one call is read by a `CallReader`. Text
that turns out to be no call is content, unchanged; white space between a call and its markers is
dropped. Called by parser/answer_parser.py and /parse_function_call.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

from sglang.srt.function_call.call_readers import CallReader
from sglang.srt.function_call.core_types import (
    PIECE_CHARS,
    WHITESPACE,
    CallBroken,
    Content,
    Event,
    HeldSpace,
    ToolSchemas,
    first_marker,
    held_length,
    merged,
)
from sglang.srt.function_call.json_scan import Step


@dataclass(frozen=True)
class CallFormat:
    """How calls are marked.

    A call, or a list of calls in brackets where `may_list`, follows an opener anywhere, or stands
    at the beginning of the text when it starts with one of the characters `bare`. `closers` may
    follow, and after one of `separators` another call. `make_reader` gives the reader of a call
    by its first character, None where no call starts so; its last argument says whether the call
    stands in a list. Where `another` ("": it never does) begins behind a call, one more begins
    with it, without an opener. `markers` are those of all these that are special tokens in
    vocabularies.
    """

    openers: tuple[str, ...]
    make_reader: Callable[[str, ToolSchemas, bool], CallReader | None]
    closers: tuple[str, ...] = ()
    bare: str = ""
    may_list: bool = False
    separators: str = ""
    another: str = ""
    markers: tuple[str, ...] = ()


class _State(enum.Enum):
    START = enum.auto()  # nothing but white space so far
    TEXT = enum.auto()
    EXPECT = enum.auto()  # a call has to start now
    CALL = enum.auto()
    AFTER = enum.auto()  # behind a call: more markers, another call, or text
    PLAIN = enum.auto()  # no more calls are looked for


class CallParser:
    """One answer's calls. `max_calls` bounds them; what would be more calls is content."""

    def __init__(
        self, form: CallFormat, tools: ToolSchemas, *, max_calls: int | None = None
    ) -> None:
        self._format = form
        self._tools = tools
        self._calls_left = max_calls
        self._state = _State.START
        self._buffer = ""
        self._space = HeldSpace()
        self._raw = ""  # of the call, as far as it was taken from the buffer
        self._in_list = False
        self._has_content = False
        self._reader: CallReader | None = None

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
            _State.START: self._at_start,
            _State.TEXT: self._in_text,
            _State.EXPECT: self._before_call,
            _State.CALL: self._in_call,
            _State.AFTER: self._after_call,
            _State.PLAIN: self._in_plain,
        }
        while self._buffer and steps[self._state](out):
            pass

    def finish(self) -> list[Event]:
        """See `TextParser`."""
        out: list[Event] = []
        self._buffer += self._space.released()
        if self._state is _State.AFTER:
            if self._buffer:  # half a marker
                self._end_calls(out)
        elif self._state in (_State.EXPECT, _State.CALL):
            self._give_up(out)
        self._say(self._buffer, out)
        self._buffer = ""
        return merged(out)

    # ---- one step each: False when more text is needed ----

    def _at_start(self, _: list[Event]) -> bool:
        stripped = self._buffer.lstrip(WHITESPACE)
        if not stripped:
            return False
        self._state = _State.TEXT
        if stripped[0] in self._format.bare:
            self._take(len(self._buffer) - len(stripped))
            self._state = _State.EXPECT
        return True

    def _in_text(self, out: list[Event]) -> bool:
        found = first_marker(self._buffer, self._format.openers)
        if found is None:
            keep = held_length(self._buffer, self._format.openers)
            certain = self._buffer[: len(self._buffer) - keep].rstrip(WHITESPACE)
            self._say(certain, out)
            self._buffer = self._buffer[len(certain) :]
            return False
        at, opener = found
        said = self._buffer[:at].rstrip(WHITESPACE)
        self._say(said, out)
        self._buffer = self._buffer[len(said) :]
        self._take(at - len(said) + len(opener))
        self._state = _State.EXPECT
        return True

    def _before_call(self, out: list[Event]) -> bool:
        if self._take_space():
            return True
        char = self._buffer[0]
        if char == "[" and self._format.may_list and not self._in_list:
            self._in_list = True
            self._take(1)
            return True
        self._reader = self._format.make_reader(char, self._tools, self._in_list)
        if self._reader is None:
            self._give_up(out)
        else:
            self._state = _State.CALL
        return True

    def _in_call(self, out: list[Event]) -> bool:
        reader = self._reader
        assert reader is not None  # set with the state
        count = 0
        while count < len(self._buffer):
            run = reader.take_run(self._buffer, count, out)
            if run:
                count += run
                continue
            step = reader.take(self._buffer[count], out)
            if step is Step.TAKEN:
                count += 1
                continue
            self._take(count + (step is Step.DONE))
            if step is Step.REFUSED:
                self._give_up(out)
            else:
                self._raw = ""
                self._reader = None
                self._state = _State.AFTER
                if self._calls_left is not None:
                    self._calls_left -= 1
            return True
        self._take(len(self._buffer))
        return False

    def _after_call(self, out: list[Event]) -> bool:
        """`_raw` holds the white space since the call or its last marker."""
        if self._take_space():
            return True
        form, buffer = self._format, self._buffer
        char = buffer[0]
        may_call = self._calls_left is None or self._calls_left > 0
        if self._in_list and char == "]":
            self._in_list = False
            self._drop(1)
            return True
        for closer in form.closers:
            if buffer.startswith(closer):
                self._drop(len(closer))
                return True
        if may_call and char in ("," if self._in_list else form.separators):
            self._take(1)
            self._state = _State.EXPECT
            return True
        openers = form.openers if may_call else ()
        for opener in openers:
            if buffer.startswith(opener):
                self._in_list = False
                self._take(len(opener))
                self._state = _State.EXPECT
                return True
        another = (form.another,) if may_call and form.another else ()
        if another and buffer.startswith(another):
            self._state = _State.EXPECT
            return True
        if any(marker.startswith(buffer) for marker in (*form.closers, *openers, *another)):
            return False
        if may_call and form.separators and char in form.bare:
            self._state = _State.EXPECT
            return True
        self._end_calls(out)
        if not may_call:
            self._state = _State.PLAIN
        return True

    def _in_plain(self, out: list[Event]) -> bool:
        self._say(self._buffer, out)
        self._buffer = ""
        return False

    # ---- helpers ----

    def _take(self, count: int) -> None:
        """Move characters from the buffer to the call's raw text."""
        self._raw += self._buffer[:count]
        self._buffer = self._buffer[count:]

    def _take_space(self) -> bool:
        """Move the white space at the beginning of the buffer; False: there is none."""
        count = len(self._buffer) - len(self._buffer.lstrip(WHITESPACE))
        self._take(count)
        return count > 0

    def _drop(self, count: int) -> None:
        self._raw = ""
        self._buffer = self._buffer[count:]

    def _say(self, text: str, out: list[Event]) -> None:
        if text:
            self._has_content = True
            out.append(Content(text))

    def _give_up(self, out: list[Event]) -> None:
        """What was taken for a call is none; go on as text."""
        if self._reader is not None and self._reader.has_begun:
            self._has_content = True
            out.append(CallBroken(self._raw))
        else:
            self._say(self._raw, out)
        self._raw = ""
        self._reader = None
        self._in_list = False
        self._state = _State.TEXT

    def _end_calls(self, out: list[Event]) -> None:
        """Text follows the calls; white space before it counts when text came before, too."""
        if self._has_content:
            self._say(self._raw, out)
        self._raw = ""
        self._in_list = False
        self._state = _State.TEXT
