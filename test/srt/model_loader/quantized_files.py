"""Writes tiny quantised checkpoints, and says what their numbers are.

Codes are drawn at random; what they mean is computed here from the public descriptions of the
formats, element by element where that is readable, by other code than the loader's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
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


def e4m3(code: int) -> float:
    """One sign bit, four of exponent (bias 7), three of mantissa; all ones are no number."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    if code & 127 == 127:
        return float("nan")
    size = 2.0**-9 * mantissa if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8)
    return -size if sign else size


def fp8(outputs: int, inputs: int, seed: int, block: tuple[int, int]) -> Coded:
    """`weight`, `scale` [ceil, ceil] for blocks of (outputs, inputs), and numbers."""
    weight = (torch.randn(outputs, inputs, generator=draw(seed)) * 40).to(torch.float8_e4m3fn)
    values = torch.tensor([e4m3(code) for code in range(256)])
    numbers = values[weight.view(torch.uint8).long()]
    shape = (-(-outputs // block[0]), -(-inputs // block[1]))
    scale = torch.rand(shape, generator=draw(seed + 1)) * 0.005 + 0.001
    for row in range(outputs):
        for column in range(inputs):
            numbers[row, column] *= scale[row // block[0], column // block[1]]
    return {"weight": weight, "scale": scale}, numbers


def plain_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Of the model, by name, apart from it."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def quantise(
    model: PreTrainedModel,
    code: Callable[[str, int, int], Coded | None],
) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint of `model`, whose layers' projections become others.

    `code` gets a module's name and its outputs and inputs; None leaves it as it is. Experts are
    named one by one. Side effect: the model's weights are the numbers that `code` gave.
    """
    tensors = plain_tensors(model)
    for name, parameter in model.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            parent = name.rpartition(".")[0]
            del tensors[name]
            # Llama 4 keeps inputs first.
            outputs_first = model.config.model_type != "llama4_text"
            for expert, weight in enumerate(parameter):
                whole = weight if outputs_first else weight.t()
                halves = whole.chunk(2) if "gate_up" in name else (whole,)
                parts = ("gate_proj", "up_proj") if "gate_up" in name else ("down_proj",)
                for part, weight in zip(parts, halves, strict=True):
                    tensors |= _coded(f"{parent}.{expert}.{part}", weight, code)
        elif name.endswith("_proj.weight"):
            del tensors[name]
            tensors |= _coded(name.removesuffix(".weight"), parameter, code)
    return tensors


def _coded(
    module: str, weight: torch.Tensor, code: Callable[[str, int, int], Coded | None]
) -> dict[str, torch.Tensor]:
    found = code(module, *weight.shape)
    if found is None:
        return {f"{module}.weight": weight.clone()}
    tensors, numbers = found
    weight.copy_(numbers)
    return {f"{module}.{role}": tensor for role, tensor in tensors.items()}


def write_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    quantization: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    *,
    num_files: int = 1,
    config: Mapping[str, Any] | None = None,
) -> str:
    """Write `tensors` over several files, neighbours in the order of names into different ones."""
    model.config.save_pretrained(folder)
    path = folder / "config.json"
    raw = {**json.loads(path.read_text()), **(config or {})}
    path.write_text(json.dumps({**raw, "quantization_config": dict(quantization)}))
    names = sorted(tensors)
    where = {}
    for number in range(num_files):
        file = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        mine = names[number::num_files]
        save_file({name: tensors[name].contiguous() for name in mine}, folder / file)
        where |= dict.fromkeys(mine, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return str(folder)
