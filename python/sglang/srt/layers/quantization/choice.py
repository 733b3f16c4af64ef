"""Which weights stay quantised: decided once, before a model is loaded."""

from __future__ import annotations

import torch

from sglang.srt.utils.native import native_kernels

QUANTIZATIONS = ("gguf", "int8", "none")


def choose_quantization(name: str | None, *, is_gguf: bool, device: str | torch.device) -> str:
    """One of `QUANTIZATIONS`: what `name` asks for, None the best for this checkpoint and device.

    Raises ValueError, one line, for another name and for what can't be had here.
    """
    on_cpu = torch.device(device).type == "cpu"
    has_kernels = on_cpu and native_kernels() is not None
    if name is None:
        return "gguf" if is_gguf and has_kernels else "none"
    if name not in QUANTIZATIONS:
        raise ValueError(f"--quantization {name}: must be one of {', '.join(QUANTIZATIONS)}")
    if name == "gguf" and not is_gguf:
        raise ValueError("--quantization gguf keeps the codes of a GGUF file; this model is none")
    if name != "none" and not on_cpu:
        raise ValueError(f"--quantization {name} computes on a CPU only")
    if name != "none" and not has_kernels:
        raise ValueError(
            f"--quantization {name} needs the native kernels: pip install ./sgl-kernel, which "
            "takes a C++ compiler"
        )
    return name
