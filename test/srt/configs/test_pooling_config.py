"""How a checkpoint's files say that it is pooled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import PoolingType

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.model_traits import EncoderConfig
from sglang.srt.configs.pooling_config import PoolingConfig, pooling_of
from srt.model_loader.gguf_files import write_gguf
from srt.models.hf_models import make_hf_model
from srt.models.pooled_models import write_pooling

FIELDS: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def read(
    folder: Path, architecture: str, is_embedding: bool = False, **more: Any
) -> PoolingConfig | None:
    fields = {**FIELDS, "architectures": [architecture], **more}
    (folder / "config.json").write_text(json.dumps(fields))
    return pooling_of(ModelConfig.from_path(str(folder)), is_embedding=is_embedding)


def test_a_causal_model_is_pooled_when_it_is_asked_for(tmp_path: Path) -> None:
    assert read(tmp_path, "LlamaForCausalLM") is None
    assert read(tmp_path, "LlamaForCausalLM", True) == PoolingConfig("last", True, 16)


def test_a_decoder_alone_is_always_pooled(tmp_path: Path) -> None:
    assert read(tmp_path, "Qwen3Model") == PoolingConfig("last", True, 16)


def test_a_type_without_an_architecture_generates(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    assert ModelConfig.from_path(str(tmp_path)).architecture == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("switch", "mode"),
    [
        ("pooling_mode_lasttoken", "last"),
        ("pooling_mode_mean_tokens", "mean"),
        ("pooling_mode_cls_token", "cls"),
    ],
)
@pytest.mark.parametrize("normalize", [True, False])
def test_sentence_transformers_files_decide(
    tmp_path: Path, switch: str, mode: Any, normalize: bool
) -> None:
    write_pooling(tmp_path, switch, normalize=normalize)
    assert read(tmp_path, "Qwen3ForCausalLM", True) == PoolingConfig(mode, normalize, 16)
    assert read(tmp_path, "Qwen3ForCausalLM") is None


def test_the_mode_by_its_name(tmp_path: Path) -> None:
    write_pooling(tmp_path, "pooling_mode_cls_token")
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
    assert read(tmp_path, "LlamaModel") == PoolingConfig("mean", True, 16)


def test_a_classifiers_labels(tmp_path: Path) -> None:
    names = {"1": "bad", "0": "good"}
    found = read(tmp_path, "Qwen2ForSequenceClassification", id2label=names)
    assert found == PoolingConfig("last", False, 2, ("good", "bad"))
    plain = read(tmp_path, "LlamaForSequenceClassification")
    assert plain is not None
    assert plain.labels == ("LABEL_0", "LABEL_1")
    one = read(tmp_path, "LlamaForSequenceClassification", id2label={"0": "reward"})
    assert one == PoolingConfig("last", False, 1, ("reward",), True)


@pytest.mark.parametrize(
    ("modules", "pooling", "told"),
    [
        ("[", "{}", "cannot read"),
        ("{}", "{}", "list of modules"),
        ('[{"type": "x.Dense"}]', "{}", "'Dense', which is not served"),
        ('[{"type": "x.Transformer"}]', "{}", "one module 'Pooling'"),
        (None, '{"pooling_mode_max_tokens": true}', "asks for pooling_mode_max_tokens"),
        (None, "{}", "no pooling"),
        (None, "[]", "JSON object"),
        (
            None,
            '{"pooling_mode_mean_tokens": true, "pooling_mode_cls_token": true}',
            "pooling_mode_mean_tokens, pooling_mode_cls_token",
        ),
    ],
)
def test_what_is_not_served_is_named(
    tmp_path: Path, modules: str | None, pooling: str, told: str
) -> None:
    write_pooling(tmp_path, "pooling_mode_mean_tokens")
    if modules is not None:
        (tmp_path / "modules.json").write_text(modules)
    (tmp_path / "1_Pooling" / "config.json").write_text(pooling)
    with pytest.raises(ValueError, match=told) as caught:
        read(tmp_path, "LlamaForCausalLM", True)
    assert str(tmp_path) in str(caught.value)


def test_encoders_are_computed_whole(tmp_path: Path) -> None:
    assert read(tmp_path, "BertModel") == PoolingConfig("cls", True, 16, whole=True)
    names = {"0": "fits"}
    found = read(tmp_path, "XLMRobertaForSequenceClassification", id2label=names)
    assert found == PoolingConfig("cls", False, 1, ("fits",), True, True)
    write_pooling(tmp_path, "pooling_mode_mean_tokens", normalize=False)
    assert read(tmp_path, "XLMRobertaModel") == PoolingConfig("mean", False, 16, whole=True)
    write_pooling(tmp_path, "pooling_mode_lasttoken")
    with pytest.raises(ValueError, match="an encoder's last token"):
        read(tmp_path, "BertModel")


def test_robertas_first_positions_are_nobodys(tmp_path: Path) -> None:
    read(tmp_path, "XLMRobertaModel", max_position_embeddings=514, pad_token_id=1)
    config = ModelConfig.from_path(str(tmp_path))
    assert config.max_position_embeddings == 512
    assert config.encoder == EncoderConfig(1e-12, 514, 2, 2)
    with pytest.raises(ValueError, match="leaves nothing behind position 2"):
        read(tmp_path, "XLMRobertaModel", max_position_embeddings=2)
    with pytest.raises(ValueError, match="pad_token_id"):
        read(tmp_path, "XLMRobertaModel", pad_token_id=-1)


@pytest.mark.parametrize("more", [{"is_causal": False}, {"use_bidirectional_attention": True}])
def test_attention_in_both_directions_is_refused(tmp_path: Path, more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="both directions"):
        read(tmp_path, "Qwen2ForCausalLM", True, **more)
    assert read(tmp_path, "Qwen2ForCausalLM", **more) is None


@pytest.mark.parametrize("more", [{"id2label": {"0": "a", "2": "b"}}, {"num_labels": 0}])
def test_impossible_labels_are_refused(tmp_path: Path, more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"id2label|num_labels"):
        read(tmp_path, "LlamaForSequenceClassification", **more)


@pytest.mark.parametrize(
    ("number", "mode"),
    [
        (None, "last"),
        (PoolingType.NONE, "last"),
        (PoolingType.MEAN, "mean"),
        (PoolingType.CLS, "cls"),
        (PoolingType.LAST, "last"),
    ],
)
def test_a_gguf_file_says_it_as_a_number(
    tmp_path: Path, number: PoolingType | None, mode: Any
) -> None:
    path = tmp_path / "model.gguf"
    metadata = {} if number is None else {"qwen3.pooling_type": number.value}
    write_gguf(path, make_hf_model("qwen3"), metadata=metadata)
    config = ModelConfig.from_path(str(path))
    assert pooling_of(config, is_embedding=True) == PoolingConfig(mode, True, 64)
    assert pooling_of(config, is_embedding=False) is None


def test_a_gguf_rerankers_pooling_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(
        path, make_hf_model("qwen3"), metadata={"qwen3.pooling_type": PoolingType.RANK.value}
    )
    with pytest.raises(ValueError, match="pooling_type 4 is not served"):
        pooling_of(ModelConfig.from_path(str(path)), is_embedding=True)
