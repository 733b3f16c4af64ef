"""Tiny random models to be pooled, with the files that sentence-transformers would put beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from srt.models.hf_models import make_hf_model, save

MODULE_TYPES = "sentence_transformers.models"


def write_pooling(folder: Path, mode: str, *, normalize: bool = True) -> None:
    """modules.json and 1_Pooling/config.json; `mode` is the switch that is on."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": kind}
        for i, kind in enumerate(kinds)
    ]
    for module in modules:
        module["type"] = f"{MODULE_TYPES}.{module['type']}"
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    switches = ("lasttoken", "mean_tokens", "cls_token", "max_tokens", "mean_sqrt_len_tokens")
    values = {f"pooling_mode_{name}": f"pooling_mode_{name}" == mode for name in switches}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(values))


def save_decoder(model: PreTrainedModel, folder: Path) -> str:
    """As sentence-transformers saves one: the decoder alone, names without `model.`."""
    return save(model.model, folder)


def hidden_states(model: PreTrainedModel, prompt: list[int]) -> torch.Tensor:
    """float32 [n, hidden] after the final norm, by transformers."""
    with torch.inference_mode():
        found: torch.Tensor = model.model(torch.tensor([prompt])).last_hidden_state[0]
    return found


def make_classifier(family: str, num_labels: int, **changes: Any) -> PreTrainedModel:
    """A random sequence classifier in float32."""
    causal = make_hf_model(family, **changes)
    config = causal.config
    config.id2label = {i: f"class {i}" for i in range(num_labels)}
    config.pad_token_id = 0
    with torch.random.fork_rng():
        torch.manual_seed(21)
        model = AutoModelForSequenceClassification.from_config(config).float().eval()
    model.model.load_state_dict(causal.model.state_dict())
    return model
