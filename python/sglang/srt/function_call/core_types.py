"""What a parser makes of an answer's text: a row of events, and what it may be told of tools.

Parsers take the text in pieces as it is generated. However the text is cut, the events say the
same: only how texts are divided among neighbours of one kind differs, and `merged` undoes that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Protocol, Union

# Function name -> JSON schema of its arguments ({} when it has none).
ToolSchemas = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Reasoning:
    """More of what the model thought."""

    text: str


@dataclass(frozen=True)
class Content:
    """More of what the model says to the user."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A call of the function `name` begins; its arguments and its end follow at once."""

    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of the JSON text of the arguments of the call that has begun."""

    text: str


@dataclass(frozen=True)
class CallEnd:
    """The call is complete: its arguments are one JSON object."""


@dataclass(frozen=True)
class CallBroken:
    """The call that has begun is none after all; `raw` is all text that it was read from.

    Who shows whole answers shows `raw` instead of the call. In a stream the arguments are out
    already; the text after the break follows as content.
    """

    raw: str


Event = Union[Reasoning, Content, CallStart, CallArguments, CallEnd, CallBroken]
WHITESPACE = " \t\n\r"
# A long text is read in pieces of so many characters, or each marker would copy what follows it.
PIECE_CHARS = 1 << 12
_TEXTS = (Reasoning, Content, CallArguments)


class HeldSpace:
    """White space behind white space that a parser holds back: kept unread, however long it gets.

    For parsers to which it says nothing until something else follows.
    """

    def __init__(self) -> None:
        self._parts: list[str] = []

    def takes(self, held: str, text: str) -> bool:
        """Keep `text` if it is white space and so is `held`, what the parser holds already."""
        if text.strip(WHITESPACE) or not (self._parts or (held and not held.strip(WHITESPACE))):
            return False
        self._parts.append(text)
        return True

    def released(self) -> str:
        """What was kept, and is not any more."""
        text = "".join(self._parts)
        self._parts.clear()
        return text


class TextParser(Protocol):
    """Reads one answer."""

    def feed(self, text: str) -> list[Event]:
        """What is certain after more text."""
        ...

    def finish(self) -> list[Event]:
        """What was held back, at the end of the text; call it once."""
        ...


def merged(events: Iterable[Event]) -> list[Event]:
    """The events with neighbouring texts of one kind joined and empty ones left out."""
    result: list[Event] = []
    shown = (e for e in events if not isinstance(e, _TEXTS) or e.text)
    for _, group in groupby(shown, type):
        first, *others = group
        if not isinstance(first, _TEXTS):
            result += (first, *others)
        elif others:
            texts = [first.text, *(other.text for other in others if isinstance(other, _TEXTS))]
            result.append(replace(first, text="".join(texts)))
        else:
            result.append(first)
    return result


def first_marker(text: str, markers: Iterable[str]) -> tuple[int, str] | None:
    """Where the first of the markers begins and which it is; of two at one place the longer."""
    found = [(at, -len(m), m) for m in markers if (at := text.find(m)) >= 0]
    if not found:
        return None
    at, _, marker = min(found)
    return at, marker


def held_length(text: str, markers: Iterable[str]) -> int:
    """Characters at the end of `text` that may still become one of the markers."""
    longest = 0
    for marker in markers:
        for size in range(min(len(marker) - 1, len(text)), longest, -1):
            if text.endswith(marker[:size]):
                longest = size
                break
    return longest
