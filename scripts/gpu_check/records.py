"""What a stage finds, as lines of JSON, and the table that people read. No torch."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_LONGEST_TEXT = 160


class Status(enum.StrEnum):
    """How one check of a stage came out."""

    OK = "ok"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Record:
    """One line of a report: `values` are figures with their unit in the name."""

    stage: int
    name: str
    status: Status
    values: dict[str, Any] = field(default_factory=dict)
    reason: str = ""


class Journal:
    """The records of one stage, on disk as soon as they are found: a stage may be killed.

    They are appended to the file, which all stages share.
    """

    def __init__(self, path: Path, stage: int) -> None:
        self._path = path
        self._stage = stage

    def note(self, name: str, **values: Any) -> None:
        """Something was measured, or holds."""
        self._write(Record(self._stage, name, Status.OK, values))

    def judge(self, name: str, holds: bool, reason: str = "", **values: Any) -> None:
        """Something holds or does not; `reason` is said when it does not."""
        status = Status.OK if holds else Status.FAILED
        self._write(Record(self._stage, name, status, values, "" if holds else reason))

    def skip(self, name: str, reason: str) -> None:
        """Something can't be checked here."""
        self._write(Record(self._stage, name, Status.SKIPPED, {}, reason))

    def fail(self, name: str, reason: str) -> None:
        """Something broke."""
        self._write(Record(self._stage, name, Status.FAILED, {}, reason))

    def _write(self, record: Record) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")
        print(line_of(record), flush=True)


def read_journal(path: Path, stage: int | None = None) -> list[Record]:
    """The records of a stage (None: of all), as far as it came; none when there is no file."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):  # else its writer was killed
            fields = json.loads(line)
            found.append(Record(**{**fields, "status": Status(fields["status"])}))
    return [record for record in found if stage in (None, record.stage)]


def line_of(record: Record) -> str:
    """A record as a line of a log."""
    text = f"stage {record.stage}  {record.status.value:8}{record.name}  {_figures(record.values)}"
    return f"{text}  {_short(record.reason)}".rstrip()


def exit_code(records: Sequence[Record]) -> int:
    """0: all hold. 1: something failed. 3: else, so something was skipped or nothing ran."""
    statuses = {record.status for record in records}
    if Status.FAILED in statuses:
        return 1
    return 0 if statuses == {Status.OK} else 3


def markdown(records: Sequence[Record], machine: Mapping[str, Any]) -> str:
    """All records as a table, under what the machine is."""
    lines = [
        "# gpu_check",
        "",
        *(f"- {name}: {value}" for name, value in machine.items()),
        "",
        "| stage | check | result | figures |",
        "|---|---|---|---|",
    ]
    for record in records:
        text = _figures(record.values) or _short(record.reason)
        if record.values and record.reason:
            text += f"; {_short(record.reason)}"
        cells = (str(record.stage), record.name, record.status.value, text)
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _figures(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_number(value)}" for name, value in values.items())


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:.4g}"


def _short(text: str) -> str:
    first = " ".join(text.split())
    return first if len(first) <= _LONGEST_TEXT else first[: _LONGEST_TEXT - 3] + "..."
