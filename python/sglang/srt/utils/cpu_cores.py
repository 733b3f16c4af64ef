"""How many threads compute best here: a core each of those that this process may use.

A second thread on a core waits for the same memory and the same arithmetic units. Called once at
start; reads files under a root that tests replace.

Sources: Linux Documentation/admin-guide/cputopology.rst ("core_id", "physical_package_id") and
cgroup-v2.rst ("cpu.max").
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from math import ceil
from pathlib import Path

from sglang.srt.utils.host_memory import (
    cgroup_directories,
    parse_cgroup_mounts,
    parse_cgroup_paths,
    read_text,
)


def usable_cores(root: Path = Path("/"), cpus: Iterable[int] | None = None) -> int:
    """Cores among the logical `cpus` (None: those that this process may run on), at least 1.

    Siblings count once; a cgroup's quota of CPU time (v2), its ancestors' included, bounds the
    number, rounded up. Files that are missing set no bound.
    """
    if cpus is None:
        affinity = getattr(os, "sched_getaffinity", None)
        cpus = range(os.cpu_count() or 1) if affinity is None else affinity(0)
    cores = {_core_of(root, cpu) for cpu in cpus}
    return max(1, min(len(cores), *(ceil(quota) for quota in _quotas(root)), 1 << 20))


def _core_of(root: Path, cpu: int) -> tuple[str, str]:
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    core, package = (read_text(topology / name) for name in ("core_id", "physical_package_id"))
    if core is None or package is None:
        return f"cpu{cpu}", ""
    return core.strip(), package.strip()


def _quotas(root: Path) -> list[float]:
    """CPUs' worth of time that the cgroups above this process grant."""
    found = []
    path = parse_cgroup_paths(read_text(root / "proc/self/cgroup") or "").get(2)
    for mount in parse_cgroup_mounts(read_text(root / "proc/self/mountinfo") or ""):
        if mount.version != 2 or path is None:
            continue
        for directory in cgroup_directories(mount, path):
            limits = read_text(root / directory.relative_to("/") / "cpu.max") or ""
            quota, _, period = limits.strip().partition(" ")
            if quota.isdigit() and period.isdigit() and int(period):
                found.append(int(quota) / int(period))
    return found
