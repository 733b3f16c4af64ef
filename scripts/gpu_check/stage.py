"""One stage in this process, its records appended to JOURNAL, its files in FOLDER:

python -m gpu_check.stage NUMBER JOURNAL FOLDER SECONDS [--dry-run-cpu]
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from gpu_check.records import Journal
from gpu_check.setting import Setting, make_setting

Check = Callable[[Setting, Journal], None]

_STAGES = {1: "kernels", 2: "memory", 3: "server", 4: "figures", 5: "scout", 6: "needle"}


def parts_of(stage: int) -> Sequence[tuple[str, Check]]:
    """A stage is a list of parts: one that breaks does not stop the next.

    Loads the stage's own module and no other's: transformers alone takes seconds.
    """
    parts: Sequence[tuple[str, Check]] = importlib.import_module(
        f"gpu_check.stage_{_STAGES[stage]}"
    ).PARTS
    return parts


def run(stage: int, path: Path, folder: Path, seconds: float, dry: bool) -> None:
    """Run a stage's parts and note what they find."""
    journal = Journal(path, stage)
    try:
        setting = make_setting(dry, seconds, folder)
    except ValueError:
        journal.skip("stage", "skipped: no CUDA device")
        return
    for name, part in parts_of(stage):
        if setting.seconds_left <= 0:
            journal.skip(name, "no time is left")
            continue
        try:
            part(setting, journal)
        except Exception as error:  # noqa: BLE001  what breaks is the finding
            journal.fail(name, f"{type(error).__name__}: {error}")
            traceback.print_exc()


if __name__ == "__main__":
    number, journal, folder, seconds = sys.argv[1:5]
    run(int(number), Path(journal), Path(folder), float(seconds), "--dry-run-cpu" in sys.argv)
