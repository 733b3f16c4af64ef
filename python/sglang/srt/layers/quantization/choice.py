"""Which weights stay quantised: decided once, before a model is loaded."""

from __future__ import annotations

import torch

from sglang.srt.utils.native import codes_kernels

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
QUANTIZATIONS = ("gguf", "int8", *_METHODS, "none")


def choose_quantization(
    name: str | None, *, is_gguf: bool, method: str | None = None, device: str | torch.device
) -> str:
    """What stays quantised: "gguf" or `method` the checkpoint's own codes, or "none".

    "int8", and without a `method` "fp8", are weights that are rounded at load. `name` is one of
    `QUANTIZATIONS`, None the best for this checkpoint and device. `method` is that of the
    `WeightScheme` of a Hugging Face checkpoint, None where its weights are numbers. A
    checkpoint's codes become numbers where no kernel multiplies with them. Raises ValueError,
    one line, for another name and for what can't be had here.
    """
    has_kernels = codes_kernels(device) is not None
    own = "gguf" if is_gguf else method
    if name is not None and name not in QUANTIZATIONS:
        raise ValueError(f"--quantization {name}: must be one of {', '.join(QUANTIZATIONS)}")
    rounds = name == "int8" or (name == "fp8" and own is None)
    if name in _METHODS and _METHODS[name] != own and not rounds:
        what = "has no quantised weights" if own is None else f"is quantised by {own}"
        raise ValueError(f"--quantization {name}: this checkpoint {what}, and is not made so here")
    if name is None or (name in _METHODS and not rounds):
        return own if own is not None and has_kernels else "none"
    if name == "gguf" and not is_gguf:
        raise ValueError("--quantization gguf keeps the codes of a GGUF file; this model is none")
    if name != "none" and not has_kernels:
        on_gpu = torch.device(device).type == "cuda"
        more = "and the package triton" if on_gpu else "which takes a C++ compiler"
        raise ValueError(
            f"--quantization {name} needs the native kernels: pip install ./sgl-kernel, {more}"
        )
    return name
