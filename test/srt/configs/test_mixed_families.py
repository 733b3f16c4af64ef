"""Gemma 3 and gpt-oss: layers by kind, rotations, experts, the text part of a larger file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.model_traits import ClampedGateConfig, MoEConfig

GEMMA: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "num_hidden_layers": 7,
    "sliding_window": 512,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}


def load(folder: Path, raw: dict[str, Any]) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(raw))
    return ModelConfig.from_path(str(folder))


def test_gemma3_in_the_published_spelling(tmp_path: Path) -> None:
    config = load(tmp_path, GEMMA | {"query_pre_attn_scalar": 64})
    assert config.layer_windows == (512,) * 5 + (None, 512)
    assert (config.rope.rope_type, config.rope.factor, config.rope.theta) == ("linear", 8.0, 1e6)
    assert config.window_rope is not None
    assert (config.window_rope.rope_type, config.window_rope.theta) == ("default", 1e4)
    assert config.max_position_embeddings == 131072, "scaling is in it"
    assert config.attention_scaling == 0.125
    assert (config.attention_logit_cap, config.final_logit_cap) == (0.0, 0.0)
    assert (config.tie_word_embeddings, config.qk_norm) == (True, True)
    assert config.hidden_act == "gelu_pytorch_tanh"
    local = load(tmp_path, GEMMA | {"rope_local_base_freq": 77.0, "sliding_window_pattern": 2})
    assert local.layer_windows == (512, None, 512, None, 512, None, 512)
    assert local.window_rope is not None
    assert local.window_rope.theta == 77.0


def test_gemma3_in_the_newer_spelling(tmp_path: Path) -> None:
    ropes = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 5.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 6.0, "factor": 4.0},
    }
    kinds = ["full_attention", "sliding_attention"]
    changes = {
        "rope_parameters": ropes,
        "rope_scaling": None,
        "layer_types": kinds,
        "num_hidden_layers": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30,
    }
    config = load(tmp_path, GEMMA | changes)
    assert config.layer_windows == (None, 512)
    assert (config.rope.theta, config.rope.factor) == (6.0, 4.0)
    assert config.window_rope is not None
    assert config.window_rope.theta == 5.0
    assert (config.attention_logit_cap, config.final_logit_cap) == (50.0, 30.0)
    for name in ("rope_theta", "rope_scaling"):
        with pytest.raises(ValueError, match=f"{name} can't be overridden in a file with"):
            ModelConfig.from_path(str(tmp_path), overrides={name: 7})
    other = {kind: {"rope_theta": 9.0} for kind in ropes}
    again = ModelConfig.from_path(str(tmp_path), overrides={"rope_parameters": other})
    assert (again.rope.theta, again.rope.rope_type) == (9.0, "default")
    assert load(tmp_path, GEMMA | {"sliding_window": None}).sliding_window is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be a positive number"),
        ({"final_logit_softcapping": "x"}, "final_logit_softcapping must be a positive number"),
        ({"hidden_activation": "silu"}, "hidden_activation 'silu' is not supported"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern must be a positive"),
        ({"rope_parameters": {"other": {}}}, "rope_parameters without full_attention"),
        ({"rope_local_base_freq": -1.0}, "rope_local_base_freq must be a positive number"),
    ],
)
def test_impossible_fields(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path, GEMMA | changes)


def test_the_text_part_of_a_multimodal_file(tmp_path: Path) -> None:
    text = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "head_dim": 32}
    raw = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    config = load(tmp_path, raw | {"torch_dtype": "bfloat16"})
    assert (config.model_type, config.torch_dtype, config.hidden_size) == ("gemma3", "bfloat16", 64)
    assert config.layer_windows == (4096,) * 5 + (None,)


def test_gpt_oss(tmp_path: Path) -> None:
    raw: dict[str, Any] = {
        "architectures": ["GptOssForCausalLM"],
        "num_hidden_layers": 3,
        "num_local_experts": 32,
        "swiglu_limit": 5.0,
    }
    config = load(tmp_path, raw)
    assert config.layer_windows == (128, None, 128)
    gate = ClampedGateConfig(alpha=1.702, limit=5.0)
    assert config.moe == MoEConfig(frozenset({0, 1, 2}), 32, 4, 2880, None, True, gate)
    assert (config.attention_bias, config.attention_output_bias) == (True, True)
    assert (config.rope.rope_type, config.rope.factor) == ("yarn", 32.0)
    assert not config.rope.truncate
    assert (config.rope.theta, config.max_position_embeddings) == (150000.0, 131072)
    kinds = ["full_attention", "full_attention", "sliding_attention"]
    assert load(tmp_path, raw | {"layer_types": kinds}).layer_windows == (None, None, 128)
    with pytest.raises(ValueError, match="num_experts_per_tok 33 is more than 32 experts"):
        load(tmp_path, raw | {"num_experts_per_tok": 33})
    with pytest.raises(ValueError, match="swiglu_limit must be a positive number"):
        load(tmp_path, raw | {"swiglu_limit": 0})
    with pytest.raises(ValueError, match="weights quantized by 'quark' are not served"):
        load(tmp_path, raw | {"quantization_config": {"quant_method": "quark"}})


def test_a_quantised_cache_is_no_quantised_weight(tmp_path: Path) -> None:
    raw: dict[str, Any] = {"architectures": ["GptOssForCausalLM"], "num_hidden_layers": 3}
    cache = {
        "quant_method": "compressed-tensors",
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor"},
        "config_groups": {},
    }
    assert load(tmp_path, raw | {"quantization_config": cache}).num_layers == 3
    for change in (
        {"config_groups": {"group_0": {"targets": ["Linear"]}}},
        {"kv_cache_scheme": None},
        {"quant_method": "quark"},
    ):
        with pytest.raises(ValueError, match="weights quantized by '"):
            load(tmp_path, raw | {"quantization_config": cache | change})
