"""Calls as the chat templates of GLM-4.5 to 4.7 write them.

    get_weather
    <arg_key>city</arg_key>
    <arg_value>Paris</arg_value>
    </tool_call>

White space between the tags is GLM-4.5's and means nothing; GLM-4.7 has none.
"""

from __future__ import annotations

from sglang.srt.function_call.call_readers import NAME_CHARS
from sglang.srt.function_call.core_types import (
    WHITESPACE,
    Event,
    ToolSchemas,
)
from sglang.srt.function_call.json_scan import Step
from sglang.srt.function_call.tag_value import TaggedCallReader, TagValue, types_of

END_CALL = "</tool_call>"
_KEY, _END_KEY = "<arg_key>", "</arg_key>"
_VALUE, _END_VALUE = "<arg_value>", "</arg_value>"
_MOST_TAG = 1024  # characters of a name or a key


class GlmCallReader(TaggedCallReader):
    """One call from its name to </tool_call>."""

    def __init__(self, tools: ToolSchemas) -> None:
        super().__init__(tools)
        self._name = ""
        self._key: str | None = None  # whose value has to follow
        self._in_key = False

    def _take_outside(self, char: str, out: list[Event]) -> Step:
        if len(self._tag) == _MOST_TAG or len(self._name) == _MOST_TAG:
            return Step.REFUSED
        if self._in_key:
            return self._take_key(char, out)
        if not self._tag and char != "<":
            return self._take_between(char)
        self._tag += char
        return self._take_tag(out)

    def _take_between(self, char: str) -> Step:
        """A character of the name, or white space behind it or a tag."""
        if self.has_begun:
            return Step.TAKEN if char in WHITESPACE else Step.REFUSED
        if char in NAME_CHARS and not self._name.endswith(tuple(WHITESPACE)):
            self._name += char
            known = any(tool.startswith(self._name) for tool in self._tools)
            return Step.TAKEN if known else Step.REFUSED
        self._name += char
        known = self._name.strip(WHITESPACE) in self._tools
        return Step.TAKEN if char in WHITESPACE and known else Step.REFUSED

    def _take_tag(self, out: list[Event]) -> Step:
        """A tag of which `_tag` is the beginning, or all."""
        wanted = (_VALUE,) if self._key is not None else (_KEY, END_CALL)
        if self._tag not in wanted:
            begun = any(tag.startswith(self._tag) for tag in wanted)
            return Step.TAKEN if begun else Step.REFUSED
        if not self.has_begun and not self._begin(self._name.strip(WHITESPACE), out):
            return Step.REFUSED
        if self._tag == END_CALL:
            return self._end(out)
        self._in_key = self._tag == _KEY
        if self._key is not None:
            types = types_of(self._schema, self._key)
            self._value = TagValue(types, _END_VALUE, strips_breaks=False)
            self._key = None
        self._tag = ""
        return Step.TAKEN

    def _take_key(self, char: str, out: list[Event]) -> Step:
        self._tag += char
        if not self._tag.endswith(_END_KEY):
            return Step.REFUSED if char == "\n" else Step.TAKEN
        key = self._tag.removesuffix(_END_KEY).strip()
        if not self._begin_argument(key, out):
            return Step.REFUSED
        self._key, self._in_key, self._tag = key, False, ""
        return Step.TAKEN
