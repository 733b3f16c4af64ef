"""DeepSeek's families against transformers: latent attention, YaRN, groups of experts.

References are small random models in float32 whose prompts are longer than the trained length that
YaRN stretches. Transformers makes every head's keys and values; ours never does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.moe import Experts
from srt.model_loader.quantized_files import fp8, quantise, write_checkpoint
from srt.models.harness import Sequence
from srt.models.hf_models import LITE, VOCAB, best_next, make_hf_model, save
from srt.models.test_models import assert_logits_equal, hf_logits, prompts, runner_of

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lite": ("deepseek_v2", LITE),
    "v2": ("deepseek_v2", {}),
    "v3": ("deepseek_v3", {}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def reference(kind: str, **changes: Any) -> PreTrainedModel:
    """A model of which every expert is chosen by some token, by the bias too."""
    family, fields = KINDS[kind]
    return make_hf_model(family, **{**fields, **changes})


@every_kind
def test_logits_of_every_row(tmp_path: Path, kind: str) -> None:
    hf = reference(kind)
    assert_logits_equal(hf, save(hf, tmp_path))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("v3", {"rope_interleave": False}),
        ("v3", {"attention_bias": True}),
        ("v3", {"q_lora_rank": None, "n_group": 1, "topk_group": 1}),
        ("v3", {"norm_topk_prob": False, "n_shared_experts": 3}),
        ("lite", {"rms_norm_eps": 0.1, "tie_word_embeddings": True}),
        ("v2", {"first_k_dense_replace": 3, "v_head_dim": 24}),
        ("v3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e3}}),
        ("lite", {"num_hidden_layers": 1, "first_k_dense_replace": 0}),
    ],
)
def test_variants(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    hf = reference(kind, **changes)
    assert_logits_equal(hf, save(hf, tmp_path))


@pytest.mark.parametrize(
    "fields",
    [
        {"mscale": 1.0, "mscale_all_dim": 1.0},
        {"mscale": 0.707, "mscale_all_dim": 0.707, "factor": 40.0},
        {"mscale": 1.0},
        {"mscale_all_dim": 0.3},
        {},
    ],
    ids=str,
)
def test_every_way_to_say_yarn(tmp_path: Path, fields: dict[str, float]) -> None:
    rope = {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 1e3,
        **fields,
    }
    hf = reference("v3", rope_parameters=rope)
    assert_logits_equal(hf, save(hf, tmp_path))


@every_kind
@pytest.mark.parametrize("page_size", [1, 16])
def test_greedy_tokens_in_mixed_batches(tmp_path: Path, kind: str, page_size: int) -> None:
    hf = reference(kind)
    texts = prompts(37, 5, 70)
    outputs = runner_of(save(hf, tmp_path), page_size=page_size).greedy(texts, 32, chunk=13)
    assert outputs == [best_next(hf, *pair) for pair in zip(texts, outputs, strict=True)]
    assert all(len(set(output)) > 8 for output in outputs)


@every_kind
def test_a_decode_step_is_a_prompts_last_row(tmp_path: Path, kind: str) -> None:
    """Logits of tokens that come one by one are those of one chunk, and of any chunks."""
    runner = runner_of(save(reference(kind), tmp_path))
    (text,) = prompts(40)
    whole = runner.step([(Sequence(text), 40)], all_logits=True)[0]
    seq = Sequence(text)
    rows = [runner.step([(seq, n)], all_logits=True)[0] for n in (11, 1, 1, 20, *[1] * 7)]
    torch.testing.assert_close(torch.cat(rows), whole, atol=1e-4, rtol=0)


def test_rows_that_nobody_wants_are_skipped_but_kept(tmp_path: Path) -> None:
    hf = reference("v3")
    text, other = prompts(40, 6)
    runner = runner_of(save(hf, tmp_path))
    seq, short = Sequence(text), Sequence(other)
    middle, end = runner.step([(seq, 25), (short, 6)])
    assert middle.shape == (0, VOCAB)
    torch.testing.assert_close(end[0], hf_logits(hf, other)[-1], atol=1e-4, rtol=0)
    (last,) = runner.step([(seq, 15)])
    torch.testing.assert_close(last[0], hf_logits(hf, text)[-1], atol=1e-4, rtol=0)


def test_a_reused_prefix_gives_the_same_tokens(tmp_path: Path) -> None:
    hf = reference("v2")
    runner = runner_of(save(hf, tmp_path), page_size=16)
    first, tail = prompts(53, 10)
    source = Sequence(list(first))
    runner.step([(source, len(first))])
    text = first[:40] + tail
    shared = runner.share_prefix(source, list(text))
    assert shared.num_computed == 32
    (output,) = runner.continue_greedily([shared], 32)
    assert output == best_next(hf, text, output)


@every_kind
def test_bfloat16_logits(tmp_path: Path, kind: str) -> None:
    """As test_models.py has it for other families, of a mean over rows: experts may flip."""
    hf = reference(kind)
    path = save(hf, tmp_path)
    text = prompts(90)[0]
    exact, theirs = hf_logits(hf, text), hf_logits(hf.to(torch.bfloat16), text)
    runner = runner_of(path, dtype=torch.bfloat16)
    (ours,) = runner.step([(Sequence(text), len(text))], all_logits=True)
    assert (ours - exact).abs().mean() <= 1.5 * (theirs - exact).abs().mean()


def test_layers_of_token_prediction_are_passed_over(tmp_path: Path) -> None:
    """DeepSeek-V3's files have a 62nd layer, for drafts."""
    hf = reference("v3")
    path = save(hf, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    more = {f"model.layers.3.{name}": torch.ones(2, 2) for name in ("eh_proj.weight", "enorm.w")}
    save_file(tensors | more, file, metadata={"format": "pt"})
    assert_logits_equal(hf, path, num_tokens=60)
    for layer in (2, 4):
        save_file(tensors | {f"model.layers.{layer}.eh_proj.weight": torch.ones(1)}, file)
        with pytest.raises(ValueError, match=rf"1 unexpected weight\(s\): model.layers.{layer}.eh"):
            runner_of(path)


def test_a_checkpoint_in_fp8_blocks(tmp_path: Path) -> None:
    """As DeepSeek-V3 is published: a scale for each block, none of the routers, a draft layer."""
    hf = reference("v3", num_hidden_layers=2)
    seeds = iter(range(10**6))

    def code(module: str, outputs: int, inputs: int) -> Any:
        if module.endswith("mlp.gate"):
            return None
        tensors, wide = fp8(outputs, inputs, next(seeds), (32, 16))
        return {"weight": tensors["weight"], "weight_scale_inv": tensors["scale"]}, wide

    scheme = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 16]}
    tensors = quantise(hf, code)
    draft = "model.layers.2.mlp.experts.0.up_proj"
    tensors[f"{draft}.weight"] = torch.zeros(24, 64).to(torch.float8_e4m3fn)
    tensors[f"{draft}.weight_scale_inv"] = torch.ones(1, 4)
    path = write_checkpoint(tmp_path, hf, scheme, tensors)
    assert_logits_equal(hf, path)


def test_ranks_divide_heads_and_not_latents(tmp_path: Path) -> None:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader.loader import load_model

    path = save(reference("v3"), tmp_path)
    config = ModelConfig.from_path(path)
    ranks = [
        load_model(
            config, dtype=torch.float32, parallel=ParallelState(rank, 2), show_progress=False
        )
        for rank in range(2)
    ]
    for model in ranks:
        attention = model.get_submodule("model.layers.1.self_attn")
        shapes = {name: tuple(p.shape) for name, p in attention.named_parameters()}
        assert shapes["q_b_proj.weight"] == (2 * 24, 24)
        assert shapes["kv_b_proj.weight"] == (2 * 28, 32)
        assert shapes["kv_a_proj_with_mqa.weight"] == (40, 64)
        assert shapes["o_proj.weight"] == (64, 2 * 12)
        experts = model.get_submodule("model.layers.1.mlp.experts")
        assert isinstance(experts, Experts)
        assert experts.width == 12
