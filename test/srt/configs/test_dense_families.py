"""Dense families by their published spellings: windows, layers that do not turn, factors, ropes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.rope_config import RopeConfig, rope_config_from_hf

BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "sliding_window": 8,
}
LONG: dict[str, Any] = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


def load(folder: Path, architecture: str, **changes: Any) -> ModelConfig:
    raw = {"architectures": [architecture], **BASE, **changes}
    (folder / "config.json").write_text(json.dumps(raw))
    return ModelConfig.from_path(str(folder))


def test_windows_by_pattern(tmp_path: Path) -> None:
    def windows(architecture: str, **changes: Any) -> tuple[int | None, ...]:
        return load(tmp_path, architecture, **changes).layer_windows

    assert windows("Gemma2ForCausalLM") == (8, None, 8, None)
    assert windows("Cohere2ForCausalLM") == (8, 8, 8, None)
    assert windows("Cohere2ForCausalLM", sliding_window_pattern=2) == (8, None, 8, None)
    assert windows("Cohere2ForCausalLM", _sliding_window_pattern=2) == (8, None, 8, None)
    assert windows("Olmo3ForCausalLM") == (8, 8, 8, None)
    assert windows("Exaone4ForCausalLM", sliding_window_pattern="LG") == (8, None, 8, None)
    assert windows("Exaone4ForCausalLM", sliding_window=None) == (None,) * 4
    assert windows("SmolLM3ForCausalLM") == (None,) * 4
    assert windows("SmolLM3ForCausalLM", use_sliding_window=True) == (None, None, None, 8)
    assert windows("Phi3ForCausalLM") == (8,) * 4
    assert windows("Phi3ForCausalLM", sliding_window=511) == (511,) * 4
    assert windows("Phi3ForCausalLM", sliding_window=512) == (None,) * 4
    with pytest.raises(ValueError, match="'LLX' is not one of L and G"):
        windows("Exaone4ForCausalLM", sliding_window_pattern="LLX")


def test_layers_without_positions(tmp_path: Path) -> None:
    def turns(architecture: str, **changes: Any) -> tuple[bool, ...]:
        return load(tmp_path, architecture, **changes).layer_rope

    assert turns("Cohere2ForCausalLM") == (True, True, True, False)
    assert turns("CohereForCausalLM") == (True,) * 4
    assert turns("Exaone4ForCausalLM") == (True, True, True, False)
    assert turns("Exaone4ForCausalLM", sliding_window=None) == (True,) * 4
    assert turns("SmolLM3ForCausalLM") == (True, True, True, False)
    assert turns("SmolLM3ForCausalLM", no_rope_layers=[0, 1, 1, 0]) == (False, True, True, False)


def test_factors(tmp_path: Path) -> None:
    granite = load(
        tmp_path,
        "GraniteForCausalLM",
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=0.015625,
        logits_scaling=16.0,
    )
    assert (granite.embedding_factor, granite.residual_factor) == (12.0, 0.22)
    assert (granite.attention_scaling, granite.logit_factor) == (0.015625, 0.0625)
    assert load(tmp_path, "CohereForCausalLM", logit_scale=0.25).logit_factor == 0.25
    gemma = load(tmp_path, "Gemma2ForCausalLM", query_pre_attn_scalar=144)
    assert gemma.attention_scaling == pytest.approx(1 / 12)
    assert (gemma.attention_logit_cap, gemma.final_logit_cap) == (50.0, 30.0)
    with pytest.raises(ValueError, match="logits_scaling must be a positive number"):
        load(tmp_path, "GraniteForCausalLM", logits_scaling=0)
    assert load(tmp_path, "CohereForCausalLM", use_qk_norm=True).heads_norm
    assert not load(tmp_path, "CohereForCausalLM").heads_norm


def test_olmo3_scales_the_rotation_of_global_layers(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
    config = load(tmp_path, "Olmo3ForCausalLM", rope_theta=7e5, rope_scaling=yarn)
    assert (config.rope.rope_type, config.rope.theta) == ("yarn", 7e5)
    assert config.window_rope == RopeConfig(theta=7e5, original_max_position=512)


def test_a_share_of_the_dimensions(tmp_path: Path) -> None:
    assert load(tmp_path, "Glm4ForCausalLM").rope.turned(16) == 8
    phi = load(tmp_path, "Phi3ForCausalLM", partial_rotary_factor=0.75)
    assert (phi.rope.partial, phi.rope.turned(16)) == (0.75, 12)
    with pytest.raises(ValueError, match="partial_rotary_factor other than"):
        load(tmp_path, "LlamaForCausalLM", partial_rotary_factor=0.5)
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        load(tmp_path, "GlmForCausalLM", partial_rotary_factor=1.5)
    with pytest.raises(ValueError, match="with rope type 'dynamic'"):
        load(tmp_path, "GlmForCausalLM", rope_scaling={"type": "dynamic", "factor": 2.0})


def test_long_rope(tmp_path: Path) -> None:
    changes = {"original_max_position_embeddings": 128, "rope_scaling": LONG}
    config = load(tmp_path, "Phi3ForCausalLM", **changes)
    rope = config.rope
    assert (rope.rope_type, rope.factor, rope.original_max_position) == ("longrope", 4.0, 128)
    assert rope.attention_scaling == pytest.approx(math.sqrt(1 + math.log(4) / math.log(128)))
    assert config.max_position_embeddings == 512, "scaling is in it already"
    assert (rope.short_factors, rope.long_factors) == ((1.0,) * 8, (2.0,) * 8)
    assert [rope.for_context(n).is_long for n in (127, 128, 129)] == [False, False, True]
    assert config.for_context(128).rope.is_long is False
    plain = load(tmp_path, "LlamaForCausalLM")
    assert plain.for_context(1 << 20) == plain


def test_long_rope_in_other_words() -> None:
    fields = {**LONG, "type": "su", "attention_factor": 1.25}
    rope = rope_config_from_hf({"rope_scaling": fields}, max_position_embeddings=512)
    assert (rope.rope_type, rope.factor, rope.attention_scaling) == ("longrope", 1.0, 1.25)
    assert not rope.is_long


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"long_factor": None}, "needs 'long_factor', a list"),
        ({"short_factor": [1.0, 0.0]}, "'short_factor' must have positive"),
        ({"short_factor": ["a"]}, "'short_factor' must be a finite number"),
        ({"short_mscale": 1.0}, "unknown rope field"),
    ],
)
def test_damaged_long_rope(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rope_config_from_hf({"rope_scaling": {**LONG, **changes}}, max_position_embeddings=512)


def test_the_temperature_of_ministral3(tmp_path: Path) -> None:
    """Its steps lie at multiples of the original length, exactly, as far as anybody goes."""
    config = load(tmp_path, "Ministral3ForCausalLM")
    tuned = config.query_temperature
    assert tuned is not None
    assert tuned.attn_scale == 0.1
    for n in (1, 2, 3, 1000):
        border = 16384 * n
        steps = [math.floor((p + 1) / tuned.floor_scale) for p in (border - 1, border)]
        assert steps == [n - 1, n]
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    assert load(tmp_path, "Ministral3ForCausalLM", **plain).query_temperature is None
    text = {**BASE, "model_type": "mistral", "rope_theta": 1e9}
    raw = {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    small = ModelConfig.from_path(str(tmp_path))
    assert (small.query_temperature, small.rope.theta) == (None, 1e9)
