"""Needles through a real server: `python scripts/needle.py`, as its user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import needle
from e2e.server_process import ServerProcess, demo_model

GIB = 1 << 30


def ask(folder: Path, *arguments: str) -> dict[str, Any]:
    """The report of a run whose answers are all exact."""
    output = folder / "needle.json"
    flags = ["--output", str(output), "--bandwidth-buffer", "32MiB"]
    assert needle.main([*flags, *arguments]) == 0
    report: dict[str, Any] = json.loads(output.read_text())
    return report


def test_a_picture_that_nothing_can_draw_is_refused_before_the_server_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        needle.main(["--lengths=64k", "--heat-map=found.png"])
    assert "--heat-map needs matplotlib" in capsys.readouterr().err


def test_needles_in_64k_tokens(tmp_path: Path) -> None:
    """Every depth is a full prefill, and the same prompt again a prefix hit up to a page."""
    report = ask(
        tmp_path,
        "--lengths=64k",
        "--depths=0,100",
        "--server-flags=--kv-memory-budget 256MiB",
    )
    assert [cell["depth"] for cell in report["cells"]] == [0, 100]
    for cell in report["cells"]:
        assert cell["exact"]
        assert cell["second_exact"]
        assert cell["prompt_tokens"] == 64_000
        assert cell["cached_tokens"] == 0
        assert 64_000 - 64 <= cell["second_cached_tokens"] < 64_000
        assert cell["mapped_bytes"] < 256 << 20
        speed = cell["read_bandwidth_bytes_per_s"]
        assert cell["decode_bound_tokens_per_s"] == pytest.approx(speed / cell["kv_bytes"])
    assert len({cell["read_bandwidth_bytes_per_s"] for cell in report["cells"]}) > 1  # each its own
    # Only the global layer keeps every token.
    full, chunked = (report["cells"][0][key] for key in ("kv_bytes", "dense_kv_bytes"))
    assert (full, chunked) == (64_000 * 512, 64_000 * 1024)


def test_the_global_layer_in_the_middle(tmp_path: Path) -> None:
    """Four layers, every row of the global one computed; one haystack holds all needles."""
    report = ask(
        tmp_path,
        "--layers=4",
        "--lengths=10k",
        "--depths=0,50,100",
        "--shared",
        "--clients=2",
        "--server-flags=--kv-memory-budget 256MiB",
    )
    first, *others = report["cells"]
    assert first["cached_tokens"] == 0
    # The others differ in their last two tokens: a hit of all whole pages before.
    assert all(cell["cached_tokens"] > 9_900 for cell in others)
    for client in first["clients"]:
        assert client["error"] is None
        assert client["tokens"] >= 64


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_needles_in_a_million_tokens(tmp_path: Path) -> None:
    report = ask(
        tmp_path,
        "--lengths=1M",
        "--depths=0,25,50,75,100",
        "--shared",
        "--answer-tokens=64",
        "--server-flags=--kv-memory-budget 1GiB",
    )
    for cell in report["cells"]:
        assert cell["second_cached_tokens"] >= 1_000_000 - 64
        assert cell["peak"]["rss"] < cell["kv_bytes"] + 3 * GIB


def test_another_checkpoint_is_asked_for_what_is_told(
    server: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A trained model, a text needle at the end: right or wrong, it is scored on its tokens."""
    output = tmp_path / "needle.json"
    code = needle.main(
        [
            "--model-path",
            demo_model(),
            "--lengths=200",
            "--depths=100",
            "--needle= The magic number is 7391.",
            "--question= The magic number is",
            "--answer= 7391",
            "--haystack=The grass is green. The sky is blue.",
            f"--url={server.url}",
            "--output",
            str(output),
            "--bandwidth-buffer=32MiB",
            "--markdown",
        ]
    )
    (cell,) = json.loads(output.read_text())["cells"]
    assert len(cell["got"]) == len(cell["expected"]) > 1
    assert (code == 0) == cell["exact"]
    assert capsys.readouterr().out.startswith("| context | depth | exact |")
    assert cell["score"] > 0.5
    assert cell["peak"]["rss"] is None  # another's processes are not looked at
