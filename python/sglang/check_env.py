"""`python -m sglang.check_env`: what this machine and installation are, for a report of a problem.

Prints one line for each fact that decides how a server runs: versions, processor and kernels, GPUs,
memory and the limits around it. What can't be found out is said to be so; it always ends with 0.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from sglang.srt.utils.host_memory import read_host_memory
from sglang.srt.utils.native import native_kernels, triton_kernels
from sglang.srt.utils.sizes import format_bytes

PACKAGES = (
    *("sglang", "sgl-kernel", "torch", "triton", "transformers", "tokenizers", "safetensors"),
    *("gguf", "numpy", "llguidance", "starlette", "uvicorn", "uvloop", "pyzmq", "msgspec"),
    *("aiohttp", "pillow", "cuda-bindings", "flashinfer-python", "openai"),
)
_SYSTEM_FILES = (
    ("Huge pages", "/sys/kernel/mm/transparent_hugepage/enabled"),
    ("Overcommit", "/proc/sys/vm/overcommit_memory"),
    ("Most mappings", "/proc/sys/vm/max_map_count"),
)


def main(argv: Sequence[str] | None = None, root: Path = Path("/")) -> int:
    """Print all facts; the exit status is 0. `root` is where the system's files are looked for."""
    if argv:
        print(f"check_env: takes no arguments, got {argv[0]!r}", file=sys.stderr)
        return 2
    for name, value in facts(root):
        print(f"{name}: {value}")
    return 0


def facts(root: Path = Path("/")) -> list[tuple[str, str]]:
    """(name, value) of everything, in the order in which it is printed."""
    found = [("Python", " ".join(sys.version.split())), ("System", platform.platform())]
    found += [(name, _version(name)) for name in PACKAGES]
    found += [
        ("Processor", _processor(root)),
        ("Threads of torch", str(torch.get_num_threads())),
        ("Native kernels", _asked(_native)),
        ("Triton's kernels", "there" if triton_kernels() is not None else "not there"),
        ("GPUs", _asked(_gpus)),
        ("Memory", _asked(_memory)),
    ]
    return found + [(name, _read(root, path)) for name, path in _SYSTEM_FILES]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _asked(fact: Callable[[], str]) -> str:
    """A fact, or why it can't be had: a driver that is broken is what such a report is about."""
    try:
        return fact()
    except (OSError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]


def _processor(root: Path) -> str:
    """The first one's name, as Linux gives it."""
    for line in _read(root, "/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _native() -> str:
    kernels = native_kernels()
    return "not there" if kernels is None else f"for {kernels.cpu_isa().name}"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch finds"
    numbers = range(torch.cuda.device_count())
    made_for = f"torch for CUDA {torch.version.cuda}"
    return ", ".join([*(torch.cuda.get_device_name(number) for number in numbers), made_for])


def _memory() -> str:
    memory = read_host_memory()
    free, total = format_bytes(memory.available_bytes), format_bytes(memory.total_bytes)
    return f"{free} of {total} may be taken ({memory.bound_by})"


def _read(root: Path, path: str) -> str:
    try:
        return (root / path.lstrip("/")).read_text(encoding="utf-8").strip()
    except OSError:
        return "not known"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
