"""The CUDA backing over the real cuda-bindings, down to the driver's calls as C functions.

A libcuda.so.1 of our own (libcuda/stand_in.c) is compiled against NVIDIA's cuda.h and found by the
package as the driver's is. What only hardware can tell, kernels above all, is not tested here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TEST = Path(__file__).resolve().parents[2]
ROOT = TEST.parent
HERE = Path(__file__).parent / "libcuda"
CHECKS = re.findall(r"^def (check_\w+)", (HERE / "checks.py").read_text(encoding="utf-8"), re.M)
TELL = """
from sglang.srt.errors import BackingError
from sglang.srt.mem_cache.segment_backing.cuda_driver import CudaDriver
try:
    print(CudaDriver())
except BackingError as error:
    print(error)
"""


def include_folder() -> Path | None:
    """Where NVIDIA's runtime package has cuda.h, None when it is not installed."""
    found = importlib.util.find_spec("nvidia")
    for place in found.submodule_search_locations or () if found else ():
        for header in sorted(Path(place).glob("*/include/cuda.h"), reverse=True):
            return header.parent
    return None


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the stand-in's libcuda.so.1."""
    if importlib.util.find_spec("cuda") is None:
        pytest.skip("the package cuda-bindings is not installed")
    headers, compiler = include_folder(), shutil.which("cc")
    if headers is None or compiler is None:
        pytest.skip("cuda.h (the package nvidia-cuda-runtime) or a C compiler is missing")
    folder = tmp_path_factory.mktemp("libcuda")
    flags = ["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]
    source, target = str(HERE / "stand_in.c"), str(folder / "libcuda.so.1")
    subprocess.run([compiler, *flags, "-isystem", str(headers), source, "-o", target], check=True)
    return folder


def run(library: Path | None, *arguments: str, **environ: str) -> str:
    """What a Python that finds the library prints."""
    path = [ROOT / "python", TEST, ROOT / "scripts", ROOT / "sgl-kernel/python"]
    inherited = os.environ.get("PYTHONPATH", "")
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*map(str, path), inherited]),
        "LD_LIBRARY_PATH": str(library or ""),
        "OMP_NUM_THREADS": "1",
        **environ,
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def report(library: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What came of every check, all of them in one process."""
    path = tmp_path_factory.mktemp("report") / "report.json"
    run(library, "-m", "srt.mem_cache.libcuda.checks", str(path), STAND_IN_BYTES=str(64 << 20))
    found: dict[str, str] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize("check", CHECKS)
def test_the_backing_over_the_drivers_own_calls(check: str, report: dict[str, str]) -> None:
    assert report[check] == ""


def test_the_checks_are_found() -> None:
    assert len(CHECKS) >= 10


def test_a_device_without_virtual_memory_is_refused(library: Path) -> None:
    said = run(library, "-c", TELL, STAND_IN_NO_VMM="1")
    assert said.strip() == "CUDA device 0 has no virtual memory management"


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a driver")
def test_a_machine_without_a_driver_is_told_in_one_line(library: Path) -> None:
    said = run(None, "-c", TELL)
    assert said.startswith("the cuda_vmm backing finds no CUDA driver: ")
    assert len(said.splitlines()) == 1
