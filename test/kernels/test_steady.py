"""Steps like the ones before allocate nothing: counted in a program of its own."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

sgl_kernel = pytest.importorskip("sgl_kernel")

HERE = Path(__file__).parent
API = HERE.parents[1] / "sgl-kernel" / "csrc"
COMPILER = shutil.which("g++") or shutil.which("c++")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_attention_allocates_once(tmp_path: Path) -> None:
    library = Path(sgl_kernel.__file__).with_name("libsgl_kernel_cpu.so")
    program = tmp_path / "steady_check"
    source = str(HERE / "steady_check.cpp")
    build = [str(COMPILER), "-std=c++17", "-O1", f"-I{API}", source, str(library), "-pthread",
             f"-Wl,-rpath,{library.parent}", "-o", str(program)]  # fmt: skip
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("then 0") == 2
