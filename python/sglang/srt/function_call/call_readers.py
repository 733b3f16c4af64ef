"""One call, read character by character, in the formats that carry JSON.

`JsonCallReader`: {"name": "f", "arguments": {...}}. `NamedCallReader`: f[ARGS]{...}. Used by
call_parser.py, which knows what stands around calls.
"""

from __future__ import annotations

import enum
import json
from typing import Protocol

from sglang.srt.function_call.core_types import (
    WHITESPACE,
    CallArguments,
    CallEnd,
    CallStart,
    Event,
    ToolSchemas,
)
from sglang.srt.function_call.json_scan import ArgumentsReader, JsonScanner, Step, sendable

_MOST_HEAD = 1024  # characters of name, id and white space
_ARGUMENT_KEYS = ("arguments", "parameters")
NAME_CHARS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")


class CallReader(Protocol):
    """Reads one call. `has_begun` once its `CallStart` is out, which can't be taken back."""

    has_begun: bool

    def take_run(self, text: str, at: int, out: list[Event]) -> int:
        """Take what at once can be taken of `text` from `at` on: so many characters, often 0.

        Only for speed: taken one by one, they give the same.
        """
        ...

    def take(self, char: str, out: list[Event]) -> Step:
        """Take the next character and add what is certain to `out`; DONE comes with `CallEnd`."""
        ...


class _Part(enum.Enum):
    OPEN = enum.auto()
    FIRST_KEY = enum.auto()
    KEY = enum.auto()
    COLON = enum.auto()
    VALUE_START = enum.auto()
    VALUE = enum.auto()
    ARGUMENTS = enum.auto()
    AFTER = enum.auto()


class JsonCallReader:
    """{"name": ..., "arguments": {...}} with the keys in any order; others are passed over.

    "parameters" is another word for "arguments", whose value may also be null or the object's
    text in a string. Only names in `tools` are calls.
    """

    def __init__(self, tools: ToolSchemas) -> None:
        self.has_begun = False
        self._tools = tools
        self._part = _Part.OPEN
        self._scanner = JsonScanner()
        self._text: list[str] = []
        self._key = ""
        self._name: str | None = None
        self._has_arguments = False
        self._early: list[Event] = []  # arguments that came before the name
        self._arguments = ArgumentsReader()

    def take_run(self, text: str, at: int, out: list[Event]) -> int:
        """See `CallReader`."""
        if self._part is not _Part.ARGUMENTS:
            return 0
        return self._arguments.take_run(text, at, out if self.has_begun else self._early)

    def take(self, char: str, out: list[Event]) -> Step:
        """See `CallReader`."""
        part = self._part
        if part is _Part.ARGUMENTS:
            return self._take_arguments(char, out)
        if part in (_Part.FIRST_KEY, _Part.KEY, _Part.VALUE) and (self._text or char == '"'):
            return self._take_scanned(char, out)
        if part is _Part.VALUE:
            return self._take_scanned(char, out)
        if char in WHITESPACE and part is not _Part.OPEN:
            return Step.TAKEN
        if part is _Part.VALUE_START:
            return self._start_value(char, out)
        if char == "}" and part in (_Part.FIRST_KEY, _Part.AFTER):
            return self._close(out)
        expected = {_Part.OPEN: "{", _Part.COLON: ":", _Part.AFTER: ","}.get(part)
        if char != expected:
            return Step.REFUSED
        after = {_Part.OPEN: _Part.FIRST_KEY, _Part.COLON: _Part.VALUE_START}
        self._part = after.get(part, _Part.KEY)
        return Step.TAKEN

    def _take_scanned(self, char: str, out: list[Event]) -> Step:
        """A key, or a value that is wanted as a whole."""
        taken = self._scanner.take(char)
        if taken:
            self._text.append(char)
        elif not self._scanner.done:
            return Step.REFUSED
        if not self._scanner.done:
            return Step.TAKEN
        text = "".join(self._text)
        self._scanner, self._text = JsonScanner(), []
        if self._part is not _Part.VALUE:
            self._key = json.loads(text)
            self._part = _Part.COLON
            return Step.TAKEN
        self._part = _Part.AFTER
        if not self._note_value(text, out):
            return Step.REFUSED
        return Step.TAKEN if taken else self.take(char, out)

    def _start_value(self, char: str, out: list[Event]) -> Step:
        if self._key not in _ARGUMENT_KEYS:
            self._part = _Part.VALUE
            return self._take_scanned(char, out)
        if self._has_arguments:
            return Step.REFUSED
        self._has_arguments = True
        if char != "{":
            self._part = _Part.VALUE
            return self._take_scanned(char, out)
        self._part = _Part.ARGUMENTS
        if self._name is not None:
            self._begin(self._name, out)
        return self._take_arguments(char, out)

    def _take_arguments(self, char: str, out: list[Event]) -> Step:
        step = self._arguments.take(char, out if self.has_begun else self._early)
        if step is Step.DONE:
            self._part = _Part.AFTER
            return Step.TAKEN
        return step

    def _note_value(self, text: str, out: list[Event]) -> bool:
        """Take in a whole value; False when the call can't have it."""
        if self._key == "name":
            name = json.loads(text) if text.startswith('"') else None
            if self._name is not None or name is None or name not in self._tools:
                return False
            self._name = name
            if self._has_arguments:
                self._begin(name, out)
        elif self._key in _ARGUMENT_KEYS:
            arguments = _written_arguments(text)
            if arguments is None:
                return False
            self._early.append(CallArguments(arguments))
            if self._name is not None:
                self._begin(self._name, out)
        return True

    def _begin(self, name: str, out: list[Event]) -> None:
        self.has_begun = True
        out.append(CallStart(name))
        out.extend(self._early)

    def _close(self, out: list[Event]) -> Step:
        if self._name is None:
            return Step.REFUSED
        if not self._has_arguments:
            self._begin(self._name, out)
            out.append(CallArguments("{}"))
        out.append(CallEnd())
        return Step.DONE


def _written_arguments(text: str) -> str | None:
    """Arguments whose value is no object: null is none of them, a string may hold the object."""
    if text == "null":
        return "{}"
    if not text.startswith('"'):
        return None
    out: list[Event] = []
    reader = ArgumentsReader()
    value = json.loads(text).strip(WHITESPACE)
    steps = [reader.take(char, out) for char in value]
    if not value.startswith("{") or Step.REFUSED in steps or Step.DONE not in steps:
        return None
    return sendable("".join(event.text for event in out if isinstance(event, CallArguments)))


class NamedCallReader:
    """name[ARGS]{...}, where [CALL_ID]id may stand before [ARGS] and both may be missing.

    The format of Mistral's tokenizers from version 11 on.
    """

    def __init__(self, tools: ToolSchemas) -> None:
        self.has_begun = False
        self._tools = tools
        self._head = ""
        self._arguments: ArgumentsReader | None = None

    def take_run(self, text: str, at: int, out: list[Event]) -> int:
        """See `CallReader`."""
        return 0 if self._arguments is None else self._arguments.take_run(text, at, out)

    def take(self, char: str, out: list[Event]) -> Step:
        """See `CallReader`."""
        if self._arguments is None:
            if char != "{":
                return self._take_head(char)
            name = self._name()
            if name is None:
                return Step.REFUSED
            self.has_begun = True
            self._arguments = ArgumentsReader()
            out.append(CallStart(name))
        step = self._arguments.take(char, out)
        if step is Step.DONE:
            out.append(CallEnd())
        return step

    def _take_head(self, char: str) -> Step:
        if char not in NAME_CHARS and char not in "[] \t\n\r":
            return Step.REFUSED
        if len(self._head) == _MOST_HEAD:
            return Step.REFUSED
        self._head += char
        name = self._head.partition("[")[0].strip()
        if not any(tool.startswith(name) for tool in self._tools):
            return Step.REFUSED
        return Step.TAKEN

    def _name(self) -> str | None:
        head = self._head.strip().removesuffix("[ARGS]")
        name, mark, call_id = head.partition("[CALL_ID]")
        name = name.strip()
        fits = not mark or "[" not in call_id
        return name if fits and name in self._tools else None
