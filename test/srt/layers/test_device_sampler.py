"""Sampling on a device: the tokens that `Sampler` chooses, without waiting where that can be."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang.srt.layers.device_sampler import DeviceSampler
from sglang.srt.layers.late_results import StepTold
from sglang.srt.layers.logprobs import topk_without_waiting
from sglang.srt.layers.sampler import SampleOutput, Sampler
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
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.5, -1.3])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 0.7])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3, 0.7])),
        logit_bias=draw(st.sampled_from([{}, {}, {3: 4.0}, {0: -2.5, 7: 1e6, 9: 0.3}])),
        stop_token_ids=[1, 2],
    )


ids = st.lists(st.integers(0, V - 1), max_size=12)


class Row(NamedTuple):
    params: SamplingParams
    seed: int
    position: int
    hides: bool
    spec: LogprobSpec | None
    prompt: list[int]
    output: list[int]

    def admit(self, row: int, *samplers: Sampler | DeviceSampler) -> None:
        seen = (np.array(self.prompt, np.int32), np.array(self.output, np.int32))
        for sampler in samplers:
            sampler.admit(row, self.params, self.seed, *seen)


@st.composite
def drawn_rows(draw: st.DrawFn) -> Row:
    spec = st.builds(
        spec_of,
        st.sampled_from([0, 2, V, V + 3]),
        st.sampled_from([(), (4,), (9, 0, 9)]),
    )
    return Row(
        draw(params()),
        draw(st.integers(-5, 5)),
        draw(st.integers(0, 90)),
        draw(st.booleans()),
        draw(st.none() | spec),
        draw(ids),
        draw(ids),
    )


def told(out: SampleOutput) -> StepTold:
    assert out.late is not None
    assert out.invalid_rows == ()
    return out.late.read(out.late.values.numpy())


def check_step(
    host: Sampler, device: DeviceSampler, runtime: LateRuntime, logits: torch.Tensor, **step: Any
) -> None:
    wanted = host.sample(logits.clone(), **step)
    with runtime.computing():
        out = device.sample(logits.clone(), **step)
    got = told(out)
    assert got.token_ids.tolist() == out.token_ids.tolist() == wanted.token_ids.tolist()
    assert got.invalid_rows == wanted.invalid_rows
    assert got.logprobs == wanted.logprobs


def check_choices(rows: list[Row], seed: int, ties: bool, counted_rows: int) -> None:
    runtime = LateRuntime()
    host, device = Sampler(), DeviceSampler(runtime, counted_rows=counted_rows)
    for number, row in enumerate(rows):
        row.admit(number, host, device)
    for step in range(4):
        order = list(range(step % 2, len(rows)))  # some rows of a batch wait a step
        if not order:
            continue
        logits = torch.stack([logits_of(seed + 7 * step + i) for i in order])
        if ties:
            logits = logits.round()
        if step == 1:
            logits[0, 4] = float("nan")
        check_step(
            host,
            device,
            runtime,
            logits,
            rows=order,
            positions=[rows[i].position + step for i in order],
            suppress_stop=[rows[i].hides for i in order],
            logprob_specs=[rows[i].spec for i in order],
        )
    waits = any(row.params.has_penalties for row in rows[counted_rows:])
    if not waits:
        assert runtime.num_fetches == 0


BATCHES = given(
    rows=st.lists(drawn_rows(), min_size=1, max_size=6),
    seed=st.integers(0, 50),
    ties=st.booleans(),
    counted_rows=st.sampled_from([0, 1, 6]),
)


@settings(deadline=None, max_examples=60)
@BATCHES
def test_chooses_what_the_host_chooses(
    rows: list[Row], seed: int, ties: bool, counted_rows: int
) -> None:
    check_choices(rows, seed, ties, counted_rows)


@pytest.mark.slow
@settings(deadline=None, max_examples=2000)
@BATCHES
def test_chooses_what_the_host_chooses_at_length(
    rows: list[Row], seed: int, ties: bool, counted_rows: int
) -> None:
    check_choices(rows, seed, ties, counted_rows)


@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_rows_come_and_go(data: st.DataObject) -> None:
    check_places(data)


@pytest.mark.slow
@settings(deadline=None, max_examples=600)
@given(data=st.data())
def test_rows_come_and_go_at_length(data: st.DataObject) -> None:
    check_places(data)


def check_places(data: st.DataObject) -> None:
    """A place that changes hands keeps nothing, and a row that found none is the host's."""
    runtime = LateRuntime()
    host, device = Sampler(), DeviceSampler(runtime, counted_rows=2)
    held: dict[int, Row] = {}
    for step in range(8):
        for number in range(4):
            action = data.draw(st.sampled_from(["keep", "keep", "drop", "admit", "both"]))
            if action in ("drop", "both"):
                held.pop(number, None)
                host.drop(number)
                device.drop(number)
            if action in ("admit", "both"):
                held[number] = data.draw(drawn_rows())
                held[number].admit(number, host, device)
        if held:
            check_step(
                host,
                device,
                runtime,
                torch.stack([logits_of(9 * step + number) for number in held]),
                rows=list(held),
                positions=[row.position + step for row in held.values()],
                suppress_stop=[row.hides for row in held.values()],
                logprob_specs=[row.spec for row in held.values()],
            )


@pytest.mark.parametrize(
    ("one", "counted_rows", "waits"),
    [
        (SamplingParams(temperature=0.0), 0, 0),
        (SamplingParams(temperature=0.8, top_p=0.9, top_k=40, min_p=0.1), 0, 0),
        (SamplingParams(logit_bias={3: 1.0}, stop_token_ids=[1]), 0, 0),
        (SamplingParams(temperature=0.8, repetition_penalty=1.1), 2, 0),
        (SamplingParams(temperature=0.8, repetition_penalty=1.1), 1, 1),
    ],
)
def test_only_rows_that_are_counted_on_the_host_wait(
    one: SamplingParams, counted_rows: int, waits: int
) -> None:
    runtime = LateRuntime()
    sampler = DeviceSampler(runtime, counted_rows=counted_rows)
    for row in range(4):
        sampler.admit(row, one if row < 2 else SamplingParams(temperature=0.0), 1, NO_IDS, NO_IDS)
    logits = torch.stack([logits_of(i) for i in range(4)])
    with runtime.computing():
        sampler.sample(logits, range(4), [9] * 4, [True] * 4, [spec_of(3)] * 4)
    assert (runtime.num_fetches, runtime.num_waits) == (waits, waits)


def test_the_first_of_equal_numbers_without_looking() -> None:
    values = torch.tensor([[0.0, -0.0, 3.0, -1.5, 3.0], [-math.inf, 1e-40, -1e-40, -2.0, math.inf]])
    for k in range(6):
        top, ids = topk_without_waiting(values, k)
        wanted, places = values.sort(dim=-1, descending=True, stable=True)
        assert ids.tolist() == places[:, :k].tolist()
        assert top.tolist() == wanted[:, :k].tolist()


def test_no_value_is_looked_at_and_nothing_is_left_on_the_host() -> None:
    """On tensors without values: reading one would raise, and so would joining the host's."""
    logits = torch.empty(3, V, device="meta")

    class Meta(LateRuntime):
        def move(self, tensors: object) -> list[torch.Tensor]:
            return [tensor.to("meta") for tensor in tensors]  # type: ignore[attr-defined]

    runtime = Meta()
    runtime.device = torch.device("meta")
    sampler = DeviceSampler(runtime)
    bias = {3: 1.0, 5: -2.0}
    for row, heat in enumerate((0.0, 1.0, 0.5)):
        given_params = SamplingParams(
            temperature=heat,
            top_p=0.9 if row == 2 else 1.0,
            frequency_penalty=0.1 * row,
            repetition_penalty=1.2,
            logit_bias=bias,
            stop_token_ids=[2],
        )
        seen = np.array([4, 4, 1], np.int32)
        sampler.admit(row, given_params, 1, seen, seen)
    specs = [None, spec_of(2, (1, 2)), spec_of(5)]
    out = sampler.sample(logits, range(3), [9] * 3, [False, True, True], specs)
    assert out.token_ids.device.type == "meta"
    assert out.token_ids.shape == (3,)
    assert out.token_ids.dtype is torch.int64
    assert out.late is not None
    assert out.late.values.device.type == "meta"
    # Tokens, what was invalid; of two rows the own number, five ids and five numbers; two named.
    assert out.late.values.shape == (3 + 3 + 2 * (1 + 5 + 5) + 2,)
