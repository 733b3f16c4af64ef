"""Host memory: parsing, and every bound of a made-up system in a temporary root."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest

from sglang.srt.utils.host_memory import (
    CgroupMount,
    HostMemory,
    cgroup_directories,
    parse_cgroup_mounts,
    parse_cgroup_paths,
    parse_meminfo,
    read_host_memory,
)

KIB = 1024
MEMINFO = """MemTotal:       1000000 kB
MemFree:         100000 kB
MemAvailable:    800000 kB
HugePages_Total:       0
"""
V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw\n"
V1_MOUNTS = (
    "31 23 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
)


def put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def v2_root(root: Path, files: dict[str, str]) -> Path:
    return put(
        root,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/a/b\n",
            "proc/self/mountinfo": V2_MOUNT,
            **{f"sys/fs/cgroup/{name}": text for name, text in files.items()},
        },
    )


def test_parse_meminfo_scales_to_bytes_and_skips_counts() -> None:
    assert parse_meminfo(MEMINFO) == {
        "MemTotal": 1_000_000 * KIB,
        "MemFree": 100_000 * KIB,
        "MemAvailable": 800_000 * KIB,
    }


def test_parse_cgroup_paths_of_both_versions() -> None:
    text = "9:name=systemd:/s\n4:cpu,memory:/x/y:z\n3:cpuset:/c\n0::/u\n"
    assert parse_cgroup_paths(text) == {1: "/x/y:z", 2: "/u"}


def test_parse_cgroup_mounts_keeps_memory_only_and_undoes_escapes() -> None:
    text = V1_MOUNTS + "40 31 0:40 /docker/a /sys/fs/my\\040group rw - cgroup2 none rw\nshort\n"
    assert parse_cgroup_mounts(text) == [
        CgroupMount(1, "/", "/sys/fs/cgroup/memory"),
        CgroupMount(2, "/docker/a", "/sys/fs/my group"),
    ]


@pytest.mark.parametrize(
    ("root", "path", "expected"),
    [
        ("/", "/a/b", ["/m/a/b", "/m/a", "/m"]),
        ("/", "/", ["/m"]),
        ("/a", "/a/b", ["/m/b", "/m"]),
        ("/docker/x", "/other", ["/m"]),
        ("/", "/../../y", ["/m"]),
    ],
)
def test_every_ancestor_that_the_mount_shows(root: str, path: str, expected: list[str]) -> None:
    found = list(cgroup_directories(CgroupMount(2, root, "/m"), path))
    assert found == [PurePosixPath(one) for one in expected]


def test_no_cgroup_leaves_memavailable(tmp_path: Path) -> None:
    put(tmp_path, {"proc/meminfo": MEMINFO})
    assert read_host_memory(tmp_path) == HostMemory(1_000_000 * KIB, 800_000 * KIB, "MemAvailable")


@pytest.mark.parametrize("level", ["a/b", "a", "."])
def test_v2_the_tightest_level_counts(tmp_path: Path, level: str) -> None:
    files = {f"{name}/memory.max": "max\n" for name in ("a/b", "a")}
    files |= {f"{name}/memory.current": "1000\n" for name in ("a/b", "a", ".")}
    files[f"{level}/memory.max"] = "51000\n"
    memory = read_host_memory(v2_root(tmp_path, files))
    assert memory.available_bytes == 50_000
    assert memory.bound_by == str(PurePosixPath("/sys/fs/cgroup") / level)


def test_v2_high_bounds_too_and_inactive_cache_is_available(tmp_path: Path) -> None:
    files = {
        "a/b/memory.max": "100000\n",
        "a/b/memory.high": "90000\n",
        "a/b/memory.current": "50000\n",
        "a/b/memory.stat": "anon 1\ninactive_file 20000\nactive_file 7\n",
    }
    assert read_host_memory(v2_root(tmp_path, files)).available_bytes == 90_000 - 30_000


def test_v2_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    files = {"a/memory.max": "10\n", "a/memory.current": "99\n"}
    assert read_host_memory(v2_root(tmp_path, files)).available_bytes == 0


def test_v2_unlimited_or_unreadable_sets_no_bound(tmp_path: Path) -> None:
    files = {"a/memory.max": "max\n", "a/memory.current": "99\n", "a/b/memory.max": "5\n"}
    assert read_host_memory(v2_root(tmp_path, files)).bound_by == "MemAvailable"


def test_v1_limit_and_unlimited_parents(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/memory"
    put(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "4:memory:/a/b\n0::/\n",
            "proc/self/mountinfo": V1_MOUNTS,
            f"{base}/memory.limit_in_bytes": "9223372036854771712\n",
            f"{base}/memory.usage_in_bytes": "5000\n",
            f"{base}/a/memory.limit_in_bytes": "60000\n",
            f"{base}/a/memory.usage_in_bytes": "25000\n",
            f"{base}/a/memory.stat": "inactive_file 1\ntotal_inactive_file 5000\n",
            f"{base}/a/b/memory.limit_in_bytes": "9223372036854771712\n",
            f"{base}/a/b/memory.usage_in_bytes": "100\n",
        },
    )
    memory = read_host_memory(tmp_path)
    assert memory.available_bytes == 60_000 - 20_000
    assert memory.bound_by == "/sys/fs/cgroup/memory/a"


def test_v1_limit_of_an_ancestor_that_is_not_shown(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/memory"
    put(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "4:memory:/kube/pod/c\n",
            "proc/self/mountinfo": V1_MOUNTS.replace(" / /sys", " /kube/pod/c /sys"),
            f"{base}/memory.limit_in_bytes": "9223372036854771712\n",
            f"{base}/memory.usage_in_bytes": "1000\n",
            f"{base}/memory.stat": "hierarchical_memory_limit 31000\n",
        },
    )
    assert read_host_memory(tmp_path).available_bytes == 30_000


def test_this_machine() -> None:
    memory = read_host_memory()
    assert 0 < memory.available_bytes <= memory.total_bytes
