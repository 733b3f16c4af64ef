"""Mixtures of experts out of GGUF files: the same answers, codes and memory like the file's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.moe import Experts
from sglang.srt.layers.weights import WeightOwner
from sglang.srt.model_loader.loader import load_model
from sglang.srt.models.causal_lm import CausalLM
from sglang.srt.utils.native import native_kernels
from srt.model_loader.gguf_files import write_gguf
from srt.models.harness import Runner, Sequence
from srt.models.hf_models import make_hf_model
from srt.models.test_models import assert_logits_equal, prompts

TYPES = gguf.GGMLQuantizationType
native = pytest.mark.skipif(native_kernels() is None, reason="sgl-kernel is not installed")

# What the files can't say is as in the published models; widths are whole blocks.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"moe_intermediate_size": 64, "mlp_only_layers": []},
    "llama4": {
        "intermediate_size": 64,
        "attention_chunk_size": 8192,
        "floor_scale": 8192,
        "attn_scale": 0.1,
    },
    "gpt_oss": {"intermediate_size": 64},
}


def load(path: Path, quantization: str, parallel: ParallelState | None = None) -> CausalLM:
    return load_model(
        ModelConfig.from_path(str(path)),
        dtype=torch.float32,
        parallel=parallel or ParallelState(),
        show_progress=False,
        quantization=quantization,
    )


def experts_of(model: CausalLM) -> list[Experts]:
    found = [module for module in model.modules() if isinstance(module, Experts)]
    assert found
    return found


def logits(model: CausalLM, num_tokens: int) -> torch.Tensor:
    runner = Runner(model, page_size=16, dtype=torch.float32)
    text = prompts(num_tokens)[0]
    return runner.step([(Sequence(text), num_tokens)], all_logits=True)[0]


def yarn(family: str) -> dict[str, Any]:
    """What the tiny gpt-oss model's config says of its rotation, as GGUF metadata."""
    if family != "gpt_oss":
        return {}
    scaling: dict[str, Any] = {
        "type": "yarn",
        "factor": 8.0,
        "original_context_length": 64,
        "yarn_beta_fast": 8.0,
        "yarn_beta_slow": 1.0,
    }
    return {f"gpt-oss.rope.scaling.{key}": value for key, value in scaling.items()}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_logits_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    hf = make_hf_model(family, **FAMILIES[family])
    write_gguf(tmp_path / "m.gguf", hf, metadata=yarn(family))
    assert_logits_equal(hf, str(tmp_path / "m.gguf"))


@native
@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("quant", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"])
def test_experts_that_stay_quantised_answer_as_their_numbers(
    tmp_path: Path, family: str, quant: str
) -> None:
    hf = make_hf_model(family, **FAMILIES[family])
    write_gguf(tmp_path / "m.gguf", hf, TYPES[quant], metadata=yarn(family))
    kept, wide = load(tmp_path / "m.gguf", "gguf"), load(tmp_path / "m.gguf", "none")
    for experts in experts_of(kept):
        assert experts.gate is not None
        assert experts.up is not None
        assert experts.down is not None
        assert experts.gate_up_proj.numel() == experts.down_proj.numel() == 0
    for experts in experts_of(wide):
        assert experts.gate is experts.up is experts.down is None
    for num_tokens in (1, 90):
        torch.testing.assert_close(
            logits(kept, num_tokens), logits(wide, num_tokens), atol=2e-4, rtol=0
        )


def bytes_held(model: CausalLM) -> int:
    """Parameters and codes of a model."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    for module in model.modules():
        if isinstance(module, WeightOwner) and module.quantized is not None:
            total += module.quantized.nbytes
        if isinstance(module, Experts):
            total += sum(
                part.matrix.nbytes
                for part in (module.gate, module.up, module.down)
                if part is not None
            )
    return total


@native
@pytest.mark.parametrize("quant", ["Q4_0", "Q4_1", "Q8_0", "MXFP4"])
def test_a_loaded_mixture_takes_the_memory_of_its_file(tmp_path: Path, quant: str) -> None:
    """Minima that Q4_0 has by implication are written out: 5 bits a weight instead of 4.5.

    MXFP4's scales have 16 bits instead of 8.
    """
    hf = make_hf_model("qwen3_moe", hidden_size=128, **FAMILIES["qwen3_moe"])
    write_gguf(tmp_path / "m.gguf", hf, TYPES[quant])
    in_file = sum(tensor.n_bytes for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors)
    held = bytes_held(load(tmp_path / "m.gguf", "gguf"))
    most = {"Q4_0": 5 / 4.5, "MXFP4": 4.5 / 4.25}.get(quant, 1.0)
    assert in_file <= held <= 1.01 * most * in_file
    assert bytes_held(load(tmp_path / "m.gguf", "none")) > 3 * held


@native
@pytest.mark.parametrize("family", list(FAMILIES))
def test_experts_of_a_checkpoint_in_numbers_are_rounded_to_bytes(
    tmp_path: Path, family: str
) -> None:
    hf = make_hf_model(family, **FAMILIES[family])
    hf.save_pretrained(tmp_path)
    plain, rounded = load(tmp_path, "none"), load(tmp_path, "int8")
    for one, other in zip(experts_of(plain), experts_of(rounded), strict=True):
        assert other.gate is not None
        assert other.up is not None
        assert other.down is not None
        assert other.gate_up_proj.numel() == other.down_proj.numel() == 0
        for expert in range(one.num_experts):
            for part, wide in (
                (other.gate, one.gate_up_proj[expert, : one.width]),
                (other.up, one.gate_up_proj[expert, one.width :]),
                (other.down, one.down_proj[expert]),
            ):
                found = part.product(expert, torch.eye(wide.shape[1])).t()
                assert (found - wide).abs().max() <= wide.abs().max() / 127
    # A router between two experts may turn over, which moves a whole row.
    want, found = logits(plain, 40), logits(rounded, 40)
    assert 0 < (want - found).abs().median() < 0.03 * want.std()


@native
@pytest.mark.parametrize("tp_rank", [0, 1])
@pytest.mark.parametrize("width", [64, 96])  # a rank's 48 columns cut a block
def test_ranks_take_their_part_of_every_expert(tmp_path: Path, width: int, tp_rank: int) -> None:
    fields = {**FAMILIES["gpt_oss"], "intermediate_size": width}
    hf = make_hf_model("gpt_oss", **fields)
    write_gguf(tmp_path / "m.gguf", hf, TYPES.Q8_0, metadata=yarn("gpt_oss"))
    parallel = ParallelState(tp_rank, 2)
    kept = experts_of(load(tmp_path / "m.gguf", "gguf", parallel))[0]
    wide = experts_of(load(tmp_path / "m.gguf", "none", parallel))[0]
    assert kept.gate is not None
    assert (kept.down is None) == (width == 96)
    x = torch.randn(3, 64)
    for expert in range(kept.num_experts):
        torch.testing.assert_close(
            kept._expert(expert, x), wide._expert(expert, x), atol=1e-5, rtol=1e-5
        )


@native
def test_gates_in_numbers_make_numbers_of_ups(tmp_path: Path) -> None:
    hf = make_hf_model("qwen3_moe", **FAMILIES["qwen3_moe"])
    name = "model.layers.0.mlp.experts.gate_proj.weight"
    numbers = np.full((6, 64, 64), 0.25, np.float32)
    write_gguf(
        tmp_path / "m.gguf",
        hf,
        TYPES.Q8_0,
        leave_out=(name,),
        extra_tensors={"blk.0.ffn_gate_exps.weight": numbers},
    )
    first, second, _ = experts_of(load(tmp_path / "m.gguf", "gguf"))
    assert first.gate is first.up is None
    assert first.down is not None
    assert (first.gate_up_proj[:, :64] == 0.25).all()
    wide = experts_of(load(tmp_path / "m.gguf", "none"))[0]
    torch.testing.assert_close(first.gate_up_proj, wide.gate_up_proj, atol=1e-6, rtol=1e-6)
    assert second.gate is not None


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"qwen3moe.expert_count": None}, "lacks qwen3moe.expert_count"),
        ({"qwen3moe.expert_used_count": 7}, "7 is more than"),
        ({"qwen3moe.expert_group_count": 2}, "expert_group_count is not supported"),
        ({"qwen3moe.expert_weights_scale": 2.5}, "expert_weights_scale is not supported"),
    ],
)
def test_other_mixtures_are_refused(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    hf = make_hf_model("qwen3_moe", **FAMILIES["qwen3_moe"])
    write_gguf(tmp_path / "m.gguf", hf, metadata=metadata)
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_path(str(tmp_path / "m.gguf"))


def test_a_stack_of_another_size_is_named(tmp_path: Path) -> None:
    hf = make_hf_model("qwen3_moe", **FAMILIES["qwen3_moe"])
    write_gguf(tmp_path / "m.gguf", hf, TYPES.Q8_0, metadata={"qwen3moe.expert_count": 5})
    for kept in ("none", *(["gguf"] if native_kernels() is not None else [])):
        with pytest.raises(ValueError, match=r"of all experts: the checkpoint has shape"):
            load(tmp_path / "m.gguf", kept)


@pytest.mark.parametrize("experts", [16, 128])
def test_llama4_with_128_experts_does_not_normalise_heads(tmp_path: Path, experts: int) -> None:
    changes = {**FAMILIES["llama4"], "num_local_experts": experts, "num_hidden_layers": 2}
    write_gguf(tmp_path / "m.gguf", make_hf_model("llama4", **changes))
    config = ModelConfig.from_path(str(tmp_path / "m.gguf"))
    assert config.weightless_qk_norm == (experts == 16)
    assert config.moe is not None
    assert config.moe.layers == {1}
