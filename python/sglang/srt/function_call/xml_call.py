"""Calls as the chat templates of Qwen3-Coder and of MiniMax-M2 write them.

<function=get_weather>                 <invoke name="get_weather">
<parameter=city>                       <parameter name="city">Paris</parameter>
Paris                                  </invoke>
</parameter>
</function>
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang.srt.function_call.core_types import (
    Event,
    ToolSchemas,
    held_length,
)
from sglang.srt.function_call.json_scan import Step
from sglang.srt.function_call.tag_value import TaggedCallReader, TagValue, types_of

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


class XmlCallReader(TaggedCallReader):
    """One element of a function in the format of `tags`."""

    def __init__(self, tools: ToolSchemas, tags: XmlTags = QWEN_3_CODER) -> None:
        super().__init__(tools)
        self._tags = tags

    def _take_outside(self, char: str, out: list[Event]) -> Step:
        if not self._tag and self.has_begun and char in " \t\r\n":
            return Step.TAKEN
        if len(self._tag) == _MOST_TAG:
            return Step.REFUSED
        self._tag += char
        tags = self._tags
        if not self.has_begun:
            return self._take_name(out)
        if self._tag == tags.end_function:
            return self._end(out)
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
            if not self._begin(name, out):
                return Step.REFUSED
            self._tag = ""
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
        if not self._begin_argument(key, out):
            return Step.REFUSED
        self._tag = ""
        types = types_of(self._schema, key)
        self._value = TagValue(
            types, self._tags.end_parameter, strips_breaks=self._tags.strips_breaks
        )
        return Step.TAKEN
