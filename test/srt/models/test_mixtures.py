"""Mixtures of experts against transformers: logits, greedy tokens, ranks, quantised files.

References are small random models in float32; prompts come in chunks and decode beside others.
What all mixtures share is tested with Qwen3-MoE, Llama 4, gpt-oss and DeepSeek elsewhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from srt.managers.rank_towers import rank_towers
from srt.managers.test_engine_tokens import PROMPTS, DeviceTower, tower
from srt.model_loader.gguf_files import write_gguf
from srt.model_loader.quantized_files import fp8, quantise, write_checkpoint
from srt.models.harness import Sequence
from srt.models.hf_mixtures import MIXTURE_FAMILIES
from srt.models.hf_models import best_next, make_hf_model, save
from srt.models.test_models import assert_logits_equal, hf_logits, prompts, runner_of


@pytest.mark.parametrize("family", MIXTURE_FAMILIES)
def test_logits_and_greedy_tokens(tmp_path: Path, family: str) -> None:
    hf = make_hf_model(family)
    path = save(hf, tmp_path)
    assert_logits_equal(hf, path)
    texts = prompts(37, 5)
    outputs = runner_of(path).greedy(texts, 24, chunk=13)
    assert outputs == [best_next(hf, *pair) for pair in zip(texts, outputs, strict=True)]
    assert all(len(set(output)) > 6 for output in outputs)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("glm4_moe", {"use_qk_norm": False, "attention_bias": False}),
        ("glm4_moe", {"rope_parameters": {"rope_theta": 1e3, "partial_rotary_factor": 0.25}}),
        ("glm4_moe_lite", {"rms_norm_eps": 0.1, "mlp_layer_types": ["sparse", "dense", "sparse"]}),
        ("dots1", {"max_window_layers": 1, "sliding_window": 9, "attention_bias": True}),
        ("mixtral", {"sliding_window": 9, "num_experts_per_tok": 1}),
        ("qwen2_moe", {"norm_topk_prob": True, "qkv_bias": False, "mlp_only_layers": []}),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}),
        ("phimoe", {"attention_bias": False, "lm_head_bias": False, "sliding_window": 9}),
        ("minimax_m2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e3}}),
        ("olmoe", {"norm_topk_prob": True, "attention_bias": True, "num_key_value_heads": 4}),
        ("granitemoe", {"tie_word_embeddings": True, "attention_bias": True}),
        ("hunyuan_v1_moe", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e3}}),
        (
            "exaone_moe",
            {
                "layer_types": ["full_attention"] * 4,
                "num_shared_experts": 2,
                "n_group": 1,
                "topk_group": 1,
            },
        ),
        ("ernie4_5_moe", {"moe_layer_interval": 2, "tie_word_embeddings": True}),
        ("ernie4_5_moe", {"moe_num_shared_experts": 0, "moe_layer_end_index": 1}),
    ],
    ids=str,
)
def test_variants(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    hf = make_hf_model(family, **changes)
    assert_logits_equal(hf, save(hf, tmp_path), num_tokens=60)


def test_kimi_k2_is_deepseek_v3_under_another_name(tmp_path: Path) -> None:
    """One group of experts, and a YaRN that ramps within one pair of dimensions."""
    rope = {
        "rope_type": "yarn",
        "rope_theta": 1e3,
        "factor": 32.0,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 64,
    }
    hf = make_hf_model(
        "deepseek_v3", n_group=1, topk_group=1, routed_scaling_factor=2.827, rope_parameters=rope
    )
    path = save(hf, tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "kimi_k2"}))
    assert_logits_equal(hf, path)


def answer_all(engine: DeviceTower) -> list[list[int]]:
    for number, prompt in enumerate(PROMPTS[:3]):
        engine.send(f"r{number}", prompt, max_new_tokens=12)
        engine.scheduler.turn()
    engine.run()
    return [engine.output(f"r{number}") for number in range(3)]


@pytest.mark.parametrize("family", ["glm4_moe", "minimax_m2", "phimoe", "exaone_moe"])
def test_two_ranks_answer_as_one_and_as_transformers(tmp_path: Path, family: str) -> None:
    hf = make_hf_model(family)
    path = save(hf, tmp_path)
    flags: dict[str, object] = {"page_size": 16, "chunked_prefill_size": 32}
    with tower(path, **flags) as engine:
        alone = answer_all(engine)
    assert alone == [best_next(hf, *pair) for pair in zip(PROMPTS, alone, strict=False)]
    with rank_towers(2, path, **flags) as ranks:
        assert ranks.run(answer_all) == alone


@pytest.mark.parametrize("family", ["mixtral", "minimax_m2"])
def test_experts_with_numbered_parts_in_fp8(tmp_path: Path, family: str) -> None:
    """In blocks of FP8, by the names that published checkpoints have."""
    hf = make_hf_model(family, num_hidden_layers=1, intermediate_size=32, num_local_experts=4)
    seeds = iter(range(10**6))

    def code(module: str, outputs: int, inputs: int) -> Any:
        tensors, wide = fp8(outputs, inputs, next(seeds), (32, 32))
        return {"weight": tensors["weight"], "weight_scale_inv": tensors["scale"]}, wide

    tensors = quantise(hf, code)
    parts = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2", "mlp": "block_sparse_moe"}
    named = {".".join(parts.get(one, one) for one in name.split(".")): tensor
             for name, tensor in tensors.items()}  # fmt: skip
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight_scale_inv" in named
    scheme = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 32]}
    assert_logits_equal(hf, write_checkpoint(tmp_path, hf, scheme, named))


@pytest.mark.parametrize(
    ("family", "draft"),
    [
        ("glm4_moe", "model.layers.3.eh_proj.weight"),
        ("exaone_moe", "mtp.layers.0.input_layernorm.weight"),
        ("ernie4_5_moe", "model.mtp_block.0.input_layernorm.weight"),
    ],
)
def test_layers_of_token_prediction_are_passed_over(
    tmp_path: Path, family: str, draft: str
) -> None:
    hf = make_hf_model(family)
    path = save(hf, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file) | {draft: torch.ones(2, 2)}
    save_file(tensors, file, metadata={"format": "pt"})
    assert_logits_equal(hf, path, num_tokens=40)


IN_GGUF: dict[str, dict[str, Any]] = {
    "mixtral": {"sliding_window": 9},
    "qwen2_moe": {"mlp_only_layers": []},  # files know no dense layers
    "glm4_moe": {},
    "dots1": {},
    "ernie4_5_moe": {},
    "minimax_m2": {},
    "olmoe": {"norm_topk_prob": False},
    "granitemoeshared": {},
}
GRANITES_KEYS = {
    "granitemoe.attention.scale": 0.3,
    "granitemoe.embedding_scale": 3.0,
    "granitemoe.residual_scale": 0.5,
    "granitemoe.logit_scale": 1.5,
}


@pytest.mark.parametrize("family", IN_GGUF)
def test_the_same_model_from_a_gguf_file(tmp_path: Path, family: str) -> None:
    hf = make_hf_model(family, **IN_GGUF[family])
    path = tmp_path / "m.gguf"
    draft = {"blk.3.nextn.eh_proj.weight": np.ones((4, 8), np.float32)}
    extra = draft if family == "glm4_moe" else None
    metadata = GRANITES_KEYS if family == "granitemoeshared" else None
    write_gguf(path, hf, metadata=metadata, extra_tensors=extra)
    assert_logits_equal(hf, str(path), num_tokens=60)


def test_phimoes_long_rope(tmp_path: Path) -> None:
    """Its short factors and their magnitude, of a server for no more than the trained length.

    Beyond it transformers takes the long magnitude with the short factors, so it is no oracle.
    """
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e3,
        "short_factor": [1.0, 1.1, 1.3, 1.5, 1.7, 2.0, 2.2, 2.5],
        "long_factor": [2.0] * 8,
        "short_mscale": 1.2,
        "long_mscale": 1.3,
        "original_max_position_embeddings": 96,
    }
    hf = make_hf_model("phimoe", rope_parameters=rope)
    path = save(hf, tmp_path)
    text = prompts(70)[0]
    runner = runner_of(path, overrides={"max_position_embeddings": 96})
    (ours,) = runner.step([(Sequence(text), len(text))], all_logits=True)
    torch.testing.assert_close(ours, hf_logits(hf, text), atol=1e-4, rtol=0)
    (far,) = runner_of(path).step([(Sequence(text), len(text))], all_logits=True)
    assert (far - ours).abs().max() > 0.01
