"""Weights out of GGUF files: names, permutation, types, damage."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from sglang.srt.layers.expert_weights import ExpertWeights
from sglang.srt.layers.weights import WeightOwner
from sglang.srt.model_loader.gguf_weights import hf_weight_name
from sglang.srt.utils.native import native_kernels
from srt.model_loader.gguf_files import write_gguf
from srt.model_loader.test_loader import assert_same, hf_weights, load
from srt.models.hf_models import make_hf_model

TYPES = gguf.GGMLQuantizationType
native = pytest.mark.skipif(native_kernels() is None, reason="sgl-kernel is not installed")


@pytest.mark.parametrize(
    "quant",
    [TYPES[n] for n in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")],
    ids=lambda t: t.name,
)
def test_every_type_that_gguf_quantises(tmp_path: Path, quant: gguf.GGMLQuantizationType) -> None:
    held = write_gguf(tmp_path / "m.gguf", make_hf_model("llama"), quant)
    assert_same(hf_weights(load(tmp_path / "m.gguf")), held)
    assert_same(hf_weights(load(tmp_path, load_format="gguf")), held)


@native
@pytest.mark.parametrize("quant", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"])
@pytest.mark.parametrize("tied", [False, True])
def test_codes_that_are_kept_are_the_same_numbers(tmp_path: Path, quant: str, tied: bool) -> None:
    hf = make_hf_model("qwen2", tie_word_embeddings=tied)
    held = write_gguf(tmp_path / "m.gguf", hf, TYPES[quant])
    model = load(tmp_path / "m.gguf", quantization="gguf")
    owners = [module for module in model.modules() if isinstance(module, WeightOwner)]
    kept = [owner for owner in owners if owner.quantized is not None]
    assert len(kept) == len(owners) - tied, "a tied head has the embedding's"
    found = hf_weights(model)
    assert found.keys() == held.keys()
    for name, tensor in held.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


@native
def test_types_without_codes_are_numbers_beside_those_with(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", make_hf_model("llama"), TYPES.F16)
    model = load(tmp_path / "m.gguf", quantization="gguf")
    assert all(m.quantized is None for m in model.modules() if isinstance(m, WeightOwner))


@native
def test_a_checkpoint_in_numbers_can_be_rounded_to_bytes(tmp_path: Path) -> None:
    hf = make_hf_model("llama")
    hf.save_pretrained(tmp_path)
    plain, rounded = load(tmp_path), load(tmp_path, quantization="int8")
    want, found = hf_weights(plain), hf_weights(rounded)
    for name, tensor in want.items():
        step = tensor.abs().max() / 127
        assert (found[name] - tensor).abs().max() <= step, name
    changed = [name for name, tensor in want.items() if not torch.equal(found[name], tensor)]
    assert any("q_proj" in name for name in changed)
    assert not any("norm" in name for name in changed)


@native
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_layers_are_rounded_as_they_come(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model is never in memory as numbers: those of a layer go when its last tensor has come."""
    changes = {"moe_intermediate_size": 64} if family == "qwen3_moe" else {}
    make_hf_model(family, num_hidden_layers=4, **changes).save_pretrained(tmp_path)
    begun: dict[int, WeightOwner | ExpertWeights] = {}
    waiting: list[int] = []

    def watch(kind: type[WeightOwner | ExpertWeights], name: str) -> None:
        take = getattr(kind, name)

        def watched(self: WeightOwner | ExpertWeights, *arguments: Any) -> None:
            take(self, *arguments)
            begun[id(self)] = self
            numbers = (
                one.quantized is None if isinstance(one, WeightOwner) else one.down is None
                for one in begun.values()
            )
            waiting.append(sum(numbers))

        monkeypatch.setattr(kind, name, watched)

    watch(WeightOwner, "load_rows")
    watch(ExpertWeights, "_copy")
    model = load(tmp_path, quantization="int8")
    assert max(waiting) <= 2, "what one file's order leaves open: q, k and v beside o"
    owners = [one for one in model.modules() if isinstance(one, (WeightOwner, ExpertWeights))]
    assert len(begun) == len(owners)
    assert all(one.is_loaded or isinstance(one, ExpertWeights) for one in owners)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"num_key_value_heads": 1}),
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32}),
    ],
)
@pytest.mark.parametrize("kept", ["none", pytest.param("gguf", marks=native)])
def test_rows_of_q_and_k_are_put_back(
    tmp_path: Path, family: str, changes: dict[str, Any], kept: str
) -> None:
    held = write_gguf(tmp_path / "m.gguf", make_hf_model(family, **changes), TYPES.Q8_0)
    assert_same(hf_weights(load(tmp_path / "m.gguf", quantization=kept)), held)


def test_tied_output_when_the_file_has_none(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", make_hf_model("qwen2", tie_word_embeddings=True))
    model = load(tmp_path / "m.gguf")
    assert model.lm_head.weight is model.get_parameter("model.embed_tokens.weight")


def test_dequantised_to_the_wanted_type(tmp_path: Path) -> None:
    held = write_gguf(tmp_path / "m.gguf", make_hf_model("llama"), TYPES.Q4_1)
    model = load(tmp_path / "m.gguf", dtype=torch.bfloat16)
    assert_same(hf_weights(model), {name: t.bfloat16() for name, t in held.items()})


def test_blocks_of_rows_join_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang.srt.model_loader.gguf_weights._BLOCK_FLOATS", 64 * 7)
    held = write_gguf(tmp_path / "m.gguf", make_hf_model("llama"), TYPES.Q8_0)
    assert_same(hf_weights(load(tmp_path / "m.gguf")), held)


def test_rope_frequencies_are_not_a_weight_but_others_are_unexpected(tmp_path: Path) -> None:
    hf = make_hf_model("llama")
    factors = {"rope_freqs.weight": np.ones(8, dtype=np.float32)}
    held = write_gguf(tmp_path / "a.gguf", hf, extra_tensors=factors)
    assert_same(hf_weights(load(tmp_path / "a.gguf")), held)
    strange = {"blk.0.attn_sinks.weight": np.ones(4, dtype=np.float32)}
    write_gguf(tmp_path / "b.gguf", hf, extra_tensors=strange)
    with pytest.raises(ValueError, match=r"unexpected weight\(s\): blk\.0\.attn_sinks\.weight"):
        load(tmp_path / "b.gguf")


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    write_gguf(tmp_path / "m.gguf", make_hf_model("llama"), leave_out=(name,))
    with pytest.raises(ValueError, match=f"1 missing weight.*{name}"):
        load(tmp_path / "m.gguf")


def test_wrong_format_for_a_gguf_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", make_hf_model("llama"))
    with pytest.raises(ValueError, match="is a GGUF file; --load-format safetensors"):
        load(tmp_path / "m.gguf", load_format="safetensors")


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_names_are_those_of_the_gguf_package(arch: str) -> None:
    kinds = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}
    names = gguf.get_tensor_name_map(kinds.get(arch, gguf.MODEL_ARCH.QWEN3), 12)
    state = make_hf_model(arch, num_hidden_layers=12).state_dict()
    for name in state:
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert hf_weight_name(gguf_name) == name
