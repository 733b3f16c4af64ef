"""Mixtral, PhiMoE, MiniMax-M2, OLMoE, GraniteMoe, ERNIE 4.5 and Hunyuan: what fields mean.

Sources: arXiv 2401.04088 (Mixtral), 2404.14219 (PhiMoE), 2409.02060 (OLMoE), the model cards of
MiniMax-M2, Granite 3 and Hunyuan-A13B, the ERNIE 4.5 technical report; the published configurations
and the Hugging Face pages of the config classes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sglang.srt.configs.families.dense import GRANITE
from sglang.srt.configs.families.llama import sliding_windows
from sglang.srt.configs.model_traits import (
    ExpertChoice,
    Fields,
    ModelFamily,
    ModelTraits,
    MoEConfig,
    plain_traits,
    positive,
    positive_number,
    whole,
)

# How older checkpoints call an expert's parts, and the mixture.
_NUMBERED_PARTS = (
    (".block_sparse_moe.", ".mlp."),
    (".w1.", ".gate_proj."),
    (".w3.", ".up_proj."),
    (".w2.", ".down_proj."),
)


def experts_of(
    fields: Fields, layers: range, *, count: str, chosen: str, width: str, **changes: Any
) -> MoEConfig:
    """A mixture in `layers`, of the numbers that three fields hold; `changes` are of `MoEConfig`.

    Raises ValueError naming an impossible field.
    """
    num_experts, num_chosen = positive(fields, count), positive(fields, chosen)
    if num_chosen > num_experts:
        raise ValueError(f"{chosen} {num_chosen} is more than {count} {num_experts}")
    return MoEConfig(
        layers=frozenset(layers),
        num_experts=num_experts,
        experts_per_token=num_chosen,
        intermediate_size=positive(fields, width),
        **changes,
    )


def _read_mixtral(fields: Fields, num_layers: int) -> ModelTraits:
    moe = experts_of(
        fields,
        range(num_layers),
        count="num_local_experts",
        chosen="num_experts_per_tok",
        width="intermediate_size",
        renormalize=True,
    )
    return plain_traits(
        num_layers,
        layer_windows=sliding_windows(fields, num_layers, first=0),
        moe=moe,
        weight_names=_NUMBERED_PARTS,
    )


def _read_phimoe(fields: Fields, num_layers: int) -> ModelTraits:
    bias = bool(fields["attention_bias"])
    moe = experts_of(
        fields,
        range(num_layers),
        count="num_local_experts",
        chosen="num_experts_per_tok",
        width="intermediate_size",
        mixer_tolerance=positive_number(fields, "router_jitter_noise"),
    )
    return plain_traits(
        num_layers,
        attention_bias=bias,
        attention_output_bias=bias,
        head_bias=bool(fields["lm_head_bias"]),
        layer_windows=sliding_windows(fields, num_layers, first=0),
        moe=moe,
        weight_names=_NUMBERED_PARTS,
    )


def _read_minimax_m2(fields: Fields, num_layers: int) -> ModelTraits:
    kinds = fields.get("attn_type_list")
    if kinds is not None and set(kinds) != {1}:
        raise ValueError(f"attn_type_list must list full attention, 1, not {kinds!r}")
    scoring = fields["scoring_func"]
    if scoring != "sigmoid" or not fields["use_routing_bias"]:
        raise ValueError(f"scoring_func {scoring!r} is not supported; 'sigmoid' with a bias is")
    if fields["use_qk_norm"] and fields["qk_norm_type"] != "per_layer":
        raise ValueError(f"qk_norm_type {fields['qk_norm_type']!r} is not supported")
    moe = experts_of(
        fields,
        range(num_layers),
        count="num_local_experts",
        chosen="num_experts_per_tok",
        width="intermediate_size",
        renormalize=True,
        choice=ExpertChoice(sigmoid=True, biased=True),
    )
    return plain_traits(
        num_layers,
        heads_norm=bool(fields["use_qk_norm"]),
        moe=moe,
        num_draft_layers=whole(fields, "num_mtp_modules"),
        weight_names=(
            (".block_sparse_moe.e_score_correction_bias", ".mlp.gate.e_score_correction_bias"),
            *_NUMBERED_PARTS,
        ),
    )


def _read_olmoe(fields: Fields, num_layers: int) -> ModelTraits:
    if fields.get("clip_qkv") is not None:
        raise ValueError("clip_qkv is not supported")
    bias = bool(fields["attention_bias"])
    moe = experts_of(
        fields,
        range(num_layers),
        count="num_experts",
        chosen="num_experts_per_tok",
        width="intermediate_size",
        renormalize=bool(fields["norm_topk_prob"]),
    )
    return plain_traits(
        num_layers,
        attention_bias=bias,
        attention_output_bias=bias,
        heads_norm=True,
        moe=moe,
    )


def _read_granite_moe(fields: Fields, num_layers: int) -> ModelTraits:
    moe = experts_of(
        fields,
        range(num_layers),
        count="num_local_experts",
        chosen="num_experts_per_tok",
        width="intermediate_size",
        shared_intermediate_size=whole(fields, "shared_intermediate_size") or None,
        renormalize=True,
    )
    names = (
        (".block_sparse_moe.router.layer.", ".mlp.gate."),
        (".block_sparse_moe.", ".mlp."),
        (".shared_mlp.", ".mlp.shared_experts."),
        (".shared_experts.output_linear.", ".shared_experts.down_proj."),
    )
    return replace(GRANITE.read_traits(fields, num_layers), moe=moe, weight_names=names)


def _read_hunyuan(fields: Fields, num_layers: int) -> ModelTraits:
    if fields.get("use_cla"):
        raise ValueError("use_cla is not supported")
    chosen = fields["moe_topk"]
    if isinstance(chosen, list) and len(set(chosen)) == 1:  # one for each layer
        chosen = chosen[0]
    bias = bool(fields["attention_bias"])
    moe = experts_of(
        {**fields, "moe_topk": chosen},
        range(num_layers),
        count="num_experts",
        chosen="moe_topk",
        width="intermediate_size",
        shared_intermediate_size=positive(fields, "intermediate_size"),
        renormalize=True,
    )
    names = (
        (".mlp.gate.wg.", ".mlp.gate."),
        (".mlp.shared_mlp.", ".mlp.shared_experts."),
        (".query_layernorm.", ".q_norm."),
        (".key_layernorm.", ".k_norm."),
    )
    return plain_traits(
        num_layers,
        attention_bias=bias,
        attention_output_bias=bias,
        qk_norm=True,
        moe=moe,
        weight_names=names,
    )


def _read_ernie(fields: Fields, num_layers: int) -> ModelTraits:
    if fields["use_bias"]:
        raise ValueError("use_bias is not supported")
    width = positive(fields, "moe_intermediate_size")
    shared = whole(fields, "moe_num_shared_experts")
    moe = experts_of(
        fields,
        _ernie_layers(fields, num_layers),
        count="moe_num_experts",
        chosen="moe_k",
        width="moe_intermediate_size",
        shared_intermediate_size=width * shared or None,
        renormalize=True,
        choice=ExpertChoice(biased=True),
    )
    return plain_traits(
        num_layers,
        interleaved_rope=True,
        moe=moe,
        draft_prefix="model.mtp_",
        weight_names=((".mlp.moe_statics.", ".mlp.gate."),),
    )


def _ernie_layers(fields: Fields, num_layers: int) -> range:
    """From the first index to the last, -1 being that of the model, every so many layers."""
    first, last = whole(fields, "moe_layer_start_index"), fields["moe_layer_end_index"]
    step = positive(fields, "moe_layer_interval")
    last = num_layers - 1 if last == -1 else whole(fields, "moe_layer_end_index")
    first += -(first + 1) % step  # layer l has experts where l + 1 is a multiple
    return range(first, min(last, num_layers - 1) + 1, step)


MIXTRAL = ModelFamily(
    "mixtral",
    {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    _read_mixtral,
    rope_theta=1000000.0,
)
PHIMOE = ModelFamily(
    "phimoe",
    {
        "vocab_size": 32064,
        "intermediate_size": 6400,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_local_experts": 16,
        "num_experts_per_tok": 2,
        "router_jitter_noise": 0.01,
        "attention_bias": False,
        "lm_head_bias": False,
    },
    _read_phimoe,
    rope_theta=1000000.0,
    rope_fields=frozenset({"short_mscale", "long_mscale"}),
)
MINIMAX_M2 = ModelFamily(
    "minimax_m2",
    {
        "vocab_size": 200064,
        "hidden_size": 3072,
        "intermediate_size": 1536,
        "num_hidden_layers": 62,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 196608,
        "bos_token_id": 200034,
        "eos_token_id": 200020,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "use_qk_norm": True,
        "qk_norm_type": "per_layer",
        "num_mtp_modules": 0,
    },
    _read_minimax_m2,
    rope_theta=5000000.0,
    rope_fields=frozenset({"partial_rotary_factor"}),
)
OLMOE = ModelFamily(
    "olmoe",
    {
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "eos_token_id": 50279,
        "attention_bias": False,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    _read_olmoe,
)
FLEX_OLMO = replace(
    OLMOE,
    model_type="flex_olmo",
    defaults={
        "vocab_size": 100352,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "eos_token_id": 100257,
        "attention_bias": False,
        "num_experts": 7,
        "num_experts_per_tok": 5,
        "norm_topk_prob": False,
    },
    rope_theta=500000.0,
)
GRANITE_MOE = replace(
    GRANITE,
    model_type="granitemoe",
    defaults={
        **GRANITE.defaults,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 0,
    },
    read_traits=_read_granite_moe,
)
GRANITE_MOE_SHARED = replace(GRANITE_MOE, model_type="granitemoeshared")
HUNYUAN_MOE = ModelFamily(
    "hunyuan_v1_moe",
    {
        "vocab_size": 290943,
        "intermediate_size": 11008,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_bias": False,
        "num_experts": 1,
        "moe_topk": 1,
    },
    _read_hunyuan,
    rope_fields=frozenset({"alpha"}),
)
ERNIE4_5_MOE = ModelFamily(
    "ernie4_5_moe",
    {
        "vocab_size": 103424,
        "hidden_size": 2560,
        "intermediate_size": 12288,
        "num_hidden_layers": 28,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_bias": False,
        "moe_intermediate_size": 1536,
        "moe_num_experts": 64,
        "moe_k": 6,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
    },
    _read_ernie,
    rope_theta=500000.0,
)
