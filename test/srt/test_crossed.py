"""Whatever is crossed, everyday runs leave out no value and the slow run no pair."""

from __future__ import annotations

import itertools

import pytest

from srt.crossed import crossed, mostly_slow


@pytest.mark.parametrize("each", [1, 2])
def test_every_value_is_met_everyday_and_every_pair_sometimes(each: int) -> None:
    firsts, seconds = "abcd", range(5)
    pairs = crossed(firsts, seconds, each=each)
    assert [one.values for one in pairs] == list(itertools.product(firsts, seconds))
    everyday = [one.values for one in pairs if not one.marks]
    assert [second for first, second in everyday if first == "a"] == list(seconds)
    for first in "bcd":
        assert len([pair for pair in everyday if pair[0] == first]) == each
    assert len({second for first, second in everyday if first != "a"}) == min(5, 3 * each)


def test_what_is_not_everyday_is_slow() -> None:
    first, second = mostly_slow(["a"], ["b"])
    assert first == "a"
    assert second.values == ("b",)
    assert [mark.name for mark in second.marks] == ["slow"]
