"""Which weights stay quantised: decided once, before a model is loaded."""

from __future__ import annotations

import torch

from sglang.srt.utils.native import native_kernels

# SGLang's names of checkpoints' own codes; what says by which kernel is the same here.
_METHODS = {
    "mxfp4": "mxfp4",
    "fp8": "fp8",
    "gptq": "gptq",
    "gptq_marlin": "gptq",
    "awq": "awq",
    "awq_marlin": "awq",
    "compressed-tensors": "compressed-tensors",
}
_ONLY_READ = frozenset({"fp8"})  # no kernel multiplies with its codes
QUANTIZATIONS = ("gguf", "int8", *_METHODS, "none")


def choose_quantization(
    name: str | None, *, is_gguf: bool, method: str | None = None, device: str | torch.device
) -> str:
    """What stays quantised: "gguf" or `method` the checkpoint's own codes, "int8", or "none".

    `name` is one of `QUANTIZATIONS`, None the best for this checkpoint and device. `method` is
    that of the `WeightScheme` of a Hugging Face checkpoint, None where its weights are numbers.
    A checkpoint's codes become numbers where no kernel multiplies with them. Raises ValueError,
    one line, for another name and for what can't be had here.
    """
    on_cpu = torch.device(device).type == "cpu"
    has_kernels = on_cpu and native_kernels() is not None
    own = "gguf" if is_gguf else method
    if name is not None and name not in QUANTIZATIONS:
        raise ValueError(f"--quantization {name}: must be one of {', '.join(QUANTIZATIONS)}")
    if name in _METHODS and _METHODS[name] != own:
        what = "has no quantised weights" if own is None else f"is quantised by {own}"
        raise ValueError(f"--quantization {name}: this checkpoint {what}, and is not made so here")
    if name is None or name in _METHODS:
        keeps = own is not None and own not in _ONLY_READ and has_kernels
        return own if own is not None and keeps else "none"
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
