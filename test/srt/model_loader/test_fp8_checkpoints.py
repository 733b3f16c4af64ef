"""Checkpoints in FP8: what their codes and scales mean, whatever the scales are for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.quantization_config import WeightScheme, weight_scheme
from sglang.srt.layers.linear import ShardedLinear
from sglang.srt.layers.weights import WeightOwner
from sglang.srt.utils.native import native_kernels
from srt.model_loader.quantized_files import (
    Coded,
    fp8,
    plain_tensors,
    quantise,
    write_checkpoint,
)
from srt.model_loader.test_gguf_mixtures import experts_of, logits
from srt.model_loader.test_kv_scales import layer_scales, scales_of
from srt.model_loader.test_mxfp4_checkpoints import is_kept, load
from srt.models.hf_models import make_hf_model, save
from srt.models.test_models import assert_logits_equal, hf_logits, prompts

BLOCK = [48, 40]  # neither divides the tiny matrices
PLAIN = {"quant_method": "fp8", "activation_scheme": "static"}
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": BLOCK}
WIDE_BLOCKS = {**BLOCKS, "weight_block_size": [128, 128]}
native = pytest.mark.skipif(native_kernels() is None, reason="sgl-kernel is not installed")


def compressed(strategy: str, **fields: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, **fields}
    inputs = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


SCALES: dict[str, tuple[dict[str, Any], str, Callable[[int, int], tuple[int, int]]]] = {
    "tensor": (PLAIN, "weight_scale", lambda n, k: (n, k)),
    "mistral's": (PLAIN, "weight_scale_inv", lambda n, k: (n, k)),
    "channel": (PLAIN, "weight_scale", lambda n, k: (1, k)),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, "weight_scale", lambda n, k: (1, k)),
    "block": (BLOCKS, "weight_scale_inv", lambda n, k: (BLOCK[0], BLOCK[1])),
    "block of 128": (WIDE_BLOCKS, "weight_scale_inv", lambda n, k: (128, 128)),
    "compressed tensor": (compressed("tensor"), "weight_scale", lambda n, k: (n, k)),
    "compressed channel": (compressed("channel"), "weight_scale", lambda n, k: (1, k)),
    "compressed group": (compressed("group"), "weight_scale", lambda n, k: (1, 16)),
    "compressed block": (
        compressed("block", block_structure=BLOCK),
        "weight_scale",
        lambda n, k: (BLOCK[0], BLOCK[1]),
    ),
}


def coder(kind: str) -> Callable[[str, int, int], Coded | None]:
    """All but the first layer's down projection, with what inputs would be scaled by."""
    _, role, block_of = SCALES[kind]
    seeds = iter(range(0, 10**6, 2))

    def code(module: str, outputs: int, inputs: int) -> Coded | None:
        if module.endswith("layers.0.mlp.down_proj"):
            return None
        block = block_of(outputs, inputs)
        tensors, numbers = fp8(outputs, inputs, next(seeds), block)
        scale = tensors["scale"]
        if kind in ("tensor", "mistral's"):
            scale = scale.reshape(())
        elif kind == "compressed tensor":
            scale = scale.reshape(1)
        elif kind == "compressed channel":
            scale, numbers = scale.bfloat16(), numbers / scale * scale.bfloat16().float()
        found = {"weight": tensors["weight"], role: scale}
        if kind in ("tensor", "compressed tensor"):
            found["input_scale"] = torch.tensor(0.5)
        return found, numbers

    return code


def published(
    folder: Path, kind: str, family: str, num_files: int = 2, **changes: Any
) -> tuple[PreTrainedModel, str]:
    model = make_hf_model(family, num_hidden_layers=2, **changes)
    tensors = quantise(model, coder(kind))
    return model, write_checkpoint(folder, model, SCALES[kind][0], tensors, num_files=num_files)


@pytest.mark.parametrize("kind", list(SCALES))
def test_logits_are_those_of_its_numbers(tmp_path: Path, kind: str) -> None:
    family = {"tensor": "llama", "mistral's": "mistral"}.get(kind, "qwen3")
    model, path = published(tmp_path, kind, family)
    assert_logits_equal(model, path)


@pytest.mark.parametrize(
    ("family", "kind"),
    [("qwen3_moe", "block"), ("qwen3_moe", "compressed tensor"), ("llama4", "compressed channel")],
)
def test_experts_that_stand_one_by_one(tmp_path: Path, family: str, kind: str) -> None:
    model, path = published(tmp_path, kind, family, 3)
    assert_logits_equal(model, path)
    whole = experts_of(load(path, "none"))[0]
    ranks = [experts_of(load(path, rank=rank, ranks=2))[0] for rank in range(2)]
    assert not is_kept(whole)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    for expert in range(whole.num_experts):
        total = sum(rank._expert(expert, x) for rank in ranks)
        torch.testing.assert_close(total, whole._expert(expert, x), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("per_output", [True, False])
def test_merged_experts_of_llama4(tmp_path: Path, per_output: bool) -> None:
    """Inputs first, and a scale for each output of each expert, as transformers names them."""
    model = make_hf_model("llama4", num_hidden_layers=2)
    tensors = plain_tensors(model)
    for name, parameter in model.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = parameter.shape
            block = (1 if per_output else outputs, inputs)
            coded = [fp8(outputs, inputs, 7 * expert, block) for expert in range(experts)]
            for number, (found, numbers) in enumerate(coded):
                parameter[number].copy_(numbers.t())
                assert found["scale"].shape == (outputs if per_output else 1, 1)
            weights = [found["weight"].view(torch.uint8).t() for found, _ in coded]
            tensors[name] = torch.stack(weights).contiguous().view(torch.float8_e4m3fn)
            scales = [found["scale"].t() for found, _ in coded]
            tensors[f"{name}_scale"] = torch.stack(scales)
    assert_logits_equal(model, write_checkpoint(tmp_path, model, PLAIN, tensors))


def test_the_text_part_of_a_multimodal_checkpoint(tmp_path: Path) -> None:
    model = make_hf_model("llama4", num_hidden_layers=2)
    tensors = quantise(model, coder("compressed channel"))
    tensors = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    tensors["vision_model.layernorm_pre.weight"] = torch.ones(8)
    path = write_checkpoint(tmp_path, model, SCALES["compressed channel"][0], tensors)
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text())
    scheme = raw.pop("quantization_config")
    whole = {
        "architectures": ["Llama4ForConditionalGeneration"],
        "quantization_config": scheme,
        "text_config": raw,
    }
    file.write_text(json.dumps(whole))
    assert_logits_equal(model, path)


@native
@pytest.mark.parametrize("kind", ["tensor", "channel", "block of 128", "compressed channel"])
def test_codes_are_kept(tmp_path: Path, kind: str) -> None:
    """In a byte each, with a number for each output or for its groups; merged layers are one."""
    changes = {"hidden_size": 160, "intermediate_size": 320, "head_dim": 64}
    model, path = published(tmp_path, kind, "qwen3", 1, **changes)
    kept, wide = load(path), load(path, "none")
    named = dict(wide.named_modules())
    count = 0
    for name, module in kept.named_modules():
        is_coded = isinstance(module, ShardedLinear) and name != "model.layers.0.mlp.down_proj"
        if not isinstance(module, WeightOwner):
            continue
        assert (module.quantized is not None) == is_coded, name
        if module.quantized is None:
            continue
        outputs, inputs = module.quantized.shape
        groups = -(-inputs // 128) if kind == "block of 128" else 1
        assert module.quantized.whole is not None
        assert module.quantized.nbytes == outputs * (inputs + 4 * groups)
        assert module.weight.numel() == 0
        numbers = module.quantized.take(torch.arange(outputs), torch.float32)
        assert torch.equal(numbers, named[name].weight), name  # type: ignore[union-attr]
        count += 1
    assert count == 7
    for num_tokens in (1, 90):
        want = logits(wide, num_tokens)
        torch.testing.assert_close(logits(kept, num_tokens), want, atol=2e-4, rtol=0)
    assert_logits_equal(model, path)


@native
@pytest.mark.parametrize(
    ("family", "kind"),
    [("qwen3_moe", "block of 128"), ("qwen3_moe", "tensor"), ("llama4", "compressed channel")],
)
def test_experts_are_kept(tmp_path: Path, family: str, kind: str) -> None:
    """All of a layer's in three matrices; ranks cut blocks of 128 at 96 of 192 inputs."""
    key = "moe_intermediate_size" if family == "qwen3_moe" else "intermediate_size"
    model, path = published(tmp_path, kind, family, 2, **{key: 192})
    assert_logits_equal(model, path)
    whole = experts_of(load(path))[0]
    ranks = [experts_of(load(path, rank=rank, ranks=2))[0] for rank in range(2)]
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    for experts in (whole, *ranks):
        assert is_kept(experts)
        assert experts.gate_up_proj.numel() == experts.down_proj.numel() == 0
    down = whole.down
    assert down is not None
    rows, groups = whole.num_experts * 64, 2 if kind == "block of 128" else 1
    assert down.matrix.nbytes == rows * (192 + 4 * groups)
    wide = experts_of(load(path, "none"))[0]
    for expert in range(whole.num_experts):
        want = wide._expert(expert, x)
        torch.testing.assert_close(whole._expert(expert, x), want, atol=1e-4, rtol=1e-5)
        total = sum(rank._expert(expert, x) for rank in ranks)
        torch.testing.assert_close(total, want, atol=1e-4, rtol=1e-5)


@native
def test_what_multiplies_queries_becomes_numbers(tmp_path: Path) -> None:
    """DeepSeek's weight between latents and heads, beside layers that keep their codes."""
    model, path = published(tmp_path, "block of 128", "deepseek_v3", v_head_dim=16)
    assert_logits_equal(model, path)
    kept, wide = (dict(load(path, name).named_modules()) for name in (None, "none"))
    out = kept["model.layers.1.self_attn.o_proj"]
    assert isinstance(out, WeightOwner)
    assert out.quantized is not None
    name = "self_attn.kv_b_proj.weight"
    one, other = (dict(m["model.layers.1"].named_parameters())[name] for m in (kept, wide))
    assert torch.equal(one, other)


@native
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_numbers_are_rounded_where_that_is_asked_for(tmp_path: Path, family: str) -> None:
    """Linear layers and experts, as their weights come; embedding and head stay."""
    model = make_hf_model(family, num_hidden_layers=2)
    path = save(model, tmp_path)
    rounded = load(path, "fp8")
    for name, module in rounded.named_modules():
        if isinstance(module, WeightOwner):
            assert (module.quantized is not None) == isinstance(module, ShardedLinear), name
        if isinstance(module, ShardedLinear) and module.quantized is not None:
            outputs, inputs = module.quantized.shape
            assert module.quantized.nbytes == outputs * (inputs + 4)
    want = hf_logits(model, prompts(40)[0])
    assert 0 < (logits(rounded, 40) - want).abs().median() < 0.1 * want.std()


@native
def test_its_numbers_are_rounded_to_bytes_where_that_is_asked_for(tmp_path: Path) -> None:
    model, path = published(tmp_path, "block", "qwen3_moe", moe_intermediate_size=32)
    rounded = load(path, "int8")
    assert all(is_kept(experts) for experts in experts_of(rounded))
    want = hf_logits(model, prompts(40)[0])
    assert 0 < (logits(rounded, 40) - want).abs().median() < 0.05 * want.std()


def test_scales_that_are_left_out_would_be_seen(tmp_path: Path) -> None:
    model, path = published(tmp_path, "block", "qwen3", 1)
    file = next(tmp_path.glob("*.safetensors"))
    tensors = load_file(file)
    name = "model.layers.1.self_attn.v_proj.weight_scale_inv"
    tensors[name] = tensors[name].flip(1)
    save_file(tensors, file)
    assert (logits(load(path), 40) - hf_logits(model, prompts(40)[0])).abs().max() > 0.01


def test_scales_of_the_cache_are_no_weights(tmp_path: Path) -> None:
    model = make_hf_model("llama", num_hidden_layers=2)
    tensors = quantise(model, coder("channel"))
    tensors |= layer_scales({"k_scale": 0.5, "v_scale": 3.0})
    path = write_checkpoint(tmp_path, model, PLAIN, tensors)
    assert scales_of(path) == [(0.5, 3.0), (1.0, 6.0)]


BROKEN: list[tuple[str, str, Any, str]] = [
    ("block", "weight_scale_inv", None, r"o_proj.weight needs one of .*, there is none"),
    ("block", "weight", None, r"o_proj.weight is missing beside model.layers.1.self_attn.o_proj."),
    ("block", "weight_scale_inv", lambda t: t[:1], r"o_proj.weight_scale_inv: shape \(1, 2\)"),
    ("channel", "weight_scale", lambda t: t[1:], r"o_proj.weight_scale: shape \(63, 1\) scales"),
    ("channel", "weight_scale", lambda t: t.int(), r"o_proj.weight_scale: torch.int32 is no sc"),
    ("channel", "weight", lambda t: t.float(), r"o_proj.weight_scale scales a weight of torch.fl"),
    ("channel", "weight", lambda t: t.to(torch.float8_e5m2), r"of torch.float8_e5m2 is not served"),
    ("channel", "weight", lambda t: t[:, :32], r"o_proj.weight: weight: the checkpoint has 32 col"),
    ("channel", "weight", lambda t: t[None], r"o_proj.weight: torch.float8_e4m3fn \(1, 64, 64\)"),
    ("channel", "weight_scale_inv", lambda t: torch.ones(64, 1), "there are both"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A checkpoint of each kind that is to be broken."""
    kinds = {kind for kind, *_ in BROKEN}
    return {kind: published(tmp_path_factory.mktemp(kind), kind, "llama", 1)[1] for kind in kinds}


@pytest.mark.parametrize(("kind", "role", "change", "message"), BROKEN)
def test_what_does_not_fit_is_named(
    whole: dict[str, str], tmp_path: Path, kind: str, role: str, change: Any, message: str
) -> None:
    path = str(shutil.copytree(whole[kind], tmp_path, dirs_exist_ok=True))
    file = next(tmp_path.glob("*.safetensors"))
    tensors = load_file(file)
    name = f"model.layers.1.self_attn.o_proj.{role}"
    found = tensors.pop(name, torch.empty(0))
    if change is not None:
        tensors[name] = change(found).contiguous()
    save_file(tensors, file)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=message):
        load(path)


def test_experts_that_are_missing_or_too_many_are_named(tmp_path: Path) -> None:
    _, path = published(tmp_path, "block", "qwen3_moe", 1)
    file = next(tmp_path.glob("*.safetensors"))
    whole = load_file(file)
    name = "model.layers.0.mlp.experts.{}.up_proj."
    save_file({n: t for n, t in whole.items() if name.format(4) not in n}, file)
    with pytest.raises(ValueError, match=r"experts.4.up_proj.weight is missing"):
        load(path)
    more = {name.format(6) + role: whole[name.format(5) + role] for role in ("weight",)}
    save_file(whole | {n: t.clone() for n, t in more.items()}, file)
    with pytest.raises(ValueError, match=r"experts.6.up_proj.weight is beyond 6 experts"):
        load(path)
    short = {n: t[:8] if n == name.format(2) + "weight" else t for n, t in whole.items()}
    save_file(short, file)
    with pytest.raises(ValueError, match=r"experts.2.up_proj.weight"):
        load(path)


@pytest.mark.parametrize(
    ("scheme", "rounds"),
    [
        (BLOCKS, True),
        (PLAIN, False),
        ({"quant_method": "fp8"}, False),
        ({"quant_method": "fbgemm_fp8"}, True),
        (compressed("channel"), True),
        ({"quant_method": "gptq", "bits": 8}, False),
    ],
)
def test_what_is_said_of_inputs(scheme: dict[str, Any], rounds: bool) -> None:
    found = weight_scheme(scheme, {}, "llama")
    assert found is not None
    assert found.rounds_inputs == rounds
    static = compressed("tensor")
    static["config_groups"]["group_0"]["input_activations"]["dynamic"] = False
    found = weight_scheme(static, {}, "llama")
    assert found == WeightScheme("compressed-tensors", floats=True)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fp8 in 'e5m2' are not served"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size must be two"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "weight_block_size must be two"),
        (compressed("tensor_group", num_bits=4), "weights of 4 bits of type 'float' by"),
        (compressed("block"), "strategy 'block' needs a block_structure"),
        (compressed("token"), "by 'token' are not served"),
        ({**compressed("tensor"), "config_groups": {"g": {"weights": None}}}, "names none"),
        ({**compressed("tensor"), "sparsity_config": {"format": "sparse-24"}}, "'sparse-24' are"),
        (
            {**compressed("tensor"), "transform_config": {"config_groups": {"u": {}}}},
            "transform_config is not served",
        ),
    ],
)
def test_other_schemes_are_refused(tmp_path: Path, scheme: dict[str, Any], message: str) -> None:
    model = make_hf_model("llama", num_hidden_layers=1)
    path = write_checkpoint(tmp_path, model, scheme, plain_tensors(model))
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_path(path)
