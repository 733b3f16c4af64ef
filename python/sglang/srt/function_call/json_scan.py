"""JSON read character by character: is it still JSON, and where does a value end?

A tool call's arguments go out while they are generated, so they are checked as they come: what
was sent is always the beginning of valid JSON. Grammar: RFC 8259.
"""

from __future__ import annotations

import enum
import json
import re

from sglang.srt.function_call.core_types import CallArguments, Event

_WHITESPACE = " \t\n\r"
_SCALAR_CHARS = frozenset("0123456789+-.eEtrufalsn")
_SCALAR = re.compile(r"true|false|null|-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_ESCAPES = frozenset('"\\/bfnrt')
_HEX = frozenset("0123456789abcdefABCDEF")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')  # what means nothing inside a string
_SURROGATE = re.compile("[\ud800-\udfff]")
_MOST_DEPTH = 256  # what Python's own reader takes without a deep stack


def sendable(text: str) -> str:
    """JSON text as UTF-8 can carry it: half of a surrogate pair in a string as its escape."""
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class _State(enum.Enum):
    VALUE = enum.auto()
    FIRST_ITEM = enum.auto()
    FIRST_KEY = enum.auto()
    KEY = enum.auto()
    COLON = enum.auto()
    AFTER = enum.auto()
    STRING = enum.auto()
    ESCAPE = enum.auto()
    HEX = enum.auto()
    SCALAR = enum.auto()
    DONE = enum.auto()


class JsonScanner:
    """One JSON value. `done` once it is complete."""

    def __init__(self) -> None:
        self._state = _State.VALUE
        self._stack: list[str] = []
        self._is_key = False
        self._num_hex = 0
        self._scalar = ""

    @property
    def done(self) -> bool:
        """True when the value is complete."""
        return self._state is _State.DONE

    @property
    def in_string(self) -> bool:
        """True inside a string, where a line break is no white space."""
        return self._state is _State.STRING

    def take(self, char: str) -> bool:
        """Take the next character.

        False: it is not part of the value. Then the value is either `done`, a number or a word
        that ended before it, or it is not JSON.
        """
        state = self._state
        if state is _State.STRING:
            return self._take_in_string(char)
        if state is _State.SCALAR:
            if char in _SCALAR_CHARS:
                self._scalar += char
                return True
            if _SCALAR.fullmatch(self._scalar) is None:
                return False
            self._value_ended()
            return not self.done and self.take(char)
        if state is _State.ESCAPE:
            self._state = _State.HEX if char == "u" else _State.STRING
            self._num_hex = 0
            return char == "u" or char in _ESCAPES
        if state is _State.HEX:
            self._num_hex += 1
            if self._num_hex == 4:
                self._state = _State.STRING
            return char in _HEX
        if state is _State.DONE:
            return False
        return char in _WHITESPACE or self._take_structure(char)

    def _take_in_string(self, char: str) -> bool:
        if char == "\\":
            self._state = _State.ESCAPE
        elif char == '"':
            if self._is_key:
                self._is_key = False
                self._state = _State.COLON
            else:
                self._value_ended()
        return char >= " "

    def _take_structure(self, char: str) -> bool:
        state = self._state
        if state in (_State.VALUE, _State.FIRST_ITEM):
            if char == "]" and state is _State.FIRST_ITEM:
                return self._close(char)
            return self._open(char)
        if state is _State.COLON:
            self._state = _State.VALUE
            return char == ":"
        if state in (_State.KEY, _State.FIRST_KEY):
            if char == "}" and state is _State.FIRST_KEY:
                return self._close(char)
            self._is_key = True
            self._state = _State.STRING
            return char == '"'
        if char == ",":
            self._state = _State.KEY if self._stack[-1] == "}" else _State.VALUE
            return True
        return self._close(char)

    def _open(self, char: str) -> bool:
        if char == "{":
            self._stack.append("}")
            self._state = _State.FIRST_KEY
        elif char == "[":
            self._stack.append("]")
            self._state = _State.FIRST_ITEM
        elif char == '"':
            self._state = _State.STRING
        elif char in _SCALAR_CHARS:
            self._scalar = char
            self._state = _State.SCALAR
        else:
            return False
        return len(self._stack) <= _MOST_DEPTH

    def _close(self, char: str) -> bool:
        if char != self._stack[-1]:
            return False
        self._stack.pop()
        self._value_ended()
        return True

    def _value_ended(self) -> None:
        self._state = _State.AFTER if self._stack else _State.DONE


class Step(enum.Enum):
    """What became of a character: taken; taken and the last one; not a part of this."""

    TAKEN = enum.auto()
    DONE = enum.auto()
    REFUSED = enum.auto()


class ArgumentsReader:
    """The JSON object of a call's arguments, passed on as it comes.

    A control character inside a string (models write line breaks there) goes out escaped.
    """

    def __init__(self) -> None:
        self._scanner = JsonScanner()

    def take_run(self, text: str, at: int, out: list[Event]) -> int:
        """Take what at once can be taken of `text` from `at` on: so many characters, often 0."""
        run = _PLAIN.match(text, at) if self._scanner.in_string else None
        if run is None:
            return 0
        out.append(CallArguments(run[0]))
        return len(run[0])

    def take(self, char: str, out: list[Event]) -> Step:
        """Take the next character; the first has to be `{`. Nothing comes after REFUSED."""
        if char < " " and self._scanner.in_string:
            out.append(CallArguments(json.dumps(char)[1:-1]))
            return Step.TAKEN
        if not self._scanner.take(char):
            return Step.REFUSED
        out.append(CallArguments(char))
        return Step.DONE if self._scanner.done else Step.TAKEN
