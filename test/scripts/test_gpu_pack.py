"""What goes into the pack for a GPU machine: sizes decide, nothing is downloaded here."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpu_pack import NEEDED, WISHED, choose, download_command, sizes_of

ROOT = Path(__file__).resolve().parents[2]
# Of the other machine's Python, or named otherwise when imported.
THERE = {"torch", "numpy", "transformers", "tokenizers", "safetensors"}


def test_what_is_needed_always_goes() -> None:
    assert choose({"a": 10, "b": 20}, {}, 30) == ["a", "b"]
    with pytest.raises(ValueError, match="the largest is b"):
        choose({"a": 10, "b": 21}, {"c": 1}, 30)


def test_wishes_go_smallest_first_while_they_fit() -> None:
    wished = {"large": 50, "small": 5, "middle": 15}
    assert choose({"a": 10}, wished, 100) == ["a", "small", "middle", "large"]
    assert choose({"a": 10}, wished, 79) == ["a", "small", "middle"]
    assert choose({"a": 10}, wished, 30) == ["a", "small", "middle"]
    assert choose({"a": 10}, wished, 29) == ["a", "small"]
    assert choose({"a": 10}, wished, 10) == ["a"]


def test_every_dependency_is_there_or_packed() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = text.split("dependencies = [")[1].split("]")[0]
    names = {line.strip().strip('",').split(">")[0] for line in block.splitlines() if '"' in line}
    assert len(names) > 15
    assert names - THERE - set(NEEDED) - set(WISHED) == set()


def test_wheels_are_fetched_for_the_other_python_alone(tmp_path: Path) -> None:
    command = download_command(["orjson"], "3.13", tmp_path)
    assert command[command.index("--python-version") + 1] == "3.13"
    assert "--no-deps" in command
    assert "--only-binary=:all:" in command
    assert command[-1] == "orjson"
    (tmp_path / "x-1-py3-none-any.whl").write_bytes(b"12345")
    (tmp_path / "other.txt").write_bytes(b"1")
    assert sizes_of(tmp_path) == {"x-1-py3-none-any.whl": 5}
