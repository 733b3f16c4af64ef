"""Families that are Llama's but for norms, windows, factors and rotation, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
)

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.rotary_embedding import partial_row_order
from sglang.srt.model_loader.loader import load_model
from srt.models.harness import Runner, Sequence
from srt.models.hf_dense import DENSE_FAMILIES
from srt.models.hf_models import make_hf_model, save
from srt.models.test_models import assert_logits_equal, hf_logits, prompts, runner_of

# Phi's factors follow the length of what transformers is given; see below.
FAMILIES = [family for family in DENSE_FAMILIES if family != "phi3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_every_row(family: str, tmp_path: Path) -> None:
    reference = make_hf_model(family)
    assert_logits_equal(reference, save(reference, tmp_path))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
        ("cohere2", {"layer_types": ["full_attention"] * 4}),
        ("cohere", {"use_qk_norm": True}),
        ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 4}),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 9}),
        ("olmo2", {"num_key_value_heads": 4, "attention_bias": True}),
        ("ministral3", {"sliding_window": 9, "tie_word_embeddings": True}),
    ],
)
def test_variants_within_a_family(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    reference = make_hf_model(family, **changes)
    assert_logits_equal(reference, save(reference, tmp_path))


def assert_phi_equal(
    reference: PreTrainedModel, path: str, lengths: tuple[int, ...], context_length: int
) -> None:
    """All rows of prompts, in two chunks each, by a server of `context_length`."""
    config = ModelConfig.from_path(path).for_context(context_length)
    parts: dict[str, Any] = {"parallel": ParallelState(), "show_progress": False}
    model = load_model(config, dtype=torch.float32, **parts)
    runner = Runner(model, page_size=16, dtype=torch.float32)
    for text in prompts(*lengths):
        one = Sequence(text)
        rows = [runner.step([(one, n)], all_logits=True)[0] for n in (30, len(text) - 30)]
        torch.testing.assert_close(torch.cat(rows), hf_logits(reference, text), atol=1e-4, rtol=0)


def test_long_rope_goes_by_the_length_that_is_served(tmp_path: Path) -> None:
    reference = make_hf_model("phi3")
    path = save(reference, tmp_path)
    assert ModelConfig.from_path(path).rope.is_long
    assert_phi_equal(reference, path, (65, 90), context_length=65)
    assert_phi_equal(reference, path, (31, 64), context_length=64)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        {"rope_parameters": {"rope_type": "default"}, "partial_rotary_factor": 1.0},
        {"max_position_embeddings": 64},
    ],
)
def test_phi_without_long_factors(changes: dict[str, Any], tmp_path: Path) -> None:
    reference = make_hf_model("phi3", **changes)
    assert_phi_equal(reference, save(reference, tmp_path), (31, 64), context_length=64)


def test_pairs_that_turn_come_first() -> None:
    assert partial_row_order(8, 8).tolist() == list(range(8))
    assert partial_row_order(8, 4).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


def test_the_text_part_of_a_multimodal_mistral3(tmp_path: Path) -> None:
    text = make_hf_model("ministral3")
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = Mistral3Config(
        text_config=text.config.to_dict(),
        vision_config={"model_type": "pixtral", **vision},
        tie_word_embeddings=False,
    )
    assert isinstance(config, PretrainedConfig)
    whole = Mistral3ForConditionalGeneration(config)
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.lm_head.load_state_dict(text.lm_head.state_dict())
    path = save(whole, tmp_path)
    assert_logits_equal(text, path)


def test_bfloat16_stays_close(tmp_path: Path) -> None:
    """Where a residual stream is not read through norms, and where means are taken off."""
    for family in ("olmo3", "cohere2"):
        reference = make_hf_model(family)
        text = prompts(90)[0]
        runner = runner_of(save(reference, tmp_path / family), dtype=torch.bfloat16)
        ours = runner.step([(Sequence(text), len(text))], all_logits=True)[0]
        exact = hf_logits(reference, text)
        assert (ours - exact).abs().median() < 0.05 * exact.std()
