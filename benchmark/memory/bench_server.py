"""A real server as a child process, and clients for it: what serving benchmarks share."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang.srt.utils.network import get_free_port

READY_TIMEOUT_S = 180.0
REQUEST_TIMEOUT_S = 300.0


@dataclass
class Answer:
    """One streamed answer: when its tokens came (seconds of `time.perf_counter`)."""

    began: float
    first: float
    last: float
    tokens: int

    @property
    def seconds_per_token(self) -> float:
        """Time per output token after the first (TPOT)."""
        return (self.last - self.first) / max(1, self.tokens - 1)


class Server:
    """`python -m sglang.launch_server` of this tree on a free port, output in a file or nowhere."""

    def __init__(self, *flags: str, log: Path | None = None) -> None:
        port = get_free_port()
        self.url = f"http://127.0.0.1:{port}"
        source = str(Path(__file__).parents[2] / "python")
        command = [sys.executable, "-m", "sglang.launch_server", "--port", str(port), *flags]
        with contextlib.ExitStack() as stack:
            output = stack.enter_context(log.open("wb")) if log else subprocess.DEVNULL
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": source},
            )

    def wait_ready(self) -> None:
        """Poll /health until 200. Raises RuntimeError when the server ends or takes too long."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with status {self.process.returncode}")
            with contextlib.suppress(OSError):  # any status but 200 is one, too
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            time.sleep(0.1)
        raise RuntimeError(f"the server was not ready in {READY_TIMEOUT_S:g} s")

    def info(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/server_info", timeout=30) as reply:
            found: dict[str, Any] = json.load(reply)
        return found

    def post(self, path: str, body: object) -> Any:
        """Send JSON and return the open reply; the caller closes it."""
        request = urllib.request.Request(
            f"{self.url}{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S)

    def flush(self) -> None:
        """Empty the prefix cache."""
        self.post("/flush_cache?timeout=30", {}).close()

    def stream(self, input_ids: list[int], max_new_tokens: int) -> Answer:
        """Generate exactly `max_new_tokens` tokens and note when they come."""
        body = {
            "input_ids": input_ids,
            "stream": True,
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": max_new_tokens,
                "ignore_eos": True,
            },
        }
        began = time.perf_counter()
        first = last = 0.0
        tokens = 0
        with self.post("/generate", body) as reply:
            for line in reply:
                if not line.startswith(b"data: {"):
                    continue
                last = time.perf_counter()
                first = first or last
                tokens = json.loads(line[6:])["meta_info"]["completion_tokens"]
        return Answer(began, first, last, tokens)

    def close(self) -> None:
        """End the server politely, then not so politely."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)


@contextlib.contextmanager
def running(*flags: str, log: Path | None = None) -> Iterator[Server]:
    """A ready server, ended at the end."""
    server = Server(*flags, log=log)
    try:
        server.wait_ready()
        yield server
    finally:
        server.close()
