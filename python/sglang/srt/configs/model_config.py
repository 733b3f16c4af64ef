"""`ModelConfig`: what a checkpoint says about its model, in one frozen value.

Read once at start from a Hugging Face directory or a GGUF file, by both towers; everything later
(memory, layers, loader, sampling defaults, context limit) takes its numbers from here. Never
imports torch or transformers, never runs code that a checkpoint ships, never downloads.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from sglang.srt.configs.families import FAMILIES
from sglang.srt.configs.gguf_config import gguf_to_hf_config
from sglang.srt.configs.model_traits import ModelTraits, positive
from sglang.srt.configs.quantization_config import (
    KVCacheScheme,
    WeightScheme,
    kv_cache_scheme,
    weight_scheme,
)
from sglang.srt.configs.rope_config import RopeConfig, rope_config_from_hf
from sglang.srt.configs.vision_config import VisionConfig, read_vision
from sglang.srt.environ import Environ

logger = logging.getLogger(__name__)

ARCHITECTURES: dict[str, str] = {name: family.model_type for name, family in FAMILIES.items()}

# What a field means when config.json and the family leave it out.
_COMMON_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
# Fields of a multimodal file that also say something of its text part.
_SHARED_WITH_TEXT = ("dtype", "torch_dtype", "quantization_config", "tie_word_embeddings")

_LAYER = re.compile(r"model\.layers\.(\d+)\.")

_GENERATION_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ModelTraits):
    """One model, whatever file it came from; what sets the families apart is in `ModelTraits`.

    `num_heads`, `num_kv_heads` and `vocab_size` are the whole model's, not one rank's.
    Of latent attention the kept row is the one kv head: `head_dim` wide, its latent `v_head_dim`.
    `intermediate_size` is the width of the dense MLPs. `max_position_embeddings` is the trained
    context length in tokens, rope scaling included. `torch_dtype` is the checkpoint's own
    type ("float32", "float16" or "bfloat16"; quantised GGUF counts as float16). `bos_token_id` is
    None and `eos_token_ids` empty when the checkpoint names none.
    `generation_defaults` holds those of temperature, top_p, top_k, min_p and repetition_penalty
    that generation_config.json sets. `kv_cache` is the scheme of the KV cache that the checkpoint
    names, None where it names none; `weight_scheme` that of quantised weights in a Hugging Face
    directory. `path` is the directory or the .gguf file itself; `raw` the text model's config in
    Hugging Face's shape, overrides applied. `vision` None: the model takes text only, or is to.
    """

    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    hidden_act: str
    rope: RopeConfig
    max_position_embeddings: int
    torch_dtype: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    generation_defaults: dict[str, float | int]
    kv_cache: KVCacheScheme | None
    weight_scheme: WeightScheme | None
    is_gguf: bool
    path: str
    raw: dict[str, Any] = field(repr=False)
    vision: VisionConfig | None = None

    @classmethod
    def from_path(
        cls,
        model_path: str,
        *,
        overrides: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
        multimodal: bool = False,
    ) -> ModelConfig:
        """Read a Hugging Face directory, a .gguf file, or a directory that holds just one .gguf.

        `overrides` (--json-model-override-args) replace top-level fields of config.json, and
        those of the text part of a multimodal one. Code beside a checkpoint is never run, with
        `trust_remote_code` or without. `multimodal`: images are to be served if they can be.
        Raises ValueError with one line that says what is wrong and where.
        """
        path = find_model_file(model_path)
        is_gguf = path.suffix == ".gguf"
        extras: dict[str, Any] = {}
        modelopt: dict[str, Any] = {}
        freq_factors: tuple[float, ...] | None = None
        try:
            if is_gguf:
                raw, freq_factors = gguf_to_hf_config(path)
                home = path
            else:
                raw = _read_json(path)
                home = path.parent
                generation = home / "generation_config.json"
                extras = _read_json(generation) if generation.is_file() else {}
                modelopt = _read_modelopt(home / "hf_quant_config.json")
            vision = read_vision(raw, home) if multimodal and not is_gguf else None
            raw = _apply_overrides(_text_part(raw, overrides or {}), overrides or {})
            if trust_remote_code and raw.get("auto_map"):
                logger.warning("%s: code shipped with a checkpoint is never run.", path)
            config = _build(raw, extras, modelopt, is_gguf=is_gguf, path=str(home))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        config = replace(config, vision=vision)
        if freq_factors is not None:
            config = replace(config, rope=replace(config.rope, freq_factors=freq_factors))
        return config

    def for_context(self, context_length: int) -> ModelConfig:
        """The same for a server whose sequences have up to `context_length` tokens, which decides
        how a LongRoPE model turns (see `RopeConfig`)."""
        return replace(self, rope=self.rope.for_context(context_length))

    @property
    def q_size(self) -> int:
        """Width of the queries of one token over all heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of the keys of one token over all kv heads."""
        return self.num_kv_heads * self.head_dim

    def is_draft_weight(self, name: str) -> bool:
        """Whether a checkpoint's tensor predicts further tokens, see `ModelTraits`."""
        if self.draft_prefix is not None and name.startswith(self.draft_prefix):
            return True
        if not self.num_draft_layers or (layer := _LAYER.match(name)) is None:
            return False
        return 0 <= int(layer[1]) - self.num_layers < self.num_draft_layers

    def own_weight_name(self, name: str) -> str:
        """What our models call a checkpoint's tensor; an own name comes back as it is."""
        for theirs, ours in self.weight_names:
            name = name.replace(theirs, ours)
        return name

    @property
    def stacks_experts(self) -> bool:
        """Whether the loader gives all experts' gates, ups and downs as three stacks."""
        return self.is_gguf or self.weight_scheme is not None


def find_model_file(model_path: str) -> Path:
    """The config.json or .gguf file that `model_path` means; ValueError when there is none."""
    path = Path(model_path).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"{path}: a model file must be a .gguf; else give its directory")
        return path
    if not path.is_dir():
        raise ValueError(
            f"model path {model_path!r} does not exist; it must be a local directory or .gguf "
            "file (models are not downloaded)"
        )
    if (path / "config.json").is_file():
        return path / "config.json"
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return ggufs[0]
    if ggufs:
        names = ", ".join(p.name for p in ggufs)
        raise ValueError(f"{path}: several GGUF files ({names}); give the one to load")
    raise ValueError(f"{path}: neither a config.json nor a .gguf file in this directory")


def resolve_context_length(config: ModelConfig, requested: int | None, environ: Environ) -> int:
    """Context length in tokens before memory has its say: the requested one, else the model's.

    Raises ValueError when `requested` (--context-length; None: not given) is above the model's
    trained length, unless the environment allows it, in which case it is a warning.
    """
    derived = config.max_position_embeddings
    if requested is None:
        return derived
    if requested < 1:
        raise ValueError(f"--context-length must be positive, not {requested}")
    if requested <= derived:
        return requested
    text = (
        f"User-specified context_length ({requested}) is greater than the derived "
        f"context_length ({derived}), the length the model was trained for; "
        "its answers beyond that may be wrong"
    )
    if not environ.allow_overwrite_longer_context_len:
        raise ValueError(
            f"{text}. To allow it, set the environment variable "
            "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN=1"
        )
    logger.warning("%s.", text)
    return requested


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read {path.name}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} must hold a JSON object")
    return value


def _read_modelopt(path: Path) -> dict[str, Any]:
    """The object `quantization` of ModelOpt's file; {} without the file."""
    found = _read_json(path).get("quantization") if path.is_file() else {}
    if not isinstance(found, dict):
        raise ValueError(f"{path.name}: quantization must be an object, not {found!r}")
    return found


def _apply_overrides(raw: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Replace top-level fields; the two rope spellings override each other, keeping theta."""
    merged = {**raw, **overrides}
    old = raw.get("rope_parameters")
    if not isinstance(old, Mapping) or "rope_parameters" in overrides:
        return merged
    if any(isinstance(value, Mapping) for value in old.values()):
        for name in overrides.keys() & {"rope_scaling", "rope_theta"}:
            raise ValueError(
                f"{name} can't be overridden in a file with rope_parameters per layer type; "
                "override rope_parameters"
            )
    if "rope_scaling" in overrides:
        del merged["rope_parameters"]
        merged.setdefault("rope_theta", old.get("rope_theta"))
    elif "rope_theta" in overrides:
        merged["rope_parameters"] = {**old, "rope_theta": overrides["rope_theta"]}
    return merged


def _text_part(raw: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the text model: `raw` itself, except for multimodal families."""
    whole = {**raw, **overrides}
    architecture = _pick_architecture(whole)
    name = FAMILIES[architecture].text_part
    if name is None:
        return raw
    text = whole.get(name, {})
    if not isinstance(text, dict):
        raise ValueError(f"{name} must be an object, not {text!r}")
    shared = {key: raw[key] for key in _SHARED_WITH_TEXT if key in raw}
    return {**shared, **_without_nulls(text), "architectures": [architecture]}


def _without_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if v is not None or k not in _SHARED_WITH_TEXT}


def _build(
    raw: dict[str, Any],
    generation: Mapping[str, Any],
    modelopt: Mapping[str, Any],
    *,
    is_gguf: bool,
    path: str,
) -> ModelConfig:
    architecture = _pick_architecture(raw)
    family = FAMILIES[architecture]
    quantization = raw.get("quantization_config")
    scheme = weight_scheme(quantization, modelopt, family.model_type)
    values = {**_COMMON_DEFAULTS, **family.defaults}
    values.update({k: v for k, v in raw.items() if v is not None or k in family.null_means_none})
    hidden, heads = positive(values, "hidden_size"), positive(values, "num_attention_heads")
    num_layers = positive(values, "num_hidden_layers")
    traits = family.read_traits(values, num_layers)
    if traits.latent is None:
        head_dim, kv_heads = _head_shape(values, hidden, heads)
        v_head_dim = head_dim
    else:
        head_dim, kv_heads, v_head_dim = traits.latent.row_width, 1, traits.latent.kv_rank
    activation = values[family.act_field]
    if activation not in family.hidden_acts:
        supported = " or ".join(repr(name) for name in family.hidden_acts)
        raise ValueError(f"{family.act_field} {activation!r} is not supported; only {supported} is")
    max_position = positive(values, "max_position_embeddings")
    rope = rope_config_from_hf(
        values,
        max_position_embeddings=max_position,
        default_theta=family.rope_theta,
        layer_type=family.rope_layer_type,
        family_fields=family.rope_fields,
    )
    length = max_position
    if traits.encoder is not None:
        length -= traits.encoder.first_position
    elif not family.length_is_scaled:
        length = _derived_context_length(values, rope, max_position)
    return ModelConfig(
        architecture=architecture,
        model_type=family.model_type,
        vocab_size=positive(values, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=positive(values, family.mlp_field),
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        rms_norm_eps=float(values[family.norm_field]),
        tie_word_embeddings=bool(values["tie_word_embeddings"]),
        hidden_act=str(activation),
        rope=rope,
        max_position_embeddings=length,
        torch_dtype=_dtype_name(raw),
        bos_token_id=_first_id(values.get("bos_token_id")),
        eos_token_ids=_all_ids(generation.get("eos_token_id"), values.get("eos_token_id")),
        generation_defaults=_generation_defaults(generation),
        kv_cache=kv_cache_scheme(quantization, modelopt),
        weight_scheme=scheme,
        is_gguf=is_gguf,
        path=path,
        raw=raw,
        **{trait.name: getattr(traits, trait.name) for trait in fields(traits)},
    )


def _head_shape(values: dict[str, Any], hidden: int, heads: int) -> tuple[int, int]:
    """(head_dim, kv heads); ValueError for numbers that don't divide."""
    if values.get("head_dim") is None and hidden % heads:
        raise ValueError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    values.setdefault("head_dim", hidden // heads)
    values.setdefault("num_key_value_heads", heads)
    head_dim, kv_heads = positive(values, "head_dim"), positive(values, "num_key_value_heads")
    if heads % kv_heads:
        raise ValueError(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    if head_dim % 2:
        raise ValueError(f"head_dim {head_dim} must be even for rotary embeddings")
    return head_dim, kv_heads


def _pick_architecture(raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures")
    if names is None:  # older files name only the type
        by_type = {model_type: name for name, model_type in ARCHITECTURES.items()}
        names = [by_type.get(str(raw.get("model_type")), str(raw.get("model_type")))]
    if not isinstance(names, list):
        raise ValueError(f"architectures must be a list of names, not {names!r}")
    for name in names:
        if name in ARCHITECTURES:
            return str(name)
    raise ValueError(
        f"unsupported architecture {', '.join(map(str, names))!r}; "
        f"supported: {', '.join(ARCHITECTURES)}"
    )


def _derived_context_length(values: Mapping[str, Any], rope: RopeConfig, max_position: int) -> int:
    """Trained length, as SGLang derives it from the rope fields.

    A scaling factor stretches max_position_embeddings, except where the checkpoint names its
    length before scaling (then max_position_embeddings is already what the author grants) and
    for llama3 and longrope, whose max_position_embeddings is the stretched length.
    """
    scaling = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if rope.rope_type in ("llama3", "longrope") or scaling.get("original_max_position_embeddings"):
        return max_position
    return int(max_position * rope.factor)


def _dtype_name(raw: Mapping[str, Any]) -> str:
    value = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    name = str(value).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"unsupported checkpoint dtype {value!r}; supported: {', '.join(_DTYPES)}")
    return name


def _first_id(value: Any) -> int | None:
    ids = _all_ids(value)
    return ids[0] if ids else None


def _all_ids(*values: Any) -> tuple[int, ...]:
    """Token ids out of ints, lists of ints and None, in order, without repeats."""
    seen: dict[int, None] = {}
    for value in values:
        for token in value if isinstance(value, list) else [value]:
            if token is None:
                continue
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise ValueError(f"a token id must be a whole number >= 0, not {token!r}")
            seen[token] = None
    return tuple(seen)


def _generation_defaults(generation: Mapping[str, Any]) -> dict[str, float | int]:
    defaults: dict[str, float | int] = {}
    for key in _GENERATION_KEYS:
        value = generation.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"generation_config.json: {key} must be a number, not {value!r}")
        defaults[key] = value
    return defaults
