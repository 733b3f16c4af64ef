"""The report of `python -m sglang.check_env`, whole and where the machine says nothing."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from sglang import check_env


def test_every_fact_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_env.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = dict(line.split(": ", 1) for line in lines)
    assert len(found) == len(lines) == len(check_env.facts())
    assert found["torch"] == version("torch")
    assert found["flashinfer-python"] == "not installed"
    assert " of " in found["Memory"]
    assert all(found.values())


def test_a_broken_driver_and_missing_files_are_facts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken() -> bool:
        raise RuntimeError("driver too old\nsecond line")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    monkeypatch.setattr(check_env, "native_kernels", lambda: None)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor : 0\nmodel name : A 1\nmodel name : B 2\n")
    found = dict(check_env.facts(tmp_path))
    assert found["GPUs"] == "RuntimeError: driver too old"
    assert found["Native kernels"] == "not there"
    assert found["Processor"] == "A 1"
    assert found["Overcommit"] == "not known"


def test_it_takes_no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_env.main(["--all"]) == 2
    assert "takes no arguments, got '--all'" in capsys.readouterr().err
