"""DeepSeek's models out of GGUF files of both ages: the same logits as from their directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from sglang.srt.configs.model_config import ModelConfig
from srt.model_loader.gguf_files import latent_metadata, write_gguf
from srt.models.hf_models import LATENT_FIELDS, LITE, make_hf_model
from srt.models.test_deepseek import KINDS, reference
from srt.models.test_models import assert_logits_equal

# In files the two magnitudes are one.
YARN = {**LATENT_FIELDS["deepseek_v2"]["rope_parameters"], "mscale": 0.707, "mscale_all_dim": 0.707}
AGES = pytest.mark.parametrize("splits", [False, True], ids=["whole", "split"])


@AGES
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_model(tmp_path: Path, kind: str, splits: bool) -> None:
    hf = reference(kind, rope_parameters=YARN)
    path = tmp_path / "m.gguf"
    metadata = latent_metadata(hf.config, splits_latents=splits)
    write_gguf(path, hf, metadata=metadata, splits_latents=splits)
    names = {tensor.name for tensor in gguf.GGUFReader(path).tensors}
    assert ("blk.0.attn_k_b.weight" in names) == splits
    assert ("blk.0.attn_kv_b.weight" in names) != splits
    assert_logits_equal(hf, str(path))


@AGES
def test_quantised_matrices(tmp_path: Path, splits: bool) -> None:
    """Widths are whole blocks; what is between latents and heads becomes numbers."""
    widths = {"q_lora_rank": 32, "qk_nope_head_dim": 32, "v_head_dim": 32}
    hf = reference("v3", rope_parameters=YARN, moe_intermediate_size=32, **widths)
    path = tmp_path / "m.gguf"
    quant = gguf.GGMLQuantizationType.Q8_0
    metadata = latent_metadata(hf.config, splits_latents=splits)
    write_gguf(path, hf, quant, metadata=metadata, splits_latents=splits)
    read = {t.name: t for t in gguf.GGUFReader(path).tensors}
    with torch.no_grad():  # the reference computes with the numbers of the file
        for name, parameter in hf.named_parameters():
            if "kv_b_proj" in name and splits:
                layer = name.split(".")[2]
                keys, values = (
                    _numbers(read[f"blk.{layer}.attn_{part}_b.weight"]) for part in ("k", "v")
                )
                whole = torch.cat((keys.transpose(1, 2), values), 1)
                parameter.copy_(whole.reshape(parameter.shape))
            elif parameter.dim() > 1 and "mlp.gate." not in name:
                parameter.copy_(_requantised(parameter, quant, name))
    assert_logits_equal(hf, str(path))


def _numbers(tensor: Any) -> torch.Tensor:
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(values.copy())


def _requantised(x: torch.Tensor, quant: gguf.GGMLQuantizationType, name: str) -> torch.Tensor:
    values = gguf.quants.dequantize(gguf.quants.quantize(x.detach().numpy(), quant), quant)
    return torch.from_numpy(values.copy()).view(x.shape)


def test_what_a_file_says(tmp_path: Path) -> None:
    hf = make_hf_model("deepseek_v2", **LITE, rope_parameters=YARN)
    path = tmp_path / "m.gguf"
    metadata = latent_metadata(hf.config, splits_latents=True)
    write_gguf(path, hf, metadata=metadata, splits_latents=True)
    config = ModelConfig.from_path(str(path))
    assert config.latent is not None
    assert config.latent.q_rank is None
    assert (config.head_dim, config.v_head_dim, config.num_kv_heads) == (40, 32, 1)
    assert (config.rope.mscale, config.rope.mscale_all_dim) == (0.707, 0.707)
    assert config.moe is not None
    assert config.moe.layers == {1, 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope.scaling.attn_factor": 2.0}, "attn_factor of latent attention is not supported"),
        ({"attention.kv_lora_rank": None}, "lacks deepseek2.attention.kv_lora_rank"),
        ({"rope.dimension_count": None}, "lacks deepseek2.rope.dimension_count"),
        ({"attention.key_length_mla": 8}, "qk_nope_head_dim must be a positive"),
        ({"expert_gating_func": 7}, "expert_gating_func 7 is neither softmax nor sigmoid"),
    ],
)
def test_files_that_can_not_be_read(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    hf = make_hf_model("deepseek_v2")
    path = tmp_path / "m.gguf"
    changes = {f"deepseek2.{key}": value for key, value in changes.items()}
    metadata = {**latent_metadata(hf.config, splits_latents=True), **changes}
    write_gguf(path, hf, metadata=metadata, splits_latents=True)
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_path(str(path))


def test_a_part_without_the_other(tmp_path: Path) -> None:
    hf = make_hf_model("deepseek_v2")
    path = tmp_path / "m.gguf"
    metadata = latent_metadata(hf.config, splits_latents=True)
    out = ("model.layers.1.self_attn.v_b_proj.weight",)
    write_gguf(path, hf, metadata=metadata, splits_latents=True, leave_out=out)
    with pytest.raises(ValueError, match=r"blk\.1\.attn_k_b\.weight comes without attn_v_b"):
        assert_logits_equal(hf, str(path))
