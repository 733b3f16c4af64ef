"""Many random cases against the plain engine; prints JSON, one line per finding and a summary.

    PYTHONPATH=python:test python -m stress --seeds 0:200 [--family llama] [--flags JSON]

Exits with 1 when something was found. `--shrink` makes each finding's case as small as it can.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from stress.cases import Case, draw_case
from stress.judge import Finding
from stress.runs import run_case
from stress.worlds import World, Worlds


def outcome(case: Case, world: World) -> tuple[str, str, dict[str, Any]]:
    """(kind of finding or "", what it is, counts) of a case."""
    try:
        return "", "", asdict(run_case(case, world))
    except Finding as found:
        return found.kind, str(found), {}
    except ValueError as error:
        if "ServerArgs" in traceback.format_exc() or "build_scheduler_parts" in repr(
            traceback.extract_tb(error.__traceback__)
        ):
            return "", f"not served: {error}", {"refused": 1}
        return type(error).__name__, traceback.format_exc(), {}
    except Exception as error:  # noqa: BLE001  whatever an engine raises is what is looked for
        return type(error).__name__, traceback.format_exc(), {}


def shrink(case: Case, world: World, kind: str) -> Case:
    """The case without what is not needed for the same kind of finding."""
    changed = True
    while changed:
        changed = False
        for index in reversed(range(len(case.events))):
            events = case.events[:index] + case.events[index + 1 :]
            smaller = replace(case, events=events)
            if outcome(smaller, world)[0] == kind:
                case, changed = smaller, True
        for name in list(case.flags):
            flags = {key: value for key, value in case.flags.items() if key != name}
            smaller = replace(case, flags=flags)
            if outcome(smaller, world)[0] == kind:
                case, changed = smaller, True
    return case


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", default="0:100", help="first:end")
    parser.add_argument("--family")
    parser.add_argument("--flags", default="{}", help="JSON: flags that win over those drawn")
    parser.add_argument("--options", default="{}", help="JSON: the runner's, likewise")
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--shrink", action="store_true")
    args = parser.parse_args()
    first, _, end = args.seeds.partition(":")
    fixed: dict[str, Any] = {"flags": json.loads(args.flags), "options": json.loads(args.options)}
    if args.family:
        fixed["family"] = args.family
    totals: Counter[str] = Counter()
    began, num_found = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="stress") as folder:
        worlds = Worlds(Path(folder))
        for seed in range(int(first), int(end or int(first) + 1)):
            if time.monotonic() - began > args.seconds:
                break
            family = draw_case(seed, **fixed).family
            world = worlds.of(family)
            case = draw_case(seed, lambda ask, w=world: w.answer(ask).ids, **fixed)
            kind, text, counts = outcome(case, world)
            totals["cases"] += 1
            _add(totals, counts)
            if not kind:
                continue
            num_found += 1
            if args.shrink:
                case = shrink(case, world, kind)
            told = {"seed": seed, "kind": kind, "text": text, "case": case.told()}
            print(json.dumps(told, default=str), flush=True)
        worlds.close()
    summary = {"found": num_found, "seconds": round(time.monotonic() - began, 1), **totals}
    print(json.dumps(summary))
    return int(num_found > 0)


def _add(totals: Counter[str], counts: dict[str, Any]) -> None:
    for name, value in counts.items():
        if isinstance(value, dict):
            _add(totals, value)
        else:
            totals[name] += value


if __name__ == "__main__":
    sys.exit(main())
