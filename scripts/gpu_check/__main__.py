"""Runs stages one after another, each in a process of its own, and writes what they found.

    python -m gpu_check [--stage 1 4] [--dry-run-cpu] [--out FOLDER] [--seconds 520]

A stage that fails, crashes or takes too long does not stop the others. FOLDER gets four files and
no more: the two reports, the journal that is written as things are found, and what servers and
other children said. Exit status: 0 all checks hold, 1 something failed, 3 nothing failed but
something was skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpu_check.records import Record, Status, exit_code, line_of, markdown, read_journal

STAGES = (1, 2, 3, 4, 5, 6)
# Shares of the time; what a stage leaves goes to those after it.
_SHARES = {1: 110, 2: 45, 3: 90, 4: 120, 5: 70, 6: 85}
_END_S = 10.0  # a stage's processes have so long to end when they are told to
_LOG_BYTES = 64 << 10  # of the end of each log that is kept


def main(argv: Sequence[str] | None = None) -> int:
    """See the module."""
    args = _parser().parse_args(argv)
    folder: Path = args.out
    folder.mkdir(parents=True, exist_ok=True)
    machine = describe(args.dry_run_cpu)
    records: list[Record] = []
    deadline = time.monotonic() + args.seconds
    journal, logs = folder / "journal.jsonl", folder / "logs.txt"
    for old in (journal, logs):
        old.unlink(missing_ok=True)
    for place, stage in enumerate(args.stage):
        later = sum(_SHARES[other] for other in args.stage[place + 1 :])
        left = deadline - time.monotonic()
        seconds = max(_SHARES[stage] * args.seconds / sum(_SHARES.values()), left - later)
        with tempfile.TemporaryDirectory(prefix="gpu_check_") as work:
            limit = max(1.0, min(seconds, left))
            records += run_stage(stage, journal, Path(work), limit, args.dry_run_cpu)
            keep_logs(Path(work), logs)
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


def run_stage(stage: int, journal: Path, work: Path, seconds: float, dry: bool) -> list[Record]:
    """The records of one stage, and one more when it ended otherwise than by its own will.

    `work` is a folder for what the stage makes on its way.
    """
    arguments = [str(stage), str(journal), str(work), f"{seconds:.0f}"]
    command = [sys.executable, "-m", "gpu_check.stage", *arguments]
    if dry:
        command.append("--dry-run-cpu")
    began = time.monotonic()
    reason = ""
    # The dry run has kernels of Triton run in its interpreter.
    env = {**os.environ, "TRITON_INTERPRET": "1"} if dry else None
    # A group of its own, to be ended with all its children; but no session of its own, in which it
    # would outlive whoever ends ours.
    process = subprocess.Popen(command, env=env, process_group=0)
    try:
        code = process.wait(seconds)
        if code != 0:
            reason = f"the stage ended with status {code}"
    except subprocess.TimeoutExpired:
        reason = f"the stage did not end within {seconds:.0f} s"
    finally:
        end_group(process)
    found = read_journal(journal, stage)
    if reason:
        found.append(Record(stage, "stage", Status.FAILED, {}, reason))
        print(line_of(found[-1]), flush=True)
    taken = time.monotonic() - began
    print(f"stage {stage}: {len(found)} records in {taken:.0f} s", flush=True)
    return found


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a stage and the servers that it started and left: they would hold the device's memory."""
    for end in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, end)
        deadline = time.monotonic() + _END_S
        while _is_alive(process) and time.monotonic() < deadline:
            time.sleep(0.1)


def keep_logs(work: Path, target: Path) -> None:
    """Append the end of every log of a stage's folder to one file."""
    with target.open("ab") as kept:
        for log in sorted(work.glob("**/*.log")):
            kept.write(f"==== {log.name}\n".encode())
            kept.write(log.read_bytes()[-_LOG_BYTES:] + b"\n")


def _is_alive(process: subprocess.Popen[bytes]) -> bool:
    """Whether anyone of the process's group is left."""
    process.poll()  # who has ended is only gone when it was asked for
    try:
        os.killpg(process.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


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
