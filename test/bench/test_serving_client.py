"""The client against sockets that answer, answer badly, and vanish."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from sglang.bench.serving_client import KINDS, MemoryWatch, Target, ask, new_session, run_load
from sglang.bench.serving_figures import Outcome
from sglang.bench.serving_load import LoadRequest

REQUEST = LoadRequest("hello", 1, 4)
Answer = Callable[[str, dict[str, Any]], bytes]


def http(body: bytes, status: str = "200 OK", length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    head = f"HTTP/1.1 {status}\r\nContent-Length: {size}\r\nContent-Type: application/json\r\n\r\n"
    return head.encode() + body


def events(*pieces: Any) -> bytes:
    lines = [f"data: {json.dumps(piece)}\n\n" for piece in pieces]
    return http("".join([*lines, "data: [DONE]\n\n"]).encode())


def native(count: int, text: str) -> dict[str, Any]:
    return {"text": text, "meta_info": {"completion_tokens": count}}


class Peer:
    """A server that gives `answer` to every request and keeps what came."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.under_way = self.most = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, path, *_ = head.split()
        size = next((int(h.split(":")[1]) for h in head.split("\r\n") if "ength:" in h), 0)
        body = json.loads(await reader.readexactly(size)) if size else {}
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        self.seen.append((path, body))
        for _ in range(5):  # lets others come in
            await asyncio.sleep(0)
        writer.write(self.answer(f"{method} {path}", body))
        self.under_way -= 1
        await writer.drain()
        writer.close()


def with_peer(answer: Answer, use: Callable[[Peer, str], Coroutine[Any, Any, Any]]) -> Any:
    async def run() -> Any:
        peer = Peer(answer)
        server = await asyncio.start_server(peer.serve, "127.0.0.1", 0)
        try:
            port = server.sockets[0].getsockname()[1]
            return await use(peer, f"http://127.0.0.1:{port}")
        finally:
            server.close()
            await server.wait_closed()

    return asyncio.run(run())


def asked(kind: str, reply: bytes, **fields: Any) -> tuple[Outcome, dict[str, Any]]:
    async def use(peer: Peer, url: str) -> tuple[Outcome, dict[str, Any]]:
        async with new_session() as session:
            outcome = await ask(session, Target(kind, url, "m", **fields), REQUEST, "adapter")
        ((path, body),) = peer.seen
        assert path == KINDS[kind].path
        return outcome, body

    found: tuple[Outcome, dict[str, Any]] = with_peer(lambda *_: reply, use)
    return found


def test_a_piece_of_several_tokens_shares_its_gap() -> None:
    outcome, body = asked("sglang", events(native(1, "a"), native(4, "abcd"), native(5, "abcde")))
    assert outcome.error is None
    assert (outcome.text, outcome.output_len) == ("abcde", 5)
    assert len(outcome.itls) == 4
    assert outcome.itls[0] == outcome.itls[1] == outcome.itls[2]
    assert 0 < outcome.ttft <= outcome.latency
    assert sum(outcome.itls) <= outcome.latency - outcome.ttft + 1e-6
    assert body == {
        "text": "hello",
        "sampling_params": {"temperature": 0.0, "max_new_tokens": 4, "ignore_eos": True},
        "stream": True,
        "lora_path": "adapter",
    }


def test_openai_answers_count_tokens_by_their_usage() -> None:
    pieces = (
        {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"delta": {"reasoning_content": "hm"}}]},
        {"choices": [{"delta": {"content": "yes"}}]},
        {"choices": [], "usage": {"completion_tokens": 7}},
    )
    outcome, body = asked("sglang-oai-chat", events(*pieces), extra={"top_p": 0.5})
    assert (outcome.text, outcome.output_len, len(outcome.itls)) == ("hmyes", 7, 1)
    assert body["messages"] == [{"role": "user", "content": "hello"}]
    assert (body["top_p"], body["model"]) == (0.5, "adapter")
    assert body["stream_options"] == {"include_usage": True}
    whole = {"choices": [{"text": "yes"}], "usage": {"completion_tokens": 3}}
    outcome, body = asked("vllm", http(json.dumps(whole).encode()), stream=False)
    assert (outcome.text, outcome.output_len, outcome.itls) == ("yes", 3, [])
    assert outcome.ttft <= outcome.latency
    assert (body["prompt"], body["max_tokens"], body["stream"]) == ("hello", 4, False)


@pytest.mark.parametrize(
    ("reply", "complaint"),
    [
        (http(b'{"error": "no"}', "400 Bad Request"), '400: {"error": "no"}'),
        (events(native(1, "a"), {"error": {"message": "full"}}), 'ValueError: {"message": "full"}'),
        (http(b"not json"), "an answer with nothing in it"),
        (http(b'data: {"text"\n', length=14), "JSONDecodeError"),
        (events({"strange": 1}), "KeyError"),
        (http(b'data: {"text": "a", "meta_info"', length=500), "ClientPayloadError"),
        (b"", "ServerDisconnectedError"),
    ],
)
def test_a_bad_answer_is_an_outcome(reply: bytes, complaint: str) -> None:
    outcome, _ = asked("sglang", reply)
    assert outcome.error is not None
    assert complaint in outcome.error


def test_concurrency_is_bounded_and_order_kept() -> None:
    def answer(_: str, body: dict[str, Any]) -> bytes:
        return events(native(1, body["text"]))

    async def use(peer: Peer, url: str) -> None:
        requests = [LoadRequest(str(i), 1, 1) for i in range(12)]
        done: list[int] = []
        async with new_session() as session:
            outcomes, duration = await run_load(
                session,
                Target("sglang", url, "m", adapters=("x", "y")),
                requests,
                [0.0] * 12,
                3,
                lambda: done.append(1),
            )
        assert [one.text for one in outcomes] == [str(i) for i in range(12)]
        assert (peer.most, len(done)) == (3, 12)
        assert {body["text"]: body["lora_path"] for _, body in peer.seen}["7"] == "y"
        assert all(0 <= one.began <= duration for one in outcomes)

    with_peer(answer, use)


def test_memory_is_looked_at_before_and_after() -> None:
    mapped = iter(range(100, 10_000, 100))

    def answer(_: str, __: dict[str, Any]) -> bytes:
        memory = {"mapped_bytes": next(mapped), "budget_bytes": 7}
        return http(json.dumps({"memory": memory}).encode())

    async def use(_: Peer, url: str) -> list[int]:
        async with new_session() as session:
            watch = MemoryWatch(session, Target("sglang", url, "m"), interval_s=1000)
            await watch.start()
            await watch.stop()
        return [look.mapped_bytes for look in watch.looks]

    assert with_peer(answer, use) == [100, 200]
    assert with_peer(lambda *_: http(b"{}"), use) == []
    assert with_peer(lambda *_: http(b"", "404 Not Found"), use) == []
