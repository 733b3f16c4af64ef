"""How much room a directory has, and on what kind of file system it lies."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang.srt.utils.disk_space import DiskSpace, kind_of, read_disk_space

MOUNTS = [("/", "overlay"), ("/tmp", "tmpfs"), ("/tmp/disk", "xfs"), ("/data", "ext4")]


def test_the_deepest_mount_counts() -> None:
    assert kind_of(Path("/var"), MOUNTS) == "overlay"
    assert kind_of(Path("/tmp/a/b"), MOUNTS) == "tmpfs"
    assert kind_of(Path("/tmp/disk/a"), MOUNTS) == "xfs"
    assert kind_of(Path("/database"), MOUNTS) == "overlay"
    assert kind_of(Path("/data"), [*MOUNTS, ("/data", "btrfs")]) == "btrfs"
    assert kind_of(Path("/data"), []) == ""


def test_a_file_system_in_memory_is_known_as_such() -> None:
    assert DiskSpace(1, "tmpfs").is_memory
    assert not DiskSpace(1, "ext4").is_memory


def test_a_real_directory_has_room(tmp_path: Path) -> None:
    assert read_disk_space(tmp_path).free_bytes > 0
    with pytest.raises(FileNotFoundError):
        read_disk_space(tmp_path / "nowhere")
