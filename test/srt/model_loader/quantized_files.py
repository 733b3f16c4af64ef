"""Writes tiny quantised checkpoints, and says what their numbers are.

Codes are drawn at random; what they mean is computed here from the public descriptions of the
formats, element by element where that is readable, by other code than the loader's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
    rows, columns = torch.arange(outputs) // block[0], torch.arange(inputs) // block[1]
    numbers *= scale[rows[:, None], columns]
    return {"weight": weight, "scale": scale}, numbers


def words(numbers: torch.Tensor, bits: int, dim: int, order: Sequence[int]) -> torch.Tensor:
    """Numbers packed into int32 along `dim`: bits [bits * i, ...) of a word are number order[i]."""
    count = 32 // bits
    missing = -numbers.shape[dim] % count
    moved = torch.nn.functional.pad(numbers.long().movedim(dim, -1), (0, missing))
    groups = moved.unflatten(-1, (-1, count))
    total = sum(groups[..., place] << bits * i for i, place in enumerate(order))
    assert isinstance(total, torch.Tensor)
    signed = torch.where(total >= 1 << 31, total - (1 << 32), total)
    return signed.to(torch.int32).movedim(-1, dim).contiguous()


@dataclass(frozen=True)
class Drawn:
    """Integers of a matrix: codes [N, K], zeros and scales [N, G], each input's group [K]."""

    codes: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    groups: torch.Tensor

    @property
    def numbers(self) -> torch.Tensor:
        steps = self.codes - self.zeros[:, self.groups]
        return steps.float() * self.scales.float()[:, self.groups]


def integers(
    outputs: int,
    inputs: int,
    seed: int,
    *,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    dtype: torch.dtype = torch.float16,
    permuted: bool = False,
) -> Drawn:
    """Unsigned codes; zeros are the middle when `symmetric`. `group` -1: one for a whole row."""
    count = 1 if group == -1 else -(-inputs // group)
    codes = torch.randint(0, 1 << bits, (outputs, inputs), generator=draw(seed))
    zeros = torch.full((outputs, count), 1 << bits - 1)
    if not symmetric:
        zeros = torch.randint(1, 1 << bits, (outputs, count), generator=draw(seed + 1))
    scales = torch.rand(outputs, count, generator=draw(seed + 2)) * 0.5 + 0.75
    scales = (scales * 4 / (1 << bits) / inputs**0.5).to(dtype)
    groups = torch.arange(inputs) // (inputs if group == -1 else group)
    if permuted:
        groups = groups[torch.randperm(inputs, generator=draw(seed))]
    return Drawn(codes, zeros, scales, groups)


def gptq(drawn: Drawn, *, bits: int = 4, less: int = 1, indexed: bool = True) -> Coded:
    """`less` is taken off the zeros that are stored."""
    order = range(32 // bits)
    tensors = {
        "qweight": words(drawn.codes.t(), bits, 0, order),
        "qzeros": words(drawn.zeros.t() - less, bits, 1, order),
        "scales": drawn.scales.t(),
    }
    if indexed:
        tensors["g_idx"] = drawn.groups.int()
    return tensors, drawn.numbers


def awq(drawn: Drawn, order: Sequence[int] = (0, 2, 4, 6, 1, 3, 5, 7)) -> Coded:
    tensors = {
        "qweight": words(drawn.codes.t(), 4, 1, order),
        "qzeros": words(drawn.zeros.t(), 4, 1, order),
        "scales": drawn.scales.t(),
    }
    return tensors, drawn.numbers


def packed(drawn: Drawn, *, bits: int = 4, symmetric: bool = True) -> Coded:
    """compressed-tensors' pack-quantized."""
    tensors = {
        "weight_packed": words(drawn.codes, bits, 1, range(32 // bits)),
        "weight_scale": drawn.scales,
        "weight_shape": torch.tensor(drawn.codes.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = words(drawn.zeros, bits, 0, range(32 // bits))
    if not torch.equal(drawn.groups, drawn.groups.sort().values):
        tensors["weight_g_idx"] = drawn.groups.int()
    return tensors, drawn.numbers


def signed_bytes(drawn: Drawn, *, symmetric: bool = True) -> Coded:
    """compressed-tensors' int-quantized."""
    tensors = {
        "weight": (drawn.codes - 128).to(torch.int8),
        "weight_scale": drawn.scales,
    }
    if not symmetric:
        tensors["weight_zero_point"] = (drawn.zeros - 128).to(torch.int8)
    return tensors, drawn.numbers


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
