"""Mixtral, MiniMax-M2, OLMoE and ERNIE 4.5 MoE: mixtures of experts in a Llama-like decoder.

Sources: arXiv 2401.04088 (Mixtral), 2409.02060 (OLMoE), 2506.13585 and the model card of
MiniMax-M2, the ERNIE 4.5 technical report; the published configurations and the Hugging Face pages
of the config classes.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.configs.families.llama import sliding_windows
from sglang.srt.configs.model_traits import (
    ExpertChoice,
    Fields,
    ModelFamily,
    ModelTraits,
    MoEConfig,
    plain_traits,
    positive,
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
        num_draft_layers=whole(fields, "num_nextn_predict_layers"),
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
        "num_nextn_predict_layers": 0,
    },
    _read_ernie,
    rope_theta=500000.0,
)
