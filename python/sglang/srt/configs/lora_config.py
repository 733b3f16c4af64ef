"""adapter_config.json of a LoRA adapter, as PEFT writes it: ranks, scales, and what is refused.

Source: the documentation of PEFT's LoraConfig. No torch; read by the adapters' reader alone.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

CONFIG_NAME = "adapter_config.json"

# What an adapter is in other ways than served here: field, values that ask for nothing, reason.
_REFUSED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("modules_to_save", (None, []), "whole modules beside the adapter are not served"),
    ("use_dora", (None, False), "DoRA is not served"),
    ("bias", (None, "none"), "biases of adapters are not served"),
    ("lora_bias", (None, False), "biases of adapters are not served"),
    ("fan_in_fan_out", (None, False), "transposed weights are not served"),
    ("layer_replication", (None, []), "replicated layers are not served"),
    ("trainable_token_indices", (None, [], {}), "trained embeddings are not served"),
    ("target_parameters", (None, []), "adapters of experts and other parameters are not served"),
    ("alora_invocation_tokens", (None, []), "adapters that begin within a prompt are not served"),
    ("use_qalora", (None, False), "QALoRA is not served"),
)  # fmt: skip
# Ways to begin that change the base model's weights: without those the adapter means nothing.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What a module's A and B are worth.

    Patterns map module names, or ends of them, or regular expressions, to other values than `rank`
    and `alpha`. `target_leaves` are the last words of modules that the adapter claims to change;
    empty: it does not say so by names.
    """

    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_leaves: frozenset[str]

    @classmethod
    def from_folder(cls, folder: Path) -> LoraConfig:
        """Read the file in `folder`; ValueError naming the file for what can't be served."""
        file = folder / CONFIG_NAME
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{folder} has no {CONFIG_NAME}") from None
        except (OSError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{file} is no JSON object")
        try:
            return cls._from_fields(fields)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    @classmethod
    def _from_fields(cls, fields: Mapping[str, Any]) -> LoraConfig:
        kind = fields.get("peft_type")
        if kind != "LORA":
            raise ValueError(f"peft_type is {kind!r}; LORA is served")
        for name, neutral, reason in _REFUSED:
            if fields.get(name) not in neutral:
                raise ValueError(f"{name} is {fields[name]!r}: {reason}")
        start = fields.get("init_lora_weights")
        if isinstance(start, str) and start.startswith(_CHANGED_BASE):
            raise ValueError(f"init_lora_weights is {start!r}: it changes the base model's weights")
        targets = fields.get("target_modules")
        names = targets if isinstance(targets, list) else []
        return cls(
            _rank("r", fields.get("r")),
            _number("lora_alpha", fields.get("lora_alpha")),
            fields.get("use_rslora") is True,
            {k: _rank("rank_pattern", v) for k, v in _pattern(fields, "rank_pattern")},
            {k: _number("alpha_pattern", v) for k, v in _pattern(fields, "alpha_pattern")},
            frozenset(str(name).rpartition(".")[2] for name in names),
        )

    def rank_of(self, module: str) -> int:
        """The rank of a module's A and B."""
        return _looked_up(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What B A of a module is multiplied by."""
        rank, alpha = self.rank_of(module), _looked_up(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def _looked_up(pattern: Mapping[str, T], module: str, default: T) -> T:
    for key, value in pattern.items():
        if re.fullmatch(rf"(.*\.)?({key})", module):
            return value
    return default


def _pattern(fields: Mapping[str, Any], name: str) -> list[tuple[str, Any]]:
    pattern = fields.get(name) or {}
    if not isinstance(pattern, dict):
        raise ValueError(f"{name} is no object")
    for key in pattern:
        try:
            re.compile(key)
        except re.error as error:
            raise ValueError(f"{name}: {key!r} is no regular expression: {error}") from error
    return list(pattern.items())


def _rank(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a number from 1 on, got {value!r}")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return float(value)
