"""The benchmark of the request path runs at a small size and reports what it should."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmark" / "serving" / "request_path.py"
NUM_TOKENS = 20_000


def test_every_form_of_the_ids_arrives_whole() -> None:
    settings = ["--tokens", str(NUM_TOKENS), "--text-mib", "0", "--repeats", "1", "--settle", "0.1"]
    told = json.loads(
        subprocess.check_output([sys.executable, str(SCRIPT), *settings], timeout=120)
    )
    forms = [row["form"] for row in told["results"]]
    assert len(forms) == len(set(forms)) == 5
    for row in told["results"]:
        assert row["prompt_tokens"] == NUM_TOKENS
        assert row["seconds"] > 0
