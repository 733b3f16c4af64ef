"""gpt-oss's logits against transformers, and the shards of its sinks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.models.gpt_oss import GptOssAttention, GptOssForCausalLM
from srt.models.harness import Sequence
from srt.models.hf_models import make_hf_model, save
from srt.models.test_models import assert_logits_equal, hf_logits, prompts, runner_of


@pytest.mark.parametrize("changes", [{}, {"swiglu_limit": 0.6, "swiglu_alpha": 3.0}], ids=str)
def test_logits(tmp_path: Path, changes: dict[str, Any]) -> None:
    reference = make_hf_model("gpt_oss", **changes)
    assert_logits_equal(reference, save(reference, tmp_path))


def test_logits_depend_on_sinks(tmp_path: Path) -> None:
    reference = make_hf_model("gpt_oss")
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name.endswith("sinks"):
                parameter.copy_(torch.linspace(-3.0, 8.0, len(parameter)))
    assert_logits_equal(reference, save(reference, tmp_path))


def test_every_rank_has_the_sinks_of_its_heads(tmp_path: Path) -> None:
    path = save(make_hf_model("gpt_oss"), tmp_path)
    config = ModelConfig.from_path(path)
    whole = torch.arange(4.0)
    shards = []
    for rank in range(2):
        model = GptOssForCausalLM(config, ParallelState(rank, 2), torch.float32)
        attention = model.get_submodule("model.layers.1.self_attn")
        assert isinstance(attention, GptOssAttention)
        attention.weight_loader("sinks", whole)
        assert attention.attn.sinks is attention.sinks
        shards.append(attention.sinks)
        with pytest.raises(ValueError, match=r"sinks: the checkpoint has shape \(2,\)"):
            attention.weight_loader("sinks", whole[:2])
        with pytest.raises(ValueError, match="no parameter 'weight'"):
            attention.weight_loader("weight", whole)
    assert torch.equal(torch.cat(shards), whole)


def test_bfloat16_stays_close(tmp_path: Path) -> None:
    reference = make_hf_model("gpt_oss")
    text = prompts(90)[0]
    runner = runner_of(save(reference, tmp_path), dtype=torch.bfloat16)
    ours = runner.step([(Sequence(text), len(text))], all_logits=True)[0]
    error = (ours - hf_logits(reference, text)).abs()
    # Eight bits of mantissa through four layers; a missing norm or factor is far outside.
    assert error.median() < 0.05 * hf_logits(reference, text).std()
