"""/v1/messages through raw HTTP, with answers the fake model is given."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import pytest

from sglang.srt.managers.io_struct import FinishReason, PrefillProgress
from srt.entrypoints.anthropic.messages_client import (
    ASK,
    EVERYTHING,
    PATH,
    THOUGHT,
    TIME,
    TOOLS,
    WEATHER,
    accumulated,
    create,
    stream,
)
from srt.entrypoints.fake_service import LiveServer, shown


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    directory = tmp_path_factory.mktemp("messages")
    with LiveServer(directory, tool_call_parser="hermes", reasoning_parser="qwen3") as server:
        yield server


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    """What two replies to one request have in common."""
    blocks = [{k: v for k, v in block.items() if k != "id"} for block in message["content"]]
    return {**{k: v for k, v in message.items() if k != "id"}, "content": blocks}


def test_the_reply_has_exactly_the_shape(server: LiveServer) -> None:
    server.service.answer = "Yes."
    reply = create(server, system="Be brief.", metadata={"user_id": "u"}, temperature=0.5, top_k=7)
    assert reply.pop("id").startswith("msg_")
    assert reply == {
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [{"type": "text", "text": "Yes."}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": len("<system>Be brief.<user>Hi") - 3,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 3,
            "output_tokens": 4,
            "output_tokens_details": {"thinking_tokens": 0},
        },
    }
    params = server.service.requests[0].sampling_params
    assert (params.temperature, params.top_k, params.max_new_tokens) == (0.5, 7, 200)
    assert server.service.requests[0].rid.startswith("msg_")


def test_blocks_of_every_kind(server: LiveServer) -> None:
    server.service.answer = EVERYTHING
    reply = create(server, tools=TOOLS, output_config={"effort": "low"})
    ids = [block.pop("id") for block in reply["content"] if block["type"] == "tool_use"]
    assert reply["content"] == [
        {"type": "thinking", "thinking": "Hm, é.", "signature": ""},
        {"type": "text", "text": "I look."},
        {"type": "tool_use", "name": "get_weather", "input": {"city": "Paris"}},
        {"type": "tool_use", "name": "get_time", "input": {}},
        {"type": "text", "text": "\nDone."},
    ]
    assert all(one.startswith("toolu_") for one in ids)
    assert len(set(ids)) == 2
    assert (reply["stop_reason"], reply["stop_sequence"]) == ("tool_use", None)
    assert reply["usage"]["output_tokens_details"] == {"thinking_tokens": len(THOUGHT)}
    _, kwargs = server.service.templates[0]
    assert kwargs["reasoning_effort"] == "low"
    assert kwargs["tools"] == [
        {
            "type": "function",
            "function": {
                "name": "get_weather",
                "description": "The weather of a city",
                "parameters": TOOLS[0]["input_schema"],
            },
        },
        {"type": "function", "function": {"name": "get_time", "parameters": {}}},
    ]


ANSWERS = {
    "text": "Yes.",
    "space": "  \n",
    "nothing": "",
    "spaced": "  Yes. ",
    "everything": EVERYTHING,
    "calls": f"{WEATHER}\n{TIME}",
    "thought": f"{THOUGHT}",
}


@pytest.mark.parametrize("limit", [200, 20])
@pytest.mark.parametrize("answer", [*ANSWERS.values()], ids=[*ANSWERS])
def test_a_stream_adds_up_to_the_whole_reply(server: LiveServer, answer: str, limit: int) -> None:
    server.service.answer = answer
    is_cut_call = limit == 20 and answer.startswith("<tool_call>")  # told apart below
    if not is_cut_call:
        fields = {"tools": TOOLS, "max_tokens": limit}
        whole = create(server, **fields)
        assert without_ids(accumulated(stream(server, **fields))) == without_ids(whole)


def test_events_come_in_order(server: LiveServer) -> None:
    server.service.answer = f"{THOUGHT}I look.{WEATHER}"
    events = stream(server, tools=TOOLS)
    kinds = [
        event["delta"]["type"] if event["type"] == "content_block_delta" else event["type"]
        for event in events
    ]
    block = ("content_block_start", "content_block_stop")
    assert [kind for kind, _ in groupby(kinds)] == [
        *("message_start", "ping"),
        *(block[0], "thinking_delta", block[1]),
        *(block[0], "text_delta", block[1]),
        *(block[0], "input_json_delta", block[1]),
        *("message_delta", "message_stop"),
    ]
    assert kinds.count("input_json_delta") > 5  # as they come
    assert events[0]["message"]["usage"] == {
        "input_tokens": len("<user>Hi") - 3,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 3,
        "output_tokens": 1,
        "output_tokens_details": {"thinking_tokens": 0},
    }
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == len(server.service.answer)


def test_pings_while_a_long_prompt_is_computed(server: LiveServer) -> None:
    server.service.progress = [PrefillProgress("m", done, 8, 1.0, None) for done in (2, 4, 6)]
    server.service.answer = "Yes."
    kinds = [event["type"] for event in stream(server)]
    assert kinds[:5] == ["message_start", *["ping"] * 3, "content_block_start"]
    assert not server.service.requests[0].return_logprob
    server.service.answer = "No."
    assert create(server)["content"][0]["text"] == "No."
    assert [request.include_progress for request in server.service.requests] == [True, False]


def test_a_broken_call_is_text_but_stays_a_call_in_a_stream(server: LiveServer) -> None:
    server.service.answer = WEATHER
    fields = {"tools": TOOLS, "max_tokens": WEATHER.index("Paris")}
    whole = create(server, **fields)
    assert whole["content"] == [{"type": "text", "text": WEATHER[: WEATHER.index("Paris")]}]
    assert whole["stop_reason"] == "max_tokens"
    events = stream(server, **fields)
    starts = [e["content_block"] for e in events if e["type"] == "content_block_start"]
    assert [(start["type"], start["name"]) for start in starts] == [("tool_use", "get_weather")]
    pieces = [e["delta"]["partial_json"] for e in events if e["type"] == "content_block_delta"]
    assert "".join(pieces) == '{"city": "'
    assert [e["type"] for e in events[-3:]] == [
        *("content_block_stop", "message_delta", "message_stop")
    ]
    assert events[-2]["delta"]["stop_reason"] == "max_tokens"


REASONS = {
    "sequence": (FinishReason("stop", "END"), "stop_sequence", "END"),
    "token": (FinishReason("stop", 7), "end_turn", None),
    "length": (FinishReason("length", length=0), "max_tokens", None),
    "abort": (FinishReason("abort", status_code=499), None, None),
}


@pytest.mark.parametrize(("reason", "stop_reason", "sequence"), REASONS.values(), ids=REASONS)
def test_how_an_answer_ends(
    server: LiveServer, reason: FinishReason, stop_reason: str | None, sequence: str | None
) -> None:
    server.service.refusals["r"] = reason
    expected = {"stop_reason": stop_reason, "stop_sequence": sequence}
    reply = create(server, rid="r", stop_sequences=["END"])
    assert {name: reply[name] for name in expected} == expected
    assert stream(server, rid="r")[-2]["delta"] == expected
    assert server.service.requests[0].sampling_params.stop == ("END",)


def test_thinking_goes_to_the_template(server: LiveServer) -> None:
    server.service.answer = f"{THOUGHT}Yes."
    given: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({"type": "disabled"}, {"enable_thinking": False, "thinking": False}),
        ({"type": "adaptive"}, {"enable_thinking": True, "thinking": True}),
        (
            {"type": "enabled", "budget_tokens": 50, "display": "summarized"},
            {"enable_thinking": True, "thinking": True},
        ),
    ]
    for thinking, expected in given:
        create(server, thinking=thinking or None)
        kwargs = server.service.templates[-1][1]
        assert {k: kwargs[k] for k in kwargs if "thinking" in k} == expected
    budgets = [r.sampling_params.max_thinking_tokens for r in server.service.requests]
    assert budgets == [None, None, None, 50]
    create(server, thinking={"type": "disabled"}, chat_template_kwargs={"thinking": "low"})
    assert server.service.templates[-1][1]["thinking"] == "low"


def test_thinking_that_is_not_shown(server: LiveServer) -> None:
    server.service.answer = f"{THOUGHT}Yes."
    fields = {"thinking": {"type": "enabled", "budget_tokens": 50, "display": "omitted"}}
    reply = create(server, **fields)
    assert reply["content"][0] == {"type": "thinking", "thinking": "", "signature": ""}
    assert reply["content"][1]["text"] == "Yes."
    assert accumulated(stream(server, **fields))["content"] == reply["content"]


def test_a_conversation_becomes_messages(server: LiveServer) -> None:
    def use(number: int) -> dict[str, Any]:
        return {"type": "tool_use", "id": f"t{number}", "name": "f", "input": {"a": 1 << 60}}

    create(
        server,
        system=[
            {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": "Be kind."},
        ],
        messages=[
            {"role": "user", "content": "One"},
            {"role": "user", "content": [{"type": "text", "text": "Two"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "A", "signature": "s"},
                    {"type": "redacted_thinking", "data": "x"},
                    {"type": "text", "text": "I look."},
                    use(1),
                    use(2),
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": "sun"},
                    {
                        "type": "tool_result",
                        "tool_use_id": "t2",
                        "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                        "is_error": True,
                    },
                    {"type": "tool_result", "tool_use_id": "t3"},
                    {"type": "text", "text": "And?"},
                ],
            },
            {"role": "system", "content": "Now be long."},
            {"role": "assistant", "content": []},
        ],
    )

    def called(number: int) -> dict[str, Any]:
        function = {"name": "f", "arguments": {"a": 1 << 60}}
        return {"id": f"t{number}", "type": "function", "function": function}

    assert shown(server) == [
        {"role": "system", "content": "Be brief.\nBe kind."},
        {"role": "user", "content": "One\nTwo"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "A",
            "tool_calls": [called(1), called(2)],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "sun"},
        {"role": "tool", "tool_call_id": "t2", "content": "a\nb"},
        {"role": "tool", "tool_call_id": "t3", "content": ""},
        {"role": "user", "content": "And?"},
        {"role": "system", "content": "Now be long."},
    ]
    assert server.service.templates[-1][1]["continue_final_message"] is False


def test_an_answer_goes_on_with_the_assistants_message(server: LiveServer) -> None:
    server.service.answer = "is.\n</think>\nYes."
    begun = {"role": "assistant", "content": "<think>It"}
    reply = create(server, messages=[*ASK, begun])
    assert server.service.templates[-1][1]["continue_final_message"] is True
    assert reply["content"] == [
        {"type": "thinking", "thinking": "is.", "signature": ""},
        {"type": "text", "text": "Yes."},
    ]


def test_choices_of_tools(server: LiveServer) -> None:
    server.service.answer = '[{"name": "get_time", "parameters": {}}]'
    for choice in ({"type": "any"}, {"type": "tool", "name": "get_time"}):
        reply = create(server, tools=TOOLS, tool_choice=choice)
        (block,) = reply["content"]
        assert (block["name"], block["input"], reply["stop_reason"]) == ("get_time", {}, "tool_use")
        constraint = server.service.requests[-1].sampling_params.constraint
        assert constraint is not None
        allowed = json.loads(constraint.text)["items"]["anyOf"]
        assert len(allowed) == (2 if choice["type"] == "any" else 1)
    reply = create(server, tools=TOOLS, tool_choice={"type": "none"})
    assert [block["type"] for block in reply["content"]] == ["text"]
    assert "tools" not in server.service.templates[-1][1]
    server.service.answer = f"{WEATHER}\n{TIME}"
    one = {"type": "auto", "disable_parallel_tool_use": True}
    reply = create(server, tools=TOOLS, tool_choice=one)
    assert [block["type"] for block in reply["content"]] == ["tool_use", "text"]


def test_numbers_of_a_call_come_as_the_model_wrote_them(server: LiveServer) -> None:
    server.service.answer = WEATHER.replace('"Paris"', "123456789012345678901234567890")
    (block,) = create(server, tools=TOOLS)["content"]
    assert block["input"] == {"city": 123456789012345678901234567890}


def test_a_schema(server: LiveServer) -> None:
    server.service.answer = '{"name": "Oslo"}'
    schema = {"type": "object", "properties": {"name": {"type": "string"}}}
    reply = create(server, output_config={"format": {"type": "json_schema", "schema": schema}})
    assert reply["content"] == [{"type": "text", "text": server.service.answer}]
    constraint = server.service.requests[0].sampling_params.constraint
    assert constraint is not None
    assert (constraint.kind, json.loads(constraint.text)) == ("json_schema", schema)


def test_strict_tools_are_held_to_their_schemas(server: LiveServer) -> None:
    create(server, tools=[{**TOOLS[0], "strict": True}])
    constraint = server.service.requests[0].sampling_params.constraint
    assert constraint is not None
    assert constraint.kind == "structural_tag"


def test_counting_tokens(server: LiveServer) -> None:
    body = {"model": "m", "system": "Be brief.", "messages": ASK, "tools": TOOLS}
    reply = server.post(f"{PATH}/count_tokens", body)
    assert (reply.status_code, reply.json()) == (
        200,
        {"input_tokens": len("<system>Be brief.<user>Hi")},
    )
    assert server.service.templates[0][1]["tools"][0]["function"]["name"] == "get_weather"
    assert server.service.requests == []
    usage = create(server, system="Be brief.", tools=TOOLS)["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == reply.json()["input_tokens"]
    refused = server.post(f"{PATH}/count_tokens", {**body, "max_tokens": 5})
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == "Unknown field 'max_tokens'."
