"""The client of a serving benchmark: sends requests over HTTP and notes when their tokens come.

One event loop and one connection for each request under way. A request that fails says so in its
`Outcome`; only a server that can't be reached at all is an exception.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from sglang.bench.serving_figures import MemoryLook, Outcome
from sglang.bench.serving_load import LoadRequest

_TIMEOUT_S = 6 * 3600.0
_LINE_BYTES = 1 << 26  # a streamed piece repeats the whole text so far
_ERROR_CHARS = 300


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go. `kind` is a key of `KINDS`; `extra` is merged into every body, and into
    `sampling_params` of SGLang's own API. `adapters`: one of them in turn for each request."""

    kind: str
    base_url: str
    model: str
    api_key: str | None = None
    stream: bool = True
    ignore_eos: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)
    adapters: Sequence[str] = ()

    @property
    def headers(self) -> dict[str, str]:
        """Of every request."""
        return {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}


@dataclass(frozen=True, slots=True)
class _Kind:
    """One API: its path, the body of a request, and how a piece of an answer changes an outcome.

    `read` returns how many tokens the piece brought, 0 for none.
    """

    path: str
    body: Callable[[Target, LoadRequest, str | None], dict[str, Any]]
    read: Callable[[Outcome, dict[str, Any]], int]


def _native_body(target: Target, request: LoadRequest, adapter: str | None) -> dict[str, Any]:
    params = {
        "temperature": 0.0,
        "max_new_tokens": request.output_len,
        "ignore_eos": target.ignore_eos,
    }
    extra = dict(target.extra)
    params.update(extra.pop("sampling_params", {}))
    what = "text" if isinstance(request.prompt, str) else "input_ids"
    body = {what: request.prompt, "sampling_params": params, "stream": target.stream, **extra}
    return body if adapter is None else {**body, "lora_path": adapter}


def _read_native(outcome: Outcome, piece: dict[str, Any]) -> int:
    count = piece["meta_info"]["completion_tokens"]
    new, outcome.output_len = count - outcome.output_len, count
    outcome.text = piece.get("text", "")
    return int(new)


def _openai_body(target: Target, adapter: str | None) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": adapter or target.model,
        "temperature": 0.0,
        "stream": target.stream,
        "ignore_eos": target.ignore_eos,
    }
    if target.stream:
        body["stream_options"] = {"include_usage": True}
    return body


def _completions_body(target: Target, request: LoadRequest, adapter: str | None) -> dict[str, Any]:
    body = _openai_body(target, adapter)
    return {**body, "prompt": request.prompt, "max_tokens": request.output_len, **target.extra}


def _chat_body(target: Target, request: LoadRequest, adapter: str | None) -> dict[str, Any]:
    body = _openai_body(target, adapter)
    messages = [{"role": "user", "content": request.prompt}]
    limit = {"max_completion_tokens": request.output_len}
    return {**body, "messages": messages, **limit, **target.extra}


def _text_of(choice: Mapping[str, Any]) -> str:
    """What a choice of any of OpenAI's answers brought, reasoning included."""
    part = choice.get("delta") or choice.get("message") or choice
    return "".join(part.get(name) or "" for name in ("text", "reasoning_content", "content"))


def _read_openai(outcome: Outcome, piece: dict[str, Any]) -> int:
    usage, choices = piece.get("usage"), piece.get("choices") or ()
    text = "".join(_text_of(choice) for choice in choices)
    outcome.text += text
    if usage:
        outcome.output_len = usage["completion_tokens"]
    return 1 if text else 0


_NATIVE = _Kind("/generate", _native_body, _read_native)
_COMPLETIONS = _Kind("/v1/completions", _completions_body, _read_openai)
_CHAT = _Kind("/v1/chat/completions", _chat_body, _read_openai)
KINDS = {
    "sglang": _NATIVE,
    "sglang-native": _NATIVE,
    "sglang-oai": _COMPLETIONS,
    "vllm": _COMPLETIONS,
    "lmdeploy": _COMPLETIONS,
    "sglang-oai-chat": _CHAT,
    "vllm-chat": _CHAT,
    "lmdeploy-chat": _CHAT,
}


def new_session() -> aiohttp.ClientSession:
    """A client without bounds of its own on connections and, nearly, on time."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S),
        read_bufsize=_LINE_BYTES,
    )


async def ask(
    session: aiohttp.ClientSession,
    target: Target,
    request: LoadRequest,
    adapter: str | None = None,
    origin: float | None = None,
) -> Outcome:
    """Send one request and read its whole answer; `origin` is the start of the run, None: now."""
    kind = KINDS[target.kind]
    outcome = Outcome(request.prompt_len)
    began = time.perf_counter()
    outcome.began = began - (began if origin is None else origin)
    before = began
    try:
        async with session.post(
            target.base_url + kind.path,
            json=kind.body(target, request, adapter),
            headers=target.headers,
        ) as reply:
            if reply.status != 200:
                outcome.error = f"{reply.status}: {(await reply.text())[:_ERROR_CHARS]}"
                return outcome
            outcome.error = "an answer with nothing in it"
            async for piece in _pieces(reply, target.stream):
                outcome.error = None
                new = _read_piece(kind, outcome, piece)
                now = time.perf_counter()
                if new and not outcome.ttft:
                    outcome.ttft = now - began
                    before = now
                elif new:
                    outcome.itls += [(now - before) / new] * new
                    before = now
    except (aiohttp.ClientError, TimeoutError, ValueError, LookupError, TypeError) as error:
        outcome.error = f"{type(error).__name__}: {error}"[:_ERROR_CHARS]
    outcome.latency = time.perf_counter() - began
    if outcome.error is None and not outcome.ttft:
        outcome.ttft = outcome.latency  # an answer without a token
    return outcome


def _read_piece(kind: _Kind, outcome: Outcome, piece: dict[str, Any]) -> int:
    """Raises ValueError for what a server says went wrong in the middle of an answer."""
    if "error" in piece:
        raise ValueError(json.dumps(piece["error"]))
    return kind.read(outcome, piece)


async def _pieces(reply: aiohttp.ClientResponse, stream: bool) -> AsyncIterator[dict[str, Any]]:
    if not stream:
        yield json.loads(await reply.read())
        return
    async for line in reply.content:
        data = line.strip().removeprefix(b"data:").strip()
        if line.startswith(b"data:") and data != b"[DONE]":
            yield json.loads(data)


async def run_load(
    session: aiohttp.ClientSession,
    target: Target,
    requests: Sequence[LoadRequest],
    times: Sequence[float],
    max_concurrency: int | None,
    done: Callable[[], object] = lambda: None,
) -> tuple[list[Outcome], float]:
    """Send each request at its time, no more than `max_concurrency` under way (None: no bound).

    Returns what became of them, in their order, and the seconds until the last had its answer.
    `done` is called as each ends.
    """
    gate = asyncio.Semaphore(max_concurrency or max(1, len(requests)))
    origin = time.perf_counter()

    async def one(number: int) -> Outcome:
        await asyncio.sleep(max(0.0, origin + times[number] - time.perf_counter()))
        names = target.adapters
        adapter = names[number % len(names)] if names else None
        async with gate:
            outcome = await ask(session, target, requests[number], adapter, origin)
        done()
        return outcome

    outcomes = await asyncio.gather(*(one(number) for number in range(len(requests))))
    return list(outcomes), time.perf_counter() - origin


async def get_json(session: aiohttp.ClientSession, target: Target, path: str) -> Any:
    """What a GET answers. Raises OSError with one line when it can't be had."""
    url = target.base_url + path
    try:
        async with session.get(url, headers=target.headers) as reply:
            if reply.status != 200:
                raise OSError(f"{url} answered {reply.status}")
            return await reply.json()
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise OSError(f"{url}: {error}") from error


class MemoryWatch:
    """Looks at a server's KV memory every `interval_s` seconds until it is stopped.

    A server without segmented memory (`/server_info` has no such part) is looked at once.
    """

    def __init__(
        self, session: aiohttp.ClientSession, target: Target, interval_s: float = 0.5
    ) -> None:
        self._session = session
        self._target = target
        self._interval_s = interval_s
        self._origin = time.perf_counter()
        self._task: asyncio.Task[None] | None = None
        self.looks: list[MemoryLook] = []

    async def start(self) -> None:
        """The first look, before anything is sent, and from then on one at each interval."""
        if await self._look():
            self._task = asyncio.create_task(self._go_on())

    async def stop(self) -> None:
        """The last look."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            await self._look()

    async def _go_on(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            await self._look()

    async def _look(self) -> bool:
        try:
            info = await get_json(self._session, self._target, "/server_info")
            memory = info["memory"]
            look = MemoryLook(
                time.perf_counter() - self._origin, memory["mapped_bytes"], memory["budget_bytes"]
            )
        except (OSError, LookupError, TypeError):
            return False
        self.looks.append(look)
        return True
