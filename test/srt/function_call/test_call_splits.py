"""However an answer's text is cut into pieces, the same is made of it; and nothing is lost."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang.srt.function_call.call_parser import CallParser
from sglang.srt.function_call.core_types import CallStart, TextParser
from sglang.srt.function_call.function_call_parser import CALL_FORMATS
from sglang.srt.function_call.json_scan import JsonScanner
from sglang.srt.parser.harmony_parser import HarmonyParser
from sglang.srt.parser.reasoning_parser import ReasoningParser
from srt.function_call.answers import TOOLS, answer_of, parse

# What answers are made of: markers, calls and bits of them, in any order.
_FRAGMENTS = (
    *(marker for form in CALL_FORMATS.values() for marker in (*form.openers, *form.closers)),
    *("[CALL_ID]abc", "[ARGS]", "<think>", "</think>", "[", "]", ",", ";", "{", "}", "(", ")"),
    *(" ", "\n", "\n\n", "Hello", "é", '"', "'", "\\", "<", "get_time", "get_weather", "nobody"),
    '{"name": "get_weather", "arguments": {"city": "Pa\\"r}is"}}',
    '{"name": "get_time", "parameters": {}}',
    '{"arguments": {"a": [1, 2.5e3, true]}, "name": "get_time", "id": 7}',
    '{"name": "get_time", "arguments": {"a": }}',
    '{"name": "nobody", "arguments": {}}',
    *('"name"', ": ", '"arguments": {', '"get_time"', '{"city": "x"}', '"}}'),
    *("get_weather(city='Paris', days=2)", "get_time()", "get_time(", "city='a\\'b)'"),
    "<function=get_weather>\n<parameter=city>\na\n</parameter>\n<parameter=days>\n2\n</parameter>\n",
    *("<function=get_time>", "</function>", "<parameter=city>", "</parameter>", "\n</parameter"),
    *("<arg_key>city</arg_key>", "<arg_value>", "</arg_value>", "<arg_key>", "get_weather\n"),
    *(
        '<invoke name="get_weather">',
        '<invoke name="',
        '">',
        "</invoke>",
        '<parameter name="days">',
    ),
    *("<|tool_call_begin|>", "functions.get_time:0", "<|tool_call_argument_begin|>"),
    *("<|start|>assistant", "<|channel|>analysis", "<|channel|>final", "<|message|>", "<|end|>"),
    *(
        "<|channel|>commentary to=functions.get_time ",
        "<|constrain|>json",
        "<|call|>",
        "<|return|>",
    ),
)
_TEXTS = st.lists(st.sampled_from(_FRAGMENTS), max_size=14).map("".join)


def _new_parser(name: str, max_calls: int | None) -> TextParser:
    if name == "gpt-oss":
        return HarmonyParser(TOOLS, max_calls=max_calls)
    if name.startswith("think"):
        return ReasoningParser(inside="inside" in name, verbatim="verbatim" in name)
    return CallParser(CALL_FORMATS[name], TOOLS, max_calls=max_calls)


_NAMES = (*sorted(CALL_FORMATS), "gpt-oss", "think", "think inside", "think verbatim inside")


@pytest.mark.parametrize("name", _NAMES)
@given(text=_TEXTS, cuts=st.lists(st.integers(0, 400), max_size=12), limit=st.booleans())
def test_any_cut_gives_the_same(name: str, text: str, cuts: list[int], limit: bool) -> None:
    max_calls = 1 if limit else None
    whole = parse(_new_parser(name, max_calls), [text])
    answer_of(whole)  # the order is right, and arguments are JSON objects
    borders = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in pairwise(borders)]
    assert parse(_new_parser(name, max_calls), pieces) == whole
    assert parse(_new_parser(name, max_calls), text) == whole  # character by character


@pytest.mark.parametrize("name", sorted(CALL_FORMATS))
@given(text=_TEXTS)
def test_without_a_call_the_content_is_the_text(name: str, text: str) -> None:
    events = parse(_new_parser(name, None), [text])
    if not any(isinstance(event, CallStart) for event in events):
        assert answer_of(events).content == text


@given(text=_TEXTS)
def test_verbatim_reasoning_loses_nothing(text: str) -> None:
    for inside in (False, True):
        answer = answer_of(parse(ReasoningParser(inside=inside, verbatim=True), [text]))
        assert answer.reasoning + answer.content == text


_NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
_JSON = st.recursive(
    st.none() | st.booleans() | _NUMBERS | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


@given(value=_JSON, indent=st.none() | st.integers(0, 2), ascii_only=st.booleans())
def test_the_scanner_takes_all_json(value: Any, indent: int | None, ascii_only: bool) -> None:
    scanner = JsonScanner()
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only) + " "
    taken = sum(scanner.take(char) for char in text)
    assert scanner.done
    assert taken == len(text) - 1


@given(text=st.text(alphabet='{}[]",:\\ u0123456789.eE+-truefalsn\n', max_size=24))
def test_the_scanner_takes_nothing_else(text: str) -> None:
    scanner = JsonScanner()
    taken = 0
    while taken < len(text) and scanner.take(text[taken]):
        taken += 1
    try:
        json.loads(text[:taken])
        is_json = True
    except ValueError:
        is_json = False
    if scanner.done:
        assert is_json
    elif taken < len(text):  # refused: nothing that begins so is JSON
        with pytest.raises(ValueError):
            json.loads(text[: taken + 1])
