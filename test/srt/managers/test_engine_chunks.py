"""Llama 4 and Qwen3-MoE through the whole device tower: the same tokens as transformers.

Chunks of 24 tokens meet pages and prefill chunks that align with none of them; prefix hits fall on
every offset around a chunk's border.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from srt.managers.test_engine_tokens import tower
from srt.managers.test_engine_windows import ask
from srt.models.hf_models import CHUNK, VOCAB, best_next, make_hf_model, save

PROMPTS: list[list[int]] = [
    np.random.default_rng(n).integers(0, VOCAB, n).tolist() for n in (1, CHUNK, 50, 130)
]
BASE: list[int] = np.random.default_rng(17).integers(0, VOCAB, 200).tolist()
PAGE = 8

Model = tuple[PreTrainedModel, str]


def greedy(reference: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """Without a cache: every step computes the whole sequence, masks and all."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            logits = reference(torch.tensor([tokens]), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def llama4(tmp_path_factory: pytest.TempPathFactory) -> Model:
    reference = make_hf_model("llama4")
    return reference, save(reference, tmp_path_factory.mktemp("llama4"))


@pytest.fixture(scope="module")
def answers(llama4: Model) -> list[list[int]]:
    return [greedy(llama4[0], prompt, 64) for prompt in PROMPTS]


@pytest.mark.parametrize(
    "flags",
    [
        {"page_size": 1, "kv_segment_size": 64, "chunked_prefill_size": 17},
        {"page_size": 16, "kv_segment_size": 64, "chunked_prefill_size": 32},
        {"page_size": 64, "kv_segment_size": 64, "chunked_prefill_size": -1},
        {"page_size": 16, "kv_segment_size": 64, "kv_backing": "segment_table"},
    ],
    ids=str,
)
def test_llama4_equals_transformers(
    llama4: Model, answers: list[list[int]], flags: dict[str, object]
) -> None:
    with tower(llama4[1], **flags) as engine:
        for number, prompt in enumerate(PROMPTS):
            engine.send(f"r{number}", prompt)
            engine.scheduler.turn()
        engine.run()
        assert [engine.output(f"r{number}") for number in range(len(PROMPTS))] == answers
        kinds = [group["kind"] for group in engine.memory.memory_object()["groups"]]
        assert kinds == ["full", "chunked"]


VARIANTS: list[dict[str, Any]] = [
    {"use_qk_norm": False},
    {"attn_temperature_tuning": False},
    {"num_experts_per_tok": 2},
    {"interleave_moe_layer_step": 1},
    {"moe_layers": [0, 3]},
    {"no_rope_layers": [0, 1, 1, 0]},
    {"no_rope_layers": [1, 0, 1, 1]},
    {"layer_types": ["full_attention", "chunked_attention"] * 2},
    {
        "no_rope_layers": [1, 1, 0, 1],
        "num_experts_per_tok": 3,
        "interleave_moe_layer_step": 1,
        "use_qk_norm": False,
    },
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_variants_of_llama4_equal_transformers(
    answers: list[list[int]], changes: dict[str, Any], tmp_path: Path
) -> None:
    """Where the last layer is a chunked one, only the wanted rows of it are computed."""
    reference = make_hf_model("llama4", **changes)
    path = save(reference, tmp_path)
    chunked = reference.config.layer_types.count("chunked_attention")
    for flags in ({"page_size": 1}, {"page_size": 16, "kv_backing": "segment_table"}):
        with tower(path, **flags, kv_segment_size=64, chunked_prefill_size=17) as engine:
            for number, prompt in enumerate(PROMPTS):
                engine.send(f"r{number}", prompt)
                engine.scheduler.turn()
            engine.run()
            outputs = [engine.output(f"r{number}") for number in range(len(PROMPTS))]
            for prompt, output in zip(PROMPTS, outputs, strict=True):
                assert len(output) == 64
                assert output == best_next(reference, prompt, output)
            assert outputs != answers, "the change matters"
            groups = engine.memory.memory_object()["groups"]
            assert {group["kind"]: group["num_layers"] for group in groups} == {
                "full": 4 - chunked,
                "chunked": chunked,
            }


def test_some_variant_ends_with_a_chunked_layer() -> None:
    kinds = {make_hf_model("llama4", **changes).config.layer_types[-1] for changes in VARIANTS}
    assert kinds == {"full_attention", "chunked_attention"}


def test_the_text_part_of_a_multimodal_checkpoint(
    llama4: Model, answers: list[list[int]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reference, path = llama4
    tensors = {f"language_model.{k}": v.clone() for k, v in reference.state_dict().items()}
    tensors |= {"vision_model.a.weight": torch.ones(2), "multi_modal_projector.b": torch.ones(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    text = json.loads((Path(path) / "config.json").read_text())
    raw = {"architectures": ["Llama4ForConditionalGeneration"], "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with caplog.at_level("INFO"), tower(str(tmp_path)) as engine:
        engine.send("r", PROMPTS[2])
        engine.run()
        assert engine.output("r") == answers[2]
    notes = [record.message for record in caplog.records if "vision" in record.message]
    assert notes == ["Only text is served: 2 vision weights of the model are not used."]


def test_prefix_hits_around_a_chunk_border(llama4: Model) -> None:
    reference, path = llama4
    flags = {"page_size": PAGE, "kv_segment_size": 64, "chunked_prefill_size": 32}
    with tower(path, **flags) as engine:
        for length in range(4 * CHUNK - PAGE - 1, 4 * CHUNK + PAGE + 2):
            prompt = BASE[:length]
            answer, _ = ask(engine, f"first{length}", prompt)
            assert answer == best_next(reference, prompt, answer)
            again, cached = ask(engine, f"again{length}", prompt)
            assert again == answer
            assert cached == (length - 1) // PAGE * PAGE, "a repeat hits at full length"
            longer = prompt + answer + [length % VOCAB, 5]
            turn, _ = ask(engine, f"turn{length}", longer)
            assert turn == best_next(reference, longer, turn)
            engine.memory.audit()


def test_qwen3_moe_equals_transformers(tmp_path: Path) -> None:
    reference = make_hf_model("qwen3_moe")
    path = save(reference, tmp_path)
    with tower(path, page_size=16, kv_segment_size=64, chunked_prefill_size=32) as engine:
        for number, prompt in enumerate(PROMPTS):
            engine.send(f"r{number}", prompt)
            engine.scheduler.turn()
        engine.run()
        for number, prompt in enumerate(PROMPTS):
            output = engine.output(f"r{number}")
            assert len(output) == 64
            assert output == best_next(reference, prompt, output)
