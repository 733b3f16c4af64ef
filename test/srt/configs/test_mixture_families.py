"""Mixtures' configs as they are published: experts, shared ones, layers, rotation, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.model_traits import ExpertChoice, MoEConfig


def load(folder: Path, architecture: str, **fields: Any) -> ModelConfig:
    raw = {"architectures": [architecture], **fields}
    (folder / "config.json").write_text(json.dumps(raw))
    return ModelConfig.from_path(str(folder))


def test_glm_4_5_air(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "Glm4MoeForCausalLM",
        attention_bias=True,
        head_dim=128,
        rope_theta=1000000,
        num_nextn_predict_layers=1,
    )
    choice = ExpertChoice(sigmoid=True, biased=True, group_best=2)
    layers = frozenset(range(1, 46))
    assert config.moe == MoEConfig(layers, 128, 8, 1408, 1408, True, choice=choice)
    assert (config.rope.theta, config.rope.partial) == (1e6, 0.5)
    assert config.rope.turned(config.head_dim) == 64
    assert config.attention_bias
    assert not config.attention_output_bias
    assert not config.qk_norm
    assert config.is_draft_weight("model.layers.46.eh_proj.weight")


def test_glm_4_7_flash(tmp_path: Path) -> None:
    config = load(tmp_path, "Glm4MoeLiteForCausalLM", num_nextn_predict_layers=1)
    assert config.moe is not None
    assert (min(config.moe.layers), config.moe.choice) == (
        1,
        ExpertChoice(sigmoid=True, biased=True, group_best=2, scaling=1.8),
    )
    assert (config.head_dim, config.v_head_dim, config.num_kv_heads) == (576, 512, 1)
    types = ["sparse", "dense", "sparse"]
    config = load(tmp_path, "Glm4MoeLiteForCausalLM", num_hidden_layers=3, mlp_layer_types=types)
    assert config.moe is not None
    assert config.moe.layers == {0, 2}
    with pytest.raises(ValueError, match="mlp_layer_types must list 47 of 'dense' or 'sparse'"):
        load(tmp_path, "Glm4MoeLiteForCausalLM", mlp_layer_types=types)


def test_kimi_k2(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "DeepseekV3ForCausalLM",
        model_type="kimi_k2",
        num_attention_heads=64,
        n_routed_experts=384,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.827,
        num_nextn_predict_layers=0,
    )
    assert config.moe is not None
    assert (config.moe.num_experts, len(config.moe.layers)) == (384, 60)
    assert config.moe.choice == ExpertChoice(True, True, 1, 1, 2, 2.827)


def test_mixtral(tmp_path: Path) -> None:
    config = load(tmp_path, "MixtralForCausalLM", head_dim=None, sliding_window=None)
    assert config.moe == MoEConfig(frozenset(range(32)), 8, 2, 14336, renormalize=True)
    assert config.layer_windows == (None,) * 32
    assert config.head_dim == 128
    name = "model.layers.0.block_sparse_moe.experts.7.w3.weight"
    own = "model.layers.0.mlp.experts.7.up_proj.weight"
    assert config.own_weight_name(name) == own == config.own_weight_name(own)
    windows = load(tmp_path, "MixtralForCausalLM", sliding_window=4096).layer_windows
    assert windows == (4096,) * 32
    with pytest.raises(ValueError, match="num_experts_per_tok 9 is more than num_local_experts 8"):
        load(tmp_path, "MixtralForCausalLM", num_experts_per_tok=9)


def test_qwen2_moe(tmp_path: Path) -> None:
    config = load(tmp_path, "Qwen2MoeForCausalLM")
    layers = frozenset(range(24))
    assert config.moe == MoEConfig(layers, 60, 4, 1408, 5632, gates_shared=True)
    assert config.attention_bias
    assert not config.attention_output_bias
    fields = {"num_hidden_layers": 5, "use_sliding_window": True, "max_window_layers": 3}
    config = load(tmp_path, "Qwen2MoeForCausalLM", **fields)
    assert config.layer_windows == (4096, None, 4096, None, None)


def test_ernie_4_5(tmp_path: Path) -> None:
    config = load(tmp_path, "Ernie4_5_MoeForCausalLM")
    layers = frozenset(range(1, 28))
    choice = ExpertChoice(biased=True)
    assert config.moe == MoEConfig(layers, 64, 6, 1536, 3072, True, choice=choice)
    assert config.interleaved_rope
    assert config.tie_word_embeddings
    assert config.is_draft_weight("model.mtp_block.0.mlp.up_proj.weight")
    fields = {"moe_layer_start_index": 3, "moe_layer_end_index": 9, "moe_layer_interval": 4}
    moe = load(tmp_path, "Ernie4_5_MoeForCausalLM", **fields).moe
    assert moe is not None
    assert moe.layers == {3, 7}
    with pytest.raises(ValueError, match="use_bias is not supported"):
        load(tmp_path, "Ernie4_5_MoeForCausalLM", use_bias=True)


def test_dots1(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "Dots1ForCausalLM",
        n_routed_experts=128,
        n_shared_experts=2,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
    )
    choice = ExpertChoice(sigmoid=True, biased=True, group_best=2, scaling=2.5)
    layers = frozenset(range(1, 62))
    assert config.moe == MoEConfig(layers, 128, 6, 1408, 2816, True, choice=choice)
    assert config.layer_windows == (None,) * 62
    assert config.qk_norm


def test_minimax_m2(tmp_path: Path) -> None:
    fields = {"rotary_dim": 64, "attn_type_list": [1] * 62, "num_mtp_modules": 3}
    config = load(tmp_path, "MiniMaxM2ForCausalLM", **fields)
    choice = ExpertChoice(sigmoid=True, biased=True)
    layers = frozenset(range(62))
    assert config.moe == MoEConfig(layers, 256, 8, 1536, renormalize=True, choice=choice)
    assert (config.rope.partial, config.head_dim) == (0.5, 128)
    assert config.heads_norm
    bias = "model.layers.3.block_sparse_moe.e_score_correction_bias"
    assert config.own_weight_name(bias) == "model.layers.3.mlp.gate.e_score_correction_bias"
    for field, value, message in (
        ("attn_type_list", [1, 0], "attn_type_list must list full attention"),
        ("scoring_func", "softmax", "scoring_func 'softmax' is not supported"),
        ("qk_norm_type", "per_head", "qk_norm_type 'per_head' is not supported"),
    ):
        with pytest.raises(ValueError, match=message):
            load(tmp_path, "MiniMaxM2ForCausalLM", **{field: value})


def test_olmoe(tmp_path: Path) -> None:
    config = load(tmp_path, "OlmoeForCausalLM", clip_qkv=None)
    assert config.moe == MoEConfig(frozenset(range(16)), 64, 8, 2048)
    assert config.num_kv_heads == 16
    with pytest.raises(ValueError, match="clip_qkv is not supported"):
        load(tmp_path, "OlmoeForCausalLM", clip_qkv=8.0)


def test_granite_moe(tmp_path: Path) -> None:
    fields = {"logits_scaling": 6.0, "attention_multiplier": 0.015625, "residual_multiplier": 0.22}
    config = load(tmp_path, "GraniteMoeSharedForCausalLM", shared_intermediate_size=64, **fields)
    assert config.moe == MoEConfig(frozenset(range(32)), 8, 2, 11008, 64, True)
    assert (config.logit_factor, config.attention_scaling) == (1 / 6.0, 0.015625)
    assert config.residual_factor == 0.22
    name = "model.layers.0.shared_mlp.output_linear.weight"
    assert config.own_weight_name(name) == "model.layers.0.mlp.shared_experts.down_proj.weight"
    assert load(tmp_path, "GraniteMoeForCausalLM").moe == MoEConfig(
        frozenset(range(32)), 8, 2, 11008, None, True
    )


def test_hunyuan(tmp_path: Path) -> None:
    scaling = {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}
    fields = {"num_experts": 64, "moe_topk": [8] * 32, "intermediate_size": 3072, "head_dim": 128}
    config = load(tmp_path, "HunYuanMoEV1ForCausalLM", rope_scaling=scaling, **fields)
    assert config.moe == MoEConfig(frozenset(range(32)), 64, 8, 3072, 3072, True)
    assert config.rope.rope_type == "default"
    assert config.rope.theta == pytest.approx(10000.0 * 1000.0 ** (128 / 126))
    assert config.max_position_embeddings == 2048
    with pytest.raises(ValueError, match="moe_topk must be a positive whole number"):
        load(tmp_path, "HunYuanMoEV1ForCausalLM", **{**fields, "moe_topk": [8, 4]})
    with pytest.raises(ValueError, match="use_cla is not supported"):
        load(tmp_path, "HunYuanMoEV1ForCausalLM", use_cla=True, **fields)


def test_phimoe(tmp_path: Path) -> None:
    scaling = {
        "type": "longrope",
        "short_factor": [1.0] * 64,
        "long_factor": [2.0] * 64,
        "short_mscale": 1.2,
        "long_mscale": 1.3,
        "original_max_position_embeddings": 4096,
    }
    fields = {"attention_bias": True, "lm_head_bias": True, "rope_scaling": scaling}
    config = load(tmp_path, "PhiMoEForCausalLM", **fields)
    layers = frozenset(range(32))
    assert config.moe == MoEConfig(layers, 16, 2, 6400, mixer_tolerance=0.01)
    assert config.attention_bias
    assert config.attention_output_bias
    assert config.head_bias
    assert config.rope.attention_scaling == 1.3
    assert config.for_context(4096).rope.attention_scaling == 1.2
    assert config.max_position_embeddings == 131072


def test_k_exaone(tmp_path: Path) -> None:
    fields = {"num_hidden_layers": 8, "sliding_window": 128, "sliding_window_pattern": "LLLG"}
    config = load(tmp_path, "ExaoneMoeForCausalLM", num_experts=128, **fields)
    choice = ExpertChoice(sigmoid=True, biased=True, group_best=2, scaling=2.5)
    layers = frozenset(range(1, 8))
    assert config.moe == MoEConfig(layers, 128, 8, 1024, 1024, True, choice=choice)
    assert config.layer_windows == (128, 128, 128, None) * 2
    assert config.layer_rope == (True, True, True, False) * 2
    assert config.is_draft_weight("mtp.fc.weight")
    bias = "model.layers.3.mlp.e_score_correction_bias"
    assert config.own_weight_name(bias) == "model.layers.3.mlp.gate.e_score_correction_bias"
    assert config.own_weight_name(config.own_weight_name(bias)) == config.own_weight_name(bias)


def test_flex_olmo(tmp_path: Path) -> None:
    config = load(tmp_path, "FlexOlmoForCausalLM")
    assert config.moe == MoEConfig(frozenset(range(32)), 7, 5, 11008)
    assert config.heads_norm
