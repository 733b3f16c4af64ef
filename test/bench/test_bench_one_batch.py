"""`python -m sglang.bench_one_batch` on a tiny model with dummy weights."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang.bench.batch_run import BatchRunner, BatchSize
from sglang.bench_one_batch import main
from sglang.srt.environ import Environ
from sglang.srt.server_args import prepare_server_args
from sglang.srt.utils.native import native_kernels
from srt.models.hf_models import make_hf_model


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = tmp_path_factory.mktemp("tiny")
    make_hf_model("llama").config.save_pretrained(path)
    return [
        "--model-path", str(path), "--load-format", "dummy", "--dtype", "float32",
        "--kv-memory-budget", "64MiB", "--max-running-requests", "4",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def runner(flags: list[str]) -> Iterator[BatchRunner]:
    runner = BatchRunner(prepare_server_args(flags), Environ())
    yield runner
    runner.close()


def test_times_add_up(runner: BatchRunner) -> None:
    found = runner.run(BatchSize(batch_size=3, input_len=40, output_len=5))
    assert len(found.decode_s) == 4
    assert found.prefill_s > 0
    assert found.prefill_s + sum(found.decode_s) <= found.total_s
    assert len(found.forward_s) >= 4
    assert found.cached_tokens == 0, "what an earlier batch left is flushed"
    figures = found.as_dict()
    assert figures["prefill_throughput"] == pytest.approx(120 / found.prefill_s)
    assert figures["overall_throughput"] == pytest.approx(135 / found.total_s)
    assert figures["median_decode_throughput"] == pytest.approx(3 / found.median_decode_s)


def test_one_token_is_no_decode(runner: BatchRunner) -> None:
    found = runner.run(BatchSize(batch_size=1, input_len=4, output_len=1))
    assert found.decode_s == ()
    assert found.as_dict()["median_decode_throughput"] == 0.0


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (BatchSize(0, 4, 4), "at least 1"),
        (BatchSize(1, 10**6, 1), "exceed the context length"),
        (BatchSize(5, 4, 4), "exceed --max-running-requests 4"),
    ],
)
def test_sizes_that_do_not_fit(runner: BatchRunner, size: BatchSize, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        runner.run(size)


def test_the_command(flags: list[str], tmp_path: Path) -> None:
    results, out = tmp_path / "results.jsonl", io.StringIO()
    own = "--batch-size 1 2 --input-len 8 --output-len 3 --repeats 1 --run-name tiny --profile"
    status = main([*own.split(), "--result-filename", str(results), *flags], out)
    assert status == 0
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(line["run_name"], line["batch_size"]) for line in lines] == [("tiny", 1), ("tiny", 2)]
    text = out.getvalue()
    assert "Batch 2, 8 tokens in, 3 out" in text
    assert "Prefill of 1 x 8 tokens" in text
    assert "A decode step of 1 rows" in text
    assert "LlamaAttention" in text
    assert "(scheduler, beside the forward)" in text
    if native_kernels() is not None:
        rows = text.partition("A recorded decode step of 1 rows")[2].splitlines()[2:]
        calls = {row.split()[0]: int(row.split()[1]) for row in rows}
        assert calls["attention"] == 3
        assert calls["linear"] == 4 * 3 + 1


def test_what_can_not_be_run_is_one_line(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--batch-size", "9", "--input-len", "8", *flags], io.StringIO()) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "bench_one_batch: 9 requests exceed --max-running-requests 4"
    )
