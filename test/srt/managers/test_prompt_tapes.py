"""Short prompts on tapes: the same tokens as without, alone, beside others and beside decoding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sglang.srt.model_executor import decode_tapes
from sglang.srt.model_executor.decode_tapes import StepShape
from sglang.srt.utils.native import native_kernels
from srt.managers.test_decode_tapes import RECORDED, tapes_of
from srt.managers.test_engine_tokens import DeviceTower, tower
from srt.models.hf_models import VOCAB, hf_greedy, make_hf_model, save

pytestmark = pytest.mark.skipif(native_kernels() is None, reason="sgl-kernel is not installed")

FEW = 5  # new tokens


def ids(count: int, seed: int) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(0, VOCAB, count).tolist()
    return found


PREFIX = ids(75, 1)
# Each goes on behind the same cached prefix, from its middle on, or has none.
PROMPTS = [
    *(PREFIX + ids(count, count) for count in (9, 16, 10, 12, 33, 40, 61)),
    *(PREFIX[:50] + ids(count, count) for count in (7, 23, 20)),
    *(ids(count, 100 + count) for count in (3, 8, 5, 64, 60)),
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[list[int]]]:
    reference = make_hf_model("llama")
    expected = [hf_greedy(reference, prompt, FEW) for prompt in PROMPTS]
    return save(reference, tmp_path_factory.mktemp("llama")), expected


def ask(engine: DeviceTower, name: str, prompt: list[int], **params: object) -> list[int]:
    engine.send(name, prompt, max_new_tokens=FEW, **params)
    engine.run()
    return engine.output(name)


@pytest.mark.parametrize("family", RECORDED)
def test_prompts_of_all_families(family: str, tmp_path: Path) -> None:
    """One after the other: windows, chunks, experts, and prefixes that end inside of a page."""
    changes = {"sliding_window": 50} if family == "mistral" else {}
    reference = make_hf_model(family, **changes)
    with tower(save(reference, tmp_path), page_size=16) as engine:
        ask(engine, "prefix", PREFIX)
        for number, prompt in enumerate(PROMPTS):
            expected = hf_greedy(reference, prompt, FEW)
            assert ask(engine, f"r{number}", prompt) == expected, number
        tapes = tapes_of(engine)
        assert not tapes.refused
        assert {shape.requests for shape in tapes.recorded_prompts} == {1}
        assert {shape.sampled for shape in tapes.recorded_prompts} == {1}
        lengths = {shape.tokens for shape in tapes.recorded_prompts}
        # Where a prefix may be used differs between windows; prompts without one are alike.
        assert lengths >= {8, 64}
        assert len(lengths) >= 3
        assert all(length % 8 == 0 and length <= 64 for length in lengths)


def test_a_shape_is_recorded_when_it_comes_again(llama: tuple[str, list[list[int]]]) -> None:
    path, _ = llama
    with tower(path) as engine:
        tapes = tapes_of(engine)
        for turn in range(4):
            ask(engine, f"r{turn}", ids(20 + turn, turn))
            assert tapes.recorded_prompts == ((StepShape(24, 1, 1),) if turn else ())
        ask(engine, "other", ids(90, 7))
        ask(engine, "long", ids(65, 8))
        assert tapes.recorded_prompts == (StepShape(24, 1, 1),)


def test_prompts_beside_others_and_beside_decoding(llama: tuple[str, list[list[int]]]) -> None:
    """Requests that come while others decode, several at a time, over and over."""
    path, expected = llama
    with tower(path, page_size=16, kv_segment_size=64) as engine:
        for turn in range(3):
            for first in range(0, len(PROMPTS), 3):
                for number in range(first, min(first + 3, len(PROMPTS))):
                    prompt = PROMPTS[number]
                    engine.send(f"r{turn}-{number}", prompt, max_new_tokens=FEW)
                engine.scheduler.turn()
                engine.scheduler.turn()
            engine.run()
            for number, tokens in enumerate(expected):
                assert engine.output(f"r{turn}-{number}") == tokens, (turn, number)
            engine.channel.outs.clear()
        shapes = tapes_of(engine).recorded_prompts
        assert any(shape.requests > 1 for shape in shapes)
        assert all(shape.sampled <= shape.requests <= 8 for shape in shapes)


def test_steps_that_want_more_than_samples(llama: tuple[str, list[list[int]]]) -> None:
    """Log probabilities of the prompt are not on a tape; those of the answer read its logits."""
    path, expected = llama
    prompt = PROMPTS[-1]
    with tower(path, disable_radix_cache=True) as engine:
        for start, shapes in ((0, ()), (len(prompt), (StepShape(64, 1, 1),))):
            for turn in range(3):
                name = f"r{start}-{turn}"
                engine.send(name, prompt, max_new_tokens=FEW)
                asked = engine.channel.inbox[-1]
                asked.return_logprob, asked.logprob_start_len = True, start
                engine.run()
                assert engine.output(name) == expected[-1]
            assert tapes_of(engine).recorded_prompts == shapes


def test_chunks_that_sample_nothing(llama: tuple[str, list[list[int]]]) -> None:
    path, expected = llama
    with tower(path, chunked_prefill_size=16, page_size=16) as engine:
        for turn in range(3):
            for number in (0, 7, 13):
                got = ask(engine, f"r{turn}-{number}", PROMPTS[number])
                assert got == expected[number]
        assert all(shape.sampled for shape in tapes_of(engine).recorded_prompts)


def test_tapes_give_way_to_others(
    llama: tuple[str, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, expected = llama
    monkeypatch.setattr(decode_tapes, "_PROMPT_TAPES", 2)
    with tower(path) as engine:
        for turn in range(3):
            for number in (10, 13, 7):
                got = ask(engine, f"r{turn}-{number}", PROMPTS[number])
                assert got == expected[number]
        tapes = tapes_of(engine)
        assert len(tapes.recorded_prompts) == 2
        last = tapes.recorded_prompts
        ask(engine, "again", PROMPTS[10])
        assert tapes.recorded_prompts != last


@pytest.mark.parametrize(
    "flags",
    [
        {"enable_fused_qk_norm_rope": True},
        {"kv_cache_dtype": "int8", "dtype": "bfloat16"},
        {"kv_cache_dtype": "fp8_e4m3", "dtype": "bfloat16"},
        {"quantization": "int8", "dtype": "bfloat16"},
    ],
    ids=lambda flags: ",".join(f"{k}={v}" for k, v in flags.items()),
)
def test_the_same_first_logits_as_call_by_call(
    llama: tuple[str, list[list[int]]], flags: dict[str, object]
) -> None:
    """Rounded caches and weights: log probabilities of first tokens, with tapes and without."""
    path, _ = llama
    found = []
    for off in (False, True):
        with tower(path, page_size=16, disable_cuda_graph=off, **flags) as engine:
            ask(engine, "prefix", PREFIX)
            for turn in range(3):  # call by call, recorded, played
                for count in (9, 33, 12, 60):
                    prompt = PREFIX + ids(count, 100 * turn + count)
                    engine.send(f"r{turn}-{count}", prompt, max_new_tokens=1)
                    asked = engine.channel.inbox[-1]
                    asked.return_logprob, asked.logprob_start_len = True, len(prompt)
                    engine.run()
            outs = {out.rid: out for out in engine.channel.outs if out.output_logprobs}
            found.append(
                {
                    rid: float(np.frombuffer(out.output_logprobs.logprobs, "<f4")[0])
                    for rid, out in outs.items()
                }
            )
            assert off or len(tapes_of(engine).recorded_prompts) >= 3
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) == 12
    for rid, value in found[0].items():
        assert abs(value - found[1][rid]) < 0.1, rid


def test_without_tapes(llama: tuple[str, list[list[int]]]) -> None:
    path, expected = llama
    with tower(path, disable_cuda_graph=True) as engine:
        for number in (0, 7, 13):
            assert ask(engine, f"r{number}", PROMPTS[number]) == expected[number]
    with tower(path, cuda_graph_max_bs=1) as engine:
        for turn in range(2):
            for number in (10, 11, 12):
                engine.send(f"r{turn}-{number}", PROMPTS[number], max_new_tokens=FEW)
            engine.run()
            assert engine.output(f"r{turn}-10") == expected[10]
        assert all(shape.requests == 1 for shape in tapes_of(engine).recorded_prompts)


def test_a_last_token_that_nobody_samples_beside_decoding(
    llama: tuple[str, list[list[int]]],
) -> None:
    """A cached prompt of which nothing is wanted: a row each, but fewer logits than rows."""
    path, expected = llama
    with tower(path, page_size=16) as engine:
        ask(engine, "first", PREFIX)
        engine.send("ahead", PROMPTS[1], max_new_tokens=40)
        for turn in range(5):
            engine.send(f"nothing{turn}", PREFIX[:65], max_new_tokens=0)
            engine.scheduler.turn()
            engine.scheduler.turn()
        engine.run()
        assert StepShape(2, 2, 1) in tapes_of(engine).recorded_prompts
        assert engine.output("ahead")[:FEW] == expected[1]
