"""Images through the whole device tower: transformers' tokens, whatever memory does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from sglang.srt.layers.attention import torch_device_backend
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput, int32_buffer
from sglang.srt.models.llama4_vision import VisionTower
from sglang.srt.multimodal.image_prompt import PlacedImages
from sglang.srt.multimodal.image_tiles import TiledImage
from sglang.srt.sampling.sampling_params import SamplingParams
from srt.managers.rank_towers import rank_towers
from srt.managers.test_engine_tokens import DeviceTower, tower
from srt.models.hf_models import CHUNK
from srt.models.hf_vision import (
    TEXT_IDS,
    TOKENS,
    draw_image,
    make_hf_vision_model,
    prompt_of,
    save_vision_model,
    vision_logits,
)
from srt.utils.fake_device import LateRuntime

NEW_TOKENS = 12
Parts = list[int | TiledImage]
FLAGS: dict[str, Any] = {"enable_multimodal": True, "page_size": 16, "kv_segment_size": 64}


def words(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, TEXT_IDS, count).tolist()


CAT, DOG, WIDE = draw_image(1), draw_image(2), draw_image(3, 2, 3)
PROMPTS: list[Parts] = [
    [*words(1, 5), CAT, *words(2, 9)],
    [WIDE, *words(3, 3)],
    words(4, 40),
    [*words(5, 20), CAT, *words(6, 3), WIDE, *words(7, 11), DOG],
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    reference = make_hf_vision_model()
    return save_vision_model(reference, tmp_path_factory.mktemp("llama4")), reference


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The pixels' bytes of every image that is encoded."""
    seen: list[int] = []
    encode = VisionTower.encode

    def noted(self: VisionTower, pixels: bytes, tick: Any) -> Any:
        seen.append(len(pixels))
        return encode(self, pixels, tick)

    monkeypatch.setattr(VisionTower, "encode", noted)
    return seen


def send(engine: DeviceTower, rid: str, parts: Parts, **changes: Any) -> PlacedImages:
    placed = prompt_of(parts)
    if engine.rank == 0:
        params = {"max_new_tokens": NEW_TOKENS, "temperature": 0.0}
        names = {"return_logprob", "logprob_start_len"} & changes.keys()
        fields = {name: changes.pop(name) for name in names}
        engine.channel.inbox.append(
            TokenizedGenerateReqInput(
                rid=rid,
                input_ids=memoryview(int32_buffer(placed.keys)),
                sampling_params=SamplingParams(**{**params, **changes}),
                images=placed.inputs,
                **fields,
            )
        )
    return placed


def answer_all(engine: DeviceTower) -> list[list[int]]:
    for number, parts in enumerate(PROMPTS):
        send(engine, f"r{number}", parts)
        engine.scheduler.turn()
    engine.run()
    return [engine.output(f"r{number}") for number in range(len(PROMPTS))]


def cached(engine: DeviceTower, rid: str) -> int:
    return next(out.cached_tokens for out in engine.channel.outs if out.rid == rid)


def best(reference: Any, parts: Parts, output: Sequence[int]) -> list[int]:
    """transformers' choice after each token before an output's."""
    ids = prompt_of(parts).ids.tolist()
    images = [part for part in parts if isinstance(part, TiledImage)]
    logits = vision_logits(reference, [*ids, *output], images)
    choices: list[int] = logits.argmax(-1)[len(ids) - 1 : -1].tolist()
    return choices


def check(reference: Any, answers: Sequence[list[int]]) -> None:
    for parts, answer in zip(PROMPTS, answers, strict=True):
        assert len(answer) == NEW_TOKENS
        assert answer == best(reference, parts, answer)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"chunked_prefill_size": 16, "page_size": 1},
        {"disable_overlap_schedule": True, "kv_canary": "full"},
    ],
    ids=["whole", "chunks", "canary"],
)
def test_tokens_are_those_of_transformers(
    model: tuple[str, Any], flags: dict[str, Any], encoded: list[int]
) -> None:
    path, reference = model
    with tower(path, **{**FLAGS, **flags}) as engine:
        check(reference, answer_all(engine))
    assert sorted(encoded) == sorted(
        len(part.pixels.tobytes())
        for parts in PROMPTS
        for part in parts
        if isinstance(part, TiledImage)
    ), "each image once, in however many chunks its tokens were computed"


def test_behind_a_device(model: tuple[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    path, reference = model
    for module in ("utils.native", "mem_cache.memory_pool"):
        monkeypatch.setattr(f"sglang.srt.{module}.native_kernels", lambda: None)
    monkeypatch.setattr(torch_device_backend, "RECORDED_TOKENS", 256)
    flags = {"device": "cuda", "attention_backend": "torch_native", "cuda_graph_max_bs": 6}
    sizes = {"kv_segment_size": 256, "chunked_prefill_size": 16}
    with tower(path, runtime=LateRuntime(), **{**FLAGS, **flags, **sizes}) as engine:
        check(reference, answer_all(engine))


def test_pictures_matter(model: tuple[str, Any]) -> None:
    path, _ = model
    with tower(path, **FLAGS) as engine:
        for rid, image in (("cat", CAT), ("dog", DOG)):
            send(engine, rid, [*words(1, 5), image, *words(2, 9)])
        engine.run()
        assert engine.output("cat") != engine.output("dog")


def test_the_same_image_shares_pages_and_another_does_not(
    model: tuple[str, Any], encoded: list[int]
) -> None:
    path, reference = model
    text, end = words(8, 30), words(9, 20)
    with tower(path, **{**FLAGS, "page_size": 1}, max_running_requests=1) as engine:
        for rid, image in (("a", WIDE), ("b", WIDE), ("c", draw_image(33, 2, 3))):
            parts: Parts = [*text, image, *end]
            placed = send(engine, rid, parts)
            engine.run()
            answer = engine.output(rid)
            assert answer == best(reference, parts, answer)
        assert cached(engine, "b") == len(placed.ids) - 1
        assert len(encoded) == 2, "what is cached needs no image"
        assert cached(engine, "c") == CHUNK, "the text before it, to where a chunk begins"


def test_a_second_turn_with_an_image_of_its_own(model: tuple[str, Any], encoded: list[int]) -> None:
    path, reference = model
    with tower(path, **FLAGS) as engine:
        first: Parts = [*words(10, 20), CAT, *words(11, 20)]
        send(engine, "one", first)
        engine.run()
        second: Parts = [*first, *engine.output("one"), *words(12, 5), WIDE, *words(13, 2)]
        send(engine, "two", second)
        engine.run()
        answer = engine.output("two")
        assert answer == best(reference, second, answer)
        assert cached(engine, "two") >= len(prompt_of(first).ids)
        assert len(encoded) == 2


def test_retracted_requests_encode_again(
    model: tuple[str, Any], encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, reference = model
    monkeypatch.setattr("sglang.srt.managers.schedule_batch.CLIP_MAX_NEW_TOKENS", 2)
    flags = {**FLAGS, "max_total_tokens": 128, "disable_radix_cache": True}
    parts: Parts = [*words(14, 10), CAT, *words(15, 10)]
    with tower(path, **flags) as engine:
        for number in range(4):
            send(engine, f"r{number}", parts, max_new_tokens=40)
        engine.run()
        assert engine.scheduler.counters.num_retractions > 0
        assert len(encoded) == 4 + engine.scheduler.counters.num_retractions
        for number in range(4):
            answer = engine.output(f"r{number}")
            assert len(answer) == 40
            assert answer == best(reference, parts, answer)


@pytest.mark.parametrize("flags", [{}, {"kv_parallel_size": 2}], ids=["tp", "kv"])
def test_two_ranks(model: tuple[str, Any], flags: dict[str, Any]) -> None:
    path, reference = model
    with rank_towers(2, path, **FLAGS, **flags) as towers:
        check(reference, towers.run(answer_all))
        towers.check()


def test_sampling_and_log_probabilities_see_tokens_of_the_vocabulary(
    model: tuple[str, Any],
) -> None:
    path, reference = model
    parts: Parts = [*words(16, 4), CAT, *words(17, 6)]
    with tower(path, **FLAGS) as engine:
        placed = send(
            engine,
            "r",
            parts,
            repetition_penalty=1.3,
            frequency_penalty=0.4,
            return_logprob=True,
            logprob_start_len=0,
        )
        engine.run()
        told = next(out.input_logprobs for out in engine.channel.outs if out.input_logprobs)
    assert np.frombuffer(told.token_ids, "<i4").tolist() == placed.ids.tolist()
    assert placed.ids.min() >= 0
    assert (placed.ids == TOKENS.patch).sum() == 4
    scores = vision_logits(reference, placed.ids.tolist(), [CAT]).log_softmax(-1)
    expected = scores[np.arange(len(placed.ids) - 1), placed.ids[1:]].numpy()
    np.testing.assert_allclose(np.frombuffer(told.logprobs, "<f4")[1:], expected, atol=2e-4)


def test_drafts(model: tuple[str, Any]) -> None:
    """Texts that repeat what stands before an image are drafted up to it."""
    path, reference = model
    with tower(path, speculative_algorithm="NGRAM", **FLAGS) as engine:
        check(reference, answer_all(engine))


def test_rows_are_let_go_with_the_last_token(model: tuple[str, Any]) -> None:
    path, _ = model
    with tower(path, **{**FLAGS, "chunked_prefill_size": 16}) as engine:
        send(engine, "r", [*words(18, 10), WIDE, *words(19, 10)])
        engine.scheduler.turn()
        (image,) = next(iter(engine.scheduler.requests())).images
        held = []
        while engine.scheduler.busy:
            engine.scheduler.turn()
            held.append(image.rows is not None)
        assert held.index(True) < len(held) - 1
        assert not held[-1]
