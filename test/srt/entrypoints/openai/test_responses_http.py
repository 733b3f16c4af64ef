"""/v1/responses through the openai package and raw HTTP, with answers the fake model is given."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import openai
import pydantic
import pytest

from srt.entrypoints.fake_service import LiveServer, http_post, shown
from srt.entrypoints.openai.responses_client import (
    EVERYTHING,
    PATH,
    THOUGHT,
    TIME,
    TOOLS,
    WEATHER,
    accumulated,
    create,
    post,
    stream,
)


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    directory = tmp_path_factory.mktemp("responses")
    with LiveServer(directory, tool_call_parser="hermes", reasoning_parser="qwen3") as server:
        yield server


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as one:
        yield one


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    """What two responses to one request have in common."""
    output = [
        {k: v for k, v in i.items() if k not in ("id", "call_id")} for i in response["output"]
    ]
    own = ("id", "created_at", "completed_at")
    return {**{k: v for k, v in response.items() if k not in own}, "output": output}


def test_the_reply_has_exactly_the_shape(server: LiveServer) -> None:
    server.service.answer = "Yes."
    reply = create(server, instructions="Be brief.", metadata={"a": "b"}, user="u", temperature=0.5)
    (message,) = reply["output"]
    assert reply["id"].startswith("resp_")
    assert message.pop("id").startswith("msg_")
    assert reply["completed_at"] >= reply["created_at"] > 0
    assert message == {
        "type": "message",
        "status": "completed",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "Yes.", "annotations": [], "logprobs": []}],
    }
    own = ("id", "created_at", "completed_at", "output")
    assert {name: value for name, value in reply.items() if name not in own} == {
        "object": "response",
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "usage": {
            "input_tokens": len("<system>Be brief.<user>Hi"),
            "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
            "output_tokens": 4,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": len("<system>Be brief.<user>Hi") + 4,
        },
        "background": False,
        "instructions": "Be brief.",
        "max_output_tokens": None,
        "max_tool_calls": None,
        "metadata": {"a": "b"},
        "model": "m",
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "prompt_cache_key": None,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": None,
        "service_tier": "default",
        "store": True,
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "truncation": "disabled",
        "user": "u",
        "temperature": 0.5,
        "top_p": 1.0,
    }


def test_items_of_every_kind(server: LiveServer) -> None:
    server.service.answer = EVERYTHING
    reply = create(server, tools=TOOLS, reasoning={"effort": "low", "summary": "auto"})
    thought, look, weather, time, done = reply["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "Hm, é."}]
    assert (thought["summary"], thought["encrypted_content"]) == ([], None)
    assert [item["content"][0]["text"] for item in (look, done)] == ["I look.", "\nDone."]
    assert (weather["name"], json.loads(weather["arguments"])) == ("get_weather", {"city": "Paris"})
    assert (time["name"], time["arguments"]) == ("get_time", "{}")
    assert weather["call_id"] != time["call_id"]
    ids = [item["id"] for item in reply["output"]]
    assert [name.split("_")[0] for name in ids] == ["rs", "msg", "fc", "fc", "msg"]
    assert len(set(ids)) == len(ids)
    assert {item["status"] for item in reply["output"]} == {"completed"}
    assert reply["usage"]["output_tokens_details"] == {"reasoning_tokens": len(THOUGHT)}
    assert reply["tools"] == TOOLS
    _, kwargs = server.service.templates[0]
    assert kwargs["reasoning_effort"] == "low"
    assert kwargs["tools"][0]["function"]["description"] == "The weather of a city"


ANSWERS = {
    "text": "Yes.",
    "space": "  \n",
    "nothing": "",
    "spaced": "  Yes. ",
    "everything": EVERYTHING,
    "calls": f"{WEATHER}\n{TIME}",
    "thought": f"{THOUGHT}",
}


@pytest.mark.parametrize("limit", [None, 20])
@pytest.mark.parametrize("answer", [*ANSWERS.values()], ids=[*ANSWERS])
def test_a_stream_ends_with_the_whole_reply(
    server: LiveServer, answer: str, limit: int | None
) -> None:
    server.service.answer = answer
    fields = {"tools": TOOLS, "max_output_tokens": limit}
    events = stream(server, **fields)
    whole = create(server, **fields)
    last = events[-1]
    assert last["type"] == f"response.{last['response']['status']}"
    is_cut_call = limit is not None and answer.startswith("<tool_call>")  # told apart below
    if not is_cut_call:
        assert without_ids(last["response"]) == without_ids(whole)
    assert last["response"]["output"] == accumulated(events)
    assert [e["type"] for e in events[:2]] == ["response.created", "response.in_progress"]
    assert events[0]["response"] == events[1]["response"]
    assert (events[0]["response"]["status"], events[0]["response"]["output"]) == ("in_progress", [])


def test_events_come_in_order(server: LiveServer) -> None:
    server.service.answer = f"{THOUGHT}I look.{WEATHER}"
    kinds = [event["type"].removeprefix("response.") for event in stream(server, tools=TOOLS)]
    text = ["content_part.done", "output_item.done"]
    assert [kind for kind, _ in groupby(kinds)] == [
        "created",
        "in_progress",
        *("output_item.added", "content_part.added"),
        *("reasoning_text.delta", "reasoning_text.done", *text),
        *(
            "output_item.added",
            "content_part.added",
            "output_text.delta",
            "output_text.done",
            *text,
        ),
        *("output_item.added", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    assert kinds.count("function_call_arguments.delta") > 5  # as they come


def test_a_broken_call_is_text_but_stays_a_call_in_a_stream(server: LiveServer) -> None:
    server.service.answer = WEATHER
    fields = {"tools": TOOLS, "max_output_tokens": WEATHER.index("Paris")}
    whole = create(server, **fields)
    (message,) = whole["output"]
    assert message["content"][0]["text"] == WEATHER[: WEATHER.index("Paris")]
    assert message["status"] == whole["status"] == "incomplete"
    response = stream(server, **fields)[-1]["response"]
    (call,) = response["output"]
    assert (call["name"], call["status"]) == ("get_weather", "incomplete")
    assert create(server, previous_response_id=response["id"], input="On")["status"] == "completed"
    assert shown(server) == [{"role": "user", "content": text} for text in ("Hi", "On")]


def test_an_answer_cut_short(client: openai.OpenAI, server: LiveServer) -> None:
    reply = client.responses.create(model="d", input="Hi", max_output_tokens=5)
    assert (reply.status, reply.output_text) == ("incomplete", "Paris")
    assert reply.incomplete_details is not None
    assert reply.incomplete_details.reason == "max_output_tokens"
    assert reply.completed_at is None


def test_the_client_creates_and_streams_the_same(client: openai.OpenAI, server: LiveServer) -> None:
    server.service.answer = EVERYTHING
    reply = client.responses.create(model="d", input="Hi", tools=TOOLS)
    assert reply.output_text == "I look.\nDone."
    assert [item.type for item in reply.output] == [
        "reasoning",
        "message",
        "function_call",
        "function_call",
        "message",
    ]
    with client.responses.stream(model="d", input="Hi", tools=TOOLS) as events:
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
        final = events.get_final_response()
    assert "".join(deltas) == final.output_text == reply.output_text
    (call, _) = [item for item in final.output if item.type == "function_call"]
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Paris"})
    assert client.responses.retrieve(final.id).output_text == final.output_text
    client.responses.delete(final.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(final.id)


class City(pydantic.BaseModel):
    name: str


def test_a_schema(client: openai.OpenAI, server: LiveServer) -> None:
    server.service.answer = '{"name": "Oslo"}'
    reply = client.responses.parse(model="d", input="Hi", text_format=City)
    assert reply.output_parsed == City(name="Oslo")
    constraint = server.service.requests[0].sampling_params.constraint
    assert constraint is not None
    assert constraint.kind == "json_schema"
    assert json.loads(constraint.text)["required"] == ["name"]
    raw = {"type": "json_schema", "name": "City", "schema": {"type": "object"}, "strict": True}
    echo = create(server, text={"format": raw})["text"]["format"]
    assert echo == {**raw, "description": None}
    create(server, text={"format": {"type": "json_object"}})
    constraint = server.service.requests[2].sampling_params.constraint
    assert constraint is not None
    assert json.loads(constraint.text) == {"type": "object"}


def test_forced_and_forbidden_calls(server: LiveServer) -> None:
    server.service.answer = '[{"name": "get_time", "parameters": {}}]'
    choice = {"type": "function", "name": "get_time"}
    reply = create(server, tools=TOOLS, tool_choice=choice)
    (call,) = reply["output"]
    assert (call["name"], call["arguments"], reply["tool_choice"]) == ("get_time", "{}", choice)
    reply = create(server, tools=TOOLS, tool_choice="none")
    assert [item["type"] for item in reply["output"]] == ["message"]
    assert "tools" not in server.service.templates[1][1]


def test_one_call_when_calls_may_not_be_parallel(server: LiveServer) -> None:
    server.service.answer = f"{WEATHER}\n{TIME}"
    reply = create(server, tools=TOOLS, parallel_tool_calls=False)
    assert [item["type"] for item in reply["output"]] == ["function_call", "message"]


def test_items_become_messages(server: LiveServer) -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'}
    items = [
        {"role": "developer", "content": "Be kind."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Well?"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "A"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        call,
        {**call, "call_id": "c2"},
        {"type": "function_call_output", "call_id": "c1", "output": "sun"},
        {
            "type": "function_call_output",
            "call_id": "c2",
            "output": [{"type": "input_text", "text": "rain"}],
        },
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "B"}]},
        {**call, "call_id": "c3"},
        {"type": "reasoning", "summary": [], "encrypted_content": "xyz"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "left"}]},
        {"role": "user", "content": "And?"},
    ]
    create(server, instructions="Be brief.", input=items)

    def called(number: int) -> dict[str, Any]:
        function = {"name": "f", "arguments": {"a": 1}}
        return {"id": f"c{number}", "type": "function", "function": function}

    assert shown(server) == [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": "Well?"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "A",
            "tool_calls": [called(1), called(2)],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sun"},
        {"role": "tool", "tool_call_id": "c2", "content": "rain"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "B",
            "thinking": "B",
            "tool_calls": [called(3)],
        },
        {"role": "user", "content": "And?"},
    ]


def test_a_conversation_goes_on_by_its_id(client: openai.OpenAI, server: LiveServer) -> None:
    server.service.answer = f"{THOUGHT}I look.{WEATHER}"
    first = client.responses.create(model="d", input="Weather?", tools=TOOLS, instructions="Old.")
    call = next(item for item in first.output if item.type == "function_call")
    server.service.answer = "Sunny."
    second = client.responses.create(
        model="d",
        previous_response_id=first.id,
        instructions="New.",
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "sun"}],
    )
    assert (second.previous_response_id, second.output_text) == (first.id, "Sunny.")
    third = client.responses.create(model="d", previous_response_id=second.id, input="Sure?")
    messages = shown(server)
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "assistant", "user"]
    assert [m["content"] for m in messages] == ["Weather?", "I look.", "sun", "Sunny.", "Sure?"]
    assert messages[1]["reasoning_content"] == "Hm, é."
    assert messages[1]["tool_calls"][0]["id"] == messages[2]["tool_call_id"] == call.call_id
    assert shown(server, 1)[0] == {"role": "system", "content": "New."}
    client.responses.delete(second.id)  # third still knows what was said
    client.responses.create(model="d", previous_response_id=third.id, input="Bye")
    assert len(shown(server)) == 7


def test_a_long_conversation_goes_on(server: LiveServer) -> None:
    """Long enough to be read and kept off the event loop."""
    server.service.context_length = 1 << 20
    first = stream(server, input="é" * 70_000)[-1]["response"]
    create(server, input="And?", previous_response_id=first["id"])
    question, answer, more = shown(server)
    assert question == {"role": "user", "content": "é" * 70_000}
    assert answer == {"role": "assistant", "content": server.service.answer}
    assert more == {"role": "user", "content": "And?"}


def test_what_is_not_kept_is_not_found(server: LiveServer) -> None:
    unkept = create(server, store=False)
    assert unkept["store"] is False
    for response_id in (unkept["id"], "resp_unknown", "x" * 1000):
        replies = [
            server.request("GET", f"{PATH}/{response_id}"),
            server.request("DELETE", f"{PATH}/{response_id}"),
            server.request("POST", f"{PATH}/{response_id}/cancel"),
            post(server, previous_response_id=response_id),
        ]
        for reply in replies:
            assert reply.status_code == 404
            error = reply.json()["error"]
            assert f"'{response_id}'" in error.pop("message")
            assert error == {"type": "invalid_request_error", "param": None, "code": None}


def test_a_kept_response_is_repeated_to_the_letter(server: LiveServer) -> None:
    server.service.answer = EVERYTHING
    whole = create(server, tools=TOOLS)
    last = stream(server, tools=TOOLS)[-1]["response"]
    for response in (whole, last):
        assert server.request("GET", f"{PATH}/{response['id']}").json() == response
    reply = server.request("GET", f"{PATH}/{whole['id']}?stream=true")
    assert reply.status_code == 400
    assert "'stream'" in reply.json()["error"]["message"]
    assert server.request("POST", f"{PATH}/{whole['id']}/cancel").json() == whole
    gone = server.request("DELETE", f"{PATH}/{whole['id']}")
    assert gone.json() == {"id": whole["id"], "object": "response", "deleted": True}


def test_a_running_response_is_seen_and_cancelled(server: LiveServer) -> None:
    server.service.hold_at["r"] = 3
    body = b'{"model":"m","input":"x","rid":"r","stream":true}'
    with server.raw(http_post(PATH, body)) as connection:
        data = b""
        while b"output_text.delta" not in data:
            data += connection.recv(1 << 16)
        head = data[data.index(b"data: ") + 6 :]
        response = json.loads(head[: head.index(b"\n")])["response"]
        url = f"{PATH}/{response['id']}"
        assert server.request("GET", url).json() == response
        cancelled = server.request("POST", f"{url}/cancel").json()
        assert cancelled == {**response, "status": "cancelled"}
        while not data.endswith(b"0\r\n\r\n"):
            data += connection.recv(1 << 16)
    assert server.service.aborts == [(f"r_{response['id']}", False)]
    assert b"event: response.incomplete" in data
    ended = server.request("GET", url).json()
    assert (ended["status"], ended["incomplete_details"]) == ("cancelled", None)
    assert ended["output"][0]["content"][0]["text"] == "Par"


def test_log_probabilities(server: LiveServer) -> None:
    server.service.answer = f"{THOUGHT}\nYes.\n"
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    events = stream(server, **fields)
    for response in (events[-1]["response"], create(server, **fields)):
        (part,) = response["output"][1]["content"]
        assert [one["token"] for one in part["logprobs"]] == list(server.service.answer)
        assert {len(one["top_logprobs"]) for one in part["logprobs"]} == {2}
    assert accumulated(events)[1]["content"][0]["text"] == part["text"]


def test_a_priority_is_told_only_where_it_is_named(server: LiveServer) -> None:
    for fields, told in (({}, None), ({"priority": 3}, 3)):
        reply = server.post("/v1/responses", {"model": "m", "input": "x", **fields})
        assert reply.status_code == 200
        assert server.service.requests[-1].priority == told
