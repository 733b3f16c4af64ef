"""The dense families out of GGUF files: the same logits, and refusals of what would change them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.linear import QKVParallelLinear
from sglang.srt.utils.native import native_kernels
from srt.model_loader.gguf_files import write_gguf
from srt.model_loader.test_gguf_mixtures import load, logits
from srt.models.hf_dense import LONG_ROPE, WINDOW
from srt.models.hf_models import make_hf_model
from srt.models.test_dense_families import assert_phi_equal
from srt.models.test_models import assert_logits_equal

FACTORS = {
    "rope_factors_short.weight": np.array(LONG_ROPE["short_factor"], np.float32),
    "rope_factors_long.weight": np.array(LONG_ROPE["long_factor"], np.float32),
}
# What the files can't say is as in the published models.
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma2": (
        {"query_pre_attn_scalar": 16},
        {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 2.5},
    ),
    "gemma3": (
        {
            "query_pre_attn_scalar": 16,
            "sliding_window": WINDOW,
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5},
            },
        },
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
    "cohere2": ({}, {"attention.layer_norm_epsilon": 1e-5, "logit_scale": 0.75}),
    "cohere": (
        {"tie_word_embeddings": True},
        {"attention.layer_norm_epsilon": 1e-5, "logit_scale": 0.5},
    ),
    "olmo2": ({}, {}),
    "olmo3": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e3}},
        {"attention.sliding_window_pattern": [True, False] * 2},
    ),
    "granite": (
        {},
        {
            "attention.scale": 0.2,
            "embedding_scale": 3.0,
            "residual_scale": 0.4,
            "logit_scale": 1.7,
        },
    ),
    "glm4": ({}, {"rope.dimension_count": 8}),
    "smollm3": ({"no_rope_layers": [1, 1, 1, 0]}, {}),
    "exaone4": ({}, {"attention.sliding_window_pattern": [True, False] * 2}),
    "seed_oss": ({}, {}),
    "arcee": ({}, {}),
}
WINDOWED = ("gemma2", "gemma3", "cohere2", "olmo3", "exaone4")


def write(path: Path, family: str, **arguments: Any) -> PreTrainedModel:
    changes, values = FAMILIES[family]
    if family in WINDOWED:
        values = {**values, "attention.sliding_window": WINDOW}
    reference = make_hf_model(family, **changes)
    arch = {"cohere": "command-r", "olmo3": "olmo2"}.get(family, family)
    metadata = {f"{arch}.{key}": value for key, value in values.items()}
    write_gguf(path, reference, metadata=metadata, **arguments)
    return reference


@pytest.mark.parametrize("family", list(FAMILIES))
def test_logits_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    reference = write(tmp_path / "m.gguf", family)
    assert_logits_equal(reference, str(tmp_path / "m.gguf"))


def write_phi(path: Path, **changes: Any) -> PreTrainedModel:
    reference = make_hf_model("phi3")
    values = {
        "rope.dimension_count": 6,
        "rope.scaling.original_context_length": 64,
        "rope.scaling.attn_factor": float(reference.model.rotary_emb.attention_scaling),
        "attention.sliding_window": WINDOW,
    }
    metadata = {f"phi3.{key}": value for key, value in values.items()}
    write_gguf(path, reference, metadata=metadata, **{"extra_tensors": FACTORS, **changes})
    return reference


def test_long_rope(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    reference = write_phi(path)
    assert_phi_equal(reference, str(path), (65, 90), context_length=65)
    assert_phi_equal(reference, str(path), (31, 64), context_length=64)
    one = {"rope_factors_long.weight": FACTORS["rope_factors_long.weight"]}
    write_phi(path, extra_tensors=one)
    with pytest.raises(ValueError, match="longrope needs tensors"):
        ModelConfig.from_path(str(path))


def test_scores_of_the_largest_gemma2(tmp_path: Path) -> None:
    """Files don't say what they go by; of 46 layers it is known."""
    path = tmp_path / "m.gguf"
    for layers, scalar in ((2, 24), (46, 16)):
        kinds = ["sliding_attention", "full_attention"] * (layers // 2)
        tiny = {"hidden_size": 32, "num_attention_heads": 2, "head_dim": 24}
        changes = {**tiny, "num_hidden_layers": layers, "layer_types": kinds}
        write_gguf(path, make_hf_model("gemma2", **changes))
        assert ModelConfig.from_path(str(path)).attention_scaling == pytest.approx(scalar**-0.5)


def test_heads_that_cohere_normalises(tmp_path: Path) -> None:
    changes = {"tie_word_embeddings": True, "use_qk_norm": True}
    reference = make_hf_model("cohere", **changes)
    metadata = {f"command-r.{key}": value for key, value in FAMILIES["cohere"][1].items()}
    write_gguf(tmp_path / "m.gguf", reference, metadata=metadata)
    assert_logits_equal(reference, str(tmp_path / "m.gguf"))


@pytest.mark.skipif(native_kernels() is None, reason="sgl-kernel is not installed")
def test_joined_projections_stay_quantised(tmp_path: Path) -> None:
    """The parts of Phi's matrices, rows in another order, multiply as their numbers do."""
    path = tmp_path / "m.gguf"
    write_phi(path, quant=gguf.GGMLQuantizationType.Q8_0)
    kept, wide = load(path, "gguf"), load(path, "none")
    for model in (kept, wide):
        qkv = model.get_submodule("model.layers.0.self_attn.qkv_proj")
        assert isinstance(qkv, QKVParallelLinear)
        assert (qkv.quantized is None) == (model is wide)
    torch.testing.assert_close(logits(kept, 70), logits(wide, 70), atol=2e-4, rtol=0)
