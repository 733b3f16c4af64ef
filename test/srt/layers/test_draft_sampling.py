"""Places that are sampled together or in turn: what a request gets is what it would get alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from sglang.srt.layers.device_sampler import DeviceSampler
from sglang.srt.layers.draft_sampling import Places, sample_places
from sglang.srt.layers.sampler import Sampler
from sglang.srt.model_executor.forward_batch_info import LogprobSpec
from sglang.srt.sampling.sampling_params import SamplingParams
from srt.utils.fake_device import LateRuntime

VOCAB = 50
NO_IDS = np.empty(0, np.int32)
PARAMS = {
    1: SamplingParams(temperature=0.0),
    2: SamplingParams(temperature=0.9, top_p=0.8),
    3: SamplingParams(temperature=0.0, frequency_penalty=1.5, repetition_penalty=1.3),
    4: SamplingParams(temperature=1.2, presence_penalty=0.7),
    5: SamplingParams(temperature=0.0, min_new_tokens=3, stop_token_ids=(7, 8)),
}
NUM_PLACES = 4


def admitted(sampler: Sampler | DeviceSampler) -> Sampler | DeviceSampler:
    for row, params in PARAMS.items():
        sampler.admit(row, params, 100 + row, np.array([1, 2, 3], np.int32), NO_IDS)
    return sampler


def logits_of(row: int) -> torch.Tensor:
    return torch.randn(NUM_PLACES, VOCAB, generator=torch.Generator().manual_seed(row)) * 3


def one_by_one(row: int) -> list[int]:
    """What `row` says when it is given its rows of logits one at a time."""
    sampler = admitted(Sampler())
    said = []
    for place in range(NUM_PLACES):
        logits = logits_of(row)[place : place + 1]
        hides = place < PARAMS[row].min_new_tokens
        said += sampler.sample(logits, [row], [10 + place], [hides], [None]).token_ids.tolist()
    return said


def together(
    sampler: Sampler | DeviceSampler, rows: Sequence[int], wrong_at: int | None
) -> list[list[int]]:
    """All rows, drafted with what they would say, but for the place `wrong_at`."""
    expected: list[int] = []
    for row in rows:
        draft = one_by_one(row)[: NUM_PLACES - 1]
        if wrong_at is not None:
            draft[wrong_at] = (draft[wrong_at] + 1) % VOCAB
        expected += [*draft, -1]
    spec = LogprobSpec(0, NO_IDS, True, 2, NO_IDS)
    places = Places(
        [row for row in rows for _ in range(NUM_PLACES)],
        [10 + place for _ in rows for place in range(NUM_PLACES)],
        [place < PARAMS[row].min_new_tokens for row in rows for place in range(NUM_PLACES)],
        [spec if row == rows[0] else None for row in rows for _ in range(NUM_PLACES)],
        expected,
    )
    out = sample_places(sampler, torch.cat([logits_of(row) for row in rows]), places, None)
    if out.late is None:
        have = [found is not None for found in out.logprobs[:NUM_PLACES]]
        assert have == [token >= 0 for token in out.token_ids[:NUM_PLACES].tolist()]
    return out.token_ids.reshape(len(rows), NUM_PLACES).tolist()


@pytest.mark.parametrize("wrong_at", [None, 0, 2])
@pytest.mark.parametrize("rows", [(1,), (3,), (2, 1), (1, 3, 2, 4, 5), (4, 3)])
def test_tokens_up_to_the_first_wrong_guess_are_the_same(
    rows: tuple[int, ...], wrong_at: int | None
) -> None:
    found = together(admitted(Sampler()), rows, wrong_at)
    for row, said in zip(rows, found, strict=True):
        count = NUM_PLACES if wrong_at is None else wrong_at + 1
        assert said[:count] == one_by_one(row)[:count]
        if PARAMS[row].has_penalties:
            assert said[count:] == [-1] * (NUM_PLACES - count), "not reached"


def test_penalties_count_only_what_was_taken() -> None:
    sampler = admitted(Sampler())
    (said,) = together(sampler, (3,), 1)
    alone = admitted(Sampler())
    for place in range(2):
        alone.sample(logits_of(3)[place : place + 1], [3], [10 + place], [False], [None])
    seen, twin = sampler.state(3).seen(), alone.state(3).seen()
    assert [a.tolist() for a in seen] == [a.tolist() for a in twin]
    assert said[2:] == [-1, -1]


def test_on_a_device_all_places_are_sampled_at_once() -> None:
    runtime = LateRuntime()
    sampler = admitted(DeviceSampler(runtime))
    assert [sampler.remembers(row) for row in PARAMS] == [False, False, True, True, False]
    with runtime.computing():
        found = together(sampler, (1, 2, 5), 2)
    for row, said in zip((1, 2, 5), found, strict=True):
        assert said[:3] == one_by_one(row)[:3]
