"""Arguments that stand between two tags: a text as it is, anything else as JSON.

Which it is only the tool's schema says. Texts go out while they come, other values at their end.
`TaggedCallReader` is what the readers of calls that are written in tags have in common.
"""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from sglang.srt.function_call.core_types import (
    CallArguments,
    CallEnd,
    CallStart,
    Event,
    ToolSchemas,
    held_length,
)
from sglang.srt.function_call.json_scan import Step, sendable

_PLAIN = re.compile(r"[^<\n]+")  # what can't begin the end of a value
_WORDS = {"True": True, "False": False, "None": None}


class TagValue:
    """One value up to its end tag, of the JSON `types` that it may have (none: any).

    `strips_breaks`: a line break on either side of the value belongs to the tags.
    """

    def __init__(self, types: frozenset[str], end: str, *, strips_breaks: bool) -> None:
        self._types = types
        self._end = end
        self._strips = strips_breaks
        self._may_hold = (end, "\n" + end) if strips_breaks else (end,)
        self._streams = types <= {"string"}
        self._is_first = True
        self._held = ""
        self._text: list[str] = []

    def take_run(self, text: str, at: int, out: list[Event]) -> int:
        """See `CallReader`."""
        run = None if self._held or self._is_first else _PLAIN.match(text, at)
        if run is None:
            return 0
        self._pass_on(run[0], out)
        return len(run[0])

    def take(self, char: str, out: list[Event]) -> bool:
        """Take the next character; True when it ends the value."""
        if self._is_first:
            self._is_first = False
            if self._streams:
                out.append(CallArguments('"'))
            if char == "\n" and self._strips:
                return False
        self._held += char
        if self._held.endswith(self._end):
            last = self._held.removesuffix(self._end)
            self._pass_on(last.removesuffix("\n") if self._strips else last, out)
            whole = "".join(self._text)
            out.append(CallArguments('"' if self._streams else _converted(whole, self._types)))
            return True
        keep = held_length(self._held, self._may_hold)
        certain = len(self._held) - keep
        self._pass_on(self._held[:certain], out)
        self._held = self._held[certain:]
        return False

    def _pass_on(self, text: str, out: list[Event]) -> None:
        if self._streams:
            out.append(CallArguments(json.dumps(text, ensure_ascii=False)[1:-1]))
        else:
            self._text.append(text)


def types_of(schema: Mapping[str, Any], key: str) -> frozenset[str]:
    """The JSON types that the schema names for the argument; none for one it does not know."""
    properties = schema.get("properties")
    one = properties.get(key) if isinstance(properties, dict) else None
    return frozenset(_named_types(one))


def _named_types(schema: Any) -> Iterator[str]:
    if not isinstance(schema, dict):
        return
    kind = schema.get("type")
    yield from [kind] if isinstance(kind, str) else kind if isinstance(kind, list) else ()
    for word in ("anyOf", "oneOf"):
        options = schema.get(word)
        for option in options if isinstance(options, list) else ():
            yield from _named_types(option)


def _converted(text: str, types: frozenset[str]) -> str:
    """The value's JSON; what is not of a type that it may have is a text."""
    try:
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
        written = json.dumps(value, ensure_ascii=False)
    except (ValueError, RecursionError):
        value = _WORDS.get(text.strip(), text)
        written = json.dumps(value, ensure_ascii=False)
    if "string" in types and not (value is None and "null" in types):
        written = json.dumps(text, ensure_ascii=False)
    return sendable(written)


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits} is too large")
    return number


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


class TaggedCallReader(ABC):
    """One call with a tag for each argument, of which the formats differ in the tags alone."""

    def __init__(self, tools: ToolSchemas) -> None:
        self.has_begun = False
        self._tools = tools
        self._tag = ""
        self._schema: Mapping[str, Any] = {}
        self._value: TagValue | None = None
        self._keys: set[str] = set()

    def take_run(self, text: str, at: int, out: list[Event]) -> int:
        """See `CallReader`."""
        return 0 if self._value is None else self._value.take_run(text, at, out)

    def take(self, char: str, out: list[Event]) -> Step:
        """See `CallReader`."""
        if self._value is None:
            return self._take_outside(char, out)
        if self._value.take(char, out):
            self._value = None
        return Step.TAKEN

    @abstractmethod
    def _take_outside(self, char: str, out: list[Event]) -> Step:
        """A character that is no part of a value."""

    def _begin(self, name: str, out: list[Event]) -> bool:
        """The call is of this function; False: there is none of that name."""
        if name not in self._tools:
            return False
        self.has_begun = True
        self._schema = self._tools[name]
        out.append(CallStart(name))
        return True

    def _begin_argument(self, key: str, out: list[Event]) -> bool:
        """A value of this key follows; False: it had one."""
        if key in self._keys:
            return False
        out.append(CallArguments(("{" if not self._keys else ", ") + json.dumps(key) + ": "))
        self._keys.add(key)
        return True

    def _end(self, out: list[Event]) -> Step:
        out += [CallArguments("}" if self._keys else "{}"), CallEnd()]
        return Step.DONE
