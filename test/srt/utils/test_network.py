"""Ports that are free, and that no connection is made from."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from sglang.srt.utils import network
from sglang.srt.utils.network import get_free_port


@pytest.mark.parametrize("told", ["20000 30000", "1024 65535", "", None], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_neighbours_are_free(
    told: str | None, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "range"
    if told is not None:
        path.write_text(told)
    monkeypatch.setattr(network, "_RANGE", path)
    first = get_free_port(count)
    assert first + count <= (20_000 if told == "20000 30000" else 65_536)
    for port in range(first, first + count):
        socket.create_server(("127.0.0.1", port)).close()


def test_none_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(probe: socket.socket, port: int) -> int:
        raise OSError("in use")

    monkeypatch.setattr(network, "_bind", taken)
    with pytest.raises(OSError, match="no 2 neighbouring ports are free"):
        get_free_port(2)
