"""Streamed requests to /generate with prompts as token ids, and when each token came.

The stream is read as it arrives; the clock starts before the first byte of the request is sent.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson

from haystack.prompts import Ids

REQUEST_TIMEOUT_S = 7200.0
BODIES = ("json", "base64", "binary")


@dataclass(frozen=True)
class Answer:
    """One finished request. `seconds[i]` is when token i was there, from the sending on."""

    output_ids: tuple[int, ...]
    seconds: tuple[float, ...]
    prompt_tokens: int
    cached_tokens: int

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.seconds[0]

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Rate of the tokens after the first, None when there is only one."""
        if len(self.seconds) < 2 or self.seconds[-1] == self.seconds[0]:
            return None
        return (len(self.seconds) - 1) / (self.seconds[-1] - self.seconds[0])

    @property
    def longest_gap_s(self) -> float:
        """The longest wait for a token after the first, 0 when there is only one."""
        return max((b - a for a, b in zip(self.seconds, self.seconds[1:], strict=False)), default=0)


def generate(url: str, ids: Ids, max_new_tokens: int, body: str = "json") -> Answer:
    """Greedy tokens, streamed; `body` is how the ids travel, see `encode_request`.

    Raises RuntimeError with the server's words for an error status, in the stream or before it, and
    when the stream ends without a token; OSError when there is no connection.
    """
    data, headers = encode_request(ids, max_new_tokens, body)
    request = urllib.request.Request(f"{url}/generate", data=data, headers=headers)
    began = time.perf_counter()
    tokens: list[int] = []
    seconds: list[float] = []
    meta: dict[str, Any] = {}
    with _opened(request) as reply:
        for line in reply:
            if not line.startswith(b"data: {"):
                continue
            now = time.perf_counter() - began
            event = json.loads(line[6:])
            if "meta_info" not in event:
                if "error" in event:
                    raise RuntimeError(f"the stream ended with {event['error']}")
                continue
            meta = event["meta_info"]
            tokens = _merged(tokens, event["output_ids"], meta["completion_tokens"])
            seconds += [now] * (len(tokens) - len(seconds))
    if not tokens:
        raise RuntimeError(f"the stream ended without a token: {meta}")
    return Answer(tuple(tokens), tuple(seconds), meta["prompt_tokens"], meta["cached_tokens"])


@contextlib.contextmanager
def _opened(request: urllib.request.Request) -> Iterator[http.client.HTTPResponse]:
    try:
        with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as reply:
            yield reply
    except urllib.error.HTTPError as error:
        said = error.read(1000).decode(errors="replace")
        raise RuntimeError(f"the server answered {error.code}: {said}") from error


def encode_request(ids: Ids, max_new_tokens: int, body: str) -> tuple[bytes, dict[str, str]]:
    """The bytes and the headers of a request, with the ids in one of the `BODIES`.

    `json`: a list, as SGLang takes it; `base64`: text in a JSON field; `binary`: the whole body.
    Raises ValueError for another word.
    """
    fields: dict[str, Any] = {
        "stream": True,
        "sampling_params": {
            "temperature": 0,
            "max_new_tokens": max_new_tokens,
            "ignore_eos": True,
        },
    }
    if body == "binary":
        headers = {
            "Content-Type": "application/octet-stream",
            "X-Generate-Fields": json.dumps(fields),
        }
        return ids.astype("<i4", copy=False).tobytes(), headers
    if body == "base64":
        fields["input_ids_b64"] = base64.b64encode(ids.astype("<i4", copy=False).tobytes()).decode()
    elif body == "json":
        fields["input_ids"] = np.ascontiguousarray(ids)
    else:
        raise ValueError(f"{body!r} is no way to send ids; there are {', '.join(BODIES)}")
    data = orjson.dumps(fields, option=orjson.OPT_SERIALIZE_NUMPY)
    return data, {"Content-Type": "application/json"}


def _merged(tokens: list[int], news: list[int], total: int) -> list[int]:
    """All tokens so far, whether an event carries only the new ones or all."""
    return list(news) if len(news) == total else [*tokens, *news]


@dataclass
class StreamReport:
    """What one small client saw: seconds. `error` tells why it stopped early, None otherwise."""

    requests: int = 0
    tokens: int = 0
    longest_gap_s: float = 0.0
    longest_ttft_s: float = 0.0
    error: str | None = None


@dataclass
class BackgroundClients:
    """Small clients that stream one answer after another until `stop` is called."""

    url: str
    count: int
    prompt_ids: Ids
    tokens_each: int = 64
    reports: list[StreamReport] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)
    _stopping: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Start them; each has a prompt of its own, so that none profits from another's."""
        for number in range(self.count):
            report = StreamReport()
            self.reports.append(report)
            work = threading.Thread(target=self._stream, args=(report, number), daemon=True)
            work.start()
            self._threads.append(work)

    def stop(self) -> list[StreamReport]:
        """Let each finish its answer; what they saw."""
        self._stopping.set()
        for work in self._threads:
            work.join()
        return self.reports

    def _stream(self, report: StreamReport, number: int) -> None:
        turn = 0
        while not self._stopping.is_set():
            ids = np.roll(self.prompt_ids, number * 17 + turn)
            try:
                answer = generate(self.url, ids, self.tokens_each)
            except (OSError, RuntimeError) as error:
                report.error = str(error)
                return
            turn += 1
            report.requests += 1
            report.tokens += len(answer.output_ids)
            report.longest_gap_s = max(report.longest_gap_s, answer.longest_gap_s)
            report.longest_ttft_s = max(report.longest_ttft_s, answer.ttft_s)
