"""Writes tiny quantised checkpoints, and says what their numbers are.

Codes are drawn at random; what they mean is computed here from the public descriptions of the
formats, element by element where that is readable, by other code than the loader's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

Coded = tuple[dict[str, torch.Tensor], torch.Tensor]
"""Tensors by role, and the float32 numbers that they mean."""


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def e2m1(code: int) -> float:
    """One sign bit, two of exponent (bias 1), one of mantissa."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    size = mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
    return -size if sign else size


def mxfp4(num_experts: int, outputs: int, inputs: int, seed: int) -> Coded:
    """`blocks`, `scales` and numbers [E, outputs, inputs]."""
    shape = (num_experts, outputs, inputs // 32)
    blocks = torch.randint(0, 256, (*shape, 16), generator=draw(seed)).to(torch.uint8)
    scales = torch.randint(121, 125, shape, generator=draw(seed + 1)).to(torch.uint8)
    values = torch.tensor([e2m1(code) for code in range(16)])
    numbers = torch.empty(*shape, 32)
    for byte in range(16):
        numbers[..., 2 * byte] = values[(blocks[..., byte] % 16).long()]
        numbers[..., 2 * byte + 1] = values[(blocks[..., byte] // 16).long()]
    numbers *= 2.0 ** (scales.float() - 127).unsqueeze(-1)
    return {"blocks": blocks, "scales": scales}, numbers.flatten(2)


def write_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    quantization: Mapping[str, Any],
    replaced: Mapping[str, torch.Tensor],
    *,
    num_files: int = 1,
    config: Mapping[str, Any] | None = None,
) -> str:
    """Write `replaced` beside the model's tensors that it does not replace, over several files.

    A tensor of the model is replaced when `replaced` has one of its name, or has its name with an
    ending in place of its `weight`. Neighbours in the order of names lie in different files.
    """
    model.config.save_pretrained(folder)
    path = folder / "config.json"
    raw = {**json.loads(path.read_text()), **(config or {})}
    path.write_text(json.dumps({**raw, "quantization_config": dict(quantization)}))
    tensors = {name: tensor.contiguous() for name, tensor in replaced.items()}
    stems = {name.rpartition(".")[0] for name in replaced}
    for name, tensor in model.state_dict().items():
        stem, _, leaf = name.rpartition(".")
        coded = leaf == "weight" and stem in stems
        merged = any(other.startswith(f"{name}_") and "bias" not in other for other in replaced)
        if name not in tensors and not coded and not merged:
            tensors[name] = tensor.clone().contiguous()
    names = sorted(tensors)
    where = {}
    for number in range(num_files):
        file = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        mine = names[number::num_files]
        save_file({name: tensors[name] for name in mine}, folder / file)
        where |= dict.fromkeys(mine, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return str(folder)
