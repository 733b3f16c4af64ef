"""Random LoRA adapters in PEFT's format, and models that have one merged into their weights."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


def make_factors(
    model: PreTrainedModel,
    leaves: Iterable[str] = ALL,
    *,
    rank: int = 4,
    seed: int = 0,
    ranks: Mapping[str, int] | None = None,
) -> Factors:
    """A and B of every linear layer whose name ends so, large enough to change most tokens."""
    generator = torch.Generator().manual_seed(1000 + seed)
    factors: Factors = {}
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if not isinstance(module, torch.nn.Linear) or leaf not in set(leaves):
            continue
        k = (ranks or {}).get(leaf, rank)
        outputs, inputs = module.weight.shape
        a = torch.randn(k, inputs, generator=generator) / inputs**0.5
        b = torch.randn(outputs, k, generator=generator) * (0.5 / k**0.5)
        factors[name] = (a, b)
    return factors


def save_adapter(
    folder: Path,
    factors: Factors,
    *,
    rank: int = 4,
    alpha: float = 8.0,
    extra: Mapping[str, torch.Tensor] | None = None,
    **config: Any,
) -> str:
    """Write a directory as PEFT does; `config` replaces fields of its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({name.rpartition(".")[2] for name in factors}),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "inference_mode": True,
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    tensors = dict(extra or {})
    for name, (a, b) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    return str(folder)


def merged(
    model: PreTrainedModel,
    factors: Factors,
    *,
    alpha: float = 8.0,
    rslora: bool = False,
    alphas: Mapping[str, float] | None = None,
) -> PreTrainedModel:
    """A copy of the model whose weights are W + scale * B A, computed in float64."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for name, (a, b) in factors.items():
            leaf_alpha = (alphas or {}).get(name.rpartition(".")[2], alpha)
            scale = leaf_alpha / (math.sqrt(len(a)) if rslora else len(a))
            weight = made.get_submodule(name).weight
            weight.copy_(weight.double() + scale * (b.double() @ a.double()))
    return made
