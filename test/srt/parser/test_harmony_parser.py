"""gpt-oss's channels, with answers as the guide to the harmony response format shows them."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang.srt.function_call.core_types import (
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Reasoning,
)
from sglang.srt.parser.harmony_parser import HarmonyParser
from srt.function_call.answers import TOOLS, Answer, answer_of, parse

CALL = (
    "<|channel|>analysis<|message|>Need the weather.<|end|><|start|>assistant<|channel|>commentary"
    ' to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>'
)
PARIS = ("get_weather", {"city": "Paris"})


def read(text: str) -> Answer:
    return answer_of(parse(HarmonyParser(TOOLS), [text]))


@pytest.mark.parametrize("end", ["", "<|return|>", "<|end|>"])
def test_reasoning_and_an_answer(end: str) -> None:
    answer = read(
        "<|channel|>analysis<|message|>2 + 2 = 4<|end|>"
        f"<|start|>assistant<|channel|>final<|message|>It is **4**.{end}"
    )
    assert answer == Answer("It is **4**.", "2 + 2 = 4", [])


@pytest.mark.parametrize("text", [CALL, CALL.removesuffix("<|call|>")])
def test_a_call(text: str) -> None:
    assert read(text) == Answer("", "Need the weather.", [PARIS])


def test_the_recipient_may_stand_in_the_role() -> None:
    answer = read(
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant to=functions.get_time"
        "<|channel|>commentary json<|message|>{}<|call|>"
    )
    assert answer.calls == [("get_time", {})]
    assert read(" to=functions.get_time<|channel|>commentary<|message|>{}").calls == [
        ("get_time", {})
    ]


def test_a_preamble_is_content_and_messages_are_parted() -> None:
    answer = read(
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b"
        "<|end|><|start|>assistant<|channel|>commentary<|message|>Plan:<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Done."
    )
    assert answer == Answer("Plan:\nDone.", "a\nb", [])


def test_text_without_channels_is_content() -> None:
    assert read("Just text.") == Answer("Just text.")
    assert read("") == Answer()


def test_an_unfinished_header_is_content() -> None:
    text = "<|channel|>commentary to=functions.get_t"
    assert read(text) == Answer(text)


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        ('{"city": "Par', "<head>"),
        ("no JSON", "<head>"),
        ("", "<head>"),
        ('{"city": }', "<head>"),
    ],
)
def test_what_is_no_call_comes_back(body: str, shown: str) -> None:
    head = "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
    answer = read(f"{head}{body}<|call|>")
    assert answer.calls == []
    assert answer.content.replace("\n", "") == head + body


@pytest.mark.parametrize("recipient", ["functions.nobody", "python", "browser.search"])
def test_other_recipients_are_content(recipient: str) -> None:
    text = f"<|channel|>commentary to={recipient} <|constrain|>json<|message|>{{}}"
    assert read(text + "<|call|>") == Answer(text)


def test_more_calls_than_allowed_are_content() -> None:
    one = "<|channel|>commentary to=functions.get_time<|message|>{}"
    parser = HarmonyParser(TOOLS, max_calls=1)
    answer = answer_of(parse(parser, [f"{one}<|call|><|start|>assistant{one}<|call|>"]))
    assert answer.calls == [("get_time", {})]
    assert answer.content == "<|start|>assistant" + one


def test_pieces_go_out_while_they_come() -> None:
    parser = HarmonyParser(TOOLS)
    assert parser.feed("<|channel|>analysis") == []
    assert parser.feed("<|message|>") == []
    assert parser.is_reasoning
    assert parser.feed("Hm") == [Reasoning("Hm")]
    assert parser.feed("<|end|>") == []
    assert not parser.is_reasoning
    assert parser.feed("<|start|>assistant<|channel|>commentary to=functions.get_weather") == []
    assert parser.feed('<|message|>{"ci') == [CallStart("get_weather"), CallArguments('{"ci')]
    assert parser.feed('ty": "a<|b"}') == [CallArguments('ty": "a<|b"}'), CallEnd()]
    assert parser.feed("<|call|>") == []
    assert parser.feed("<|start|>assistant<|channel|>final<|message|>Ok") == [Content("Ok")]
    assert parser.finish() == []


@given(cuts=st.sets(st.integers(1, len(CALL) - 1)))
def test_any_cut_gives_the_same(cuts: set[int]) -> None:
    borders = [0, *sorted(cuts), len(CALL)]
    pieces = [CALL[a:b] for a, b in pairwise(borders)]
    assert parse(HarmonyParser(TOOLS), pieces) == parse(HarmonyParser(TOOLS), [CALL])
