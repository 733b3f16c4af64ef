"""A TextService without an engine, and a real uvicorn server around it.

The fake "model" continues every prompt with the text ANSWER, one character per token, so tests
know every byte of every reply. It can be told to stop and wait at a chosen token.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import queue
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import msgspec
import numpy as np

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.entrypoints.http_server import HttpServer, bind, uvicorn_config
from sglang.srt.entrypoints.server_context import ServerContext
from sglang.srt.environ import Environ
from sglang.srt.errors import RequestError
from sglang.srt.managers import request_validation as validation
from sglang.srt.managers.generate_request import GenerateDelta, GenerateRequest, IdArray
from sglang.srt.managers.image_desk import ImageDesk
from sglang.srt.managers.io_struct import (
    ControlReply,
    FinishReason,
    Heartbeat,
    LogprobArrays,
    PrefillProgress,
    SchedulerReady,
    int32_buffer,
)
from sglang.srt.managers.lora_registry import LoraRegistry
from sglang.srt.managers.scheduler_pulse import SchedulerPulse
from sglang.srt.multimodal.image_source import FetchRules
from sglang.srt.server_args import ServerArgs

ANSWER = "Paris, né à Paris. Fin!"
VOCAB_SIZE = 1 << 12
CONTEXT_LENGTH = 512
WAIT_S = 20.0

TINY_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": CONTEXT_LENGTH,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class CharTokenizer:
    """One token per character; the id is the code point."""

    chat_template: str | Mapping[str, str] | None = None
    bos_token_id: int | None = 1

    def token_text(self, token_id: int) -> str:
        return chr(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        return chr(token_id).encode()

    def encode_pair(self, first: str, second: str) -> tuple[IdArray, int]:
        return ids_of(f"\x01{first}\x02{second}"), 2 + len(first)


def ids_of(text: str) -> IdArray:
    return np.array([ord(c) for c in text], np.int32)


def logprob_rows(ids: IdArray, request: GenerateRequest, *, first_is_none: bool) -> LogprobArrays:
    """Row i has log probability -i/4; top alternatives count ids and log probabilities down."""
    rows, top, picked = len(ids), request.top_logprobs_num, request.token_ids_logprob
    logprobs = -np.arange(rows, dtype="<f4") / 4
    top_logprobs = np.tile(-np.arange(top, dtype="<f4"), (rows, 1))
    picked_logprobs = np.full((rows, len(picked)), -2.5, "<f4")
    if first_is_none and rows:
        logprobs[0] = top_logprobs[0] = picked_logprobs[0] = math.nan
    return LogprobArrays(
        num_rows=rows,
        token_ids=int32_buffer(ids),
        logprobs=logprobs.tobytes(),
        top_num=top,
        top_ids=int32_buffer(np.tile(np.arange(65, 65 + top), (rows, 1))),
        top_logprobs=top_logprobs.astype("<f4").tobytes(),
        picked_ids=int32_buffer(picked),
        picked_logprobs=picked_logprobs.tobytes(),
    )


class FakeService:
    """Satisfies TextService; what it was asked is in `requests`, `started` and `ended`.

    `hold_at[prefix]` = k makes requests whose id starts with the prefix wait for ever before
    token k. `refusals[prefix]` is the final FinishReason that such requests get instead of
    tokens, `fail_at[prefix]` = k lets them fail with 503 after k tokens. Requests that ask for
    progress are first told `progress`. `ended` gets
    (rid, finished?) when a generator is closed.
    """

    def __init__(self, model_config: ModelConfig) -> None:
        self.model_config = model_config
        plain = ServerArgs(model_path="tiny")
        self.adapters = LoraRegistry(plain, self.control)
        self.tokenizer: CharTokenizer | None = CharTokenizer()
        self.pulse = SchedulerPulse(20.0, time.monotonic)
        self.context_length = CONTEXT_LENGTH
        self.constraint_refusal: str | None = None
        self.images = ImageDesk(model_config.vision, None, FetchRules())
        self.answer = ANSWER
        self.pooled_size = TINY_CONFIG["hidden_size"]
        self.hold_at: dict[str, int] = {}
        self.refusals: dict[str, FinishReason] = {}
        self.fail_at: dict[str, int] = {}
        self.progress: list[PrefillProgress] = []
        self.requests: list[GenerateRequest] = []
        self.started: queue.Queue[str] = queue.Queue()
        self.ended: queue.Queue[tuple[str, bool]] = queue.Queue()
        self.aborts: list[tuple[str, bool]] = []
        self.healthy = True
        self.flushable = True
        self.state: dict[str, Any] = {"memory": {"capacity_tokens": 4096}, "num_running_reqs": 0}
        self.state_error: RequestError | None = None
        self.pool_replies: dict[str, ControlReply] = {}
        self.pool_asked: list[tuple[str, float, dict[str, Any]]] = []
        self.templates: list[tuple[list[Mapping[str, Any]], dict[str, Any]]] = []
        self._wake: dict[str, asyncio.Event] = {}

    def make_ready(self) -> None:
        self.pulse.scheduler_ready(SchedulerReady(CONTEXT_LENGTH, 1024, 4096, 16, 511, 64))
        self.pulse.beat(Heartbeat(1, False, 0, 0, CONTEXT_LENGTH))

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateDelta, None]:
        self.requests.append(dataclasses.replace(request))
        validation.check_fields(
            request, vocab_size=VOCAB_SIZE, has_tokenizer=self.tokenizer is not None
        )
        ids = request.input_ids
        if ids is None:
            ids = await self.tokenize(request.text or "", request.add_special_tokens)
        validation.check_ids(ids, VOCAB_SIZE)
        params = validation.fit_to_context(len(ids), request.sampling_params, self.context_length)
        adapter = self.adapters.begin(request.lora_path, request.lora_number)
        start = validation.prompt_logprob_start(request, len(ids), 1 << 20)
        request.forget_prompt()  # as the TokenizerManager does
        self.started.put(request.rid)
        finished = False
        try:
            async for delta in self._deltas(request, ids, start, params.max_new_tokens or 0):
                finished = delta.finish_reason is not None
                yield delta
        finally:
            if adapter is not None:
                adapter.ended()
            self.ended.put((request.rid, finished))

    async def _deltas(
        self, request: GenerateRequest, ids: IdArray, start: int, limit: int
    ) -> AsyncGenerator[GenerateDelta, None]:
        for progress in self.progress if request.include_progress else ():
            yield replace(_delta("", ids, 0, None), progress=progress)
        refusal = _lookup(self.refusals, request.rid)
        if refusal is not None:
            yield _delta("", ids, 0, refusal)
            return
        if request.pooling is not None:
            assert limit == 0
            vector = pooled_vector(ids, self.pooled_size)
            yield replace(_delta("", ids, 0, FinishReason("length")), pooled=vector)
            return
        hold = _lookup(self.hold_at, request.rid)
        text = self.answer[:limit]
        count = 0
        for count, char in enumerate(text, 1):
            if hold is not None and count > hold:
                wake = self._wake.setdefault(request.rid, asyncio.Event())
                await wake.wait()
                yield _delta("", ids, count - 1, FinishReason("abort", status_code=499))
                return
            if _lookup(self.fail_at, request.rid) == count - 1:
                raise RequestError("The scheduler process died.", 503)
            finish = None
            if count == len(text):
                stop = count == len(self.answer)
                finish = FinishReason("stop", 2) if stop else FinishReason("length", length=count)
            inputs = outputs = None
            if request.return_logprob:
                outputs = logprob_rows(ids_of(char), request, first_is_none=False)
                if count == 1:
                    inputs = logprob_rows(ids[start:], request, first_is_none=True)
            yield _delta(char, ids, count, finish, inputs, outputs)
            await asyncio.sleep(0)
        if count == 0:
            inputs = None
            if request.return_logprob:
                inputs = logprob_rows(ids[start:], request, first_is_none=True)
            yield _delta("", ids, 0, FinishReason("length"), inputs)

    async def tokenize(self, text: str, add_special_tokens: bool = True) -> IdArray:
        return ids_of(("\x01" if add_special_tokens else "") + text)

    async def detokenize(self, token_ids: IdArray, skip_special_tokens: bool = True) -> str:
        return "".join(chr(i) for i in token_ids if i > 2 or not skip_special_tokens)

    async def render_chat(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
        self.templates.append((list(messages), kwargs))
        if messages[-1]["content"] == "refuse me":
            raise RequestError("The chat template cannot render the messages: refused")
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)

    async def control(self, op: str, *, timeout_s: float = 30.0, **args: Any) -> ControlReply:
        if self.state_error is not None:
            raise self.state_error
        if op in self.pool_replies:
            self.pool_asked.append((op, timeout_s, args))
            return self.pool_replies[op]
        assert op in ("internal_state", "server_info")
        return ControlReply(1, True, data=self.state)

    async def abort(self, rid: str = "", abort_all: bool = False) -> None:
        self.aborts.append((rid, abort_all))
        for name, wake in self._wake.items():
            if abort_all or (rid and name.startswith(rid)):
                wake.set()

    async def flush_cache(self, timeout_s: float = 0.0) -> ControlReply:
        return ControlReply(1, self.flushable, "Cache flushed." if self.flushable else "Busy.")

    def is_healthy(self, now: float | None = None) -> bool:
        return self.healthy


def pooled_vector(ids: IdArray, size: int) -> np.ndarray:
    """What the fake model makes of a prompt: every number tells of all its ids, and none is 0."""
    return (np.arange(1, size + 1) * 0.25 + ids.sum() % 7).astype(np.float32)


def _lookup(table: Mapping[str, Any], rid: str) -> Any:
    return next((value for prefix, value in table.items() if rid.startswith(prefix)), None)


def _delta(
    text: str,
    ids: IdArray,
    completion_tokens: int,
    finish: FinishReason | None,
    inputs: LogprobArrays | None = None,
    outputs: LogprobArrays | None = None,
) -> GenerateDelta:
    return GenerateDelta(
        text, ids_of(text), len(ids), completion_tokens, 3, 0, finish, inputs, outputs
    )


class LiveServer:
    """A real HTTP server on a loopback port, its loop on a thread; use as a context manager."""

    def __init__(
        self,
        model_dir: Any,
        *,
        ready: bool = True,
        config: Mapping[str, Any] | None = None,
        **server_args: Any,
    ) -> None:
        """`config` holds fields of config.json that TINY_CONFIG has otherwise."""
        fields = {**TINY_CONFIG, **(config or {})}
        (model_dir / "config.json").write_bytes(msgspec.json.encode(fields))
        (model_dir / "generation_config.json").write_bytes(b'{"temperature": 0.6, "top_k": 20}')
        args = ServerArgs.from_kwargs(
            **{
                "model_path": str(model_dir),
                "served_model_name": "tiny",
                "log_level": "error",
                **server_args,
            }
        )
        self.service = FakeService(ModelConfig.from_path(str(model_dir)))
        self.service.adapters = LoraRegistry(args, self.service.control)
        self.context = ServerContext(args, Environ(health_check_timeout_s=0.3))
        self._listener = bind("127.0.0.1", 0)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._http = HttpServer(uvicorn_config(self.context))
        self._client = httpx.Client(base_url=self.url, timeout=WAIT_S, trust_env=False)
        self._ready = ready
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        if self._ready:
            self.service.make_ready()
            self.context.attach(self.service)
            self.context.open()
        self._up.set()
        await self._http.serve([self._listener])

    def on_loop(self, action: Callable[[], None]) -> None:
        """Run `action` on the server's loop and wait for it."""
        done = threading.Event()
        self._loop.call_soon_threadsafe(lambda: (action(), done.set()))
        assert done.wait(WAIT_S)

    def __enter__(self) -> LiveServer:
        self._thread.start()
        assert self._up.wait(WAIT_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self._http.should_exit = True
        self._http.force_exit = True
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()

    # ---- clients

    def request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        return self._client.request(method, path, **kwargs)

    def post(self, path: str, json: Any) -> httpx.Response:
        return self.request("POST", path, json=json)

    def post_raw(self, path: str, body: bytes, kind: str = "application/json") -> httpx.Response:
        return self.request("POST", path, content=body, headers={"content-type": kind})

    def events(self, path: str, json: Any) -> list[Any]:
        """The decoded events of a stream, checked for its frame and its last line."""
        reply = self.post(path, {**json, "stream": True})
        assert reply.status_code == 200, reply.text
        assert reply.headers["content-type"].startswith("text/event-stream")
        blocks = reply.text.split("\n\n")
        assert blocks[-2:] == ["data: [DONE]", ""]
        assert all(block.startswith("data: ") for block in blocks[:-1])
        return [msgspec.json.decode(block.removeprefix("data: ")) for block in blocks[:-2]]

    @contextmanager
    def raw(self, head: bytes) -> Iterator[socket.socket]:
        """A raw connection on which `head` was sent."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S) as connection:
            connection.sendall(head)
            yield connection


def http_post(path: str, body: bytes, *headers: str) -> bytes:
    """The bytes of an HTTP/1.1 POST with a JSON body."""
    lines = [
        f"POST {path} HTTP/1.1",
        "host: test",
        "content-type: application/json",
        f"content-length: {len(body)}",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def shown(server: LiveServer, number: int = -1) -> list[dict[str, Any]]:
    """The messages that a request has given to the template."""
    return [dict(message) for message in server.service.templates[number][0]]
