"""The report over a real socket: a server with real memory behind it, one that is none."""

from __future__ import annotations

import io
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sglang import kv_report
from sglang.srt.mem_cache.allocation import KVMemory, PageNeed
from srt.entrypoints.fake_service import LiveServer
from srt.managers.scheduler_harness import Harness, make_memory
from srt.mem_cache.disk_backing import DiskBacking
from srt.mem_cache.memory_driver import make_memory as make_tiny_memory

PAGE = 4


@pytest.fixture(params=[1, 2])
def memory(request: pytest.FixtureRequest) -> KVMemory:
    """Per group: a segment that a row fills, one that a prefix half fills, an empty one."""
    memory = make_memory(page_size=PAGE, pages_per_segment=4, segments=8, groups=request.param)
    leases = []
    for tokens in (16, 16, 16):
        lease = memory.open(np.arange(tokens, dtype=np.int32), max_prefix=0)
        assert lease is not None
        assert memory.alloc_for_extend([PageNeed(lease, tokens)]) is not None
        leases.append(lease)
    memory.close(leases[1], np.arange(16, dtype=np.int32), 8)
    memory.close(leases[2], None, 0)
    return memory


@pytest.fixture
def server(memory: KVMemory, tmp_path: Path) -> Iterator[LiveServer]:
    harness = Harness(memory, page_size=PAGE, context_length=100)
    with LiveServer(tmp_path) as server:
        server.service.state = harness.control("server_info").data
        yield server


def run(*argv: str, **kwargs: object) -> tuple[int, str]:
    out = io.StringIO()
    code = kv_report.main(argv, out=out, **kwargs)  # type: ignore[arg-type]
    return code, out.getvalue()


def test_the_report_shows_every_group(server: LiveServer, memory: KVMemory) -> None:
    code, text = run("--url", server.url)
    assert code == 0
    maps = [line.strip() for line in text.splitlines() if line.startswith("  #")]
    assert maps == ["#e_"] * len(memory.allocators)
    assert text.count("4 used, 2 cached, 6 free; ") == len(memory.allocators)
    assert "requests: 0 running, 0 queued; tokens: 8 cached" in text
    assert "context: 100 tokens (1,048,576 requested), page size 4" in text
    for group in range(len(memory.allocators)):
        assert f"group {group} (full, " in text
    assert kv_report.LEGEND in text


def test_segments_on_disk_are_shown_as_such(tmp_path: Path) -> None:
    memory, _ = make_tiny_memory(budget_segments=1, disk_segments=4, backing=DiskBacking())
    for first, computed in ((1, 16), (2, 16), (3, 8)):
        lease = memory.open(np.full(16, first, np.int32), max_prefix=0)
        assert lease is not None
        for _ in range(computed // 8):
            assert memory.alloc_for_extend([PageNeed(lease, 8)]) is not None
            memory.note_launched(memory.manager.launched_epoch + 1)
            memory.note_completed(memory.manager.launched_epoch)
        if first == 1:
            memory.close(lease, np.full(16, first, np.int32), 16)
    with LiveServer(tmp_path) as server:
        server.service.state = Harness(memory, page_size=PAGE).control("server_info").data
        code, text = run("--url", server.url)
    assert code == 0
    assert "on disk: 384 B of 768 B" in text
    assert "  +#=" in text.splitlines()


def test_json_is_what_the_server_said(server: LiveServer) -> None:
    code, text = run("--url", server.url + "/", "--json")
    assert code == 0
    told = json.loads(text)
    state = dict(server.service.state)
    assert told["memory"] == state.pop("memory")
    assert told["state"] == state


def test_watch_asks_again_until_it_is_interrupted(server: LiveServer) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            raise KeyboardInterrupt
        server.service.state["num_running_reqs"] = len(slept)

    code, text = run("--url", server.url, "--watch", "2.5", sleep=sleep)
    assert code == 0
    assert slept == [2.5, 2.5, 2.5]
    assert [f"{n} running" in text for n in range(4)] == [True, True, True, False]


def test_an_api_key_is_sent(memory: KVMemory, tmp_path: Path) -> None:
    with LiveServer(tmp_path, api_key="secret") as server:
        server.service.state = Harness(memory, page_size=PAGE).control("server_info").data
        assert run("--url", server.url)[0] == 1
        assert run("--url", server.url, "--api-key", "secret")[0] == 0


def test_no_server_is_one_line_and_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert run("--url", url) == (1, "")
    told = capsys.readouterr().err
    assert told.startswith(f"kv_report: {url}: ")
    assert told.count("\n") == 1


def test_a_server_without_segments_is_one_line_and_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with LiveServer(tmp_path) as server:
        assert run("--url", server.url) == (1, "")
    assert "no segmented memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("segment", "char"),
    [
        (("M", 0, 0, 64), "_"),
        (("M", 1, 0, 63), "1"),
        (("M", 6, 1, 57), "2"),
        (("M", 63, 0, 1), "9"),
        (("M", 1, 63, 0), "#"),
        (("M", 0, 1, 63), "a"),
        (("M", 0, 63, 1), "i"),
        (("M", 0, 64, 0), "@"),
        (("G", 0, 0, 0), "~"),
        (("D", 0, 0, 64), "^"),
        (("X", 0, 0, 0), "?"),
    ],
)
def test_one_character_per_segment(segment: tuple[str, int, int, int], char: str) -> None:
    assert kv_report.segment_char(*segment) == char


def test_gaps_are_dots_and_long_ones_are_counted() -> None:
    empty = ["M", 0, 0, 4]
    assert kv_report.map_line([[3, *empty], [4, *empty], [6, *empty]]) == ".._" + "_._"
    assert kv_report.map_line([[1, *empty], [5000, *empty]]) == "_...(4,998)_"
    assert kv_report.map_line([]) == ""


def test_long_maps_are_folded_and_what_is_left_out_is_said(server: LiveServer) -> None:
    found = server.service.state["memory"]["segment_maps"][0]
    found["segments"] = [[n, "M", 0, 0, 4] for n in range(1, 101)]
    found["num_segments"] = 1234
    _, text = run("--url", server.url, "--width", "42")
    assert text.count("  " + "_" * 40 + "\n") == 2
    assert "  " + "_" * 20 + "\n  and 1,134 more segments that are not listed" in text
