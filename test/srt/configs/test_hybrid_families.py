"""Qwen3-Next and Qwen3.5: which layers keep a state, what turns, and what is not loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.model_traits import LinearConfig, MoEConfig

TINY: dict[str, Any] = {
    "architectures": ["Qwen3_5ForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e7,
        "mrope_interleaved": True,
        "mrope_section": [1, 1, 0],
    },
}


def load(folder: Path, raw: dict[str, Any]) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(raw))
    return ModelConfig.from_path(str(folder))


def test_every_fourth_layer_attends(tmp_path: Path) -> None:
    config = load(tmp_path, TINY)
    assert config.linear == LinearConfig(
        layers=frozenset({0, 1, 2, 4, 5, 6}),
        key_heads=16,
        value_heads=32,
        key_dim=128,
        value_dim=128,
        conv_size=4,
        interleaved=False,
    )
    assert config.moe is None
    assert config.qk_norm
    types = ["full_attention", "linear_attention"] * 4
    listed = load(tmp_path, TINY | {"layer_types": types})
    assert listed.linear is not None
    assert listed.linear.layers == {1, 3, 5, 7}
    assert load(tmp_path, TINY | {"layer_types": ["full_attention"] * 8}).linear is None
    other = load(tmp_path, TINY | {"full_attention_interval": 2})
    assert other.linear is not None
    assert other.linear.layers == {0, 2, 4, 6}


def test_a_quarter_of_a_head_turns(tmp_path: Path) -> None:
    """As positions in images are text's where there are none, what is said of them says nothing."""
    config = load(tmp_path, TINY)
    assert (config.rope.partial, config.rope.theta) == (0.25, 1e7)
    half = {**TINY["rope_parameters"], "partial_rotary_factor": 0.5}
    assert load(tmp_path, TINY | {"rope_parameters": half}).rope.partial == 0.5
    older = {k: v for k, v in TINY.items() if k != "rope_parameters"}
    older |= {"rope_theta": 5e6, "partial_rotary_factor": 1.0}
    assert load(tmp_path, older).rope.partial == 1.0
    with pytest.raises(ValueError, match="above 0 and at most 1, not 2"):
        load(tmp_path, older | {"partial_rotary_factor": 2.0})


def test_experts_and_a_gated_one_for_all(tmp_path: Path) -> None:
    moe = TINY | {"architectures": ["Qwen3_5MoeForCausalLM"], "num_experts": 6}
    config = load(tmp_path, moe | {"num_experts_per_tok": 2})
    assert config.moe == MoEConfig(
        frozenset(range(8)), 6, 2, 512, 512, renormalize=True, gates_shared=True
    )
    following = TINY | {"architectures": ["Qwen3NextForCausalLM"], "mlp_only_layers": [0, 5]}
    config = load(tmp_path, following)
    assert config.moe is not None
    assert config.moe.layers == {1, 2, 3, 4, 6, 7}
    assert (config.moe.num_experts, config.moe.experts_per_token) == (512, 10)
    assert config.linear is not None
    assert config.linear.interleaved
    assert load(tmp_path, following | {"num_experts": 0}).moe is None


def test_the_text_part_of_a_larger_file(tmp_path: Path) -> None:
    text = {key: value for key, value in TINY.items() if key != "architectures"}
    whole = {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "text_config": text,
        "vision_config": {"depth": 2},
        "tie_word_embeddings": True,
    }
    config = load(tmp_path, whole)
    assert (config.architecture, config.num_layers) == ("Qwen3_5ForConditionalGeneration", 8)
    assert config.tie_word_embeddings
    assert config.vision is None


def test_weights_that_predict_further_tokens_are_drafts(tmp_path: Path) -> None:
    config = load(tmp_path, TINY)
    assert config.is_draft_weight("mtp.layers.0.mlp.gate.weight")
    assert not config.is_draft_weight("model.layers.7.mlp.gate_proj.weight")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["linear_attention"] * 8}, "without full_attention"),
        ({"layer_types": ["sliding_attention"] * 8}, "must list 8 of 'linear_attention'"),
        ({"linear_num_value_heads": 24}, "24 is not a multiple of linear_num_key_heads 16"),
        ({"attn_output_gate": False}, "without a gate on its output"),
        ({"linear_conv_kernel_dim": 1}, "must be at least 2, not 1"),
        ({"linear_key_head_dim": 0}, "linear_key_head_dim must be a positive whole number"),
    ],
)
def test_what_can_t_be_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path, TINY | changes)
