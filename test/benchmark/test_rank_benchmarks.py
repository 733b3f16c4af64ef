"""The benchmarks of several ranks run at a small size and report what they should."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from srt.crossed import mostly_slow

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmark" / "ranks"
PYTHON = str(Path(__file__).resolve().parents[2] / "python")


@pytest.mark.parametrize("grid", mostly_slow([(1, 2)], [(2, 1)]), ids=str)
def test_ranks_of_every_kind_give_the_same_tokens(grid: tuple[int, int]) -> None:
    script = SCRIPTS / "bench_ranks.py"
    lengths = ["--input-len", "300", "--output-len", "12", "--segment", "512"]
    told = subprocess.check_output(
        [
            sys.executable,
            str(script),
            "--grids",
            "1x1,{}x{}".format(*grid),
            "--rounds",
            "1",
            *lengths,
        ],
        env={"PYTHONPATH": PYTHON, "PATH": "/usr/bin", "OMP_NUM_THREADS": "1"},
        timeout=250,
    )
    rows = json.loads(told)["rows"]
    assert [(row["tp"], row["kv_parallel"]) for row in rows] == [(1, 1), grid]
    assert all(row["same_tokens"] for row in rows)
    # 8 layers: two sums each and the embedding's and the logits' gather, or one merge each
    messages = {(2, 1): 1 + 1 + 8 * 2 + 1, (1, 2): 1 + 8}
    assert [row["messages_per_step"] for row in rows] == [0, messages[grid]]
    (whole,), halves = (row["mapped_bytes_of_ranks"] for row in rows)
    assert halves == [whole // 2] * 2


@pytest.mark.slow
def test_a_rank_loads_its_part_and_little_more() -> None:
    script = SCRIPTS / "bench_loading.py"
    told = subprocess.check_output(
        [sys.executable, str(script), "--scale", "1", "--sizes", "1,4"],
        env={"PYTHONPATH": PYTHON, "PATH": "/usr/bin"},
        timeout=250,
    )
    rows = json.loads(told)["rows"]
    assert [(row["model"], row["tp_size"]) for row in rows] == [
        (model, size) for model in ("llama", "qwen3-moe") for size in (1, 4)
    ]
    for whole, quarter in (rows[:2], rows[2:]):
        assert quarter["shard_bytes"] < 0.3 * whole["shard_bytes"]
        assert whole["peak_anonymous"] >= whole["shard_bytes"]
        assert quarter["above_shard"] < 64e6
        assert quarter["peak_anonymous"] < 0.7 * whole["shard_bytes"]
