"""The command `sglang`."""

from __future__ import annotations

import sys
from importlib.metadata import version

import pytest

from sglang.cli import main


def test_serve_is_launch_server(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, dict[str, object], list[str]]] = []
    monkeypatch.setattr(sys, "argv", ["sglang", "serve", "--model-path", "m"])
    main(None, lambda name, **how: ran.append((name, how, sys.argv[1:])))
    how = {"run_name": "__main__", "alter_sys": True}
    assert ran == [("sglang.launch_server", how, ["--model-path", "m"])]


def test_a_server_that_cannot_start_ends_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sglang"])
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--no-such-flag"])
    assert ended.value.code == 2
    assert "--no-such-flag" in capsys.readouterr().err


def test_other_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == main(["--version"]) == 0
    assert capsys.readouterr().out == f"sglang {version('sglang')}\n" * 2
    assert main(["--help"]) == 0
    assert "sglang serve --model-path MODEL" in capsys.readouterr().out
    for argv, complaint in ((["dance"], "no command 'dance'"), ([], "a command is missing")):
        assert main(argv) == 2
        assert f"sglang: {complaint}\nusage:" in capsys.readouterr().err
