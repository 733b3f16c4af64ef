"""Runs stages one after another, each in a process of its own, and writes what they found.

    python -m gpu_check [--stage 1 4] [--dry-run-cpu] [--out FOLDER] [--seconds 520]

A stage that fails, crashes or takes too long does not stop the others. Exit status: 0 all checks
hold, 1 something failed, 3 nothing failed but something was skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_check.records import Record, Status, exit_code, line_of, markdown, read_journal

STAGES = (1, 2, 3, 4, 5, 6)
# Shares of the time; what a stage leaves goes to those after it.
_SHARES = {1: 80, 2: 60, 3: 80, 4: 130, 5: 80, 6: 90}


def main(argv: Sequence[str] | None = None) -> int:
    """See the module."""
    args = _parser().parse_args(argv)
    folder: Path = args.out
    folder.mkdir(parents=True, exist_ok=True)
    machine = describe(args.dry_run_cpu)
    records: list[Record] = []
    deadline = time.monotonic() + args.seconds
    for place, stage in enumerate(args.stage):
        later = sum(_SHARES[other] for other in args.stage[place + 1 :])
        left = deadline - time.monotonic()
        seconds = max(_SHARES[stage] * args.seconds / sum(_SHARES.values()), left - later)
        records += run_stage(stage, folder, max(1.0, min(seconds, left)), args.dry_run_cpu)
        write_reports(folder, records, machine)
    print(f"reports: {folder / 'gpu_check.json'}, {folder / 'gpu_check.md'}")
    return exit_code(records)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__)
    parser.add_argument("--stage", type=int, nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--dry-run-cpu", action="store_true", help="tiny sizes, no GPU")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu_check_out")))
    parser.add_argument("--seconds", type=float, default=520.0, help="for all stages together")
    return parser


def run_stage(stage: int, folder: Path, seconds: float, dry: bool) -> list[Record]:
    """The records of one stage, and one more when it ended otherwise than by its own will."""
    journal = folder / f"stage_{stage}.jsonl"
    journal.unlink(missing_ok=True)
    command = [sys.executable, "-m", "gpu_check.stage", str(stage), str(folder), f"{seconds:.0f}"]
    if dry:
        command.append("--dry-run-cpu")
    began = time.monotonic()
    reason = ""
    try:
        # The dry run has kernels of Triton run in its interpreter.
        env = {**os.environ, "TRITON_INTERPRET": "1"} if dry else None
        code = subprocess.run(command, timeout=seconds, check=False, env=env).returncode
        if code != 0:
            reason = f"the stage ended with status {code}"
    except subprocess.TimeoutExpired:
        reason = f"the stage did not end within {seconds:.0f} s"
    found = read_journal(journal)
    if reason:
        found.append(Record(stage, "stage", Status.FAILED, {}, reason))
        print(line_of(found[-1]), flush=True)
    taken = time.monotonic() - began
    print(f"stage {stage}: {len(found)} records in {taken:.0f} s", flush=True)
    return found


def describe(dry: bool) -> dict[str, Any]:
    """What this machine is, asked in a process of its own: this one must not touch the device."""
    done = subprocess.run(
        [sys.executable, "-m", "gpu_check.machine", *(["--dry-run-cpu"] if dry else [])],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        return {"machine": f"unknown: {done.stderr.strip().splitlines()[-1:]}"}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def write_reports(folder: Path, records: Sequence[Record], machine: dict[str, Any]) -> None:
    """gpu_check.json and gpu_check.md, anew after every stage."""
    content = {"machine": machine, "records": [vars(record) for record in records]}
    (folder / "gpu_check.json").write_text(json.dumps(content, indent=2) + "\n")
    (folder / "gpu_check.md").write_text(markdown(records, machine))


if __name__ == "__main__":
    sys.exit(main())
