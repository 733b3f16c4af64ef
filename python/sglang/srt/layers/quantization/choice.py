"""Which weights stay quantised: decided once, before a model is loaded."""

from __future__ import annotations

import torch

from sglang.srt.utils.native import codes_kernels

QUANTIZATIONS = ("gguf", "int8", "none")


def choose_quantization(name: str | None, *, is_gguf: bool, device: str | torch.device) -> str:
    """One of `QUANTIZATIONS`: what `name` asks for, None the best for this checkpoint and device.

    Raises ValueError, one line, for another name and for what can't be had here.
    """
    has_kernels = codes_kernels(device) is not None
    if name is None:
        return "gguf" if is_gguf and has_kernels else "none"
    if name not in QUANTIZATIONS:
        raise ValueError(f"--quantization {name}: must be one of {', '.join(QUANTIZATIONS)}")
    if name == "gguf" and not is_gguf:
        raise ValueError("--quantization gguf keeps the codes of a GGUF file; this model is none")
    if name != "none" and not has_kernels:
        on_gpu = torch.device(device).type == "cuda"
        more = "and the package triton" if on_gpu else "which takes a C++ compiler"
        raise ValueError(
            f"--quantization {name} needs the native kernels: pip install ./sgl-kernel, {more}"
        )
    return name
