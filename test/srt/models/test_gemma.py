"""Gemma 3's logits, caps included, against transformers."""

from __future__ import annotations

from pathlib import Path

import torch

from sglang.srt.layers.radix_attention import RadixAttention
from srt.models.harness import Sequence
from srt.models.hf_models import make_hf_model, save
from srt.models.test_models import assert_logits_equal, hf_logits, prompts, runner_of


def test_logits(tmp_path: Path) -> None:
    reference = make_hf_model("gemma3")
    assert_logits_equal(reference, save(reference, tmp_path))


def test_capped_logits(tmp_path: Path) -> None:
    # Logits reach 3: a cap of 2 bends them well.
    reference = make_hf_model("gemma3", final_logit_softcapping=2.0)
    assert_logits_equal(reference, save(reference, tmp_path))


def test_capped_scores_reach_the_backend(tmp_path: Path) -> None:
    # transformers reads this field of Gemma 3 and does not apply it, so it is no oracle here;
    # the backend's tests compare capped attention with float64.
    text = prompts(50)[0]
    rows = []
    for cap in (None, 0.5):
        reference = make_hf_model("gemma3", attn_logit_softcapping=cap)
        runner = runner_of(save(reference, tmp_path / str(cap)))
        layers = [m for m in runner.model.modules() if isinstance(m, RadixAttention)]
        assert [layer.logit_cap for layer in layers] == [cap or 0.0] * 4
        rows.append(runner.step([(Sequence(text), len(text))])[0])
    assert not torch.allclose(rows[0], rows[1], atol=1e-3)


def test_bfloat16_stays_close(tmp_path: Path) -> None:
    reference = make_hf_model("gemma3")
    text = prompts(90)[0]
    runner = runner_of(save(reference, tmp_path), dtype=torch.bfloat16)
    ours = runner.step([(Sequence(text), len(text))], all_logits=True)[0]
    error = (ours - hf_logits(reference, text)).abs()
    # Eight bits of mantissa through four layers; a missing norm or factor is far outside.
    assert error.median() < 0.05 * hf_logits(reference, text).std()
