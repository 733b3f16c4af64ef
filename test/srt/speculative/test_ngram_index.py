"""The n-gram index against a search of the whole sequence."""

from __future__ import annotations

import numpy as np
import pytest

from sglang.srt.speculative import ngram_index
from sglang.srt.speculative.ngram_index import Match, NgramIndex


def longest_match(tokens: list[int], size: int, most: int, *, newest: int) -> Match | None:
    """By definition: of the `newest` places where the last n-gram ended before, the longest."""
    last = len(tokens) - 1
    places = [
        end
        for end in range(last - 1, size - 2, -1)
        if tokens[end + 1 - size : end + 1] == tokens[last + 1 - size :]
    ]
    best: Match | None = None
    for end in places[:newest]:
        length = 0
        while length < min(most, end + 1) and tokens[end - length] == tokens[last - length]:
            length += 1
        if best is None or length > best.length:
            best = Match(end + 1, length)
    return best


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("letters", [2, 5, 40])
def test_finds_what_a_search_of_the_whole_sequence_finds(size: int, letters: int) -> None:
    rng = np.random.default_rng(10 * size + letters)
    tokens = rng.integers(0, letters, 700).astype(np.int32)
    # One hash for each n-gram of these, so that candidates are exactly the places of the n-gram.
    index = NgramIndex(size, 1 << 20)
    keys = {
        index._key_of(tokens, end): tuple(tokens[end + 1 - size : end + 1].tolist())
        for end in range(size - 1, len(tokens))
    }
    assert len(keys) == len(set(keys.values())), "a collision: choose another seed"
    found = 0
    for known in range(1, len(tokens) + 1):
        some = tokens[:known]
        index.extend(some, known - 1)
        expected = longest_match(some.tolist(), size, 6, newest=ngram_index._MAX_CANDIDATES)
        if known < size:
            expected = None
        assert index.find(some, 6) == expected, known
        found += expected is not None
    assert found > 0


def test_pieces_of_any_size_give_the_same_index() -> None:
    rng = np.random.default_rng(4)
    tokens = rng.integers(0, 3, 500).astype(np.int32)
    whole, pieces = NgramIndex(2, 64), NgramIndex(2, 64)
    whole.extend(tokens, 500)
    end = 0
    while end < 500:
        end = min(500, end + int(rng.integers(0, 30)))
        pieces.extend(tokens, end)
    assert (whole._heads == pieces._heads).all()
    assert (whole._earlier[1:500] == pieces._earlier[1:500]).all()
    assert repr(whole) == "NgramIndex(n=2, indexed=500)"


def test_another_ngram_of_the_same_hash_is_no_match() -> None:
    tokens = np.array([1, 2, 3, 4, 5, 6], np.int32)
    index = NgramIndex(2, 4)
    index.extend(tokens, 5)
    index._heads[:] = 3  # as if all hashes were equal
    index._earlier[:5] = -1
    assert index.find(tokens, 8) is None


def test_nothing_is_found_in_too_few_tokens() -> None:
    index = NgramIndex(3, 16)
    for known in range(1, 4):
        tokens = np.full(known, 7, np.int32)
        index.extend(tokens, known - 1)
        assert index.find(tokens, 8) is None
    assert index.num_indexed == 0, "two tokens hold no n-gram of three"


def test_a_long_sequence_costs_four_bytes_a_token_and_a_bounded_table() -> None:
    count = 3_000_000
    tokens = np.random.default_rng(1).integers(0, 50_000, count).astype(np.int32)
    index = NgramIndex(3, count)
    index.extend(tokens, count)
    assert index._earlier.nbytes == 4 * count
    assert index._heads.nbytes == 4 << 22
    tail = np.concatenate([tokens, tokens[1000:1003]])
    found = index.find(tail, 12)
    assert found is not None
    assert tokens[found.next_position - 3 : found.next_position].tolist() == tail[-3:].tolist()
