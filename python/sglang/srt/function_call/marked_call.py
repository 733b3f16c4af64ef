"""Calls as Kimi-K2's chat template writes them, between special tokens.

    <|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{...}

What stands before the arguments is the call's id: the function's name and the number of the call.
"""

from __future__ import annotations

import re

from sglang.srt.function_call.core_types import (
    WHITESPACE,
    CallEnd,
    CallStart,
    Event,
    ToolSchemas,
)
from sglang.srt.function_call.json_scan import ArgumentsReader, Step

BEGIN_CALL, BEGIN_ARGUMENTS = "<|tool_call_begin|>", "<|tool_call_argument_begin|>"
_MOST_HEAD = 1024  # characters
_ID = re.compile(r"(?:functions\.)?(.+?)(?::\d+)?")


class MarkedCallReader:
    """One call from <|tool_call_begin|> to the end of its arguments."""

    def __init__(self, tools: ToolSchemas) -> None:
        self.has_begun = False
        self._tools = tools
        self._head = ""
        self._arguments: ArgumentsReader | None = None

    def take_run(self, text: str, at: int, out: list[Event]) -> int:
        """See `CallReader`."""
        return self._arguments.take_run(text, at, out) if self.has_begun and self._arguments else 0

    def take(self, char: str, out: list[Event]) -> Step:
        """See `CallReader`."""
        if self._arguments is None:
            return self._take_head(char)
        if not self.has_begun:
            return self._begin(char, out)
        step = self._arguments.take(char, out)
        if step is Step.DONE:
            out.append(CallEnd())
        return step

    def _take_head(self, char: str) -> Step:
        if len(self._head) == _MOST_HEAD:
            return Step.REFUSED
        self._head += char
        if len(self._head) <= len(BEGIN_CALL):
            return Step.TAKEN if BEGIN_CALL.startswith(self._head) else Step.REFUSED
        if self._head.endswith(BEGIN_ARGUMENTS):
            self._arguments = ArgumentsReader()
        return Step.TAKEN

    def _begin(self, char: str, out: list[Event]) -> Step:
        """The arguments' first character; white space before it means nothing."""
        if char in WHITESPACE and len(self._head) < _MOST_HEAD:
            self._head += char
            return Step.TAKEN
        name = self._name()
        if char != "{" or name is None or self._arguments is None:
            return Step.REFUSED
        self.has_begun = True
        out.append(CallStart(name))
        return self._arguments.take(char, out)

    def _name(self) -> str | None:
        head = self._head.removeprefix(BEGIN_CALL).partition(BEGIN_ARGUMENTS)[0].strip()
        if head in self._tools:
            return head
        found = _ID.fullmatch(head)
        return found[1] if found is not None and found[1] in self._tools else None
