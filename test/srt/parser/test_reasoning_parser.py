"""Reasoning of models that write <think>, and where an answer to a prompt begins."""

from __future__ import annotations

import pytest

from sglang.srt.configs.parser_names import REASONING_PARSERS
from sglang.srt.function_call.core_types import Content, Reasoning
from sglang.srt.parser.reasoning_parser import (
    REASONING_FORMATS,
    ReasoningParser,
    begins_inside,
)
from srt.function_call.answers import answer_of, parse


def test_every_name_has_a_format() -> None:
    assert {*REASONING_FORMATS, "gpt-oss"} == set(REASONING_PARSERS)


@pytest.mark.parametrize(
    ("inside", "text", "reasoning", "content"),
    [
        (False, "<think>\nHm.\n</think>\n\nYes.", "Hm.", "Yes."),
        (False, "\n<think>\n\n</think>\n\nYes.", "", "Yes."),
        (False, "Yes. <think>no</think>", "", "Yes. <think>no</think>"),
        (False, "\n Yes.\n", "", "\n Yes.\n"),
        (False, "<think>Hm", "Hm", ""),
        (False, "<thi", "", "<thi"),
        (True, "Hm.\n</think>\n\nYes.\n", "Hm.", "Yes.\n"),
        (True, "\nHm </thin", "Hm </thin", ""),
        (True, "<think>\nHm.</think>Yes </think>", "Hm.", "Yes </think>"),
        (True, "</think>", "", ""),
    ],
)
def test_reasoning_is_taken_apart(inside: bool, text: str, reasoning: str, content: str) -> None:
    answer = answer_of(parse(ReasoningParser(inside=inside), [text]))
    assert (answer.reasoning, answer.content) == (reasoning, content)


def test_reasoning_goes_out_while_it_comes() -> None:
    parser = ReasoningParser(inside=False)
    assert parser.feed("<think>") == []
    assert parser.is_reasoning
    assert parser.feed("\nSo") == [Reasoning("So")]
    assert parser.feed(" on \n") == [Reasoning(" on")]
    assert parser.feed("</thi") == []
    assert parser.feed("s>") == [Reasoning(" \n</this>")]
    assert parser.feed("</think>\n") == []
    assert not parser.is_reasoning
    assert parser.feed("\nYes") == [Content("Yes")]
    assert parser.finish() == []


@pytest.mark.parametrize(
    ("name", "prompt", "continued", "inside"),
    [
        ("qwen3", "<|im_start|>assistant\n", "", False),
        ("qwen3", "<|im_start|>assistant\n<think>\n", "", True),
        ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n", "", False),
        ("qwen3-thinking", "<|im_start|>assistant\n<think>\n", "", True),
        ("qwen3-thinking", "<|im_start|>assistant\n", "", True),
        ("deepseek-r1", "<｜Assistant｜>", "", True),
        ("deepseek-r1", "<｜Assistant｜><think>\n\n</think>\n\n", "", False),
        ("deepseek-r1", "<｜Assistant｜>x", "<think>so", True),
        ("deepseek-r1", "<｜Assistant｜>x", "<think>so</think>Yes", False),
        ("deepseek-r1", "<｜Assistant｜>x", "Yes", False),
    ],
)
def test_the_prompt_says_where_an_answer_begins(
    name: str, prompt: str, continued: str, inside: bool
) -> None:
    assert begins_inside(REASONING_FORMATS[name], prompt, continued) is inside
