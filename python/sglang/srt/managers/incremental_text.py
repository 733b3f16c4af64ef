"""Text from tokens one at a time, and stop strings found as the text appears.

Pure and per request: the detokenizer holds one decoder and one matcher for each. Nothing shown is
ever taken back, nothing is decoded twice, and what is kept back is bounded by one character or
one stop string. Stop patterns are stop_regex.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sglang.srt.tokenizer.pieces import TokenPieces, decode_available
from sglang.srt.tokenizer.tokenizer import Tokenizer


class IncrementalDecoder(Protocol):
    """Turns ids into text deltas whose concatenation is the text of all ids at once."""

    def feed(self, token_id: int) -> str:
        """The text that is certain after one more token; often empty inside a character."""

    def flush(self) -> str:
        """What is left at the end, an unfinished character as U+FFFD. Call it once."""


class PieceDecoder:
    """For tokenizers whose tokens stand for bytes: constant work per token, exact.

    `prefix_ids`, the end of the prompt, is decoded for context and not shown: bytes of a
    character that it leaves unfinished join the first output. `kept_ids` are shown although
    special tokens are skipped.
    """

    def __init__(
        self,
        pieces: TokenPieces,
        prefix_ids: Sequence[int],
        *,
        skip_special_tokens: bool,
        kept_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._pieces = pieces
        self._skipped = pieces.special_ids - kept_ids if skip_special_tokens else frozenset()
        prefix = pieces.join(prefix_ids, skip_special_tokens=skip_special_tokens)
        _, self._pending = decode_available(prefix, final=False, per_byte=pieces.per_byte)
        self._strip_space = pieces.strip_first_space and not prefix

    def feed(self, token_id: int) -> str:
        """See `IncrementalDecoder`."""
        if token_id in self._skipped:
            return ""
        return self._take(self._pieces.piece(token_id), final=False)

    def flush(self) -> str:
        """See `IncrementalDecoder`."""
        return self._take(b"", final=True)

    def _take(self, data: bytes, *, final: bool) -> str:
        text, self._pending = decode_available(
            self._pending + data, final=final, per_byte=self._pieces.per_byte
        )
        if text and self._strip_space:
            self._strip_space = False
            return text.removeprefix(" ")
        return text


class WindowDecoder:
    """For any other tokenizer: decodes a window of the last ids with and without the news.

    Text that ends in U+FFFD may be an unfinished character and waits, at most `MAX_PENDING`
    tokens. Work per token is bounded by the window.
    """

    CONTEXT = 6
    MAX_PENDING = 8

    def __init__(
        self,
        tokenizer: Tokenizer,
        prefix_ids: Sequence[int],
        *,
        skip_special_tokens: bool,
        spaces_between_special_tokens: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._spaces = spaces_between_special_tokens
        self._context = list(prefix_ids)
        self._pending: list[int] = []

    def feed(self, token_id: int) -> str:
        """See `IncrementalDecoder`."""
        self._pending.append(token_id)
        text = self._news()
        if text.endswith("�") and len(self._pending) < self.MAX_PENDING:
            return ""
        self._context = (self._context + self._pending)[-self.CONTEXT :]
        self._pending = []
        return text

    def flush(self) -> str:
        """See `IncrementalDecoder`."""
        return self._news() if self._pending else ""

    def _news(self) -> str:
        before = self._decode(self._context)
        return self._decode(self._context + self._pending)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=self._skip, spaces_between_special_tokens=self._spaces
        )


def make_decoder(
    tokenizer: Tokenizer,
    prefix_ids: Sequence[int],
    *,
    skip_special_tokens: bool,
    spaces_between_special_tokens: bool,
    kept_special_tokens: Sequence[str] = (),
) -> IncrementalDecoder:
    """The decoder that fits `tokenizer`.

    `kept_special_tokens` are shown although special tokens are skipped; a tokenizer without byte
    pieces shows all of them then.
    """
    kept_ids = tokenizer.special_ids_of(kept_special_tokens)
    if tokenizer.pieces is not None:
        return PieceDecoder(
            tokenizer.pieces,
            prefix_ids,
            skip_special_tokens=skip_special_tokens,
            kept_ids=kept_ids,
        )
    skip_special_tokens = skip_special_tokens and not kept_ids
    return WindowDecoder(
        tokenizer,
        prefix_ids,
        skip_special_tokens=skip_special_tokens,
        spaces_between_special_tokens=spaces_between_special_tokens,
    )


@dataclass(frozen=True)
class StopMatch:
    """Text that may be shown now, and the stop string that ends it (None: none yet)."""

    text: str
    matched: str | None = None


class StopMatcher:
    """Looks for the first of several stop strings in text that comes in pieces.

    Each string is followed by the Knuth-Morris-Pratt automaton, so the work per character is
    constant however the text is cut and however the strings repeat themselves. The match whose
    end comes first wins, of those the longest. Text that may still begin a match is kept back.
    `keep_match`: the matched string is shown (no_stop_trim).
    """

    def __init__(self, stops: Sequence[str], *, keep_match: bool = False) -> None:
        self._stops = [stop for stop in dict.fromkeys(stops) if stop]
        self._fallbacks = [_fallback_table(stop) for stop in self._stops]
        self._lengths = [0] * len(self._stops)  # how much of each string the text's end matches
        self._first_chars = frozenset(stop[0] for stop in self._stops)
        self._keep_match = keep_match
        self._held = ""

    def feed(self, text: str, *, armed: bool = True) -> StopMatch:
        """Take more text. While not `armed` a complete stop string is ordinary text.

        Feed nothing after a match.
        """
        if not self._held and self._first_chars.isdisjoint(text):
            return StopMatch(text)
        buffer = self._held + text
        for at in range(len(self._held), len(buffer)):
            matched = self._advance(buffer[at])
            if matched is not None and armed:
                end = at + 1 if self._keep_match else at + 1 - len(matched)
                self._held = ""
                return StopMatch(buffer[:end], matched)
        cut = len(buffer) - max(self._lengths, default=0)
        self._held = buffer[cut:]
        return StopMatch(buffer[:cut])

    def flush(self) -> str:
        """The text kept back, at the end of a request that no stop string ended."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> str | None:
        """Move every automaton by `char`; the longest string that ends here, or None."""
        matched: str | None = None
        for i, stop in enumerate(self._stops):
            fallback = self._fallbacks[i]
            length = self._lengths[i]
            while length and stop[length] != char:
                length = fallback[length]
            if stop[length] == char:
                length += 1
            if length == len(stop):
                if matched is None or len(stop) > len(matched):
                    matched = stop
                length = fallback[length]
            self._lengths[i] = length
        return matched


def _fallback_table(pattern: str) -> list[int]:
    """table[n]: length of the longest proper prefix of pattern[:n] that is also its suffix."""
    table = [0, 0]
    length = 0
    for at in range(1, len(pattern)):
        while length and pattern[at] != pattern[length]:
            length = table[length]
        if pattern[at] == pattern[length]:
            length += 1
        table.append(length)
    return table
