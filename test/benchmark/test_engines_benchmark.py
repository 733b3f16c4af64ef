"""The comparison of engines: how they are asked, what it counts, what it says when one fails."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import bench_engines
from engines.served import EngineEnded, HttpEngine, LlamaEngine, Taken

# Answers /v1/completions with `max_tokens` chunks; LIES makes its usage wrong.
SERVER = """
import json, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        told = asked["max_tokens"] - (asked["max_tokens"] > 2 and LIES)
        self.send_response(200)
        self.end_headers()
        for n in range(asked["max_tokens"]):
            self.wfile.write(b'data: {"choices": [{"text": "a"}]}\\n\\n')
            self.wfile.flush()
            time.sleep(0.02)
        usage = {"choices": [], "usage": {"completion_tokens": told}}
        self.wfile.write(b"data: " + json.dumps(usage).encode() + b"\\n\\ndata: [DONE]\\n\\n")

HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""

WORKER = """
import json, sys
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    figures = {"first_s": len(asked["prompts"]), "rest_s": asked["new_tokens"] / 4}
    print(json.dumps(figures), flush=True)
"""


def http_engine(folder: Path, script: str) -> HttpEngine:
    command = [sys.executable, "-c", script]
    return HttpEngine("fake", command, Path("model"), {}, folder / "log")


@pytest.mark.parametrize("lies", [0, 1])
def test_a_server_is_asked_and_its_tokens_are_counted(tmp_path: Path, lies: int) -> None:
    engine = http_engine(tmp_path, SERVER.replace("LIES", str(lies)))
    try:
        if lies:
            with pytest.raises(RuntimeError, match=r"fake: .*'completion_tokens': 4.* 5 tokens"):
                engine.run([[1, 2, 3]], 5)
            return
        taken = engine.run([[1, 2, 3]], 5)
    finally:
        engine.end()
    assert taken.rest_s >= 4 * 0.02
    assert taken.total_s >= taken.first_s + taken.rest_s
    assert engine.start_s > 0


def test_a_server_that_ends_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)fake ended:.*no such model"):
        http_engine(tmp_path, "raise SystemExit('no such model')")


def test_the_worker_of_llama_is_asked_by_lines(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexec {sys.executable} {tmp_path}/worker.py\n")
    python.chmod(0o755)
    engine = LlamaEngine("llama", python, tmp_path / "m.gguf", 2, tmp_path / "log")
    try:
        assert engine.run([[1], [2]], 8) == Taken(2.0, 2.0, 4.0)
        # What it can't show (it looks no prefix up) is no figure, not a zero.
        assert np.isnan(bench_engines.cached_prefix(engine, np.random.default_rng(0)))
    finally:
        engine.end()


class Recorder:
    """An engine that writes down what it was asked, and takes as long as it is told."""

    start_s = 1.0

    def __init__(self, name: str, log: list[tuple[str, int, int]], taken: Taken) -> None:
        self.name, self._log, self._taken = name, log, taken

    def run(self, prompts: list[list[int]], new_tokens: int) -> Taken:
        self._log.append((self.name, len(prompts), new_tokens))
        return self._taken

    def end(self) -> None:
        self._log.append((self.name, 0, 0))


@pytest.fixture
def asked() -> list[tuple[str, int, int]]:
    return []


def test_rounds_take_turns_and_the_first_does_not_count(asked: list[tuple[str, int, int]]) -> None:
    engines = [Recorder(name, asked, Taken(2.0, 4.0, 8.0)) for name in ("a", "b")]
    found = bench_engines.rounds_of(engines, 2, {})
    streams = [name for name, prompts, new in asked if (prompts, new) == (1, 128)]
    assert streams == ["a", "b", "b", "a", "a", "b"]
    assert found["one stream, tok/s"] == {"a": [127 / 4] * 2, "b": [127 / 4] * 2}
    assert found["prefill of 4,096, tok/s"]["a"] == [2048.0] * 2
    assert found["16 concurrent, tok/s"]["b"] == [16 * 128 / 8] * 2
    assert found["cached prefix, s to first token"]["a"] == [2.0] * 2


def test_an_engine_that_ends_leaves_the_others_their_figures(
    asked: list[tuple[str, int, int]],
) -> None:
    class Ending(Recorder):
        def run(self, prompts: list[list[int]], new_tokens: int) -> Taken:
            if len(prompts) == 16:
                raise EngineEnded("b ended with -11")
            return super().run(prompts, new_tokens)

    ended: dict[str, str] = {}
    taken = Taken(2.0, 4.0, 8.0)
    engines = [Recorder("a", asked, taken), Ending("b", asked, taken)]
    found = bench_engines.rounds_of(engines, 2, ended)
    assert ended == {"b": "b ended with -11"}
    assert found["16 concurrent, tok/s"]["a"] == [16 * 128 / 8] * 2
    for figures in found.values():
        assert np.isnan(figures["b"]).all()  # the round that warms up came through, no other
        assert len(figures["b"]) == len(figures["a"]) == 2
    assert [name for name, *_ in asked].count("b") == 2


def test_a_killed_server_is_told_from_a_refusal(tmp_path: Path) -> None:
    engine = http_engine(tmp_path, SERVER.replace("LIES", "0"))
    try:
        engine._process.kill()
        engine._process.wait()
        with pytest.raises(EngineEnded, match="fake ended with -9"):
            engine.run([[1, 2, 3]], 5)
    finally:
        engine.end()


def test_all_engines_end_when_one_can_not_start(asked: list[tuple[str, int, int]]) -> None:
    def refuse() -> Recorder:
        raise RuntimeError("no memory")

    how = {"a": lambda: Recorder("a", asked, Taken(1, 1, 1)), "b": refuse}
    with pytest.raises(RuntimeError, match="no memory"), bench_engines.started(how):
        pass
    assert asked == [("a", 0, 0)] * 2  # the start that warms the cache, and the one that stays


def test_what_is_not_known_is_a_dash() -> None:
    report = {"start_s": {"a": 1.0, "b": 2.5}, "medians": {"work": {"a": 12.345, "b": None}}}
    assert bench_engines.markdown(report).splitlines() == [
        "| work | a | b |",
        "|---|---:|---:|",
        "| work | 12.35 | - |",
        "| start until ready, s | 1 | 2.5 |",
    ]
