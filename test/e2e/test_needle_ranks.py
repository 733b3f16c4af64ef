"""Needles in contexts that no single rank could hold: `scripts/needle.py` on four ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from e2e.test_needle import ask


# Of a rank: a quarter of the global layer's segments (8,192 tokens x 512 bytes), and the chunked
# layer's one, whole.
def budget_of_a_quarter(num_segments: int) -> int:
    return (num_segments // 4 + 1) * 8192 * 512


def ask_four_ranks(folder: Path, length: str, budget: int, *arguments: str) -> dict[str, Any]:
    flags = f"--kv-parallel-size 4 --kv-segment-size 8192 --kv-memory-budget {budget}"
    report = ask(folder, f"--lengths={length}", f"--server-flags={flags}", *arguments)
    for cell in report["cells"]:
        assert cell["exact"]
        assert cell["mapped_bytes"] <= budget
    return report


def test_four_ranks_find_needles_in_64k_tokens_with_a_quarter_of_the_memory_each(
    tmp_path: Path,
) -> None:
    budget = budget_of_a_quarter(8)
    report = ask_four_ranks(tmp_path, "64k", budget, "--depths=0,100", "--shared")
    for cell in report["cells"]:
        assert cell["prompt_tokens"] == 64_000
        assert cell["second_exact"]
        assert cell["second_cached_tokens"] >= 64_000 - 64
        assert 2.5 * budget < cell["kv_bytes"], "one rank could not hold it"
    assert report["server_info"]["max_req_input_len"] == 65_535


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_four_ranks_find_needles_in_a_million_tokens(tmp_path: Path) -> None:
    budget = budget_of_a_quarter(124)
    report = ask_four_ranks(
        tmp_path, "1M", budget, "--depths=0,50,100", "--shared", "--answer-tokens=64"
    )
    for cell in report["cells"]:
        assert 3.6 * budget < cell["kv_bytes"]
