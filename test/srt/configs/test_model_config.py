"""ModelConfig from Hugging Face directories: families, spellings, limits, clear refusals."""

import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    ArceeConfig,
    Cohere2Config,
    CohereConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    GlmConfig,
    GptOssConfig,
    GraniteConfig,
    Llama4TextConfig,
    LlamaConfig,
    Ministral3Config,
    MinistralConfig,
    Mistral3Config,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
    SmolLM3Config,
)

from sglang.srt.configs.families import ENCODER_FAMILIES
from sglang.srt.configs.model_config import (
    ARCHITECTURES,
    ModelConfig,
    resolve_context_length,
)
from sglang.srt.configs.pooling_config import causal_name
from sglang.srt.configs.rope_config import RopeConfig
from sglang.srt.environ import Environ
from srt.models.hf_mixtures import MIXTURE_FAMILIES

HF_CONFIGS = {
    "LlamaForCausalLM": LlamaConfig,
    "MistralForCausalLM": MistralConfig,
    "MinistralForCausalLM": MinistralConfig,
    "Ministral3ForCausalLM": Ministral3Config,
    "Mistral3ForConditionalGeneration": lambda: Mistral3Config().text_config,
    "Qwen2ForCausalLM": Qwen2Config,
    "Qwen3ForCausalLM": Qwen3Config,
    "Qwen3MoeForCausalLM": Qwen3MoeConfig,
    "Llama4ForCausalLM": Llama4TextConfig,
    "Llama4ForConditionalGeneration": Llama4TextConfig,
    "Gemma2ForCausalLM": Gemma2Config,
    "Gemma3ForCausalLM": Gemma3TextConfig,
    "Gemma3ForConditionalGeneration": Gemma3TextConfig,
    "CohereForCausalLM": CohereConfig,
    "Cohere2ForCausalLM": Cohere2Config,
    "Olmo2ForCausalLM": Olmo2Config,
    "Olmo3ForCausalLM": Olmo3Config,
    "SmolLM3ForCausalLM": SmolLM3Config,
    "Exaone4ForCausalLM": Exaone4Config,
    "Phi3ForCausalLM": Phi3Config,
    "GraniteForCausalLM": GraniteConfig,
    "GlmForCausalLM": GlmConfig,
    "Glm4ForCausalLM": Glm4Config,
    "SeedOssForCausalLM": SeedOssConfig,
    "ArceeForCausalLM": ArceeConfig,
    "GptOssForCausalLM": GptOssConfig,
    "DeepseekV2ForCausalLM": DeepseekV2Config,
    "DeepseekV3ForCausalLM": DeepseekV3Config,
    **{model.__name__: config for config, model in MIXTURE_FAMILIES.values()},
    "PhiMoEForCausalLM": MIXTURE_FAMILIES["phimoe"][0],
}
# They name a window that no layer has where a file says nothing.
UNUSED_WINDOWS = frozenset({"Qwen2MoeForCausalLM", "Dots1ForCausalLM"})
MULTIMODAL = {
    "Llama4ForConditionalGeneration": "llama4",
    "Gemma3ForConditionalGeneration": "gemma3",
    "Mistral3ForConditionalGeneration": "mistral3",
}

TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}


def write(folder: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return str(folder)


def load(folder: Path, **changes: Any) -> ModelConfig:
    return ModelConfig.from_path(write(folder, {**TINY, **changes}))


def test_plain_fields(tmp_path: Path) -> None:
    config = load(tmp_path, torch_dtype="bfloat16", tie_word_embeddings=True)
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (3, 4, 2)
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (64, 96, 128)
    assert (config.head_dim, config.v_head_dim, config.q_size, config.kv_size) == (16, 16, 64, 32)
    assert config.rms_norm_eps == 1e-5
    assert config.tie_word_embeddings
    assert config.torch_dtype == "bfloat16"
    assert config.layer_windows == (None, None, None)
    assert config.sliding_window is None
    assert not config.is_gguf
    assert config.path == str(tmp_path)
    assert config.rope == RopeConfig(theta=10000.0, original_max_position=512)


@pytest.mark.parametrize(
    "architecture", [name for name in ARCHITECTURES if name not in ENCODER_FAMILIES]
)
def test_missing_fields_mean_what_transformers_means(tmp_path: Path, architecture: str) -> None:
    hf = HF_CONFIGS[causal_name(architecture)]()
    path = write(tmp_path, {"architectures": [architecture]})
    config = ModelConfig.from_path(path)
    assert config.model_type == MULTIMODAL.get(architecture, hf.model_type)
    dense = "intermediate_size_mlp" if "Llama4" in architecture else "intermediate_size"
    for ours, theirs in [
        ("vocab_size", "vocab_size"),
        ("hidden_size", "hidden_size"),
        ("intermediate_size", dense),
        ("num_layers", "num_hidden_layers"),
        ("num_heads", "num_attention_heads"),
        *([] if config.latent else [("num_kv_heads", "num_key_value_heads")]),
        ("rms_norm_eps", "layer_norm_eps" if "Cohere" in architecture else "rms_norm_eps"),
        ("max_position_embeddings", "max_position_embeddings"),
        ("tie_word_embeddings", "tie_word_embeddings"),
        ("bos_token_id", "bos_token_id"),
        *([] if architecture in UNUSED_WINDOWS else [("sliding_window", "sliding_window")]),
    ]:
        assert getattr(config, ours) == getattr(hf, theirs, None), ours
    ropes = hf.rope_parameters
    assert config.rope.theta == ropes.get("full_attention", ropes)["rope_theta"]
    ends = hf.eos_token_id if isinstance(hf.eos_token_id, list) else [hf.eos_token_id]
    assert config.eos_token_ids == tuple(end for end in ends if end is not None)
    layers = getattr(hf, "layer_types", None)
    if layers is not None and config.layer_chunks == (None,) * config.num_layers:
        slides = [window is not None for window in config.layer_windows]
        assert slides == [kind == "sliding_attention" for kind in layers]


def test_every_family_says_where_its_biases_and_norms_are(tmp_path: Path) -> None:
    def flags(architecture: str, **changes: Any) -> tuple[bool, bool, bool, bool]:
        c = load(tmp_path, architectures=[architecture], **changes)
        return c.attention_bias, c.attention_output_bias, c.mlp_bias, c.qk_norm

    both = {"attention_bias": True, "mlp_bias": True}
    assert flags("LlamaForCausalLM") == (False, False, False, False)
    assert flags("LlamaForCausalLM", **both) == (True, True, True, False)
    assert flags("MistralForCausalLM", **both) == (False, False, False, False)
    assert flags("Qwen2ForCausalLM") == (True, False, False, False)
    assert flags("Qwen3ForCausalLM") == (False, False, False, True)
    assert flags("Qwen3ForCausalLM", **both) == (True, True, False, True)


def test_head_dim_may_differ_from_hidden_over_heads(tmp_path: Path) -> None:
    config = load(tmp_path, head_dim=32)
    assert (config.head_dim, config.q_size, config.kv_size) == (32, 128, 64)


def test_layer_windows(tmp_path: Path) -> None:
    def windows(**changes: Any) -> tuple[int | None, ...]:
        return load(tmp_path, **changes).layer_windows

    assert windows(architectures=["MistralForCausalLM"], sliding_window=8) == (8, 8, 8)
    assert windows(architectures=["MistralForCausalLM"], sliding_window=None) == (None,) * 3
    assert windows(sliding_window=8) == (None,) * 3  # a Llama has no windows
    for name in ("Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        qwen: dict[str, Any] = {"architectures": [name], "sliding_window": 8}
        assert windows(**qwen) == (None,) * 3
        assert windows(**qwen, use_sliding_window=True, max_window_layers=1) == (None, 8, 8)
        types = ["sliding_attention", "full_attention", "sliding_attention"]
        assert windows(**qwen, use_sliding_window=True, layer_types=types) == (8, None, 8)
        assert windows(**qwen, use_sliding_window=False, layer_types=types) == (None,) * 3
        with pytest.raises(ValueError, match="layer_types must list 3"):
            windows(**qwen, use_sliding_window=True, layer_types=types[:2])


def test_both_rope_spellings_say_the_same(tmp_path: Path) -> None:
    fields = {"factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16.0}
    old = load(tmp_path, rope_theta=5e5, rope_scaling={"type": "yarn", **fields})
    new = load(tmp_path, rope_parameters={"rope_type": "yarn", "rope_theta": 5e5, **fields})
    assert old.rope == new.rope
    assert new.rope.theta == 5e5
    assert new.rope.rope_type == "yarn"
    assert new.rope.factor == 4.0
    assert new.rope.original_max_position == 128
    assert new.rope.beta_fast == 16.0


def test_null_rope_scaling_is_default(tmp_path: Path) -> None:
    assert load(tmp_path, rope_scaling=None, rope_theta=1e6).rope.rope_type == "default"


@pytest.mark.parametrize(
    ("scaling", "length"),
    [
        ({"rope_type": "linear", "factor": 4.0}, 2048),
        ({"rope_type": "dynamic", "factor": 2.0}, 1024),
        ({"rope_type": "yarn", "factor": 4.0}, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            512,
        ),
        ({"rope_type": "default"}, 512),
    ],
)
def test_trained_length_includes_rope_scaling(
    tmp_path: Path, scaling: dict[str, Any], length: int
) -> None:
    assert load(tmp_path, rope_scaling=scaling).max_position_embeddings == length


def test_yarn_attention_scaling() -> None:
    yarn = RopeConfig(rope_type="yarn", factor=4.0)
    assert yarn.attention_scaling == pytest.approx(0.1 * math.log(4.0) + 1.0)
    assert RopeConfig(rope_type="yarn", factor=4.0, attention_factor=0.7).attention_scaling == 0.7
    both = RopeConfig(rope_type="yarn", factor=4.0, mscale=0.5, mscale_all_dim=1.0)
    expected = (0.05 * math.log(4.0) + 1.0) / (0.1 * math.log(4.0) + 1.0)
    assert both.attention_scaling == pytest.approx(expected)
    assert RopeConfig(rope_type="linear", factor=4.0).attention_scaling == 1.0


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "spiral", "factor": 4.0}, "unknown rope type 'spiral'"),
        ({"rope_type": "linear"}, "needs a 'factor'"),
        ({"rope_type": "linear", "factor": 0.5}, "at least 1"),
        ({"rope_type": "linear", "factor": "4"}, "finite number"),
        ({"rope_type": "llama3", "factor": 8.0}, "original_max_position_embeddings"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_type": "yarn", "factor": 4.0, "surprise": 1}, "surprise"),
        ("yarn", "must be an object"),
    ],
)
def test_impossible_rope_fields_are_refused(tmp_path: Path, scaling: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path, rope_scaling=scaling)


def test_overrides_replace_fields(tmp_path: Path) -> None:
    path = write(tmp_path, {**TINY, "rope_parameters": {"rope_type": "default", "rope_theta": 7e4}})

    def overridden(**overrides: Any) -> ModelConfig:
        return ModelConfig.from_path(path, overrides=overrides)

    assert overridden(num_hidden_layers=1).num_layers == 1
    assert overridden(architectures=["Qwen3ForCausalLM"]).qk_norm
    # The older spelling overrides a file in the newer one, and the other way round.
    linear = overridden(rope_scaling={"rope_type": "linear", "factor": 2.0}).rope
    assert (linear.rope_type, linear.factor, linear.theta) == ("linear", 2.0, 7e4)
    assert overridden(rope_theta=1.0).rope.theta == 1.0
    new = overridden(rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 2.0}).rope
    assert (new.factor, new.theta) == (3.0, 2.0)


def test_tokens_and_generation_defaults(tmp_path: Path) -> None:
    generation = {
        "eos_token_id": [7, 9],
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "do_sample": True,
        "repetition_penalty": None,
    }
    path = write(tmp_path, {**TINY, "bos_token_id": 3, "eos_token_id": 9}, generation)
    config = ModelConfig.from_path(path)
    assert config.bos_token_id == 3
    assert config.eos_token_ids == (7, 9)
    assert config.generation_defaults == {"temperature": 0.6, "top_p": 0.9, "top_k": 20}


def test_null_token_ids_are_none(tmp_path: Path) -> None:
    config = load(tmp_path, bos_token_id=None, eos_token_id=None)
    assert config.bos_token_id is None
    assert config.eos_token_ids == ()


def test_architecture_from_the_model_type(tmp_path: Path) -> None:
    config = load(tmp_path, architectures=None, model_type="qwen2")
    assert config.architecture == "Qwen2ForCausalLM"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "unsupported architecture 'GPT2LMHeadModel'.*Qwen3",
        ),
        ({"architectures": None, "model_type": "gpt2"}, "unsupported architecture 'gpt2'"),
        ({"architectures": "LlamaForCausalLM"}, "must be a list"),
        ({"num_attention_heads": 5}, "hidden_size 64 is not a multiple"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ({"head_dim": 15}, "must be even"),
        ({"hidden_size": 0}, "hidden_size must be a positive whole number"),
        ({"vocab_size": "big"}, "vocab_size must be a positive whole number"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"torch_dtype": "int8"}, "unsupported checkpoint dtype"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "by 'bitsandbytes' are"),
        ({"eos_token_id": -1}, "token id"),
    ],
)
def test_impossible_configs_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path, **changes)
    assert str(tmp_path) in str(caught.value)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        ModelConfig.from_path(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"neither a config\.json nor a \.gguf"):
        ModelConfig.from_path(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot read config\.json"):
        ModelConfig.from_path(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        ModelConfig.from_path(str(tmp_path))
    with pytest.raises(ValueError, match=r"must be a \.gguf"):
        ModelConfig.from_path(str(tmp_path / "config.json"))
    (tmp_path / "config.json").unlink()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"several GGUF files \(a\.gguf, b\.gguf\)"):
        ModelConfig.from_path(str(tmp_path))


def test_shipped_code_is_never_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, {**TINY, "auto_map": {"AutoConfig": "evil.Config"}})
    (tmp_path / "evil.py").write_text("raise SystemExit(1)")
    with caplog.at_level(logging.WARNING):
        config = ModelConfig.from_path(path, trust_remote_code=True)
    assert config.num_layers == 3
    assert "never run" in caplog.text


def test_context_length_rule(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load(tmp_path)
    strict, lax = Environ(), Environ(allow_overwrite_longer_context_len=True)
    assert resolve_context_length(config, None, strict) == 512
    assert resolve_context_length(config, 100, strict) == 100
    assert resolve_context_length(config, 512, strict) == 512
    with pytest.raises(ValueError, match=r"\(513\).*\(512\).*SGLANG_ALLOW_OVERWRITE_LONGER"):
        resolve_context_length(config, 513, strict)
    with caplog.at_level(logging.WARNING):
        assert resolve_context_length(config, 10_000_000, lax) == 10_000_000
    assert "10000000" in caplog.text
    assert "512" in caplog.text
    with pytest.raises(ValueError, match="must be positive"):
        resolve_context_length(config, 0, lax)


def test_contracts_need_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; import sglang.srt.configs.model_config; "
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(Path(__file__).parents[3] / "python")},
    )
    assert result.stdout.strip() == "[]"
