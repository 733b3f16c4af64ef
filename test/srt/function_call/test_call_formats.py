"""Each format of tool calls, with answers as the models' chat templates and cards write them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sglang.srt.configs.parser_names import TOOL_CALL_PARSERS
from sglang.srt.function_call.call_parser import CallParser
from sglang.srt.function_call.core_types import (
    CallArguments,
    CallBroken,
    CallEnd,
    CallStart,
    Content,
)
from sglang.srt.function_call.function_call_parser import CALL_FORMATS, new_call_id
from srt.function_call.answers import TOOLS, Answer, answer_of, parse

PARIS = ("get_weather", {"city": "Paris"})
TIME = ("get_time", {})


def read(name: str, text: str, *, max_calls: int | None = None) -> Answer:
    parser = CallParser(CALL_FORMATS[name], TOOLS, max_calls=max_calls)
    return answer_of(parse(parser, [text]))


def xml_call(**values: object) -> str:
    """A call of get_weather in the format of qwen3_coder."""
    parameters = "".join(f"<parameter={key}>{value}</parameter>" for key, value in values.items())
    return f"<tool_call><function=get_weather>{parameters}</function></tool_call>"


def test_every_name_has_a_format() -> None:
    assert {*CALL_FORMATS, "gpt-oss"} == set(TOOL_CALL_PARSERS)


@pytest.mark.parametrize(
    ("name", "text", "content", "calls"),
    [
        # Qwen 2.5, Hermes
        (
            "qwen25",
            '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
            "",
            [PARIS],
        ),
        (
            "hermes",
            'I look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n'
            '</tool_call>\n<tool_call>\n{"arguments": {}, "name": "get_time"}\n</tool_call>',
            "I look.",
            [PARIS, TIME],
        ),
        # SmolLM2: a list between the tags
        (
            "hermes",
            '<tool_call>[{"name": "get_weather", "arguments": {"city": "Paris"}}, '
            '{"name": "get_time", "arguments": {}}]</tool_call>',
            "",
            [PARIS, TIME],
        ),
        ("hermes", '<tool_call>{"name": "get_time"}</tool_call>', "", [TIME]),
        ("hermes", '<tool_call>{"name": "get_time", "arguments": null}', "", [TIME]),
        (
            "hermes",
            '<tool_call>{"name":"get_weather","arguments":"{\\"city\\": \\"Paris\\"}"}</tool_call>',
            "",
            [PARIS],
        ),
        (
            "hermes",
            '<tool_call>{"id": [1, {"a": "}"}], "arguments": {"city": "Paris"}, "x": -1.5e3, '
            '"name": "get_weather", "y": true}</tool_call>\n\nThere.',
            "There.",
            [PARIS],
        ),
        # Llama 3
        ("llama3", '{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
        (
            "llama3",
            '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}; '
            '{"name": "get_time", "parameters": {}}',
            "",
            [PARIS, TIME],
        ),
        (
            "llama3",
            '{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}\n'
            '{"name": "get_time", "parameters": {}}',
            "",
            [PARIS, TIME],
        ),
        (
            "llama3",
            'So: <|python_start|>{"name": "get_time", "parameters": {}}<|python_end|>',
            "So:",
            [TIME],
        ),
        # Mistral up to v7, and from v11 on
        (
            "mistral",
            '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}, '
            '"id": "VvvODy9mT"}, {"name": "get_time", "arguments": {}}]',
            "",
            [PARIS, TIME],
        ),
        (
            "mistral",
            'Hm.[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]get_time[ARGS]{}',
            "Hm.",
            [PARIS, TIME],
        ),
        (
            "mistral",
            '[TOOL_CALLS]get_weather[CALL_ID]VvvODy9mT[ARGS]{"city": "Paris"}',
            "",
            [PARIS],
        ),
        ("mistral", '[TOOL_CALLS]get_weather{"city": "Paris"}', "", [PARIS]),
        # Python
        (
            "pythonic",
            "[get_weather(city='Paris'), spotify.play(title=\"It's\")]",
            "",
            [PARIS, ("spotify.play", {"title": "It's"})],
        ),
        (
            "pythonic",
            '<|python_start|>[get_weather(city="Paris")]<|python_end|>',
            "",
            [PARIS],
        ),
        (
            "pythonic",
            "[get_weather(days=-2, exact=True, unit=None, "
            "where={'a': [1, 2.5, (3,)], \"b\": ')'})]",
            "",
            [
                (
                    "get_weather",
                    {
                        "days": -2,
                        "exact": True,
                        "unit": None,
                        "where": {"a": [1, 2.5, [3]], "b": ")"},
                    },
                )
            ],
        ),
        (
            "pythonic",
            r"[get_weather(city='a\n\x41\u00e9\'\d\\')]",
            "",
            [("get_weather", {"city": "a\nAé'\\d\\"})],
        ),
        # Qwen3-Coder
        (
            "qwen3_coder",
            "Sure.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
            "<parameter=days>\n2\n</parameter>\n<parameter=exact>\nTrue\n</parameter>\n"
            '<parameter=where>\n{"a": [1]}\n</parameter>\n<parameter=unit>\nnull\n</parameter>\n'
            "</function>\n</tool_call>",
            "Sure.",
            [
                (
                    "get_weather",
                    {"city": "Paris", "days": 2, "exact": True, "where": {"a": [1]}, "unit": None},
                )
            ],
        ),
        (
            "qwen3_coder",
            "<tool_call>\n<function=get_time>\n</function>\n</tool_call>\n<tool_call>\n"
            "<function=get_weather>\n<parameter=city>\n\nif a < b:\n  </p>\n\n</parameter>\n"
            "<parameter=unit>\n5\n</parameter>\n<parameter=days>\nmany\n</parameter>\n"
            "</function>\n</tool_call>",
            "",
            [
                TIME,
                (
                    "get_weather",
                    {"city": "\nif a < b:\n  </p>\n", "unit": "5", "days": "many"},
                ),
            ],
        ),
        # GLM-4.5, and 4.7 without line breaks
        (
            "glm45",
            "I look.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n"
            "<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>\n<tool_call>get_time\n"
            "</tool_call>",
            "I look.",
            [("get_weather", {"city": "Paris", "days": 2}), TIME],
        ),
        (
            "glm47",
            "<tool_call>get_time</tool_call><tool_call>get_weather<arg_key>city</arg_key>"
            "<arg_value>\nif a < b: </arg>\n</arg_value><arg_key>where</arg_key>"
            '<arg_value>{"a": [1]}</arg_value></tool_call>There.',
            "There.",
            [TIME, ("get_weather", {"city": "\nif a < b: </arg>\n", "where": {"a": [1]}})],
        ),
        # MiniMax-M2: several calls in one block
        (
            "minimax-m2",
            'Sure.\n<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">\n'
            'Paris</parameter>\n<parameter name="exact">true</parameter>\n</invoke>\n'
            '<invoke name="get_time">\n</invoke>\n</minimax:tool_call>',
            "Sure.",
            [("get_weather", {"city": "\nParis", "exact": True}), TIME],
        ),
        # Kimi-K2
        (
            "kimi_k2",
            "Hm.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
            '<|tool_call_argument_begin|>{"city": "Paris"}<|tool_call_end|><|tool_call_begin|>'
            "functions.spotify.play:1 <|tool_call_argument_begin|> {}<|tool_call_end|>"
            "<|tool_calls_section_end|>",
            "Hm.",
            [PARIS, ("spotify.play", {})],
        ),
        (
            "kimi_k2",
            "<|tool_calls_section_begin|><|tool_call_begin|>get_time<|tool_call_argument_begin|>{}",
            "",
            [TIME],
        ),
    ],
)
def test_calls_are_found(name: str, text: str, content: str, calls: list[Any]) -> None:
    answer = read(name, text)
    assert (answer.content, answer.calls) == (content, calls)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", "No call, only <tool_cal and \n"),
        ("hermes", "<tool_call>\nnot JSON\n</tool_call>"),
        ("hermes", '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>'),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "get_time", "name": "get_time"}</tool_call>'),
        ("hermes", '<tool_call>{"name": "get_time", "arguments": [1]}</tool_call>'),
        ("hermes", '<tool_call>{"name": "get_time", "arguments": "[1]"}</tool_call>'),
        (
            "hermes",
            ' hm <tool_call>{"name": "get_weather", "arguments": {"city": tru}}</tool_call>',
        ),
        ("hermes", '<tool_call>{"name": "get_weather", "arguments": {"city": "Par'),
        ("hermes", '<tool_call>{"name": "get_time", "arguments": {}'),
        ("hermes", '<tool_call>{"name": "get_time", "arguments": {"a": 01}}</tool_call>'),
        ("llama3", '{"answer": 4}'),
        ("llama3", ' {"name": "Ann", "age": 4}'),
        ("llama3", '<|python_tag|>brave_search.call(query="x")'),
        ("llama3", 'Look: {"name": "get_time", "parameters": {}}'),
        ("mistral", "[TOOL_CALLS] []"),
        ("mistral", "[TOOL_CALLS]nobody[ARGS]{}"),
        ("mistral", "[TOOL_CALLS]get_time[WHAT]{}"),
        ("pythonic", "[1] says so"),
        ("pythonic", "[get_time(1)]"),
        ("pythonic", "[get_weather(city=input())]"),
        ("pythonic", "[get_weather(city='a', city='b')]"),
        ("pythonic", "[get_weather(city='a' 'b')]"),
        ("pythonic", "[get_weather(days=1e999)]"),
        ("pythonic", "[get_weather(city='a'"),
        ("pythonic", "Try [get_time()]"),
        ("qwen3_coder", "<tool_call>\n<function=nobody>\n</function>\n</tool_call>"),
        ("qwen3_coder", "<tool_call>\n<function=get_weather>\n<parameter=city>\nPar"),
        ("qwen3_coder", "<tool_call>\n<function=get_weather>\nno\n</function>\n</tool_call>"),
        ("glm45", "<tool_call>nobody</tool_call>"),
        ("glm45", "<tool_call>get_time and more</tool_call>"),
        ("glm45", "<tool_call>get_time\n<arg_value>2</arg_value></tool_call>"),
        (
            "glm45",
            "<tool_call>get_weather<arg_key>city</arg_key><arg_key>days</arg_key></tool_call>",
        ),
        ("glm45", "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Par"),
        ("glm45", '<tool_call>{"name": "get_time"}</tool_call>'),
        ("minimax-m2", '<invoke name="get_time"></invoke>'),
        ("minimax-m2", '<minimax:tool_call>\n<invoke name="nobody"></invoke></minimax:tool_call>'),
        ("minimax-m2", "<minimax:tool_call><invoke name=get_time></invoke></minimax:tool_call>"),
        (
            "minimax-m2",
            '<minimax:tool_call><invoke name="get_time"><parameter name="></invoke>',
        ),
        ("kimi_k2", "<|tool_calls_section_begin|>nothing<|tool_calls_section_end|>"),
        (
            "kimi_k2",
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.nobody:0"
            "<|tool_call_argument_begin|>{}<|tool_call_end|>",
        ),
        (
            "kimi_k2",
            "<|tool_calls_section_begin|><|tool_call_begin|>get_time:0<|tool_call_argument_begin|>[]",
        ),
    ],
)
def test_what_is_no_call_comes_back_unchanged(name: str, text: str) -> None:
    answer = read(name, text)
    assert (answer.content, answer.calls) == (text, [])


def test_a_good_call_survives_a_bad_one() -> None:
    bad = '<tool_call>{"name": "no", "arguments": {}}</tool_call>'
    good = '<tool_call>{"name": "get_time", "arguments": {}}</tool_call>'
    answer = read("hermes", bad + good + "\nDone.")
    assert answer.calls == [TIME]
    assert answer.content == bad + "\nDone."


def test_more_calls_than_allowed_are_content() -> None:
    one = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
    answer = read("hermes", f"{one}\n{one}", max_calls=1)
    assert (answer.calls, answer.content) == ([TIME], one)
    answer = read("pythonic", "[get_time(), get_time()]", max_calls=1)
    assert (answer.calls, answer.content) == ([TIME], ", get_time()]")


def test_arguments_go_out_while_they_come() -> None:
    parser = CallParser(CALL_FORMATS["hermes"], TOOLS)
    assert parser.feed('<tool_call>\n{"name": "get_wea') == []
    assert parser.feed('ther", "arguments": {"ci') == [
        CallStart("get_weather"),
        CallArguments('{"ci'),
    ]
    assert parser.feed('ty": "Pa') == [CallArguments('ty": "Pa')]
    assert parser.feed('ris"}}') == [CallArguments('ris"}'), CallEnd()]
    assert parser.feed("\n</tool_call>") == []
    assert parser.finish() == []


def test_texts_of_qwen3_coder_go_out_while_they_come() -> None:
    parser = CallParser(CALL_FORMATS["qwen3_coder"], TOOLS)
    events = parser.feed("<tool_call>\n<function=get_weather>\n<parameter=city>\nline\n")
    assert events == [CallStart("get_weather"), CallArguments('{"city": "line')]
    assert parser.feed('two"</para') == [CallArguments('\\ntwo\\"')]
    assert parser.feed("meter>") == [CallArguments('"')]
    assert parser.feed("\n</function>") == [CallArguments("}"), CallEnd()]


def test_texts_of_glm_go_out_while_they_come() -> None:
    parser = CallParser(CALL_FORMATS["glm47"], TOOLS)
    assert parser.feed("<tool_call>get_weather") == []
    events = parser.feed("<arg_key>city</arg_key><arg_value>Par")
    assert events == [CallStart("get_weather"), CallArguments('{"city": "Par')]
    assert parser.feed("is</arg_value><arg_key>days</arg_key><arg_value>1") == [
        CallArguments('is", "days": ')
    ]
    assert parser.feed("2</arg_value></tool_call>") == [CallArguments("12}"), CallEnd()]


def test_calls_of_one_block_are_counted() -> None:
    one = '<invoke name="get_time"></invoke>'
    answer = read("minimax-m2", f"<minimax:tool_call>{one}\n{one}</minimax:tool_call>", max_calls=1)
    assert (answer.calls, answer.content) == ([TIME], f"{one}</minimax:tool_call>")


def test_a_break_in_the_arguments_keeps_what_was_sent() -> None:
    parser = CallParser(CALL_FORMATS["hermes"], TOOLS)
    text = '<tool_call>{"name": "get_time", "arguments": {"a": }}</tool_call>'
    assert parse(parser, [text]) == [
        CallStart("get_time"),
        CallArguments('{"a": '),
        CallBroken('<tool_call>{"name": "get_time", "arguments": {"a": '),
        Content("}}</tool_call>"),
    ]


def test_a_line_break_inside_a_string_is_escaped() -> None:
    text = '<tool_call>{"name": "get_weather", "arguments": {"city":\n"a\nb\t"}}</tool_call>'
    parser = CallParser(CALL_FORMATS["hermes"], TOOLS)
    events = parse(parser, [text])
    assert events[1] == CallArguments('{"city":\n"a\\nb\\t"}')
    assert answer_of(events).calls == [("get_weather", {"city": "a\nb\t"})]


def test_deep_nesting_is_no_call() -> None:
    deep = "[" * 400 + "]" * 400
    answer = read("hermes", f'<tool_call>{{"name": "get_time", "arguments": {{"a": {deep}}}}}')
    assert answer.calls == []
    answer = read("pythonic", f"[get_time(a={deep})]")
    assert answer.calls == []


def test_scanned_json_is_what_python_reads() -> None:
    values: list[Any] = [{}, {"a": [1, -2.5, 1e9, 'x"\\é\u2028', None, True, {"b": []}]}, {"": ""}]
    for value in values:
        for ascii_only in (True, False):
            text = json.dumps(value, ensure_ascii=ascii_only)
            answer = read("mistral", f"[TOOL_CALLS]get_time[ARGS]{text}")
            assert answer.calls == [("get_time", value)]


NINES = "9" * 5000  # Python reads no number with so many digits


@pytest.mark.parametrize(
    "text",
    [
        f'<tool_call>{{"name": {NINES}, "arguments": {{}}}}</tool_call>',
        f'<tool_call>{{"name": "get_time", "arguments": {NINES}}}</tool_call>',
        '<tool_call>{"name": "get_time", "arguments": "{\\"a\\": NaN}"}</tool_call>',
        '<tool_call>{"name": "get_time", "arguments": "{} {}"}</tool_call>',
        '<tool_call>{"name": "get_time", "arguments": ""}</tool_call>',
    ],
)
def test_odd_values_are_no_call(text: str) -> None:
    assert read("hermes", text) == Answer(text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pythonic", r'[get_weather(city="\ud83d?", days=2)]'),
        ("pythonic", r'[get_weather(city="\U0000d83d?", days=2)]'),
        ("qwen3_coder", xml_call(days=2, other=r'["\ud83d?"]')),
        (
            "hermes",
            r'<tool_call>{"name": "get_weather", "arguments": "{\"a\": \"\ud83d?\"}"}</tool_call>',
        ),
    ],
)
def test_half_a_surrogate_pair_can_be_sent(name: str, text: str) -> None:
    events = parse(CallParser(CALL_FORMATS[name], TOOLS), [text])
    answer = answer_of(events)
    assert len(answer.calls) == 1
    written = "".join(event.text for event in events if isinstance(event, CallArguments))
    assert written.isascii()
    assert "\\ud83d" in written


def test_values_of_qwen3_coder_are_json() -> None:
    """JSON has no infinity; a number that is too large is a text."""
    for value in ("1e999", "-1e999", "NaN", "Infinity"):
        answer = read("qwen3_coder", xml_call(days=value))
        ((_, arguments),) = answer.calls
        assert arguments["days"] == value


def test_parentheses_make_a_tuple_only_with_a_comma() -> None:
    answer = read("pythonic", "[get_weather(a=(1), b=(1,), c=(), d=((1, 2)), e=([3]))]")
    ((_, arguments),) = answer.calls
    assert arguments == {"a": 1, "b": [1], "c": [], "d": [1, 2], "e": [3]}


def test_ids_fit_the_templates() -> None:
    assert new_call_id("hermes").startswith("call_")
    assert new_call_id("hermes") != new_call_id("hermes")
    assert len(new_call_id("mistral")) == 9
    assert new_call_id("mistral").isalnum()
    assert new_call_id("kimi_k2", name="get_time", index=2) == "functions.get_time:2"
    assert new_call_id("kimi_k2").startswith("call_")
