"""Stage 6: needles in very long prompts through a real server on the device.

`scripts/needle.py` with its constructed checkpoint. Of two layers the global one is the last, where
only the rows whose logits are wanted attend; of four it is in the middle, and every row does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from gpu_check.records import Journal
from gpu_check.setting import Setting

SCRIPT = Path(__file__).resolve().parents[1] / "needle.py"


@dataclass(frozen=True)
class Hunt:
    """One run: prompt length, layers of the circuit, what the model is like."""

    name: str
    length: str
    layers: int


HUNTS = (
    Hunt("2M, global layer pruned", "2M", 2),
    Hunt("10M, global layer pruned", "10M", 2),
    Hunt("1M, every row computed", "1M", 4),
)
DRY_HUNTS = (Hunt("4k, global layer pruned", "4k", 2),)


def check_needles(setting: Setting, journal: Journal) -> None:
    """The whole answer, and how long it took."""
    for hunt in DRY_HUNTS if setting.is_dry else HUNTS:
        if setting.seconds_left < 5:
            journal.skip(f"needle {hunt.name}", "no time is left")
            continue
        _run(setting, journal, hunt)


def _run(setting: Setting, journal: Journal, hunt: Hunt) -> None:
    output = setting.folder / f"needle_{hunt.length}_{hunt.layers}.json"
    flags = [*setting.flags, "--kv-memory-budget", "512MiB"] if setting.is_dry else setting.flags
    command = [
        *(sys.executable, str(SCRIPT), "--lengths", hunt.length, "--layers", str(hunt.layers)),
        *("--depths", "50", "--no-second", "--body", "binary", "--output", str(output)),
        *("--bandwidth-buffer", "16MiB", "--server-flags", " ".join(flags)),
        *("--server-log", str(setting.folder / f"needle_{hunt.length}.log")),
    ]
    left = max(1.0, setting.seconds_left)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=left, check=False)
    except subprocess.TimeoutExpired:
        journal.fail(f"needle {hunt.name}", f"not found within {left:.0f} s")
        return
    if not output.exists():
        journal.fail(f"needle {hunt.name}", done.stderr[-400:])
        return
    for cell in json.loads(output.read_text())["cells"]:
        journal.judge(
            f"needle {hunt.name}",
            done.returncode == 0,
            "the answer is not the needle",
            prompt_tokens=cell["prompt_tokens"],
            first_token_s=cell["ttft_s"],
            decode_tokens_per_s=cell.get("decode_tokens_per_s"),
        )


PARTS = (("needles", check_needles),)
