"""LoRA adapters from the directories that PEFT writes, cut to what a rank needs of them.

An adapter that can't be served is one ValueError that names it. Nothing here knows places or
requests. See docs/lora.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sglang.srt.configs.lora_config import LoraConfig
from sglang.srt.layers.lora import Factors
from sglang.srt.models.causal_lm import AdapterSite

WEIGHTS_NAME = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
_OUTER = "base_model.model."
_ENDS = {".lora_A.weight": 0, ".lora_B.weight": 1}
_SHOWN = 6


OwnFactors = Callable[[Mapping[str, Factors]], Mapping[str, Factors]]  # see CausalLM.own_factors


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """An adapter as it was read: whole A [r, in] and B [out, r] by module, B scaled in float32.

    `claims` are the last words of the modules that it says it changes, some of which a model may
    lack.
    """

    folder: Path
    factors: Mapping[str, Factors]
    claims: frozenset[str]

    def renamed(self, own_factors: OwnFactors) -> AdapterFile:
        """The same by the modules of a model; ValueError where it does not fit."""
        try:
            return replace(self, factors=own_factors(self.factors))
        except ValueError as error:
            raise ValueError(f"{self.folder}: {error}") from error

    @property
    def rank(self) -> int:
        """The largest rank of its modules."""
        return max(len(a) for a, _ in self.factors.values())

    @property
    def leaves(self) -> frozenset[str]:
        """The last words of its modules' names, such as q_proj."""
        return frozenset(leaf_of(module) for module in self.factors)


# Of one rank: by linear layer and shard, A [r, columns] and B [rows, r].
CutAdapter = Mapping[AdapterSite, Factors]


def leaf_of(module: str) -> str:
    """The last word of a module's name."""
    return module.rpartition(".")[2]


def read_adapter(path: str) -> AdapterFile:
    """Read a directory; ValueError with one line for anything that is not served."""
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{path} is no directory (adapters are local, nothing is downloaded)")
    config = LoraConfig.from_folder(folder)
    file = folder / WEIGHTS_NAME
    if not file.is_file():
        other = f"; {_PICKLED} is not read" if (folder / _PICKLED).exists() else ""
        raise ValueError(f"{folder} has no {WEIGHTS_NAME}{other}")
    pairs: dict[str, list[torch.Tensor | None]] = {}
    for name, tensor in _tensors(file).items():
        module, which = _split_name(name, file)
        pairs.setdefault(module, [None, None])[which] = tensor
    if not pairs:
        raise ValueError(f"{file} has no weights")
    factors = {module: _scaled(module, pair, config, file) for module, pair in pairs.items()}
    return AdapterFile(folder, factors, config.target_leaves)


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        reader: Any = safe_open(str(file), framework="pt")
        with reader as opened:
            return {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: {error}") from error


def _split_name(name: str, file: Path) -> tuple[str, int]:
    """The module of a tensor, and whether it is its A (0) or B (1)."""
    for end, which in _ENDS.items():
        if name.startswith(_OUTER) and name.endswith(end):
            module = name.removeprefix(_OUTER).removesuffix(end)
            # Text models inside multimodal ones: both ways in which transformers nests them.
            module = module.removeprefix("language_model.")
            if module.startswith("model.language_model."):
                module = "model." + module.removeprefix("model.language_model.")
            return module, which
    raise ValueError(f"{file}: {name} is no lora_A or lora_B of a linear layer")


def _scaled(
    module: str, pair: list[torch.Tensor | None], config: LoraConfig, file: Path
) -> Factors:
    a, b = pair
    if a is None or b is None:
        raise ValueError(f"{file}: {module} has no lora_{'A' if a is None else 'B'}")
    rank = config.rank_of(module)
    if a.dim() != 2 or b.dim() != 2 or len(a) != rank or b.shape[1] != rank:
        raise ValueError(
            f"{file}: {module} has A {list(a.shape)} and B {list(b.shape)}, but rank {rank}"
        )
    return a, b.float() * config.scale_of(module)


def cut_adapter(
    adapter: AdapterFile, sites: Mapping[str, AdapterSite], targets: Iterable[str], rank: int
) -> CutAdapter:
    """What this rank computes of an adapter, in the types of its layers.

    `sites` are the model's linear layers by module, `targets` the last words of those that adapters
    may change, `rank` the largest one served. ValueError for what does not fit.
    """
    targets = frozenset(targets)
    if adapter.rank > rank:
        raise ValueError(f"{adapter.folder} has rank {adapter.rank}, --max-lora-rank is {rank}")
    strange = sorted(module for module in adapter.factors if module not in sites)
    if strange:
        raise ValueError(
            f"{adapter.folder} changes what takes no adapter here (embeddings, heads, experts and "
            f"other models' modules take none): {listed(strange)}"
        )
    missing = sorted((adapter.claims & {leaf_of(module) for module in sites}) - adapter.leaves)
    if missing:
        raise ValueError(f"{adapter.folder} has no weights of {', '.join(missing)}, its targets")
    outside = sorted(adapter.leaves - targets)
    if outside:
        raise ValueError(
            f"{adapter.folder} changes {', '.join(outside)}, --lora-target-modules are "
            f"{', '.join(sorted(targets))}"
        )
    cut = {}
    for module, factors in adapter.factors.items():
        try:
            cut[sites[module]] = _cut(sites[module], factors)
        except ValueError as error:
            raise ValueError(f"{adapter.folder}: {module}: {error}") from error
    return cut


def _cut(site: AdapterSite, factors: Factors) -> Factors:
    a, b = factors
    part = site.layer.adapter_part(site.shard_id)
    if a.shape[1] != part.source_columns or len(b) != part.source_rows:
        raise ValueError(
            f"the adapter is for {a.shape[1]} inputs and {len(b)} outputs, the model's layer has "
            f"{part.source_columns} and {part.source_rows}"
        )
    dtype = site.layer.weight.dtype
    return (
        a[:, part.column_first : part.column_first + part.columns].to(dtype, copy=True),
        b[part.source_first : part.source_first + part.rows].to(dtype, copy=True),
    )


def listed(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
