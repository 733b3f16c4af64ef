"""Encoders on the whole device tower: transformers' vectors and logits, whole prompts at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaModel,
)

from sglang.srt.managers.io_struct import PoolingMode
from srt.managers.rank_towers import rank_towers
from srt.managers.test_engine_pooling import TOLERANCE, Vector, ask, vector
from srt.managers.test_engine_tokens import PROMPTS, DeviceTower, tower
from srt.models.hf_models import VOCAB, save
from srt.models.pooled_models import write_pooling

KINDS: dict[str, tuple[Any, type[PreTrainedModel], type[PreTrainedModel]]] = {
    "bert": (BertConfig, BertModel, BertForSequenceClassification),
    "xlm-roberta": (XLMRobertaConfig, XLMRobertaModel, XLMRobertaForSequenceClassification),
}
SWITCHES = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens"}


def make_encoder(kind: str, *, num_labels: int = 0) -> PreTrainedModel:
    """A random encoder in float32 with weights that matter; a classifier when it has labels."""
    config_class, model_class, classifier_class = KINDS[kind]
    fields = {"id2label": {i: str(i) for i in range(num_labels)}} if num_labels else {}
    config = config_class(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        type_vocab_size=2 if kind == "bert" else 1,
        attn_implementation="eager",
        **fields,
    )
    generator = torch.Generator().manual_seed(4)
    model = (classifier_class if num_labels else model_class)(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * (1.2 / parameter.shape[-1] ** 0.5))
            else:
                parameter.copy_(noise * 0.2 + (0.0 if name.endswith("bias") else 1.0))
    return model


def states_of(model: PreTrainedModel, prompt: list[int]) -> torch.Tensor:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        # All are tokens, those with the id of padding too.
        found: torch.Tensor = model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
    return found


def answers(engine: DeviceTower, mode: PoolingMode) -> list[Vector]:
    for number, prompt in enumerate(PROMPTS):
        ask(engine, f"r{number}", prompt, mode, whole=True)
    engine.run()
    return [vector(engine, f"r{number}") for number in range(len(PROMPTS))]


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("mode", ["cls", "mean"])
def test_vectors_equal_transformers(kind: str, mode: PoolingMode, tmp_path: Path) -> None:
    # Positions of RoBERTa follow from ids: padding has none of its own, so it is left out.
    reference = make_encoder(kind)
    prompts = [[3 + token % (VOCAB - 3) for token in prompt] for prompt in PROMPTS]
    path = save(reference, tmp_path)
    write_pooling(tmp_path, SWITCHES[mode])
    with tower(path, page_size=16) as engine:
        for number, prompt in enumerate(prompts):
            ask(engine, f"r{number}", prompt, mode, whole=True)
        engine.run()
        for number, prompt in enumerate(prompts):
            states = states_of(reference, prompt)
            want = states[0] if mode == "cls" else states.mean(0)
            np.testing.assert_allclose(vector(engine, f"r{number}"), want, **TOLERANCE)


def test_a_pairs_second_text_is_of_the_second_type(tmp_path: Path) -> None:
    reference = make_encoder("bert", num_labels=1)
    path = save(reference, tmp_path)
    prompt, second_from = PROMPTS[2], 40
    types = torch.tensor([[0] * second_from + [1] * (len(prompt) - second_from)])
    with tower(path) as engine:
        ask(engine, "pair", prompt, "cls", whole=True, second_from=second_from)
        ask(engine, "one", prompt, "cls", whole=True)
        engine.run()
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        with torch.inference_mode():
            pair = reference(ids, attention_mask=mask, token_type_ids=types).logits[0]
            one = reference(ids, attention_mask=mask).logits[0]
        assert abs(float(pair - one)) > 1e-2
        np.testing.assert_allclose(vector(engine, "pair"), pair, **TOLERANCE)
        np.testing.assert_allclose(vector(engine, "one"), one, **TOLERANCE)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_classifier_gives_transformers_logits(kind: str, tmp_path: Path) -> None:
    reference = make_encoder(kind, num_labels=3)
    path = save(reference, tmp_path)
    prompt = [3 + token % (VOCAB - 3) for token in PROMPTS[1]]
    with torch.inference_mode():
        logits = reference(torch.tensor([prompt])).logits[0]
    with tower(path) as engine:
        ask(engine, "r", prompt, "cls", whole=True)
        engine.run()
        np.testing.assert_allclose(vector(engine, "r"), logits, **TOLERANCE)


def test_prompts_are_never_cut(tmp_path: Path) -> None:
    reference = make_encoder("bert")
    path = save(reference, tmp_path)
    # Far fewer tokens a step than the prompts have together, and than the longest has alone.
    with tower(path, max_prefill_tokens=100, chunked_prefill_size=32, page_size=16) as engine:
        for prompt, got in zip(PROMPTS, answers(engine, "cls"), strict=True):
            np.testing.assert_allclose(got, states_of(reference, prompt)[0], **TOLERANCE)
        pages = engine.memory.memory_object()["pages"]
        assert isinstance(pages, dict)
        assert (pages["used"], pages["cached"]) == (0, 0)


def test_two_ranks(tmp_path: Path) -> None:
    reference = make_encoder("bert")
    path = save(reference, tmp_path)
    with rank_towers(2, path) as towers:
        found = towers.run(lambda engine: [one.tolist() for one in answers(engine, "cls")])
        for prompt, got in zip(PROMPTS, found, strict=True):
            want = states_of(reference, prompt)[0]
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_old_names_and_heads_of_other_tasks(tmp_path: Path) -> None:
    reference = make_encoder("bert")
    path = save(reference, tmp_path)
    weights = {
        "bert." + name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): value
        for name, value in reference.state_dict().items()
    }
    weights["cls.predictions.bias"] = torch.zeros(VOCAB)
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with tower(path) as engine:
        (got,) = answers(engine, "cls")[:1]
        np.testing.assert_allclose(got, states_of(reference, PROMPTS[0])[0], **TOLERANCE)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"kv_canary": "chain"}, "--kv-canary: an encoder"),
        ({"json_model_override_args": '{"hidden_act": "gelu_new"}'}, "gelu_new"),
        (
            {"json_model_override_args": '{"position_embedding_type": "relative_key"}'},
            "relative_key",
        ),
        ({"json_model_override_args": '{"is_decoder": true}'}, "only encoders"),
    ],
)
def test_what_is_not_served_is_told_at_start(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    path = save(make_encoder("bert"), tmp_path)
    with pytest.raises(ValueError, match=told), tower(path, **changes):
        pass
