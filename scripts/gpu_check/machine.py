"""What the machine is: prints one JSON object. A process of its own, so that nobody holds a GPU."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from typing import Any

_PACKAGES = ("torch", "triton", "transformers", "cuda-bindings", "flashinfer-python")


def describe(dry: bool) -> dict[str, Any]:
    """Python, packages and the device."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    if dry:
        found["device"] = "none: dry run on a CPU"
        return found
    import torch  # takes a second

    if not torch.cuda.is_available():
        found["device"] = "no CUDA device"
        return found
    properties = torch.cuda.get_device_properties(0)
    found["device"] = properties.name
    found["device_gib"] = round(properties.total_memory / (1 << 30), 1)
    found["multiprocessors"] = properties.multi_processor_count
    found["cuda"] = torch.version.cuda
    return found


if __name__ == "__main__":
    print(json.dumps(describe("--dry-run-cpu" in sys.argv)))
