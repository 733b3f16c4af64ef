"""How weights of Qwen3-Next and Qwen3.5 find their places."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_loader.loader import load_model
from sglang.srt.models.gated_delta_net import ShortConv
from sglang.srt.models.registry import resolve_model_class
from srt.models.hf_models import make_hf_model, save


def weights_of(family: str, folder: Path) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """A saved model's configuration, and its weights as transformers holds them in memory."""
    reference = make_hf_model(family)
    return ModelConfig.from_path(save(reference, folder)), dict(reference.state_dict())


def loaded(config: ModelConfig, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model = resolve_model_class(config.architecture)(config, ParallelState(), torch.float32)
    model.load_weights(weights.items())
    return dict(model.state_dict())


def test_experts_in_one_tensor_are_those_of_many(tmp_path: Path) -> None:
    config, fused = weights_of("qwen3_5_moe", tmp_path)
    apart = {}
    for name, tensor in fused.items():
        head, _, leaf = name.rpartition(".")
        if not head.endswith(".experts"):
            apart[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            if leaf == "down_proj":
                apart[f"{head}.{expert}.down_proj.weight"] = matrix
                continue
            for part, half in zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True):
                apart[f"{head}.{expert}.{part}.weight"] = half
    assert len(apart) > len(fused)
    one, other = loaded(config, fused), loaded(config, apart)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_drafting_weights_are_passed_over_and_others_are_missed(tmp_path: Path) -> None:
    config, weights = weights_of("qwen3_5", tmp_path)
    plain = loaded(config, weights)
    more = {**weights, "mtp.fc.weight": torch.zeros(2, 2), "mtp.norm.weight": torch.ones(2)}
    assert all(torch.equal(plain[name], value) for name, value in loaded(config, more).items())
    del more["model.layers.0.linear_attn.A_log"]
    more["model.layers.0.linear_attn.B_log"] = torch.zeros(4)
    with pytest.raises(ValueError, match=r"missing weight.*\.A_log; 1 unexpected.*\.B_log"):
        loaded(config, more)
    wrong = {**weights, "model.layers.0.linear_attn.dt_bias": torch.zeros(3)}
    with pytest.raises(ValueError, match="not one for each value head"):
        loaded(config, wrong)


def test_each_rank_has_its_heads_channels() -> None:
    """Queries of 4 channels, keys of 4, values of 8: each rank a half of each."""
    whole = torch.arange(16.0).view(16, 1, 1).expand(16, 1, 3)
    for rank, wanted in enumerate(([0, 1, 4, 5, 8, 9, 10, 11], [2, 3, 6, 7, 12, 13, 14, 15])):
        conv = ShortConv((4, 4, 8), 3, ParallelState(rank, 2), torch.float32)
        conv.weight_loader("weight", whole)
        assert conv.weight[:, 0, 0].tolist() == wanted
        with pytest.raises(ValueError, match="12 channels instead of 16"):
            conv.weight_loader("weight", whole[:12])


def test_adapters_find_no_layer_with_a_state(tmp_path: Path) -> None:
    config, _ = weights_of("qwen3_next", tmp_path)
    model = resolve_model_class(config.architecture)(config, ParallelState(), torch.float32)
    sites = {name.rpartition(".")[2] for name in model.adapter_sites()}
    assert sites == {"k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_scales_of_the_cache_are_those_of_layers_that_keep_tokens(tmp_path: Path) -> None:
    reference = make_hf_model("qwen3_5")
    path = save(reference, tmp_path)
    file = Path(path) / "model.safetensors"
    for prefix in ("model.layers.1", "model.language_model.layers.1"):
        scales = {f"{prefix}.self_attn.k_scale": torch.tensor(0.5)}
        scales[f"{prefix}.self_attn.v_scale"] = torch.tensor(3.0)
        weights = {name: value for name, value in load_file(file).items() if "scale" not in name}
        save_file({**weights, **scales}, file, metadata={"format": "pt"})
        model = load_model(
            ModelConfig.from_path(path),
            dtype=torch.float32,
            parallel=ParallelState(),
            show_progress=False,
            scales_kv=True,
        )
        (attention,) = (one for one in model.modules() if isinstance(one, RadixAttention))
        assert (attention.k_scale, attention.v_scale) == (0.5, 3.0)
