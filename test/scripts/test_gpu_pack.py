"""What goes into the pack for a GPU machine: sizes decide, nothing is downloaded here."""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path

import pytest

import gpu_pack
from gpu_pack import NEEDED, WISHED, choose, download_command, sizes_of

ROOT = Path(__file__).resolve().parents[2]
# Of the other machine's Python, or named otherwise when imported.
THERE = {"torch", "numpy", "transformers", "tokenizers", "safetensors"}
CLIENTS = {"aiohttp"}  # of bench_serving alone, which is not run there


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
    assert names - THERE - CLIENTS - set(NEEDED) - set(WISHED) == set()


def test_wheels_are_fetched_for_the_other_python_alone(tmp_path: Path) -> None:
    command = download_command(["orjson"], "3.13", tmp_path)
    assert command[command.index("--python-version") + 1] == "3.13"
    assert "--no-deps" in command
    assert "--only-binary=:all:" in command
    assert command[-1] == "orjson"
    (tmp_path / "x-1-py3-none-any.whl").write_bytes(b"12345")
    (tmp_path / "other.txt").write_bytes(b"1")
    assert sizes_of(tmp_path) == {"x-1-py3-none-any.whl": 5}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip writes wheels of a few bytes; git is the real one."""
    run = gpu_pack.subprocess.run

    def stand_in(command: list[str], check: bool) -> subprocess.CompletedProcess[bytes]:
        if "pip" not in command:
            return run(command, check=check)
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir(exist_ok=True)
        names = [name for name in (*NEEDED, *WISHED) if name in command]
        for name in names:
            (folder / f"{name}-1-py3-none-any.whl").write_bytes(b"x" * 1000)
        return subprocess.CompletedProcess(command, 0 if names != ["protobuf"] else 1)

    monkeypatch.setattr(gpu_pack.subprocess, "run", stand_in)


def test_a_folder_of_wheels_is_filled_anew(tmp_path: Path, no_network: None) -> None:
    target = tmp_path / "wheels"
    target.mkdir()
    (target / "old-1-py3-none-any.whl").write_bytes(b"old")
    assert gpu_pack.main(["--wheels", str(target)]) == 0
    names = {path.name.removesuffix("-1-py3-none-any.whl") for path in target.iterdir()}
    assert names == {*NEEDED, *WISHED}
    assert gpu_pack.main(["--wheels", str(target), "--limit", str(1000 * len(NEEDED) + 1500)]) == 0
    assert len(list(target.iterdir())) == len(NEEDED) + 1
    assert gpu_pack.main(["--wheels", str(target), "--limit", "5000"]) == 1


def test_the_archive_holds_the_tree_and_the_wheels(tmp_path: Path, no_network: None) -> None:
    target = tmp_path / "pack.tar.gz"
    assert gpu_pack.main(["--output", str(target)]) == 0
    with tarfile.open(target) as file:
        names = set(file.getnames())
    assert {"scripts/gpu_check.sh", "python/sglang/launch_server.py"} <= names
    assert {f"wheels/{name}-1-py3-none-any.whl" for name in NEEDED} <= names
    assert gpu_pack.main(["--output", str(target), "--limit", "1MiB"]) == 1
