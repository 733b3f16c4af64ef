"""DeepSeek-V3.2 and GLM-5 against transformers: every query sees the tokens that an indexer chose.

References are small random models in float32 whose queries see 12 of up to 90 tokens. Transformers
scores all tokens at once and masks those that were not chosen.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from sglang.srt.layers.attention import sparse_cpu_backend
from sglang.srt.layers.attention.sparse_cpu_backend import ScoreLimits, SparseCpuBackend
from srt.model_loader.quantized_files import fp8, quantise, write_checkpoint
from srt.models.harness import Sequence
from srt.models.hf_models import best_next, make_hf_model, save
from srt.models.test_models import assert_logits_equal, hf_logits, prompts, runner_of

KINDS = ("deepseek_v32", "glm_moe_dsa")
every_kind = pytest.mark.parametrize("kind", KINDS)


def reference(kind: str, **changes: Any) -> PreTrainedModel:
    """A model of which every expert is chosen by some token, by the bias too."""
    model = make_hf_model(kind, **changes)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.linspace(-0.2, 0.2, len(buffer)).roll(len(name) % 5))
    return model


@every_kind
def test_logits_of_every_row(tmp_path: Path, kind: str) -> None:
    hf = reference(kind)
    assert_logits_equal(hf, save(hf, tmp_path))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("deepseek_v32", {"attention_bias": True, "index_topk": 1}),
        ("deepseek_v32", {"index_topk": 100}),  # more than there are
        ("deepseek_v32", {"index_head_dim": 8, "num_hidden_layers": 1}),  # all of a key turns
        ("deepseek_v32", {"mlp_layer_types": ["sparse", "dense", "sparse"]}),
        ("glm_moe_dsa", {"indexer_types": ["full", "shared", "full", "full"]}),
    ],
    ids=str,
)
def test_variants(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    hf = reference(kind, **changes)
    assert_logits_equal(hf, save(hf, tmp_path))


@every_kind
@pytest.mark.parametrize("page_size", [1, 16])
def test_greedy_tokens_in_mixed_batches(tmp_path: Path, kind: str, page_size: int) -> None:
    """Requests below and above the number of tokens that a query sees, and one that grows past."""
    hf = reference(kind)
    texts = prompts(37, 5, 70)
    outputs = runner_of(save(hf, tmp_path), page_size=page_size).greedy(texts, 24, chunk=13)
    assert outputs == [best_next(hf, *pair) for pair in zip(texts, outputs, strict=True)]
    assert all(len(set(output)) > 8 for output in outputs)


@every_kind
def test_chunks_and_blocks_change_nothing(tmp_path: Path, kind: str) -> None:
    """Logits of any chunks, scored a few queries and keys at a time, are those of one look."""
    runner = runner_of(save(reference(kind), tmp_path), page_size=4)
    (text,) = prompts(60)
    whole = runner.step([(Sequence(text), 60)], all_logits=True)[0]
    backend = runner.backend
    assert isinstance(backend, SparseCpuBackend)
    backend._limits = ScoreLimits(score_bytes=4 * 16 * 13)
    assert backend._limits.block(16, 12, 5) == (1, 13)
    seq = Sequence(text)
    rows = [runner.step([(seq, n)], all_logits=True)[0] for n in (11, 1, 1, 29, *[1] * 4, 14)]
    torch.testing.assert_close(torch.cat(rows), whole, atol=1e-4, rtol=0)


def test_scores_of_a_long_context_stay_within_their_bound() -> None:
    """A million tokens, 64 index heads: the products of a block, whatever the context."""
    limits = ScoreLimits()
    assert limits.block(64, 2048, 1) == (1, 8192)
    assert limits.block(64, 2048, 100) == (4, 2048)
    assert limits.score_bytes == 4 * 4 * 64 * 2048
    assert limits.block(64, 1 << 20, 9) == (1, 1 << 20)  # as many keys as are chosen, at least


def test_rows_that_nobody_wants_are_not_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = reference("deepseek_v32", num_hidden_layers=2)
    text, other = prompts(40, 6)
    runner = runner_of(save(hf, tmp_path))
    scored: list[int] = []
    original = sparse_cpu_backend.index_scores

    def count(query: Any, keys: torch.Tensor) -> torch.Tensor:
        scored.append(len(query.weights))
        return original(query, keys)

    monkeypatch.setattr(sparse_cpu_backend, "index_scores", count)
    seq, short = Sequence(text), Sequence(other)
    middle, end = runner.step([(seq, 25), (short, 6)])
    assert len(middle) == 0
    torch.testing.assert_close(end[0], hf_logits(hf, other)[-1], atol=1e-4, rtol=0)
    assert scored == [13]  # positions 12 to 24 in the first layer; the last one's are not wanted
    (last,) = runner.step([(seq, 15)])
    torch.testing.assert_close(last[0], hf_logits(hf, text)[-1], atol=1e-4, rtol=0)
    assert scored == [13, 15, 1]


@every_kind
def test_a_reused_prefix_gives_the_same_tokens(tmp_path: Path, kind: str) -> None:
    hf = reference(kind)
    runner = runner_of(save(hf, tmp_path), page_size=16)
    first, tail = prompts(53, 10)
    source = Sequence(list(first))
    runner.step([(source, len(first))])
    text = first[:40] + tail
    shared = runner.share_prefix(source, list(text))
    assert shared.num_computed == 32
    (output,) = runner.continue_greedily([shared], 16)
    assert output == best_next(hf, text, output)


@every_kind
def test_bfloat16_logits(tmp_path: Path, kind: str) -> None:
    """Of a mean over rows: experts may flip, and so may tokens that score alike."""
    hf = reference(kind)
    path = save(hf, tmp_path)
    text = prompts(90)[0]
    exact, theirs = hf_logits(hf, text), hf_logits(hf.to(torch.bfloat16), text)
    runner = runner_of(path, dtype=torch.bfloat16)
    (ours,) = runner.step([(Sequence(text), len(text))], all_logits=True)
    assert (ours - exact).abs().mean() <= 1.5 * (theirs - exact).abs().mean()


def test_index_weights_of_layers_that_share_are_passed_over(tmp_path: Path) -> None:
    """Some files of GLM-5.2 have an indexer in every layer; a layer that is none's is refused."""
    hf = reference("glm_moe_dsa")
    path = save(hf, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    more = {f"model.layers.{n}.self_attn.indexer.wk.weight": torch.ones(16, 64) for n in (2, 3)}
    save_file(tensors | more, file, metadata={"format": "pt"})
    assert_logits_equal(hf, path, num_tokens=60)
    del tensors["model.layers.1.self_attn.indexer.k_norm.bias"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"1 missing weight\(s\): model.layers.1.self_attn.indexer"
    ):
        runner_of(path)


def test_a_config_as_it_is_published(tmp_path: Path) -> None:
    """transformers' file without what it fills in: which layers choose is said in other ways."""
    hf = reference("glm_moe_dsa", indexer_types=["full", "full", "shared", "full"])
    path = save(hf, tmp_path)
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text())
    for name in ("indexer_types", "mlp_layer_types", "layer_types", "head_dim"):
        del raw[name]
    for said in ({"index_topk_pattern": "FFSF"}, {"index_topk_freq": 2}):
        file.write_text(json.dumps(raw | said))
        assert_logits_equal(hf, path, num_tokens=60)


def test_a_checkpoint_in_fp8_blocks(tmp_path: Path) -> None:
    """As DeepSeek-V3.2 is published: codes for all matrices but routers and index weights."""
    hf = reference("deepseek_v32", num_hidden_layers=2)
    seeds = iter(range(10**6))

    def code(module: str, outputs: int, inputs: int) -> Any:
        if module.endswith(("mlp.gate", "weights_proj")):
            return None
        tensors, wide = fp8(outputs, inputs, next(seeds), (32, 16))
        return {"weight": tensors["weight"], "weight_scale_inv": tensors["scale"]}, wide

    scheme = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 16]}
    path = write_checkpoint(tmp_path, hf, scheme, quantise(hf, code))
    assert_logits_equal(hf, path)
