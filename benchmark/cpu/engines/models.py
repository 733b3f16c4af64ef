"""The same weights in the formats that the compared engines read."""

from __future__ import annotations

import subprocess
from pathlib import Path

# llama.h, enum llama_ftype
_FILE_TYPES = {"q8_0": 7, "bf16": 32}

_QUANTISE = """
import sys, llama_cpp
source, target, file_type = sys.argv[1:]
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype = int(file_type)
settings.allow_requantize = True
result = llama_cpp.llama_model_quantize(source.encode(), target.encode(), settings)
sys.exit(int(result))
"""


def as_hugging_face(gguf: Path, folder: Path) -> Path:
    """A directory with the GGUF file's weights dequantised to bfloat16, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    target = folder / "bf16"
    if not (target / "config.json").exists():
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
    return target


def as_gguf(gguf: Path, file_type: str, folder: Path, python: Path) -> Path:
    """The file again in llama.cpp's type `q8_0` or `bf16`, converted by the library of `python`."""
    target = folder / f"{file_type}.gguf"
    if not target.exists():
        number = str(_FILE_TYPES[file_type])
        command = [python, "-c", _QUANTISE, gguf, target, number]
        subprocess.run(command, check=True, capture_output=True)
    return target
