from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.errors import InvariantError
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.logprobs import stable_topk
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead
from sglang.srt.managers.io_struct import LogprobArrays
from sglang.srt.model_executor.forward_batch_info import (
    BatchGeometry,
    ForwardBatch,
    ForwardMode,
    LogprobSpec,
)
from sglang.srt.utils.progress import Progress
from srt.utils.fake_device import LateRuntime

V, HIDDEN = 37, 8
NO_IDS = np.empty(0, np.int32)


def in_steps(values: torch.Tensor) -> torch.Tensor:
    """To 1/64: sums of their products are exact, whichever kernel takes how many rows."""
    return (values * 64).round() / 64


class RecordingHead(ParallelLMHead):
    """Counts the rows of every call."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(V, HIDDEN, parallel=ParallelState(), dtype=dtype)
        generator = torch.Generator().manual_seed(0)
        self.weight.data.copy_(in_steps(torch.randn(V, HIDDEN, generator=generator)))
        self.calls: list[int] = []

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.calls.append(hidden.shape[0])
        return super().forward(hidden)


def make_batch(kept: list[int], lens: list[int]) -> ForwardBatch:
    extend = np.array(lens, np.int64)
    geometry = BatchGeometry(
        seq_lens=extend,
        extend_prefix_lens=np.zeros_like(extend),
        extend_seq_lens=extend,
        q_starts=np.cumsum(extend) - extend,
        logits_rows=np.array(kept, np.int64),
        block_tables=((),),
        page_size=1,
    )
    total = torch.zeros(int(extend.sum()), dtype=torch.int64)
    nothing: Any = None
    return ForwardBatch(
        forward_mode=ForwardMode.MIXED,
        input_ids=total,
        positions=total,
        geometry=geometry,
        out_cache_loc=(total,),
        logits_rows=torch.from_numpy(geometry.logits_rows),
        token_to_kv_pool=nothing,
        attn_backend=nothing,
        attn_plan=nothing,
        progress=Progress(),
    )


def rows_of(arrays: LogprobArrays) -> dict[str, np.ndarray]:
    n = arrays.num_rows
    picked = np.frombuffer(arrays.picked_ids, "<i4")
    return {
        "ids": np.frombuffer(arrays.token_ids, "<i4"),
        "own": np.frombuffer(arrays.logprobs, "<f4"),
        "top_ids": np.frombuffer(arrays.top_ids, "<i4").reshape(n, arrays.top_num),
        "top": np.frombuffer(arrays.top_logprobs, "<f4").reshape(n, arrays.top_num),
        "picked": np.frombuffer(arrays.picked_logprobs, "<f4").reshape(n, len(picked)),
    }


@pytest.mark.parametrize("rows_per_block", [1, 3, 7, 20, 1000])
def test_blocks_of_any_size_equal_the_whole(rows_per_block: int) -> None:
    # Request 0: rows 2..13 of its 15 want logprobs and the last is sampled; request 1 only
    # samples; request 2 wants logprobs of a chunk that ends mid-prompt and samples nothing.
    kept = [*range(2, 15), 19, *range(20, 25)]
    batch = make_batch(kept, [15, 5, 5])
    head = RecordingHead()
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(len(kept), HIDDEN, generator=generator)
    rng = np.random.default_rng(0)
    targets = [rng.integers(0, V, 12).astype(np.int32), rng.integers(0, V, 5).astype(np.int32)]
    specs = [
        LogprobSpec(2, targets[0], True, 4, np.array([5, 0, 5], np.int32)),
        None,
        LogprobSpec(20, targets[1], False, 0, NO_IDS),
    ]
    processor = LogitsProcessor(max_bytes=rows_per_block * V * 12)
    out = processor(hidden, head, batch, specs, [12, 13])
    logits = hidden.double() @ head.weight.double().T
    torch.testing.assert_close(out.next_token_logits.double(), logits[[12, 13]], rtol=0, atol=1e-5)
    assert out.next_token_logits.dtype is torch.float32
    logprobs = logits.log_softmax(-1)
    first, none, third = out.input_logprobs
    assert none is None
    assert first is not None
    assert third is not None
    got = rows_of(first)
    assert got["ids"].tolist() == targets[0].tolist()
    want = logprobs[:12]
    np.testing.assert_allclose(got["own"], want[range(12), targets[0]], atol=1e-5)
    order = want.argsort(-1, descending=True)[:, :4]
    assert got["top_ids"].tolist() == order.tolist()
    np.testing.assert_allclose(got["top"], want.gather(-1, order), atol=1e-5)
    np.testing.assert_allclose(got["picked"], want[:, [5, 0, 5]], atol=1e-5)
    got = rows_of(third)
    np.testing.assert_allclose(got["own"], logprobs[14:][range(5), targets[1]], atol=1e-5)
    assert got["top"].shape == (5, 0)
    assert head.calls[0] == 2
    assert max(head.calls[1:]) <= rows_per_block
    assert (
        batch.progress.count
        == len(head.calls) - 1
        == -(-12 // rows_per_block) + -(-5 // rows_per_block)
    )


def test_bound_counts_what_the_logits_need_in_bf16() -> None:
    head = RecordingHead(torch.bfloat16)
    batch = make_batch(list(range(10)), [10])
    spec = LogprobSpec(0, np.zeros(10, np.int32), False, 1, NO_IDS)
    hidden = torch.randn(10, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()
    # 10 bytes an entry: bf16, float32 and one float32 temporary.
    out = LogitsProcessor(max_bytes=4 * V * 10)(hidden, head, batch, [spec], [])
    assert head.calls == [0, 4, 4, 2]
    assert out.next_token_logits.shape == (0, V)
    logits = torch.nn.functional.linear(hidden, head.weight).float()
    arrays = out.input_logprobs[0]
    assert arrays is not None
    assert rows_of(arrays)["top_ids"][:, 0].tolist() == logits.argmax(-1).tolist()


def test_a_block_never_falls_below_one_row() -> None:
    head = RecordingHead()
    batch = make_batch([0, 1, 2], [3])
    spec = LogprobSpec(0, np.zeros(2, np.int32), True, 0, NO_IDS)
    LogitsProcessor(max_bytes=1)(torch.zeros(3, HIDDEN), head, batch, [spec], [2])
    assert head.calls == [1, 1, 1]


def test_more_top_entries_than_the_vocabulary() -> None:
    batch = make_batch([0], [1])
    spec = LogprobSpec(0, np.zeros(1, np.int32), False, V + 10, NO_IDS)
    out = LogitsProcessor()(torch.ones(1, HIDDEN), RecordingHead(), batch, [spec], [])
    arrays = out.input_logprobs[0]
    assert arrays is not None
    assert arrays.top_num == V


def test_rows_that_were_not_kept_are_a_bug() -> None:
    batch = make_batch([0, 2, 3], [4])
    spec = LogprobSpec(0, np.zeros(3, np.int32), False, 0, NO_IDS)
    with pytest.raises(InvariantError, match=r"rows 0\+3"):
        LogitsProcessor()(torch.ones(3, HIDDEN), RecordingHead(), batch, [spec], [])


SPECS = [
    LogprobSpec(2, np.arange(12, dtype=np.int32), True, 4, np.array([5, 0, 5], np.int32)),
    None,
    LogprobSpec(20, np.arange(30, 35, dtype=np.int32), False, 0, NO_IDS),
    LogprobSpec(26, np.array([36], np.int32), True, V + 3, np.array([1], np.int32)),
]
KEPT = [*range(2, 15), 19, *range(20, 25), 26, 27]


@pytest.mark.parametrize("rows_per_block", [1, 3, 1000])
@pytest.mark.parametrize("ties", [False, True])
def test_a_late_device_tells_what_the_host_tells(rows_per_block: int, ties: bool) -> None:
    """In one copy that nobody has waited for, whatever the blocks."""
    batch, head = make_batch(KEPT, [15, 5, 6, 2]), RecordingHead()
    hidden = in_steps(torch.randn(len(KEPT), HIDDEN, generator=torch.Generator().manual_seed(1)))
    if ties:
        hidden[5:9] = 0.0
    rows = [12, 13, 20]
    expected = LogitsProcessor()(hidden, head, batch, SPECS, rows)
    assert expected.late is None
    runtime = LateRuntime()
    head.calls.clear()
    with runtime.computing():
        out = LogitsProcessor(rows_per_block * V * 40, runtime)(hidden, head, batch, SPECS, rows)
    assert runtime.num_waits == runtime.num_fetches == 0
    assert out.input_logprobs == [None] * 4
    assert torch.equal(out.next_token_logits, expected.next_token_logits)
    assert max(head.calls[1:]) <= max(3, rows_per_block * 40 // 12)
    assert out.late is not None
    assert out.late.values.dtype is torch.int32
    assert out.late.read(out.late.values.numpy()) == expected.input_logprobs


def test_more_than_a_block_may_take_does_not_pile_up() -> None:
    """All of the vocabulary for many rows: waited for, as on the host."""
    batch, head = make_batch(list(range(40)), [40]), RecordingHead()
    spec = LogprobSpec(0, np.zeros(40, np.int32), False, V, NO_IDS)
    hidden = in_steps(torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(1)))
    runtime = LateRuntime()
    found = []
    for max_bytes in (4 * 40 * (1 + 2 * V), 4 * 40 * (1 + 2 * V) - 1):
        with runtime.computing():
            out = LogitsProcessor(max_bytes, runtime)(hidden, head, batch, [spec], [])
        found.append(out)
    late, waited = found
    assert late.late is not None
    assert waited.late is None
    assert late.late.read(late.late.values.numpy()) == waited.input_logprobs


def test_where_no_prompt_is_asked_about_nothing_is_copied() -> None:
    runtime = LateRuntime()
    spec = LogprobSpec(3, NO_IDS, True, 2, NO_IDS)
    with runtime.computing():
        out = LogitsProcessor(runtime=runtime)(
            torch.ones(1, HIDDEN), RecordingHead(), make_batch([3], [4]), [spec], [0]
        )
    assert out.late is None
    assert out.input_logprobs == [None]
    assert runtime.num_moves == 0


def test_no_value_is_looked_at() -> None:
    """On tensors without values, which nobody could read."""

    class Meta(LateRuntime):
        def move(self, tensors: object) -> list[torch.Tensor]:
            return [tensor.to("meta") for tensor in tensors]  # type: ignore[attr-defined]

    hidden = torch.empty(len(KEPT), HIDDEN, device="meta")
    batch, head = make_batch(KEPT, [15, 5, 6, 2]), RecordingHead().to("meta")
    out = LogitsProcessor(runtime=Meta())(hidden, head, batch, SPECS, [12, 13, 20])
    assert out.late is not None
    assert out.late.values.shape == (12 * (1 + 2 * 4 + 3) + 5 + (1 + 2 * V + 1),)


@pytest.mark.parametrize("k", [0, 1, 5, 30])
def test_stable_topk_is_the_head_of_a_stable_sort(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    values = torch.randint(0, 4, (50, 30), generator=generator).float()
    values[0] = 1.0
    values[1, ::2] = float("-inf")
    top, ids = stable_topk(values, k)
    want, want_ids = values.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(top, want[:, :k])
    assert torch.equal(ids, want_ids[:, :k])
