"""Whether a model is pooled instead of asked to write, and what its vectors are: `PoolingConfig`.

Decided once at start, by both towers alike, from the flags and from the files beside the weights:
those of sentence-transformers (`modules.json`) count where there are any. Never imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang.srt.configs.families import ENCODER_FAMILIES, POOLED_FAMILIES
from sglang.srt.configs.gguf_file import read_gguf_header
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.managers.io_struct import PoolingMode, PoolingSpec

_CLASSIFIER = "ForSequenceClassification"
# What fields of config.json are for attention to what came before, and nothing else.
_CAUSAL = {"is_causal": True, "use_bidirectional_attention": False}
# The switches of a file 1_Pooling/config.json that are served.
_SWITCHES: Mapping[str, PoolingMode] = {
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
}
# GGUF's numbers, those of `PoolingType` of the gguf package.
_GGUF_TYPES: Mapping[Any, PoolingMode] = {1: "mean", 2: "cls", 3: "last"}
_NAMES: Mapping[str, PoolingMode] = {"lasttoken": "last", "mean": "mean", "cls": "cls"}


@dataclass(frozen=True, slots=True)
class PoolingConfig:
    """What one prompt's vector is.

    `mode` "last": the hidden state of the last token, "mean" the mean over all tokens, "cls" that
    of the first one. `normalize`: it has length 1. `labels` None: the vector is an embedding of
    `size` numbers; else it is the logits of a classifier, one for each name, and
    `independent_labels` says that each label is true or not by itself. `whole`: a prompt's tokens
    see each other in both directions, so all of it is computed in one step.
    """

    mode: PoolingMode
    normalize: bool
    size: int
    labels: tuple[str, ...] | None = None
    independent_labels: bool = False
    whole: bool = False

    @property
    def spec(self) -> PoolingSpec:
        """What a request says of it to the scheduler."""
        return PoolingSpec(self.mode, self.whole)


def pooling_of(config: ModelConfig, *, is_embedding: bool) -> PoolingConfig | None:
    """How the model of `config` is pooled; None: it generates.

    `is_embedding` (--is-embedding) asks for it; classifiers and checkpoints without a head are
    pooled anyhow. Raises ValueError, one line naming the file, for poolings that are not served and
    for attention in both directions.
    """
    pooling = _pooling_of(config, is_embedding)
    if pooling is not None:
        for name, causal in _CAUSAL.items():
            if config.raw.get(name, causal) not in (causal, None):
                raise ValueError(
                    f"{config.path}: attention in both directions ({name}) is not served"
                )
    return pooling


def _pooling_of(config: ModelConfig, is_embedding: bool) -> PoolingConfig | None:
    whole = config.encoder is not None
    usual: PoolingMode = "cls" if whole else "last"
    if config.architecture.endswith(_CLASSIFIER):
        labels = _labels(config.raw)
        independent = (
            len(labels) == 1 or config.raw.get("problem_type") == "multi_label_classification"
        )
        return PoolingConfig(usual, False, len(labels), labels, independent, whole)
    if not is_embedding and config.architecture not in {**POOLED_FAMILIES, **ENCODER_FAMILIES}:
        return None
    if config.is_gguf:
        return PoolingConfig(_mode_of_gguf(config.path), True, config.hidden_size)
    modules = Path(config.path) / "modules.json"
    if not modules.is_file():
        return PoolingConfig(usual, True, config.hidden_size, whole=whole)
    try:
        mode, normalize = _read_modules(modules)
    except ValueError as error:
        raise ValueError(f"{modules.parent}: {error}") from error
    if whole and mode == "last":
        raise ValueError(f"{modules.parent}: an encoder's last token is not pooled here")
    return PoolingConfig(mode, normalize, config.hidden_size, whole=whole)


def causal_name(architecture: str) -> str:
    """The architecture that has the same decoder and a head that writes."""
    if architecture not in POOLED_FAMILIES:
        return architecture
    return architecture.removesuffix(_CLASSIFIER).removesuffix("Model") + "ForCausalLM"


def _labels(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """The classes' names in order; as in transformers two without names where none are given."""
    names = raw.get("id2label")
    if names is None:
        count = raw.get("num_labels", 2)
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"num_labels must be a positive whole number, not {count!r}")
        return tuple(f"LABEL_{number}" for number in range(count))
    wanted = [str(number) for number in range(len(names))] if isinstance(names, dict) else []
    if not wanted or set(names) != set(wanted):
        raise ValueError(f"id2label must name the classes 0, 1, ..., not {names!r}")
    return tuple(str(names[number]) for number in wanted)


def _mode_of_gguf(path: str) -> PoolingMode:
    """What a GGUF file says of pooling; the last token where it says nothing."""
    metadata = read_gguf_header(path).metadata
    value = metadata.get(f"{metadata.get('general.architecture')}.pooling_type")
    if value in (None, 0):
        return "last"
    if value not in _GGUF_TYPES:
        raise ValueError(f"{path}: pooling_type {value!r} is not served")
    return _GGUF_TYPES[value]


def _read_modules(path: Path) -> tuple[PoolingMode, bool]:
    """(mode, whether a module normalises) of a modules.json and the pooling that it names."""
    modules = _read(path)
    if not isinstance(modules, list) or not all(isinstance(one, dict) for one in modules):
        raise ValueError(f"{path.name} must hold a list of modules")
    kinds = [str(one.get("type", "")).rpartition(".")[2] for one in modules]
    for kind in kinds:
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise ValueError(f"{path.name} has a module {kind!r}, which is not served")
    if kinds.count("Pooling") != 1:
        raise ValueError(f"{path.name} must name one module 'Pooling'")
    place = str(modules[kinds.index("Pooling")].get("path", ""))
    return _read_mode(path.parent / place / "config.json"), "Normalize" in kinds


def _read_mode(path: Path) -> PoolingMode:
    where = f"{path.parent.name}/{path.name}"
    values = _read(path)
    if not isinstance(values, dict):
        raise ValueError(f"{where} must hold a JSON object")
    chosen = [name for name, on in values.items() if name.startswith("pooling_mode_") and on]
    named = values.get("pooling_mode")
    if isinstance(named, str) and not chosen:
        chosen = [named]
    known = {**_SWITCHES, **_NAMES}
    if len(chosen) != 1 or chosen[0] not in known:
        raise ValueError(
            f"{where} asks for {', '.join(chosen) or 'no pooling'}; served is one of "
            f"{', '.join(_SWITCHES)}"
        )
    return known[chosen[0]]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read {path.parent.name}/{path.name}: {error}") from error
