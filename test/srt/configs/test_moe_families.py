"""Llama 4 and Qwen3-MoE: layers by kind, experts, temperature, the text part of a larger file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.model_traits import MoEConfig, TemperatureConfig

TINY: dict[str, Any] = {
    "architectures": ["Llama4ForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 32,
    "intermediate_size_mlp": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "attention_chunk_size": 24,
}


def load(folder: Path, raw: dict[str, Any], **arguments: Any) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(raw))
    return ModelConfig.from_path(str(folder), **arguments)


def test_llama4_layers(tmp_path: Path) -> None:
    config = load(tmp_path, TINY)
    assert config.layer_rope == (True, True, True, False)
    assert config.layer_chunks == (24, 24, 24, None)
    assert config.layer_windows == (None,) * 4
    assert config.intermediate_size == 96
    assert config.temperature == TemperatureConfig(attn_scale=0.1, floor_scale=8192.0)
    assert config.moe == MoEConfig(frozenset(range(4)), 16, 1, 32, 32, scales_inputs=True)
    assert config.weightless_qk_norm
    types = ["full_attention", "chunked_attention"] * 2
    other = load(
        tmp_path,
        TINY
        | {"layer_types": types, "no_rope_layers": [1, 0, 1, 0], "use_qk_norm": False}
        | {"interleave_moe_layer_step": 2, "attn_temperature_tuning": False},
    )
    assert other.layer_chunks == (None, 24, None, 24)
    assert other.layer_rope == (True, False, True, False)
    assert other.moe is not None
    assert other.moe.layers == {1, 3}
    assert (other.temperature, other.weightless_qk_norm) == (None, False)
    assert load(tmp_path, TINY | {"moe_layers": []}).moe is None
    assert load(tmp_path, TINY | {"attention_chunk_size": None}).layer_chunks == (None,) * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"no_rope_layers": [1, 2, 1, 1]}, "no_rope_layers must list 4"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types must list 4"),
        ({"moe_layers": [4]}, "moe_layers must list layers below 4"),
        ({"floor_scale": 0}, "floor_scale must be a positive number"),
        ({"num_experts_per_tok": 17}, "more than 16 experts"),
        ({"attention_chunk_size": 0}, "attention_chunk_size must be a positive"),
    ],
)
def test_impossible_fields(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path, TINY | changes)


def test_the_text_part_of_a_multimodal_file(tmp_path: Path) -> None:
    text = TINY | {"architectures": None, "dtype": None, "model_type": "llama4_text"}
    raw = {
        "architectures": ["Llama4ForConditionalGeneration"],
        "dtype": "bfloat16",
        "text_config": text,
        "vision_config": {"hidden_size": 7},
    }
    config = load(tmp_path, raw, overrides={"num_hidden_layers": 2})
    assert config.architecture == "Llama4ForConditionalGeneration"
    assert (config.hidden_size, config.num_layers, config.torch_dtype) == (64, 2, "bfloat16")
    with pytest.raises(ValueError, match="text_config must be an object"):
        load(tmp_path, raw | {"text_config": 3})


def test_qwen3_moe(tmp_path: Path) -> None:
    raw = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_hidden_layers": 6,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "norm_topk_prob": True,
    }
    config = load(tmp_path, raw)
    assert config.moe == MoEConfig(frozenset({1, 5}), 8, 2, 768, None, True)
    assert config.qk_norm
    with pytest.raises(ValueError, match="num_experts_per_tok 9 is more than num_experts 8"):
        load(tmp_path, raw | {"num_experts_per_tok": 9})
