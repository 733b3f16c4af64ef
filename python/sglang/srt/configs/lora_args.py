"""Which LoRA adapters are served, and how much room they have.

A part of `ServerArgs`, which says how fields are flags.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sglang.srt.configs.flag_spec import Arity, flag

LORA = "LoRA adapters"
ALL_MODULES = "all"


@dataclass(frozen=True, slots=True)
class LoraRef:
    """An adapter's name, its directory, and whether it keeps its place on the device for good."""

    name: str
    path: str
    pinned: bool = False


def parse_lora_ref(text: str) -> LoraRef:
    """PATH, NAME=PATH or a JSON object as SGLang takes them; ValueError with one line.

    A path alone is its own name.
    """
    if text.lstrip().startswith("{"):
        return _ref_from_json(text)
    name, equals, path = text.partition("=")
    if not equals:
        name = path = text
    if not name or not path:
        raise ValueError(f"expected NAME=PATH, got {text!r}")
    return LoraRef(name, path)


def _ref_from_json(text: str) -> LoraRef:
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{text!r} is not JSON: {error}") from error
    name, path, pinned = (fields.pop(key, None) for key in ("lora_name", "lora_path", "pinned"))
    if fields or not name or not path or not isinstance(name, str) or not isinstance(path, str):
        raise ValueError(
            f'expected {{"lora_name": ..., "lora_path": ..., "pinned": ...}}, got {text!r}'
        )
    if pinned not in (None, True, False):
        raise ValueError(f"pinned is true or false, got {text!r}")
    return LoraRef(name, path, bool(pinned))


@dataclass(frozen=True)
class LoraArgs:
    """Settings of LoRA adapters; docs/lora.md has the rules."""

    enable_lora: bool = flag(
        False, "Serve LoRA adapters; --lora-paths does so by itself.", group=LORA
    )
    lora_paths: Sequence[LoraRef] = flag(
        (),
        "Adapters to load at start: directories as PEFT writes them, with names. JSON is an object "
        "of lora_name, lora_path and pinned.",
        group=LORA,
        arity=Arity.MANY,
        parse=parse_lora_ref,
        default_text="none",
        metavar="NAME=PATH|PATH|JSON",
    )
    max_lora_rank: int | None = flag(
        None,
        "Largest rank of an adapter.",
        group=LORA,
        parse=int,
        default_text="the largest of --lora-paths",
        metavar="N",
        minimum=1,
    )
    lora_target_modules: Sequence[str] | None = flag(
        None,
        "Projections that adapters may change, such as q_proj; all: every one that can be.",
        group=LORA,
        arity=Arity.MANY,
        default_text="those of --lora-paths",
        metavar="NAME|all",
    )
    max_loras_per_batch: int = flag(
        8,
        "Most adapters that run at once: so many have a place on the device.",
        group=LORA,
        parse=int,
        metavar="N",
        minimum=1,
    )
    max_loaded_loras: int | None = flag(
        None,
        "Most adapters that are loaded; one more is refused.",
        group=LORA,
        parse=int,
        default_text="no limit",
        metavar="N",
        minimum=1,
    )
    lora_eviction_policy: str = flag(
        "lru",
        "Whose place on the device an adapter takes when all are taken: that of the least recently "
        "used, or of the first that came.",
        group=LORA,
        choices=("lru", "fifo"),
    )

    @property
    def serves_lora(self) -> bool:
        """Whether adapters are served."""
        return self.enable_lora or bool(self.lora_paths)


def check_lora(args: Any) -> None:
    """Raise ValueError with one line when the flags of adapters contradict each other."""
    if not args.serves_lora:
        for name in ("max_lora_rank", "lora_target_modules", "max_loaded_loras"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} needs --enable-lora")
        return
    refs, most = args.lora_paths, args.max_loaded_loras
    if not refs and (args.max_lora_rank is None or not args.lora_target_modules):
        raise ValueError(
            "--enable-lora without --lora-paths needs --max-lora-rank and --lora-target-modules"
        )
    for name, count in Counter(ref.name for ref in refs).items():
        if count > 1:
            raise ValueError(f"--lora-paths: two adapters are called {name!r}")
    if most is not None and most < args.max_loras_per_batch:
        raise ValueError(
            f"--max-loaded-loras {most} is less than --max-loras-per-batch "
            f"{args.max_loras_per_batch}"
        )
    if most is not None and len(refs) > most:
        raise ValueError(f"--lora-paths: {len(refs)} adapters, but --max-loaded-loras is {most}")
    refusal = pinned_refusal(sum(ref.pinned for ref in refs), args.max_loras_per_batch)
    if refusal is not None:
        raise ValueError(f"--lora-paths: {refusal}")


def pinned_refusal(num_pinned: int, num_places: int) -> str | None:
    """Why so many adapters can't be pinned; None: they can. One place stays for the others."""
    if num_pinned <= num_places - 1:
        return None
    return (
        f"{num_pinned} pinned adapters leave no place for others: --max-loras-per-batch is "
        f"{num_places}"
    )
