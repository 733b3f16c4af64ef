from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang.srt.layers.sampler import Sampler
from sglang.srt.sampling.sampling_params import SamplingParams
from srt.layers.sampler_cases import NO_IDS, V, logits_of, sample_one, spec_of


def naive_edit(logits: torch.Tensor, p: SamplingParams, prompt: list[int], output: list[int]):
    want = logits.double().numpy().copy()
    for token in set(prompt) | set(output):
        factor = p.repetition_penalty
        want[token] = want[token] / factor if want[token] > 0 else want[token] * factor
    for token in set(output):
        want[token] -= p.frequency_penalty * output.count(token) + p.presence_penalty
    for token, bias in p.logit_bias.items():
        want[token] += bias
    return want


@settings(deadline=None, max_examples=60)
@given(
    prompt=st.lists(st.integers(0, V - 1), max_size=30),
    first=st.lists(st.integers(0, V - 1), max_size=10),
    repetition=st.sampled_from([1.0, 0.5, 1.4]),
    frequency=st.sampled_from([0.0, -0.5, 1.1]),
    presence=st.sampled_from([0.0, 0.9]),
    bias=st.dictionaries(st.integers(0, V - 1), st.floats(-5, 5), max_size=3),
)
def test_penalties_follow_every_token(
    prompt: list[int],
    first: list[int],
    repetition: float,
    frequency: float,
    presence: float,
    bias: dict[int, float],
) -> None:
    params = SamplingParams(
        temperature=0.0,
        repetition_penalty=repetition,
        frequency_penalty=frequency,
        presence_penalty=presence,
        logit_bias=bias,
    )
    sampler = Sampler()
    sampler.admit(0, params, 0, np.array(prompt, np.int32), np.array(first, np.int32))
    output = list(first)
    everything = spec_of(0, tuple(range(V)))
    for step in range(4):
        logits = logits_of(step)
        out = sampler.sample(logits.clone().unsqueeze(0), [0], [step], [False], [everything])
        want = torch.from_numpy(naive_edit(logits, params, prompt, output)).log_softmax(-1)
        arrays = out.logprobs[0]
        assert arrays is not None
        got = torch.frombuffer(bytearray(arrays.picked_logprobs), dtype=torch.float32)
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)
        output.append(int(out.token_ids[0]))
        assert output[-1] == int(want.argmax())


def test_more_distinct_tokens_than_the_first_room() -> None:
    params = SamplingParams(temperature=0.0, presence_penalty=2.0)
    sampler = Sampler()
    sampler.admit(0, params, 0, NO_IDS, NO_IDS)
    tokens = []
    for step in range(200):
        logits = torch.linspace(1.0, 0.0, 300).unsqueeze(0)
        tokens.append(int(sampler.sample(logits, [0], [step], [False], [None]).token_ids[0]))
    assert tokens == list(range(200))
    assert repr(sampler._rows[0]) == "SamplingRow(seed=0, prompt_tokens=0, output_tokens=200)"


def test_stop_tokens_are_hidden_until_the_minimum_is_reached() -> None:
    params = SamplingParams(temperature=0.0, stop_token_ids=(3, 8), min_new_tokens=2)
    logits = logits_of(0)
    logits[8], logits[3], logits[20] = 90.0, 80.0, 70.0
    assert sample_one(logits, params, suppress=True)[0] == 20
    assert sample_one(logits, params, suppress=False)[0] == 8
    warm = SamplingParams(temperature=1.0, stop_token_ids=(3, 8))
    drawn = {sample_one(logits, warm, suppress=True, position=p)[0] for p in range(50)}
    assert drawn == {20}


def test_bias_can_force_and_forbid() -> None:
    logits = logits_of(0)
    best = int(logits.argmax())
    forbid = SamplingParams(temperature=1.0, logit_bias={best: -1e6})
    assert all(sample_one(logits, forbid, position=p)[0] != best for p in range(100))
    force = SamplingParams(temperature=1.0, logit_bias={41: 1e6})
    assert all(sample_one(logits, force, position=p)[0] == 41 for p in range(20))
