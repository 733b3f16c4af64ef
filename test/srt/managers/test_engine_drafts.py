"""Drafts through the whole device tower: transformers' tokens, however often guesses are wrong.

In float32, where what a row computes does not depend on how many others its request has.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sglang.srt.layers.attention import torch_device_backend
from sglang.srt.managers.io_struct import LogprobArrays, TokenizedGenerateReqInput, int32_buffer
from sglang.srt.sampling.sampling_params import SamplingParams
from srt.constrained.grammar_cases import golden_tokenizer, vocabulary_message
from srt.crossed import mostly_slow
from srt.managers import test_engine_grammars
from srt.managers.draft_guesses import Follow, guess
from srt.managers.rank_towers import rank_towers
from srt.managers.test_engine_device import ASKED, numbers_of
from srt.managers.test_engine_tokens import NEW_TOKENS, PROMPTS, DeviceTower, answer_all, tower
from srt.models.hf_models import (
    FAMILIES,
    MIXED_FAMILIES,
    MOE_FAMILIES,
    best_next,
    hf_greedy,
    make_hf_model,
    save,
)
from srt.utils.fake_device import LateRuntime

DRAFTED = {"speculative_algorithm": "NGRAM"}
# They compute what every token's experts weigh; which of two alike comes first is a matter of sums.
BY_LOGITS = {*MOE_FAMILIES, *MIXED_FAMILIES}


def follow(prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> Follow:
    """What comes next of the one of these texts that begins like the tokens so far."""
    texts = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]

    def next_tokens(tokens: list[int], count: int) -> list[int]:
        text = next((text for text in texts if text[: len(tokens)] == tokens), [])
        found = text[len(tokens) : len(tokens) + count]
        return found + [1] * (count - len(found))

    return next_tokens


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[list[int]]]:
    reference = make_hf_model("llama")
    expected = [hf_greedy(reference, prompt, NEW_TOKENS) for prompt in PROMPTS]
    return save(reference, tmp_path_factory.mktemp("llama")), expected


EVERYDAY = ["llama", "mistral", "llama4", "gpt_oss"]


@pytest.mark.parametrize(
    "family", mostly_slow(EVERYDAY, sorted({*FAMILIES, *BY_LOGITS} - {*EVERYDAY}))
)
def test_families(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"sliding_window": 50} if family == "mistral" else {}
    reference = make_hf_model(family, **changes)
    expected = [hf_greedy(reference, prompt, NEW_TOKENS) for prompt in PROMPTS]
    guess(monkeypatch, follow(PROMPTS, expected))
    path = save(reference, tmp_path)
    with tower(path, page_size=16, kv_segment_size=64, **DRAFTED) as engine:
        answers = answer_all(engine)
        counters = engine.scheduler.counters
        assert counters.num_correct > 100
        assert counters.num_correct < counters.num_proposed
    if family in BY_LOGITS:
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            assert answer == best_next(reference, prompt, answer)
    else:
        assert answers == expected


@pytest.mark.parametrize(
    "flags",
    [
        {"kv_backing": "segment_table", "page_size": 16, "kv_segment_size": 64},
        {"page_size": 1, "kv_segment_size": 64, "chunked_prefill_size": 32},
        {"attention_backend": "torch_native", "disable_cuda_graph": True},
        {"page_size": 16, "kv_canary": "full"},
        {"page_size": 16, "kv_segment_size": 64, "max_total_tokens": 384},
    ],
    ids=lambda flags: ",".join(f"{k}={v}" for k, v in flags.items()),
)
def test_memory_of_every_kind(
    llama: tuple[str, list[list[int]]], flags: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, expected = llama
    monkeypatch.setattr("sglang.srt.managers.schedule_batch.CLIP_MAX_NEW_TOKENS", 2)
    guess(monkeypatch, follow(PROMPTS, expected))
    with tower(path, **DRAFTED, **flags) as engine:
        assert answer_all(engine) == expected
        assert engine.scheduler.counters.num_correct > 100
        assert (engine.scheduler.counters.num_retractions > 0) == ("max_total_tokens" in flags)


def test_a_text_that_repeats_is_drafted_from_itself(llama: tuple[str, list[list[int]]]) -> None:
    """No guesses: the real drafts. Random models fall into loops, which are drafted whole."""
    path, expected = llama
    with tower(path, max_running_requests=1, **DRAFTED) as engine:
        assert answer_all(engine) == expected
        counters = engine.scheduler.counters
        assert counters.generated_tokens == len(PROMPTS) * NEW_TOKENS
        assert counters.num_correct > 0


def send(engine: DeviceTower, number: int, prompt: list[int], **params: object) -> None:
    engine.channel.inbox.append(
        TokenizedGenerateReqInput(
            rid=f"r{number}",
            input_ids=memoryview(int32_buffer(prompt)),
            sampling_params=SamplingParams(**params),  # type: ignore[arg-type]
            return_logprob=number % 2 == 1,
            logprob_start_len=len(prompt),
            top_logprobs_num=number,
        )
    )


@pytest.mark.parametrize("late", [False, True], ids=["host", "device"])
def test_sampling_penalties_and_log_probabilities_are_those_without_drafts(
    llama: tuple[str, list[list[int]]], late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = llama
    params = {"temperature": 0.8, "top_p": 0.9, "sampling_seed": 12, "max_new_tokens": NEW_TOKENS}
    if late:
        for module in ("utils.native", "mem_cache.memory_pool"):
            monkeypatch.setattr(f"sglang.srt.{module}.native_kernels", lambda: None)
        monkeypatch.setattr(torch_device_backend, "RECORDED_TOKENS", 256)
    flags: dict[str, Any] = {"attention_backend": "torch_native", "page_size": 16}
    if late:
        flags |= {"device": "cuda", "cuda_graph_max_bs": 6, "kv_segment_size": 256}
    answers: list[list[int]] = []
    numbers: list[list[LogprobArrays | None]] = []
    for drafted in (False, True):
        if drafted:
            guess(monkeypatch, follow(PROMPTS, answers))
            flags |= DRAFTED
        with tower(path, runtime=LateRuntime() if late else None, **flags) as engine:
            for number, prompt in enumerate(PROMPTS):
                send(engine, number, prompt, **{**params, **ASKED[number]})
            engine.run()
            found = [engine.output(f"r{number}") for number in range(len(PROMPTS))]
            numbers.append(
                [out.output_logprobs for rid in ("r1", "r3") for out in outs_of(engine, rid)]
            )
            counters = engine.scheduler.counters
            assert (counters.num_correct > 25) == drafted
        if not drafted:
            answers = found
    assert found == answers
    for one, other in zip(*map(numbers_of, numbers), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def outs_of(engine: DeviceTower, rid: str) -> list[Any]:
    return [out for out in engine.channel.outs if out.rid == rid]


def test_grammars_hold_what_is_drafted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same texts as without drafts; what a grammar does not allow is a wrong guess."""
    message = vocabulary_message(golden_tokenizer(tmp_path, "bpe"))
    path = save(make_hf_model("llama", vocab_size=test_engine_grammars.VOCAB), tmp_path / "model")
    prompts = test_engine_grammars.HELD_PROMPTS
    answers: list[list[int]] = []
    for flags in ({}, DRAFTED):
        if flags:
            guess(monkeypatch, follow(prompts, answers))
        with tower(path, **flags) as engine:
            test_engine_grammars.send_held(engine, message)
            test_engine_grammars.run(engine)
            found = [engine.output(f"held{number}") for number in range(len(prompts))]
            if flags:
                assert engine.scheduler.counters.num_correct > 5
            else:
                answers = found
    assert found == answers
    assert all(len(answer) > 3 for answer in answers)


@pytest.mark.parametrize("flags", [{}, {"kv_parallel_size": 2}], ids=["tp", "kv"])
def test_two_ranks(
    llama: tuple[str, list[list[int]]], flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, expected = llama
    guess(monkeypatch, follow(PROMPTS, expected))
    with rank_towers(2, path, page_size=16, **DRAFTED, **flags) as towers:
        assert towers.run(answer_all) == expected
        assert towers.first.scheduler.counters.num_correct > 100
        towers.check()
