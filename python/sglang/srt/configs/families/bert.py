"""BERT, RoBERTa and XLM-RoBERTa: encoders, and what their fields mean."""

from __future__ import annotations

from typing import Any

from sglang.srt.configs.model_traits import (
    EncoderConfig,
    Fields,
    ModelFamily,
    ModelTraits,
    plain_traits,
    positive,
    positive_number,
)

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
_ROBERTA_DEFAULTS: dict[str, Any] = {**_DEFAULTS, "vocab_size": 50265, "pad_token_id": 1}


def _encoder(fields: Fields, num_layers: int, first_position: int) -> ModelTraits:
    kind = fields.get("position_embedding_type", "absolute")
    if kind != "absolute":
        raise ValueError(f"position_embedding_type {kind!r} is not supported; only 'absolute' is")
    if fields.get("is_decoder"):
        raise ValueError("is_decoder: only encoders of this family are served")
    num_positions = positive(fields, "max_position_embeddings")
    if num_positions <= first_position:
        raise ValueError(
            f"max_position_embeddings {num_positions} leaves nothing behind position "
            f"{first_position}, the first one"
        )
    encoder = EncoderConfig(
        norm_eps=positive_number(fields, "layer_norm_eps"),
        num_positions=num_positions,
        first_position=first_position,
        num_token_types=positive(fields, "type_vocab_size"),
    )
    return plain_traits(num_layers, encoder=encoder)


def _read_bert(fields: Fields, num_layers: int) -> ModelTraits:
    return _encoder(fields, num_layers, 0)


def _read_roberta(fields: Fields, num_layers: int) -> ModelTraits:
    # The position of padding and those before it are nobody's.
    padding = fields["pad_token_id"]
    if isinstance(padding, bool) or not isinstance(padding, int) or padding < 0:
        raise ValueError(f"pad_token_id must be a whole number >= 0, not {padding!r}")
    return _encoder(fields, num_layers, padding + 1)


BERT = ModelFamily("bert", _DEFAULTS, _read_bert, hidden_acts=("gelu",), length_is_scaled=True)
ROBERTA = ModelFamily(
    "roberta", _ROBERTA_DEFAULTS, _read_roberta, hidden_acts=("gelu",), length_is_scaled=True
)
XLM_ROBERTA = ModelFamily(
    "xlm-roberta",
    {**_ROBERTA_DEFAULTS, "vocab_size": 30522},
    _read_roberta,
    hidden_acts=("gelu",),
    length_is_scaled=True,
)
