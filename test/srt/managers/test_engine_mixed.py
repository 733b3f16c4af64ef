"""Gemma 3 and gpt-oss through the whole device tower: the same tokens as transformers.

Sliding and global layers take turns. Windows of 20 tokens meet pages and prefill chunks that align
with none of them; prompts are several windows long, and prefix hits fall on every offset around
window borders.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedModel

from srt.crossed import crossed
from srt.managers.test_engine_chunks import greedy
from srt.managers.test_engine_tokens import tower
from srt.managers.test_engine_windows import ask
from srt.models.hf_models import MIXED_FAMILIES, VOCAB, WINDOW, best_next, make_hf_model, save

PROMPTS: list[list[int]] = [
    np.random.default_rng(n).integers(0, VOCAB, n).tolist()
    for n in (1, WINDOW - 1, WINDOW, WINDOW + 1, 67, 130)
]
BASE: list[int] = np.random.default_rng(23).integers(0, VOCAB, 200).tolist()

Model = tuple[PreTrainedModel, str]


@pytest.fixture(scope="module", params=sorted(MIXED_FAMILIES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    reference = make_hf_model(request.param)
    return reference, save(reference, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def answers(model: Model) -> list[list[int]]:
    """What transformers says: far from one token over and over."""
    made = [greedy(model[0], prompt, 64) for prompt in PROMPTS]
    assert min(len(set(answer)) for answer in made) > 8
    return made


FLAGS: list[dict[str, object]] = [
    {"page_size": 1, "kv_segment_size": 64, "chunked_prefill_size": 17},
    {"page_size": 16, "kv_segment_size": 64, "chunked_prefill_size": 48},
    {"page_size": 64, "kv_segment_size": 64, "chunked_prefill_size": -1},
    {"page_size": 16, "kv_segment_size": 64, "kv_backing": "segment_table"},
]
BORDER = 4 * WINDOW
HITS: list[tuple[int, Sequence[int]]] = [
    (16, (BORDER - 1, BORDER, BORDER + 1, BORDER + 5)),
    (1, (BORDER - 1, BORDER, BORDER + 1)),
    (8, range(BORDER - 9, BORDER + 10)),
    (64, (127, 128, 129, 7 * WINDOW)),
]


@pytest.mark.parametrize(
    ("model", "flags"),
    crossed(sorted(MIXED_FAMILIES), FLAGS, each=2),
    indirect=["model"],
    scope="module",
    ids=str,
)
def test_tokens_equal_transformers(
    model: Model, answers: list[list[int]], flags: dict[str, object]
) -> None:
    with tower(model[1], **flags) as engine:
        for number, prompt in enumerate(PROMPTS):
            engine.send(f"r{number}", prompt)
            engine.scheduler.turn()
        engine.run()
        assert [engine.output(f"r{number}") for number in range(len(PROMPTS))] == answers
        groups = engine.memory.memory_object()["groups"]
        assert [(group["kind"], group["num_layers"]) for group in groups] == [
            ("full", 2),
            ("sliding", 2),
        ]


@pytest.mark.parametrize(
    ("model", "hits"),
    crossed(sorted(MIXED_FAMILIES), HITS),
    indirect=["model"],
    scope="module",
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else value,
)
def test_prefix_hits_around_window_borders(model: Model, hits: tuple[int, Sequence[int]]) -> None:
    reference, path = model
    page, lengths = hits
    flags = {"page_size": page, "kv_segment_size": 64, "chunked_prefill_size": 33}
    with tower(path, **flags) as engine:
        for length in lengths:
            prompt = BASE[:length]
            answer, _ = ask(engine, f"first{length}", prompt)
            assert answer == best_next(reference, prompt, answer)
            again, cached = ask(engine, f"again{length}", prompt)
            assert again == answer
            assert cached == (length - 1) // page * page, "a repeat hits at full length"
            longer = prompt + answer + [length % VOCAB, 5]
            turn, cached = ask(engine, f"turn{length}", longer)
            assert turn == best_next(reference, longer, turn)
            assert cached == (length + len(answer) - 1) // page * page
            engine.memory.audit()


@pytest.mark.parametrize("family", sorted(MIXED_FAMILIES))
def test_the_last_layer_slides(family: str, tmp_path: Path) -> None:
    """As in Gemma-3-27B: of a window layer, too, only the wanted rows are computed at the end."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    reference = make_hf_model(family, num_hidden_layers=3, layer_types=kinds)
    path = save(reference, tmp_path)
    for flags in ({"page_size": 1}, {"page_size": 16, "kv_backing": "segment_table"}):
        with tower(path, **flags, kv_segment_size=64, chunked_prefill_size=17) as engine:
            for number, prompt in enumerate(PROMPTS):
                engine.send(f"r{number}", prompt)
                engine.scheduler.turn()
            engine.run()
            for number, prompt in enumerate(PROMPTS):
                output = engine.output(f"r{number}")
                assert len(output) == 64
                assert output == best_next(reference, prompt, output)


def test_the_text_part_of_a_multimodal_gemma3(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    text = make_hf_model("gemma3")
    config = Gemma3Config(
        text_config=text.config.to_dict(), vision_config=vision, mm_tokens_per_image=4
    )
    whole = Gemma3ForConditionalGeneration(config)
    whole.model.language_model.load_state_dict(text.model.state_dict())
    path = save(whole, tmp_path)
    with caplog.at_level("INFO"), tower(path) as engine:
        engine.send("r", PROMPTS[4])
        engine.run()
        assert engine.output("r") == greedy(text, PROMPTS[4], 64)
    notes = [record.message for record in caplog.records if "vision" in record.message]
    assert len(notes) == 1
