"""Calls as Qwen3-Coder's chat template writes them.

    <function=get_weather>
    <parameter=city>
    Paris
    </parameter>
    </function>

A text argument stands there as it is, any other as JSON, and which it is only the tool's schema
says. One line break on either side of a value belongs to the format.
"""

from __future__ import annotations

import json
import math
import re
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

_FUNCTION = "<function="
_PARAMETER = "<parameter="
_END_PARAMETER = "</parameter>"
_END_FUNCTION = "</function>"
_MOST_TAG = 1024  # characters
_PLAIN = re.compile(r"[^<\n]+")  # what can't begin the end of a value
_WORDS = {"True": True, "False": False, "None": None}


class XmlCallReader:
    """One <function=...> element; texts go out while they come, other values at their end."""

    def __init__(self, tools: ToolSchemas) -> None:
        self.has_begun = False
        self._tools = tools
        self._tag = ""
        self._schema: Mapping[str, Any] = {}
        self._value: _Value | None = None
        self._keys: set[str] = set()

    def take_run(self, text: str, at: int, out: list[Event]) -> int:
        """See `CallReader`."""
        return 0 if self._value is None else self._value.take_run(text, at, out)

    def take(self, char: str, out: list[Event]) -> Step:
        """See `CallReader`."""
        if self._value is not None:
            if self._value.take(char, out):
                self._value = None
            return Step.TAKEN
        if not self._tag and self.has_begun and char in " \t\r\n":
            return Step.TAKEN
        if len(self._tag) == _MOST_TAG:
            return Step.REFUSED
        self._tag += char
        if not self.has_begun:
            return self._take_name(out)
        if self._tag == _END_FUNCTION:
            out += [CallArguments("}" if self._keys else "{}"), CallEnd()]
            return Step.DONE
        if _END_FUNCTION.startswith(self._tag) or _PARAMETER.startswith(self._tag):
            return Step.TAKEN
        return self._take_key(out)

    def _take_name(self, out: list[Event]) -> Step:
        if _FUNCTION.startswith(self._tag):
            return Step.TAKEN
        name = self._tag.removeprefix(_FUNCTION)
        if name.endswith(">"):
            name = name[:-1].strip()
            if name not in self._tools:
                return Step.REFUSED
            self.has_begun = True
            self._schema = self._tools[name]
            self._tag = ""
            out.append(CallStart(name))
            return Step.TAKEN
        known = any(tool.startswith(name.strip()) for tool in self._tools)
        return Step.TAKEN if self._tag.startswith(_FUNCTION) and known else Step.REFUSED

    def _take_key(self, out: list[Event]) -> Step:
        if not self._tag.startswith(_PARAMETER):
            return Step.REFUSED
        if not self._tag.endswith(">"):
            return Step.REFUSED if "\n" in self._tag else Step.TAKEN
        key = self._tag.removeprefix(_PARAMETER)[:-1].strip()
        if key in self._keys:
            return Step.REFUSED
        out.append(CallArguments(("{" if not self._keys else ", ") + json.dumps(key) + ": "))
        self._keys.add(key)
        self._tag = ""
        self._value = _Value(_types_of(self._schema, key))
        return Step.TAKEN


class _Value:
    """One parameter's value up to its end tag."""

    def __init__(self, types: frozenset[str]) -> None:
        self._types = types
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
            if char == "\n":
                return False
        self._held += char
        if self._held.endswith(_END_PARAMETER):
            self._pass_on(self._held.removesuffix(_END_PARAMETER).removesuffix("\n"), out)
            whole = "".join(self._text)
            out.append(CallArguments('"' if self._streams else _converted(whole, self._types)))
            return True
        keep = held_length(self._held, (_END_PARAMETER, "\n" + _END_PARAMETER))
        certain = len(self._held) - keep
        self._pass_on(self._held[:certain], out)
        self._held = self._held[certain:]
        return False

    def _pass_on(self, text: str, out: list[Event]) -> None:
        if self._streams:
            out.append(CallArguments(json.dumps(text, ensure_ascii=False)[1:-1]))
        else:
            self._text.append(text)


def _types_of(schema: Mapping[str, Any], key: str) -> frozenset[str]:
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
