"""What a recorded decode step is made of: sizes, padding, buffers; recording itself in pieces."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sglang.srt.model_executor.cuda_graph_runner import (
    StepInputs,
    capture_sizes,
    empty_geometry,
    padded_geometry,
    size_for,
)
from sglang.srt.model_executor.forward_batch_info import BatchGeometry, ForwardBatch, ForwardMode
from sglang.srt.utils.progress import Progress
from srt.layers.attention_cases import make_tables
from srt.utils.fake_device import LateRuntime


def test_sizes_are_few_dense_below_and_end_at_the_largest() -> None:
    assert capture_sizes(1) == (1,)
    assert capture_sizes(6) == (1, 2, 4, 6)
    assert capture_sizes(16) == (1, 2, 4, 8, 12, 16)
    assert capture_sizes(40) == (1, 2, 4, 8, 12, 16, 24, 32, 40)
    sizes = capture_sizes(256)
    assert sizes[-4:] == (208, 224, 240, 256)
    assert len(sizes) == 28
    assert list(sizes) == sorted(set(sizes))


def test_a_step_takes_the_next_larger_size() -> None:
    sizes = (1, 2, 4, 8)
    assert [size_for(rows, sizes) for rows in (1, 2, 3, 5, 8, 9)] == [1, 2, 4, 8, 8, None]


def decode_geometry(seq_lens: list[int]) -> BatchGeometry:
    count = len(seq_lens)
    lens = np.array(seq_lens, np.int64)
    tables = tuple(make_tables([(n - 1, 1) for n in seq_lens], 16, []))
    rows = np.arange(count, dtype=np.int64)
    return BatchGeometry(lens, lens - 1, np.ones(count, np.int64), rows, rows, (tables, tables), 16)


def test_rows_that_are_too_many_read_one_token_of_the_dump_page() -> None:
    geometry = padded_geometry(decode_geometry([40, 7, 90]), 5)
    assert geometry.seq_lens.tolist() == [40, 7, 90, 1, 1]
    assert geometry.extend_prefix_lens.tolist() == [39, 6, 89, 0, 0]
    assert geometry.extend_seq_lens.tolist() == [1] * 5
    assert geometry.q_starts.tolist() == geometry.logits_rows.tolist() == [0, 1, 2, 3, 4]
    for tables in geometry.block_tables:
        assert [table.page_ids.tolist() for table in tables[3:]] == [[0], [0]]
        assert tables[3].first_run == (0, 16)
        assert tables[3].first_position == 0
    everything = padded_geometry(empty_geometry(2, 16), 3)
    assert everything.seq_lens.tolist() == [1, 1, 1]
    assert len(everything.block_tables) == 2


def make_batch(rows: int, first: int) -> ForwardBatch:
    def numbers(offset: int) -> torch.Tensor:
        return torch.arange(first + offset, first + offset + rows)

    return ForwardBatch(
        forward_mode=ForwardMode.DECODE,
        input_ids=numbers(0),
        positions=numbers(100),
        geometry=decode_geometry([1] * rows),
        out_cache_loc=(numbers(200), numbers(300)),
        logits_rows=torch.arange(rows),
        token_to_kv_pool=None,
        attn_backend=None,
        attn_plan=None,
        progress=Progress(),
    )


def test_inputs_stay_where_they_are_and_padding_never_writes_to_a_slot_of_others() -> None:
    inputs = StepInputs(8, 2, torch.device("cpu"))
    seen = inputs.batch(8, empty_geometry(2, 16), None, None, None)
    address = seen.out_cache_loc[0].data_ptr()
    inputs.take(make_batch(7, 1000), 8)
    inputs.take(make_batch(3, 50), 4)
    assert seen.input_ids[:4].tolist() == [50, 51, 52, 0]
    assert seen.positions[:4].tolist() == [150, 151, 152, 0]
    assert seen.out_cache_loc[0][:4].tolist() == [250, 251, 252, 0]
    assert seen.out_cache_loc[1][:4].tolist() == [350, 351, 352, 0]
    assert seen.out_cache_loc[0].data_ptr() == address
    assert inputs.nbytes == 8 * 8 * 5
    again = inputs.batch(8, empty_geometry(2, 16), None, None, None)
    assert again.positions is not seen.positions  # what layers know a step by
    assert again.positions.data_ptr() == seen.positions.data_ptr()


def test_the_recorder_of_the_tests_is_as_strict_as_a_capture() -> None:
    """What the stand-in replays are tensor operations, and it refuses what a device would."""
    runtime = LateRuntime()
    x = torch.tensor([1.0, 2.0])
    state = {"factor": 3.0}
    with runtime.computing():
        replay, result = runtime.record(lambda: (x * state["factor"]).cumsum(0))
        x.copy_(torch.tensor([5.0, 6.0]))
        state["factor"] = 100.0  # Python does not run again
        replay()
        assert result.tolist() == [15.0, 33.0]
        for waits in (lambda: x[x > 5], lambda: x * float(x.sum()), lambda: x.nonzero()):
            with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
                runtime.record(waits)
