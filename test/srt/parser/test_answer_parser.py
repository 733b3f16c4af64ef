"""The parser of a whole answer, the count of its reasoning tokens, and what `auto` chooses."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import pytest

from sglang.srt.parser.answer_parser import AnswerForm, ParserNames, ReasoningCount
from sglang.srt.parser.parser_choice import choose_parsers
from srt.function_call.answers import TOOLS, Answer, answer_of, parse

CALL = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
ANSWER = f"<think>\nMaybe {CALL}?\n</think>\n\nI look.\n{CALL}"


def form(**changes: Any) -> AnswerForm:
    return AnswerForm(
        **{
            "names": ParserNames("hermes", "qwen3"),
            "tools": TOOLS,
            "max_calls": None,
            "prompt": "<|im_start|>assistant\n",
            "continued": "",
            "separates": True,
            **changes,
        }
    )


def read(one: AnswerForm, text: str) -> Answer:
    parser = one.make_parser()
    assert parser is not None
    whole = parse(parser, [text])
    again = one.make_parser()
    assert again is not None
    assert parse(again, text) == whole
    return answer_of(whole)


def test_reasoning_is_not_looked_through_for_calls() -> None:
    assert read(form(), ANSWER) == Answer("I look.", f"Maybe {CALL}?", [("get_time", {})])


def test_reasoning_that_is_not_separated_stays_as_it_was_written() -> None:
    answer = read(form(separates=False), ANSWER)
    assert answer.reasoning == f"<think>\nMaybe {CALL}?\n</think>\n\n"
    assert (answer.content, answer.calls) == ("I look.", [("get_time", {})])


def test_one_of_the_two_parsers_is_enough() -> None:
    only_calls = form(names=ParserNames("hermes", None))
    assert read(only_calls, f"Hm {CALL}").calls == [("get_time", {})]
    only_reasoning = form(names=ParserNames(None, "qwen3"))
    assert read(only_reasoning, ANSWER).content == f"I look.\n{CALL}"


@pytest.mark.parametrize(
    "changes",
    [
        {"names": ParserNames()},
        {"names": ParserNames("hermes", None), "tools": {}},
        {"names": ParserNames("hermes", "qwen3"), "tools": {}, "separates": False},
        {"names": ParserNames("gpt-oss", "gpt-oss"), "tools": {}, "separates": False},
    ],
)
def test_nothing_is_parsed_when_nothing_is_asked(changes: Mapping[str, Any]) -> None:
    assert form(**changes).make_parser() is None
    assert form(**changes).kept_tokens == ()


def test_special_tokens_that_parsers_need() -> None:
    assert form(names=ParserNames("llama3", None)).kept_tokens == (
        "<|python_tag|>",
        "<|python_start|>",
        "<|python_end|>",
    )
    assert form(names=ParserNames("hermes", None)).kept_tokens == ()
    assert "</think>" in form().kept_tokens
    assert "<|channel|>" in form(names=ParserNames("gpt-oss", None)).kept_tokens


def test_gpt_oss_calls_need_its_tool_parser() -> None:
    text = "<|channel|>commentary to=functions.get_time<|message|>{}<|call|>"
    assert read(form(names=ParserNames("gpt-oss", None)), text).calls == [("get_time", {})]
    assert read(form(names=ParserNames(None, "gpt-oss")), text).calls == []


@pytest.mark.parametrize(
    ("name", "prompt", "tokens", "total"),
    [
        ("qwen3", "", ["<think>", "\n", "Hm", "</think>", "\n\n", "Yes"], 4),
        ("qwen3", "", ["Yes", "<think>"], 0),
        ("qwen3", "<think>\n", ["Hm", "</", "thin", "k>\n", "Yes"], 4),
        ("deepseek-r1", "", ["Hm", "m"], 2),
        ("deepseek-r1", "", ["Hm", "</think>"], 2),
        (
            "gpt-oss",
            "",
            ["<|channel|>", "analysis", "<|message|>", "a", "b", "<|end|>", "<|start|>", "x"],
            4,
        ),
    ],
)
def test_reasoning_tokens_are_counted(
    name: str, prompt: str, tokens: list[str], total: int
) -> None:
    one = form(names=ParserNames(None, name), prompt=prompt)
    count = ReasoningCount(one, tokens.__getitem__)
    count.add(range(2))
    assert count.add(range(2, len(tokens))) == total


def test_without_a_parser_nothing_is_counted() -> None:
    for one in (None, form(names=ParserNames("hermes", None))):
        assert ReasoningCount(one, ["<think>"].__getitem__).add([0]) == 0


# The lines by which the models' public chat templates are told apart.
@pytest.mark.parametrize(
    ("template", "tool_call", "reasoning"),
    [
        ("...return a json object ... within <tool_call></tool_call> XML tags", "hermes", None),
        (
            "<tool_call>\\n{\"name\" ... '<think>\\n\\n</think>' ... enable_thinking is false",
            "hermes",
            "qwen3",
        ),
        (
            "<|im_start|>assistant\\n<think>\\n ... content.split('</think>') ... <tool_call>",
            "hermes",
            "qwen3-thinking",
        ),
        ("<tool_call>\n<function=example_function_name>\n<parameter=x>", "qwen3_coder", None),
        (
            'Respond in the format {"name": function name, "parameters": dictionary of argument '
            "name and its value}. <|python_start|>",
            "llama3",
            None,
        ),
        ("[func_name1(params_name1=params_value1), func_name2(params)]", "pythonic", None),
        ("'[TOOL_CALLS] ['", "mistral", None),
        ("<|channel|>analysis<|message|> ... to=functions.' + name", "gpt-oss", "gpt-oss"),
        (
            "[gMASK]<sop> <tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n"
            "<arg_value> ... <|assistant|> ... '</think>' ... enable_thinking",
            "glm45",
            "glm45",
        ),
        ("<tool_call>{function-name}<arg_key>{arg-key-1}</arg_key><arg_value>", "glm47", None),
        (
            "']~b]ai' ... '</think>' ... '<minimax:tool_call>' ... <invoke name=",
            "minimax-m2",
            "minimax",
        ),
        (
            "<|tool_calls_section_begin|> ... <|tool_call_argument_begin|> ... <|im_middle|>",
            "kimi_k2",
            None,
        ),
        ("<｜Assistant｜> ... content.split('</think>')[-1]", None, "deepseek-r1"),
        ("<|im_start|>", None, None),
    ],
)
def test_auto_reads_the_template(
    template: str,
    tool_call: str | None,
    reasoning: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        assert choose_parsers("auto", "auto", template) == ParserNames(tool_call, reasoning)
    warned = {record.message.split(" ")[0] for record in caplog.records}
    assert ("--tool-call-parser" in warned) is (tool_call is None)
    assert ("--reasoning-parser" in warned) is (reasoning is None)


def test_a_name_is_taken_as_it_is() -> None:
    assert choose_parsers("llama3", None, "<tool_call>") == ParserNames("llama3", None)
    both = {"default": "", "tool_use": "<tool_call>"}
    assert choose_parsers("auto", None, both).tool_call == "hermes"
    assert choose_parsers("auto", None, None).tool_call is None
