"""Which adapters run at once and whose place one takes, as numbers."""

from __future__ import annotations

import pytest

from sglang.srt.managers.lora_policy import choose_place, has_place, held_places, may_overtake


def test_who_keeps_a_place() -> None:
    assert held_places([1, None, 2, 1], set(), {1: 0, 2: 1, 3: 2}) == {1, 2}
    assert held_places([None], {3, 4}, {1: 0, 3: 2}) == {3}, "a pinned one has to lie somewhere"
    assert held_places([], set(), {1: 0}) == set()


@pytest.mark.parametrize(
    ("adapter", "held", "pinned", "expected"),
    [
        (1, {1, 2}, set(), True),
        (3, {1, 2}, set(), False),
        (3, {1}, set(), True),
        (3, {1}, {9}, False),  # 9 has to find a place when it comes
        (9, {1}, {9}, True),
        (3, {9}, {9}, True),
        (3, {1, 9}, {9}, False),
    ],
)
def test_two_places(adapter: int, held: set[int], pinned: set[int], expected: bool) -> None:
    assert has_place(adapter, held, pinned, 2) is expected


def test_who_may_overtake() -> None:
    assert may_overtake(None, {1, 2}, set(), 2)
    assert not may_overtake(1, {1, 2}, set(), 2), "it would keep the place that is waited for"
    assert may_overtake(9, {1}, {9}, 2)
    assert may_overtake(9, {1, 9}, {9}, 2)
    assert not may_overtake(9, {1, 2}, {9}, 2)


def test_whose_place_is_taken() -> None:
    assert choose_place({}, set(), 2) == (0, None)
    assert choose_place({5: 0}, set(), 2) == (1, None)
    assert choose_place({5: 1}, {5}, 2) == (0, None)
    assert choose_place({5: 1, 6: 0}, set(), 2) == (1, 5)
    assert choose_place({5: 1, 6: 0}, {5}, 2) == (0, 6)
