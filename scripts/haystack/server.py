"""A server to ask: started here from this tree, or one that runs already.

The one that is started gets a free port, writes its output to a file and ends with the block.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang.srt.utils.network import get_free_port

READY_TIMEOUT_S = 300.0
_CONTROL_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Server:
    """`pid` is that of the server's first process, None when it runs elsewhere."""

    url: str
    pid: int | None = None

    def info(self) -> dict[str, Any]:
        """The object of /server_info."""
        with urllib.request.urlopen(f"{self.url}/server_info", timeout=_CONTROL_TIMEOUT_S) as reply:
            found: dict[str, Any] = json.load(reply)
        return found

    def flush_cache(self) -> None:
        """Forget all prefixes; waits for running requests to end."""
        request = urllib.request.Request(f"{self.url}/flush_cache?timeout=60", data=b"{}")
        urllib.request.urlopen(request, timeout=_CONTROL_TIMEOUT_S).close()

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text without special tokens."""
        body = json.dumps({"prompt": text, "add_special_tokens": False}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/tokenize", data=body, headers=headers)
        with urllib.request.urlopen(request, timeout=_CONTROL_TIMEOUT_S) as reply:
            tokens: list[int] = json.load(reply)["tokens"]
        return tokens


@contextlib.contextmanager
def started_server(flags: Sequence[str], log: Path) -> Iterator[Server]:
    """A ready `python -m sglang.launch_server` with these flags.

    Raises RuntimeError, with the end of its output, when it ends or is not ready in time.
    """
    port = get_free_port()
    url = f"http://127.0.0.1:{port}"
    source = str(Path(__file__).absolute().parents[2] / "python")
    command = [sys.executable, "-m", "sglang.launch_server", "--port", str(port), *flags]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, (source, os.getenv("PYTHONPATH")))),
            },
        )
    try:
        _wait_ready(url, process, log)
        yield Server(url, process.pid)
    finally:
        _end(process)


def _wait_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}:\n{_tail(log)}")
        with contextlib.suppress(OSError):  # an HTTP status other than 200 is one, too
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        time.sleep(0.1)
    raise RuntimeError(f"the server was not ready in {READY_TIMEOUT_S:g} s:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
