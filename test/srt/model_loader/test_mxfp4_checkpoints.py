"""gpt-oss as it is published: experts in MXFP4 beside numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssForCausalLM, Mxfp4Config, PreTrainedModel

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.moe import Experts
from sglang.srt.model_loader.loader import load_model
from sglang.srt.models.causal_lm import CausalLM
from sglang.srt.utils.native import native_kernels
from srt.model_loader.quantized_files import mxfp4, plain_tensors, write_checkpoint
from srt.model_loader.test_gguf_mixtures import experts_of, logits
from srt.models.hf_models import make_hf_model
from srt.models.test_models import assert_logits_equal, hf_logits, prompts

native = pytest.mark.skipif(native_kernels() is None, reason="sgl-kernel is not installed")
METHOD = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens", "lm_head"]}
EXPERTS = "model.layers.{}.mlp.experts."


def published(folder: Path, width: int = 64, **arguments: Any) -> tuple[PreTrainedModel, str]:
    """The model in numbers, and where its quantised checkpoint is."""
    model = make_hf_model("gpt_oss", intermediate_size=width, num_hidden_layers=2)
    stored = plain_tensors(model)
    state = model.state_dict()
    for layer in range(2):
        for leaf, outputs, inputs in (("gate_up_proj", 2 * width, 64), ("down_proj", 64, width)):
            name = EXPERTS.format(layer) + leaf
            tensors, numbers = mxfp4(6, outputs, inputs, seed=10 * layer + outputs)
            stored |= {f"{name}_{role}": tensor for role, tensor in tensors.items()}
            del stored[name]
            state[name].copy_(numbers.transpose(1, 2))
    return model, write_checkpoint(folder, model, METHOD, stored, **arguments)


def load(path: str, quantization: str | None = None, rank: int = 0, ranks: int = 1) -> CausalLM:
    return load_model(
        ModelConfig.from_path(path),
        dtype=torch.float32,
        parallel=ParallelState(rank, ranks),
        show_progress=False,
        quantization=quantization,
    )


def is_kept(experts: Experts) -> bool:
    parts = (experts.gate, experts.up, experts.down)
    assert len({part is None for part in parts}) == 1
    return experts.gate is not None


@pytest.mark.parametrize("num_files", [1, 5])
def test_logits_are_those_of_its_numbers(tmp_path: Path, num_files: int) -> None:
    model, path = published(tmp_path, num_files=num_files)
    assert_logits_equal(model, path)


@native
def test_experts_stay_quantised_unless_numbers_are_asked_for(tmp_path: Path) -> None:
    _, path = published(tmp_path)
    kept, named, wide, rounded = (load(path, q) for q in (None, "mxfp4", "none", "int8"))
    for experts in experts_of(kept) + experts_of(named):
        assert is_kept(experts)
        assert experts.gate_up_proj.numel() == experts.down_proj.numel() == 0
    assert not any(is_kept(experts) for experts in experts_of(wide))
    assert all(is_kept(experts) for experts in experts_of(rounded))
    for one, other in zip(experts_of(kept), experts_of(wide), strict=True):
        for expert in range(6):
            found = one.down.product(expert, torch.eye(64))  # type: ignore[union-attr]
            assert torch.equal(found.t(), other.down_proj[expert])
    close = {"atol": 2e-4, "rtol": 0.0}
    for num_tokens in (1, 90):
        want = logits(wide, num_tokens)
        torch.testing.assert_close(logits(kept, num_tokens), want, **close)
        assert 0 < (logits(rounded, num_tokens) - want).abs().median() < 0.05 * want.std()


def test_transformers_reads_the_same_numbers(tmp_path: Path) -> None:
    _, path = published(tmp_path, config={"dtype": "float32"})
    theirs = GptOssForCausalLM.from_pretrained(
        path,
        quantization_config=Mxfp4Config(dequantize=True),
        dtype=torch.float32,
        attn_implementation="eager",
    )
    text = prompts(50)[0]
    want = hf_logits(theirs, text)
    torch.testing.assert_close(logits(load(path, "none"), 50), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("quantization", ["none", pytest.param("mxfp4", marks=native)])
@pytest.mark.parametrize("width", [64, 96])  # a rank's 48 columns cut a block
def test_ranks_take_their_part_of_every_expert(
    tmp_path: Path, width: int, quantization: str
) -> None:
    _, path = published(tmp_path, width)
    whole = experts_of(load(path, "none"))[0]
    ranks = [experts_of(load(path, quantization, rank, 2))[0] for rank in range(2)]
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    for expert in range(6):
        total = sum(rank._expert(expert, x) for rank in ranks)
        torch.testing.assert_close(total, whole._expert(expert, x), atol=1e-4, rtol=1e-5)


def test_halves_of_bytes_in_another_order_are_another_model(tmp_path: Path) -> None:
    """What a wrong order of the halves would give is far away: the tests above see it."""
    model, path = published(tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    tensors = load_file(file)
    name = EXPERTS.format(0) + "down_proj_blocks"
    tensors[name] = tensors[name] >> 4 | tensors[name] << 4
    save_file(tensors, file)
    moved = (logits(load(path), 40) - hf_logits(model, prompts(40)[0])).abs().max()
    assert moved > 0.1


def test_experts_in_numbers_stand_beside_quantised_layers(tmp_path: Path) -> None:
    model = make_hf_model("gpt_oss", intermediate_size=64, num_hidden_layers=2)
    name = EXPERTS.format(1) + "gate_up_proj"
    tensors, numbers = mxfp4(6, 128, 64, seed=3)
    model.state_dict()[name].copy_(numbers.transpose(1, 2))
    stored = plain_tensors(model)
    del stored[name]
    stored |= {f"{name}_{role}": tensor for role, tensor in tensors.items()}
    assert_logits_equal(model, write_checkpoint(tmp_path, model, METHOD, stored))


BROKEN: list[tuple[str, Any, str]] = [
    ("down_proj_scales", None, "down_proj_scales is missing"),
    ("down_proj_blocks", None, "down_proj_blocks is missing"),
    ("gate_up_proj_blocks", lambda t: t[:5], r"blocks: shape \(5, 128, 2, 16\) is not"),
    ("gate_up_proj_blocks", lambda t: t[:, 1:], r"\(6, 127, 2, 16\) is not"),
    ("down_proj_blocks", lambda t: t[..., :8], r"\(6, 64, 2, 8\) is not"),
    ("down_proj_scales", lambda t: t[:, :, :1], r"scales: shape \(6, 64, 1\) does not fit"),
    ("down_proj_scales", lambda t: t.float(), "down_proj_scales: torch.float32, uint8 is served"),
    ("down_proj_blocks", lambda t: t[:, 2:], r"down_proj_scales: shape \(6, 64, 2\) does not fit"),
]  # fmt: skip


@pytest.mark.parametrize(("leaf", "change", "message"), BROKEN)
def test_what_does_not_fit_is_named(tmp_path: Path, leaf: str, change: Any, message: str) -> None:
    _, path = published(tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    tensors = load_file(file)
    found = tensors.pop(EXPERTS.format(1) + leaf)
    if change is not None:
        tensors[EXPERTS.format(1) + leaf] = change(found).contiguous()
    save_file(tensors, file)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert "model.layers.1.mlp.experts." in str(caught.value)


def test_numbers_beside_codes_are_refused(tmp_path: Path) -> None:
    _, path = published(tmp_path)
    save_file(
        {EXPERTS.format(0) + "down_proj": torch.zeros(6, 64, 64)}, tmp_path / "more.safetensors"
    )
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match="down_proj is there as numbers beside"):
        load(path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    _, path = published(tmp_path)
    save_file({"lm_head.weight": torch.zeros(160, 64)}, tmp_path / "more.safetensors")
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"weight lm_head.weight is in the checkpoint twice"):
        load(path)


def test_files_of_torch_save_are_refused(tmp_path: Path) -> None:
    _, path = published(tmp_path)
    state = load_file(next(tmp_path.glob("*.safetensors")))
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="are read from safetensors files only"):
        load(path)


def test_other_models_are_refused(tmp_path: Path) -> None:
    model = make_hf_model("llama")
    path = write_checkpoint(tmp_path, model, METHOD, plain_tensors(model))
    with pytest.raises(ValueError, match="'mxfp4' are served of gpt_oss, not llama"):
        ModelConfig.from_path(path)
