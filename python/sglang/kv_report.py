"""`python -m sglang.kv_report --url http://127.0.0.1:30000`: the live segment map of a server.

Asks /server_info and prints, per layer group, one character for each segment that has memory.
`--watch SECONDS` asks again and again until Ctrl-C, `--json` prints what was read, one object a
line. Exits 1 with one line on stderr when the server can't be asked.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from sglang.srt.utils.sizes import format_bytes

LEGEND = (
    "_ mapped and empty   1-9 # filled by tenths, some of it by one request alone\n"
    "a-i @ filled by tenths, all in the prefix cache   ~ mapping   ^ unmapping   . no memory"
)
_LOWER_LEGEND = "=+ {place}, read by a request or in the prefix cache alone   - {place} and empty"

_USED_FILL = "123456789#"
_CACHED_FILL = "abcdefghi@"
# Longer gaps of segments without memory are shortened to three dots and their number.
_MAX_DOTS = 32
_TIMEOUT_S = 30.0


def segment_char(letter: str, used: int, cached: int, free: int) -> str:
    """One segment as one character: its state letter (as in /server_info) and its pages."""
    if letter == "S":
        return "=" if used else "+" if cached else "-"
    if letter != "M":
        return {"G": "~", "D": "^"}.get(letter, "?")
    owned, total = used + cached, used + cached + free
    if owned == 0:
        return "_"
    tenth = 9 if owned == total else min(8, max(0, -(-10 * owned // total) - 1))
    return (_USED_FILL if used else _CACHED_FILL)[tenth]


def map_line(segments: Sequence[Sequence[Any]]) -> str:
    """The characters of one group's listed segments, by id, gaps as dots."""
    parts: list[str] = []
    expected = 1  # segment 0 is never allocated
    for number, letter, used, cached, free in segments:
        gap = number - expected
        parts.append("." * gap if gap <= _MAX_DOTS else f"...({gap:,})")
        parts.append(segment_char(letter, used, cached, free))
        expected = number + 1
    return "".join(parts)


def render(info: Mapping[str, Any], width: int = 80) -> str:
    """The report of one /server_info answer; map lines are at most `width` characters."""
    memory = info["memory"]
    state = info["internal_states"][0]
    resident = memory.get("resident_bytes")
    lines = [
        f"KV memory: {format_bytes(memory['mapped_bytes'])} mapped of a budget of "
        f"{format_bytes(memory['budget_bytes'])}, resident "
        f"{'unknown' if resident is None else format_bytes(resident)}, "
        f"fixed {format_bytes(memory['fixed_bytes'])} ({memory['backing']})",
        f"context: {memory['context_length']:,} tokens"
        + _clamp_note(memory)
        + f", page size {memory['page_size']}, {memory['bytes_per_token']:,} bytes per token",
        f"requests: {state['num_running_reqs']} running, {state['num_queue_reqs']} queued; "
        f"tokens: {memory['cached_tokens']:,} cached, {memory['headroom_tokens']:,} headroom",
    ]
    places = (("disk", "on disk"), ("host", "in host memory"))
    below = [(tier, place) for tier, place in places if memory.get(f"{tier}_budget_bytes")]
    for tier, place in below:
        held, bound = (format_bytes(memory[f"{tier}_{name}"]) for name in ("bytes", "budget_bytes"))
        lines.append(f"{place}: {held} of {bound}")
    if memory["growth_paused"]:
        lines.append("growth is paused: the machine refused memory")
    maps = {one["group"]: one for one in memory.get("segment_maps", ())}
    for group in memory["groups"]:
        lines += ["", *_group_lines(group, maps.get(group["group"]), width)]
    legend = "\n".join([LEGEND, *(_LOWER_LEGEND.format(place=place) for _, place in below)])
    return "\n".join([*lines, "", legend])


def _clamp_note(memory: Mapping[str, Any]) -> str:
    requested = memory["context_length_requested"]
    return f" ({requested:,} requested)" if requested > memory["context_length"] else ""


def _group_lines(
    group: Mapping[str, Any], found: Mapping[str, Any] | None, width: int
) -> list[str]:
    pages, states = group["pages"], group["segments"]
    counts = ", ".join(f"{count:,} {name}" for name, count in states.items() if count)
    holds = f"{group['segment_tokens']:,} tokens"
    if group["state_bytes"]:
        holds = f"{group['segment_pages']:,} states of {format_bytes(group['state_bytes'])}"
    lines = [
        f"group {group['group']} ({group['kind']}, {group['num_layers']} layers): segments of "
        f"{holds}, {format_bytes(group['segment_bytes'])}: {counts}",
        f"  pages: {pages['used']:,} used, {pages['cached']:,} cached, {pages['free']:,} free; "
        f"{group['map_count']:,} maps, {group['unmap_count']:,} unmaps, "
        f"{group['refused_count']:,} refused",
    ]
    if found is None:
        return lines
    text = map_line(found["segments"]) or "(no segment has memory)"
    room = max(1, width - 2)
    lines += [f"  {text[at : at + room]}" for at in range(0, len(text), room)]
    left_out = found["num_segments"] - len(found["segments"])
    if left_out:
        lines.append(f"  and {left_out:,} more segments that are not listed")
    return lines


def fetch(url: str, api_key: str | None = None) -> dict[str, Any]:
    """The JSON object of /server_info. Raises OSError or ValueError when there is none."""
    request = urllib.request.Request(f"{url.rstrip('/')}/server_info")
    if api_key is not None:
        request.add_header("Authorization", f"Bearer {api_key}")
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as reply:
        found = json.load(reply)
    if not isinstance(found, dict) or "groups" not in found.get("memory", {}):
        raise ValueError("the answer has no segmented memory in it; is it this engine's server?")
    return found


def _as_json(info: Mapping[str, Any]) -> str:
    state = dict(info["internal_states"][0])
    state.pop("memory", None)
    return json.dumps({"memory": info["memory"], "state": state})


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sglang.kv_report",
        description="Print the live map of a server's KV segments.",
    )
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="where the server is")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="ask again after so long")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--width", type=int, default=80, help="characters of a line of the map")
    parser.add_argument("--api-key", help="the server's --api-key")
    return parser


def main(
    argv: Sequence[str],
    *,
    out: TextIO | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Print one report, or one after another with --watch; returns the exit status."""
    args = make_parser().parse_args(argv)
    out = out or sys.stdout
    while True:
        try:
            info = fetch(args.url, args.api_key)
        except (OSError, ValueError) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            print(f"kv_report: {args.url}: {reason}", file=sys.stderr)
            return 1
        text = _as_json(info) if args.json else render(info, args.width)
        print(text, file=out, flush=True)
        if args.watch is None:
            return 0
        try:
            sleep(max(0.0, args.watch))
        except KeyboardInterrupt:
            return 0
        if not args.json:
            print(file=out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
