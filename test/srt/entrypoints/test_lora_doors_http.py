"""LoRA adapters through the doors: who names one how, what is listed, loaded and unloaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang.srt.managers.io_struct import ControlReply
from srt.entrypoints.fake_service import CONTEXT_LENGTH, LiveServer

PARAMS = {"max_new_tokens": 1}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("model")
    flags = {"lora_paths": ["a=/there/a", "b:c=/there/b"], "max_loras_per_batch": 2}
    with LiveServer(folder, max_loaded_loras=3, **flags) as one:
        yield one


def named(server: LiveServer, path: str, body: dict[str, Any]) -> list[str | None]:
    """The adapters of the sequences that a call becomes."""
    server.service.requests.clear()
    reply = server.post(path, body)
    assert reply.status_code == 200, reply.text
    if "model" in body:
        assert reply.json()["model"] == body["model"]
    return [request.lora_path for request in server.service.requests]


@pytest.mark.parametrize(
    ("lora_path", "expected"),
    [
        ("a", ["a", "a"]),
        (["a", None], ["a", None]),
        (["b:c", "a"], ["b:c", "a"]),
        (None, [None, None]),
        ("", [None, None]),
    ],
)
def test_generate_names_one_adapter_or_one_each(
    server: LiveServer, lora_path: Any, expected: list[str | None]
) -> None:
    body = {"text": ["x", "y"], "sampling_params": PARAMS, "lora_path": lora_path}
    assert named(server, "/generate", body) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model": "tiny:a"}, "a"),
        ({"model": "other:a"}, "a"),
        ({"model": "tiny:b:c"}, "b:c"),
        ({"model": "a"}, "a"),
        ({"model": "b:c"}, "b:c"),
        ({"model": "tiny"}, None),
        ({"model": "tiny:"}, None),
        ({"model": "whatever"}, None),
        ({"model": "tiny", "lora_path": "a"}, "a"),
        ({"model": "tiny:a", "lora_path": "b:c"}, "a"),
    ],
)
def test_openai_endpoints_name_it_in_the_model_first(
    server: LiveServer, fields: dict[str, Any], expected: str | None
) -> None:
    messages = [{"role": "user", "content": "x"}]
    chat = {"messages": messages, "max_tokens": 1, **fields}
    assert named(server, "/v1/chat/completions", chat) == [expected]
    completion = {"prompt": ["x", "y"], "max_tokens": 1, **fields}
    assert named(server, "/v1/completions", completion) == [expected, expected]
    response = {"input": "x", "max_output_tokens": 1, **fields}
    assert named(server, "/v1/responses", response) == [expected]


def test_completions_name_one_for_each_prompt(server: LiveServer) -> None:
    body = {"model": "tiny", "prompt": ["x", "y"], "max_tokens": 1, "lora_path": ["a", None]}
    assert named(server, "/v1/completions", body) == ["a", None]
    assert named(server, "/v1/completions", {**body, "model": "tiny:b:c"}) == ["b:c", "b:c"]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (
            "/generate",
            {"text": "x", "lora_path": "z"},
            "The LoRA adapter 'z' is not loaded; loaded are: 'a', 'b:c'.",
        ),
        (
            "/v1/completions",
            {"model": "tiny:z", "prompt": "x"},
            "The LoRA adapter 'z' is not loaded; loaded are: 'a', 'b:c'.",
        ),
        (
            "/generate",
            {"text": ["x", "y"], "lora_path": ["a"]},
            "Invalid value for 'lora_path': 1 values for 2 prompts",
        ),
        (
            "/generate",
            {"text": "x", "lora_id": 1},
            "Invalid value for 'lora_id': name the adapter in lora_path",
        ),
    ],
)
def test_what_is_not_there_is_named(
    server: LiveServer, path: str, body: dict[str, Any], message: str
) -> None:
    reply = server.post(path, body)
    assert reply.status_code == 400
    error = reply.json()
    text = error["message"] if path.startswith("/v1") else error["error"]["message"]
    assert text.rstrip(".") == message.rstrip(".")


def test_models_lists_adapters_below_the_base(server: LiveServer) -> None:
    cards = server.request("GET", "/v1/models").json()["data"]
    shown = [(card["id"], card["root"], card["parent"]) for card in cards]
    assert shown == [
        ("tiny", "tiny", None),
        ("a", "/there/a", "tiny"),
        ("b:c", "/there/b", "tiny"),
    ]
    assert {card["max_model_len"] for card in cards} == {CONTEXT_LENGTH}
    assert server.request("GET", "/v1/models/b:c").json() == cards[2]
    assert server.request("GET", "/v1/models/z").status_code == 404


def test_loading_and_unloading(server: LiveServer) -> None:
    service = server.service
    service.pool_replies["load_lora_adapter"] = ControlReply(1, True)
    service.pool_replies["unload_lora_adapter"] = ControlReply(1, True)
    service.pool_asked.clear()
    body = {"lora_name": "new", "lora_path": "/there/new"}
    reply = server.post("/load_lora_adapter", body)
    there = {"a": "/there/a", "b:c": "/there/b"}
    whole = {**there, "new": "/there/new"}
    assert reply.status_code == 200
    assert reply.json() == {"success": True, "error_message": "", "loaded_adapters": whole}
    assert named(server, "/generate", {"text": "x", "lora_path": "new"}) == ["new"]
    reply = server.post("/unload_lora_adapter", {"lora_name": "new"})
    assert reply.status_code == 200
    assert reply.json() == {"success": True, "error_message": "", "loaded_adapters": there}
    assert server.post("/generate", {"text": "x", "lora_path": "new"}).status_code == 400
    asked = [(op, args) for op, _, args in service.pool_asked]
    assert asked == [
        (
            "load_lora_adapter",
            {"adapter_id": 3, "name": "new", "path": "/there/new", "pinned": False},
        ),
        ("unload_lora_adapter", {"adapter_id": 3}),
    ]


def test_what_can_not_be_loaded_is_told(server: LiveServer) -> None:
    service = server.service
    service.pool_replies["load_lora_adapter"] = ControlReply(1, False, "/x is no directory")
    service.pool_replies["unload_lora_adapter"] = ControlReply(1, True)

    def refused(path: str, **body: Any) -> str:
        reply = server.post(path, body)
        assert reply.status_code == 400
        answer = reply.json()
        assert answer["success"] is False
        assert sorted(answer["loaded_adapters"]) == ["a", "b:c"]
        return str(answer["error_message"])

    assert refused("/load_lora_adapter", lora_name="x", lora_path="/x") == "/x is no directory"
    text = "The LoRA adapter 'a' is loaded already; unload it first."
    assert refused("/load_lora_adapter", lora_name="a", lora_path="/x") == text
    text = "lora_name and lora_path must be given."
    assert refused("/load_lora_adapter", lora_name="x") == text
    text = "The LoRA adapter 'x' is not loaded."
    assert refused("/unload_lora_adapter", lora_name="x") == text
    service.pool_replies["load_lora_adapter"] = ControlReply(1, True)
    pinned = {"lora_path": "/x", "pinned": True}
    assert server.post("/load_lora_adapter", {"lora_name": "p", **pinned}).status_code == 200
    for name, text in (
        ("q", "No more than 3 LoRA adapters may be loaded (--max-loaded-loras)."),
        ("p", "The LoRA adapter 'p' is loaded already; unload it first."),
    ):
        reply = server.post("/load_lora_adapter", {"lora_name": name, "lora_path": "/x"})
        assert (reply.status_code, reply.json()["error_message"]) == (400, text)
    assert server.post("/unload_lora_adapter", {"lora_name": "a"}).status_code == 200
    reply = server.post("/load_lora_adapter", {"lora_name": "q", **pinned})
    text = "2 pinned adapters leave no place for others: --max-loras-per-batch is 2"
    assert (reply.status_code, reply.json()["error_message"]) == (400, text)
    for body, name in (({"lora_name": "p"}, "p"),):
        reply = server.post("/unload_lora_adapter", body)
        assert name not in reply.json()["loaded_adapters"]
    again = {"lora_name": "a", "lora_path": "/there/a"}
    assert server.post("/load_lora_adapter", again).status_code == 200


def test_without_adapters_a_colon_means_nothing(tmp_path: Path) -> None:
    with LiveServer(tmp_path, admin_api_key="secret") as plain:
        body = {"model": "tiny:a", "prompt": "x", "max_tokens": 1}
        assert named(plain, "/v1/completions", body) == [None]
        reply = plain.post("/generate", {"text": "x", "lora_path": "a"})
        assert reply.status_code == 400
        text = (
            "LoRA adapters are not served; start the server with --enable-lora. "
            "The request asks for 'a'."
        )
        assert reply.json()["error"]["message"] == text
        load = {"lora_name": "x", "lora_path": "/x"}
        assert plain.post("/load_lora_adapter", load).status_code == 401
        headers = {"authorization": "Bearer secret"}
        for path, named_body in (("/load_lora_adapter", load), ("/unload_lora_adapter", {})):
            reply = plain.request("POST", path, json=named_body, headers=headers)
            answer = reply.json()
            assert reply.status_code == 400
            assert answer["error_message"].startswith("LoRA adapters are not served")
