"""The demo model through real clients over real sockets."""

from __future__ import annotations

import re
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from e2e.server_process import ServerProcess, wait_until

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]


def memory(server: ServerProcess) -> dict[str, Any]:
    found: Any = server.server_info()["memory"]
    return found


def test_the_capital_of_france(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="default", messages=QUESTION, temperature=0, max_tokens=40
    )
    choice = answer.choices[0]
    assert "Paris" in (choice.message.content or "")
    assert choice.finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_streamed_it_is_the_same_text(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model="default", messages=QUESTION, temperature=0, max_tokens=40
    )
    stream = client.chat.completions.create(
        model="default",
        messages=QUESTION,
        temperature=0,
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
    )
    pieces, usage = [], None
    for event in stream:
        usage = event.usage or usage
        pieces += [choice.delta.content or "" for choice in event.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert usage == whole.usage
    assert len([piece for piece in pieces if piece]) > 3, "it came in pieces"


def test_thirty_two_streams_at_once_all_complete(client: openai.OpenAI) -> None:
    def ask(number: int) -> tuple[str, str]:
        stream = client.completions.create(
            model="default",
            prompt=f"{number}, {number + 1},",
            temperature=0,
            max_tokens=12,
            stream=True,
        )
        text, reason = "", ""
        for event in stream:
            text += event.choices[0].text
            reason = event.choices[0].finish_reason or reason
        return text, reason

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, range(32)))
    assert all(text for text, _ in answers)
    assert all(reason in ("stop", "length") for _, reason in answers)


def test_a_vanished_client_is_forgotten(server: ServerProcess) -> None:
    body = (
        b'{"text": "Once upon a time", "stream": true, "rid": "vanishes",'
        b' "sampling_params": {"max_new_tokens": 4000, "ignore_eos": true}}'
    )
    head = (
        f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + body)
        assert b"200 OK" in connection.recv(4096)

        def rids() -> list[str]:
            return [entry["rid"] for entry in server.requests()]

        assert wait_until(lambda: "vanishes" in rids())
    # By itself it would end much later, after 4,000 tokens.
    assert wait_until(lambda: "vanishes" not in rids(), timeout_s=10)


def test_memory_is_given_back_after_a_burst(server: ServerProcess) -> None:
    assert wait_until(lambda: memory(server)["mapped_bytes"] == 0, timeout_s=20)
    before = memory(server)["resident_bytes"]
    prompts = [f"Story number {i}: " + "the cat sat on the mat. " * 30 for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        asked = [
            pool.submit(
                server.post, "/generate", {"text": text, "sampling_params": {"max_new_tokens": 8}}
            )
            for text in prompts
        ]
        # Looked for while they run: what is idle goes back within a second or two of the last.
        high = before + (16 << 20)
        assert wait_until(lambda: memory(server)["resident_bytes"] > high, timeout_s=100)
        assert [one.result().status_code for one in asked] == [200] * len(prompts)
    assert wait_until(lambda: memory(server)["mapped_bytes"] == 0, timeout_s=20)
    idle = memory(server)
    assert idle["resident_bytes"] == before == idle["fixed_bytes"], "by the system's own figure"
    assert idle["pages"] == {"free": 0, "used": 0, "cached": 0}
    assert idle["segments"]["mapped"] == 0


def test_effective_context_is_what_models_and_errors_say(server: ServerProcess) -> None:
    info = memory(server)
    model = server.get("/v1/models").json()["data"][0]
    assert model["max_model_len"] == info["context_length"] <= info["capacity_tokens"]
    limit = info["context_length"]
    ids = np.ones(limit, int).tolist()
    reply = server.post("/generate", {"input_ids": ids})
    assert reply.status_code == 400
    assert str(limit) in reply.json()["error"]["message"]


def test_n_sequences_with_seeds_and_logprobs(server: ServerProcess) -> None:
    request = {
        "text": "The sky is",
        "sampling_params": {
            "max_new_tokens": 6,
            "n": 3,
            "temperature": 1.0,
            "sampling_seed": 11,
        },
        "return_logprob": True,
        "top_logprobs_num": 2,
        "logprob_start_len": 0,
    }
    first = server.post("/generate", request).json()
    again = server.post("/generate", request).json()
    assert len(first) == 3
    assert [one["output_ids"] for one in first] == [one["output_ids"] for one in again]
    assert len({tuple(one["output_ids"]) for one in first}) > 1
    meta = first[0]["meta_info"]
    assert len(meta["output_token_logprobs"]) == len(first[0]["output_ids"])
    assert len(meta["input_token_logprobs"]) == meta["prompt_tokens"]
    assert meta["input_token_logprobs"][0][0] is None
    assert all(entry[0] <= 0 for entry in meta["input_token_logprobs"][1:])


@pytest.mark.parametrize("field", ["stop", "stop_regex"])
def test_stop_string_is_never_shown(server: ServerProcess, field: str) -> None:
    plain = server.post(
        "/generate",
        {"text": "1, 2, 3, 4,", "sampling_params": {"temperature": 0, "max_new_tokens": 24}},
    ).json()
    text = plain["text"][6:9]
    stop = text if field == "stop" else f"{re.escape(text[0])}.{re.escape(text[2])}"
    with httpx.stream(
        "POST",
        f"{server.url}/generate",
        json={
            "text": "1, 2, 3, 4,",
            "stream": True,
            "sampling_params": {"temperature": 0, "max_new_tokens": 24, field: [stop]},
        },
        timeout=60,
    ) as response:
        events = [line[6:] for line in response.iter_lines() if line.startswith("data: {")]
    texts = [httpx.Response(200, text=event).json()["text"] for event in events]
    found = re.search(re.escape(stop) if field == "stop" else stop, plain["text"])
    assert found is not None
    cut = plain["text"][: found.start()]
    assert texts[-1] == cut
    assert all(cut.startswith(text) for text in texts)
    last = httpx.Response(200, text=events[-1]).json()["meta_info"]["finish_reason"]
    assert last == {"type": "stop", "matched": stop}


def test_a_session_computes_what_is_new(server: ServerProcess) -> None:
    greedy = {"temperature": 0, "max_new_tokens": 70}
    session = server.post("/open_session", {"capacity_of_str_len": 10000}).json()
    ask = {"sampling_params": greedy, "return_prompt_token_ids": True}
    opening = {**ask, "text": "1, 2, 3, 4,", "session_params": {"id": session}}
    first = server.post("/generate", opening).json()
    wanted = {"id": session, "rid": first["meta_info"]["id"]}
    more = {**ask, "text": " and then", "session_params": wanted}
    second = server.post("/generate", more).json()
    ids = first["prompt_token_ids"] + first["output_ids"]
    whole = {"input_ids": ids + second["prompt_token_ids"], "sampling_params": greedy}
    alone = server.post("/generate", whole).json()
    assert second["output_ids"] == alone["output_ids"]
    assert second["meta_info"]["prompt_tokens"] == len(whole["input_ids"])
    assert second["meta_info"]["cached_tokens"] >= len(ids) - 64
    assert server.post("/close_session", {"session_id": session}).status_code == 200


def test_bad_requests_are_answered_and_the_server_lives(server: ServerProcess) -> None:
    bodies = [
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"text": 5}',
        b'{"text": ""}',
        b'{"input_ids": [-1]}',
        b'{"input_ids": [99999999]}',
        b'{"input_ids": []}',
        b'{"text": "a", "sampling_params": {"temperature": -1}}',
        b'{"text": "a", "sampling_params": {"max_new_tokens": 1e400}}',
        b'{"text": "a", "sampling_params": {"regex": "(a"}}',
        b'{"text": "a", "sampling_params": {"structural_tag": "{}"}}',
        b'{"text": "a", "image_data": "x"}',
    ]
    for body in bodies:
        reply = httpx.post(
            f"{server.url}/generate", content=body, headers={"Content-Type": "application/json"}
        )
        assert reply.status_code == 400, (body, reply.text)
        assert reply.json()["error"]["message"], body
    for body in bodies[:3]:
        reply = httpx.post(f"{server.url}/v1/chat/completions", content=body)
        assert reply.status_code == 400
        assert reply.json()["object"] == "error"
    assert server.get("/health").status_code == 200


def test_flush_info_and_metrics(server: ServerProcess) -> None:
    assert server.post("/generate", {"text": "Hello"}).status_code == 200
    assert wait_until(lambda: server.get("/flush_cache").status_code == 200)
    assert server.get("/health_generate").status_code == 200
    assert "sglang:num_running_reqs" in server.get("/metrics").text
    assert server.get("/get_model_info").json()["is_generation"] is True
    assert server.get("/v1/models/no-such-model").status_code == 404
