"""DeepSeek's configs: what is kept of a token, how experts are chosen, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.model_traits import ExpertChoice, IndexConfig, LatentConfig, MoEConfig
from sglang.srt.configs.rope_config import RopeConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.managers.scheduler_pool_plan import kv_cache_spec

V3: dict[str, Any] = {"architectures": ["DeepseekV3ForCausalLM"]}
V2: dict[str, Any] = {"architectures": ["DeepseekV2ForCausalLM"]}
LITE = V2 | {"q_lora_rank": None, "num_hidden_layers": 27, "first_k_dense_replace": 1}


def load(folder: Path, raw: dict[str, Any]) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(raw))
    return ModelConfig.from_path(str(folder))


def test_what_is_kept_of_a_token(tmp_path: Path) -> None:
    config = load(tmp_path, V3)
    assert config.latent == LatentConfig(1536, 512, 128, 64, 128)
    assert (config.head_dim, config.v_head_dim, config.num_kv_heads) == (576, 512, 1)
    assert config.num_heads == 128
    assert config.interleaved_rope
    for ranks in (1, 8):  # heads are divided, latents are not
        spec = kv_cache_spec(config, ParallelState(0, ranks), "bfloat16", 64)
        assert spec.values_in_keys
        assert (spec.kv_heads, spec.head_dim, spec.v_head_dim) == (1, 576, 512)
        assert spec.bytes_per_token == 61 * 576 * 2 == 70_272
    assert load(tmp_path, V3 | {"rope_interleave": False}).interleaved_rope is False
    lite = load(tmp_path, LITE)
    assert lite.latent == LatentConfig(None, 512, 128, 64, 128)
    assert kv_cache_spec(lite, ParallelState(), "fp8_e4m3", 1).bytes_per_token == 27 * 576


def test_how_experts_are_chosen(tmp_path: Path) -> None:
    biased = ExpertChoice(True, True, 8, 4, 2, 2.5)
    layers = frozenset(range(3, 61))
    assert load(tmp_path, V3).moe == MoEConfig(layers, 256, 8, 2048, 2048, True, choice=biased)
    moe = load(tmp_path, LITE).moe
    assert moe == MoEConfig(frozenset(range(1, 27)), 64, 6, 1407, 2814, choice=ExpertChoice())
    groups = {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3}
    moe = load(tmp_path, LITE | groups | {"moe_layer_freq": 5, "n_shared_experts": None}).moe
    assert moe is not None
    assert moe.layers == {5, 10, 15, 20, 25}
    assert moe.shared_intermediate_size is None
    assert moe.choice == ExpertChoice(False, False, 8, 3, 1, 1.0)
    assert load(tmp_path, V2 | {"n_routed_experts": None}).moe is None
    alone = load(tmp_path, V3 | {"n_group": None, "topk_group": None}).moe
    assert alone is not None
    assert alone.choice == ExpertChoice(True, True, 1, 1, 2, 2.5)
    one = load(tmp_path, V3 | {"num_experts_per_tok": 1}).moe
    assert one is not None
    assert not one.renormalize  # a single expert would always weigh 1


def test_layers_that_predict_further_tokens(tmp_path: Path) -> None:
    config = load(tmp_path, V3)
    names = [f"model.layers.{layer}.eh_proj.weight" for layer in (6, 60, 61, 62)]
    assert [config.is_draft_weight(name) for name in names] == [False, False, True, False]
    assert not config.is_draft_weight("model.norm.weight")
    assert not load(tmp_path, LITE).is_draft_weight("model.layers.27.eh_proj.weight")


def test_yarn_scales_scores_too(tmp_path: Path) -> None:
    """DeepSeek-V2-Lite: magnitudes of cosines cancel, those of scores remain."""
    yarn = {"type": "yarn", "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707}
    rope = load(tmp_path, LITE | {"rope_scaling": yarn}).rope
    assert rope.attention_scaling == 1.0
    assert rope.softmax_scaling == pytest.approx((0.1 * 0.707 * math.log(40) + 1) ** 2)
    assert RopeConfig(rope_type="yarn", factor=40.0).softmax_scaling == 1.0
    assert RopeConfig(factor=40.0, mscale_all_dim=1.0).softmax_scaling == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topk_method": "best"}, "topk_method 'best' is not supported"),
        ({"scoring_func": "relu"}, "scoring_func 'relu' is not supported"),
        ({"n_group": 7}, "topk_group 4 of n_group 7 over 256 experts"),
        ({"topk_group": 9}, "topk_group 9 of n_group 8"),
        ({"n_group": 256}, "n_group 256 leaves groups of one"),
        ({"num_experts_per_tok": 129}, "129 is more than 128 experts to choose from"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace must be a whole number"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers must be a whole number"),
        ({"moe_layer_freq": 0}, "moe_layer_freq must be a positive"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim 63 must be even"),
        ({"kv_lora_rank": 0}, "kv_lora_rank must be a positive"),
        ({"q_lora_rank": "many"}, "q_lora_rank must be a positive"),
        ({"routed_scaling_factor": 0}, "routed_scaling_factor must be a positive"),
        ({"mlp_bias": True}, "mlp_bias is not supported"),
    ],
)
def test_impossible_fields(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path, V3 | changes)


V32: dict[str, Any] = {"architectures": ["DeepseekV32ForCausalLM"]}
GLM: dict[str, Any] = {"architectures": ["GlmMoeDsaForCausalLM"]}


def test_which_tokens_are_seen(tmp_path: Path) -> None:
    config = load(tmp_path, V32)
    assert config.index == IndexConfig(64, 128, 2048, False, tuple(range(61)))
    assert config.latent == LatentConfig(1536, 512, 128, 64, 128)
    assert config.interleaved_rope
    spec = kv_cache_spec(config, ParallelState(0, 8), "bfloat16", 64)
    assert (spec.index_dim, spec.index_layers) == (128, tuple(range(61)))
    assert spec.bytes_per_token == 61 * (576 + 128) * 2 == 85_888
    glm = load(tmp_path, GLM)
    assert glm.index == IndexConfig(32, 128, 2048, True, tuple(range(78)))
    assert glm.latent == LatentConfig(2048, 512, 192, 64, 256)
    assert load(tmp_path, V3).index is None


def test_which_layers_choose(tmp_path: Path) -> None:
    def layers(**changes: Any) -> tuple[int, ...]:
        index = load(tmp_path, GLM | {"num_hidden_layers": 6} | changes).index
        assert index is not None
        return index.layers

    assert layers(index_topk_freq=2) == (0, 1, 3, 5)
    assert layers(index_topk_freq=3, index_skip_topk_offset=3) == (0, 1, 2, 5)
    assert layers(index_topk_pattern="FSSFSF", index_topk_freq=2) == (0, 3, 5)
    kinds = ["full", "shared"] * 3
    assert layers(indexer_types=kinds, index_topk_pattern="FSSFSF") == (0, 2, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_lora_rank": None}, "q_lora_rank: sparse attention needs queries"),
        ({"index_topk": 0}, "index_topk must be a positive"),
        ({"index_n_heads": None}, None),
        ({"index_head_dim": 32}, "index_head_dim 32 is less than qk_rope_head_dim 64"),
        ({"index_topk_pattern": "F"}, "index_topk_pattern must be 61 letters F and S"),
        ({"indexer_types": ["full"]}, "indexer_types must list 61 of 'full' or 'shared'"),
        ({"index_topk_pattern": "S" * 61}, "the first layer has no indexer before it"),
        ({"index_topk_freq": -1}, "index_topk_freq must be a whole number"),
        ({"mlp_layer_types": ["moe"] * 61}, "mlp_layer_types must list 61 of 'dense' or 'sparse'"),
    ],
)
def test_impossible_fields_of_indexers(
    tmp_path: Path, changes: dict[str, Any], message: str | None
) -> None:
    if message is None:  # null is as if left out
        assert load(tmp_path, V32 | changes) is not None
        return
    with pytest.raises(ValueError, match=message):
        load(tmp_path, V32 | changes)
