"""Stop patterns (`stop_regex`) found as the text appears, beside stop strings.

Pure and per request, as incremental_text.py is: what was shown is never taken back, and text that
may still become a match is kept back. The text is looked at after each character: a pattern matches
where the shortest text that has a match ends, and of the matches that end there the longest counts.
So the cuts between tokens make no difference, and nor does greediness. A character costs the live
nodes of the automaton and never more than all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sglang.srt.errors import RequestError
from sglang.srt.managers.incremental_text import StopMatch, StopMatcher
from sglang.srt.managers.regex_program import (
    MAX_NODES,
    Kind,
    Node,
    Program,
    compile_program,
    is_word,
)


def check_stop_regex(patterns: Sequence[str]) -> None:
    """Raise RequestError (400) naming what of `patterns` can't be served.

    All patterns of a request together may have as many nodes as a single one.
    """
    num_nodes = 0
    for pattern in patterns:
        try:
            num_nodes += len(compile_program(pattern).nodes)
        except ValueError as error:
            raise RequestError(f"stop_regex {pattern[:100]!r} is not served: {error}.") from None
        if num_nodes > MAX_NODES:
            raise RequestError(
                f"The patterns of stop_regex have more than {MAX_NODES} parts in all."
            )


class _Found(NamedTuple):
    """A match of the text's characters [start, end); ordered as matches are preferred."""

    end: int
    start: int
    matched: str


class _Reached:
    """The nodes that a text has come to, and where the match of each would begin.

    `threads` wait for a character (or, at borders of words, for what it is), the earliest match
    first: of two matches that have come to one node the later one can't win any more. `match` is
    where the earliest complete one began. `passed` are those that waited for nothing.
    """

    __slots__ = ("match", "passed", "threads")

    def __init__(self) -> None:
        self.threads: dict[int, int] = {}
        self.passed: set[int] = set()
        self.match: int | None = None


class PatternMatcher:
    """Follows one pattern through a text; positions count the text's characters."""

    def __init__(self, program: Program) -> None:
        self._nodes: tuple[Node, ...] = program.nodes
        self._start = program.start
        self._threads: dict[int, int] = {}
        self._position = 0
        self._previous = ""
        self._has_anchors = any(node.kind not in _PLAIN for node in program.nodes)
        self._has_borders = any(node.kind in _BORDERS for node in program.nodes)
        self._beginnings: dict[str, tuple[bool, tuple[int, ...]]] = {}

    @property
    def first_open(self) -> int:
        """Where the earliest match would begin that more text may complete."""
        return next(iter(self._threads.values()), self._position)

    def step(self, char: str) -> tuple[int, int] | None:
        """Take one more character; (start, end) of the match that it completes, if any.

        A pattern that ends with a border of words is found with the character behind it.
        """
        position = self._position
        if not self._threads and not self._has_anchors:
            is_match, reached = self._begin(char)
            if reached:
                self._threads = dict.fromkeys(reached, position)
            self._position = position + 1
            return (position, position + 1) if is_match else None
        before = _Reached()
        if self._has_borders:
            for at, start in self._threads.items():
                self._close(at, start, before, following=char)
        else:
            before.threads = self._threads
        self._close(self._start, position, before, following=char)
        self._position = position + 1
        self._previous = char
        after = self._consume(before, char)
        self._threads = after.threads
        if before.match is not None:
            return before.match, position
        return None if after.match is None else (after.match, position + 1)

    def _begin(self, char: str) -> tuple[bool, tuple[int, ...]]:
        """What a character leads to where no match is under way, as with most: looked up."""
        known = self._beginnings.get(char)
        if known is None:
            starts = _Reached()
            self._close(self._start, 0, starts, following=None)
            after = self._consume(starts, char)
            known = self._beginnings[char] = after.match is not None, tuple(after.threads)
        return known

    def _consume(self, before: _Reached, char: str) -> _Reached:
        """What is reached with the character `char`, which stands before the position."""
        after = _Reached()
        nodes = self._nodes
        for at, start in before.threads.items():
            node = nodes[at]
            if node.takes(char):
                self._close(node.targets[0], start, after, following=None)
        return after

    def _close(self, at: int, start: int, reached: _Reached, *, following: str | None) -> None:
        """Add what is reached from the node `at` without a character.

        `following` is the next character; None: not known yet, and borders of words wait for it.
        """
        waiting = [at]
        while waiting:
            at = waiting.pop()
            if at in reached.threads or at in reached.passed:
                continue
            node = self._nodes[at]
            kind = node.kind
            if kind is Kind.CHAR or (kind in _BORDERS and following is None):
                reached.threads[at] = start
                continue
            reached.passed.add(at)
            if kind is Kind.MATCH:
                reached.match = start
            elif self._holds(kind, following):
                waiting.extend(reversed(node.targets))

    def _holds(self, kind: Kind, following: str | None) -> bool:
        """Whether a node that takes no character lets a match pass here."""
        if kind is Kind.SPLIT:
            return True
        if kind is Kind.TEXT_START:
            return self._position == 0
        if kind is Kind.LINE_START:
            return self._position == 0 or self._previous == "\n"
        is_border = is_word(self._previous) != is_word(following or "")
        return is_border == (kind is Kind.BORDER)


_PLAIN = (Kind.MATCH, Kind.CHAR, Kind.SPLIT)
_BORDERS = (Kind.BORDER, Kind.NO_BORDER)


class TextStops:
    """Looks for stop strings and stop patterns in text that comes in pieces.

    Interface and rules are `StopMatcher`'s: the match that ends first wins, of those the longest;
    `matched` of a pattern is the pattern itself. Raises ValueError for patterns that
    `check_stop_regex` refuses.
    """

    def __init__(
        self, stops: Sequence[str], patterns: Sequence[str], *, keep_match: bool = False
    ) -> None:
        # It shows what it finds, so that what it has shown tells where a match ends.
        self._strings = StopMatcher(stops, keep_match=True)
        self._strings_shown = 0
        self._patterns = [
            (pattern, PatternMatcher(compile_program(pattern)))
            for pattern in dict.fromkeys(patterns)
        ]
        self._keep_match = keep_match
        self._held = ""
        self._shown = 0  # characters before `_held`

    def feed(self, text: str, *, armed: bool = True) -> StopMatch:
        """See `StopMatcher.feed`."""
        self._held += text
        found = self._find(text, armed)
        if found is not None:
            end = found.end if self._keep_match else found.start
            shown = self._held[: max(0, end - self._shown)]
            self._held = ""
            return StopMatch(shown, found.matched)
        borders = [matcher.first_open for _, matcher in self._patterns]
        cut = min(self._strings_shown, *borders) - self._shown
        self._shown += cut
        shown, self._held = self._held[:cut], self._held[cut:]
        return StopMatch(shown)

    def flush(self) -> str:
        """See `StopMatcher.flush`."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str, armed: bool) -> _Found | None:
        found: list[_Found] = []
        strings = self._strings.feed(text, armed=armed)
        self._strings_shown += len(strings.text)
        if strings.matched is not None:
            end = self._strings_shown
            found.append(_Found(end, end - len(strings.matched), strings.matched))
        for pattern, matcher in self._patterns:
            for char in text:
                span = matcher.step(char)
                if span is not None and armed:
                    found.append(_Found(span[1], span[0], pattern))
                    break
        return min(found, default=None)
