"""The benchmarks of several ranks run at a small size and report what they should."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmark" / "ranks"
PYTHON = str(Path(__file__).resolve().parents[2] / "python")


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
