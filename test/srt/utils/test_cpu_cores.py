"""Cores that a process may use, of made-up machines in a temporary root."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang.srt.utils.cpu_cores import usable_cores


def machine(root: Path, cores: list[tuple[int, int]], quotas: dict[str, str]) -> Path:
    """Logical cpu i is core cores[i][1] of package cores[i][0]; `quotas` are cpu.max files."""
    files = {
        "proc/self/cgroup": "0::/a/b\n",
        "proc/self/mountinfo": "30 23 0:26 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw\n",
        **{f"sys/fs/cgroup/{name}/cpu.max": text for name, text in quotas.items()},
    }
    for cpu, (package, core) in enumerate(cores):
        topology = f"sys/devices/system/cpu/cpu{cpu}/topology"
        files[f"{topology}/core_id"] = f"{core}\n"
        files[f"{topology}/physical_package_id"] = f"{package}\n"
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


FOUR_OF_TWO = [(0, 0), (0, 1), (0, 0), (0, 1)]  # siblings
TWO_SOCKETS = [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize(
    ("cores", "quotas", "cpus", "expected"),
    [
        (FOUR_OF_TWO, {}, range(4), 2),
        (TWO_SOCKETS, {}, range(4), 4),
        (TWO_SOCKETS, {}, [1, 3], 2),
        (TWO_SOCKETS, {"a/b": "max 100000"}, range(4), 4),
        (TWO_SOCKETS, {"a/b": "150000 100000"}, range(4), 2),
        (TWO_SOCKETS, {"a": "300000 100000", "a/b": "max 100000"}, range(4), 3),
        (TWO_SOCKETS, {"a/b": "1000 100000"}, range(4), 1),
        (TWO_SOCKETS, {"a/b": "nonsense"}, range(4), 4),
        ([], {}, range(3), 3),  # no topology: each is its own
    ],
)
def test_cores(
    cores: list[tuple[int, int]],
    quotas: dict[str, str],
    cpus: list[int],
    expected: int,
    tmp_path: Path,
) -> None:
    assert usable_cores(machine(tmp_path, cores, quotas), cpus) == expected


def test_this_machine_has_one_at_least() -> None:
    assert usable_cores() >= 1
