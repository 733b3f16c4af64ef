"""What sets the model families apart, as values: windows, rotation, experts, biases and norms.

`ModelConfig` has all of these as its own fields; the readers in configs/families make them. Never
imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sglang.srt.configs.rope_config import RopeConfig

Fields = Mapping[str, Any]  # of a config.json, defaults filled in


@dataclass(frozen=True, slots=True)
class ClampedGateConfig:
    """Experts compute (up + 1) * gate * sigmoid(`alpha` * gate), with gate at most `limit` and up
    within +-`limit`."""

    alpha: float
    limit: float


@dataclass(frozen=True, slots=True)
class ExpertChoice:
    """How DeepSeek's routers choose (arXiv 2405.04434, 2.2.2; 2412.19437, 2.1.2).

    An expert's score is the softmax over all logits or, with `sigmoid`, its own logit's sigmoid.
    `biased`: a bias that is learned for each expert joins the scores when they choose, not when
    they weigh. Experts stand in `num_groups` equal groups, of which the best `kept_groups` are
    chosen from; a group is as good as the sum of its `group_best` best experts. The chosen
    experts' weights are multiplied by `scaling` in the end.
    """

    sigmoid: bool = False
    biased: bool = False
    num_groups: int = 1
    kept_groups: int = 1
    group_best: int = 1
    scaling: float = 1.0


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """Mixtures of experts in place of the MLPs of `layers`.

    Every token goes through `experts_per_token` of `num_experts` experts of width
    `intermediate_size` and, unless None, through a shared one of width
    `shared_intermediate_size`. `renormalize`: the chosen experts' shares add up to 1.
    `clamped_gate` None: experts compute silu(gate) * up. `choice` None: the largest softmax
    chooses.
    """

    layers: frozenset[int]
    num_experts: int
    experts_per_token: int
    intermediate_size: int
    shared_intermediate_size: int | None = None
    renormalize: bool = False
    clamped_gate: ClampedGateConfig | None = None
    choice: ExpertChoice | None = None


@dataclass(frozen=True, slots=True)
class LatentConfig:
    """Multi-head latent attention (arXiv 2405.04434, 2.1): what is kept of a token, and heads.

    A token keeps a latent of `kv_rank` numbers and a key of `rope_dim` numbers that turns, both
    for all heads. A query head has `nope_dim` numbers that don't turn and `rope_dim` that do, a
    value head `v_dim`. Queries come by way of `q_rank` numbers, or straight where it is None.
    """

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int

    @property
    def row_width(self) -> int:
        """Numbers that a layer keeps of a token."""
        return self.kv_rank + self.rope_dim


@dataclass(frozen=True, slots=True)
class TemperatureConfig:
    """The query at position p is scaled by
    1 + `attn_scale` * ln(1 + floor((p + 1) / `floor_scale`)), `floor_scale` in tokens."""

    attn_scale: float
    floor_scale: float


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """All tokens of a prompt see each other; nothing is generated and no K and V are kept.

    The token at position p has row `first_position` + p of a table of `num_positions` positions.
    `norm_eps` is that of layer normalisation.
    """

    norm_eps: float
    num_positions: int
    first_position: int
    num_token_types: int


@dataclass(frozen=True, kw_only=True)
class ModelTraits:
    """The defaults, with one entry per layer in the tuples, are a plain Llama.

    `attention_bias` is that of q, k and v. `qk_norm` normalises heads with weights before they
    turn, `heads_norm` in a way of the family's own, `weightless_qk_norm` without weights after they
    turned, in layers that turn at all.

    Of layer l a query at position p sees (p - w, p] where `layer_windows[l]` is w, or
    [p - p % c, p] where `layer_chunks[l]` is c, both in tokens; everything up to p where both are
    None. Never are both set. `layer_rope[l]`: whether the layer's q and k turn by their position.
    `interleaved_rope`: dimensions 2i and 2i + 1 turn together, not i and i + D/2. Layers with a
    window turn by `window_rope` unless it is None. `temperature` is that of the layers that don't
    turn, `query_temperature` that of all, after they turned. `moe` None: every MLP is dense.

    `latent` None: keys and values are kept head by head. Otherwise rotation, windows and caps are
    those of the turning parts and the scores. Checkpoints have `num_draft_layers` more layers
    behind the last, which predict further tokens and are not loaded.

    Scores are q k^T times `attention_scaling` (None: head_dim ** -0.5). A cap c > 0 turns scores
    (`attention_logit_cap`) or logits (`final_logit_cap`) s into c * tanh(s / c). Embeddings, what
    attention and MLP add to the residual stream, and logits before their cap are multiplied by
    `embedding_factor`, `residual_factor` and `logit_factor`.

    `encoder` None: a decoder, all of the above; else nothing of the above counts.
    """

    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    heads_norm: bool = False
    weightless_qk_norm: bool = False
    layer_windows: tuple[int | None, ...]
    layer_chunks: tuple[int | None, ...]
    layer_rope: tuple[bool, ...]
    interleaved_rope: bool = False
    window_rope: RopeConfig | None = None
    temperature: TemperatureConfig | None = None
    query_temperature: TemperatureConfig | None = None
    moe: MoEConfig | None = None
    latent: LatentConfig | None = None
    num_draft_layers: int = 0
    attention_scaling: float | None = None
    attention_logit_cap: float = 0.0
    final_logit_cap: float = 0.0
    embedding_factor: float = 1.0
    residual_factor: float = 1.0
    logit_factor: float = 1.0
    encoder: EncoderConfig | None = None

    @property
    def sliding_window(self) -> int | None:
        """The sliding window of the model in tokens, None when no layer has one."""
        return next((window for window in self.layer_windows if window is not None), None)


def plain_traits(
    num_layers: int,
    *,
    layer_windows: tuple[int | None, ...] | None = None,
    **changes: Any,
) -> ModelTraits:
    """Traits of a model that turns in all layers, with global attention unless given windows."""
    return ModelTraits(
        **{
            "layer_windows": layer_windows or (None,) * num_layers,
            "layer_chunks": (None,) * num_layers,
            "layer_rope": (True,) * num_layers,
            **changes,
        }
    )


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """How the config.json of one architecture is read.

    `defaults` is what a field means when the file leaves it out (those of the published config
    class) and `rope_theta` the same for the rotary base. `read_traits` (fields with defaults,
    number of layers) raises ValueError naming an impossible field. `mlp_field` is the width of the
    dense MLP, `act_field` names its activation. `text_part` names the object that holds the text
    model's fields, None: the file does. `rope_layer_type` names the layers whose rotation is the
    model's where a file has one per layer type, None: such files are refused. With
    `length_is_scaled` max_position_embeddings includes rope scaling. `norm_field` is the eps of
    its norms; `rope_fields` are those that only this family's rotation has (a partial factor, and
    what `read_traits` reads of it).
    """

    model_type: str
    defaults: Fields
    read_traits: Callable[[Fields, int], ModelTraits]
    rope_theta: float = 10000.0
    hidden_acts: tuple[str, ...] = ("silu",)
    mlp_field: str = "intermediate_size"
    act_field: str = "hidden_act"
    rope_layer_type: str | None = None
    length_is_scaled: bool = False
    norm_field: str = "rms_norm_eps"
    rope_fields: frozenset[str] = frozenset()
    text_part: str | None = None
    null_means_none: frozenset[str] = field(
        default_factory=lambda: frozenset({"sliding_window", "bos_token_id", "eos_token_id"})
    )


def positive(fields: Fields, key: str) -> int:
    """A positive whole number; ValueError naming the field for anything else."""
    value = fields.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} must be a positive whole number, not {value!r}")
    return value


def positive_number(fields: Fields, key: str) -> float:
    """A positive finite number; ValueError naming the field for anything else."""
    value = fields.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{key} must be a positive number, not {value!r}")
    return float(value)


def layer_types(fields: Fields, num_layers: int, known: tuple[str, ...]) -> tuple[str, ...] | None:
    """`layer_types` checked against the `known` ones; None when the file has none."""
    types = fields.get("layer_types")
    if types is None:
        return None
    if not isinstance(types, list) or len(types) != num_layers or set(types) - set(known):
        names = " or ".join(repr(name) for name in known)
        raise ValueError(f"layer_types must list {num_layers} of {names}")
    return tuple(types)
