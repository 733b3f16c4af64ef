"""`python -m sglang.bench_serving` against the real server."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from e2e.server_process import ServerProcess
from sglang.bench_serving import main


def run(server: ServerProcess, *flags: str) -> tuple[int, str]:
    out = io.StringIO()
    code = main(["--base-url", server.url, "--disable-tqdm", *flags], out)
    return code, out.getvalue()


def test_all_backends_measure_the_same_load(server: ServerProcess, tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    flags = ["--num-prompts", "6", "--random-input-len", "30", "--random-output-len", "5"]
    flags += ["--random-range-ratio", "1", "--output-file", str(file), "--output-details"]
    for backend in ("sglang", "sglang-oai", "sglang-oai-chat"):
        code, text = run(server, "--backend", backend, "--dataset-name", "random", *flags)
        assert code == 0
        assert "Successful requests:                     6" in text.splitlines()
    runs = [json.loads(line) for line in file.read_text().splitlines()]
    for found in runs:
        assert (found["completed"], found["total_output_tokens"]) == (6, 30)
        assert 5 * 30 <= found["total_input_tokens"] <= 6 * 30
        assert found["total_input_tokens"] == sum(found["input_lens"])
        assert all(ttft > 0 for ttft in found["ttfts"])
        assert found["request_rate"] == "inf"
        memory = found["memory"]
        assert 0 < memory["mapped_bytes_max"] <= memory["budget_bytes"]
    assert runs[0]["generated_texts"] == runs[1]["generated_texts"]


def test_exact_lengths_with_a_cap_and_a_flush(server: ServerProcess, tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    code, _ = run(
        server, "--dataset-name", "generated-shared-prefix", "--gsp-num-groups", "2",
        "--gsp-prompts-per-group", "2", "--gsp-system-prompt-len", "70", "--gsp-question-len", "5",
        "--gsp-output-len", "3", "--tokenize-prompt", "--max-concurrency", "1", "--flush-cache",
        "--disable-stream", "--output-file", str(file), "--request-rate", "500",
    )  # fmt: skip
    assert code == 0
    (found,) = map(json.loads, file.read_text().splitlines())
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (300, 12)
    assert found["max_concurrent_requests"] == 1
    assert found["concurrency"] <= 1
    assert "ttfts" not in found


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ((), "--dataset-name sharegpt needs --dataset-path"),
        (("--dataset-name", "random", "--request-rate", "0"), "is not above 0"),
        (
            ("--dataset-name", "random", "--extra-request-body", '{"stop": 3}'),
            "the warm-up failed: 400",
        ),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    server: ServerProcess,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    complaint: str,
) -> None:
    code, text = run(server, "--num-prompts", "2", *flags)
    assert (code, text) == (1, "")
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def test_a_server_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--base-url", "http://127.0.0.1:9", "--dataset-name", "random"]) == 1
    assert "http://127.0.0.1:9/v1/models" in capsys.readouterr().err
