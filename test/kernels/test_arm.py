"""The kernels built for 64-bit ARM, run in an emulator where its tools are installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_arm.sh"
TOOLS = ("cmake", "ninja", "aarch64-linux-gnu-g++")
HAS_TOOLS = all(shutil.which(tool) for tool in TOOLS) and (
    shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TOOLS, reason="no ARM compiler or emulator")
def test_kernels_on_arm() -> None:
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "level 5"  # NEON
    assert lines[-1] == "0 failures"
    assert sum(line.endswith(" ok") for line in lines) == 86
