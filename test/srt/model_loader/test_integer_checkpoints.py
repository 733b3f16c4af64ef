"""Checkpoints in packed integers: GPTQ, AWQ and compressed-tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.weights import WeightOwner
from sglang.srt.models.causal_lm import CausalLM
from sglang.srt.utils.native import native_kernels
from srt.model_loader.quantized_files import (
    Coded,
    awq,
    gptq,
    integers,
    packed,
    plain_tensors,
    quantise,
    signed_bytes,
    write_checkpoint,
)
from srt.model_loader.test_gguf_mixtures import experts_of, logits
from srt.model_loader.test_mxfp4_checkpoints import is_kept, load
from srt.models.harness import Sequence
from srt.models.hf_models import make_hf_model
from srt.models.test_models import (
    assert_greedy_equal,
    assert_logits_equal,
    hf_logits,
    prompts,
    runner_of,
)

native = pytest.mark.skipif(native_kernels() is None, reason="sgl-kernel is not installed")
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def compressed(**weights: Any) -> dict[str, Any]:
    args = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {**args, **weights}}},
        "ignore": ["lm_head"],
    }


BF16 = {"dtype": torch.bfloat16}
ASYM = {"symmetric": False}
BYTES = compressed(num_bits=8, strategy="channel", group_size=None)
Form = tuple[dict[str, Any], dict[str, Any], Callable[[Any], Coded]]
# Name: config.json's scheme, how integers are drawn, how they are written.
EXACT: dict[str, Form] = {
    "gptq": (GPTQ, {}, gptq),
    "gptq v2": ({**GPTQ, "checkpoint_format": "gptq_v2"}, {}, lambda d: gptq(d, less=0)),
    "gptq, no g_idx": (GPTQ, {}, lambda d: gptq(d, indexed=False)),
    "gptq of rows": ({**GPTQ, "group_size": -1}, {"group": -1}, gptq),
    "gptq, last group cut": ({**GPTQ, "group_size": 64}, {"group": 64}, gptq),
    "gptq of 8 bits": ({**GPTQ, "bits": 8}, {"bits": 8}, lambda d: gptq(d, bits=8)),
    "gptq of some 8 bits": (
        {**GPTQ, "dynamic": {r"+:.*\.0\..*": {"bits": 8}}},
        {"bits": 8},
        lambda d: gptq(d, bits=8),
    ),
    "packed": (compressed(), BF16, packed),
    "packed rows": (compressed(strategy="channel"), {"group": -1, **BF16}, packed),
    "packed, 8 bits": (compressed(num_bits=8), {"bits": 8}, lambda d: packed(d, bits=8)),
    "bytes": (BYTES, {"bits": 8, "group": -1, **BF16}, signed_bytes),
}
# What is added to a code times its scale is rounded to 16 bits here.
ROUNDED: dict[str, Form] = {
    "gptq with zeros": ({**GPTQ, "sym": False}, ASYM, gptq),
    "gptq with zeros, 8 bits": (
        {**GPTQ, "sym": False, "bits": 8},
        {"bits": 8, **ASYM},
        lambda d: gptq(d, bits=8),
    ),
    "awq": (AWQ, ASYM, awq),
    "awq, its own names": (
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "version": "GEMM"},
        ASYM,
        awq,
    ),
    "packed with zeros": (
        compressed(symmetric=False),
        {**ASYM, **BF16},
        lambda d: packed(d, symmetric=False),
    ),
    "bytes with zeros": (
        BYTES,
        {"bits": 8, "group": -1, "dtype": torch.float32, **ASYM},
        lambda d: signed_bytes(d, symmetric=False),
    ),
}
# No codes that the kernels read: these become numbers.
AS_NUMBERS: dict[str, Form] = {
    "gptq in the order of activations": (
        {**GPTQ, "desc_act": True},
        {"permuted": True, **ASYM},
        gptq,
    ),
    "packed, permuted": (compressed(actorder="group"), {"permuted": True}, packed),
    "awq in groups of 16": ({**AWQ, "group_size": 16}, {"group": 16, **ASYM}, awq),
}
FORMS = {**EXACT, **ROUNDED, **AS_NUMBERS}


def coder(form: str, skip: str = "layers.0.mlp.down_proj") -> Callable[..., Coded | None]:
    _, fields, write = FORMS[form]
    seeds = iter(range(0, 10**6, 3))

    def code(module: str, outputs: int, inputs: int) -> Coded | None:
        if module.endswith(skip):
            return None
        return write(integers(outputs, inputs, next(seeds), **fields))

    return code


def published(
    folder: Path, form: str, family: str = "qwen3", num_files: int = 1, **changes: Any
) -> tuple[PreTrainedModel, str]:
    model = make_hf_model(family, num_hidden_layers=2, **changes)
    tensors = quantise(model, coder(form))
    return model, write_checkpoint(folder, model, FORMS[form][0], tensors, num_files=num_files)


def kept_layers(model: CausalLM) -> list[str]:
    named = model.named_modules()
    return [n for n, m in named if isinstance(m, WeightOwner) and m.quantized is not None]


LAYERS = [
    f"model.layers.{layer}.{name}"
    for layer in range(2)
    for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    if (layer, name) != (0, "mlp.down_proj")
]


@native
@pytest.mark.parametrize("form", list(EXACT))
def test_codes_are_kept_as_they_are(tmp_path: Path, form: str) -> None:
    model, path = published(tmp_path, form, num_files=2)
    assert_logits_equal(model, path)
    kept, wide = load(path), load(path, "none")
    assert kept_layers(kept) == LAYERS
    assert kept_layers(wide) == []
    for name in LAYERS:
        one, other = kept.get_submodule(name), wide.get_submodule(name)
        assert isinstance(one, WeightOwner)
        assert isinstance(other, WeightOwner)
        assert one.quantized is not None
        every = torch.arange(len(other.weight))
        assert torch.equal(one.quantized.take(every, torch.float32), other.weight)


@pytest.mark.parametrize("form", list(FORMS))
def test_numbers_are_those_of_the_format(tmp_path: Path, form: str) -> None:
    model, path = published(tmp_path, form, "mistral")
    text = prompts(60)[0]
    found = logits(load(path, "none"), 60)
    torch.testing.assert_close(found, hf_logits(model, text), atol=1e-4, rtol=0)


@native
@pytest.mark.parametrize("form", list(ROUNDED))
def test_zeros_times_scales_are_rounded_to_16_bits(tmp_path: Path, form: str) -> None:
    _, path = published(tmp_path, form)
    kept, wide = load(path), load(path, "none")
    assert kept_layers(kept) == LAYERS
    for name in LAYERS:
        one, other = kept.get_submodule(name), wide.get_submodule(name)
        assert isinstance(one, WeightOwner)
        assert isinstance(other, WeightOwner)
        assert one.quantized is not None
        every = torch.arange(len(other.weight))
        error = (one.quantized.take(every, torch.float32) - other.weight).abs()
        # Half a unit in the last place of what is added, at most 16 (or 128) scales; and of the
        # scale, 255 times, where it has more than 16 bits.
        assert one.quantized.whole is not None
        codes, scales = (16, 16) if one.quantized.whole.bits == 4 else (256, 128 + 255)
        scale = 1.25 * 4 / codes / other.weight.shape[1] ** 0.5
        assert 0 < error.max() <= 2.0**-11 * scales * scale


@native
@pytest.mark.parametrize("form", list(AS_NUMBERS))
def test_what_kernels_can_not_hold_becomes_numbers(tmp_path: Path, form: str) -> None:
    model, path = published(tmp_path, form)
    assert kept_layers(load(path)) == []
    assert_logits_equal(model, path)


@native
def test_greedy_tokens(tmp_path: Path) -> None:
    model, path = published(tmp_path, "gptq", "llama")
    assert_greedy_equal(model, path, (20, 5))


@native
def test_bfloat16_stays_close(tmp_path: Path) -> None:
    model, path = published(tmp_path, "awq", "llama")
    text = prompts(40)[0]
    runner = runner_of(path, dtype=torch.bfloat16)
    found = runner.step([(Sequence(text), 40)], all_logits=True)[0]
    want = hf_logits(model, text)
    assert (found - want).abs().median() < 0.05 * want.std()


@native
@pytest.mark.parametrize("form", ["gptq", "packed, 8 bits", "awq"])
def test_experts_stay_quantised_on_every_rank(tmp_path: Path, form: str) -> None:
    model, path = published(tmp_path, form, "qwen3_moe", 3, moe_intermediate_size=64)
    wide, kept = load(path, "none"), load(path)
    for whole in experts_of(kept):
        assert is_kept(whole)
        assert whole.native_parts(native_kernels()) is not None  # type: ignore[arg-type]
    want = hf_logits(model, prompts(40)[0])
    torch.testing.assert_close(logits(wide, 40), want, atol=1e-4, rtol=0)
    close = 1e-4 if form != "awq" else 0.02
    torch.testing.assert_close(logits(kept, 40), want, atol=close, rtol=0)
    ranks = [experts_of(load(path, rank=rank, ranks=2))[0] for rank in range(2)]
    assert all(is_kept(rank) for rank in ranks)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    for expert in range(6):
        total = sum(rank._expert(expert, x) for rank in ranks)
        whole = experts_of(kept)[0]._expert(expert, x)
        torch.testing.assert_close(total, whole, atol=1e-5, rtol=1e-5)


@native
@pytest.mark.parametrize(
    ("family", "form"), [("glm4_moe", "gptq"), ("qwen2_moe", "packed, 8 bits")]
)
def test_shared_experts_and_heads_that_turn_in_part(tmp_path: Path, family: str, form: str) -> None:
    """Codes stay, with the rows of queries and keys in the order in which these turn."""
    widths = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
    model, path = published(tmp_path, form, family, 2, mlp_only_layers=[], **widths)
    kept = load(path)
    shared = "shared_experts" if family == "glm4_moe" else "shared_expert"
    layers = ("self_attn.qkv_proj", f"mlp.{shared}.gate_up_proj", f"mlp.{shared}.down_proj")
    assert {f"model.layers.1.{name}" for name in layers} <= set(kept_layers(kept))
    assert is_kept(experts_of(kept)[-1])
    want = hf_logits(model, prompts(40)[0])
    torch.testing.assert_close(logits(kept, 40), want, atol=1e-4, rtol=0)


@native
def test_ranks_take_their_rows_and_columns(tmp_path: Path) -> None:
    _, path = published(tmp_path, "gptq", "llama", hidden_size=128, intermediate_size=128)
    whole = load(path)
    ranks = [load(path, rank=rank, ranks=2) for rank in range(2)]
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    name = "model.layers.1.mlp."
    owners = [one.get_submodule(f"{name}down_proj") for one in (whole, *ranks)]
    assert all(isinstance(owner, WeightOwner) and owner.quantized for owner in owners)
    wide = owners[0].product(x)
    parts = [owner.product(half) for owner, half in zip(owners[1:], x.chunk(2, 1), strict=True)]
    torch.testing.assert_close(parts[0] + parts[1], wide, atol=1e-5, rtol=1e-5)
    gates = [one.get_submodule(f"{name}gate_up_proj").product(x) for one in (whole, *ranks)]
    found = [torch.cat(parts, 1) for parts in zip(*(g.chunk(2, 1) for g in gates[1:]), strict=True)]
    torch.testing.assert_close(torch.cat(found, 1), gates[0], atol=1e-5, rtol=1e-5)


@native
def test_a_merged_layer_with_a_part_in_numbers_becomes_numbers(tmp_path: Path) -> None:
    model = make_hf_model("llama", num_hidden_layers=2)
    tensors = quantise(model, coder("gptq", skip="layers.1.self_attn.v_proj"))
    path = write_checkpoint(tmp_path, model, GPTQ, tensors)
    found = kept_layers(load(path))
    assert "model.layers.0.self_attn.qkv_proj" in found
    assert "model.layers.1.self_attn.qkv_proj" not in found
    assert_logits_equal(model, path)


@native
def test_embedding_and_head_may_be_quantised(tmp_path: Path) -> None:
    model = make_hf_model("llama", num_hidden_layers=1)
    tensors = quantise(model, coder("packed"))
    for seed, module in enumerate(("model.embed_tokens", "lm_head")):
        weight = model.state_dict()[f"{module}.weight"]
        coded, numbers = packed(integers(*weight.shape, seed))
        weight.copy_(numbers)
        del tensors[f"{module}.weight"]
        tensors |= {f"{module}.{role}": tensor for role, tensor in coded.items()}
    path = write_checkpoint(tmp_path, model, compressed(), tensors)
    assert {"model.embed_tokens", "lm_head"} <= set(kept_layers(load(path)))
    assert_logits_equal(model, path)


def test_bytes_over_integers(tmp_path: Path) -> None:
    if native_kernels() is None:
        pytest.skip("sgl-kernel is not installed")
    model, path = published(tmp_path, "awq")
    rounded = load(path, "int8")
    owner = rounded.get_submodule("model.layers.0.self_attn.o_proj")
    assert isinstance(owner, WeightOwner)
    assert owner.quantized is not None
    assert owner.quantized.whole is not None
    assert owner.quantized.whole.bits == 8
    want = hf_logits(model, prompts(40)[0])
    assert 0 < (logits(rounded, 40) - want).abs().median() < 0.05 * want.std()


@pytest.mark.parametrize(
    ("form", "other"),
    [
        ("awq", lambda d: awq(d, order=range(8))),
        ("gptq with zeros", lambda d: gptq(d, less=0)),
        ("packed with zeros", lambda d: packed(d)),
    ],
)
def test_another_order_or_zero_is_another_model(
    tmp_path: Path, form: str, other: Callable[[Any], Coded]
) -> None:
    """The tests above see the order of halves, and what is added to zeros."""
    scheme, fields, _ = FORMS[form]
    model = make_hf_model("llama", num_hidden_layers=2)
    seeds = iter(range(0, 10**6, 3))
    tensors = quantise(model, lambda _, n, k: other(integers(n, k, next(seeds), **fields)))
    path = write_checkpoint(tmp_path, model, scheme, tensors)
    assert (logits(load(path), 40) - hf_logits(model, prompts(40)[0])).abs().max() > 0.1


def test_biases_of_zeros_that_no_layer_has_are_passed_over(tmp_path: Path) -> None:
    model = make_hf_model("llama", num_hidden_layers=1)
    tensors = quantise(model, coder("gptq"))
    name = "model.layers.0.self_attn.o_proj.bias"
    path = write_checkpoint(tmp_path, model, GPTQ, {**tensors, name: torch.zeros(64)})
    assert_logits_equal(model, path, 40)
    write_checkpoint(tmp_path, model, GPTQ, {**tensors, name: torch.ones(64)})
    with pytest.raises(ValueError, match=r"1 unexpected weight\(s\): .*o_proj.bias"):
        load(path)


BROKEN: list[tuple[str, str, Any, str]] = [
    ("gptq", "qweight", None, "o_proj.qweight is missing"),
    ("gptq", "qzeros", None, "o_proj.qzeros is missing"),
    ("awq", "scales", None, "o_proj.scales is missing"),
    ("gptq in the order of activations", "g_idx", None, "o_proj.g_idx is missing"),
    ("gptq", "qweight", lambda t: t.float(), r"o_proj.qweight: float32 \(8, 64\) does not fit"),
    ("gptq", "qweight", lambda t: t[:, :8], r"o_proj.qweight: int32 \(8, 8\) does not fit"),
    ("gptq", "qweight", lambda t: t[:4], "o_proj.scales: 2 groups of 32 are not 32 inputs"),
    ("gptq", "qzeros", lambda t: t[:1], r"o_proj.qzeros: int32 \(1, 8\) does not fit float16"),
    ("gptq", "qzeros", lambda t: t.repeat(1, 2), "qzeros: 8 bits, config.json says 4"),
    ("gptq", "scales", lambda t: t.int(), r"o_proj.scales: int32 \(2, 64\) is no scale"),
    ("gptq", "g_idx", lambda t: t[:8], r"o_proj.g_idx: int32 \(8,\) is no group of 64"),
    ("gptq", "g_idx", lambda t: t + 1, "o_proj.g_idx: groups are 0 to 1"),
    ("gptq", "weight", lambda t: torch.ones(64, 64), "o_proj.weight is there beside .*.g_idx"),
    ("awq", "qweight", lambda t: t[:, :4], r"o_proj.qweight: int32 \(64, 4\) does not fit"),
    ("awq", "qzeros", lambda t: t[:1], r"o_proj.qzeros: int32 \(1, 8\) does not fit"),
    ("packed", "weight_packed", None, "o_proj.weight_packed is missing"),
    ("packed", "weight_scale", None, "o_proj.weight_scale is missing"),
    ("packed", "weight_shape", None, "o_proj.weight_shape is missing"),
    ("packed", "weight_shape", lambda t: t[:1], r"weight_shape: int64 \(1,\) is no shape"),
    ("packed", "weight_packed", lambda t: t[:, :5], r"int32 \(64, 5\) is not \(64, 64\) of 4 or"),
    ("packed", "weight_scale", lambda t: t[:8], r"bfloat16 \(8, 2\) scales no 64 outputs"),
    ("packed", "weight_scale", lambda t: t.repeat(1, 2)[:, :3], "3 groups are not 64 inputs"),
    ("packed with zeros", "weight_zero_point", lambda t: t[1:], r"int32 \(7, 2\) does not fit 64"),
    ("bytes", "weight_scale", None, "o_proj.weight_scale is missing"),
    ("bytes", "weight", lambda t: t.short(), "a weight of torch.int16 is not served"),
]


@pytest.mark.parametrize(("form", "role", "change", "message"), BROKEN)
def test_what_does_not_fit_is_named(
    tmp_path: Path, form: str, role: str, change: Any, message: str
) -> None:
    _, path = published(tmp_path, form)
    file = next(tmp_path.glob("*.safetensors"))
    tensors = load_file(file)
    name = f"model.layers.1.self_attn.o_proj.{role}"
    found = tensors.pop(name, torch.empty(0))
    if change is not None:
        tensors[name] = change(found).contiguous()
    save_file(tensors, file)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert "model.layers.1.self_attn.o_proj" in str(caught.value)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ({**GPTQ, "bits": 3}, "gptq with bits 3 are not served, 4 and 8 are"),
        ({**GPTQ, "group_size": 0}, "gptq: group_size must be -1 or positive, not 0"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "gptq in 'marlin' are not served"),
        ({**GPTQ, "pack_dtype": "int16"}, "pack_dtype 'int16' are not served"),
        ({**AWQ, "bits": 8}, "awq with bits 8 are not served, 4 are"),
        ({**AWQ, "version": "gemv"}, "awq with version 'gemv' are not served"),
        (compressed(num_bits=3), "weights of 3 bits of type 'int' by 'group' are not served"),
        ({"quant_method": "bitsandbytes"}, "quantized by 'bitsandbytes' are not served; those of"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quantized by 'modelopt' are not"),
        ({"load_in_4bit": True}, "quantized by None are not served"),
    ],
)
def test_other_schemes_are_refused(tmp_path: Path, scheme: dict[str, Any], message: str) -> None:
    model = make_hf_model("llama", num_hidden_layers=1)
    path = write_checkpoint(tmp_path, model, scheme, plain_tensors(model))
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_path(path)
