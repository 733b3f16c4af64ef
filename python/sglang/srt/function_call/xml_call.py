"""Calls as the chat templates of Qwen3-Coder and of MiniMax-M2 write them.

<function=get_weather>                 <invoke name="get_weather">
<parameter=city>                       <parameter name="city">Paris</parameter>
Paris                                  </invoke>
</parameter>
</function>
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sglang.srt.function_call.core_types import (
    CallArguments,
    CallEnd,
    CallStart,
    Event,
    ToolSchemas,
    held_length,
)
from sglang.srt.function_call.json_scan import Step
from sglang.srt.function_call.tag_value import TagValue, types_of

_MOST_TAG = 1024  # characters


@dataclass(frozen=True, slots=True)
class XmlTags:
    """What stands before and behind the name of a function and of a parameter, and their ends."""

    function: str
    parameter: str
    name_end: str
    end_parameter: str
    end_function: str
    strips_breaks: bool


QWEN_3_CODER = XmlTags(
    "<function=", "<parameter=", ">", "</parameter>", "</function>", strips_breaks=True
)
MINIMAX_M2 = XmlTags(
    '<invoke name="', '<parameter name="', '">', "</parameter>", "</invoke>", strips_breaks=False
)


class XmlCallReader:
    """One element of a function in the format of `tags`."""

    def __init__(self, tools: ToolSchemas, tags: XmlTags = QWEN_3_CODER) -> None:
        self.has_begun = False
        self._tools = tools
        self._tags = tags
        self._tag = ""
        self._schema: Mapping[str, Any] = {}
        self._value: TagValue | None = None
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
        tags = self._tags
        if not self.has_begun:
            return self._take_name(out)
        if self._tag == tags.end_function:
            out += [CallArguments("}" if self._keys else "{}"), CallEnd()]
            return Step.DONE
        if tags.end_function.startswith(self._tag) or tags.parameter.startswith(self._tag):
            return Step.TAKEN
        return self._take_key(out)

    def _take_name(self, out: list[Event]) -> Step:
        opening = self._tags.function
        if opening.startswith(self._tag):
            return Step.TAKEN
        name = self._tag.removeprefix(opening)
        if name.endswith(self._tags.name_end):
            name = name.removesuffix(self._tags.name_end).strip()
            if name not in self._tools:
                return Step.REFUSED
            self.has_begun = True
            self._schema = self._tools[name]
            self._tag = ""
            out.append(CallStart(name))
            return Step.TAKEN
        # The end of a name may have begun.
        begun = name[: len(name) - held_length(name, (self._tags.name_end,))].strip()
        known = any(tool.startswith(begun) for tool in self._tools)
        return Step.TAKEN if self._tag.startswith(opening) and known else Step.REFUSED

    def _take_key(self, out: list[Event]) -> Step:
        opening, end = self._tags.parameter, self._tags.name_end
        if not self._tag.startswith(opening):
            return Step.REFUSED
        if not self._tag.endswith(end) or len(self._tag) < len(opening) + len(end):
            return Step.REFUSED if "\n" in self._tag else Step.TAKEN
        key = self._tag.removeprefix(opening).removesuffix(end).strip()
        if key in self._keys:
            return Step.REFUSED
        out.append(CallArguments(("{" if not self._keys else ", ") + json.dumps(key) + ": "))
        self._keys.add(key)
        self._tag = ""
        types = types_of(self._schema, key)
        self._value = TagValue(
            types, self._tags.end_parameter, strips_breaks=self._tags.strips_breaks
        )
        return Step.TAKEN
