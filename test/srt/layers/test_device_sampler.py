"""Sampling on a device: the tokens that `Sampler` chooses, without waiting where that can be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang.srt.layers.device_sampler import DeviceSampler
from sglang.srt.layers.sampler import Sampler
from sglang.srt.model_executor.forward_batch_info import LogprobSpec
from sglang.srt.sampling.sampling_params import SamplingParams
from srt.layers.sampler_cases import NO_IDS, V, logits_of, spec_of
from srt.utils.fake_device import LateRuntime


@st.composite
def params(draw: st.DrawFn) -> SamplingParams:
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 2.0])),
        top_k=draw(st.sampled_from([-1, 1, 2, 7, V, V + 5])),
        top_p=draw(st.sampled_from([1.0, 0.9, 0.5, 0.01])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.2])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.5])),
        logit_bias=draw(st.sampled_from([{}, {}, {3: 4.0}])),
        stop_token_ids=[1, 2],
    )


@settings(deadline=None, max_examples=150)
@given(
    rows=st.lists(
        st.tuples(params(), st.integers(-5, 5), st.integers(0, 90), st.booleans(), st.booleans()),
        min_size=1,
        max_size=6,
    ),
    seed=st.integers(0, 50),
    ties=st.booleans(),
)
def test_chooses_what_the_host_chooses(
    rows: list[tuple[SamplingParams, int, int, bool, bool]], seed: int, ties: bool
) -> None:
    runtime = LateRuntime()
    host, device = Sampler(), DeviceSampler(runtime)
    for row, (each, number, _, _, _) in enumerate(rows):
        for sampler in (host, device):
            sampler.admit(row, each, number, NO_IDS, NO_IDS)
    order = list(range(len(rows)))
    positions = [row[2] for row in rows]
    hides = [row[3] for row in rows]
    specs: list[LogprobSpec | None] = [spec_of(2, (4,)) if row[4] else None for row in rows]
    for step in range(3):
        logits = torch.stack([logits_of(seed + 7 * step + i) for i in order])
        if ties:
            logits = logits.round()
        if step == 1:
            logits[0, 4] = float("nan")
        at = [position + step for position in positions]
        wanted = host.sample(logits.clone(), order, at, hides, specs)
        with runtime.computing():
            got = device.sample(logits.clone(), order, at, hides, specs)
        assert got.token_ids.tolist() == wanted.token_ids.tolist()
        assert got.invalid is not None
        assert tuple(got.invalid.nonzero().flatten().tolist()) == wanted.invalid_rows
        assert got.logprobs == wanted.logprobs


@pytest.mark.parametrize(
    ("one", "waits"),
    [
        (SamplingParams(temperature=0.0), 0),
        (SamplingParams(temperature=0.8, top_p=0.9, top_k=40, min_p=0.1), 0),
        (SamplingParams(temperature=0.8, repetition_penalty=1.1), 1),
    ],
)
def test_only_rows_that_edit_logits_wait(one: SamplingParams, waits: int) -> None:
    runtime = LateRuntime()
    sampler = DeviceSampler(runtime)
    for row in range(4):
        sampler.admit(row, one if row < 2 else SamplingParams(temperature=0.0), 1, NO_IDS, NO_IDS)
    logits = torch.stack([logits_of(i) for i in range(4)])
    with runtime.computing():
        sampler.sample(logits, range(4), [9] * 4, [False] * 4, [None] * 4)
    assert (runtime.num_fetches, runtime.num_waits) == (waits, waits)


def test_no_value_is_looked_at_and_nothing_is_left_on_the_host() -> None:
    """On tensors without values: reading one would raise, and so would joining the host's."""
    logits = torch.empty(3, V, device="meta")

    class Meta(LateRuntime):
        def move(self, tensors: object) -> list[torch.Tensor]:
            return [tensor.to("meta") for tensor in tensors]  # type: ignore[attr-defined]

    runtime = Meta()
    sampler = DeviceSampler(runtime)
    for row, heat in enumerate((0.0, 1.0, 0.5)):
        given_params = SamplingParams(temperature=heat, top_p=0.9 if row == 2 else 1.0)
        sampler.admit(row, given_params, 1, NO_IDS, NO_IDS)
    out = sampler.sample(logits, range(3), [9] * 3, [False] * 3, [None] * 3)
    assert out.token_ids.device.type == "meta"
    assert out.token_ids.shape == (3,)
    assert out.token_ids.dtype is torch.int64
    assert np.shape(out.invalid_rows) == (0,)
