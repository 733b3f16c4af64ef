"""`python -m sglang.bench_offline_throughput` with an engine of its own, and its arithmetic."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from e2e.server_process import demo_model
from sglang.bench.serving_load import LoadRequest
from sglang.bench_offline_throughput import main, offline_figures


def test_figures() -> None:
    figures = offline_figures([LoadRequest("a", 10, 3), LoadRequest("b", 20, 3)], 6, 2.0)
    assert figures == {
        "successful_requests": 2,
        "total_latency": 2.0,
        "total_input_tokens": 30,
        "total_output_tokens": 6,
        "request_throughput": 1.0,
        "input_throughput": 15.0,
        "output_throughput": 3.0,
        "total_throughput": 18.0,
    }


def test_one_batch_of_everything(tmp_path: Path) -> None:
    out, file = io.StringIO(), tmp_path / "runs.jsonl"
    flags = [
        "--model-path", demo_model(), "--kv-memory-budget", "256MiB", "--log-level", "error",
        "--dataset-name", "random", "--num-prompts", "5", "--random-input-len", "40",
        "--random-output-len", "4", "--random-range-ratio", "1", "--result-filename", str(file),
    ]  # fmt: skip
    assert main(flags, out) == 0
    (found,) = map(json.loads, file.read_text().splitlines())
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (200, 20)
    assert found["output_throughput"] == pytest.approx(20 / found["total_latency"])
    assert 0 < found["mapped_bytes"] <= found["budget_bytes"] == 256 << 20
    assert "Total generated tokens:                  20" in out.getvalue().splitlines()


def test_what_cannot_be_measured_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model-path", demo_model()]) == 1
    error = capsys.readouterr().err
    assert "--dataset-name sharegpt needs --dataset-path" in error
    assert error.count("\n") == 1
