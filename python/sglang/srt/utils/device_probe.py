"""Which device this machine offers, found without importing torch where there can be none.

`ServerArgs` asks when `--device` is not given; the processes of the text side must stay free of
torch on a machine without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

# What NVIDIA's driver puts into /dev, and what stands there under Windows' Linux.
_DRIVER_FILES = ("nvidiactl", "nvidia0", "dxg")


def detect_device(
    dev: Path = Path("/dev"), cuda_is_available: Callable[[], bool] | None = None
) -> str:
    """ "cuda" where a driver is present and torch can use it, else "cpu".

    `dev` stands for the directory of device files, `cuda_is_available` for torch's answer.
    """
    if not any((dev / name).exists() for name in _DRIVER_FILES):
        return "cpu"
    return "cuda" if (cuda_is_available or torch_sees_cuda)() else "cpu"


def torch_sees_cuda() -> bool:
    """Whether the installed torch is built for CUDA and finds a device."""
    import torch

    return torch.cuda.is_available()
