"""Engines to compare: servers that speak /v1/completions, and llama.cpp in a worker process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sglang.srt.utils.network import get_free_port

READY_TIMEOUT_S = 300.0
REQUEST_TIMEOUT_S = 300.0

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Taken:
    """Seconds to the first token (median of requests), of all after it (likewise), and in all."""

    first_s: float
    rest_s: float
    total_s: float


class EngineEnded(RuntimeError):
    """An engine's process is gone."""


class Engine(Protocol):
    name: str
    start_s: float

    def run(self, prompts: Prompts, new_tokens: int) -> Taken: ...

    def end(self) -> None: ...


class HttpEngine:
    """A server started with `command` plus --port; ready when it has answered one request."""

    def __init__(
        self, name: str, command: Sequence[str], model: Path, env: Mapping[str, str], log: Path
    ) -> None:
        self.name, self._model = name, str(model)
        port = get_free_port()
        self._url = f"http://127.0.0.1:{port}"
        began = time.perf_counter()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*command, "--port", str(port)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **env},
                start_new_session=True,
            )
        try:
            self._wait_ready(began, log)
        except BaseException:
            self.end()
            raise
        self.start_s = time.perf_counter() - began

    def _wait_ready(self, began: float, log: Path) -> None:
        while time.perf_counter() - began < READY_TIMEOUT_S:
            if self._process.poll() is not None:
                raise RuntimeError(f"{self.name} ended:\n{log.read_text(errors='replace')[-3000:]}")
            try:
                self._stream([1, 2, 3, 4], 2)
                return
            except OSError:  # URLError is one
                time.sleep(0.05)
        raise RuntimeError(f"{self.name} is not ready after {READY_TIMEOUT_S:g} s")

    def _stream(self, ids: Sequence[int], new_tokens: int) -> tuple[float, float]:
        body = {
            "model": self._model,
            "prompt": list(ids),
            "max_tokens": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        request = urllib.request.Request(
            f"{self._url}/v1/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        began = time.perf_counter()
        first, usage = 0.0, {}
        with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as reply:
            for line in reply:
                if not line.startswith(b"data: {"):
                    continue
                first = first or time.perf_counter()
                if b'"usage":{' in line.replace(b" ", b""):
                    usage = json.loads(line[6:])["usage"]
        if usage.get("completion_tokens") != new_tokens:
            raise RuntimeError(f"{self.name}: {usage} for {new_tokens} tokens")
        return first - began, time.perf_counter() - first

    def run(self, prompts: Prompts, new_tokens: int) -> Taken:
        began = time.perf_counter()
        with ThreadPoolExecutor(len(prompts)) as pool:
            try:
                taken = list(pool.map(lambda ids: self._stream(ids, new_tokens), prompts))
            except OSError as error:
                if (code := self._process.poll()) is None:
                    raise
                raise EngineEnded(f"{self.name} ended with {code}") from error
        total = time.perf_counter() - began
        firsts, rests = (sorted(column) for column in zip(*taken, strict=True))
        return Taken(firsts[len(firsts) // 2], rests[len(rests) // 2], total)

    def end(self) -> None:
        for how in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, how)
                self._process.wait(20)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


class LlamaEngine:
    """llama.cpp on a GGUF file, in `python`'s `llama-cpp-python`."""

    def __init__(self, name: str, python: Path, model: Path, threads: int, log: Path) -> None:
        self.name = name
        script = Path(__file__).with_name("llama_worker.py")
        began = time.perf_counter()
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [python, script, model, str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self._read()
        self.start_s = time.perf_counter() - began

    def _read(self) -> dict[str, float]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise EngineEnded(f"{self.name} ended with {self._process.wait()}")
        found: dict[str, float] = json.loads(line)
        return found

    def run(self, prompts: Prompts, new_tokens: int) -> Taken:
        assert self._process.stdin
        request = {"prompts": [list(ids) for ids in prompts], "new_tokens": new_tokens}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        found = self._read()
        return Taken(found["first_s"], found["rest_s"], found["first_s"] + found["rest_s"])

    def end(self) -> None:
        with self._process:  # closes its pipes and waits
            self._process.kill()
