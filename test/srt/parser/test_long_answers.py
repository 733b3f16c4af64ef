"""Long answers cost what their characters cost: nothing is read again for each piece or marker."""

from __future__ import annotations

from typing import Any

import pytest

from sglang.srt.function_call.call_parser import CallParser
from sglang.srt.function_call.core_types import PIECE_CHARS, Content, Reasoning
from sglang.srt.function_call.function_call_parser import CALL_FORMATS
from sglang.srt.parser.harmony_parser import HarmonyParser
from sglang.srt.parser.reasoning_parser import ReasoningParser
from srt.function_call.answers import TOOLS, answer_of, parse

NUM_PIECES = 3000


def parser_of(kind: str) -> Any:
    if kind == "harmony":
        return HarmonyParser(TOOLS)
    if kind.startswith("think"):
        return ReasoningParser(inside=kind == "think")
    return CallParser(CALL_FORMATS[kind], TOOLS)


@pytest.mark.parametrize(
    ("kind", "before"),
    [
        ("hermes", ""),
        ("hermes", "Hello"),
        ("hermes", "<tool_call>"),
        ("hermes", '<tool_call>{"name": "get_time"}'),
        ("think", ""),
        ("think", "Hm"),
        ("think", "Hm</think>"),
        ("think?", ""),
        ("harmony", ""),
        ("harmony", "<|channel|>final<|message|>Hm<|end|>"),
    ],
)
@pytest.mark.parametrize("after", ["", "x", "<"])
def test_white_space_without_end_is_not_read_again(kind: str, before: str, after: str) -> None:
    spaces = [" \n"] * NUM_PIECES
    parser = parser_of(kind)
    events = parser.feed(before)
    for piece in spaces:
        events += parser.feed(piece)
        assert len(parser._buffer) <= len(before) + 2
    events += [*parser.feed(after), *parser.finish()]
    whole = answer_of(parse(parser_of(kind), [before + "".join(spaces) + after]))
    assert answer_of(events) == whole


def text_of(events: list[Any]) -> str:
    return "".join(event.text for event in events if isinstance(event, (Content, Reasoning)))


@pytest.mark.parametrize(
    ("kind", "unit"),
    [
        ("hermes", "<tool_call>x"),
        ("llama3", "<|python_tag|>x"),
        ("mistral", "[TOOL_CALLS]x"),
        ("qwen3_coder", "<tool_call><function=no>"),
        ("glm45", "<tool_call>no"),
        ("minimax-m2", '<minimax:tool_call><invoke name="no">'),
        ("kimi_k2", "<|tool_calls_section_begin|>x"),
    ],
)
def test_a_text_of_many_markers_is_read_in_pieces(kind: str, unit: str) -> None:
    parser = parser_of(kind)
    held: list[int] = []
    read = parser._read

    def noted(out: Any) -> None:
        held.append(len(parser._buffer))
        read(out)

    parser._read = noted
    text = unit * (20 * PIECE_CHARS // len(unit))
    assert text_of([*parser.feed(text), *parser.finish()]) == text
    assert max(held) <= 2 * PIECE_CHARS


@pytest.mark.parametrize(
    ("kind", "before", "unit"),
    [
        ("mistral", "[TOOL_CALLS]get_time", " "),
        ("mistral", "[TOOL_CALLS]get_time[CALL_ID]", "a"),
        ("pythonic", "[", "a"),
        ("qwen3_coder", "<tool_call><function=", " "),
        ("glm45", "<tool_call>get_time", " "),
        ("kimi_k2", "<|tool_calls_section_begin|><|tool_call_begin|>", "a"),
        ("harmony", "<|channel|>", "x"),
    ],
)
def test_a_head_without_end_is_content(kind: str, before: str, unit: str) -> None:
    parser = parser_of(kind)
    text = before + unit * 4000 + "!"
    events = [event for char in text for event in parser.feed(char)]
    assert text_of(events), "nothing waits for the end of the text"
    assert text_of([*events, *parser.finish()]) == text
