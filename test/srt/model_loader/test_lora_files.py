"""Adapters' directories: what their configuration is worth, and every way in which one is bad."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang.srt.configs.lora_config import LoraConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.model_executor.lora_places import resolve_targets
from sglang.srt.model_loader.loader import load_model
from sglang.srt.model_loader.lora_files import cut_adapter, read_adapter
from sglang.srt.models.causal_lm import AdapterSite
from srt.models.hf_models import make_hf_model, save
from srt.models.lora_adapters import ALL, make_factors, save_adapter

TARGETS = frozenset(ALL)
BASE = make_hf_model("llama", num_hidden_layers=1)
Q = "model.layers.0.self_attn.q_proj"


def sites_of(family: str, folder: Path, **changes: Any) -> dict[str, AdapterSite]:
    config = ModelConfig.from_path(save(make_hf_model(family, **changes), folder))
    model: Any = load_model(
        config,
        dtype=torch.float32,
        parallel=ParallelState(),
        show_progress=False,
    )
    found: dict[str, AdapterSite] = model.adapter_sites()
    return found


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, AdapterSite]:
    return sites_of("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=1)


def load(folder: Path, sites: dict[str, AdapterSite], rank: int = 8) -> Any:
    return cut_adapter(read_adapter(str(folder)), sites, TARGETS, rank)


def test_a_whole_adapter(sites: dict[str, AdapterSite], tmp_path: Path) -> None:
    factors = make_factors(BASE)
    cut = load(Path(save_adapter(tmp_path / "a", factors)), sites)
    assert len(cut) == len(factors) == 7
    a, b = cut[sites[Q]]
    torch.testing.assert_close(a, factors[Q][0])
    torch.testing.assert_close(b, factors[Q][1] * 2.0)


def test_names_of_text_models_inside_others(sites: dict[str, AdapterSite], tmp_path: Path) -> None:
    (a, b) = make_factors(BASE, ("q_proj",))[Q]
    for number, name in enumerate(
        ("language_model." + Q, Q.replace("model.", "model.language_model.", 1))
    ):
        folder = tmp_path / str(number)
        cut = load(Path(save_adapter(folder, {name: (a, b)})), sites)
        assert list(cut) == [sites[Q]]


def scales(**fields: Any) -> Callable[[str], tuple[int, float]]:
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **fields}
    config = LoraConfig._from_fields(values)
    return lambda module: (config.rank_of(module), config.scale_of(module))


def test_scales_follow_patterns() -> None:
    assert scales()(Q) == (4, 2.0)
    assert scales(use_rslora=True)(Q) == (4, 4.0)
    found = scales(
        rank_pattern={"q_proj": 16, r"layers\.1\..*": 2},
        alpha_pattern={r"^model\.layers\.0\.mlp\.up_proj": 1.0},
    )
    assert found(Q) == (16, 0.5)
    assert found("model.layers.1.self_attn.v_proj") == (2, 4.0)
    assert found("model.layers.0.mlp.up_proj") == (4, 0.25)
    assert found("model.layers.0.self_attn.other_q_proj") == (4, 2.0), "whole words only"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; LORA is served"),
        ({"use_dora": True}, "use_dora is True: DoRA is not served"),
        ({"bias": "all"}, "bias is 'all': biases of adapters are not served"),
        ({"lora_bias": True}, "lora_bias is True: biases of adapters are not served"),
        (
            {"modules_to_save": ["lm_head"]},
            "modules_to_save is ['lm_head']: whole modules beside the adapter are not served",
        ),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True: transposed weights are not served"),
        (
            {"layer_replication": [[0, 1]]},
            "layer_replication is [[0, 1]]: replicated layers are not served",
        ),
        (
            {"trainable_token_indices": [1]},
            "trainable_token_indices is [1]: trained embeddings are not served",
        ),
        (
            {"target_parameters": ["experts.down_proj"]},
            "target_parameters is ['experts.down_proj']: adapters of experts and other parameters "
            "are not served",
        ),
        (
            {"alora_invocation_tokens": [1]},
            "alora_invocation_tokens is [1]: adapters that begin within a prompt are not served",
        ),
        ({"use_qalora": True}, "use_qalora is True: QALoRA is not served"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights is 'pissa_niter_4': it changes the base model's weights",
        ),
        ({"r": 0}, "r must be a number from 1 on, got 0"),
        ({"r": None}, "r must be a number from 1 on, got None"),
        ({"lora_alpha": "x"}, "lora_alpha must be a number, got 'x'"),
        ({"rank_pattern": []}, None),
        ({"rank_pattern": [1]}, "rank_pattern is no object"),
        ({"rank_pattern": {"q": -1}}, "rank_pattern must be a number from 1 on, got -1"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern: '(' is no regular expression"),
    ],
)
def test_configurations_that_are_refused(fields: dict[str, Any], message: str | None) -> None:
    if message is None:
        scales(**fields)
        return
    with pytest.raises(ValueError, match=re.escape(message)):
        scales(**fields)


Edit = Callable[[Path], Any]


def rewrite(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)


def with_tensors(**more: torch.Tensor) -> Edit:
    def edit(folder: Path) -> None:
        extra = {name.replace("__", "."): tensor for name, tensor in more.items()}
        save_adapter(folder, make_factors(BASE), extra=extra)

    return edit


def without(name: str) -> Edit:
    return lambda folder: (folder / name).unlink()


def with_factors(change: Callable[[dict[str, Any]], Any], **config: Any) -> Edit:
    def edit(folder: Path) -> None:
        factors = make_factors(BASE)
        change(factors)
        save_adapter(folder, factors, **config)

    return edit


def swap(module: str, a: tuple[int, int], b: tuple[int, int]) -> Callable[[dict[str, Any]], Any]:
    return lambda factors: factors.update({module: (torch.zeros(*a), torch.zeros(*b))})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without("adapter_config.json"), "/a has no adapter_config.json"),
        (without("adapter_model.safetensors"), "/a has no adapter_model.safetensors"),
        (
            lambda folder: (folder / "adapter_model.safetensors").rename(
                folder / "adapter_model.bin"
            ),
            "/a has no adapter_model.safetensors; adapter_model.bin is not read",
        ),
        (lambda folder: rewrite(folder, "adapter_config.json", "{"), "adapter_config.json: "),
        (
            lambda folder: rewrite(folder, "adapter_config.json", "[]"),
            "adapter_config.json is no JSON object",
        ),
        (
            lambda folder: rewrite(folder, "adapter_model.safetensors", "cheese"),
            "adapter_model.safetensors: ",
        ),
        (with_factors(dict.clear), "adapter_model.safetensors has no weights"),
        (
            with_tensors(base_model__model__lm_head__weight=torch.zeros(1)),
            "base_model.model.lm_head.weight is no lora_A or lora_B of a linear layer",
        ),
        (
            with_tensors(
                base_model__model__model__embed_tokens__lora_embedding_A=torch.zeros(4, 160)
            ),
            "embed_tokens.lora_embedding_A is no lora_A or lora_B of a linear layer",
        ),
        (
            with_tensors(base_model__model__model__layers__1__x__lora_A__weight=torch.zeros(4, 4)),
            "model.layers.1.x has no lora_B",
        ),
        (
            with_factors(swap(Q, (3, 64), (64, 4))),
            f"{Q} has A [3, 64] and B [64, 4], but rank 4",
        ),
        (
            with_factors(lambda factors: None, rank=5),
            "down_proj has A [4, 96] and B [64, 4], but rank 5",
        ),
        (
            with_factors(swap(Q, (4, 32), (64, 4))),
            f"/a: {Q}: the adapter is for 32 inputs and 64 outputs, the model's layer has 64 and ",
        ),
        (
            with_factors(swap("lm_head", (4, 64), (160, 4))),
            "/a changes what takes no adapter here (embeddings, heads, experts and other models' "
            "modules take none): lm_head",
        ),
        (
            with_factors(swap(Q.replace("0", "7"), (4, 64), (64, 4))),
            "take none): model.layers.7.self_attn.q_proj",
        ),
        (
            with_factors(lambda factors: factors.pop(Q), target_modules=list(ALL)),
            "/a has no weights of q_proj, its targets",
        ),
    ],
)
def test_a_bad_adapter_is_one_clear_error(
    sites: dict[str, AdapterSite], tmp_path: Path, edit: Edit, message: str
) -> None:
    folder = tmp_path / "a"
    save_adapter(folder, make_factors(BASE))
    edit(folder)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load(folder, sites)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_limits_of_the_server(sites: dict[str, AdapterSite], tmp_path: Path) -> None:
    adapter = read_adapter(save_adapter(tmp_path / "a", make_factors(BASE)))
    with pytest.raises(ValueError, match="/a has rank 4, --max-lora-rank is 3"):
        cut_adapter(adapter, sites, TARGETS, 3)
    text = "/a changes gate_proj, up_proj, --lora-target-modules are down_proj, k_proj"
    with pytest.raises(ValueError, match=text):
        cut_adapter(adapter, sites, TARGETS - {"gate_proj", "up_proj"}, 4)
    with pytest.raises(ValueError, match=r"/b is no directory \(adapters are local"):
        read_adapter(str(tmp_path / "b"))


def test_targets(sites: dict[str, AdapterSite], tmp_path: Path) -> None:
    adapter = read_adapter(save_adapter(tmp_path / "a", make_factors(BASE, ("q_proj", "o_proj"))))
    assert resolve_targets(None, [adapter], sites) == {"q_proj", "o_proj"}
    assert resolve_targets(["all"], [], sites) == TARGETS
    assert resolve_targets(["q_proj"], [adapter], sites) == {"q_proj"}
    text = "no linear layer of the model is called lm_head; it has down_proj, gate_proj"
    with pytest.raises(ValueError, match=text):
        resolve_targets(["q_proj", "lm_head"], [], sites)


def test_experts_take_no_adapters(tmp_path: Path) -> None:
    sites = sites_of("qwen3_moe", tmp_path / "model", mlp_only_layers=[])
    assert resolve_targets(["all"], [], sites) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with pytest.raises(ValueError, match="is called gate_proj"):
        resolve_targets(["gate_proj"], [], sites)
    expert = "model.layers.0.mlp.experts.3.gate_proj"
    factors = {expert: (torch.zeros(4, 64), torch.zeros(24, 4))}
    with pytest.raises(ValueError, match=f"takes no adapter here .*{re.escape(expert)}"):
        load(Path(save_adapter(tmp_path / "a", factors)), sites)


def test_a_configuration_of_peft_is_read(tmp_path: Path) -> None:
    """Fields that say nothing of what is computed are passed over."""
    folder = Path(save_adapter(tmp_path, make_factors(BASE)))
    fields = json.loads((folder / "adapter_config.json").read_text())
    fields |= {"base_model_name_or_path": "x", "lora_dropout": 0.1, "eva_config": None, "new": 1}
    rewrite(folder, "adapter_config.json", json.dumps(fields))
    assert read_adapter(str(folder)).rank == 4
