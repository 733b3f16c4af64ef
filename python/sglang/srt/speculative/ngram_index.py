"""Where the n-grams of a growing token sequence stood before: chains of positions by hash.

A request that is drafted from its own text owns one and looks up its newest tokens every step.
The form is that of LZ77 coders: a table of newest positions, and for each position the one before
it with the same hash. So a token costs four bytes and O(1), a prompt is indexed in pieces of array
operations, and a look costs no more for ten million tokens than for a thousand. A suffix tree
would find the longest match of all, at tens of times the memory and a Python step per token.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]

_FACTOR: Final = 0x9E3779B1  # 2^32 over the golden ratio, odd (Knuth, TAOCP 3, section 6.4)
_MASK: Final = (1 << 32) - 1
_MIN_BITS, _MAX_BITS = 8, 22
_MAX_CANDIDATES = 24
# Fewer positions are indexed one by one: the array operations have a fixed cost.
_FEW = 12
_NONE: Final = -1


class Match(NamedTuple):
    """The newest tokens also end before position `next_position`, `length` of them."""

    next_position: int
    length: int


class NgramIndex:
    """Chains of the places where n-grams of `num_tokens_each` tokens end.

    Invariants: the n-grams that end before position `num_indexed` are indexed, each once;
    `_earlier[p]` is the greatest place below p with p's hash, or -1, and a head the greatest of
    all. `expected_tokens` sizes the table, not the sequence.
    """

    def __init__(self, num_tokens_each: int, expected_tokens: int) -> None:
        self.num_tokens_each = num_tokens_each
        bits = min(max(expected_tokens.bit_length(), _MIN_BITS), _MAX_BITS)
        self._shift = 32 - bits
        self._heads: Int32Array = np.full(1 << bits, _NONE, np.int32)
        self._earlier: Int32Array = np.empty(max(expected_tokens, 64), np.int32)
        self.num_indexed = 0

    def extend(self, tokens: Int32Array, end: int) -> None:
        """Index what ends before position `end` of `tokens`, the sequence so far."""
        first = max(self.num_indexed, self.num_tokens_each - 1)
        if end <= first:
            return
        if end > len(self._earlier):
            self._earlier = np.resize(self._earlier, max(end, 2 * len(self._earlier)))
        if end - first <= _FEW:
            for place in range(first, end):
                key = self._key_of(tokens, place)
                self._earlier[place] = self._heads[key]
                self._heads[key] = place
        else:
            self._extend_many(tokens, first, end)
        self.num_indexed = end

    def find(self, tokens: Int32Array, max_length: int) -> Match | None:
        """The longest match of the end of `tokens` among the newest candidates, the newest of
        equals; compares `max_length` tokens. None: no n-gram that is indexed ends like it."""
        last = len(tokens) - 1
        if last + 1 < self.num_tokens_each:
            return None
        ends: list[int] = []
        place = self._heads.item(self._key_of(tokens, last))
        while place >= 0 and len(ends) < _MAX_CANDIDATES:
            if place < last:
                ends.append(place)
            place = self._earlier.item(place)
        if not ends:
            return None
        back = np.arange(min(max_length, last + 1))
        places = np.array(ends)[:, None] - back
        same = (tokens[np.maximum(places, 0)] == tokens[last - back]) & (places >= 0)
        lengths = np.logical_and.accumulate(same, axis=1).sum(axis=1)
        best = int(lengths.argmax())
        length = int(lengths[best])
        if length < self.num_tokens_each:  # another n-gram of the same hash
            return None
        return Match(ends[best] + 1, length)

    def _key_of(self, tokens: Int32Array, place: int) -> int:
        value = 0
        for token in tokens[place + 1 - self.num_tokens_each : place + 1].tolist():
            value = (value * _FACTOR + token + 1) & _MASK
        return ((value * _FACTOR) & _MASK) >> self._shift

    def _extend_many(self, tokens: Int32Array, first: int, end: int) -> None:
        """`extend` in array operations: places of one hash are linked by a stable sort."""
        size = self.num_tokens_each
        values = np.zeros(end - first, np.uint32)
        factor = np.uint32(_FACTOR)
        for offset in range(size - 1, -1, -1):
            values *= factor
            values += tokens[first - offset : end - offset].astype(np.uint32) + np.uint32(1)
        values *= factor
        keys = values >> np.uint32(self._shift)
        order = np.argsort(keys, kind="stable")
        sorted_keys = keys[order]
        earlier = self._heads[sorted_keys]
        same = sorted_keys[1:] == sorted_keys[:-1]
        earlier[1:][same] = (order[:-1] + first)[same]
        self._earlier[first + order] = earlier
        ends_chain = np.append(~same, True)
        self._heads[sorted_keys[ends_chain]] = (order + first)[ends_chain]

    def __repr__(self) -> str:
        return f"NgramIndex(n={self.num_tokens_each}, indexed={self.num_indexed})"
