"""How much memory this machine has, and how much of it this process may still take.

Available is the least of the kernel's MemAvailable and what every cgroup above this process (v1
and v2) has left. Called before the KV budget is set and before memory is mapped; reads files
under a root that tests replace, keeps nothing. Other systems than Linux are asked through psutil.

Sources: Linux Documentation/filesystems/proc.rst, admin-guide/cgroup-v2.rst ("memory.max",
"memory.current"), admin-guide/cgroup-v1/memory.rst, and proc(5) for cgroup and mountinfo.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Bytes of the whole machine, bytes that may still be taken, and what sets that bound.

    `bound_by` is "MemAvailable" or the directory of the cgroup with the least room.
    """

    total_bytes: int
    available_bytes: int
    bound_by: str


@dataclass(frozen=True, slots=True)
class CgroupMount:
    """Where a cgroup hierarchy that may account memory is mounted.

    `root` is the path inside the hierarchy that appears at `mount_point`.
    """

    version: int
    root: str
    mount_point: str


def read_host_memory(root: Path = Path("/")) -> HostMemory:
    """The machine's memory now; `root` stands for the file system's root.

    Files that are missing or unreadable set no bound. A cgroup's page cache that is inactive
    counts as available, as the kernel drops it on demand. Swap is left out.
    """
    meminfo = parse_meminfo(read_text(root / "proc/meminfo") or "")
    if "MemTotal" not in meminfo or "MemAvailable" not in meminfo:
        memory = psutil.virtual_memory()
        return HostMemory(int(memory.total), int(memory.available), "MemAvailable")
    available, bound_by = meminfo["MemAvailable"], "MemAvailable"
    mounts = parse_cgroup_mounts(read_text(root / "proc/self/mountinfo") or "")
    paths = parse_cgroup_paths(read_text(root / "proc/self/cgroup") or "")
    for mount in mounts:
        path = paths.get(mount.version)
        if path is None:
            continue
        for directory in cgroup_directories(mount, path):
            left = _cgroup_bytes_left(root / directory.relative_to("/"), mount.version)
            if left is not None and left < available:
                available, bound_by = left, str(directory)
    return HostMemory(meminfo["MemTotal"], available, bound_by)


def parse_meminfo(text: str) -> dict[str, int]:
    """/proc/meminfo as name -> bytes. Lines that are not "Name: n kB" are left out."""
    figures = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) == 3 and words[1].isdigit() and words[2] == "kB":
            figures[words[0].rstrip(":")] = int(words[1]) * 1024
    return figures


def parse_cgroup_paths(text: str) -> dict[int, str]:
    """/proc/self/cgroup as version -> path of this process where memory may be accounted."""
    paths = {}
    for line in text.splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and not controllers:
            paths[2] = path
        elif "memory" in controllers.split(","):
            paths[1] = path
    return paths


def parse_cgroup_mounts(text: str) -> list[CgroupMount]:
    """The cgroup mounts of /proc/self/mountinfo that may account memory."""
    mounts = []
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        words, details = left.split(), right.split()
        if len(words) < 5 or not details:
            continue
        root, mount_point = _unescape(words[3]), _unescape(words[4])
        if details[0] == "cgroup2":
            mounts.append(CgroupMount(2, root, mount_point))
        elif details[0] == "cgroup" and "memory" in details[-1].split(","):
            mounts.append(CgroupMount(1, root, mount_point))
    return mounts


def cgroup_directories(mount: CgroupMount, path: str) -> Iterator[PurePosixPath]:
    """The directories of the cgroup `path` and of every ancestor that `mount` shows.

    A path outside the mount's root (other namespace) is taken as the mount point itself.
    """
    point = PurePosixPath(mount.mount_point)
    try:
        inner = PurePosixPath(path).relative_to(mount.root)
    except ValueError:
        inner = PurePosixPath()
    if ".." in inner.parts:
        inner = PurePosixPath()
    yield point / inner
    for parent in inner.parents:
        if point / parent != point / inner:
            yield point / parent


def _cgroup_bytes_left(directory: Path, version: int) -> int | None:
    """What one cgroup's limits leave; None when it sets no limit (or isn't there)."""
    if version == 2:
        limit_names: tuple[str, ...] = ("memory.max", "memory.high")
        usage_name = "memory.current"
    else:
        limit_names, usage_name = ("memory.limit_in_bytes",), "memory.usage_in_bytes"
    limits = [_number(read_text(directory / name)) for name in limit_names]
    usage = _number(read_text(directory / usage_name))
    if usage is None:
        return None
    stat = _parse_stat(read_text(directory / "memory.stat") or "")
    # of v1: the least limit of all ancestors, also of those that no mount shows
    limits.append(stat.get("hierarchical_memory_limit"))
    reclaimable = stat.get("inactive_file" if version == 2 else "total_inactive_file", 0)
    known = [limit for limit in limits if limit is not None]
    if not known:
        return None
    return max(0, min(known) - max(0, usage - reclaimable))


def _parse_stat(text: str) -> dict[str, int]:
    """memory.stat: lines of a name and a number."""
    figures = {}
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        number = _number(value)
        if number is not None:
            figures[name] = number
    return figures


def _number(text: str | None) -> int | None:
    """A non-negative decimal; None for "max", for nothing and for anything else."""
    word = (text or "").strip()
    return int(word) if word.isdigit() else None


def read_text(path: Path) -> str | None:
    """What a file holds; None when it can't be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _unescape(word: str) -> str:
    """Undo mountinfo's octal escapes of space, tab, newline and backslash."""
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        word = word.replace(code, char)
    return word
