"""GGUF headers: what they say of a model, and how damage is told."""

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from sglang.srt.configs.gguf_file import read_gguf_header, read_gguf_rows
from sglang.srt.configs.model_config import ModelConfig
from srt.model_loader.gguf_files import write_gguf
from srt.models.hf_models import make_hf_model


def dequantisable() -> list[gguf.GGMLQuantizationType]:
    """The types that the gguf package can dequantise, by trying one block of each."""
    found = []
    for quant in gguf.GGMLQuantizationType:
        block = np.zeros((1, gguf.GGML_QUANT_SIZES[quant][1]), dtype=np.uint8)
        try:
            gguf.quants.dequantize(block, quant)
        except NotImplementedError:
            continue
        found.append(quant)
    return found


def config_of(path: Path, family: str = "llama", **arguments: Any) -> ModelConfig:
    write_gguf(path, make_hf_model(family, num_hidden_layers=1), **arguments)
    return ModelConfig.from_path(str(path))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_same_config_as_from_hugging_face(tmp_path: Path, family: str) -> None:
    changes: dict[str, Any] = {"sliding_window": 8} if family == "mistral" else {}
    model = make_hf_model(
        family, rope_parameters={"rope_type": "default", "rope_theta": 5e5}, **changes
    )
    model.save_pretrained(tmp_path)
    write_gguf(tmp_path / "model.gguf", model)
    hf = ModelConfig.from_path(str(tmp_path))
    ours = ModelConfig.from_path(str(tmp_path / "model.gguf"))
    assert ours.is_gguf
    assert ours.path == str(tmp_path / "model.gguf")
    for field in hf.__dataclass_fields__:
        if field in ("is_gguf", "path", "raw", "rms_norm_eps", "eos_token_ids", "bos_token_id"):
            continue
        assert getattr(ours, field) == getattr(hf, field), field
    assert ours.rms_norm_eps == pytest.approx(hf.rms_norm_eps)
    assert ours.eos_token_ids == ()
    assert ours.bos_token_id is None


def test_a_directory_with_one_gguf(tmp_path: Path) -> None:
    config_of(tmp_path / "model.gguf")
    assert ModelConfig.from_path(str(tmp_path)).path == str(tmp_path / "model.gguf")


def test_tied_output_and_biases_are_seen_in_the_tensors(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", make_hf_model("llama", tie_word_embeddings=True))
    tied = ModelConfig.from_path(str(tmp_path / "a.gguf"))
    assert tied.tie_word_embeddings
    assert not tied.attention_bias
    assert not tied.attention_output_bias
    assert not tied.mlp_bias
    write_gguf(tmp_path / "b.gguf", make_hf_model("llama", attention_bias=True, mlp_bias=True))
    biased = ModelConfig.from_path(str(tmp_path / "b.gguf"))
    assert not biased.tie_word_embeddings
    assert biased.attention_bias
    assert biased.attention_output_bias
    assert biased.mlp_bias


def test_token_ids(tmp_path: Path) -> None:
    ids = {"bos": 1, "eos": 2, "eot": 5, "eom": 2}
    metadata = {f"tokenizer.ggml.{name}_token_id": token for name, token in ids.items()}
    config = config_of(tmp_path / "m.gguf", metadata=metadata)
    assert config.bos_token_id == 1
    assert config.eos_token_ids == (2, 5)


def test_rope_scaling(tmp_path: Path) -> None:
    linear = config_of(
        tmp_path / "linear.gguf",
        metadata={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
    )
    assert (linear.rope.rope_type, linear.rope.factor) == ("linear", 4.0)
    assert linear.max_position_embeddings == 2048
    yarn = config_of(
        tmp_path / "yarn.gguf",
        metadata={
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.original_context_length": 128,
            "llama.rope.scaling.yarn_beta_fast": 16.0,
            "llama.rope.scaling.yarn_attn_factor": 2.0,
        },
    )
    assert yarn.rope.rope_type == "yarn"
    assert yarn.rope.original_max_position == 128
    assert yarn.rope.beta_fast == 16.0
    assert yarn.rope.attention_scaling == pytest.approx(2.0 * (0.1 * math.log(4.0) + 1.0))
    assert yarn.max_position_embeddings == 512
    none = config_of(tmp_path / "none.gguf", metadata={"llama.rope.scaling.type": "none"})
    assert none.rope.rope_type == "default"


def test_rope_frequency_factors(tmp_path: Path) -> None:
    factors = np.linspace(1.0, 8.0, 8, dtype=np.float32)
    config = config_of(tmp_path / "m.gguf", extra_tensors={"rope_freqs.weight": factors})
    assert config.rope.freq_factors == tuple(factors.tolist())
    with pytest.raises(ValueError, match="8 positive numbers"):
        config_of(tmp_path / "n.gguf", extra_tensors={"rope_freqs.weight": factors[:3].copy()})


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.expert_count": 8}, "lacks tensors blk.N.ffn_gate_exps"),
        ({"llama.rope.scaling.type": "longrope"}, "longrope"),
        ({"llama.rope.dimension_count": 8}, "dimension_count 8"),
        ({"llama.attention.value_length": 32}, "different width"),
        ({"llama.block_count": None}, "lacks llama.block_count"),
        ({"llama.attention.head_count_kv": 3}, "not a multiple of num_key_value_heads 3"),
        ({"llama.attention.head_count_kv": [1, 2]}, "differs between layers"),
        ({"split.count": 2}, "split GGUF"),
        ({"llama.residual_scale": 0.5}, "residual_scale"),
    ],
)
def test_what_changes_the_answer_is_refused(
    tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(tmp_path / "m.gguf", metadata=metadata)


def test_unknown_architecture_names_the_known(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "bert")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"unsupported architecture 'bert'.*llama, qwen2, qwen3"):
        ModelConfig.from_path(str(tmp_path / "m.gguf"))


def test_every_truncation_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    config_of(path, metadata={"tokenizer.ggml.tokens": ["a", "bc"], "tokenizer.ggml.scores": [0.5]})
    whole = path.read_bytes()
    for length in [0, 3, 4, 7, 20, *range(24, len(whole), 1009), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"m\.gguf"):
            ModelConfig.from_path(str(path))


def test_header_values_are_those_of_the_gguf_package(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    config_of(
        path,
        metadata={
            "tokenizer.ggml.tokens": ["a", "", "ü€"],
            "tokenizer.ggml.scores": [0.5, -1.0, 2.0],
            "tokenizer.ggml.token_type": [1, 2, 3],
            "tokenizer.ggml.add_bos_token": False,
        },
    )
    header, reader = read_gguf_header(path), gguf.GGUFReader(path)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            value = header.metadata[key]
            assert np.array_equal(value, field.contents()), key
    assert list(header.tensors) == [t.name for t in reader.tensors]
    for tensor in reader.tensors:
        info = header.tensors[tensor.name]
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        assert info.offset == tensor.data_offset
        assert info.num_bytes == tensor.n_bytes


@pytest.mark.parametrize("quant", dequantisable(), ids=lambda t: t.name)
def test_every_type_that_gguf_dequantises(tmp_path: Path, quant: gguf.GGMLQuantizationType) -> None:
    block, block_bytes = gguf.GGML_QUANT_SIZES[quant]
    width = max(block, 256)
    shape = (6, width // block * block_bytes)
    raw = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x.weight", raw, raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_gguf_header(tmp_path / "m.gguf")
    info = header.tensors["x.weight"]
    assert info.shape == (6, width)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(_as_stored(raw, quant), quant)
        rows = [read_gguf_rows(header.path, info, first, 2) for first in (0, 2, 4)]
    np.testing.assert_array_equal(np.concatenate(rows), expected)


def _as_stored(raw: Any, quant: gguf.GGMLQuantizationType) -> Any:
    plain = {"F32": np.float32, "F16": np.float16}
    return raw.view(plain[quant.name]) if quant.name in plain else raw


def test_the_types_in_wide_use_are_among_them() -> None:
    names = {quant.name for quant in dequantisable()}
    assert names >= {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"}
    assert names >= {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"}


def test_a_type_that_gguf_cannot_dequantise(tmp_path: Path) -> None:
    quant = gguf.GGMLQuantizationType.Q8_K
    raw = np.zeros((1, gguf.GGML_QUANT_SIZES[quant][1]), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x.weight", raw, raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    info = read_gguf_header(tmp_path / "m.gguf").tensors["x.weight"]
    with pytest.raises(ValueError, match=r"x\.weight has type Q8_K"):
        read_gguf_rows(tmp_path / "m.gguf", info, 0, 1)
