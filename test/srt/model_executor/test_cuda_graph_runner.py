"""What a recorded decode step is made of: sizes, padding, buffers; recording itself in pieces."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sglang.srt.model_executor.cuda_graph_runner import (
    CudaGraphRunner,
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
        for waits in (
            lambda: x[x > 5],
            lambda: x * float(x.sum()),
            lambda: x * x.sum().item(),
            lambda: x if x.sum() > 0 else -x,
            lambda: torch.tensor(x.tolist()),
            lambda: x.nonzero(),
        ):
            for mode in (False, True):
                refused = pytest.raises(RuntimeError, match="not permitted when stream is captur")
                with torch.inference_mode(mode), refused:
                    runtime.record(waits)


class BreaksOff(LateRuntime):
    """A capture that ends with an error of its own once something inside was refused."""

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        try:
            return super().record(work)
        finally:
            raise RuntimeError("the capture was broken off")


def make_runner(
    runtime: LateRuntime, model: Callable[[ForwardBatch], torch.Tensor]
) -> CudaGraphRunner:
    backend = SimpleNamespace(plan_recorded=lambda geometry: geometry)
    with_head = SimpleNamespace(lm_head=lambda hidden: hidden)

    class Model:
        lm_head = staticmethod(with_head.lm_head)

        def __call__(self, batch: ForwardBatch) -> torch.Tensor:
            return model(batch)

    return CudaGraphRunner(
        Model(),  # type: ignore[arg-type]
        runtime,
        None,
        backend,
        sizes=(1, 2),
        num_groups=1,
        page_size=16,
    )


def test_nothing_is_computed_before_other_streams_are_done() -> None:
    """Buffers are filled on the default stream, for which the compute stream does not wait."""
    runtime = LateRuntime()
    syncs: list[int] = []

    def model(batch: ForwardBatch) -> torch.Tensor:
        syncs.append(runtime.num_syncs)
        return batch.input_ids.unsqueeze(-1) * 2.0

    runner = make_runner(runtime, model)
    runner.record()
    assert runner.recorded == (1, 2)
    assert syncs[0] == 1


def test_the_log_names_what_broke_a_capture_off(caplog: pytest.LogCaptureFixture) -> None:
    runner = make_runner(BreaksOff(), lambda batch: batch.input_ids * float(batch.input_ids.sum()))
    with caplog.at_level(logging.WARNING):
        runner.record()
    assert runner.recorded == ()
    assert "not recorded as graphs: operation not permitted when stream is captu" in caplog.text
