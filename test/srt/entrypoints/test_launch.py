"""The server's life as its user sees it: ready, signals, deaths, exit codes, nothing left."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import httpx
import msgspec
import psutil
import pytest

from sglang.srt.entrypoints.http_server import bind
from sglang.srt.utils.network import get_free_port
from srt.entrypoints.fake_service import TINY_CONFIG

ROOT = Path(__file__).parents[3]
WAIT_S = 60.0


class FakeServer:
    """`launch_server` with a fake scheduler, in a process of its own."""

    def __init__(self, tmp_path: Path, mode: str, flags: tuple[str, ...]) -> None:
        model = tmp_path / "model"
        model.mkdir()
        (model / "config.json").write_bytes(msgspec.json.encode(TINY_CONFIG))
        self._sockets = tempfile.TemporaryDirectory(prefix="t")  # their paths must be short
        self.sockets = Path(self._sockets.name)
        self.port = get_free_port()
        command = [sys.executable, "-m", "srt.entrypoints.launch_fake_server"]
        arguments = ["--model-path", str(model), "--port", str(self.port), "--skip-tokenizer-init"]
        paths = os.pathsep.join([str(ROOT / "python"), str(ROOT / "test")])
        self.process = subprocess.Popen(
            [*command, *arguments, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": paths,
                "FAKE_SCHEDULER": mode,
                "TMPDIR": str(self.sockets),
            },
        )
        assert self.process.stdout is not None
        self._output: IO[str] = self.process.stdout
        self.text = ""
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}", timeout=WAIT_S, trust_env=False
        )

    def read_until(self, pattern: str) -> None:
        """Read lines of output until one matches."""
        for line in self._output:
            self.text += line
            if re.search(pattern, line):
                return
        raise AssertionError(f"no line matches {pattern!r} in:\n{self.text}")

    def children(self) -> list[psutil.Process]:
        """The scheduler and the detokenizer, without multiprocessing's own helper."""
        every = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in every if "resource_tracker" not in str(child.cmdline())]

    def generate(self, **fields: object) -> httpx.Response:
        params = {"max_new_tokens": 3, "ignore_eos": True}
        body = {"input_ids": [5, 6], "sampling_params": params, **fields}
        return self.client.post("/generate", json=body)

    def wait_running(self, count: int) -> None:
        """Ask until so many requests run; a test that waits for too long is ended from outside."""
        asked = -1
        while asked != count:
            info = self.client.get("/server_info").json()
            asked = info["internal_states"][0]["num_running_reqs"]
            threading.Event().wait(0.02)

    def end(self) -> int:
        """Wait for the end; afterwards no process and no file of it may be left."""
        family = (
            psutil.Process(self.process.pid).children(recursive=True)
            if self.process.poll() is None
            else []
        )
        for line in self._output:
            self.text += line
        code = self.process.wait(WAIT_S)
        _, alive = psutil.wait_procs(family, timeout=WAIT_S)
        assert not alive
        assert list(self.sockets.iterdir()) == []
        return code

    def close(self) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.kill()
        self._output.close()
        self.process.wait(WAIT_S)
        self._sockets.cleanup()


@contextmanager
def launched(tmp_path: Path, mode: str = "", *flags: str) -> Iterator[FakeServer]:
    server = FakeServer(tmp_path, mode, flags)
    try:
        yield server
    finally:
        server.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serves_and_ends_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    with launched(tmp_path) as server:
        server.read_until("ready")
        assert server.client.get("/health").status_code == 200
        reply = server.generate()
        assert reply.json()["output_ids"] == [100, 101, 102]
        info = server.client.get("/server_info").json()
        assert info["memory"] == {"capacity_tokens": 4096}
        server.process.send_signal(number)
        assert server.end() == 0
        assert "Traceback" not in server.text


def test_answers_503_while_it_starts_and_can_be_interrupted(tmp_path: Path) -> None:
    with launched(tmp_path, "starting") as server:
        server.read_until("answering 503")
        assert server.client.get("/health").status_code == 503
        assert "starting" in server.generate().json()["error"]["message"]
        server.process.send_signal(signal.SIGINT)
        assert server.end() == 0
        assert "Traceback" not in server.text


def test_a_running_request_gets_its_reply_when_the_server_stops(tmp_path: Path) -> None:
    with launched(tmp_path, "hang", "--skip-server-warmup") as server:
        server.read_until("ready")
        with ThreadPoolExecutor(2) as pool:
            whole = pool.submit(server.generate)
            stream = pool.submit(server.generate, stream=True)
            server.wait_running(2)
            server.process.send_signal(signal.SIGTERM)
            for reply in (whole.result(WAIT_S), stream.result(WAIT_S)):
                assert reply.status_code == 503
                assert "shutting down" in reply.json()["error"]["message"]
        assert server.end() == 0


def test_a_client_that_leaves_is_gone_from_the_scheduler(tmp_path: Path) -> None:
    with launched(tmp_path, "hang", "--skip-server-warmup") as server:
        server.read_until("ready")

        body = b'{"input_ids":[5]}'
        head = f"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head.encode() + body)
            server.wait_running(1)
        server.wait_running(0)
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0


def test_a_scheduler_that_cannot_start(tmp_path: Path) -> None:
    with launched(tmp_path, "fail") as server:
        assert server.end() == 1
        assert "The scheduler cannot start: the weights are made of cheese" in server.text
        assert "Traceback" not in server.text


def test_a_dying_scheduler_ends_the_server_and_says_why(tmp_path: Path) -> None:
    with launched(tmp_path, "die", "--skip-server-warmup") as server:
        server.read_until("ready")
        reply = server.generate()
        assert reply.status_code == 503
        assert server.end() == 1
        assert "The scheduler process" in server.text
        assert "exited with code 7" in server.text
        assert "the invariant does not hold" in server.text


def test_a_killed_child_ends_the_server(tmp_path: Path) -> None:
    with launched(tmp_path, "hang", "--skip-server-warmup") as server:
        server.read_until("ready")
        server.children()[0].send_signal(signal.SIGKILL)
        assert server.end() == 1
        assert re.search(
            r"The (scheduler|detokenizer) process \(pid \d+\) was killed by SIGKILL", server.text
        )


def test_a_second_interrupt_kills(tmp_path: Path) -> None:
    with launched(tmp_path) as server:
        server.read_until("ready")
        for child in server.children():
            child.suspend()  # so that a clean end cannot come
        server.process.send_signal(signal.SIGINT)
        server.read_until("shutting down")
        server.process.send_signal(signal.SIGINT)
        assert server.end() == 130


def test_children_die_with_a_killed_server(tmp_path: Path) -> None:
    with launched(tmp_path) as server:
        server.read_until("ready")
        family = server.children()
        assert len(family) == 2
        server.process.kill()
        _, alive = psutil.wait_procs(family, timeout=WAIT_S)
        assert not alive


def test_a_bad_model_and_a_taken_port_are_one_line(tmp_path: Path) -> None:
    with launched(tmp_path) as server:
        server.read_until("ready")
        flags = ("--port", str(server.port))
        (tmp_path / "second").mkdir()
        with launched(tmp_path / "second", "", *flags) as second:
            assert second.end() == 1
            assert "error:" in second.text
            assert "Traceback" not in second.text
        (tmp_path / "third").mkdir()
        with launched(tmp_path / "third", "", "--model-path", "/no/such/model") as third:
            assert third.end() == 1
            assert "error:" in third.text
            assert "Traceback" not in third.text


def test_connections_send_what_is_small_at_once() -> None:
    with bind("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
