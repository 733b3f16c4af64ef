"""Tools, and what is made of an answer, for the tests of parsers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sglang.srt.function_call.core_types import (
    CallArguments,
    CallBroken,
    CallEnd,
    CallStart,
    Content,
    Event,
    Reasoning,
    TextParser,
    merged,
)

TOOLS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "unit": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "where": {"type": "object"},
            "exact": {"type": "boolean"},
        },
    },
    "get_time": {},
    "spotify.play": {"properties": {"title": {"type": "string"}}},
}


@dataclass
class Answer:
    """A whole answer; broken calls are in the content again."""

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, Any]] = field(default_factory=list)


def parse(parser: TextParser, pieces: Iterable[str]) -> list[Event]:
    """All events of a text that comes in `pieces`, merged."""
    events: list[Event] = []
    for piece in pieces:
        events += parser.feed(piece)
    return merged([*events, *parser.finish()])


def answer_of(events: Sequence[Event]) -> Answer:
    """The events put together; fails when their order or a call's arguments are wrong."""
    answer = Answer()
    name: str | None = None
    arguments = ""
    for event in events:
        if isinstance(event, Content):
            assert name is None
            answer.content += event.text
        elif isinstance(event, Reasoning):
            assert name is None
            answer.reasoning += event.text
        elif isinstance(event, CallStart):
            assert name is None
            name, arguments = event.name, ""
        elif isinstance(event, CallArguments):
            assert name is not None
            arguments += event.text
        elif isinstance(event, CallEnd):
            assert name is not None
            parsed = json.loads(arguments)
            assert isinstance(parsed, dict)
            answer.calls.append((name, parsed))
            name = None
        else:
            assert isinstance(event, CallBroken)
            assert name is not None
            answer.content += event.raw
            name = None
    assert name is None
    return answer
