"""What is pooled of which step, and what may come from the cache."""

from __future__ import annotations

import numpy as np
import pytest

from sglang.srt.errors import InvariantError
from sglang.srt.managers.io_struct import (
    PoolingMode,
    PoolingSpec,
    TokenizedGenerateReqInput,
    int32_buffer,
)
from sglang.srt.managers.pooling_state import PoolingState
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("mode", "rows"),
    [
        ("last", [(0, 0), (4, 0), (9, 1)]),
        ("mean", [(0, 4), (4, 4), (8, 2)]),
        ("cls", [(0, 1), (4, 0), (8, 0)]),
    ],
)
def test_rows_of_three_chunks(mode: PoolingMode, rows: list[tuple[int, int]]) -> None:
    state = PoolingState(PoolingSpec(mode), 10)
    assert [state.rows(*chunk) for chunk in ((0, 4), (4, 4), (8, 2))] == rows


def test_a_mean_is_over_all_tokens() -> None:
    state = PoolingState(PoolingSpec("mean"), 4)
    part = np.array([1, 2], np.float32)
    state.add(part)
    part[:] = 100  # the worker's memory, which is used again
    state.add(np.array([3, 6], np.float32))
    assert state.vector().tolist() == [1.0, 2.0]
    state.clear()
    with pytest.raises(InvariantError, match="nothing of it was pooled"):
        state.vector()


@pytest.mark.parametrize(
    ("spec", "longest"),
    [
        (PoolingSpec("last"), 7),
        (PoolingSpec("mean"), 0),
        (PoolingSpec("cls"), 0),
        (PoolingSpec("last", whole=True), 0),
    ],
)
def test_the_longest_prefix_that_a_hit_may_cover(spec: PoolingSpec, longest: int) -> None:
    message = TokenizedGenerateReqInput(
        rid="r",
        input_ids=memoryview(int32_buffer(range(8))),
        sampling_params=SamplingParams(max_new_tokens=0),
        pooling=spec,
    )
    req = Req(message, 0, 0)
    assert req.max_prefix() == longest
    assert req.computes_whole is spec.whole
    assert req.second_from == 8
