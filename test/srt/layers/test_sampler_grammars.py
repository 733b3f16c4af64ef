"""Samplers with grammars: on the host, and on a device that knows tokens before the host does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from sglang.srt.constrained.grammar import Grammar, Vocabulary
from sglang.srt.layers.device_sampler import DeviceSampler
from sglang.srt.layers.late_results import StepTold
from sglang.srt.layers.sampler import SampleOutput, Sampler
from sglang.srt.managers.io_struct import LogprobArrays
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.tokenizer.tokenizer import Tokenizer
from srt.constrained.grammar_cases import END, compiled, golden_tokenizer, vocabulary_of
from srt.layers.sampler_cases import NO_IDS, logits_of, spec_of
from srt.utils.fake_device import LateRuntime

V = 1600  # fewer than the tokenizer has, and no multiple of a mask's word
STEPS = 14


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return golden_tokenizer(tmp_path_factory.mktemp("vocabulary"), "bpe")


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return vocabulary_of(tokenizer, V)


def params(**fields: object) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "stop_token_ids": (END,), **fields})  # type: ignore[arg-type]


def admit(sampler: Sampler | DeviceSampler, row: int, p: SamplingParams, g: Grammar | None) -> None:
    matcher = None if g is None else g.matcher()
    sampler.admit(row, p, 5, NO_IDS, NO_IDS, matcher)


def test_the_best_allowed_token_is_taken(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Also where the highest logit of all is known beforehand."""
    sampler = Sampler()
    admit(sampler, 1, params(), compiled(vocabulary, "regex", "[0-9]{4}"))
    admit(sampler, 2, params(), None)
    text = ""
    for step in range(6):
        logits = torch.stack([logits_of(2 * step, V), logits_of(2 * step + 1, V)])
        best, tokens = logits.max(-1)
        before = logits.clone()
        out = sampler.sample(
            logits, [1, 2], [9, 9], [False] * 2, [None, None], highest=(best, tokens)
        )
        held, free = out.token_ids.tolist()
        assert free == int(before[1].argmax())
        assert out.failures == {}
        if held == END:
            break
        assert before[0, held] == before[0][torch.isfinite(logits[0])].max()
        text += tokenizer.token_bytes(held).decode()
    assert held == END
    assert len(text) == 4
    assert text.isdecimal()


def test_bias_and_penalties_choose_among_what_is_allowed(
    tokenizer: Tokenizer, vocabulary: Vocabulary
) -> None:
    (a,) = [i for i in range(V) if tokenizer.token_bytes(i) == b"a"]
    (b,) = [i for i in range(V) if tokenizer.token_bytes(i) == b"b"]
    sampler = Sampler()
    biased = params(logit_bias={a: 50.0, 99: 1e6})
    admit(sampler, 1, biased, compiled(vocabulary, "regex", "[ab]"))
    admit(sampler, 2, params(logit_bias={b: -1e6}), compiled(vocabulary, "regex", "b"))
    out = sampler.sample(torch.zeros(2, V), [1, 2], [0, 0], [False] * 2, [None] * 2)
    assert out.token_ids.tolist() == [a, b]


def test_logits_without_a_number_where_it_counts_fail_one_row(
    tokenizer: Tokenizer, vocabulary: Vocabulary
) -> None:
    sampler = Sampler()
    for row in (1, 2):
        admit(sampler, row, params(), compiled(vocabulary, "regex", "[0-9]+"))
    logits = torch.zeros(2, V)
    for token in range(V):
        if tokenizer.token_bytes(token).isdigit():
            logits[0, token] = float("nan")
    out = sampler.sample(logits, [1, 2], [0, 0], [False] * 2, [None] * 2)
    assert list(out.failures) == [0]
    assert out.invalid_rows == (0,)
    again = sampler.sample(torch.zeros(2, V), [1, 2], [1, 1], [False] * 2, [None] * 2)
    assert list(again.failures) == [0]


Said = tuple[list[int], list[LogprobArrays | None], dict[int, str]]


def on_host(out: SampleOutput) -> Said:
    return out.token_ids.tolist(), list(out.logprobs), dict(out.failures)


def on_device(out: SampleOutput) -> Said:
    assert out.late is not None
    told: StepTold = out.late.read(out.late.values.numpy())
    return told.token_ids.tolist(), told.logprobs, dict(out.failures)


def floats(packed: bytes) -> np.ndarray:
    return np.frombuffer(packed, "<f4")


ROWS: list[tuple[SamplingParams, str | None]] = [
    (params(), "[a-z]{2,9}"),
    (params(temperature=1.0, top_p=0.8, sampling_seed=3), "[A-Za-z ]+"),
    (params(), None),
    (params(repetition_penalty=1.5, frequency_penalty=0.4), "([a-z] )+"),
    (params(temperature=0.7, presence_penalty=1.0), "[0-9]{5}"),
    (params(temperature=1.0, top_k=3), None),
]


@pytest.mark.parametrize("counted_rows", [0, 1, 8])
def test_a_device_says_what_the_host_says(vocabulary: Vocabulary, counted_rows: int) -> None:
    """Step by step; `counted_rows` 0 leaves the rows with penalties to the host."""
    runtime = LateRuntime()
    host, device = Sampler(), DeviceSampler(runtime, counted_rows=counted_rows)
    grammars = [r and compiled(vocabulary, "regex", r) for _, r in ROWS]
    for sampler in (host, device):
        for row, ((p, _), grammar) in enumerate(zip(ROWS, grammars, strict=True)):
            admit(sampler, row, p, grammar or None)
    order: Sequence[int] = range(len(ROWS))
    for step in range(STEPS):
        if step == 5:
            order = [4, 1, 0, 3]  # rows change places; some are not sampled for a while
        if step == 8:
            order = range(len(ROWS))
        if step == 10:  # a row's next request begins anew
            for sampler in (host, device):
                sampler.drop(0)
                admit(sampler, 0, params(), compiled(vocabulary, "regex", "x[0-9]+"))
        logits = torch.stack([logits_of(100 * step + row, V) for row in order])
        specs = [spec_of(2, (5,)) if row % 2 else None for row in order]
        suppress = [step < 4] * len(order)
        args = (list(order), [step] * len(order), suppress, specs)
        expected = on_host(host.sample(logits.clone(), *args))
        with runtime.computing():
            found = on_device(device.sample(logits.clone(), *args))
        assert found[0] == expected[0], step
        assert found[2] == expected[2] == {}
        for mine, other in zip(found[1], expected[1], strict=True):
            assert (mine is None) == (other is None)
            if mine is not None and other is not None:
                assert mine.token_ids == other.token_ids
                np.testing.assert_allclose(floats(mine.logprobs), floats(other.logprobs), atol=1e-5)
                np.testing.assert_allclose(
                    floats(mine.top_logprobs), floats(other.top_logprobs), atol=1e-5
                )


def test_only_grammars_wait(vocabulary: Vocabulary) -> None:
    runtime = LateRuntime()
    sampler = DeviceSampler(runtime)
    admit(sampler, 1, params(), None)
    admit(sampler, 2, params(), compiled(vocabulary, "regex", "[a-z]+"))
    with runtime.computing():
        for step in range(3):
            sampler.sample(logits_of(step, V).unsqueeze(0), [1], [step], [False], [None])
        assert runtime.num_waits == 0
        for step in range(3):
            logits = torch.stack([logits_of(step, V), logits_of(step + 50, V)])
            sampler.sample(logits, [1, 2], [step] * 2, [False] * 2, [None] * 2)
            assert runtime.num_waits == step, "for the step before, not for its own"


def test_a_device_finds_what_it_should_not_have_said_a_step_later(
    tokenizer: Tokenizer, vocabulary: Vocabulary
) -> None:
    runtime = LateRuntime()
    sampler = DeviceSampler(runtime)
    admit(sampler, 2, params(), compiled(vocabulary, "regex", "[0-9]+"))
    logits = torch.zeros(1, V)
    for token in range(V):
        if tokenizer.token_bytes(token).isdigit():
            logits[0, token] = float("nan")
    with runtime.computing():
        first = sampler.sample(logits, [2], [0], [False], [None])
        assert dict(first.failures) == {}
        second = sampler.sample(torch.zeros(1, V), [2], [1], [False], [None])
        assert list(second.failures) == [0]
