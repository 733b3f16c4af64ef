"""Calls written as Python: [get_weather(city="Paris", days=2), ...].

Only keyword arguments with literal values are calls; nothing is ever evaluated. Python's own
parser is not used: it warns about odd escapes, process-wide, in what a model made up.
"""

from __future__ import annotations

import json
import re
from typing import Any

from sglang.srt.function_call.call_readers import NAME_CHARS
from sglang.srt.function_call.core_types import (
    CallArguments,
    CallEnd,
    CallStart,
    Event,
    ToolSchemas,
)
from sglang.srt.function_call.json_scan import Step, sendable

_TOKEN = re.compile(
    r"""\s*(?:
        (?P<string>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")
      | (?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)
      | (?P<word>[A-Za-z_][A-Za-z_0-9]*)
      | (?P<mark>[\[\](){},:=])
    )""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(
    r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U(000[0-9a-fA-F]{5}|0010[0-9a-fA-F]{4})|(.))",
    re.DOTALL,
)
_ONE_CHAR = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "0": "\0", "\n": ""}
_WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
_CLOSERS = {"[": "]", "(": ")", "{": "}"}
_MOST_DEPTH = 64


class PythonCallReader:
    """One call of the list. It goes out whole: what a value is shows at its end only."""

    def __init__(self, tools: ToolSchemas) -> None:
        self.has_begun = False
        self._tools = tools
        self._name = ""
        self._text: list[str] | None = None
        self._closers: list[str] = []
        self._quote = ""
        self._is_escaped = False

    def take_run(self, _text: str, _at: int, _out: list[Event]) -> int:
        """See `CallReader`."""
        return 0

    def take(self, char: str, out: list[Event]) -> Step:
        """See `CallReader`."""
        if self._text is None:
            return self._take_name(char)
        if self._quote:
            self._take_quoted(char)
        elif char in "'\"":
            self._quote = char
        elif char in _CLOSERS:
            self._closers.append(_CLOSERS[char])
        elif char in ")]}":
            if char != self._closers.pop():
                return Step.REFUSED
            if not self._closers:
                return self._end(out)
        self._text.append(char)
        return Step.TAKEN

    def _take_name(self, char: str) -> Step:
        if char in NAME_CHARS:
            self._name += char
            known = any(tool.startswith(self._name) for tool in self._tools)
            return Step.TAKEN if known else Step.REFUSED
        if char != "(" or self._name not in self._tools:
            return Step.REFUSED
        self._text = []
        self._closers.append(")")
        return Step.TAKEN

    def _take_quoted(self, char: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char == self._quote:
            self._quote = ""

    def _end(self, out: list[Event]) -> Step:
        try:
            arguments = read_keywords("".join(self._text or ()))
        except ValueError:
            return Step.REFUSED
        written = sendable(json.dumps(arguments, ensure_ascii=False))
        out += [CallStart(self._name), CallArguments(written), CallEnd()]
        return Step.DONE


def read_keywords(text: str) -> dict[str, Any]:
    """The keyword arguments in `text`, what stands between a call's parentheses.

    Raises ValueError for anything but names with literal values.
    """
    reader = _LiteralReader(text)
    result: dict[str, Any] = {}
    while reader.kind != "end":
        name = reader.expect("word")
        reader.expect_mark("=")
        if name in result:
            raise ValueError(f"{name} comes twice")
        result[name] = reader.value(0)
        if reader.kind != "end":
            reader.expect_mark(",")
    return result


class _LiteralReader:
    """Python's literals, one token ahead; `kind` is the token's, "end" after the last."""

    def __init__(self, text: str) -> None:
        self._text = text.rstrip()
        self._at = 0
        self.kind, self._token = "", ""
        self._advance()

    def _advance(self) -> None:
        if self._at == len(self._text):
            self.kind, self._token = "end", ""
            return
        found = _TOKEN.match(self._text, self._at)
        if found is None or found.lastgroup is None:
            raise ValueError(f"no literal at {self._text[self._at :][:20]!r}")
        self.kind, self._token = found.lastgroup, found[found.lastgroup]
        self._at = found.end()

    def expect(self, kind: str) -> str:
        if self.kind != kind:
            raise ValueError(f"expected a {kind}, got {self._token!r}")
        token = self._token
        self._advance()
        return token

    def expect_mark(self, mark: str) -> None:
        if self._token != mark or self.kind != "mark":
            raise ValueError(f"expected {mark}, got {self._token!r}")
        self._advance()

    def value(self, depth: int) -> Any:
        if depth > _MOST_DEPTH:
            raise ValueError("nested too deeply")
        if self.kind == "string":
            return _unquoted(self.expect("string"))
        if self.kind == "number":
            return _number(self.expect("number"))
        if self.kind == "word":
            word = self.expect("word")
            if word not in _WORDS:
                raise ValueError(f"{word} is no literal")
            return _WORDS[word]
        opener = self.expect("mark")
        if opener not in _CLOSERS:
            raise ValueError(f"{opener} begins no literal")
        closer = _CLOSERS[opener]
        return self._mapping(depth) if closer == "}" else self._items(closer, depth)

    def _items(self, closer: str, depth: int) -> Any:
        """A list or a tuple; one value in parentheses without a comma is that value."""
        items = []
        has_comma = False
        while self._token != closer:
            items.append(self.value(depth + 1))
            if self._token != closer:
                self.expect_mark(",")
                has_comma = True
        self.expect_mark(closer)
        return items[0] if closer == ")" and items and not has_comma else items

    def _mapping(self, depth: int) -> dict[str, Any]:
        items = {}
        while self._token != "}":
            key = _unquoted(self.expect("string"))
            self.expect_mark(":")
            items[key] = self.value(depth + 1)
            if self._token != "}":
                self.expect_mark(",")
        self.expect_mark("}")
        return items


def _unquoted(token: str) -> str:
    """The text of a quoted string; an escape that Python does not know stays as it is."""

    def char(found: re.Match[str]) -> str:
        code = found[1] or found[2] or found[3]
        if code is not None:
            return chr(int(code, 16))
        one: str = found[4]
        return _ONE_CHAR.get(one, one if one in "\\'\"" else found[0])

    return _ESCAPE.sub(char, token[1:-1])


def _number(token: str) -> int | float:
    if token.lstrip("+-").isdigit():
        return int(token)  # ValueError above Python's limit of digits
    number = float(token)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{token} is too large")
    return number
