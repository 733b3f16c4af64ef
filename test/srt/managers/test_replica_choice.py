"""Which replica gets a request."""

from __future__ import annotations

import numpy as np
import pytest

from sglang.srt.managers.replica_choice import (
    BLOCK_TOKENS,
    MAX_BLOCKS,
    MAX_NOTED,
    SPARE_REQUESTS,
    ReplicaChoice,
)

SHORT = np.arange(4, dtype=np.int32)


def prompt(first: int, blocks: int = 3) -> np.ndarray:
    return np.arange(first, first + blocks * BLOCK_TOKENS + 5, dtype=np.int32)


@pytest.mark.parametrize("method", ["round_robin", "auto"])
def test_replicas_take_turns(method: str) -> None:
    choice = ReplicaChoice(method, 3)
    assert [choice.choose(SHORT) for _ in range(5)] == [0, 1, 2, 0, 1]
    assert choice.num_requests == [2, 2, 1]


def test_the_shortest_queue_counts_what_has_not_ended() -> None:
    choice = ReplicaChoice("shortest_queue", 3)
    assert [choice.choose(SHORT) for _ in range(4)] == [0, 1, 2, 0]
    choice.ended(1)
    assert choice.choose(SHORT) == 1
    choice.began(1)  # by its own wish
    choice.ended(2)
    assert [choice.choose(SHORT) for _ in range(2)] == [2, 2]
    assert choice.num_requests == [2, 2, 2]


def test_a_prefix_is_followed_to_who_has_it() -> None:
    choice = ReplicaChoice("cache_aware", 2)
    assert [choice.choose(prompt(0)), choice.choose(prompt(9000))] == [0, 1]
    assert [choice.choose(prompt(9000, 9)), choice.choose(prompt(9000, 2))] == [1, 1]
    assert choice.choose(prompt(0)[: BLOCK_TOKENS + 1]) == 0
    assert choice.choose(prompt(0), "another key") == 0, "unknown, and its queue is the shorter"


def test_a_busy_owner_is_left_alone() -> None:
    choice = ReplicaChoice("cache_aware", 2)
    chosen = [choice.choose(prompt(0)) for _ in range(SPARE_REQUESTS + 2)]
    assert chosen == [0] * (SPARE_REQUESTS + 1) + [1]
    assert choice.choose(prompt(0)) == 1, "who has it as well now"


def test_what_is_noted_is_bounded() -> None:
    choice = ReplicaChoice("cache_aware", 2)
    for number in range(MAX_NOTED // MAX_BLOCKS + 2):
        choice.ended(choice.choose(prompt(10**6 * number, MAX_BLOCKS + 4)))
    assert len(choice._seen) == MAX_NOTED
