"""How much room a directory's file system has, and whether it is memory in truth.

Called once at start, for the disk tier of the KV cache. Changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

_MEMORY_KINDS: Final = ("tmpfs", "ramfs")


@dataclass(frozen=True, slots=True)
class DiskSpace:
    """Bytes that an ordinary user may still take, and the file system's kind ("" unknown)."""

    free_bytes: int
    kind: str

    @property
    def is_memory(self) -> bool:
        """What is kept there takes memory of the machine."""
        return self.kind in _MEMORY_KINDS


def read_disk_space(directory: Path) -> DiskSpace:
    """The room below `directory`. Raises OSError when there is no such directory."""
    found = os.statvfs(directory)
    mounts = [(one.mountpoint, one.fstype) for one in psutil.disk_partitions(all=True)]
    return DiskSpace(found.f_bavail * found.f_frsize, kind_of(directory.resolve(), mounts))


def kind_of(directory: Path, mounts: Sequence[tuple[str, str]]) -> str:
    """The kind of the file system that `directory` (absolute) lies on; "" when none is known.

    `mounts` are (mount point, kind); the deepest one that holds it counts, of equals the last.
    """
    best, kind = -1, ""
    for point, its_kind in mounts:
        depth = len(Path(point).parts)
        if depth >= best and directory.is_relative_to(point):
            best, kind = depth, its_kind
    return kind
