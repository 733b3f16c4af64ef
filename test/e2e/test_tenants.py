"""Tenants share no prefix, whatever door they come through, and the event stream says the same."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import zmq

from e2e.server_process import ServerProcess, running_server
from sglang.srt.mem_cache.kv_events import KVEventBatch
from srt.mem_cache.event_mirror import Mirror

PAGE = 64
TENANTS: dict[str, dict[str, str]] = {
    "nobody": {},
    "salt a": {"cache_salt": "a"},
    "key a": {"extra_key": "a"},
    "both": {"cache_salt": "a", "extra_key": "b"},
    "other way": {"cache_salt": "b", "extra_key": "a"},
}
PROMPT = [100 + number % 500 for number in range(3 * PAGE + 9)]


class Events:
    """Everything that the server published since the first message was heard."""

    def __init__(self, endpoint: str) -> None:
        self.mirror = Mirror()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt_string(zmq.SUBSCRIBE, "kv")
        self._socket.connect(endpoint)
        self.numbers: list[int] = []

    def hear(self, timeout_ms: int) -> bool:
        if not self._socket.poll(timeout_ms):
            return False
        topic, number, payload = self._socket.recv_multipart()
        assert topic == b"kv"
        self.numbers.append(int.from_bytes(number, "big"))
        self.mirror.hear(msgspec.msgpack.decode(payload, type=KVEventBatch))
        return True

    def close(self) -> None:
        self._socket.close()
        self._context.term()


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[ServerProcess, Events]]:
    with tempfile.TemporaryDirectory(prefix="kv-") as directory:
        endpoint = f"ipc://{directory}/events"
        config = {"publisher": "zmq", "endpoint": endpoint, "topic": "kv"}
        flags = ("--kv-events-config", json.dumps(config), "--enable-cache-report")
        with running_server("--prefix-cache-idle-seconds", "-1", *flags) as server:
            events = Events(endpoint)
            try:
                for number in range(200):  # until the subscription has arrived
                    generate(server, [1000 + number] * (PAGE + 1))
                    if events.hear(100):
                        break
                assert events.numbers
                yield server, events
            finally:
                events.close()


def generate(server: ServerProcess, prompt: list[int], **keys: str) -> int:
    """Tokens of the prompt that were found in the cache."""
    params = {"max_new_tokens": 1, "temperature": 0}
    reply = server.post("/generate", {"input_ids": prompt, "sampling_params": params, **keys})
    assert reply.status_code == 200, reply.text
    return int(reply.json()["meta_info"]["cached_tokens"])


def complete(server: ServerProcess, **keys: str) -> int:
    body = {"model": "m", "prompt": PROMPT, "max_tokens": 1, **keys}
    usage: Any = server.post("/v1/completions", body).json()["usage"]
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def chat(server: ServerProcess, **keys: str) -> int:
    messages = [{"role": "user", "content": "Tell me about the sea. " * 40}]
    body = {"model": "m", "messages": messages, "max_tokens": 1, **keys}
    usage: Any = server.post("/v1/chat/completions", body).json()["usage"]
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def test_tenants_share_nothing_at_any_door(running: tuple[ServerProcess, Events]) -> None:
    server, events = running
    first = {name: generate(server, PROMPT, **keys) for name, keys in TENANTS.items()}
    assert first == dict.fromkeys(TENANTS, 0)
    again = {name: generate(server, PROMPT, **keys) for name, keys in TENANTS.items()}
    assert again == dict.fromkeys(TENANTS, 3 * PAGE)
    assert {name: complete(server, **keys) for name, keys in TENANTS.items()} == again
    assert complete(server, cache_salt="nobody yet") == 0
    assert {name: chat(server, **keys) for name, keys in TENANTS.items()} == first
    assert min(chat(server, **keys) for keys in TENANTS.values()) >= PAGE

    server.post("/flush_cache", {})
    held: set[tuple[str | None, tuple[int, ...]]] = set()
    while "AllBlocksCleared" not in events.mirror.kinds:
        held.update(events.mirror.blocks.values())
        assert events.hear(10_000), "the stream ends with the flush"
    assert events.mirror.blocks == {}
    assert events.numbers == list(range(events.numbers[0], events.numbers[-1] + 1))
    spaces = {space for space, tokens in held if tokens == tuple(PROMPT[: 3 * PAGE])}
    assert spaces == {None, "1:a", "0:a", "1:ab", "1:ba", "10:nobody yet"}
